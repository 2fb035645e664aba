r"""Linear minimisation over convex sets: which vertex of the set goes furthest down a gradient.

References:
    Imtiaz et al., SAIF, arXiv 2212.07495, section 3 (box and capped l1 ball).
    Kazemi, Kerdreux, Wang, Generating structured adversarial attacks using Frank-Wolfe method, 2021
    (nuclear group norm).
"""

import jax.numpy as jnp

from gse_jax.ops.projections import largest_pixels

# 2^9 power iterations: a second singular value of 99 % of the first is left with a weight of 4e-5.
_SQUARINGS = 9
# Up to this side a matrix product is written out: calls of a matrix routine would take longer.
_SMALL = 8


def capped_simplex_vertex(gradient, count):
    r"""Solve argmin_v <gradient, v> with 0 <= v <= 1 and sum v <= count.

    Args:
        gradient: [H, W].
        count: int, static.

    Returns:
        [H, W] 1 at the `count` most negative entries, fewer where fewer are negative.
    """
    chosen = largest_pixels(-gradient, count) & (gradient < 0.0)
    return chosen.astype(gradient.dtype)


def leading_pair(matrices):
    r"""Return the largest singular value of each matrix and its pair of vectors.

    By repeated squaring of the Gram matrix: a dense SVD of hundreds of small matrices takes longer
    on CPU than the gradient of the model that they come from.

    Args:
        matrices: [..., m, n].

    Returns:
        (sigma [...], u [..., m], v [..., n]) with `matrix @ v = sigma * u`. Where the two largest
        values are equal, v is some vector of their common space; for a zero matrix all are zero.
    """
    largest = jnp.max(jnp.abs(matrices), axis=(-2, -1), keepdims=True)
    scaled = matrices / jnp.where(largest > 0.0, largest, 1.0)
    power = _gram_power(scaled)
    # Of the rank-one limit v v^T, the longest column.
    length = jnp.diagonal(power, axis1=-2, axis2=-1)
    column = jnp.argmax(length, axis=-1)[..., None, None]
    v = _normalised(jnp.take_along_axis(power, column, axis=-1)[..., 0])
    # Of the scaled matrices: the squares of what a sure model's gradients hold would underflow.
    u = jnp.einsum("...mn,...n->...m", scaled, v)
    return largest[..., 0, 0] * jnp.sqrt(jnp.sum(u * u, axis=-1)), _normalised(u), v


def _gram_power(matrices):
    """(M^T M)^(2^_SQUARINGS) up to a factor."""
    batch, n = matrices.shape[:-2], matrices.shape[-1]
    if n <= _SMALL:
        # The batch last: one vector instruction works on several matrices.
        m = jnp.moveaxis(matrices.reshape(-1, *matrices.shape[-2:]), 0, -1)
        power = jnp.sum(m[:, :, None] * m[:, None], axis=0)  # [n, n, batch]
        product = lambda a: jnp.sum(a[:, :, None] * a[None], axis=1)
        trace = lambda a: jnp.trace(a)[None, None]
    else:
        power = jnp.swapaxes(matrices, -2, -1) @ matrices
        product = lambda a: a @ a
        trace = lambda a: jnp.trace(a, axis1=-2, axis2=-1)[..., None, None]
    for _ in range(_SQUARINGS):
        size = trace(power)
        power = product(power / jnp.where(size > 0.0, size, 1.0))
    return jnp.moveaxis(power, -1, 0).reshape(*batch, n, n) if n <= _SMALL else power


def _normalised(vector):
    largest = jnp.max(jnp.abs(vector), axis=-1, keepdims=True)
    vector = vector / jnp.where(largest > 0.0, largest, 1.0)
    norm = jnp.sqrt(jnp.sum(vector * vector, axis=-1, keepdims=True))
    return vector / jnp.where(norm > 0.0, norm, 1.0)


def nuclear_group_vertex(gradient, size: int, radius):
    r"""Solve argmin_v <gradient, v> over the ball of the nuclear group norm.

    The norm of v is `sum_g max_c |v_{g,c}|_*`, over square patches g that tile the image and
    channels c, with |.|_* the sum of singular values. Its vertices live on one patch.

    Args:
        gradient: [H, W, C]; rows and columns beyond the last whole patch are left alone.
        size: int, side of the patches.
        radius: [] > 0.

    Returns:
        [H, W, C] `-radius * u_1 v_1^T` per channel, on the patch with the largest sum over channels
        of the largest singular values.
    """
    height, width, channels = gradient.shape
    rows, columns = height // size, width // size
    tiles = gradient[: rows * size, : columns * size].reshape(rows, size, columns, size, channels)
    tiles = tiles.transpose(0, 2, 4, 1, 3)  # [rows, columns, C, size, size]
    sigma, u, v = leading_pair(tiles)
    gain = jnp.sum(sigma, axis=-1)
    best = largest_pixels(gain, 1)[..., None, None, None]
    vertex = jnp.where(best, -radius * u[..., :, None] * v[..., None, :], 0.0)
    vertex = vertex.transpose(0, 3, 1, 4, 2).reshape(rows * size, columns * size, channels)
    return jnp.pad(vertex, ((0, height - rows * size), (0, width - columns * size), (0, 0)))
