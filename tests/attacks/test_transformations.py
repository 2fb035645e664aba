"""Compilation and the caller's transformations."""

import functools
import gc
import types
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gse_jax
from gse_jax.attacks import METHODS, api, program
from gse_jax.attacks.gse import GSESettings
from gse_jax.attacks.program import hashable
from gse_jax.attacks.baselines.sigma_zero import SigmaZeroSettings
from gse_jax.differentiable import boundary, unrolled
from tests.toy_model import toy, toy_logits

SETTINGS = GSESettings(num_runs=6, max_steps=40, phase1_steps=20)  # as in `test_engine.py`: one program less


def counting_toy():
    """The toy model, and a list that grows by one each time it is traced for the attack."""
    params, apply_fn, x, y = toy()
    traces = []

    def counting(params, x):
        traces.append(x.shape)
        return apply_fn(params, x)

    return params, counting, x, y, traces


def attack_traces(traces, lanes):
    return [shape for shape in traces if shape[0] == lanes]


@pytest.mark.slow
def test_sweeps_sizes_and_repetition_compile_once():
    params, apply_fn, x, y, traces = counting_toy()
    _, hyperparams = gse_jax.preset("gse", "cifar10", targeted=False)

    def run(x, y, **options):
        return gse_jax.attack(params, apply_fn, x, y, settings=SETTINGS, bounds=(-1.0, 1.0),
                              lanes=5, **options)

    run(x, y)
    first = len(attack_traces(traces, 2))  # 5 lanes over 4 devices: 2 each
    assert first > 0
    for count in (6, 5, 4):
        run(x[:count], y[:count])
    run(jnp.tile(x, (7, 1, 1, 1)), jnp.tile(y, 7))
    run(x, y, hyperparams=hyperparams._replace(mu=0.5, q=0.5, step_size=0.01, blur_sigma=1.0))
    run(x, y, key=3)
    assert len(attack_traces(traces, 2)) == first


@pytest.mark.slow
def test_default_lanes_share_one_program_between_nearby_sizes():
    params, apply_fn, x, y, traces = counting_toy()
    for count in (17, 20, 30):  # 5, 5 and 8 images per device: 4 lanes, then 1
        tiled = jnp.tile(x, (5, 1, 1, 1))[:count], jnp.tile(y, 5)[:count]
        gse_jax.attack(params, apply_fn, *tiled, settings=SETTINGS, bounds=(-1.0, 1.0))
        if count == 17:
            first = len(attack_traces(traces, 4))
    assert first > 0 and len(attack_traces(traces, 4)) == first


@pytest.mark.slow
def test_vmap_over_hyperparams_equals_single_calls():
    params, apply_fn, x, y = toy()
    _, hyperparams = gse_jax.preset("gse", "cifar10", targeted=False)
    values = {"mu": [1.0, 0.3, 3.0], "step_size": [0.005, 0.02, 0.01], "q": [0.25, 0.5, 0.9]}
    sweep = hyperparams._replace(**{k: jnp.asarray(v) for k, v in values.items()})
    axes = type(hyperparams)(*(0 if k in values else None for k in hyperparams._fields))

    def run(h):
        return gse_jax.attack(params, apply_fn, x, y, settings=SETTINGS, hyperparams=h,
                              bounds=(-1.0, 1.0))

    swept = jax.vmap(run, in_axes=(axes,))(sweep)
    assert len({float(a) for a in np.abs(np.asarray(swept.adversarials - x[None])).sum(
        (1, 2, 3, 4))}) == 3
    for i in range(3):
        one = run(hyperparams._replace(**{k: v[i] for k, v in values.items()}))
        np.testing.assert_array_equal(swept.status[i], one.status)
        np.testing.assert_array_equal(swept.gradient_evals[i], one.gradient_evals)
        np.testing.assert_allclose(swept.adversarials[i], one.adversarials, atol=1e-9)


SMALL = GSESettings(num_runs=2, max_steps=6, phase1_steps=3, patch_size=4)


def run(params, apply_fn=toy_logits):
    _, _, x, y = toy()
    return gse_jax.attack(params, apply_fn, x, y, settings=SMALL, bounds=(-1.0, 1.0)).adversarials


