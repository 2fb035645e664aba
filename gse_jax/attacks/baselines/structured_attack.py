r"""StrAttack: ADMM on margin, l2, group norm and box; weight search; retraining on the support.

Minimises `c f(z) + gamma |delta|^2 + tau sum_cells |y_cell|_2` with delta = y = w = z and w in the
box. The binary search lowers c after every run that improved on the smallest l2 norm so far. Then
the support of the best y, without its smallest entries, is kept and only f and the l2 norm count.
Lengths are in the units of images of range width 2.

| symbol | name here |
|---|---|
| delta, w, y, z | copies of the perturbation; `z` and `y` are kept |
| u, v, s | `dual_delta`, `dual_y`, `dual_w`, scaled by 1 / rho |
| eta_k = alpha sqrt(k + 1) | `inertia` |

References:
    Xu, Liu, Zhao, Chen, Zhang, Fan, Erdogmus, Wang, Lin, Structured adversarial attack, ICLR 2019,
    arXiv 1808.01664, section 4, eq. (7) to (15); github KaidiXu/StrAttack, l2_LADMMST_attack_v3.py.

Differs from the reference:
    The z-step weighs the three copies equally, as in the paper's eq. (15) (the code counts delta
    twice). Points are clipped into the box, with its radius (there to the image's range alone), before the model
    sees them, and norms are of the clipped y. An image is not scaled by the size of its batch, as in the GSE
    paper's code; the retraining step is the original's, on a support that is fixed for a run (there it shrinks
    within a run as the best y does), and the bounds on c begin anew before it (in the GSE paper's code they do
    not). Without a success there is no support, and no retraining. The preset "original" has cells of 2 x 2
    for images of any size, where the code takes 13 x 13 above 32 pixels: set `cell_size`. Rows and columns that do not fill a cell are thresholded as a smaller one (there left as they are). Two savings change
    results by rounding only: y is tested only where that could change something, so not while it is
    zero or longer than the best one; and the gradient of the margin is zero beyond the boundary, where
    87 % of the points lie on CIFAR-10 images, so it is taken only at the others, from the forward
    pass that tells.

    Three more savings change results, and are off by default. With `test_interval` 2, y is tested in every
    second iteration only, once an image is adversarial. With `gradient_interval` 2, z is evaluated in
    every second one only, while it lies beyond the boundary, where its gradient is zero, so a return
    across the boundary may be noticed one iteration late. With `retrain_patience` 20 a run of the
    retraining, which lowers the norm on a given support, ends early when it does not improve on the
    best image for a while, as runs of Carlini and Wagner's attack do. On 56 CIFAR-10 images (authors'
    ResNet-20) all three together make 1423 forward passes of 3813, and the mean of gamma |y|^2 + tau
    sum_cells |y_cell|_2 is 3.25 where it was 3.27. On 128 images, `gradient_interval` 2 beside the
    other two saves a third of the passes (1433 of 2148) at 3.58 in place of 3.71 and an l2 norm of 0.37
    in place of 0.42, but more pixels change: 90 in place of 75 (standard error of the difference: 5).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gse_jax.attacks import configuration
from gse_jax.attacks.algorithm import Algorithm, Method, Sample, select, wanted_label
from gse_jax.attacks.baselines.record import (
    Record,
    is_over,
    is_success,
    note,
    outcome_of,
    start_record,
)
from gse_jax.attacks.baselines.structured_attack_steps import (
    Blocks,
    admm_step,
    retraining_step,
    start_retraining,
    trimmed_support,
)
from gse_jax.attacks.baselines.weight_search import next_weight
from gse_jax.ops import margin_loss

_GROWTH = 5.0  # of c after a failure while no run has succeeded
_RETRAIN_C = 5.0  # first c of retraining


@dataclasses.dataclass(frozen=True)
class StrAttackSettings:
    """Static configuration of StrAttack.

    Attributes:
        num_searches: runs of the binary search over c, >= 1.
        max_steps: ADMM iterations of the first run, >= 1.
        more_steps: iterations that every later run has more than the one before, >= 0.
        num_retrainings: runs of the binary search on the support, >= 0.
        retrain_steps: iterations of one of them, >= 1.
        cell_size: side of the groups, in pixels.
        retrain_must_improve: whether c is lowered only after a run of the retraining that improves on the
            best image, as in the GSE paper's code; else after any that fools the model, as in the
            original.
        retrain_patience: iterations without an improvement on the best image after which a run of the
            retraining ends early; 0 for never.
        test_interval: y is tested in every so many-th iteration of the search once an image is
            adversarial, >= 1; in every one before that.
        gradient_interval: z is evaluated in every so many-th iteration of the search while it lies
            beyond the boundary, where the margin's gradient is zero, >= 1; in every one before it.
    """

    num_searches: int = 8
    max_steps: int = 200
    more_steps: int = 0
    num_retrainings: int = 8
    retrain_steps: int = 200
    cell_size: int = 2
    retrain_must_improve: bool = True
    retrain_patience: int = 0
    test_interval: int = 1
    gradient_interval: int = 1


class StrAttackHyperparams(NamedTuple):
    """Traced configuration of StrAttack, in images of range width 2.

    Attributes:
        c: first weight of the margin.
        gamma: weight of the squared l2 norm.
        tau: weight of the group norm.
        rho: penalty of the ADMM.
        alpha: weight of the old z, which grows with the root of the iteration.
        radius: largest change of a value.
    """

    c: float = 0.25  # [] float
    gamma: float = 1.0  # [] float
    tau: float = 2.0  # [] float
    rho: float = 1.0  # [] float
    alpha: float = 5.0  # [] float
    radius: float = 1.0  # [] float


class StrAttackState(NamedTuple):
    """State of one image.

    Fixed:
        sample: the image and its labels.
    Changing:
        blocks: variables of the ADMM, in units of range width 2.
        support: [H, W, C] bool, entries that retraining may change.
    Search:
        c: [] weight of the margin in this run.
        lower: [] largest c of a run that did not improve, 0 if none.
        upper: [] smallest c of a run that improved, inf if none.
        improved: [] bool, this run did what lowers c: it improved on the best so far (see also
            `retrain_must_improve`).
        run: [] int32 runs ended, those of the retraining included.
        step: [] int32 iterations done in this run.
        since: [] int32 the iteration of this run that improved last, 0 if none.
        ahead: [] int32 iterations of the search until z is evaluated again.
        testing: [] bool; the next evaluation is of `y`, forward only.
    Bookkeeping:
        best_c: [] c of the run that found the best image, 0 if none.
        record: best image by its l2 norm, status and counts.
    """

    sample: Sample  # one image
    blocks: Blocks
    support: jax.Array  # [H, W, C] bool
    c: jax.Array  # [] float
    lower: jax.Array  # [] float
    upper: jax.Array  # [] float
    improved: jax.Array  # [] bool
    run: jax.Array  # [] i32
    step: jax.Array  # [] i32
    since: jax.Array  # [] i32
    ahead: jax.Array  # [] i32
    testing: jax.Array  # [] bool
    best_c: jax.Array  # [] float
    record: Record


# Original: images of range width 1 with gamma 2, tau 3, rho 15, alpha 5, box 0.5; the same problem
# in range width 2 has gamma / 4, tau / 2, rho / 4, alpha / 4. Its cells are 13 x 13 on ImageNet.
_ORIGINAL = StrAttackHyperparams(c=1.0, gamma=0.5, tau=1.5, rho=3.75, alpha=1.25, radius=1.0)
PRESETS = {
    "original": (StrAttackSettings(max_steps=1000, more_steps=1000, retrain_steps=400,
                                   retrain_must_improve=False), _ORIGINAL),
    "cifar10": (StrAttackSettings(), StrAttackHyperparams(c=0.25)),
    "imagenet": (StrAttackSettings(cell_size=8), StrAttackHyperparams(c=2.5)),
}


def check(settings, hyperparams, image_shape) -> None:
    """Refuse a configuration that cannot run; see `Method.check`."""
    configuration.check_types("strattack", settings, hyperparams, StrAttackSettings,
                              StrAttackHyperparams)
    configuration.check_whole_numbers(settings, {"num_searches": 1, "max_steps": 1, "more_steps": 0,
                                            "num_retrainings": 0, "retrain_steps": 1,
                                            "cell_size": 1, "retrain_patience": 0,
                                            "test_interval": 1, "gradient_interval": 1})
    configuration.check_numbers(hyperparams)
    configuration.check_fits(settings, "cell_size", image_shape)


def bind(settings, hyperparams, *, targeted, bounds, key=None) -> Algorithm:
    """Return StrAttack with its configuration bound; see `Bind`. It is deterministic."""
    del key  # Unused.
    low, high = bounds
    scale = 0.5 * (high - low)
    num_runs = settings.num_searches + settings.num_retrainings

    def box(sample: Sample):
        return (jnp.maximum((low - sample.x) / scale, -hyperparams.radius),
                jnp.minimum((high - sample.x) / scale, hyperparams.radius))

    def clipped(sample: Sample, w):
        return jnp.clip(sample.x + scale * jnp.clip(w, -hyperparams.radius, hyperparams.radius), low, high)

    def init(sample: Sample) -> StrAttackState:
        zero, scalar = jnp.zeros_like(sample.x), jnp.zeros((), sample.x.dtype)
        count = jnp.zeros((), jnp.int32)
        return StrAttackState(
            sample, Blocks(zero, zero, zero, zero, zero), jnp.zeros(zero.shape, bool),
            hyperparams.c, scalar, scalar + jnp.inf,
            jnp.zeros((), bool), count, count, count, count, jnp.zeros((), bool), scalar,
            start_record(sample))

    def retraining(state):
        return state.run >= settings.num_searches

    def l2_squared(sample: Sample, image):
        return jnp.sum(((image - sample.x) / scale) ** 2)

    def point(state: StrAttackState):
        w = jnp.where(state.testing | retraining(state), state.blocks.y, state.blocks.z)
        return clipped(state.sample, w)

    def loss(state: StrAttackState, logits):
        return margin_loss(logits, wanted_label(state.sample, targeted), targeted=targeted)

    def step(state: StrAttackState, evaluation) -> StrAttackState:
        again, limits = retraining(state), box(state.sample)
        tests = state.testing | again
        # Also where classes tie: there is no loss there.
        sloped = (evaluation.loss != 0.0) | jnp.any(evaluation.gradient != 0.0)
        sloped &= ~state.testing
        here = point(state)
        score = jnp.where(tests, l2_squared(state.sample, here), jnp.inf)
        fools = is_success(state.record, state.sample, evaluation, here, targeted)
        better = fools & (score < state.record.score)
        best = jnp.where(better, score, state.record.score)

        # A test asks for success alone.
        gradient = jnp.where(sloped, state.c * evaluation.gradient * scale, 0.0)
        retrained = retraining_step(state.blocks, gradient, state.support, *limits, hyperparams)
        length = jnp.where(again, settings.retrain_steps,
                           settings.max_steps + settings.more_steps * state.run)
        done = state.step + tests.astype(jnp.int32)  # an iteration is complete with its test
        ahead = jnp.where(tests, state.ahead, jnp.where(sloped, 1, settings.gradient_interval))
        searched, test_next = state.blocks, jnp.zeros((), bool)
        for number in range(settings.gradient_interval):
            goes_on = (ahead > 0) & ~test_next & (done < length)
            slope = gradient if number == 0 else jnp.zeros_like(gradient)
            moved = admm_step(searched, slope, done, *limits, hyperparams, settings.cell_size)
            candidate = clipped(state.sample, moved.y)
            changed = l2_squared(state.sample, candidate)
            # Of a longer y, or of the clean image, the test would change nothing.
            test_next |= goes_on & (changed > 0.0) & (changed < best) & (
                jnp.isinf(best) | (done % settings.test_interval == 0))
            searched = select(goes_on, moved, searched)
            done += (goes_on & ~test_next).astype(jnp.int32)
            ahead -= goes_on.astype(jnp.int32)

        since = jnp.where(better, state.step, state.since)
        stale = again & (settings.retrain_patience > 0) & (
            done - since >= settings.retrain_patience)
        ended = ~test_next & ((done >= length) | stale)
        # Nothing to retrain on without a success.
        hopeless = ~(better | jnp.isfinite(state.record.score))
        last = ended & ((state.run + 1 >= num_runs)
                        | ((state.run + 1 == settings.num_searches) & hopeless))
        enough = better if settings.retrain_must_improve else better | (again & fools)
        moved = state._replace(
            blocks=select(again, retrained, searched), improved=state.improved | enough,
            step=done, since=since, ahead=ahead, testing=test_next,
            best_c=jnp.where(better, state.c, state.best_c),
            record=note(state.record, state.sample, evaluation, here, score, last,
                        targeted=targeted, took_gradient=sloped))
        return select(ended, begin_run(moved, settings, hyperparams, limits, scale), moved)

    return Algorithm(init, point, loss, step, is_over, lambda state: outcome_of(state, state.best_c),
                     wants_gradient=lambda state: ~state.testing, hinged=True)


def begin_run(state: StrAttackState, settings, params, limits, scale) -> StrAttackState:
    """Return the state at the start of the next run, of the search or of the retraining.

    Args:
        state: the state when a run has ended.
        settings: StrAttackSettings.
        params: StrAttackHyperparams of arrays [].
        limits: (lower, upper), [H, W, C] admissible perturbations.
        scale: half the range width of the image.

    Returns:
        StrAttackState.
    """
    run = state.run + 1
    c, lower, upper = next_weight(state.c, state.lower, state.upper, state.improved, _GROWTH)
    first = run == settings.num_searches  # retraining searches from the beginning
    best = (state.record.best - state.sample.x) / scale
    support = trimmed_support(best)
    zero = jax.tree.map(jnp.zeros_like, state.blocks)
    again = start_retraining(best, support, *limits, params)
    return state._replace(
        blocks=select(run >= settings.num_searches, again, zero), support=support,
        c=jnp.where(first, _RETRAIN_C, c), lower=jnp.where(first, 0.0, lower),
        upper=jnp.where(first, jnp.inf, upper), improved=jnp.zeros((), bool), run=run,
        step=jnp.zeros((), jnp.int32), since=jnp.zeros((), jnp.int32),
        ahead=jnp.zeros((), jnp.int32), testing=jnp.zeros((), bool))


STRATTACK = Method(bind=bind, preset=configuration.chooser("strattack", PRESETS), check=check)
