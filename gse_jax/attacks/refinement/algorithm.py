"""The refinement as a state machine for one image: `Algorithm` of the lane engine.

Begins at an adversarial image and walks to sparser ones. A move proposes a smaller support
(`supports.py`); gradient steps on it (`descent.py`) look for an adversarial image there. A success
becomes the image from which the next proposal is made, and proposals grow bolder; after a failure
they shrink, down to single patches or pixels. When no move succeeds any more, the walk begins anew
from the given image with another scale of blur, and the best image of all walks is returned.

References:
    gse_jax's own method; derived in `docs/refinement.md`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gse_jax.attacks.algorithm import (
    RUNNING,
    Algorithm,
    Evaluation,
    Outcome,
    Sample,
    fools,
    select,
    wanted_label,
)
from gse_jax.attacks.refinement.descent import clip_to_caps, excess_over_caps, last_digit, step_to_boundary
from gse_jax.attacks.refinement.settings import moves_of
from gse_jax.attacks.refinement.supports import power, propose
from gse_jax.ops import count_clusters, count_patches, is_adversarial, signed_margin
from gse_jax.types import Status

_FIRST_FRACTION = 0.25  # of the patches or pixels that a walk's first proposal removes
_LATER_FRACTION = 0.1  # the same when another move takes over
_LARGEST_FRACTION = 0.5
_BOLDER, _SHYER = 1.5, 0.5  # factors on the fraction after a success and after a failure
_LEAST_SHORTER = 0.02  # share of what "scale" proposes to shorten the norm by that counts as a success
_DIGITS = 16.0  # of the rounding of the logits, that a step goes beyond the boundary at least
# Share of the blur under which single pixels are ranked; where they alone count, hardly any.
_THIN_BLUR, _THIN_BLUR_FOR_PIXELS = 0.5, 0.17
_PATIENT_STEPS = 3  # gradient steps after which `patience` judges
_CLUSTER_COSTS = 8.0  # patches that a proposal must save for each cluster that it adds, see `_precedes`

# What is measured of an image, and by which of them images are compared, the caps always first.
EXCESS, PATCHES, CLUSTERS, PIXELS, L2 = range(5)
_ORDER = {"patches": (EXCESS, PATCHES, CLUSTERS, PIXELS, L2),
          "pixels": (EXCESS, PIXELS, PATCHES, CLUSTERS, L2),
          "clusters": (EXCESS, CLUSTERS, PATCHES, PIXELS, L2),
          "l2": (EXCESS, L2, PATCHES, CLUSTERS, PIXELS)}


class Anchor(NamedTuple):
    """An adversarial image with what the model said about it.

    Attributes:
        image: [H, W, C] in the caller's bounds.
        gradient: [H, W, C] gradient of the margin there, images of range width 2.
        margin: [] signed margin, <= 0.
        score: [5] by what factor it exceeds the caps, minus 1 and at least 0; d_{2,0}; clusters;
            changed pixels; l2 norm, images of range width 2.
    """

    image: jax.Array  # [H, W, C] float
    gradient: jax.Array  # [H, W, C] float
    margin: jax.Array  # [] float
    score: jax.Array  # [5] float


class Walk(NamedTuple):
    """Where the search stands.

    Attributes:
        point: [H, W, C] image that is evaluated next.
        support: [H, W] bool, pixels that may be perturbed in it.
        given_up: [H, W] bool, see `supports.Proposal`.
        blocked: [H, W] bool, union of what single failures gave up since the last success.
        move: [] int32 index into the moves.
        fraction: [] share of patches or pixels that proposals remove.
        repairs: [] int32 gradient steps on this support so far.
        first_margin: [] margin after the first of them.
        failures: [] int32 proposals of this move that failed since the last success.
        resting: [] int32 moves in a row that ended without a success.
        round: [] int32 walks ended.
    """

    point: jax.Array  # [H, W, C] float
    support: jax.Array  # [H, W] bool
    given_up: jax.Array  # [H, W] bool
    blocked: jax.Array  # [H, W] bool
    move: jax.Array  # [] i32
    fraction: jax.Array  # [] float
    repairs: jax.Array  # [] i32
    first_margin: jax.Array  # [] float
    failures: jax.Array  # [] i32
    resting: jax.Array  # [] i32
    round: jax.Array  # [] i32


class RefineState(NamedTuple):
    """State of one image.

    Fixed:
        sample: the image, its labels and the adversarial image to begin with.
        origin: that image, evaluated; empty before the first evaluation.
        budget: [] int32 evaluations it may spend.
    Changing:
        current: the sparsest image of this walk.
        walk: where the search stands.
    Best so far:
        best: [H, W, C] the sparsest image of all walks.
        best_score: [5] its score, as in Anchor.
    Bookkeeping:
        status: [] int32 a `Status`, or RUNNING.
        evals: [] int32 evaluations so far, all with a gradient.
    """

    sample: Sample  # one image
    origin: Anchor
    budget: jax.Array  # [] i32
    current: Anchor
    walk: Walk
    best: jax.Array  # [H, W, C] float
    best_score: jax.Array  # [5] float
    status: jax.Array  # [] i32
    evals: jax.Array  # [] i32


def start(sample: Sample, image, budget) -> RefineState:
    """Return the state before the first evaluation.

    Args:
        sample: one image.
        image: [H, W, C] adversarial image to begin with.
        budget: [] int32 evaluations it may spend.

    Returns:
        RefineState.
    """
    zero = jnp.zeros((), sample.x.dtype)
    count = jnp.zeros((), jnp.int32)
    nowhere = jnp.zeros(sample.x.shape[:2], bool)
    anchor = Anchor(image, jnp.zeros_like(sample.x), zero, jnp.full((5,), jnp.inf, zero.dtype))
    walk = Walk(image, nowhere, nowhere, nowhere, count, zero + _FIRST_FRACTION, count, zero, count,
                count, count)
    return RefineState(sample, anchor, jnp.asarray(budget, jnp.int32), anchor, walk, image,
                       anchor.score, jnp.asarray(RUNNING, jnp.int32), count)


def _precedes(new, old, objective):
    """Whether a score [5] is better than another: lexicographically, in the objective's order."""
    order = np.asarray(_ORDER[objective])
    first = jnp.argmax(new[order] != old[order])
    better = new[order][first] < old[order][first]
    if objective == "patches":
        # Else thinning out would trade one compact group for many fragments.
        saved, split = old[PATCHES] - new[PATCHES], new[CLUSTERS] - old[CLUSTERS]
        better &= (saved >= _CLUSTER_COSTS * split) | (new[EXCESS] < old[EXCESS])
    return better