def test_under_the_callers_mesh():
    params, apply_fn, x, y = toy()
    plain = run(params)
    with jax.set_mesh(jax.make_mesh((2,), ("data",))):
        np.testing.assert_array_equal(run(params), plain)
    spec = jax.sharding.PartitionSpec("d")
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(ValueError, match="check_vma=False"):
        jax.shard_map(lambda x, y: gse_jax.attack(params, apply_fn, x, y, bounds=(-1.0, 1.0)).success,
                      mesh=mesh, in_specs=spec, out_specs=spec)(x, y)


@pytest.mark.slow
def test_inside_the_callers_closures():
    params, apply_fn, x, _ = toy()
    plain = run(params)
    # What vmap hands on is seen by no argument of the attack.
    two = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), params)
    inside = jax.vmap(lambda p: run(None, lambda _, x: apply_fn(p, x)))(two)
    np.testing.assert_allclose(inside, [plain, plain], atol=1e-9)
    # An attack on known values inside the caller's eager gradient, as in `differentiable_attack`.
    slope = jax.grad(lambda c: c * jnp.sum(run(params) - x))(1.0)
    np.testing.assert_allclose(slope, jnp.sum(plain - x), atol=1e-9)


@pytest.mark.slow
def test_float64_images_where_jax_has_only_float32():
    params, apply_fn, x, y = toy()
    params, x, y = jax.tree.map(np.float32, params), np.asarray(x), np.asarray(y)
    with jax.enable_x64(False):
        result = gse_jax.attack(params, apply_fn, x, y, settings=SMALL, bounds=(-1.0, 1.0))
        again = gse_jax.refine(params, apply_fn, x, result.adversarials, y, bounds=(-1.0, 1.0))
    assert x.dtype == np.float64 and again.adversarials.dtype == np.float32
    assert result.success.sum() == again.success.sum() > 0


def test_an_nnx_module_that_the_function_names_may_have_changed():
    nnx = pytest.importorskip("flax.nnx")
    layer = nnx.Linear(192, 4, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).uniform(0.2, 0.8, (3, 8, 8, 3)).astype("f4")

    def closure(_, x):
        return layer(x.reshape(len(x), -1) - 0.5)

    # The same as a function that names a global, half-way filled in.
    scope = {"layer": layer}
    exec("def model(scale, _, x): return layer(x.reshape(len(x), -1) * scale - 0.5)", scope)
    model = functools.partial(scope["model"], 1.0)
    assert hashable(closure) is not closure and hashable(model) is not model
    scope["layer"] = None
    assert hashable(model) is model
    scope["layer"] = layer
    holder = types.SimpleNamespace(trainer=types.SimpleNamespace(layer=layer))
    for hidden in (lambda _, x: jax.vmap(lambda image: layer(image.reshape(-1)))(x),
                   lambda _, x: closure(None, x), lambda _, x: holder.trainer.layer(x)):
        assert hashable(hidden) is not hidden

    class Slotted:
        __slots__ = ("layer",)

    class Shared:
        net = layer

    class Calling:
        def __call__(self, _, x):
            return scope["layer"](x)

    named, slotted = types.ModuleType("named"), Slotted()
    named.layer = slotted.layer = layer
    deep = [[[[holder]]]]  # reached with too few steps left, and directly too
    globals_of = {"named": named}
    exec("def by_module(_, x): return named.layer(x)", globals_of)
    exec("def by_method(_, x): return named.layer.kernel.sum()", globals_of)
    exec("def inside(_, x): return map(lambda image: layer(image), x)", inner := {"layer": layer})
    bound = types.MethodType(lambda self, _, x: self.layer(x), types.SimpleNamespace(layer=layer))
    for hidden in (globals_of["by_module"], globals_of["by_method"], inner["inside"], bound, Shared(), Calling(),
                   functools.partial(lambda _, x, net: net(x), net=layer), lambda _, x, net=layer: net(x),
                   lambda _, x, *, net=layer: net(x),
                   lambda _, x: slotted.layer(x), lambda _, x: (deep, holder)[1].trainer.layer(x)):
        assert hashable(hidden) is not hidden
    assert hashable(toy()[1]) is toy()[1]

    class Unbound:  # as proxies are outside their context
        def __getattribute__(self, name):
            raise RuntimeError("nothing there")

    unbound = Unbound()
    assert hashable(unbound_user := lambda _, x: (unbound, x)) is unbound_user
    for _ in range(2):
        y = np.asarray(model(None, x).argmax(-1))
        result = gse_jax.attack(None, model, x, y, method="sigma_zero", settings=SigmaZeroSettings(max_steps=2))
        assert (result.gradient_evals > 0).all()  # 0 where the old weights misclassify
        layer.kernel[...] = -layer.kernel[...]
    gc.collect()  # what was compiled for it is gone
    assert not any(type(one) is program._Once for one in gc.get_objects())


