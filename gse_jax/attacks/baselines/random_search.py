"""Sparse-RS: random search over pixels, a patch or a frame in corner colours. Black box, a budget.

Every query changes a part of the best pattern and keeps the change if the loss falls. The model is
only asked for logits.

References:
    Croce, Andriushchenko, Singh, Flammarion, Hein, Sparse-RS: a versatile framework for
    query-efficient sparse black-box adversarial attacks, AAAI 2022, arXiv 2006.12834, algorithms 1
    and 2; github fra31/sparse-rs.

Differs from the reference:
    See `random_search_moves.py`. A patch is the largest square within the budget, not the smallest
    square around it. Unlike the port in the GSE paper's code, colours are random corners (there all
    perturbed pixels turn black), and an untargeted attack lowers the margin (there minus the cross entropy).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gse_jax.attacks import configuration
from gse_jax.attacks.algorithm import Algorithm, Method, Sample, select, wanted_label
from gse_jax.attacks.baselines import random_search_moves as moves
from gse_jax.attacks.baselines.record import (
    Record,
    is_over,
    is_success,
    key_of,
    note,
    outcome_of,
    start_record,
)
from gse_jax.ops import cross_entropy, signed_margin


@dataclasses.dataclass(frozen=True)
class SparseRSSettings:
    """Static configuration of Sparse-RS.

    Attributes:
        num_pixels: pixels that may differ, >= 1.
        kind: "l0" (any pixels), "patches" (a square) or "frames" (the border).
        max_queries: model calls of one restart, in [1, 200000].
        num_restarts: restarts that are tried until one succeeds, >= 1.
    """

    num_pixels: int = 150
    kind: str = "l0"
    max_queries: int = 10_000
    num_restarts: int = 1


class SparseRSHyperparams(NamedTuple):
    """Traced configuration of Sparse-RS.

    Attributes:
        alpha: fraction of the pattern that is redrawn at the beginning, in (0, 1].
    """

    alpha: float = 0.3  # [] float


class SparseRSState(NamedTuple):
    """State of one image.

    Fixed:
        sample: the image and its labels.
    Changing:
        candidate: pattern that is evaluated next.
        pattern: best pattern of this restart.
        loss: [] its loss; infinite before the first query.
        query: [] int32 queries made in this restart.
        restart: [] int32 restarts begun before this one.
    Bookkeeping:
        record: best image, status and counts.
    """

    sample: Sample  # one image
    candidate: moves.Pattern
    pattern: moves.Pattern
    loss: jax.Array  # [] float
    query: jax.Array  # [] i32
    restart: jax.Array  # [] i32
    record: Record


def _compared(num_pixels):
    return (SparseRSSettings(num_pixels=num_pixels, num_restarts=10), SparseRSHyperparams(0.8))


PRESETS = {
    # README: 150 pixels of ImageNet; 10,000 queries untargeted, 100,000 targeted.
    ("original", False): (SparseRSSettings(), SparseRSHyperparams(0.3)),
    ("original", True): (SparseRSSettings(max_queries=100_000), SparseRSHyperparams(0.1)),
    "cifar10": _compared(90),
    "imagenet": _compared(6600),
}


def check(settings, hyperparams, image_shape) -> None:
    """Refuse a configuration that cannot run; see `Method.check`."""
    configuration.check_types("sparse_rs", settings, hyperparams, SparseRSSettings,
                              SparseRSHyperparams)
    configuration.check_choice(settings, "kind", ("l0", "patches", "frames"))
    configuration.check_num_pixels(settings, image_shape)
    if settings.kind == "l0" and settings.num_pixels == image_shape[0] * image_shape[1]:
        raise ValueError(f"settings.num_pixels={settings.num_pixels} are all pixels: none is left to "
                         "exchange; use fewer")
    configuration.check_whole_numbers(settings, {"max_queries": 1, "num_restarts": 1})
    configuration.check_numbers(hyperparams, at_most_one=("alpha",))
    height, width = image_shape[:2]
    if settings.max_queries > 200_000:  # the schedule counts to 10,000 times as many in int32
        raise ValueError(f"settings.max_queries={settings.max_queries} must be <= 200000; "
                         "use more restarts")
    if settings.kind == "patches" and moves.patch_side(settings.num_pixels) > min(height, width):
        raise ValueError(f"settings.num_pixels={settings.num_pixels} makes a square patch that "
                         f"does not fit into {height}x{width} pixels")
    if settings.kind == "frames" and moves.frame_width(settings.num_pixels, height, width) == 0:
        raise ValueError(f"settings.num_pixels={settings.num_pixels} must be at least "
                         f"{2 * (height + width) - 4} for a frame around {height}x{width} pixels")


def bind(settings, hyperparams, *, targeted, bounds, key) -> Algorithm:
    """Return Sparse-RS with its configuration bound; see `Bind`."""
    low, high = bounds
    budget = settings.num_pixels

    def move(sample: Sample, pattern, query, restart, begin):
        fraction = moves.redrawn_fraction(settings.kind, query, settings.max_queries, hyperparams.alpha)
        now = key_of(key, sample, restart, query)
        if settings.kind == "l0":
            return moves.move_pixels(now, pattern, budget, fraction, begin)
        if settings.kind == "frames":
            return moves.move_frame(now, pattern, budget, fraction, begin)
        return moves.move_patch(now, pattern, budget, fraction, begin, query, settings.max_queries)

    def init(sample: Sample) -> SparseRSState:
        zero, empty = jnp.zeros((), jnp.int32), moves.empty_pattern(sample.x.shape)
        return SparseRSState(sample, empty, empty, jnp.full((), jnp.inf, sample.x.dtype), zero,
                             zero, start_record(sample))

    def point(state: SparseRSState):
        x = state.sample.x
        colour = jnp.where(state.candidate.high, jnp.asarray(high, x.dtype),
                           jnp.asarray(low, x.dtype))
        return jnp.where(state.candidate.mask[..., None], colour, x)

    def loss(state: SparseRSState, logits):
        label = wanted_label(state.sample, targeted)
        return cross_entropy(logits, label) if targeted else signed_margin(logits, label, targeted=False)

    def step(state: SparseRSState, evaluation) -> SparseRSState:
        sample = state.sample
        success = is_success(state.record, sample, evaluation, point(state), targeted)
        clean = state.record.forward_evals == 0
        better = ~clean & (evaluation.loss < state.loss)
        query = jnp.where(clean, 0, state.query + 1)
        exhausted = query >= settings.max_queries
        restart = state.restart + exhausted.astype(jnp.int32)
        over = success | (exhausted & (restart >= settings.num_restarts))
        begin = clean | exhausted
        pattern = select(better, state.candidate, state.pattern)
        query = jnp.where(begin, 0, query)
        return SparseRSState(
            sample=sample,
            candidate=move(sample, pattern, query, restart, begin),
            pattern=pattern,
            loss=jnp.where(begin, jnp.inf, jnp.where(better, evaluation.loss, state.loss)),
            query=query,
            restart=restart,
            record=note(state.record, sample, evaluation, point(state), jnp.zeros_like(state.loss),
                        over, targeted=targeted, took_gradient=False),
        )

    return Algorithm(init, point, loss, step, is_over, outcome_of, gradient_free=True)


SPARSE_RS = Method(bind=bind, preset=configuration.chooser("sparse_rs", PRESETS), check=check)
