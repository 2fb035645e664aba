"""The implicit attack: optimality, and derivatives against the unrolled iteration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gse_jax
from gse_jax.differentiable.saddle_point import saddle_point_solve
from tests.toy_model import golden, linear_logits, small_logits, toy

BOUNDS = (-1.0, 1.0)


def squares_near(x, boxes):
    """`x` changed a little in one box per image, as an attack would."""
    changed = np.asarray(x).copy()
    for image, (row, column) in enumerate(boxes):
        changed[image, row:row + 8, column:column + 8] *= 0.9
    return jnp.asarray(changed)


@pytest.fixture(scope="module")
def curved():
    """(params, apply_fn, x, y, adversarials) of a smooth network, supports of 8 x 4 pixels."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = (0.05 * jax.random.normal(keys[0], (192, 16), jnp.float64),
              jax.random.normal(keys[1], (16, 4), jnp.float64))
    x = jax.random.uniform(keys[2], (3, 8, 8, 3), jnp.float64, -0.5, 0.5)
    y = small_logits(params, x).argmax(-1)
    return params, small_logits, x, y, x.at[:, :, :4].multiply(0.9)


def solve(params, apply_fn, x, y, adversarials, **options):
    return gse_jax.implicit_attack(params, apply_fn, x, y, adversarials=adversarials,
                                   bounds=BOUNDS, num_steps=40, **options)


def test_an_image_without_any_gradient_spoils_no_other():
    """The model looks at bright pixels only: where nothing is to be solved, 0 / 0 must not come back."""
    def solve(scale):
        matvec = lambda pair: (pair[0] + scale * 0.0 * pair[1], 0.0 * scale * pair[0].sum())
        d, e = saddle_point_solve(matvec, (jnp.ones(4), jnp.asarray(0.0)))
        return d.sum() + e

    value, slope = jax.value_and_grad(solve)(2.0)
    assert np.isfinite(value) and np.isfinite(slope)


def test_an_image_that_runs_away_spoils_no_other():
    """A step from a flat place goes where the model overflows: its residual is large, and nothing is NaN."""
    def logits(params, x):
        score = params * x.reshape(x.shape[0], -1).sum(-1)
        return jnp.stack([jnp.tanh(score) + 0.0 * score**40, jnp.zeros_like(score)], 1)

    x = jnp.full((2, 8, 8, 3), 0.5 / 192)
    given = x.at[0, 0, 0, 0].add(-0.6).at[1, :, :, 0].add(-0.25)

    def distance(params):
        result = gse_jax.implicit_attack(params, logits, x, jnp.zeros(2, int), adversarials=given, bounds=BOUNDS)
        return jnp.where(result.residual < 1e-8, result.distance, 0.0).sum(), result

    slope, result = jax.grad(distance, has_aux=True)(1.0)
    assert result.residual[0] < 1e-8 < result.residual[1] < np.inf
    np.testing.assert_array_equal(result.adversarials[1], given[1])
    np.testing.assert_allclose(result.distance[0], 0.5 / np.sqrt(3.0))
    np.testing.assert_allclose(slope, 0.0, atol=1e-9)  # the boundary does not move


@pytest.mark.parametrize("derivative", ["implicit", "unrolled"])
@pytest.mark.parametrize("is_flat", [True, False])  # whether the slope is 0 or NaN too where the logit is NaN
def test_an_image_for_which_the_model_breaks_is_not_trusted(derivative, is_flat):
    def logits(params, x):
        score = params * x.reshape(x.shape[0], -1).sum(-1)
        breaks = x[:, 0, 0, 0] > 0.9
        broken = jnp.where(breaks, jnp.nan, score) if is_flat else score * jnp.where(breaks, jnp.nan, 1.0)
        return jnp.stack([broken, jnp.zeros_like(score)], 1)

    x = jnp.full((2, 8, 8, 3), 0.5 / 192)
    given = x.at[0, 0, 0, 0].add(-0.6).at[1, 0, 0, 0].set(0.95)
    result = gse_jax.implicit_attack(1.0, logits, x, jnp.zeros(2, int), adversarials=given, bounds=BOUNDS,
                                     derivative=derivative)
    assert result.residual[0] < 1e-8 and result.residual[1] == np.inf
    np.testing.assert_array_equal(result.adversarials[1], given[1])
    np.testing.assert_allclose(result.distance[1], jnp.linalg.norm(given[1] - x[1]) / (0.5 * (BOUNDS[1] - BOUNDS[0])))


