"""Attack with a whole grid of hyperparameters in one compiled program, and find the best of them.

References:
    arXiv 2311.17434, section 4 (ACP, ANC, l2, d_{2,0}: no single number ranks sparse attacks).
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gse_jax.attacks import GSEHyperparams, attack
from gse_jax.attacks.gse.settings import check
from gse_jax.attacks.program import compiled, hashable
from gse_jax.attacks.validation import is_traced
from gse_jax.differentiable.arguments import configuration, problem
from gse_jax.differentiable.unrolled import run_once
from gse_jax.metrics import SPARSITY, pareto_set, summary
from gse_jax.types import ApplyFn, Bounds


class Sweep(NamedTuple):
    """What every point of a grid gave; NumPy.

    Attributes:
        hyperparams: GSEHyperparams, every leaf [G].
        success_rate: [G] share of all N images that came out with the wanted prediction.
        numbers: [G, 4] ACP, ANC, l2 ([-1, 1] units) and d_{2,0} (patches of the settings'
            `patch_size`, by which the search compares too), means over the images that this point's
            attack fooled; NaN where there are none.
        pareto: [G] bool, the points that no other point beats (see `pareto_set`), among those that
            reach the asked success rate.
        gradient_evals: [G] gradients per image.
        result: AttackResult or DifferentiableResult, every leaf [G, N, ...].
    """

    hyperparams: GSEHyperparams
    success_rate: np.ndarray
    numbers: np.ndarray
    pareto: np.ndarray
    gradient_evals: np.ndarray
    result: object


def hyperparam_grid(hyperparams: GSEHyperparams, **axes) -> GSEHyperparams:
    """Return every combination of the values given for some hyperparameters.

    Args:
        hyperparams: values of those that are not varied.
        **axes: field name of GSEHyperparams -> list of values, e.g. `mu=[0.1, 1.0]`.

    Returns:
        GSEHyperparams with leaves [G] float64 NumPy, G the product of the lengths; the last axis
        named varies fastest.

    Raises:
        TypeError: for `hyperparams` of another type.
        ValueError: for an unknown field, or an axis without values.
    """
    if not isinstance(hyperparams, GSEHyperparams):
        raise TypeError(f"hyperparams must be a GSEHyperparams, got {type(hyperparams).__name__}; start from "
                        "gse_jax.GSEHyperparams()")
    for name, values in axes.items():
        if name not in hyperparams._fields:
            raise ValueError(f"{name!r} is no hyperparameter of GSE; use one of "
                             f"{', '.join(hyperparams._fields)}")
        if np.ndim(values) != 1 or np.size(values) == 0:
            raise ValueError(f"{name} must be a list of at least one number, got {values!r}")
    points = [hyperparams._replace(**dict(zip(axes, values, strict=True)))
              for values in itertools.product(*axes.values())]
    return GSEHyperparams(*(np.asarray(leaf, np.float64) for leaf in zip(*points, strict=True)))


def sweep(
    params,
    apply_fn: ApplyFn,
    x,
    y,
    grid: GSEHyperparams,
    *,
    targets=None,
    tradeoff=None,
    settings=None,
    min_success: float | None = None,
    bounds: Bounds = (0.0, 1.0),
) -> Sweep:
    """Attack the same images with every point of a grid, by `jax.vmap` over the hyperparameters.

    All points work on their images at the same time: memory grows with G times N.

    Args:
        params: any pytree of arrays.
        apply_fn: (params, x [N, H, W, C]) -> logits [N, K].
        x: [N, H, W, C], values inside `bounds`.
        y: [N] int, true labels.
        grid: GSEHyperparams with leaves [G], e.g. from `hyperparam_grid`.
        targets: [N] int, or None.
        tradeoff: None: every point searches as `gse_jax.attack` does. [G] or [G, N]: one run per
            image at this trade-off, which makes the trade-off an axis of the grid. (In units of
            each image's largest trade-off it is one too: with the preset's settings,
            `dataclasses.replace(settings, num_runs=1, num_boosted_runs=0)`, and an axis `initial_fraction`.)
        settings: GSESettings; None for the preset.
        min_success: smallest success rate of a point in the Pareto set; None for the highest rate
            of the grid, so that no point looks sparse because it gave up on hard images.
        bounds: (lowest, highest) pixel value.

    Returns:
        Sweep.

    Raises:
        TypeError: for a wrong dtype or type of an argument.
        ValueError: for a wrong shape or range; in one line.
    """
    if not isinstance(grid, GSEHyperparams):
        raise TypeError("grid must be a GSEHyperparams with leaves [G], got "
                        f"{type(grid).__name__}; use gse_jax.differentiable.hyperparam_grid")
    lengths = {np.shape(leaf) for leaf in grid}
    if len(lengths) != 1 or len(next(iter(lengths))) != 1:
        raise ValueError("grid must have leaves of one shape [G], got "
                         f"{sorted(map(list, lengths))}")
    goal, samples = problem(params, apply_fn, x, y, targets, bounds)
    x, count = samples.x, np.shape(grid.mu)[0]
    first = GSEHyperparams(*(leaf[0] for leaf in grid))
    settings, _ = configuration(x.shape[1:], goal.targeted, None, settings, first, x.dtype)
    for point in () if is_traced(grid) else zip(*map(np.asarray, grid), strict=True):
        check(settings, GSEHyperparams(*point), x.shape[1:])
    if tradeoff is not None:
        tradeoff = jnp.asarray(tradeoff, x.dtype)
        if tradeoff.shape not in ((count,), (count, x.shape[0])):
            raise ValueError(f"tradeoff must be [G] or [G, N], got shape {list(tradeoff.shape)} "
                             f"for a grid of {count} and {x.shape[0]} images")
        if not is_traced(tradeoff) and not np.all((tradeoff >= 0.0) & np.isfinite(tradeoff)):
            raise ValueError("tradeoff must hold finite numbers >= 0")
        tradeoff = jnp.broadcast_to(tradeoff.reshape(count, -1), (count, x.shape[0]))
    traced = jax.tree.map(lambda leaf: jnp.asarray(leaf, x.dtype), grid)
    run = compiled(_attack_grid, hashable(apply_fn), goal=goal, settings=settings)
    result = run(params, samples, tradeoff, traced)
    points = [jax.tree.map(lambda leaf: leaf[g], result) for g in range(count)]
    rows = [summary(x, point, bounds=goal.bounds, patch_size=settings.patch_size) for point in points]
    numbers = np.array([[_mean(getattr(row, field)) for field in SPARSITY.values()] for row in rows])
    rate = np.array([row.asr_all for row in rows], float)
    least = rate.max() if min_success is None else min_success
    return Sweep(grid, rate, numbers, pareto_set(numbers, rate >= least),
                 np.asarray(result.gradient_evals).sum(1) / max(x.shape[0], 1), result)


@functools.partial(jax.jit, static_argnames=("apply_fn", "goal", "settings"))
def _attack_grid(params, samples, tradeoff, grid, *, apply_fn, goal, settings):
    def search(hyperparams):
        return attack(params, apply_fn, samples.x, samples.y, settings=settings,
                      targets=samples.target if goal.targeted else None,
                      hyperparams=hyperparams, bounds=goal.bounds)

    def run(hyperparams, tradeoff):
        once = compiled(run_once, apply_fn, goal=goal, settings=settings, unrolled=False)
        return once(params, samples, tradeoff, hyperparams)

    return jax.vmap(search)(grid) if tradeoff is None else jax.vmap(run)(grid, tradeoff)


def _mean(statistic):
    return np.nan if statistic.mean is None else statistic.mean
