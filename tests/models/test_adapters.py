"""Models of other libraries through their adapters: the library's own answer, evaluation mode."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import gse_jax
from gse_jax.models import adapters

IMAGES = np.random.default_rng(0).uniform(size=(3, 8, 8, 3)).astype(np.float32)
KEY = jax.random.key(0)


def check(apply_fn, params, expected):
    """Equal to the library's own, under jit, per image, and differentiable by the image."""

    @jax.jit
    def evaluated(params, x):
        gradient = jax.grad(lambda x: apply_fn(params, x)[:, 0].sum())(x)
        # A BatchNorm in training mode would see the batch.
        return apply_fn(params, x), apply_fn(params, x[1:2]), gradient

    logits, alone, gradient = evaluated(params, IMAGES)
    assert logits.shape == (3, 4) and np.allclose(logits, expected, atol=1e-5)
    assert np.allclose(alone, expected[1:2], atol=1e-5)
    assert gradient.shape == IMAGES.shape and np.abs(gradient).max() > 0
    assert all(isinstance(leaf, (jax.Array, np.ndarray)) for leaf in jax.tree.leaves(params))


class LinenNetwork(linen.Module):
    """BatchNorm and dropout, so that the modes differ."""

    @linen.compact
    def __call__(self, x, train: bool):
        x = linen.Conv(5, (3, 3))(x)
        x = linen.BatchNorm(use_running_average=not train)(x)
        x = linen.Dropout(0.5, deterministic=not train)(linen.relu(x))
        return linen.Dense(4)(x.mean((1, 2)))


def test_linen():
    module = LinenNetwork()
    variables = module.init({"params": KEY}, IMAGES, train=False)
    statistics = jax.tree.map(lambda v: v + 0.3, variables["batch_stats"])
    variables = {**variables, "batch_stats": statistics}
    apply_fn, params = adapters.from_linen(module, variables)
    check(apply_fn, params, module.apply(variables, IMAGES, train=False))
    with pytest.raises(TypeError, match="train=True: attacks need evaluation mode, train=False"):
        adapters.from_linen(module, variables, train=True)
    with pytest.raises(TypeError, match="expected a flax.linen module"):
        adapters.from_linen(module.apply, variables)


def test_linen_with_the_opposite_flag():
    class Dropping(linen.Module):
        @linen.compact
        def __call__(self, x, deterministic):
            return linen.Dropout(0.5)(x.mean((1, 2)), deterministic=deterministic)

    apply_fn, params = adapters.from_linen(Dropping(), {})
    np.testing.assert_array_equal(apply_fn(params, IMAGES), IMAGES.mean((1, 2)))


