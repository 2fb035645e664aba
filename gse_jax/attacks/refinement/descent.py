r"""One gradient step on a fixed support, to the linearised decision boundary and a little beyond.

References:
    The step is DeepFool's on a subspace: Moosavi-Dezfooli, Fawzi, Frossard, arXiv 1511.04599,
    algorithm 1; the projection onto an l2 ball as in Madry et al., arXiv 1706.06083.

Differs from the reference:
    Aims at a margin of -overshoot instead of stretching the step; entries that lie on a bound and
    would leave it take no part.
"""

import jax.numpy as jnp

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


def step_to_boundary(w, gradient, margin, support, lower, upper, radius, beyond):
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

    Returns:
        [H, W, C] inside the caps, zero off the support.
    """
    w = jnp.where(support[..., None], w, 0.0)
    stuck = ((w <= lower) & (gradient > 0.0)) | ((w >= upper) & (gradient < 0.0))
    slope = jnp.where(support[..., None] & ~stuck, gradient, 0.0)
    squared = jnp.maximum(jnp.sum(slope * slope), 1e-30)
    # Along -slope the margin falls by sqrt(squared) per unit of length.
    length = jnp.clip((margin + beyond) / jnp.sqrt(squared), -_LONGEST, _LONGEST)
    return clip_to_caps(w - slope * (length / jnp.sqrt(squared)), lower, upper, radius)
