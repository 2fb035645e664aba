r"""The closest adversarial point on a given support, differentiated through its optimality.

For one image x with support S (the pixels that an attack changed), in units where the range of
`bounds` is 2:

    minimise ||u||^2 / 2  subject to  f(x + u) = 0,  u = 0 off S,

with f the margin (`gap`), so that the solution lies on the decision boundary. With g the gradient
of f restricted to S and nu its multiplier, the solution satisfies

    u + nu g(u) = 0,   f(u) = 0.                                                        (1)

It is found by repeated projection onto the linearised boundary, `u <- g (g.u - f) / g.g`, as in
DeepFool and in sequential quadratic programming. Its derivative follows from (1) by the implicit
function theorem and needs neither the iterates nor their number: one symmetric linear system per
derivative, solved by conjugate gradients with products of the Hessian (`saddle_point_solve`).

Frozen, as in `unrolled.py`: the support, the runner-up class, and which pixels lie on `bounds`
(they stay there). The theorem needs a smooth f near the solution and a strict minimum: for ReLU
networks the derivative is that of the present linear piece. The residual of (1) is returned: trust the
derivative where it is small, by which the error of the derivative is bounded up to a factor that
depends on curvature.

| symbol | name here |
|---|---|
| u | `w` perturbation |
| nu | `multiplier` |
| g | `normal` |

References:
    Moosavi-Dezfooli, Fawzi, Frossard, DeepFool, arXiv 1511.04599 (the iteration).
    Nocedal, Wright, Numerical Optimization, 2006, chapter 18 (convergence), 16.3 (the system).
    Ding et al., MMA training, arXiv 1812.02637, section 2 (gradient of the margin by parameters).
    Blondel et al., arXiv 2105.15183 (implicit differentiation and its error).
    Bertrand et al., arXiv 2105.01637 (implicit differentiation on a fixed support).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from gse_jax.attacks import attack
from gse_jax.attacks.convolutions import canonical_convolutions
from gse_jax.attacks.loops import checkpointed_scan, while_loop
from gse_jax.attacks.precision import full_precision
from gse_jax.attacks.program import compiled, hashable
from gse_jax.attacks.validation import check_adversarials
from gse_jax.devices import platform
from gse_jax.differentiable.arguments import Goal, check_steps, problem
from gse_jax.differentiable.saddle_point import saddle_point_solve
from gse_jax.metrics import changed_mask
from gse_jax.types import ApplyFn, Bounds

DERIVATIVES = ("implicit", "unrolled")
TOLERANCE = {"float64": 1e-12, "float32": 1e-6}  # residual at which the iteration stops


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BoundaryResult:
    """The closest point of the decision boundary on each image's support; a pytree.

    Attributes:
        adversarials: [N, H, W, C] points on the boundary, in the caller's bounds: a tie of two
            classes, so not counted as successes. The clean image where there is no support, the
            given one where all that changed lies on `bounds` or the iteration left the finite numbers.
        distance: [N] l2 norm of the perturbation in [-1, 1] units, the margin that MMA training
            maximises.
        multiplier: [N] nu in the optimality conditions.
        residual: [N] largest violation of the optimality conditions, in logits and [-1, 1] units,
            and of `bounds`; infinite where no entry is free to move or the model gave NaN. Trust derivatives where it is
            small, say 1e-8 in float64 and 1e-4 in float32. They are those of the closest point
            among the points that share the given entries on `bounds`: whether such an entry had
            better leave its bound is not asked.
        support: [N, H, W] bool, pixels that may change.

    `adversarials`, `distance` and `multiplier` carry derivatives.
    """

    adversarials: jax.Array
    distance: jax.Array
    multiplier: jax.Array
    residual: jax.Array
    support: jax.Array


def implicit_attack(
    params,
    apply_fn: ApplyFn,
    x,
    y,
    *,
    targets=None,
    adversarials=None,
    num_steps: int = 100,
    damping: float = 1.0,
    derivative: str = "implicit",
    settings=None,
    hyperparams=None,
    bounds: Bounds = (0.0, 1.0),
) -> BoundaryResult:
    """Find the closest boundary point on the support of an attack; differentiable.

    Derivatives, forward and reverse, of any order that `apply_fn` allows, with respect to `params`
    and `x`; works under `jit` and `vmap`.

    Args:
        params: any pytree of arrays.
        apply_fn: (params, x [N, H, W, C]) -> logits [N, K], each row depending on its own image.
        x: [N, H, W, C] float32 or float64, values inside `bounds`.
        y: [N] int, true labels.
        targets: [N] int, classes to aim at; None for an untargeted attack.
        adversarials: [N, H, W, C] whose changed pixels are the support, and from which the
            iteration starts; of any attack. None runs `gse_jax.attack`. Not differentiated.
        num_steps: static int, iterations at most; each is one gradient of the model.
        damping: [] in (0, 1], share of each projection step that is taken. Where the boundary is
            strongly curved smaller values converge and 1 does not.
        derivative: "implicit", or "unrolled" to differentiate the iterations themselves (all
            `num_steps`, memory O(sqrt(num_steps))): slower, for comparison.
        settings: GSESettings of the attack that finds the support; None for the preset.
        hyperparams: GSEHyperparams of that attack; None for the preset.
        bounds: (lowest, highest) pixel value.

    Returns:
        BoundaryResult.

    Raises:
        TypeError: for a wrong dtype or type of an argument.
        ValueError: for a wrong shape, range or name; in one line, before anything compiles.

    A model that gives NaN for an image makes the derivatives by `params`, and by that image, NaN, whatever the
    weight of that image is.

    References:
        See the module docstring.
    """
    goal, samples = problem(params, apply_fn, x, y, targets, bounds)
    x = samples.x
    check_steps(num_steps)
    if derivative not in DERIVATIVES:
        raise ValueError(f"derivative={derivative!r} is unknown; use one of "
                         f"{', '.join(map(repr, DERIVATIVES))}")
    if not isinstance(damping, jax.core.Tracer) and not 0.0 < float(damping) <= 1.0:
        raise ValueError(f"damping={float(damping):g} must lie in (0, 1]")
    if adversarials is None:
        fixed = lax.stop_gradient((params, x))
        adversarials = attack(fixed[0], apply_fn, fixed[1], y, targets=targets, settings=settings,
                              hyperparams=hyperparams, bounds=bounds).adversarials
    given = jnp.asarray(adversarials)
    adversarials = given.astype(x.dtype)
    check_adversarials(adversarials, x, goal.bounds)
    if given.dtype != x.dtype and jnp.issubdtype(given.dtype, jnp.floating):
        # What was stored with other digits is no change.
        adversarials = jnp.where(changed_mask(x, given)[..., None], adversarials, x)
    solve = compiled(_solve, hashable(apply_fn), goal=goal, num_steps=num_steps, implicit=derivative == "implicit")
    return solve(params, x, goal.labels(samples), lax.stop_gradient(adversarials), jnp.asarray(damping, x.dtype))


@functools.partial(jax.jit, static_argnames=("apply_fn", "goal", "num_steps", "implicit"))
def _solve(params, x, labels, adversarials, damping, *, apply_fn, goal: Goal, num_steps, implicit):
    support = changed_mask(lax.stop_gradient(x), adversarials)
    one = functools.partial(_solve_one, params, damping, apply_fn=apply_fn, goal=goal,
                            num_steps=num_steps, implicit=implicit)
    points, w, multiplier, residual = jax.vmap(one)(x, labels, adversarials, support)
    squares = jnp.sum(w * w, axis=(1, 2, 3))
    # Two `where`s: the derivative of the root at 0 is infinite.
    distance = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)
    return BoundaryResult(points, distance, multiplier, residual, support)


def _solve_one(params, damping, x, label, adversarial, support, *, apply_fn, goal, num_steps,
               implicit):
    """(point, w, multiplier, residual) of one image; see the module docstring for the symbols."""
    (low, high), scale = goal.bounds, goal.scale
    clipped = support[..., None] & ((adversarial <= low) | (adversarial >= high))
    free = support[..., None] & ~clipped
    base = jnp.where(clipped, adversarial, x)
    solvable = jnp.any(free)

    def point(w):
        return base + jnp.where(free, scale * w, 0.0)

    def margin(w):
        return goal.gap(full_precision(apply_fn)(params, point(w)[None])[0].astype(x.dtype), label)

    value_and_normal = jax.value_and_grad(margin)
    if platform() == "cpu":
        value_and_normal = canonical_convolutions(value_and_normal)

    def equations(unknowns):
        return conditions(unknowns, *value_and_normal(unknowns[0]))

    def conditions(unknowns, value, normal):
        w, multiplier = unknowns
        # Without a support the equations are w = 0 and multiplier = 0.
        return w + multiplier * normal, jnp.where(solvable, value, multiplier)

    def project(unknowns, value, normal):
        w, _ = unknowns
        length = jnp.sum(normal * normal)
        flat = length == 0.0  # no direction to go: stay
        excess = jnp.where(flat, 0.0, value - jnp.sum(normal * w))
        multiplier = excess / jnp.where(flat, 1.0, length)
        target = jnp.where(flat, w, -multiplier * normal)
        return (1.0 - damping) * w + damping * target, multiplier

    def violation(unknowns, *margin_there):
        stationarity, value = conditions(unknowns, *margin_there)
        return jnp.maximum(jnp.max(jnp.abs(stationarity)), jnp.abs(value))

    first = jnp.where(free, (adversarial - lax.stop_gradient(x)) / scale, 0.0)
    start = first, jnp.zeros((), x.dtype)
    if implicit:
        w, multiplier = lax.custom_root(
            equations, start, lambda _, guess: _iterate(value_and_normal, project, violation, guess,
                                                        num_steps), saddle_point_solve)
    else:
        driver = checkpointed_scan(num_steps)
        w, multiplier = driver(lambda _: jnp.ones((), bool),
                               lambda now: project(now, *value_and_normal(now[0])), start)
        finite = jnp.isfinite(violation((w, multiplier), *value_and_normal(w)))
        w, multiplier = jax.tree.map(functools.partial(jnp.where, finite), (w, multiplier), start)
    image = point(w)
    outside = jnp.max(jnp.where(free, jnp.maximum(low - image, image - high), 0.0)) / scale
    residual = jnp.maximum(violation((w, multiplier), *value_and_normal(w)), outside)
    total = (image - x) / scale
    trusted = solvable & jnp.isfinite(residual)
    return image, total, multiplier, lax.stop_gradient(jnp.where(trusted, residual, jnp.inf))


def _iterate(value_and_normal, project, violation, start, num_steps):
    """Repeat `project` until the violation is at rounding level, at most `num_steps` times."""
    tolerance = TOLERANCE[start[1].dtype.name]

    def keep_going(carry):
        unknowns, margin_there, step = carry
        return (violation(unknowns, *margin_there) > tolerance) & (step < num_steps)

    def body(carry):
        unknowns, margin_there, step = carry
        unknowns = project(unknowns, *margin_there)
        return unknowns, value_and_normal(unknowns[0]), step + 1

    # The margin is carried: the condition and the next step look at the same point.
    carry = start, value_and_normal(start[0]), jnp.zeros((), jnp.int32)
    found, margin_there, _ = while_loop(keep_going, body, carry)
    # From a flat place a step may go so far that the model overflows. There NaN would come into the derivatives
    # by `params` of all images, so the start is returned.
    finite = jnp.isfinite(violation(found, *margin_there))
    return jax.tree.map(functools.partial(jnp.where, finite), found, start)
