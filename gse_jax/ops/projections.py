r"""Euclidean projections onto the sets of the compared attacks, for one perturbation [H, W, C].

References:
    Croce, Hein, Sparse and imperceivable adversarial attacks, arXiv 1909.05040, section 4 (pixels
    and box, sigma map).
    Madry et al., arXiv 1706.06083, section 2.1 (balls).
"""

import math

import jax.numpy as jnp
from jax import lax


def largest_pixels(score, num_pixels):
    """Mark the pixels with the largest scores, exactly as many as asked for.

    Args:
        score: [H, W] or any shape.
        num_pixels: int, static; at most the number of scores.

    Returns:
        bool of the same shape with `num_pixels` True; of equal scores the first in row order.
    """
    flat = score.reshape(-1)
    # Indices, not a threshold: a threshold keeps all ties and breaks the budget.
    _, index = lax.top_k(flat, num_pixels)
    return jnp.zeros(flat.shape, bool).at[index].set(True).reshape(score.shape)


def project_sparse_box(v, num_pixels, lower, upper):
    r"""Solve argmin_z |z - v|_2 with lower <= z <= upper and at most `num_pixels` non-zero pixels.

    Keeping pixel i saves `|v_i|^2 - |v_i - clip(v_i)|^2`; the largest savings are kept. It needs
    lower <= 0 <= upper.

    Args:
        v: [H, W, C].
        num_pixels: int, static.
        lower: [H, W, C] <= 0.
        upper: [H, W, C] >= 0.

    Returns:
        [H, W, C].

    References:
        arXiv 1909.05040, section 4.1.
    """
    inside = jnp.clip(v, lower, upper)
    saved = jnp.sum(v * v - (v - inside) ** 2, axis=-1)
    return jnp.where(largest_pixels(saved, num_pixels)[..., None], inside, 0.0)


def sigma_map(image):
    """Return how much each value varies against its neighbours: noise hides where this is large.

    Args:
        image: [H, W, C] in [0, 1].

    Returns:
        [H, W, C] square root of the smaller of the standard deviations over the three pixels in a
        column and in a row; borders repeat.

    References:
        arXiv 1909.05040, section 3.
    """
    def deviation(axis):
        size = image.shape[axis]
        after = lax.slice_in_dim(image, 1, size, axis=axis)
        before = lax.slice_in_dim(image, 0, size - 1, axis=axis)
        first = lax.slice_in_dim(image, 0, 1, axis=axis)
        last = lax.slice_in_dim(image, size - 1, size, axis=axis)
        three = jnp.stack([jnp.concatenate([after, last], axis), image,
                           jnp.concatenate([first, before], axis)])
        return jnp.std(three, axis=0)

    return jnp.sqrt(jnp.minimum(deviation(0), deviation(1)))


def project_sparse_sigma(target, clean, sigma, num_pixels, kappa):
    r"""Project an image onto those that differ from `clean` as the sigma map allows.

    Colour images: pixel i becomes `(1 + l_i sigma_i) clean_i`, one number |l_i| <= kappa for all its
    channels and the result in [0, 1]. Gray images: `|z_i - clean_i| <= kappa sigma_i`.

    Args:
        target: [H, W, C] image to project.
        clean: [H, W, C] in [0, 1].
        sigma: [H, W, C] `sigma_map(clean)`.
        num_pixels: int, static; pixels that may differ.
        kappa: [] > 0.

    Returns:
        [H, W, C] in [0, 1].

    References:
        arXiv 1909.05040, section 4.2.
    """
    if clean.shape[-1] == 1:
        room = kappa * sigma
        return clean + project_sparse_box(target - clean, num_pixels, jnp.maximum(-room, -clean),
                                          jnp.minimum(room, 1.0 - clean))
    direction = sigma * clean
    moves = direction > 0.0
    safe = jnp.where(moves, direction, 1.0)
    # (1 + l sigma) clean in [0, 1] for every channel; channels that cannot move do not matter.
    highest = jnp.min(jnp.where(moves, (1.0 - clean) / safe, jnp.inf), axis=-1, keepdims=True)
    lowest = jnp.max(jnp.where(moves, -clean / safe, -jnp.inf), axis=-1, keepdims=True)
    energy = jnp.sum(direction**2, axis=-1, keepdims=True)
    wish = target - clean
    best = jnp.sum(wish * direction, axis=-1, keepdims=True) / jnp.where(energy > 0.0, energy, 1.0)
    amount = jnp.clip(best, jnp.maximum(-kappa, lowest), jnp.minimum(kappa, highest))
    moved = jnp.where(energy > 0.0, amount * direction, 0.0)
    saved = jnp.sum(wish**2 - (wish - moved) ** 2, axis=-1)
    return jnp.where(largest_pixels(saved, num_pixels)[..., None], clean + moved, clean)


def safe_sqrt(squares):
    """Return the square root, whose derivative at 0 is 0 in place of infinite.

    Args:
        squares: [...] >= 0.

    Returns:
        [...].
    """
    positive = squares > 0.0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1.0)), 0.0)


def project_l2_ball(v, radius):
    """Solve argmin_z |z - v|_2 with |z|_2 <= radius.

    Args:
        v: [...].
        radius: [] >= 0.

    Returns:
        [...].
    """
    norm = safe_sqrt(jnp.sum(v * v))
    return v * jnp.where(norm > radius, radius / jnp.where(norm > 0.0, norm, 1.0), 1.0)


def project_binary_sphere(v):
    r"""Solve argmin_z |z - v|_2 with |z - 1/2|_2 = sqrt(n) / 2.

    Args:
        v: [...], n entries.

    Returns:
        [...]; where every entry is 1/2 all points are equally near, and the result is all 1. Binary vectors are
        those where this sphere meets the box [0, 1]^n.

    References:
        Wu, Ghanem, lp-box ADMM, TPAMI 2019, arXiv 1604.07666, proposition 1 and eq. (10).
    """
    shifted = v - 0.5
    norm = jnp.sqrt(jnp.sum(shifted * shifted))
    direction = jnp.where(norm > 0.0, shifted / jnp.where(norm > 0.0, norm, 1.0),
                          1.0 / math.sqrt(v.size))
    return 0.5 + 0.5 * math.sqrt(v.size) * direction