def test_linear_model_has_the_known_solution():
    kernel = jax.random.normal(jax.random.key(0), (192, 3), jnp.float64)
    params = kernel, jnp.asarray([4.0, 0.0, -4.0])
    x = jnp.zeros((2, 8, 8, 3)).at[1].add(0.1)
    y = linear_logits(params, x).argmax(-1)
    adversarials = squares_near(x + 0.01, [(0, 0), (0, 0)]).at[:, 4:].set(x[:, 4:])
    result = solve(params, linear_logits, x, y, adversarials)
    logits = linear_logits(params, x)
    other = jnp.where(jax.nn.one_hot(y, 3, dtype=bool), -jnp.inf, linear_logits(
        params, result.adversarials)).argmax(-1)
    for i in range(2):
        gap = logits[i, y[i]] - logits[i, other[i]]
        normal = (kernel[:, y[i]] - kernel[:, other[i]])[:96]  # the upper half may change
        np.testing.assert_allclose(result.distance[i], gap / jnp.linalg.norm(normal), rtol=1e-10)
    assert (np.asarray(result.residual) < 1e-10).all()
    assert bool(result.support[:, :4].all()) and not bool(result.support[:, 4:].any())


def test_steps_go_a_share_of_the_way_to_a_known_point():
    """Linear model: the point, and what is left of the way there, in units of a range of width 2."""
    random = np.random.default_rng(0)
    kernel, damping, unit = random.normal(size=(192, 2)), 0.25, 9.0
    x = random.uniform(0.4, 0.6, (3, 8, 8, 3))
    params = kernel, np.asarray([60.0 - 0.5 * (kernel[:, 0] - kernel[:, 1]).sum(), 0.0])
    gap = np.asarray(linear_logits(params, x) @ np.asarray([1.0, -1.0]))
    slope = unit * (kernel[:, 0] - kernel[:, 1]) * (np.arange(192) < 96)  # the upper half may change
    target = -(gap / (slope @ slope))[:, None] * slope
    # On the boundary already, but not next to x; next to x; and neither.
    aside = np.where(slope != 0.0, random.normal(size=192), 0.0)
    aside -= (aside @ slope) / (slope @ slope) * slope
    begin = np.stack([target[0] + 0.2 * aside, 0.01 * target[1], 0.5 * target[2] + 0.1 * aside])
    given = (x.reshape(3, 192) + unit * begin).reshape(x.shape)
    for steps, targets in ((1, None), (3, None), (1, np.ones(3, int))):  # of two classes the other one is the target
        result = gse_jax.implicit_attack(params, linear_logits, x, np.zeros(3, int), targets=targets, adversarials=given,
                                         num_steps=steps, damping=damping, bounds=(-8.0, 10.0))
        left = (1.0 - damping) ** steps * (begin - target)
        w = target + left
        np.testing.assert_allclose((result.adversarials - x).reshape(3, 192) / unit, w, atol=1e-12)
        np.testing.assert_allclose(result.distance, np.linalg.norm(w, axis=1))
        np.testing.assert_allclose(result.multiplier, gap / (slope @ slope))
        stationarity, margin = abs(left).max(1), abs(left @ slope)
        np.testing.assert_allclose(result.residual, np.maximum(stationarity, margin))
    assert (stationarity > margin).any() and (stationarity < margin).any()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_derivative_of_the_distance_alone_is_that_of_the_margin(dtype):
    """Envelope theorem: d distance = multiplier / distance * d margin; nothing of it lies in the plane."""
    random = np.random.default_rng(1)
    first, second = 0.15 * random.normal(size=(64, 12)), random.normal(size=(12, 3))
    params = first.astype(dtype), second.astype(dtype)

    def apply_fn(params, x):
        return jnp.tanh((2 * x - 1).reshape(x.shape[0], 64) @ params[0]) @ params[1]

    x = random.uniform(0.1, 0.9, (64, 8, 8, 1)).astype(dtype)
    changed = np.clip(x + 0.2 * random.normal(size=x.shape), 0.05, 0.95)
    adversarials = np.where(random.random(x.shape) < 0.5, changed, x).astype(dtype)
    y = np.asarray(apply_fn(params, x).argmax(-1))

    def distance(params):
        result = gse_jax.implicit_attack(params, apply_fn, x, y, adversarials=adversarials, damping=0.5,
                                         num_steps=400)
        return result.distance, result

    slope, result = jax.jit(jax.jacrev(distance, has_aux=True))(params)
    logits = apply_fn(params, result.adversarials)
    other = jnp.where(jax.nn.one_hot(y, 3, dtype=bool), -jnp.inf, logits).argmax(-1)

    def margin(params):
        logits = apply_fn(params, result.adversarials)
        each = jnp.arange(64)
        return logits[each, y] - logits[each, other]

    share = result.multiplier / result.distance
    trusted = np.asarray(result.residual < 1e-5)
    assert trusted.sum() > 50
    for found, expected in zip(slope, jax.jacrev(margin)(params)):
        expected = share[:, None, None] * expected
        error, size = (np.abs(v[trusted]).max(axis=(1, 2)) for v in (found - expected, expected))
        assert (error <= (1e-3 if dtype == np.float32 else 1e-8) * size).all()


