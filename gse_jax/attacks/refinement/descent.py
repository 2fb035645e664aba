r"""One gradient step on a fixed support, to the linearised decision boundary and a little beyond.

References:
    The step is DeepFool's on a subspace: Moosavi-Dezfooli, Fawzi, Frossard, arXiv 1511.04599,
    algorithm 1; the projection onto an l2 ball as in Madry et al., arXiv 1706.06083.

Differs from the reference:
    Aims at a margin of -overshoot instead of stretching the step; entries that lie on a bound and
    would leave it take no part.
"""

import jax.numpy as jnp
import numpy as np

_LONGEST = 3.0  # l2 norm of one step, images of range width 2: the margin is not linear further out


def clip_to_caps(w, lower, upper, radius):
    """Clip a perturbation to its range and scale it into the l2 ball.

    Args:
        w: [H, W, C].
        lower: [H, W, C] smallest admissible perturbation, <= 0.
        upper: [H, W, C] largest admissible perturbation, >= 0.
        radius: [] largest l2 norm; may be infinite.

    Returns:
        [H, W, C]; scaling towards 0 keeps it inside the range.
    """
    w = jnp.clip(w, lower, upper)
    norm = jnp.sqrt(jnp.sum(w * w))
    return jnp.where(norm > radius, w * (radius / jnp.maximum(norm, 1e-30)), w)


def excess_over_caps(images, x, hyperparams, bounds):
    """Tell by how much images exceed the caps on the norms of their perturbation.

    Args:
        images: [..., H, W, C].
        x: [..., H, W, C] clean images.
        hyperparams: with `max_l2` and `max_linf`, [] in units of images of range width 2.
        bounds: (low, high).

    Returns:
        [...] share of the cap, 0 where both are kept but for rounding.
    """
    low, high = bounds
    unit = 0.5 * (high - low)
    w = (images - x) / unit
    l2, largest = jnp.sqrt((w * w).sum((-3, -2, -1))), abs(w).max((-3, -2, -1))
    excess = jnp.maximum(l2 / hyperparams.max_l2, largest / hyperparams.max_linf) - 1.0
    # Rounding of the norm, and of x + w, which a small cap feels.
    return jnp.where(excess > 1e-5 + last_digit(w, low, high) / hyperparams.max_linf, excess, 0.0)


def last_digit(x, low, high):
    """Return the rounding of `x + w` in units of images of range width 2."""
    return jnp.finfo(x.dtype).eps * max(abs(low), abs(high)) / (0.5 * (high - low))


def within_caps(images, x, hyperparams, bounds):
    """Return the images that keep the caps, and clean ones in place of the others.

    Args:
        images, x, hyperparams, bounds: as in `excess_over_caps`, with leading axis N; in host memory they
            stay there.

    Returns:
        [N, H, W, C].
    """
    array = np if isinstance(images, np.ndarray) else jnp
    kept = array.asarray(excess_over_caps(images, x, hyperparams, bounds) == 0.0)
    return array.where(kept[:, None, None, None], images, x)


def step_to_boundary(w, gradient, margin, support, lower, upper, radius, beyond, rounding=0.0):
    """Move on the support to where the linearised margin is `-beyond`.

    Args:
        w: [H, W, C] perturbation; what lies off the support is dropped.
        gradient: [H, W, C] gradient of the margin at `w`.
        margin: [] margin at `w`, already without what lies off the support.
        support: [H, W] bool.
        lower: [H, W, C] as in `clip_to_caps`.
        upper: [H, W, C].
        radius: [].
        beyond: [] >= 0.
        rounding: by how much `w`, taken from an image, may miss the cap or bound on which it lies.

    Returns:
        [H, W, C] inside the caps, zero off the support.
    """
    w = jnp.where(support[..., None], w, 0.0)
    stuck = ((w <= lower + rounding) & (gradient > 0.0)) | ((w >= upper - rounding) & (gradient < 0.0))
    slope = jnp.where(support[..., None] & ~stuck, gradient, 0.0)
    squared = jnp.maximum(jnp.sum(slope * slope), 1e-30)
    # Along -slope the margin falls by sqrt(squared) per unit of length.
    length = jnp.clip((margin + beyond) / jnp.sqrt(squared), -_LONGEST, _LONGEST)
    return clip_to_caps(w - slope * (length / jnp.sqrt(squared)), lower, upper, radius)
