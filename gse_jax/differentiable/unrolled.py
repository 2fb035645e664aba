"""GSE at a fixed trade-off as a differentiable function: the attack's own steps, unrolled.

The steps are those of `gse_jax.attack` (`attacks/gse/algorithm.py`), repeated by a masked scan that
recomputes them in the reverse pass (`attacks/loops.py`), so that reverse mode stores O(sqrt(steps))
iterates and the activations of one model call (Griewank, Walther 2000 call this checkpointing).

What is differentiated, and what is not. The result of a run is a *piecewise* smooth function of the
parameters, the image and the hyperparameters. The derivative returned is that of the piece at hand:

| quantity | why it is piecewise constant | treatment |
|---|---|---|
| trade-off of the search | comparisons of runs | `stop_gradient`; pass `tradeoff` to use it |
| support, prox threshold | the prox jumps to 0 at its threshold | frozen: derivative 0 off it |
| trade-off map's neighbourhoods | mask of perturbed pixels | frozen |
| off-support mask of phase 2 | comparison of trade-offs | frozen |
| stopping time, phase switch | first adversarial iterate; fixed step k-hat | frozen |
| runner-up class | argmax of the logits | frozen |
| clipping to `bounds` | min and max | derivative of the side taken; from inside on a bound |

At a point where one of these switches the function jumps and has no derivative; nothing is smoothed
or passed straight through. So a gradient step can lower an objective on the present support, but
does not see that a step may change the support: counts such as d_{2,0} have derivative 0, and
`smooth_patch_count` is the surrogate to use. Unrolled differentiation of a proximal method after
its support is identified is differentiation on that support (Bolte et al. 2021; Bertrand et al.
2020).

References:
    arXiv 2311.17434, algorithms 1 and 2 (GSE).
    Griewank, Walther, Revolve, 2000, doi 10.1145/347837.347846 (checkpointing).
    Maclaurin, Duvenaud, Adams, arXiv 1502.03492 (hypergradients by unrolling).
    Bertrand et al., arXiv 2002.08943 (differentiation of non-smooth solvers on their support).
    Bolte et al., arXiv 2106.04350 (what automatic differentiation of non-smooth maps computes).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gse_jax.attacks import attack
from gse_jax.attacks.algorithm import RUNNING, fools, select_rows
from gse_jax.attacks.convolutions import canonical_convolutions
from gse_jax.attacks.gse.algorithm import bind
from gse_jax.attacks.gse.search import is_boosted
from gse_jax.attacks.lanes import evaluate
from gse_jax.attacks.loops import checkpointed_scan, while_loop
from gse_jax.attacks.precision import full_precision
from gse_jax.attacks.program import compiled, hashable
from gse_jax.devices import platform
from gse_jax.differentiable.arguments import Goal, configuration, problem
from gse_jax.ops import largest_active_tradeoff
from gse_jax.types import ApplyFn, Bounds, Status


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DifferentiableResult:
    """What one run of GSE did to each image; a pytree.

    Attributes:
        adversarials: [N, H, W, C] last iterate of the run, in the caller's bounds. Adversarial
            where `success`; elsewhere where the run stopped, which `gse_jax.attack` throws away. The
            clean image where the model gave NaN.
        logits: [N, K] of `adversarials`; less their largest where they have more digits than the images.
        gap: [N] by how much the true class leads all others at `adversarials` (in a targeted
            attack, by how much the target trails); negative where adversarial. Not clipped at 0.
        success: [N] bool, as in `AttackResult`.
        status: [N] int32, values of `Status`.
        gradient_evals: [N] int32 gradients of the model in the run.
        forward_evals: [N] int32 forward passes, including those inside gradient evaluations.
        tradeoff: [N] initial trade-off of the run; 0 where there was none.

    `adversarials`, `logits` and `gap` carry derivatives; so does `tradeoff` if it was passed in.
    """

    adversarials: jax.Array
    logits: jax.Array
    gap: jax.Array
    success: jax.Array
    status: jax.Array
    gradient_evals: jax.Array
    forward_evals: jax.Array
    tradeoff: jax.Array


class _Run(NamedTuple):
    states: Any  # GSEState [N, ...] without `sample`, which does not change
    points: jax.Array  # [N, H, W, C], last evaluated
    logits: jax.Array  # [N, K], of `points`


def differentiable_attack(
    params,
    apply_fn: ApplyFn,
    x,
    y,
    *,
    targets=None,
    tradeoff=None,
    num_steps: int | None = None,
    settings=None,
    hyperparams=None,
    bounds: Bounds = (0.0, 1.0),
) -> DifferentiableResult:
    """Attack a batch of images by one run of GSE that can be differentiated.

    Derivatives, forward and reverse, of any order that `apply_fn` allows, with respect to
    `params`, `x`, `tradeoff` and `hyperparams`; works under `jit` and `vmap`.

    Args:
        params: any pytree of arrays.
        apply_fn: (params, x [N, H, W, C]) -> logits [N, K], each row depending on its own image.
            Twice differentiable, or once where the derivative of its gradient is not needed: for
            networks of ReLUs that derivative is the one of the present linear piece.
        x: [N, H, W, C] float32 or float64, values inside `bounds`.
        y: [N] int, true labels.
        targets: [N] int, classes to aim at; None for an untargeted attack.
        tradeoff: [N] or [] initial trade-off of the run, >= 0, e.g. `gse_jax.attack(...).tradeoff`;
            an image with 0 is left alone, as images for which a search found nothing have it.
            None searches by `gse_jax.attack` first, with the same settings, not differentiated.
        num_steps: static int, iterations at most; None for `settings.max_steps`.
        settings: GSESettings; None for the preset.
        hyperparams: GSEHyperparams of floats or traced scalars; None for the preset.
        bounds: (lowest, highest) pixel value.

    Returns:
        DifferentiableResult. Where `success`, `adversarials` equals what `gse_jax.attack` returns
        if `tradeoff` is the trade-off of that attack.

    Raises:
        TypeError: for a wrong dtype or type of an argument.
        ValueError: for a wrong shape, range or name; in one line, before anything compiles.

    Differs from the reference:
        One run, no search. A trade-off as small as those of the search's last, boosted runs takes
        their step size (`GSEHyperparams.boost`); `num_boosted_runs=0` prevents that. A failed run
        returns its last iterate.

    A model that gives NaN for an image makes the derivatives by `params` and `hyperparams`, and by that
    image and its trade-off, NaN, although the image itself ends as `Status.NON_FINITE`.

    References:
        arXiv 2311.17434; see the module docstring for what is treated as constant.
    """
    goal, samples = problem(params, apply_fn, x, y, targets, bounds)
    x = samples.x
    settings, hyperparams = configuration(x.shape[1:], goal.targeted, num_steps, settings,
                                          hyperparams, x.dtype)
    if tradeoff is None:
        fixed = lax.stop_gradient((params, x, hyperparams))
        tradeoff = attack(fixed[0], apply_fn, fixed[1], y, targets=targets, settings=settings,
                          hyperparams=fixed[2], bounds=bounds).tradeoff
        tradeoff = lax.stop_gradient(tradeoff)  # apply_fn may close over what is differentiated
    tradeoff = _checked_tradeoff(tradeoff, x)
    run = compiled(run_once, hashable(apply_fn), goal=goal, settings=settings)
    if x.shape[0] == 0:  # many a model cannot take no images
        one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), (samples, tradeoff))
        return jax.tree.map(lambda leaf: jnp.zeros((0, *leaf.shape[1:]), leaf.dtype),
                            jax.eval_shape(run, params, *one, hyperparams))
    return run(params, samples, tradeoff, hyperparams)


@functools.partial(jax.jit, static_argnames=("apply_fn", "goal", "settings", "unrolled"))
def run_once(params, samples, tradeoff, hyperparams, *, apply_fn, goal: Goal, settings,
             unrolled=True) -> DifferentiableResult:
    """Do one run per image; compiled.

    Args:
        params: pytree.
        samples: Sample with leading axis N.
        tradeoff: [N].
        hyperparams: GSEHyperparams of arrays [].
        apply_fn: the model; static.
        goal: Goal; static.
        settings: GSESettings; its numbers of runs only decide which trade-offs are boosted.
        unrolled: under the checkpointed scan; False is the plain loop, which ends with the last
            image but has no reverse mode.

    Returns:
        DifferentiableResult.
    """
    once = dataclasses.replace(settings, num_runs=1, num_boosted_runs=0)

    def machine(start, step_size):
        return bind(once, hyperparams._replace(step_size=step_size), targeted=goal.targeted,
                    bounds=goal.bounds, start=start)

    plain = machine(None, hyperparams.step_size)  # start and step size matter to `step` alone

    def evaluate_fn(params, states):
        return evaluate(plain, functools.partial(full_precision(apply_fn), params), states)[0]

    if platform() == "cpu":
        evaluate_fn = canonical_convolutions(evaluate_fn)
    states = jax.vmap(plain.init)(samples)
    step_size = _step_sizes(evaluate_fn, params, states, goal, tradeoff, settings, hyperparams)

    def over(states):
        # A trade-off of 0 says that there is no run; the clean image is still looked at.
        return (states.status != RUNNING) | ((tradeoff == 0.0) & (states.forward_evals > 0))

    def step(state, evaluation, start, size):
        return machine(start, size).step(state, evaluation)

    def body(run):
        # The images do not change: outside the carry they are not stored per iteration.
        states = run.states._replace(sample=samples)
        evaluation = evaluate_fn(params, states)
        stepped = jax.vmap(step)(states, evaluation, tradeoff, step_size)
        new = _Run(stepped._replace(sample=None), jax.vmap(plain.query)(states), evaluation.logits)
        return select_rows(over(run.states), run, new)

    logits = jax.eval_shape(evaluate_fn, params, states).logits
    start = _Run(states._replace(sample=None), samples.x, jnp.zeros(logits.shape, logits.dtype))
    # One iteration more than steps: the first evaluates the clean image.
    driver = checkpointed_scan(settings.max_steps + 1) if unrolled else while_loop
    run = driver(lambda run: jnp.any(~over(run.states)), body, start)
    status = jnp.where(run.states.status == RUNNING, int(Status.NOT_FOUND), run.states.status)
    broken = (status == Status.NON_FINITE)[:, None, None, None]
    return DifferentiableResult(
        adversarials=jnp.where(broken, samples.x, run.points),
        logits=run.logits,
        gap=jax.vmap(goal.gap)(run.logits, goal.labels(samples)),
        success=fools(status),
        status=status,
        gradient_evals=run.states.gradient_evals,
        forward_evals=run.states.forward_evals,
        tradeoff=tradeoff,
    )


def _step_sizes(evaluate_fn, params, states, goal, tradeoff, settings, hyperparams):
    """[N] step size: boosted where the search that gave the trade-off was in its last runs."""
    if settings.num_boosted_runs == 0:
        return jnp.broadcast_to(hyperparams.step_size, tradeoff.shape)
    gradient = evaluate_fn(*lax.stop_gradient((params, states))).gradient * goal.scale
    fixed, now = lax.stop_gradient((hyperparams, tradeoff))
    first = fixed.initial_fraction * jax.vmap(
        lambda g: largest_active_tradeoff(g, fixed.step_size))(gradient)
    return jnp.where(is_boosted(now, first, settings), hyperparams.step_size * hyperparams.boost,
                     hyperparams.step_size)


def _checked_tradeoff(tradeoff, x):
    # With NumPy: under the caller's jit even operations on constants are traced.
    if not isinstance(tradeoff, jax.core.Tracer):
        values = np.asarray(tradeoff)
        if not (np.isfinite(values) & (values >= 0.0)).all():
            raise ValueError("tradeoff must be finite and >= 0; take it from "
                             "gse_jax.attack(...).tradeoff")
    tradeoff = jnp.asarray(tradeoff, x.dtype)
    if tradeoff.shape not in ((), x.shape[:1]):
        raise ValueError(f"tradeoff must be one number or one per image, got shape "
                         f"{list(tradeoff.shape)} for {x.shape[0]} images")
    return jnp.broadcast_to(tradeoff, x.shape[:1])