def _as_int(flag):
    return flag.astype(jnp.int32)


def bind(settings, hyperparams, *, targeted, bounds, key=None) -> Algorithm:
    """Return the refinement of `sample.start` with its configuration bound; see `Bind`. It is deterministic."""
    del key  # Unused.
    low, high = bounds
    unit = 0.5 * (high - low)  # lengths are in units of images of range width 2
    moves = moves_of(settings)
    thin_blur = _THIN_BLUR_FOR_PIXELS if settings.objective == "pixels" else _THIN_BLUR
    # Only supports depend on the scale of the blur.
    scales = settings.scales if {"shrink", "relocate", "thin"} & set(moves) else (1.0,)

    def measured(state: RefineState, evaluation: Evaluation) -> Anchor:
        image, x = state.walk.point, state.sample.x
        w = (image - x) / unit
        mask = jnp.any(image != x, axis=-1)
        l2 = jnp.sqrt(jnp.sum(w * w))
        as_float = lambda count: count.astype(x.dtype)
        score = jnp.stack([
            excess_over_caps(image, x, hyperparams, bounds),
            as_float(count_patches(mask, settings.patch_size)),
            as_float(count_clusters(mask[None])[0][0]), as_float(jnp.sum(mask, dtype=jnp.int32)), l2])
        return Anchor(image, evaluation.gradient * unit, evaluation.loss, score)

    def judged(state: RefineState, here: Anchor, adversarial):
        """Enter the evaluation: (state with anchors and counters, whether to propose anew)."""
        walk, opening = state.walk, state.evals == 0
        # The image that is given precedes too: the first score is infinite.
        succeeded = adversarial & _precedes(here.score, state.current.score, settings.objective)
        repairs = walk.repairs + 1
        hopeless = (repairs >= _PATIENT_STEPS) & (here.margin > hyperparams.patience * walk.first_margin)
        failed = ~succeeded & (adversarial | (repairs >= settings.max_repairs) | hopeless)
        # With the caps not yet kept there is nothing smaller to look for.
        failed &= (state.current.score[EXCESS] == 0.0) | adversarial
        current = select(succeeded, here, state.current)
        leads = succeeded & _precedes(here.score, state.best_score, settings.objective)
        of_move = np.asarray([PIXELS if move == "thin" else PATCHES for move in moves])
        single = walk.fraction * state.current.score[of_move][walk.move] <= 1.0
        fraction = jnp.where(
            succeeded & ~opening, jnp.minimum(walk.fraction * _BOLDER, _LARGEST_FRACTION),
            jnp.where(failed, walk.fraction * _SHYER, walk.fraction))
        walk = walk._replace(
            blocked=~succeeded & (walk.blocked | (failed & single & walk.given_up)),
            fraction=fraction,
            failures=jnp.where(succeeded, 0, walk.failures + _as_int(failed)),
            resting=jnp.where(succeeded, 0, walk.resting),
            repairs=jnp.where(succeeded | failed, 0, repairs),
            first_margin=jnp.where(repairs == 1, here.margin, walk.first_margin))
        origin = select(opening, here, state.origin)
        return state._replace(
            origin=origin, current=current, walk=walk, best=jnp.where(leads, here.image, state.best),
            best_score=jnp.where(leads, here.score, state.best_score)), succeeded | failed

    def next_move(state: RefineState) -> RefineState:
        """Go on to the next move where this one is exhausted, and to the next walk after all."""
        walk = state.walk
        mask = jnp.any(state.current.image != state.sample.x, axis=-1)
        exhausted = (walk.failures >= settings.max_failures) | jnp.all(walk.blocked | ~mask)
        resting = walk.resting + _as_int(exhausted)
        ended = resting >= len(moves)
        nowhere = jnp.zeros_like(walk.blocked)
        walk = walk._replace(
            move=jnp.where(ended, 0, jnp.where(exhausted, (walk.move + 1) % len(moves), walk.move)),
            blocked=select(exhausted, nowhere, walk.blocked),
            fraction=jnp.where(ended, _FIRST_FRACTION, jnp.where(
                exhausted, jnp.maximum(walk.fraction, _LATER_FRACTION), walk.fraction)),
            failures=jnp.where(exhausted, 0, walk.failures),
            resting=jnp.where(ended, 0, resting),
            round=walk.round + _as_int(ended))
        return state._replace(current=select(ended, state.origin, state.current), walk=walk)

    def moved(state: RefineState, here: Anchor, anew, evaluation) -> RefineState:
        """Choose the image that is evaluated next."""
        walk, current, x = state.walk, state.current, state.sample.x
        lower = jnp.maximum((low - x) / unit, -hyperparams.max_linf)
        upper = jnp.minimum((high - x) / unit, hyperparams.max_linf)
        mask = jnp.any(current.image != x, axis=-1)
        sigma = jnp.asarray(scales, x.dtype)[walk.round % len(scales)]
        proposal = propose(
            power(0.0, current.gradient, lower, upper), mask, walk.blocked, walk.move,
            walk.fraction, current.score[PATCHES], current.score[PIXELS], sigma, moves=moves,
            patch_size=settings.patch_size, thin_blur=thin_blur)
        # An image beyond the caps is first pulled inside, wherever in the image that succeeds.
        outside = current.score[EXCESS] > 0.0
        support = jnp.where(anew, outside | proposal.support, walk.support)
        given_up = jnp.where(anew, proposal.given_up, walk.given_up)
        is_scale = jnp.asarray([m == "scale" for m in moves])[walk.move] & ~outside
        radius = jnp.minimum(hyperparams.max_l2, jnp.where(
            is_scale, current.score[L2] * (1.0 - _LEAST_SHORTER * walk.fraction), jnp.inf))

        base = select(anew, current, here)
        before = (base.image - x) / unit
        # To shorten the norm on the same support: part of the way back, once, then the shortest steps to the
        # boundary, and hardly beyond it. Less after failures, for the margin is not linear.
        back = jnp.where(is_scale & anew, 1.0 - walk.fraction, 1.0)
        w = clip_to_caps(back * before, lower, upper, radius)
        off = jnp.where(support[..., None], w, 0.0) - before
        margin = base.margin + jnp.sum(base.gradient * off)
        beyond = hyperparams.overshoot * jnp.std(evaluation.logits) * jnp.where(is_scale, 0.1, 1.0)
        # Two logits are equal at the boundary, and their deviation is 0 there.
        beyond = jnp.maximum(beyond, _DIGITS * jnp.finfo(x.dtype).eps * jnp.max(jnp.abs(evaluation.logits)))
        w = step_to_boundary(w, base.gradient, margin, support, lower, upper, radius, beyond, last_digit(x, low, high))
        point = jnp.clip(x + unit * w, low, high)
        return state._replace(walk=walk._replace(point=point, support=support, given_up=given_up))

    def step(state: RefineState, evaluation: Evaluation) -> RefineState:
        x = state.sample.x
        adversarial = is_adversarial(evaluation.logits, wanted_label(state.sample, targeted), targeted=targeted)
        finite = jnp.isfinite(evaluation.loss) & jnp.all(jnp.isfinite(evaluation.gradient))
        finite &= jnp.all(jnp.isfinite(evaluation.logits))
        here = measured(state, evaluation)
        opening = state.evals == 0
        # At an image that is not changed only rounding turns the prediction.
        judged_state, anew = judged(state, here, adversarial & jnp.any(here.image != x))
        chosen = select(anew, next_move(judged_state), judged_state)
        state = moved(chosen, here, anew, evaluation)
        evals = state.evals + 1

        over = (evals >= state.budget) | (state.walk.round >= len(scales))
        kept = state.best_score[EXCESS] == 0.0
        if settings.objective != "l2":
            over |= kept & (state.best_score[PATCHES] <= 1.0) & (state.best_score[PIXELS] <= 1.0)
        unchanged = opening & jnp.all(here.image == x)
        verdict = jnp.where(over, jnp.where(kept, Status.FOUND, Status.NOT_FOUND),
                            RUNNING)
        verdict = jnp.where(unchanged & adversarial, Status.ALREADY_MISCLASSIFIED, verdict)
        verdict = jnp.where(opening & ~adversarial, Status.NOT_FOUND, verdict)
        finite |= unchanged & adversarial  # then the gradient is not used
        # What was found is true whatever the model says elsewhere.
        verdict = jnp.where(finite, verdict, jnp.where(kept, Status.FOUND, Status.NON_FINITE))
        return state._replace(status=verdict.astype(jnp.int32), evals=evals)

    def loss(state: RefineState, logits):
        return signed_margin(logits, wanted_label(state.sample, targeted), targeted=targeted)

    def finish(state: RefineState) -> Outcome:
        image = jnp.where(state.status == Status.FOUND, state.best, state.sample.x)
        return Outcome(image, fools(state.status), state.status, state.evals, state.evals,
                       jnp.zeros((), state.sample.x.dtype))

    return Algorithm(lambda sample: start(sample, sample.start, settings.max_evals),
                     lambda state: state.walk.point, loss, step,
                     lambda state: state.status != RUNNING, finish)
