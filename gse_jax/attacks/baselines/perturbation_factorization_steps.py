"""The single steps of SAPF: magnitudes, selection, and the budget.

References:
    Fan et al., Sparse adversarial attack via perturbation factorization, ECCV 2020, algorithm 1;
    github wubaoyuan/Sparse-Adversarial-Attack, main.py and flags.py (all constants).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gse_jax.ops import largest_pixels, project_binary_sphere, superpixel_soft_threshold

# Penalties of box, sphere, groups and budget: at the beginning, at most, and growth per iteration.
_PENALTIES = (5e-3, 5e-3, 5e-3, 1e-4)
_LARGEST_PENALTIES = (20.0, 20.0, 100.0, 0.01)
_PENALTY_GROWTH = 1.01
_DECAY, _DECAY_EVERY, _SMALLEST_STEP = 0.9, 50, 0.001  # of both step sizes


class Duals(NamedTuple):
    """Multipliers of the constraints on the selection.

    Attributes:
        box: [H, W] of selection = its copy in [0, 1].
        sphere: [H, W] of selection = its copy on the sphere of binary vectors.
        group: [H, W] of selection = its copy in the superpixels' norm.
        budget: [] of sum = number of pixels.
    """

    box: jax.Array  # [H, W] float
    sphere: jax.Array  # [H, W] float
    group: jax.Array  # [H, W] float
    budget: jax.Array  # [] float


def no_duals(image) -> Duals:
    """Return multipliers 0.

    Args:
        image: [H, W, C].

    Returns:
        Duals.
    """
    zero = jnp.zeros_like(image[..., 0])
    return Duals(zero, zero, zero, jnp.zeros((), image.dtype))


def step_size_at(first, count):
    """Return the step size after a number of steps.

    Args:
        first: [] at the beginning.
        count: [] int32.

    Returns:
        [].
    """
    decayed = first * _DECAY ** (count // _DECAY_EVERY).astype(first.dtype)
    return jnp.maximum(decayed, jnp.minimum(first, _SMALLEST_STEP))


def penalties_at(count, dtype):
    """Return the four penalties after a number of ADMM iterations.

    Args:
        count: [] int32.
        dtype: of the result.

    Returns:
        Four [], of box, sphere, groups and budget.
    """
    # The exponent is bounded, so that the power is finite; all penalties are at their largest then.
    grown = _PENALTY_GROWTH ** jnp.clip(count, 0, 2000).astype(dtype)
    return [jnp.minimum(first * grown, largest)
            for first, largest in zip(_PENALTIES, _LARGEST_PENALTIES)]


def magnitude_step(magnitude, selection, gradient, params, count):
    """Do one gradient step on the magnitudes.

    Args:
        magnitude: [H, W, C].
        selection: [H, W].
        gradient: [H, W, C] of lambda_1 f by the perturbation.
        params: SAPFHyperparams of arrays [].
        count: [] int32 steps on the magnitudes before this one.

    Returns:
        [H, W, C].
    """
    s = selection[..., None]
    return magnitude - step_size_at(params.step_size, count) * (2.0 * magnitude * s * s
                                                                + gradient * s)


def selection_step(selection, duals, magnitude, gradient, segments, num_pixels, params, count):
    """Do one ADMM iteration on the selection.

    Args:
        selection: [H, W].
        duals: Duals.
        magnitude: [H, W, C].
        gradient: [H, W, C] of lambda_1 f by the perturbation.
        segments: [H, W] int32 superpixels.
        num_pixels: int, budget.
        params: SAPFHyperparams of arrays [].
        count: [] int32 ADMM iterations before this one.

    Returns:
        (selection, duals).

    References:
        main.py, update_G.
    """
    box, sphere, group, budget = penalties_at(count, selection.dtype)
    in_box = jnp.clip(selection + duals.box / box, 0.0, 1.0)
    on_sphere = project_binary_sphere(selection + duals.sphere / sphere)
    in_groups = superpixel_soft_threshold(selection + duals.group / group,
                                          params.group_weight / group, segments)
    slope = jnp.sum(2.0 * selection[..., None] * magnitude**2 + gradient * magnitude, axis=-1)
    slope += duals.box + box * (selection - in_box)
    slope += duals.sphere + sphere * (selection - on_sphere)
    slope += duals.group + group * (selection - in_groups)
    slope += duals.budget + budget * (jnp.sum(selection) - num_pixels)
    curvature = box + sphere + group + budget * selection.size
    # That of |s m|^2, which matters where magnitudes are large. The larger of both is at least half of their
    # sum, so the step stays below the length at which it would diverge.
    curvature = jnp.maximum(curvature, jnp.sum(2.0 * magnitude**2, axis=-1))
    new = selection - jnp.minimum(step_size_at(params.step_size, count), 1.0 / curvature) * slope
    return new, Duals(duals.box + box * (new - in_box), duals.sphere + sphere * (new - on_sphere),
                      duals.group + group * (new - in_groups),
                      duals.budget + budget * (jnp.sum(new) - num_pixels))


def binary_selection(selection, num_pixels):
    """Return the binary selection that a real-valued one stands for.

    Args:
        selection: [H, W].
        num_pixels: int, budget.

    Returns:
        [H, W] of zeros and ones: 1 where above 1/2 and among the `num_pixels` largest.
    """
    kept = (selection > 0.5) & largest_pixels(selection, num_pixels)
    return kept.astype(selection.dtype)