class NnxNetwork(nnx.Module):
    """BatchNorm and dropout, so that the modes differ."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 5, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.dense = nnx.Linear(5, 4, rngs=rngs)

    def __call__(self, x):
        return self.dense(self.dropout(jax.nn.relu(self.norm(self.conv(x)))).mean((1, 2)))


def test_nnx_is_copied_and_evaluated():
    model = NnxNetwork(nnx.Rngs(0))
    model.norm.mean[...] = model.norm.mean[...] + jnp.float32(0.3)
    model.train()
    apply_fn, params = adapters.from_nnx(model)
    assert not model.dropout.deterministic and not model.norm.use_running_average
    model.eval()
    check(apply_fn, params, model(IMAGES))
    with pytest.raises(TypeError, match="expected a flax.nnx module"):
        adapters.from_nnx(LinenNetwork())


def test_nnx_whose_mode_is_an_argument():
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.norm, self.dense = nnx.BatchNorm(3, rngs=rngs), nnx.Linear(3, 4, rngs=rngs)

        def __call__(self, x, power=1, train=True):
            return self.dense((self.norm(x, use_running_average=not train) ** power).mean((1, 2)))

    model = Network(nnx.Rngs(0))
    check(*adapters.from_nnx(model), model(IMAGES, train=False))
    check(*adapters.from_nnx(model, power=2), model(IMAGES, 2, train=False))
    with pytest.raises(TypeError, match="train=True: attacks need evaluation mode, train=False"):
        adapters.from_nnx(model, train=True)


def test_an_adapted_model_can_be_attacked():
    apply_fn, params = adapters.from_nnx(NnxNetwork(nnx.Rngs(0)))
    labels = np.asarray(apply_fn(params, IMAGES).argmax(-1), np.int32)
    shapes = jax.eval_shape(lambda x: gse_jax.attack(params, apply_fn, x, labels), IMAGES)
    assert shapes.adversarials.shape == IMAGES.shape


def test_equinox():
    equinox = pytest.importorskip("equinox")
    keys = jax.random.split(KEY, 2)
    layers = [equinox.nn.Conv2d(3, 5, 3, key=keys[0], dtype=jnp.float32), jax.nn.relu,
              equinox.nn.Dropout(0.5), lambda x: x.mean((1, 2)),
              equinox.nn.Linear(5, 4, key=keys[1], dtype=jnp.float32)]
    model = equinox.nn.Sequential([layer if isinstance(layer, equinox.Module)
                                   else equinox.nn.Lambda(layer) for layer in layers])
    apply_fn, params = adapters.from_equinox(model)
    evaluated = equinox.nn.inference_mode(model)
    check(apply_fn, params, np.stack([evaluated(x.transpose(2, 0, 1)) for x in IMAGES]))
    last = equinox.nn.Sequential([equinox.nn.Lambda(lambda x: x.mean((0, 1))),
                                  equinox.nn.Linear(3, 4, key=KEY, dtype=jnp.float32)])
    apply_fn, params = adapters.from_equinox(last, channels_first=False)
    check(apply_fn, params, np.stack([last(x) for x in IMAGES]))
    with pytest.raises(TypeError, match="expected an equinox.Module"):
        adapters.from_equinox(apply_fn)


def test_equinox_with_state():
    equinox = pytest.importorskip("equinox")

    class Network(equinox.Module):
        norm: equinox.nn.BatchNorm
        dense: equinox.nn.Linear

        def __init__(self):
            self.norm = equinox.nn.BatchNorm(3, "batch", mode="batch", dtype=jnp.float32)
            self.dense = equinox.nn.Linear(3, 4, key=KEY, dtype=jnp.float32)

        def __call__(self, x, state):
            x, state = self.norm(jnp.square(x), state)
            return self.dense(jnp.square(x).mean((1, 2))), state

    model, state = equinox.nn.make_with_state(Network)()
    nchw = jnp.asarray(IMAGES.transpose(0, 3, 1, 2))
    mapped = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    _, state = mapped(nchw, state)  # one step of training fills the statistics
    evaluated = equinox.nn.inference_mode(model)
    expected, _ = jax.vmap(evaluated, axis_name="batch", in_axes=(0, None),
                           out_axes=(0, None))(nchw, state)
    check(*adapters.from_equinox(model, state), expected)


@pytest.mark.parametrize("without_key", [False, True])
def test_haiku(without_key):
    haiku = pytest.importorskip("haiku")

    def network(x, is_training):
        x = haiku.Conv2D(5, 3)(x)
        x = haiku.BatchNorm(True, True, 0.9)(x, is_training)
        return haiku.Linear(4)(jax.nn.relu(x).mean((1, 2)))

    stateful = haiku.transform_with_state(network)
    params, state = stateful.init(KEY, IMAGES, is_training=True)
    if without_key:
        stateful = haiku.without_apply_rng(stateful)
    key = () if without_key else (None,)
    expected, _ = stateful.apply(params, state, *key, IMAGES, is_training=False)
    check(*adapters.from_haiku(stateful, params, state, is_training=False), expected)
    with pytest.raises(TypeError, match="is_training=True: attacks need evaluation mode"):
        adapters.from_haiku(stateful, params, state, is_training=True)
    apply_fn, both = adapters.from_haiku(haiku.transform_with_state(lambda x: network(x, True)), params, state)
    for call in (apply_fn, jax.jit(apply_fn)):
        # Haiku's statistics promote as JAX does by default.
        with jax.numpy_dtype_promotion("standard"), pytest.raises(TypeError, match="updates its state"):
            call(both, IMAGES)
    with pytest.raises(TypeError, match="state: haiku.transform_with_state needs it"):
        adapters.from_haiku(stateful, params)

    plain = haiku.transform(lambda x: haiku.Linear(4)(x.mean((1, 2))))
    params = plain.init(KEY, IMAGES)
    expected = plain.apply(params, None, IMAGES)
    if without_key:
        plain = haiku.without_apply_rng(plain)
    check(*adapters.from_haiku(plain, params), expected)
    with pytest.raises(TypeError, match="expected the result of haiku.transform"):
        adapters.from_haiku(network, params)


def test_torch():
    torch = pytest.importorskip("torch")
    pytest.importorskip("torchax")
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 5, 3, stride=2, padding=1), torch.nn.BatchNorm2d(5), torch.nn.ReLU(),
        torch.nn.Conv2d(5, 5, 3, groups=5), torch.nn.Dropout(0.5), torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(), torch.nn.Linear(5, 4))
    nchw = torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy())
    module(nchw)  # one step of training fills the statistics
    with torch.no_grad():  # classes that a small change reaches
        module[-1].weight *= 50.0
        module[-1].bias -= module.eval()(nchw).mean(0)
    module.train()
    apply_fn, params = adapters.from_torch(module)
    assert module.training
    module.eval()
    nchw.requires_grad_()
    logits = module(nchw)
    check(apply_fn, params, logits.detach().numpy())
    (expected,) = torch.autograd.grad(logits[:, 0].sum(), nchw)
    gradient = jax.grad(lambda x: apply_fn(params, x)[:, 0].sum())(IMAGES)
    assert np.allclose(gradient, expected.numpy().transpose(0, 2, 3, 1), atol=1e-5)

    labels = np.asarray(apply_fn(params, IMAGES).argmax(-1), np.int32)
    settings = gse_jax.GSESettings(num_runs=3, max_steps=20, phase1_steps=5)
    hyperparams = gse_jax.GSEHyperparams(mu=0.0, step_size=1.0, q=0.9)
    result = gse_jax.attack(params, apply_fn, IMAGES, labels, settings=settings,
                            hyperparams=hyperparams)
    assert np.asarray(result.success).any()
    with torch.no_grad():  # PyTorch itself is fooled
        after = module(torch.from_numpy(np.asarray(result.adversarials).transpose(0, 3, 1, 2)
                                        .copy())).argmax(-1).numpy()
    assert np.array_equal(after != labels, np.asarray(result.success))
    with pytest.raises(TypeError, match="expected a torch.nn.Module"):
        adapters.from_torch(module.forward)


def test_torch_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchax", None)
    with pytest.raises(ImportError, match="needs PyTorch and torchax: pip install --pre"):
        adapters.from_torch(None)
