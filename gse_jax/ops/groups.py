"""Group norms over the square cells that tile an image, for one perturbation [H, W, C].

A cell holds all channels of its pixels. Where the size does not divide the image, the last cells
are smaller.

References:
    Xu et al., Structured adversarial attack, arXiv 1808.01664, section 3 and proposition 1.
    Yuan, Lin, Model selection and estimation in regression with grouped variables, 2006 (prox).
"""

import jax.numpy as jnp
from jax import lax

from gse_jax.ops.projections import safe_sqrt


def cell_sums(values, size: int):
    """Sum a map over cells, and give every pixel the sum of its cell.

    Args:
        values: [H, W].
        size: int, side of the cells in pixels.

    Returns:
        [H, W].
    """
    height, width = values.shape
    padded = jnp.pad(values, ((0, -height % size), (0, -width % size)))
    tall, wide = padded.shape
    sums = padded.reshape(tall // size, size, wide // size, size).sum((1, 3))
    spread = lax.broadcast_in_dim(sums, (tall // size, size, wide // size, size), (0, 2))
    return spread.reshape(tall, wide)[:height, :width]


def group_soft_threshold(v, tradeoff, size: int):
    r"""Solve argmin_z 1/2 |z - v|^2 + tradeoff * sum_cells |z_cell|_2.

    Args:
        v: [H, W, C].
        tradeoff: [] >= 0.
        size: int, side of the cells in pixels.

    Returns:
        [H, W, C] `max(0, 1 - tradeoff / |v_cell|) v`.
    """
    norm = safe_sqrt(cell_sums(jnp.sum(v * v, axis=-1), size))
    active = norm > tradeoff
    shrink = jnp.where(active, 1.0 - tradeoff / jnp.where(active, norm, 1.0), 0.0)
    return v * shrink[..., None]
