"""Whatever model, random keys, mesh or devices a caller brings: the same results."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gse_jax
from gse_jax import devices
from gse_jax.attacks import METHODS, program, runner
from gse_jax.attacks.algorithm import Sample
from gse_jax.attacks.baselines.projected_gradient_descent import PGDSettings
from gse_jax.attacks.baselines.random_search import SparseRSSettings
from gse_jax.attacks.baselines.sparse_projected_gradient_descent import SparsePGDSettings
from gse_jax.attacks.baselines.structured_attack import StrAttackSettings
from tests.toy_model import toy

SHORT = {
    "strattack": StrAttackSettings(num_searches=4, max_steps=30, num_retrainings=2, retrain_steps=20),
    "sparse_rs": SparseRSSettings(num_pixels=20, max_queries=20, num_restarts=1),
    "sparse_pgd": SparsePGDSettings(num_pixels=12, max_steps=8),
    "pgd": PGDSettings(max_steps=6),
}


def attack(method, *arguments, **options):
    return gse_jax.attack(*arguments, method=method, settings=SHORT[method], bounds=(-1.0, 1.0), **options)


def test_a_hinged_attack_on_a_model_that_names_positions_in_the_batch():
    """Its backward passes are of a few lanes, whose positions are others."""
    params, apply_fn, x, y = toy()

    def by_position(params, x):
        rows = jnp.arange(len(x))[:, None]
        return apply_fn(params, x.reshape(len(x), -1)[rows, jnp.arange(x[0].size)[None]].reshape(x.shape))

    plain = attack("strattack", params, apply_fn, x, y)
    named = jax.jit(lambda x, y: attack("strattack", params, by_position, x, y, lanes=6))(x, y)
    assert np.asarray(plain.success).any()
    np.testing.assert_array_equal(named.status, plain.status)
    np.testing.assert_allclose(named.adversarials, plain.adversarials, atol=1e-9)


@pytest.mark.parametrize("key", [jax.random.key(7, impl="rbg"), pytest.param(7, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["pgd", pytest.param("sparse_rs", marks=pytest.mark.slow)])
def test_random_numbers_are_the_image_s_own_whatever_the_kind_of_key(method, key):
    params, apply_fn, x, y = toy()
    with jax.default_prng_impl("rbg"):
        several = attack(method, params, apply_fn, x, y, key=key, lanes=6)
        alone = attack(method, params, apply_fn, x, y, key=key, lanes=1)
    np.testing.assert_allclose(several.adversarials, alone.adversarials, atol=1e-9)
    threefry = attack(method, params, apply_fn, x, y, key=7, lanes=6)
    np.testing.assert_array_equal(threefry.adversarials, several.adversarials)


def test_random_search_asks_for_no_derivative():
    params, apply_fn, x, y = toy()

    def looped(params, x):
        return jax.lax.while_loop(lambda c: c[0] < 1, lambda c: (c[0] + 1, apply_fn(params, x)),
                                  (0, jnp.zeros((len(x), 5), x.dtype)))[1]

    with pytest.raises(ValueError, match="[Rr]everse"):
        jax.grad(lambda x: looped(params, x).sum())(x)
    result = attack("sparse_rs", params, looped, x, y)
    np.testing.assert_array_equal(result.adversarials, attack("sparse_rs", params, apply_fn, x, y).adversarials)
    assert (np.asarray(result.gradient_evals) == 0).all()


@pytest.mark.parametrize("method", ["sparse_pgd", pytest.param("pgd", marks=pytest.mark.slow)])
def test_under_the_callers_mesh(method):
    params, apply_fn, x, y = toy()
    plain = attack(method, params, apply_fn, x, y)
    with jax.set_mesh(jax.make_mesh((2,), ("data",))):
        meshed = attack(method, params, apply_fn, x, y)
    np.testing.assert_array_equal(meshed.adversarials, plain.adversarials)


@pytest.mark.parametrize("method", ["pgd", pytest.param("sparse_pgd", marks=pytest.mark.slow)])
def test_a_sweep_that_an_explicit_mesh_splits(method):
    """vmap over an axis of a mesh: the mapped axis is hidden from the attack, its split is not."""
    params, apply_fn, x, y = toy()
    stacked = jax.tree.map(lambda a: jnp.stack([a, 0.5 * a]), params)
    mesh = jax.make_mesh((2,), ("models",))
    split = jax.device_put(stacked, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("models")))
    run = jax.vmap(lambda params: attack(method, params, apply_fn, x, y).adversarials)
    with jax.set_mesh(mesh):
        meshed = run(split)
    np.testing.assert_allclose(meshed, run(stacked), atol=1e-9)


@pytest.mark.slow
def test_a_coarse_loop_on_images_that_an_explicit_mesh_splits():
    params, apply_fn, x, y = toy()
    settings = gse_jax.GSESettings(num_runs=1, max_steps=3, phase1_steps=2)
    run = functools.partial(gse_jax.attack, settings=settings, bounds=(-1.0, 1.0), precision="tf32")
    mesh = jax.make_mesh((2,), ("data",))
    split = jax.device_put((x, y), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    result = jax.jit(lambda x, y: run(params, apply_fn, x, y))(*split)
    np.testing.assert_allclose(result.adversarials, run(params, apply_fn, x, y).adversarials, atol=1e-9)


def test_a_function_whose_module_has_more_classes_by_now():
    nnx = pytest.importorskip("flax.nnx")
    x = np.random.default_rng(0).uniform(0.2, 0.8, (2, 8, 8, 3)).astype("f4")
    layer = nnx.Linear(192, 4, rngs=nnx.Rngs(0))

    def predict(_, x):
        return layer(x.reshape(len(x), -1))

    run = functools.partial(gse_jax.attack, None, predict, method="pgd", settings=SHORT["pgd"])
    with pytest.raises(ValueError, match="4 classes"):
        run(x, np.int32([0, 9]))
    layer = nnx.Linear(192, 10, rngs=nnx.Rngs(0))
    assert len(run(x, np.int32([0, 9])).status) == 2


def test_jax_s_default_device_is_where_an_attack_runs():
    params, apply_fn, x, y = toy()
    device = jax.local_devices()[2]
    plain = attack("pgd", params, apply_fn, x, y)
    with jax.default_device(device):
        assert runner.layout(100, None, (8, 8, 3))[0] == [device]
        result = attack("pgd", params, apply_fn, x, y)
        assert result.adversarials.devices() == {device}
    np.testing.assert_allclose(result.adversarials, plain.adversarials, atol=1e-9)
    assert len(runner.layout(100, None, (8, 8, 3))[0]) == 4
    with jax.default_device("cpu"):  # all of a kind may be wished for
        assert devices.local_devices() == jax.local_devices(backend="cpu") and devices.platform() == "cpu"


def test_who_chose_a_device_is_not_told_of_idle_cores(monkeypatch, caplog):
    monkeypatch.setattr(devices, "_hinted", False)
    monkeypatch.setattr(devices, "_num_cores", lambda: 3)
    one = jax.local_devices()[:1]
    with jax.default_device(one[0]):
        devices.hint_at_idle_cores(one)
    assert not caplog.records
    for _ in range(2):
        devices.hint_at_idle_cores(one)
    assert len(caplog.records) == 1


def test_what_waits_goes_to_the_devices_with_the_least_to_do():
    def images(numbers):
        ids = np.asarray(numbers, np.int32)
        return Sample(np.zeros((len(ids), 8, 8, 1), "f4"), ids, ids, ids)

    def dealt(queue):
        ends = np.asarray(queue.end)
        return [np.asarray(ids)[:end].tolist() for ids, end in zip(np.split(np.asarray(queue.samples.sample_id), 4), ends)]

    sharding = program.split(program.make_mesh(jax.local_devices()))
    dealer = runner._Dealer(iter([images(range(6))]), sharding, "cpu")
    queue, fresh = dealer.deal([0] * 4, 8, [0] * 4)
    assert dealt(queue) == [[0, 4], [1, 5], [2], [3]] and fresh == 6
    # One image is in a lane of each device but the third, which is done; two wait, behind busy ones.
    queue, fresh = dealer.deal([1] * 4, 8, [1, 1, 0, 1])
    assert dealt(queue) == [[5], [], [4], []] and fresh == 0
    # No device has more than its places.
    dealer = runner._Dealer(iter([images(range(40))]), sharding, "cpu")
    queue, fresh = dealer.deal([0] * 4, 8, [20, 0, 0, 0])
    assert [len(part) for part in dealt(queue)] == [8] * 4 and fresh == 32 and len(dealer.stock) == 8


def test_only_random_search_is_free_of_gradients():
    free = {name for name in METHODS
            if METHODS[name].bind(*gse_jax.preset(name, "cifar10"), targeted=False, bounds=(0.0, 1.0), key=None).gradient_free}
    assert free == {"sparse_rs"}


def test_a_stream_runs_where_it_was_asked_for():
    params, apply_fn, x, y = toy()
    device, used = jax.local_devices()[2], []
    ids = np.arange(6, dtype=np.int32)
    with jax.default_device(device):
        stretches = gse_jax.attacks.attack_stream(
            params, apply_fn, [Sample(np.asarray(x), np.asarray(y), np.full(6, -1), ids)], image_shape=x.shape[1:],
            dtype=x.dtype, method="pgd", settings=SHORT["pgd"], bounds=(-1.0, 1.0))
    make_mesh = program.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "make_mesh", lambda devices: used.append(devices) or make_mesh(devices))
        assert sorted(i for stretch in stretches for i in stretch.sample_ids) == list(range(6))
    assert used == [[device]]
