r"""SAPF: a perturbation as magnitudes times a binary selection of pixels. A pixel budget.

Minimises `|m * s|^2 + lambda_1 f(x + m * s) + lambda_2 sum_superpixels |s_g|_2` over magnitudes m
and a selection s in {0, 1} per pixel with sum s <= k. A run takes gradient steps on m, then on s by
the lp-box ADMM (s = box copy = sphere copy = group copy, `sum s = k`), so often as there are
rounds; then s is made binary and m tuned with s fixed. A binary search lowers lambda_1. Lengths are
in the units of images of range width `range_width`.

| symbol | name here |
|---|---|
| epsilon, G | `magnitude` m, `selection` s |
| z1, z2, z3, z4 | `Duals`: `box`, `sphere`, `group`, `budget` |
| rho_1 ... rho_4 | `penalties` |
| lambda_1, lambda_2 | `tradeoff`, `group_weight` |

References:
    Fan, Wu, Li, Zhang, Li, Li, Yang, Sparse adversarial attack via perturbation factorization,
    ECCV 2020, section 3; github wubaoyuan/Sparse-Adversarial-Attack, main.py and flags.py.

Differs from the reference:
    One selection factor per pixel, as in the paper; the code has one per value, so its k = 200
    values are 66 pixels here. A factor above 1/2 is not enough: no more than k pixels are kept. All
    points of the tuning are tested, not the last alone, and of those that fool the model the one
    with the smallest l2 norm is returned. A step on s is never longer than one over the curvature
    of the penalties, or of |s m|^2, beyond which it diverges (the published step does on large images, and
    where runs have failed).
    Superpixels are those of the image in [0, 1]; the GSE paper's code casts images in [-1, 1] to 8
    bits first.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gse_jax.attacks import configuration
from gse_jax.attacks.algorithm import Algorithm, Method, Sample, select, wanted_label
from gse_jax.attacks.baselines.perturbation_factorization_steps import (
    Duals,
    binary_selection,
    magnitude_step,
    no_duals,
    selection_step,
)
from gse_jax.attacks.baselines.record import (
    Record,
    is_over,
    is_success,
    note,
    outcome_of,
    start_record,
)
from gse_jax.attacks.baselines.weight_search import next_weight
from gse_jax.attacks.segmentation import slic_segments
from gse_jax.ops import margin_loss

_GROWTH = 10.0  # of lambda_1 after a failure while no run has succeeded; main.py
_SMALLEST = 0.01  # share of the first lambda_1 below which a success ends the search; main.py


@dataclasses.dataclass(frozen=True)
class SAPFSettings:
    """Static configuration of SAPF.

    Attributes:
        num_pixels: pixels that may differ (k), >= 1.
        num_searches: runs of the binary search over lambda_1, >= 1.
        rounds: how often a run alternates between magnitudes and selection, >= 1.
        magnitude_steps: gradient steps on the magnitudes in each round, >= 2; the tuning takes half
            as many.
        selection_steps: ADMM iterations on the selection in each round, >= 1.
        num_segments: superpixels aimed at, >= 1.
        range_width: width of the pixel range that the numbers are meant for, > 0.
    """

    num_pixels: int = 88
    num_searches: int = 10
    rounds: int = 10
    magnitude_steps: int = 200
    selection_steps: int = 200
    num_segments: int = 150
    range_width: float = 2.0


class SAPFHyperparams(NamedTuple):
    """Traced configuration of SAPF.

    Attributes:
        tradeoff: first lambda_1, weight of the margin.
        group_weight: lambda_2, weight of the superpixels' norms.
        step_size: of the magnitudes and of the selection, at the beginning.
    """

    tradeoff: float = 1e-3  # [] float
    group_weight: float = 10.0  # [] float
    step_size: float = 0.1  # [] float


class SAPFState(NamedTuple):
    """State of one image.

    Fixed:
        sample: the image, its labels and its superpixels.
    Changing:
        magnitude: [H, W, C] m, in units of `range_width`.
        selection: [H, W] s.
        duals: multipliers of the ADMM.
        step: [] int32 evaluations in this run.
    Search:
        tradeoff: [] lambda_1 of this run.
        lower: [] largest lambda_1 of a run that failed, 0 if none.
        upper: [] smallest lambda_1 of a run that succeeded, inf if none.
        succeeded: [] bool, this run fooled the model within the budget.
        run: [] int32 runs ended.
    Bookkeeping:
        best_tradeoff: [] lambda_1 of the run that found the best image, 0 if none.
        record: best image by its l2 norm, status and counts.
    """

    sample: Sample  # one image
    magnitude: jax.Array  # [H, W, C] float
    selection: jax.Array  # [H, W] float
    duals: Duals
    step: jax.Array  # [] i32
    tradeoff: jax.Array  # [] float
    lower: jax.Array  # [] float
    upper: jax.Array  # [] float
    succeeded: jax.Array  # [] bool
    run: jax.Array  # [] i32
    best_tradeoff: jax.Array  # [] float
    record: Record


# k counts values there: 200 originally, 265 and 19,000 in the comparison; a third are pixels.
_ORIGINAL = (SAPFSettings(num_pixels=66, num_searches=6, rounds=1, magnitude_steps=2000,
                          selection_steps=2000, range_width=1.0),
             SAPFHyperparams(group_weight=1e-3))
PRESETS = {
    "original": _ORIGINAL,
    "cifar10": (SAPFSettings(), SAPFHyperparams()),
    "imagenet": (SAPFSettings(num_pixels=6333, num_segments=350), SAPFHyperparams(tradeoff=0.01)),
}


def check(settings, hyperparams, image_shape) -> None:
    """Refuse a configuration that cannot run; see `Method.check`."""
    configuration.check_types("sapf", settings, hyperparams, SAPFSettings, SAPFHyperparams)
    configuration.check_whole_numbers(settings, {"num_searches": 1, "rounds": 1, "magnitude_steps": 2,
                                            "selection_steps": 1, "num_segments": 1})
    configuration.check_range_width(settings)
    configuration.check_num_pixels(settings, image_shape)
    configuration.check_numbers(hyperparams, may_be_zero=("group_weight",))


def segment(settings, images):
    """Return the superpixels; see `Method.segment`."""
    return slic_segments(images, settings.num_segments)


def bind(settings, hyperparams, *, targeted, bounds, key=None) -> Algorithm:
    """Return SAPF with its configuration bound; see `Bind`. It is deterministic."""
    del key  # Unused.
    low, high = bounds
    scale = (high - low) / settings.range_width
    to_width_2 = (2.0 / settings.range_width) ** 2  # the trade-off, beside a squared norm
    cycle = settings.magnitude_steps + settings.selection_steps
    search_steps = settings.rounds * cycle
    last_step = search_steps + settings.magnitude_steps // 2  # the test of what the tuning left

    def init(sample: Sample) -> SAPFState:
        scalar, count = jnp.zeros((), sample.x.dtype), jnp.zeros((), jnp.int32)
        return SAPFState(sample, jnp.zeros_like(sample.x), jnp.ones_like(sample.x[..., 0]),
                         no_duals(sample.x), count, hyperparams.tradeoff,
                         scalar, scalar + jnp.inf, jnp.zeros((), bool), count, scalar,
                         start_record(sample))

    def unclipped(state: SAPFState):
        return state.sample.x + scale * state.magnitude * state.selection[..., None]

    def point(state: SAPFState):
        return jnp.clip(unclipped(state), low, high)

    def loss(state: SAPFState, logits):
        return margin_loss(logits, wanted_label(state.sample, targeted), targeted=targeted)

    def step(state: SAPFState, evaluation) -> SAPFState:
        here, wished = point(state), unclipped(state)
        tuning = state.step >= search_steps  # only there the selection is binary and in budget
        score = jnp.where(tuning, jnp.sum(((here - state.sample.x) / scale) ** 2), jnp.inf)
        success = tuning & is_success(state.record, state.sample, evaluation, here, targeted)
        better = success & (score < state.record.score)
        succeeded, ended = state.succeeded | success, state.step >= last_step
        done = (state.run + 1 >= settings.num_searches) | (
            succeeded & (state.tradeoff < _SMALLEST * hyperparams.tradeoff))
        record = note(state.record, state.sample, evaluation, here, score, ended & done,
                      targeted=targeted)

        # The clip passes the gradient of what it did not move.
        inside = (wished >= low) & (wished <= high)
        gradient = jnp.where(inside, state.tradeoff * scale * evaluation.gradient, 0.0)
        # How many steps of each kind this run has taken before.
        whole, part = state.step // cycle, state.step % cycle
        selecting = ~tuning & (part >= settings.magnitude_steps)
        chosen, duals = selection_step(
            state.selection, select(part == settings.magnitude_steps, no_duals(here), state.duals),
            state.magnitude, gradient, state.sample.segments, settings.num_pixels, hyperparams,
            whole * settings.selection_steps + part - settings.magnitude_steps)
        chosen = jnp.where(state.step + 1 == search_steps,
                           binary_selection(chosen, settings.num_pixels), chosen)
        moved = magnitude_step(
            state.magnitude, state.selection, gradient, hyperparams,
            jnp.where(tuning, state.step - settings.rounds * settings.selection_steps,
                      whole * settings.magnitude_steps + part))
        after = state._replace(
            magnitude=jnp.where(selecting, state.magnitude, moved),
            selection=jnp.where(selecting, chosen, state.selection),
            duals=select(selecting, duals, state.duals), step=state.step + 1, succeeded=succeeded,
            best_tradeoff=jnp.where(better, state.tradeoff, state.best_tradeoff), record=record)
        return select(ended, begin_run(after), after)

    return Algorithm(init, point, loss, step, is_over, lambda state: outcome_of(state, to_width_2 * state.best_tradeoff))


def begin_run(state: SAPFState) -> SAPFState:
    """Return the state at the start of the next run, with its lambda_1.

    Args:
        state: the state when a run has ended.

    Returns:
        SAPFState.
    """
    tradeoff, lower, upper = next_weight(state.tradeoff, state.lower, state.upper, state.succeeded,
                                         _GROWTH)
    return state._replace(
        magnitude=jnp.zeros_like(state.magnitude), selection=jnp.ones_like(state.selection),
        duals=no_duals(state.sample.x), step=jnp.zeros((), jnp.int32), tradeoff=tradeoff,
        lower=lower, upper=upper, succeeded=jnp.zeros((), bool), run=state.run + 1)


SAPF = Method(bind=bind, preset=configuration.chooser("sapf", PRESETS), check=check, segment=segment)
