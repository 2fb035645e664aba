r"""The sphere of the lp-box method: a vector is binary where the box [0, 1]^n meets this sphere.

References:
    Wu, Ghanem, lp-box ADMM: a versatile framework for integer programming, TPAMI 2019,
    arXiv 1604.07666, proposition 1 and eq. (10).
"""

import math

import jax.numpy as jnp


def project_binary_sphere(v):
    r"""Solve argmin_z |z - v|_2 with |z - 1/2|_2 = sqrt(n) / 2.

    Args:
        v: [...], n entries.

    Returns:
        [...]; where every entry is 1/2 all points are equally near, and the result is all 1.
    """
    shifted = v - 0.5
    norm = jnp.sqrt(jnp.sum(shifted * shifted))
    direction = jnp.where(norm > 0.0, shifted / jnp.where(norm > 0.0, norm, 1.0),
                          1.0 / math.sqrt(v.size))
    return 0.5 + 0.5 * math.sqrt(v.size) * direction
