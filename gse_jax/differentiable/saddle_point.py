r"""Solve the symmetric system of an equality-constrained minimum, by products with its matrix only.

    [ A   g ] [ d ]   [ a ]
    [ g^T 0 ] [ e ] = [ b ]

with A = I + nu Hessian. On the plane g.d = 0 a strict minimum has a positive definite A, so the
part of d in that plane is found by conjugate gradients on the projected matrix; the rest is
explicit.

References:
    Nocedal, Wright, Numerical Optimization, 2006, algorithm 16.2 (projected conjugate gradients).
"""

import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from gse_jax.attacks.loops import while_loop

MAX_PRODUCTS = 200  # of the matrix; a few dozen reach rounding level on the networks tried
RELATIVE_RESIDUAL = {"float64": 1e-12, "float32": 1e-6}


def saddle_point_solve(matvec, rhs):
    """Solve `matvec(d, e) = rhs`; linear in `rhs`, differentiable and transposable.

    Args:
        matvec: (d [...], e []) -> pair of the same shapes; the symmetric matrix above, or
            the same with g = 0 and any corner but 0.
        rhs: (a [...], b []).

    Returns:
        (d [...], e []).
    """
    # One array: JAX transposes no solve of which a part of the right side is constant. So is `a` where what is
    # differentiated moves no slope: the images alone of a network of ReLUs, or the last bias alone.
    joined, split = ravel_pytree(rhs)
    return split(lax.custom_linear_solve(
        lambda v: ravel_pytree(matvec(split(v)))[0], joined,
        lambda product, v: ravel_pytree(_solve(lambda pair: split(product(ravel_pytree(pair)[0])), split(v)))[0],
        symmetric=True))


def _solve(matvec, rhs):
    a, b = rhs
    normal, corner = matvec((jnp.zeros_like(a), jnp.ones_like(b)))
    length = jnp.sum(normal * normal)
    bordered = length > 0.0
    safe_length = jnp.where(bordered, length, 1.0)

    def tangential(v):
        return v - normal * (jnp.sum(normal * v) / safe_length)

    def product(v):
        return matvec((v, jnp.zeros_like(b)))[0]

    along = jnp.where(bordered, normal * (b / safe_length), 0.0)
    whole = a - product(along)
    # The derivative of the distance itself has nothing in the plane: what the projection leaves of it
    # is rounding, off the plane too, which no number of products reduces. So it is projected twice,
    # and measured against what there was before.
    inside = _conjugate_gradients(lambda v: tangential(product(v)), tangential(tangential(whole)),
                                  RELATIVE_RESIDUAL[a.dtype.name] ** 2 * jnp.sum(whole * whole))
    d = along + inside
    e = jnp.sum(normal * (a - product(d))) / safe_length
    # Without a gradient at all nothing is to be solved; 0 / 0 would spoil every other image's part.
    free = ~bordered & (corner != 0.0)
    return d, jnp.where(bordered, e, jnp.where(free, b / jnp.where(free, corner, 1.0), 0.0))


def _conjugate_gradients(product, rhs, goal):
    """Solve `product(v) = rhs` from v = 0 until |residual|^2 <= goal (Hestenes, Stiefel 1952)."""
    def keep_going(carry):
        _, _, _, size, count = carry
        return (size > goal) & (count < MAX_PRODUCTS)

    def body(carry):
        v, residual, direction, size, count = carry
        image = product(direction)
        curvature = jnp.sum(direction * image)
        # Without positive curvature this is no strict minimum, and the derivative does not exist:
        # what was found so far is returned, not NaN.
        convex = curvature > 0.0
        step = jnp.where(convex, size / jnp.where(convex, curvature, 1.0), 0.0)
        v, residual = v + step * direction, residual - step * image
        new = jnp.where(convex, jnp.sum(residual * residual), 0.0)
        return v, residual, residual + (new / size) * direction, new, count + 1

    start = (jnp.zeros_like(rhs), rhs, rhs, jnp.sum(rhs * rhs), jnp.zeros((), jnp.int32))
    return while_loop(keep_going, body, start)[0]