@pytest.mark.slow
def test_shard_map_by_the_caller():
    params, apply_fn, x, y = toy()
    x, y = jnp.tile(x, (2, 1, 1, 1))[:8], jnp.tile(y, 2)[:8]
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("d")

    def run(x, y):
        return gse_jax.attack(params, apply_fn, x, y, settings=SETTINGS, bounds=(-1.0, 1.0))

    sharded = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(spec, spec), out_specs=spec,
                                    check_vma=False))(x, y)
    plain = run(x, y)
    np.testing.assert_array_equal(sharded.status, plain.status)
    np.testing.assert_allclose(sharded.adversarials, plain.adversarials, atol=1e-9)


@pytest.mark.slow
def test_forward_mode_through_the_attack():
    """Forward mode passes through the while loop: how the perturbation moves with mu."""
    params, apply_fn, x, y = toy()
    _, hyperparams = gse_jax.preset("gse", "cifar10", targeted=False)

    def size(mu):
        result = gse_jax.attack(params, apply_fn, x[2:3], y[2:3], settings=SETTINGS,
                                hyperparams=hyperparams._replace(mu=mu), bounds=(-1.0, 1.0))
        return jnp.sum((result.adversarials - x[2:3]) ** 2)

    _, slope = jax.jvp(size, (1.0,), (1.0,))
    h = 1e-6
    np.testing.assert_allclose(slope, (size(1.0 + h) - size(1.0 - h)) / (2 * h), rtol=1e-5)


@pytest.mark.slow
def test_a_pytree_as_model_compiles_once():
    """A pytree of the same arrays is the same model; what may have changed compiles anew."""
    equinox = pytest.importorskip("equinox")
    params, apply_fn, x, y = toy()
    traced = []

    class Module(equinox.Module):
        weights: Any

        def __call__(self, params, x):
            traced.append(x.shape)
            return apply_fn(self.weights, x)

    def compilations(model):
        traced.clear()
        result = gse_jax.attack((), model, x[:1], y[:1], settings=SETTINGS, bounds=(-1.0, 1.0))
        return len(traced) - 1, float(result.adversarials.sum())  # less the check of the logits' shape

    first, other = Module(params), Module(jax.tree.map(lambda a: 1.1 * a, params))
    before, expected = compilations(first)
    assert before >= 1
    assert [compilations(one) for one in (first, Module(params))] == [(0, expected)] * 2
    assert compilations(other)[0] == before and compilations(other)[1] != expected
    in_place = Module({name: np.array(value) for name, value in params.items()})
    assert compilations(in_place)[0] == before
    for value in in_place.weights.values():
        value *= 1.1
    assert compilations(in_place) == (before, compilations(other)[1])


@pytest.mark.slow
def test_an_unhashable_model_is_accepted():
    params, apply_fn, x, y = toy()

    class Model:
        __hash__ = None

        def __call__(self, params, x):
            return apply_fn(params, x)

    result = gse_jax.attack(params, Model(), x[:1], y[:1], settings=SETTINGS, bounds=(-1.0, 1.0))
    assert result.success.shape == (1,)