@pytest.mark.slow
def test_implicit_equals_unrolled_where_the_residual_is_small(curved):
    params, apply_fn, x, y, adversarials = curved

    def value(params, x, derivative):
        result = solve(params, apply_fn, x, y, adversarials, derivative=derivative)
        return result.distance + jnp.sum(result.adversarials**3, axis=(1, 2, 3)), result.residual

    def jacobian(derivative):
        return jax.jit(lambda p, x: jax.jacrev(lambda p, x: value(p, x, derivative), (0, 1),
                                               has_aux=True)(p, x))(params, x)

    (implicit, residual), (unrolled, _) = jacobian("implicit"), jacobian("unrolled")
    trusted = np.flatnonzero(np.asarray(residual) <= 1e-8)
    assert len(trusted) >= 2
    for a, b in zip(jax.tree.leaves(implicit), jax.tree.leaves(unrolled)):
        error, size = (jnp.linalg.norm(v[trusted].reshape(len(trusted), -1), axis=1)
                       for v in (a - b, b))
        assert (error <= 1e-3 * size).all()

    # Forward mode, and a central difference of the whole solution.
    change = jax.tree.map(lambda p: jax.random.normal(jax.random.key(2), p.shape, p.dtype), params)
    forward = jax.jit(lambda d: jax.jvp(lambda p: value(p, x, "implicit")[0], (params,), (d,))[1])(
        change)
    reverse = sum(jax.tree.leaves(jax.tree.map(
        lambda j, d: jnp.sum(j.reshape(3, -1) * d.reshape(1, -1), axis=1), implicit[0], change)))
    np.testing.assert_allclose(forward[trusted], reverse[trusted], rtol=1e-9)
    at = jax.jit(lambda by: value(jax.tree.map(lambda p, d: p + by * d, params, change), x,
                                  "implicit")[0])
    difference = (at(1e-6) - at(-1e-6)) / 2e-6
    np.testing.assert_allclose(difference[trusted], reverse[trusted], rtol=1e-5)


def test_images_without_support_say_so_and_have_finite_derivatives(curved):
    params, apply_fn, x, y, adversarials = curved
    adversarials = adversarials.at[0].set(x[0])

    def value(params, x):
        result = solve(params, apply_fn, x, y, adversarials)
        return jnp.sum(result.distance) + jnp.sum(result.adversarials), result

    gradient, result = jax.jit(jax.grad(value, (0, 1), has_aux=True))(params, x)
    assert np.isinf(result.residual[0]) and result.distance[0] == 0.0
    np.testing.assert_array_equal(result.adversarials[0], x[0])
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradient))
    np.testing.assert_allclose(gradient[1][0], 1.0)


def test_pixels_on_a_bound_stay_there():
    kernel = jnp.zeros((192, 2), jnp.float64).at[:6, 0].set(1.0)
    params = kernel, jnp.zeros(2, jnp.float64)
    x = jnp.zeros((1, 8, 8, 3)).at[0, 0, 0].set(0.9)
    adversarials = x.at[0, 0, 0].set(-1.0).at[0, 0, 1].set(-0.5)
    result = gse_jax.implicit_attack(params, linear_logits, x, jnp.zeros(1, int),
                                     adversarials=adversarials, bounds=BOUNDS)
    np.testing.assert_array_equal(result.adversarials[0, 0, 0], -1.0)
    np.testing.assert_allclose(result.adversarials[0, 0, 1], 1.0)  # the rest: sum is then 0
    assert float(result.residual[0]) < 1e-10
    # The same at the upper bound.
    mirrored = gse_jax.implicit_attack((-kernel, params[1]), linear_logits, -x, jnp.zeros(1, int),
                                       adversarials=-adversarials, bounds=BOUNDS)
    np.testing.assert_allclose(mirrored.adversarials, -result.adversarials)
    np.testing.assert_allclose(mirrored.distance, np.sqrt(3 * (1.9**2 + 1.0)))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_point_beyond_a_bound_is_not_trusted(sign):
    """A pixel of three values would have to go to 1.5."""
    params = jnp.zeros((192, 2)).at[:3, 0].set(-sign), jnp.asarray([4.5, 0.0])
    x = jnp.zeros((1, 8, 8, 3))
    result = gse_jax.implicit_attack(params, linear_logits, x, jnp.zeros(1, int),
                                     adversarials=x.at[0, 0, 0].set(0.5 * sign), bounds=BOUNDS)
    np.testing.assert_allclose(result.adversarials[0, 0, 0], 1.5 * sign)
    np.testing.assert_allclose(result.residual, 0.5)


