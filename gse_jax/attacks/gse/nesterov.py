"""One iteration of GSE's inner loop: proximal, then projected, Nesterov-averaged gradient descent.

Written for one image, in the units of images of range width 2.

| symbol | name here |
|---|---|
| w | `w` perturbation |
| lambda | `tradeoff` [H, W], `start` its initial value in this run |
| sigma | `step_size` |
| alpha_k, t | `momentum` |
| k-hat | `settings.phase1_steps` |

References:
    arXiv 2311.17434, algorithm 1 (half-quasinorm proximal phase) and section 2.3 (projected NAG).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gse_jax.ops import half_quasinorm_prox, update_tradeoff


class Iterate(NamedTuple):
    """The inner loop's variables.

    Attributes:
        w: [H, W, C] perturbation.
        previous: [H, W, C] last point before averaging (w_old).
        tradeoff: [H, W] per-pixel trade-off map.
        momentum: [] t, starts at 1.
        step: [] int32 number k of iterations done.
    """

    w: jax.Array  # [H, W, C] float
    previous: jax.Array  # [H, W, C] float
    tradeoff: jax.Array  # [H, W] float
    momentum: jax.Array  # [] float
    step: jax.Array  # [] i32


def start_run(shape, start) -> Iterate:
    """Return the iterate before the first step.

    Args:
        shape: (H, W, C).
        start: [] initial trade-off of the run.

    Returns:
        Iterate with w = 0.
    """
    zero = jnp.zeros(shape, start.dtype)
    return Iterate(zero, zero, jnp.full(shape[:2], start), jnp.ones((), start.dtype),
                   jnp.zeros((), jnp.int32))


def clip(values, lower, upper):
    """Clip to a range; a value that lies exactly on a bound counts as inside.

    Args:
        values: [...].
        lower: broadcastable to `values`.
        upper: broadcastable to `values`, >= lower.

    Returns:
        [...] what `jnp.clip` gives. Its derivative differs on a bound: there it is the one from
        inside, 1, where `jnp.clip` halves it. Black and white pixels of real images lie on bounds.
    """
    return jnp.where(values < lower, lower, jnp.where(values > upper, upper, values))


def iterate(now: Iterate, gradient, lower, upper, *, start, step_size, settings,
            hyperparams) -> Iterate:
    """Do iteration k of one run.

    Args:
        now: the variables after k iterations.
        gradient: [H, W, C] gradient of the margin at the clean image + `now.w`.
        lower: [H, W, C] smallest admissible perturbation, <= 0.
        upper: [H, W, C] largest admissible perturbation, >= 0.
        start: [] initial trade-off of this run; pixels above it are off the support.
        step_size: [] step size of this run.
        settings: GSESettings.
        hyperparams: GSEHyperparams.

    Returns:
        The variables after k + 1 iterations, `w` clipped to the admissible range.
    """
    phase1 = now.step < settings.phase1_steps
    frozen = (now.tradeoff > start)[..., None]  # the map no longer changes in phase 2
    # The support is chosen once; zeroing w off it again in later iterations would change nothing,
    # because every point of phase 2 is zero there. `previous` is set to w at the switch only.
    switch = now.step == settings.phase1_steps
    w = jnp.where(switch & frozen, 0.0, now.w)
    previous = jnp.where(switch, w, now.previous)

    moved = w - step_size * (gradient + 2.0 * hyperparams.mu * now.w)
    proximal = half_quasinorm_prox(moved, (now.tradeoff * step_size)[..., None])
    point = jnp.where(phase1, proximal, jnp.where(frozen, 0.0, moved))

    momentum = 0.5 * (1.0 + jnp.sqrt(1.0 + 4.0 * now.momentum * now.momentum))
    weight = now.momentum / momentum
    # A convex average of the last two points, as published: not FISTA's extrapolation.
    averaged = weight * point + (1.0 - weight) * previous
    adapted = update_tradeoff(now.tradeoff, jnp.any(averaged != 0.0, axis=-1), q=hyperparams.q,
                              blur_size=settings.blur_size, blur_sigma=hyperparams.blur_sigma)
    return Iterate(
        w=clip(averaged, lower, upper),
        previous=point,
        tradeoff=jnp.where(phase1, adapted, now.tradeoff),
        momentum=momentum,
        step=now.step + 1,
    )