def linear_model():
    kernel = np.random.default_rng(0).normal(size=(192, 4)).astype("f4")
    x = np.random.default_rng(1).uniform(0.2, 0.8, (1, 8, 8, 3)).astype("f4")
    return kernel, x, np.asarray((x.reshape(1, -1) @ kernel).argmax(-1))


def test_more_configurations_than_anybody_has_are_compiled_once(monkeypatch):
    kernel, x, y = linear_model()
    built = []

    @program.remembered
    def build(program, *rest):
        built.append((program, rest))
        return len(built)

    programs = [program.Program(lambda p, x: None, None, i, False, (0.0, 1.0), True) for i in range(100)]
    programs = [p.__class__(programs[0].apply_fn, None, i, False, (0.0, 1.0), True) for i, p in enumerate(programs)]
    assert [build(p, 1) for p in programs] == [build(p, 1) for p in programs] and len(built) == 100


@pytest.mark.slow
def test_models_that_are_gone_are_not_kept():
    kernel, x, y = linear_model()
    settings = SigmaZeroSettings(max_steps=2)
    left = []
    for _ in range(program._MODELS + 3):
        weights = jnp.asarray(kernel)
        left.append(weakref.ref(weights))
        gse_jax.attack(None, (lambda w: lambda _, x: x.reshape(len(x), -1) @ w)(weights), x, y,
                       method="sigma_zero", settings=settings)
    del weights
    jax.clear_caches()  # JAX's own
    gc.collect()
    assert sum(one() is not None for one in left) <= program._MODELS


def test_differentiable_attacks_keep_nothing_of_a_model_for_one_call(caplog):
    nnx = pytest.importorskip("flax.nnx")
    _, x, _ = linear_model()
    layer = nnx.Linear(192, 4, rngs=nnx.Rngs(0))

    def model(_, x):
        return layer(x.reshape(len(x), -1))

    y = np.asarray(model(None, x).argmax(-1))
    program._tell_of_nnx.cache_clear()
    for _ in range(2):
        gse_jax.differentiable_attack(None, model, x, y, tradeoff=1e-4, num_steps=2)
        gse_jax.implicit_attack(None, model, x, y, adversarials=0.9 * x, num_steps=2)
    gc.collect()
    assert not any(type(one) is program._Once for one in gc.get_objects())
    told = [record.message for record in caplog.records if "NNX" in record.message]
    assert len(told) == 1 and "from_nnx" in told[0]


def lowered_for_tpu(monkeypatch, run, *arguments):
    """The program of a TPU, as text."""
    for module in (api, unrolled, boundary):
        monkeypatch.setattr(module, "platform", lambda: "tpu")
    return jax.jit(run).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("method", METHODS)
def test_attacks_hold_nothing_that_a_tpu_lacks(method, monkeypatch):
    """No call of LAPACK or the like; `benchmarks/compile_for_tpu.py` compiles what is lowered here."""
    kernel, x, y = np.ones((768, 4), np.float32), np.full((1, 16, 16, 3), 0.5, np.float32), np.zeros(1, np.int32)
    segments = np.arange(256, dtype=np.int32).reshape(1, 16, 16) // 9
    monkeypatch.setattr(api, "segments_of", lambda method, *_: segments if method.segment else None)
    text = lowered_for_tpu(monkeypatch, lambda kernel, x: gse_jax.attack(
        kernel, lambda w, x: x.reshape(len(x), -1) @ w, x, y, method=method).adversarials, kernel, x)
    assert "custom_call" not in text and "stablehlo.while" in text


def test_differentiable_attacks_hold_nothing_that_a_tpu_lacks(monkeypatch):
    kernel, x, y = linear_model()
    model = lambda w, x: x.reshape(len(x), -1) @ w

    def far(kernel, x):
        unrolled = gse_jax.differentiable_attack(kernel, model, x, y, tradeoff=1e-4, num_steps=2)
        implicit = gse_jax.implicit_attack(kernel, model, x, y, adversarials=0.9 * x, num_steps=2)
        return unrolled.adversarials.sum() + implicit.adversarials.sum()

    assert "custom_call" not in lowered_for_tpu(monkeypatch, jax.grad(far, (0, 1)), kernel, x)
