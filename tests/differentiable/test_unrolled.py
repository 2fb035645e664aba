"""The differentiable attack: its value is the attack's, its derivatives are those of its value.

Finite differences are taken only where the run is smooth: at the chosen images no support, stopping
time or runner-up class changes within the step of the difference, which the tests check.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gse_jax
from tests.toy_model import golden, linear_logits, small_logits, toy

BOUNDS = (-1.0, 1.0)
SMOOTH = np.array([3, 5])  # golden images whose runs stop after 37 and 17 iterations
NUM_STEPS = 40
# Relative steps of the central differences: the trade-off acts on w by 1e-4 of its own size only.
STEP = {"params": 1e-6, "x": 1e-6, "mu": 1e-5, "step_size": 1e-5, "tradeoff": 1e-4}


@pytest.fixture(scope="module")
def problem():
    """(arguments of `objective`, the ordinary attack's result) on the toy."""
    params, apply_fn, x, y = toy()
    x, y = x[SMOOTH], y[SMOOTH]
    ordinary = gse_jax.attack(params, apply_fn, x, y, bounds=BOUNDS)
    assert bool(ordinary.success.all())
    return dict(params=params, x=x, mu=jnp.ones(()), step_size=jnp.asarray(0.005),
                tradeoff=ordinary.tradeoff), y, ordinary


def run(arguments, y, num_steps=NUM_STEPS):
    _, hyperparams = gse_jax.preset("gse", "cifar10", targeted=False)
    hyperparams = hyperparams._replace(mu=arguments["mu"], step_size=arguments["step_size"])
    return gse_jax.differentiable_attack(
        arguments["params"], toy()[1], arguments["x"], y, tradeoff=arguments["tradeoff"],
        num_steps=num_steps, hyperparams=hyperparams, bounds=BOUNDS)


@pytest.fixture(scope="module")
def functions(problem):
    """(value, jacobian, jvp, pieces): per image the squared l2 norm plus margin of the result."""
    _, y, _ = problem

    def value(arguments):
        result = run(arguments, y)
        square = jnp.sum((result.adversarials - arguments["x"]) ** 2, axis=(1, 2, 3))
        changed = jnp.any(result.adversarials != arguments["x"], axis=-1)
        return square + result.gap, (changed, result.forward_evals)

    return (jax.jit(value), jax.jit(jax.jacrev(value, has_aux=True)),
            jax.jit(lambda a, da: jax.jvp(lambda a: value(a)[0], (a,), (da,))[1]))


@pytest.fixture(scope="module")
def jacobian(problem, functions):
    return functions[1](problem[0])[0]


def direction(arguments, name):
    """A random direction in one argument, zero in the others; relative for hyperparameters."""
    zero = jax.tree.map(jnp.zeros_like, arguments)
    leaves, tree = jax.tree.flatten(arguments[name])
    if name in ("params", "x"):
        leaves = [jax.random.normal(jax.random.key(i), leaf.shape, leaf.dtype)
                  for i, leaf in enumerate(leaves)]
    return zero | {name: jax.tree.unflatten(tree, leaves)}


def along(jacobian, change):
    products = jax.tree.map(lambda j, d: jnp.sum(j.reshape(2, -1) * d.reshape(1, -1), axis=1),
                            jacobian, change)
    return sum(jax.tree.leaves(products))


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow) if name in ("params", "x") else name for name in STEP])
def test_reverse_equals_central_differences(problem, functions, jacobian, name):
    arguments, _, _ = problem
    value, _, _ = functions
    change = direction(arguments, name)

    def moved(by):
        return value(jax.tree.map(lambda a, d: a + by * d, arguments, change))

    step, (_, pieces) = STEP[name], moved(0.0)
    f = {}
    for k in (-2, -1, 1, 2):
        f[k], at = moved(k * step)
        # The points are away from switching points: same support, same stopping time.
        jax.tree.map(np.testing.assert_array_equal, at, pieces)
    difference = (8.0 * (f[1] - f[-1]) - (f[2] - f[-2])) / (12.0 * step)
    reverse = along(jacobian, change)
    assert (np.abs(reverse) > 1e-9).all()
    np.testing.assert_allclose(reverse, difference, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", STEP)
def test_forward_equals_reverse(problem, functions, jacobian, name):
    change = direction(problem[0], name)
    np.testing.assert_allclose(functions[2](problem[0], change), along(jacobian, change), rtol=1e-9)


def test_value_is_the_ordinary_attack(problem):
    arguments, y, ordinary = problem
    result = run(arguments, y)
    np.testing.assert_allclose(result.adversarials, ordinary.adversarials, rtol=0, atol=1e-10)
    np.testing.assert_array_equal(result.status, gse_jax.Status.FOUND)
    logits = toy()[1](arguments["params"], result.adversarials)
    np.testing.assert_allclose(result.logits, logits, atol=1e-10)
    assert bool((result.gap < 0).all())


@pytest.mark.parametrize("num_steps, targets", [(1, None), (3, [1, 1])])
def test_all_steps_are_done_and_the_last_point_is_looked_at(num_steps, targets):
    """Of a run that cannot succeed; the scan under which it is repeated is as long as that."""
    settings = gse_jax.GSESettings(max_steps=200, phase1_steps=2)
    x, y = jnp.full((2, 8, 8, 3), 0.5), jnp.zeros(2, jnp.int32)
    result = gse_jax.differentiable_attack(linear(500.0), linear_logits, x, y, targets=targets, tradeoff=[1e-9, 0.0],
                                           num_steps=num_steps, settings=settings,
                                           hyperparams=gse_jax.GSEHyperparams(mu=0.0, step_size=1e-3))
    assert result.status.tolist() == [gse_jax.Status.NOT_FOUND] * 2
    assert result.forward_evals.tolist() == [1 + num_steps, 1] and result.gradient_evals.tolist() == [num_steps, 1]
    np.testing.assert_allclose(result.logits, linear_logits(linear(500.0), result.adversarials))
    np.testing.assert_allclose(result.gap, result.logits[:, 0] - result.logits[:, 1])
    assert result.gap[0] < result.gap[1] and (result.adversarials[1] == x[1]).all()


def test_an_image_for_which_the_model_breaks_comes_back():
    def apply_fn(params, x):
        dark = x[:, 0, 0, 0] < 0.5
        return linear_logits(params, x) + jnp.where(dark, jnp.nan, 0.0)[:, None]

    x = jnp.full((2, 8, 8, 3), 0.5).at[1, 0, 0].set(0.9)
    result = gse_jax.differentiable_attack(linear(500.0), apply_fn, x, jnp.zeros(2, jnp.int32), tradeoff=1e-9,
                                           num_steps=3)
    assert result.status.tolist() == [gse_jax.Status.NON_FINITE, gse_jax.Status.NOT_FOUND]
    np.testing.assert_array_equal(result.adversarials[0], x[0])
    assert (result.adversarials[1] != x[1]).any()


def test_boosted_runs_are_told_in_any_range():
    """The first two trade-offs are those of boosted runs, whose steps are ten times as long."""
    settings = gse_jax.GSESettings(num_runs=10, num_boosted_runs=3, phase1_steps=1)
    hyperparams = gse_jax.GSEHyperparams(mu=0.0, step_size=1e-4)
    largest = 0.5 * 1.1  # entry of the gradient, in units of images of range width 2
    first = hyperparams.initial_fraction * gse_jax.ops.largest_active_tradeoff(np.full((8, 8, 3), largest), 1e-4)
    result = gse_jax.differentiable_attack(
        linear(500.0), linear_logits, jnp.full((4, 8, 8, 3), 0.5), jnp.zeros(4, jnp.int32), num_steps=1,
        tradeoff=first * jnp.asarray([1e-7, 1e-8, 5.5e-8, 1e-3]), settings=settings, hyperparams=hyperparams)
    size = abs(result.adversarials - 0.5).max(axis=(1, 2, 3))
    np.testing.assert_allclose(size / size[2], [10.0, 10.0, 1.0, 1.0], rtol=1e-3)


def test_no_images_for_a_model_that_cannot_take_none():
    settings = gse_jax.GSESettings(max_steps=5, phase1_steps=3)
    x, y = jnp.zeros((0, 8, 8, 3)), jnp.zeros(0, jnp.int32)

    def apply_fn(params, x):
        return linear_logits(params, x.reshape(-1, 8, 8, 3) if len(x) else 1 // len(x))

    result = gse_jax.differentiable_attack(linear(0.5), apply_fn, x, y, tradeoff=0.1, settings=settings)
    assert result.adversarials.shape == x.shape and result.logits.shape == (0, 2)
    assert result.status.shape == (0,) and result.status.dtype == jnp.int32


@pytest.mark.slow
@pytest.mark.parametrize("targeted", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_value_of_a_search_and_of_boosted_runs(targeted):
    """Trade-offs from searches; untargeted, some succeed in the boosted last runs only."""
    params, apply_fn, x, y = toy()
    targets = golden()["targeted/labels"] if targeted else None
    settings = gse_jax.GSESettings(num_runs=4, max_steps=100 if targeted else 24, phase1_steps=12)
    _, hyperparams = gse_jax.preset("gse", "cifar10", targeted)
    hyperparams = hyperparams._replace(initial_fraction=0.01 if targeted else 0.3)
    options = dict(targets=targets, settings=settings, hyperparams=hyperparams, bounds=BOUNDS)
    ordinary = gse_jax.attack(params, apply_fn, x, y, **options)
    result = gse_jax.differentiable_attack(params, apply_fn, x, y, **options)
    np.testing.assert_array_equal(result.status, ordinary.status)
    np.testing.assert_array_equal(result.tradeoff, ordinary.tradeoff)
    found = np.asarray(ordinary.success)
    np.testing.assert_allclose(result.adversarials[found], ordinary.adversarials[found], rtol=0,
                               atol=1e-10)
    assert found.any()
    if not targeted:
        unboosted = options | dict(hyperparams=hyperparams._replace(boost=1.0))
        assert (found != np.asarray(gse_jax.attack(params, apply_fn, x, y, **unboosted).success)
                ).any()


@pytest.mark.slow
def test_a_model_that_closes_over_what_is_differentiated():
    """The search's trade-off is fixed then too."""
    params, apply_fn, x, y = toy()
    settings = gse_jax.GSESettings(num_runs=3, max_steps=8, phase1_steps=4)

    def distance(result, x):
        return jnp.sum((result.adversarials - x) ** 2)

    def by_params(params):
        return distance(gse_jax.differentiable_attack(params, apply_fn, x, y, settings=settings,
                                                      bounds=(-1.0, 1.0)), x)

    def by_closure(params):
        return distance(gse_jax.differentiable_attack(None, lambda _, x: apply_fn(params, x), x, y,
                                                      settings=settings, bounds=(-1.0, 1.0)), x)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12),
                 jax.grad(by_closure)(params), jax.grad(by_params)(params))


@pytest.mark.slow
def test_vmap_over_hyperparams_and_grad_of_grad():
    kernel = 0.05 * jax.random.normal(jax.random.key(0), (192, 16), jnp.float64)
    params = (kernel, jax.random.normal(jax.random.key(1), (16, 4), jnp.float64))
    x = jnp.full((2, 8, 8, 3), 0.5)
    y = small_logits(params, x).argmax(-1)
    settings = gse_jax.GSESettings(max_steps=6, phase1_steps=3)

    def distance(mu, scale):
        result = gse_jax.differentiable_attack(
            jax.tree.map(lambda p: p * scale, params), small_logits, x, y, tradeoff=1e-4,
            settings=settings, hyperparams=gse_jax.GSEHyperparams(mu=mu, step_size=0.05))
        return jnp.sum((result.adversarials - x) ** 2)

    mus = jnp.asarray([0.1, 1.0])
    one = jax.jit(distance)  # with a concrete trade-off, checked although everything is traced
    mapped = jax.jit(jax.vmap(distance, (0, None)))(mus, 1.0)
    np.testing.assert_allclose(mapped, [one(mu, 1.0) for mu in mus], rtol=1e-12)
    slope = jax.jit(lambda scale: jax.jvp(lambda s: distance(mus[0], s), (scale,), (1.0,))[1])
    second = jax.jit(jax.grad(slope))(1.0)
    difference = (slope(1.0 + 1e-5) - slope(1.0 - 1e-5)) / 2e-5
    np.testing.assert_allclose(second, difference, rtol=1e-5)


def linear(shift):
    kernel = jnp.zeros((192, 2), jnp.float64).at[:6, 0].set(1.0).at[:, 1].add(-0.1)
    return kernel, jnp.asarray([shift, 0.0], jnp.float64)


@pytest.mark.parametrize("case, shift, tradeoff", [
    ("already misclassified", -50.0, 1e-3), ("no trade-off", 0.5, 0.0),
    ("dead run, w = 0 throughout", 0.5, 1e9), ("pixels on a bound", 0.5, 1e-6)])
def test_derivatives_stay_finite(case, shift, tradeoff):
    x = jnp.ones((2, 8, 8, 3))  # every pixel lies on the upper bound
    y = jnp.zeros(2, jnp.int32)
    settings = gse_jax.GSESettings(max_steps=5, phase1_steps=3)

    def value(params, x, tradeoff, hyperparams):
        result = gse_jax.differentiable_attack(params, linear_logits, x, y, tradeoff=tradeoff,
                                               settings=settings, hyperparams=hyperparams)
        return jnp.sum(result.adversarials) + jnp.sum(result.gap), result.status

    hyperparams = jax.tree.map(jnp.asarray, gse_jax.GSEHyperparams(step_size=0.01))
    arguments = linear(shift), x, jnp.full(2, tradeoff), hyperparams
    gradient, status = jax.grad(value, argnums=(0, 1, 2, 3), has_aux=True)(*arguments)
    for leaf in jax.tree.leaves(gradient):
        assert bool(jnp.isfinite(leaf).all()), case
    wanted = {"already misclassified": 2, "no trade-off": 1, "dead run, w = 0 throughout": 1}
    if case in wanted:
        # The image comes back as it went in: a pixel on a bound has derivative 1, not 1/2.
        np.testing.assert_array_equal(status, wanted[case])
        kernel = arguments[0][0]
        np.testing.assert_allclose(gradient[1].reshape(2, -1)[0],
                                   1.0 + kernel[:, 0] - kernel[:, 1])


@pytest.mark.slow
def test_prox_has_finite_second_derivatives_at_and_off_its_threshold():
    from gse_jax.ops import half_quasinorm_prox, half_quasinorm_threshold, two_thirds_quasinorm_prox

    for tradeoff in (8.0, 9.0, 1.0):  # 8 and 9: where the formulas of the active set are singular
        edge = float(half_quasinorm_threshold(tradeoff))
        for prox in (half_quasinorm_prox, two_thirds_quasinorm_prox):
            for v in (0.0, edge, -edge, 0.5 * edge):
                hessian = jax.hessian(prox, argnums=(0, 1))(jnp.asarray(v), jnp.asarray(tradeoff))
                assert np.isfinite(np.asarray(jax.tree.leaves(hessian))).all()


@pytest.mark.parametrize("change, message", [
    (dict(tradeoff=-1.0), "tradeoff must be finite and >= 0"),
    (dict(tradeoff=[1.0, 2.0, 3.0]), "tradeoff must be one number or one per image"),
    (dict(num_steps=0), "num_steps must be a positive integer"),
    (dict(num_steps=2.5), "num_steps must be a positive integer"),
    (dict(bounds=(1.0, 0.0)), "bounds must be"),
    (dict(hyperparams=gse_jax.GSEHyperparams(mu=-1.0)), "hyperparams.mu"),
    (dict(y=np.array([0, 7])), "y must lie in"),
    (dict(x=np.full((2, 8, 8, 3), 9.0)), "x must lie inside bounds"),
])
def test_bad_arguments_are_named_in_one_line(change, message):
    arguments = dict(x=np.zeros((2, 8, 8, 3)), y=np.zeros(2, int), tradeoff=1e-3) | change
    x, y = arguments.pop("x"), arguments.pop("y")
    with pytest.raises(ValueError, match=message) as error:
        gse_jax.differentiable_attack(linear(0.0), linear_logits, x, y, **arguments)
    assert "\n" not in str(error.value)
