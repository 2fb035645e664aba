"""GSE as a state machine for one image: `Algorithm` of the lane engine.

One evaluation per iteration: the prediction that decides whether an iterate is adversarial is the
forward pass of the gradient of the next iteration. The gradient at w = 0 is taken once per image
and serves the first iteration of every run.

References:
    arXiv 2311.17434, algorithms 1 and 2.

Differs from the reference:
    The published code evaluates the model twice per iteration, the clean gradient once per run, and
    iterates runs that cannot move (`search.skip_dead_runs`). The results agree, but for images that the model
    misclassifies from the start: there it returns its first iterate, here the clean image comes back.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gse_jax.attacks.algorithm import (
    RUNNING,
    Algorithm,
    Evaluation,
    Method,
    Outcome,
    Sample,
    fools,
    select,
    wanted_label,
)
from gse_jax.attacks.gse import settings as configuration
from gse_jax.attacks.gse.nesterov import Iterate, clip, iterate, start_run
from gse_jax.attacks.gse.search import (
    Search,
    run_ended,
    skip_dead_runs,
    start_search,
    step_size_of,
)
from gse_jax.ops import count_patches, is_adversarial, largest_active_tradeoff, margin_loss
from gse_jax.types import Status

_UNBEATEN = jnp.iinfo(jnp.int32).max  # patches of an image without any success


class GSEState(NamedTuple):
    """State of one image.

    Fixed:
        sample: the image and its labels.
        clean_gradient: [H, W, C] gradient of the margin at w = 0; zero before the first evaluation.
    Changing:
        iterate: variables of the current run.
        search: where the search over runs stands.
        checkpoint: [] margin at the last look at whether to give up the run; infinite before it.
    Best so far:
        best: [H, W, C] adversarial image with the fewest patches; the clean image before that.
        best_patches: [] int32 its d_{2,0}.
        best_tradeoff: [] initial trade-off of the run that found it, 0 before that.
    Bookkeeping:
        status: [] int32 a `Status`, or RUNNING.
        forward_evals: [] int32 evaluations so far, 0 until the clean image was evaluated.
        gradient_evals: [] int32 those of them whose gradient was used.
    """

    sample: Sample  # one image
    clean_gradient: jax.Array  # [H, W, C] float
    iterate: Iterate  # one run
    search: Search  # scalars
    checkpoint: jax.Array  # [] float
    best: jax.Array  # [H, W, C] float
    best_patches: jax.Array  # [] i32
    best_tradeoff: jax.Array  # [] float
    status: jax.Array  # [] i32
    forward_evals: jax.Array  # [] i32
    gradient_evals: jax.Array  # [] i32


def _init(sample: Sample) -> GSEState:
    zero = jnp.zeros((), sample.x.dtype)
    return GSEState(
        sample=sample,
        clean_gradient=jnp.zeros_like(sample.x),
        iterate=start_run(sample.x.shape, zero),
        search=start_search(zero),
        checkpoint=zero + jnp.inf,
        best=sample.x,
        best_patches=jnp.asarray(_UNBEATEN, jnp.int32),
        best_tradeoff=zero,
        status=jnp.asarray(RUNNING, jnp.int32),
        forward_evals=jnp.zeros((), jnp.int32),
        gradient_evals=jnp.zeros((), jnp.int32),
    )


def bind(settings, hyperparams, *, targeted, bounds, key=None, start=None) -> Algorithm:
    """Return GSE with its configuration bound; see `Bind`. It is deterministic.

    Args:
        settings, hyperparams, targeted, bounds, key: as in `Bind`.
        start: [] initial trade-off of the first run; None for `hyperparams.initial_fraction` of the
            largest one that moves any pixel.

    Returns:
        Algorithm.
    """
    del key  # Unused.
    low, high = bounds
    # All constants of the paper assume images of range width 2; w is kept in those units.
    scale = 0.5 * (high - low)

    def point(state: GSEState):
        return clip(state.sample.x + scale * state.iterate.w, low, high)

    def loss(state: GSEState, logits):
        return margin_loss(logits, wanted_label(state.sample, targeted), targeted=targeted)

    def step(state: GSEState, evaluation: Evaluation) -> GSEState:
        x = state.sample.x
        gradient = evaluation.gradient * scale
        adversarial = is_adversarial(evaluation.logits, wanted_label(state.sample, targeted), targeted=targeted)
        # Of an adversarial image the gradient is not used.
        finite = jnp.isfinite(evaluation.loss) & (adversarial | jnp.all(jnp.isfinite(gradient)))
        finite &= jnp.all(jnp.isfinite(evaluation.logits))

        clean = state.forward_evals == 0
        clean_gradient = jnp.where(clean, gradient, state.clean_gradient)

        # How did the run end, if it did?
        # At an image that is not changed only rounding turns the prediction.
        succeeded = ~clean & adversarial & jnp.any(point(state) != x)
        hopeless, checkpoint = _judged(state, evaluation.loss, settings)
        failed = ~clean & ~succeeded & ((state.iterate.step == settings.max_steps) | hopeless)
        patches = count_patches(jnp.any(state.iterate.w != 0.0, axis=-1), settings.patch_size)
        better = succeeded & (patches < state.best_patches)
        first = start_search(
            start if start is not None else hyperparams.initial_fraction
            * largest_active_tradeoff(clean_gradient, hyperparams.step_size))
        ended = select(clean, first, run_ended(state.search, succeeded))
        begin = clean | succeeded | failed
        search = select(begin, skip_dead_runs(ended, jnp.max(jnp.abs(clean_gradient)), settings, hyperparams),
                        state.search)
        over = search.run >= settings.num_runs

        # Iteration k of the current run, or iteration 0 of the next one from the clean gradient.
        now = select(begin, start_run(x.shape, search.tradeoff), state.iterate)
        moved = iterate(now, jnp.where(begin, clean_gradient, gradient),
                        (low - x) / scale, (high - x) / scale, start=search.tradeoff,
                        step_size=step_size_of(search, settings, hyperparams),
                        settings=settings, hyperparams=hyperparams)

        # The last iterate of a run is asked for its prediction only.
        used = finite & ~(succeeded | failed | (clean & adversarial))
        found = search.found
        verdict = jnp.where(over, jnp.where(found, Status.FOUND, Status.NOT_FOUND), RUNNING)
        verdict = jnp.where(clean & adversarial, Status.ALREADY_MISCLASSIFIED, verdict)
        # A success found earlier is true whatever the model says elsewhere.
        verdict = jnp.where(finite, verdict, jnp.where(state.search.found, Status.FOUND,
                                                       Status.NON_FINITE))
        return GSEState(
            sample=state.sample,
            clean_gradient=clean_gradient,
            iterate=moved,
            search=search,
            checkpoint=jnp.where(begin, jnp.inf, checkpoint),
            best=jnp.where(better, point(state), state.best),
            best_patches=jnp.where(better, patches, state.best_patches),
            best_tradeoff=jnp.where(better, state.search.tradeoff, state.best_tradeoff),
            status=verdict.astype(jnp.int32),
            forward_evals=state.forward_evals + 1,
            gradient_evals=state.gradient_evals + used.astype(jnp.int32),
        )

    def finish(state: GSEState) -> Outcome:
        return Outcome(state.best, fools(state.status), state.status, state.gradient_evals,
                       state.forward_evals, state.best_tradeoff)

    def progress(state: GSEState):
        return state.search.run * (settings.max_steps + 1) + state.iterate.step

    return Algorithm(_init, point, loss, step, lambda state: state.status != RUNNING, finish,
                     progress=progress)


def _judged(state: GSEState, margin, settings):
    """Whether to give up the run (never with the published settings), and the next checkpoint."""
    window = settings.give_up_window
    if window == 0:
        return jnp.zeros((), bool), state.checkpoint
    on_support = state.iterate.step - settings.phase1_steps
    due = (on_support > 0) & (on_support % window == 0)
    windows_left = (settings.max_steps - state.iterate.step).astype(margin.dtype) / window
    hopeless = due & (margin > windows_left * (state.checkpoint - margin))
    return hopeless, jnp.where(due, margin, state.checkpoint)


GSE = Method(bind=bind, preset=configuration.preset, check=configuration.check)
