r"""Homotopy attack: f plus lambda times the number of changed groups, for ever smaller lambda.

Minimises `f(w) + lambda |w|_0` with |w|_inf <= radius and the image in its bounds by nmAPG (steps
from an extrapolated point, else from the iterate, with line search). A round ends at the first
success, or when the loss stands still; then the support is tuned if it is not saturated, and lambda
falls. A round adds at most `num_new` groups. After a success the largest entries are cut down to
the lowest level that still fools the model. Groups are single values or superpixels. Lengths are in
the units of images of range width `range_width`.

| symbol | name here |
|---|---|
| lambda | `tradeoff` |
| dec_factor, val_c | `decrease`, `first_factor` |
| val_w1, val_w2, val_gamma | `loss_step`, `norm_step`, `saturation` |
| max_update, maxiter | `num_new`, `max_steps` |

References:
    Zhu, Chen, Wang, Sparse and imperceptible adversarial attack via a homotopy algorithm, ICML
    2021, arXiv 2106.06027; github VITA-Group/SparseADV_Homotopy, demo_attack.py and parsers.py.
    arXiv 2311.17434, appendix (superpixels).

Differs from the reference:
    The extrapolation follows the nmAPG paper (the code never updates t_{k-1}) and stays in the box.
    The cap on new groups is part of the prox, so that the points that are accepted are the points
    that were tested; if neither candidate lowers the objective, the iterate stays. Steps end at twice
    the length that brings every kept pixel to its bound, or a superpixel's mean entry (there 1e20). It
    gives up when more than 95 % of the values changed (there also so many new groups must have been
    allowed, which superpixels hardly reach). The first lambda has a closed form.
    There are `max_rounds` values of lambda at most (there until success or 95 %). The objective that a step must
    not exceed is averaged as in the paper (eta q c + F, over the new q; the code divides by it after q has grown,
    and accepts more). The line search tries 60 lengths, not 1,000; an iterate counts as better by 1e-5; two points
    that coincide give the longest step, not 1e-5; the tuning ends at its first success, which the code tests at its
    end only. Rounds have a largest number of steps, and end at once at a fixed point, where all further steps
    are the same. The final cut is a bisection over the level (16 evaluations) where the code takes
    up to 40,000 subgradient steps of the l-infinity norm. The GSE paper's version counts values
    where its prox counts superpixels, and leaves kept ones unclipped; here groups are groups. It takes
    a multiple of `tuning_every` changed values for the level below, where the original and we step up.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gse_jax.attacks import configuration
from gse_jax.attacks.algorithm import Algorithm, Method, Sample, wanted_label
from gse_jax.attacks.baselines.homotopy_search import OVER, Search, advance, start_search
from gse_jax.attacks.baselines.homotopy_steps import Looked, largest_group
from gse_jax.attacks.baselines.record import (
    Record,
    is_over,
    is_success,
    note,
    outcome_of,
    start_record,
)
from gse_jax.attacks.segmentation import slic_segments
from gse_jax.ops import count_groups, cross_entropy, margin_loss


@dataclasses.dataclass(frozen=True)
class HomotopySettings:
    """Static configuration of the homotopy attack.

    Attributes:
        groups: "superpixels", or "entries" (single values, as in the original paper).
        num_segments: superpixels aimed at, >= 1.
        max_steps: iterations of a round before a loss that stands still ends it, >= 1; it ends
            after twice as many in any case.
        max_rounds: values of lambda at most, >= 1.
        num_new: groups that a round may add, >= 1.
        num_new_loose: the same after a round that left the support unsaturated, >= 1.
        tuning_steps: steps of the tuning of a small support, >= 0.
        tuning_every: changed values from one number of tuning steps to the next, >= 1.
        tuning_levels: how many such numbers there are, >= 1.
        targeted_loss: loss of targeted attacks, "margin" or "cross_entropy"; untargeted ones take
            the margin.
        range_width: width of the pixel range that the numbers are meant for, > 0.
    """

    groups: str = "superpixels"
    num_segments: int = 100
    max_steps: int = 100
    max_rounds: int = 200
    num_new: int = 1
    num_new_loose: int = 1
    tuning_steps: int = 50
    tuning_every: int = 100
    tuning_levels: int = 6
    targeted_loss: str = "margin"
    range_width: float = 2.0


class HomotopyHyperparams(NamedTuple):
    """Traced configuration of the homotopy attack.

    Attributes:
        radius: largest change of a value.
        decrease: factor on lambda after a round without success.
        first_factor: factor on the largest lambda whose first step is not 0.
        loss_step: step of the tuning along the gradient of f.
        norm_step: step of the tuning along the l-infinity norm.
        saturation: share of `radius`; the support is saturated where the mean change is above it.
    """

    radius: float = 0.1  # [] float
    decrease: float = 0.9  # [] float
    first_factor: float = 0.1  # [] float
    loss_step: float = 1e-3  # [] float
    norm_step: float = 1e-5  # [] float
    saturation: float = 0.96  # [] float


class HomotopyState(NamedTuple):
    """State of one image.

    Fixed:
        sample: the image, its labels and its superpixels.
        entries: [] number of values in the largest group.
    Changing:
        search: where the search stands, in units of `range_width`.
    Bookkeeping:
        record: best image by its number of groups, then by its largest change; status and counts.
        best_tradeoff: [] lambda of the round that found the best image, 0 before that.
    """

    sample: Sample  # one image
    entries: jax.Array  # [] float
    search: Search
    record: Record
    best_tradeoff: jax.Array  # [] float


_ORIGINAL = (
    HomotopySettings(groups="entries", num_new=200, num_new_loose=10, tuning_steps=200,
                     tuning_every=500, targeted_loss="cross_entropy", range_width=1.0, max_rounds=600),
    HomotopyHyperparams(radius=0.05, decrease=0.98, first_factor=3.0, loss_step=1e-2,
                        norm_step=1e-4, saturation=0.8))
PRESETS = {
    "original": _ORIGINAL,
    "cifar10": (HomotopySettings(), HomotopyHyperparams()),
    "imagenet": (HomotopySettings(num_segments=500, tuning_every=500, tuning_levels=13, max_rounds=600),
                 HomotopyHyperparams(decrease=0.98, first_factor=0.01, loss_step=0.1,
                                     norm_step=1e-3, saturation=0.8)),
}


def check(settings, hyperparams, image_shape) -> None:
    """Refuse a configuration that cannot run; see `Method.check`."""
    del image_shape  # Unused: superpixels fit every image.
    configuration.check_types("homotopy", settings, hyperparams, HomotopySettings,
                              HomotopyHyperparams)
    configuration.check_choice(settings, "groups", ("superpixels", "entries"))
    configuration.check_choice(settings, "targeted_loss", ("margin", "cross_entropy"))
    configuration.check_whole_numbers(settings, {
        "num_segments": 1, "max_steps": 1, "max_rounds": 1, "num_new": 1, "num_new_loose": 1,
        "tuning_steps": 0, "tuning_every": 1, "tuning_levels": 1})
    configuration.check_range_width(settings)
    configuration.check_numbers(hyperparams, may_be_zero=("loss_step", "norm_step", "saturation"),
                                at_most_one=("decrease",))


def segment(settings, images):
    """Return the superpixels, if any; see `Method.segment`."""
    if settings.groups == "entries":
        return None
    return slic_segments(images, settings.num_segments)


def bind(settings, hyperparams, *, targeted, bounds, key=None) -> Algorithm:
    """Return the homotopy attack with its configuration bound; see `Bind`. It is deterministic."""
    del key  # Unused.
    low, high = bounds
    scale = (high - low) / settings.range_width

    def init(sample: Sample) -> HomotopyState:
        return HomotopyState(sample, largest_group(sample.x, sample.segments),
                             start_search(sample.x, settings.num_new), start_record(sample),
                             jnp.zeros((), sample.x.dtype))

    def point(state: HomotopyState):
        return jnp.clip(state.sample.x + scale * state.search.trial, low, high)

    def loss(state: HomotopyState, logits):
        label = wanted_label(state.sample, targeted)
        if targeted and settings.targeted_loss == "cross_entropy":
            return cross_entropy(logits, label)
        return margin_loss(logits, label, targeted=targeted)

    def step(state: HomotopyState, evaluation) -> HomotopyState:
        x, trial = state.sample.x, state.search.trial
        groups = count_groups(trial, state.sample.segments).astype(x.dtype)
        got = Looked(trial, evaluation.loss, scale * evaluation.gradient, groups,
                     is_success(state.record, state.sample, evaluation, point(state), targeted))
        search = advance(state.search, got, state.record.forward_evals == 0,
                         jnp.maximum((low - x) / scale, -hyperparams.radius),
                         jnp.minimum((high - x) / scale, hyperparams.radius), state.sample.segments,
                         state.entries, settings, hyperparams)
        score = groups + 0.5 * jnp.max(jnp.abs(trial)) / hyperparams.radius
        record = note(state.record, state.sample, evaluation, point(state), score,
                      search.phase == OVER, targeted=targeted)
        best_tradeoff = jnp.where(record.score < state.record.score, state.search.tradeoff,
                                  state.best_tradeoff)
        return HomotopyState(state.sample, state.entries, search, record, best_tradeoff)

    return Algorithm(init, point, loss, step, is_over, lambda state: outcome_of(state, state.best_tradeoff))


HOMOTOPY = Method(bind=bind, preset=configuration.chooser("homotopy", PRESETS), check=check, segment=segment)