def test_derivatives_by_what_does_not_change_the_slope_and_where_there_is_none():
    """By the last bias alone, or by the images alone of a piecewise linear model: a part of the system is constant."""
    kernel = jnp.zeros((192, 2)).at[:3, 0].set(1.0)
    x = jnp.zeros((2, 8, 8, 3))
    given = x.at[0, 0, 0].set(-0.5).at[1, 4, 4].set(0.5)

    def distance(bias, x):
        result = gse_jax.implicit_attack((kernel, bias), linear_logits, x, jnp.zeros(2, int), adversarials=given,
                                         bounds=BOUNDS)
        return result.distance.sum(), result

    bias = jnp.asarray([2.0, 0.0])
    slope, result = jax.grad(distance, has_aux=True)(bias, x)
    np.testing.assert_allclose(slope, np.asarray([1.0, -1.0]) / np.sqrt(3.0))
    by_image = jax.jit(jax.grad(distance, 1, has_aux=True))(bias, x)[0]
    np.testing.assert_allclose(by_image[0].reshape(-1), kernel[:, 0] / np.sqrt(3.0))
    np.testing.assert_allclose(result.distance, [2.0 / np.sqrt(3.0), 0.5 * np.sqrt(3.0)])
    np.testing.assert_array_equal(result.adversarials[1], given[1])  # without a slope the given point stays
    assert float(result.multiplier[1]) == 0.0 and float(result.residual[1]) == 2.0


def test_the_saddle_point_is_that_of_a_dense_solver():
    random = np.random.default_rng(0)
    root, normal, a = random.normal(size=(30, 30)), random.normal(size=30), random.normal(size=30)
    matrix = np.eye(30) + root @ root.T - 100.0 * np.outer(normal, normal)  # definite on the plane alone
    full = np.block([[matrix, normal[:, None]], [normal, 0.0]])
    matvec = lambda pair: (matrix @ pair[0] + normal * pair[1], normal @ pair[0])
    d, e = jax.jit(lambda a, b: saddle_point_solve(matvec, (a, b)))(a, jnp.asarray(0.7))
    np.testing.assert_allclose(np.append(d, e), np.linalg.solve(full, np.append(a, 0.7)), rtol=1e-9, atol=1e-9)
    # Flat in the plane: no strict minimum, but numbers.
    flat = saddle_point_solve(lambda pair: (0.0 * pair[0] + normal * pair[1], normal @ pair[0]), (a, jnp.asarray(0.7)))
    np.testing.assert_allclose(flat[0], 0.7 * normal / (normal @ normal))


@pytest.mark.parametrize("change, message", [
    (dict(derivative="magic"), "derivative='magic' is unknown"),
    (dict(damping=0.0), "damping=0 must lie in"),
    (dict(num_steps=0), "num_steps must be a positive integer"),
    (dict(adversarials=np.zeros((1, 8, 8, 1))), "adversarials must have the shape of x"),
    (dict(adversarials=np.full((1, 8, 8, 3), 200, np.uint8)), r"adversarials must be finite and inside bounds=\(0, 1\)"),
])
def test_bad_arguments_are_named_in_one_line(change, message):
    params = jnp.ones((192, 2), jnp.float64), jnp.zeros(2, jnp.float64)
    options = dict(adversarials=np.zeros((1, 8, 8, 3))) | change
    with pytest.raises(ValueError, match=message) as error:
        gse_jax.implicit_attack(params, linear_logits, np.zeros((1, 8, 8, 3)),
                                np.zeros(1, int), **options)
    assert "\n" not in str(error.value)


def test_a_solution_on_a_kink_has_a_large_residual():
    """Golden images on which the solver cycles: not to be trusted, and the residual says so."""
    params, apply_fn, x, y = toy()
    adversarials = jnp.asarray(golden()["untargeted/adv"])
    residual = np.asarray(solve(params, apply_fn, x, y, adversarials).residual)
    assert (residual > 1e-3).any() and (residual < 1e-8).any()


def test_adversarials_stored_with_fewer_digits_change_what_they_changed(curved):
    """What float32 makes of a float64 image is no change."""
    *model, given = curved
    exact = solve(*model, given)
    assert exact.support.any() and not exact.support.all()
    for kind in ("f4", "f2"):
        np.testing.assert_array_equal(solve(*model, np.asarray(given).astype(kind)).support, exact.support)
    whole = solve(*model, np.ones(given.shape, np.uint8))  # of one scale with x, so every pixel changed
    assert whole.support.all()
