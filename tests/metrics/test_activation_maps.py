"""CAM and Grad-CAM against formulas written out by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gse_jax import metrics


class SmallNet(nn.Module):
    """Convolution, relu, global average pooling, linear head; optionally a hidden layer."""

    hidden: bool = False

    @nn.compact
    def __call__(self, x):
        features = nn.relu(nn.Conv(4, (3, 3), name="stage")(x))
        self.sow("intermediates", "features", features)
        pooled = jnp.mean(features, axis=(1, 2))
        if self.hidden:
            pooled = jnp.tanh(nn.Dense(5)(pooled) * jnp.mean(jnp.square(features)))
        return nn.Dense(3, name="head")(pooled)


def make_net(hidden=False, count=4):
    model = SmallNet(hidden)
    x = jax.random.normal(jax.random.key(0), (count, 6, 8, 3), jnp.float32)
    variables = {"params": model.init(jax.random.key(1), x)["params"]}

    def apply_fn(variables, x):
        logits, state = model.apply(variables, x, mutable=["intermediates"])
        return logits, state["intermediates"]["features"][0]

    return variables, apply_fn, x, jnp.asarray([0, 2, 1, 2][:count], jnp.int32)


def test_cam_equals_the_hand_formula():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(3, 4, 5, 6)).astype(np.float32)
    head = rng.normal(size=(6, 7)).astype(np.float32)
    y = [6, 0, 3]
    want = np.zeros((3, 4, 5))
    for n in range(3):
        for i in range(4):
            for j in range(5):
                want[n, i, j] = sum(features[n, i, j, k] * head[k, y[n]] for k in range(6))
    np.testing.assert_allclose(metrics.cam(features, head, y), want, rtol=1e-4, atol=1e-5)
    every = metrics.cam(features, head)
    assert every.shape == (3, 4, 5, 7)
    np.testing.assert_allclose([every[n, :, :, y[n]] for n in range(3)], want, rtol=1e-4, atol=1e-5)


def test_mean_of_the_cam_is_the_logit_of_a_small_network():
    variables, apply_fn, x, y = make_net()
    logits, features = apply_fn(variables, x)
    head = variables["params"]["head"]
    maps = metrics.cam(features, head["kernel"])
    means = jnp.mean(maps, axis=(1, 2)) + head["bias"][None]
    np.testing.assert_allclose(means, logits, rtol=1e-4, atol=1e-5)


def test_cam_refuses_what_does_not_fit():
    features, head = np.zeros((2, 3, 3, 4), np.float32), np.zeros((4, 5), np.float32)
    with pytest.raises(ValueError, match="features must be"):
        metrics.cam(features, head.T, [0, 0])
    with pytest.raises(ValueError, match=r"y must lie in \[0, 5\)"):
        metrics.cam(features, head, [0, 5])
    assert metrics.cam(features[:0], head, np.zeros(0, np.int32)).shape == (0, 3, 3)


def test_grad_cam_of_a_pooling_network_is_the_positive_part_of_cam():
    variables, apply_fn, x, y = make_net()
    got = metrics.grad_cam(variables, apply_fn, x, y)
    head = variables["params"]["head"]["kernel"]
    want = jax.nn.relu(metrics.cam(apply_fn(variables, x)[1], head, y)) / (6 * 8)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-7)
    assert (np.asarray(want) > 0).any()


def test_grad_cam_equals_the_hand_formula_with_a_nonlinear_head():
    variables, apply_fn, x, y = make_net(hidden=True)
    params = variables["params"]
    features = jax.jit(apply_fn)(variables, x)[1]

    def head(one, label):  # The part of SmallNet behind the features, written out.
        hidden = jnp.mean(one, axis=(0, 1)) @ params["Dense_0"]["kernel"]
        hidden = jnp.tanh((hidden + params["Dense_0"]["bias"]) * jnp.mean(jnp.square(one)))
        return (hidden @ params["head"]["kernel"] + params["head"]["bias"])[label]

    # The mean of squares runs over the batch: every image's features enter every logit.
    got = metrics.grad_cam(variables, apply_fn, x[:1], y[:1])
    weights = np.mean(jax.jit(jax.grad(head))(features[0], y[0]), axis=(0, 1))
    want = np.maximum(np.einsum("hwk,k->hw", features[0], weights), 0.0)
    np.testing.assert_allclose(got[0], want, rtol=1e-4, atol=1e-7)
    assert (want > 0).any()


def test_grad_cam_with_captured_intermediates_and_jit():
    variables, apply_fn, x, y = make_net()
    model = SmallNet()

    @jax.jit
    def captured(variables, x):  # Before the relu, inside a jit: the call has to be opened.
        logits, state = model.apply(variables, x, capture_intermediates=True,
                                    mutable=["intermediates"])
        return logits, state["intermediates"]["stage"]["__call__"][0]

    got = jax.jit(metrics.grad_cam, static_argnums=1)(variables, captured, x, y)
    before = captured(variables, x)[1]
    head = variables["params"]["head"]["kernel"][:, y].T
    weights = jnp.mean((before > 0).astype(x.dtype), axis=(1, 2)) * head / (6 * 8)
    want = jax.nn.relu(jnp.einsum("nhwk,nk->nhw", before, weights))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-7)


def test_grad_cam_of_tokens_and_of_no_images():
    kernel, head = jnp.eye(3, 4), jnp.ones((4, 2))

    def tokens(params, x):
        features = x.reshape(x.shape[0], 15, 3) @ params
        return jnp.mean(features, axis=1) @ head, features

    x = jax.random.uniform(jax.random.key(0), (2, 3, 5, 3))
    got = metrics.grad_cam(kernel, tokens, x, jnp.asarray([0, 1]))
    np.testing.assert_allclose(got, jnp.sum(x, axis=-1).reshape(2, 15) / 15, rtol=1e-5)
    assert metrics.grad_cam(kernel, tokens, x[:0], jnp.zeros(0, jnp.int32)).shape == (0, 15)


def test_normalise_map_is_per_image_and_never_nan():
    maps = jnp.stack([jnp.arange(6.0).reshape(2, 3), jnp.full((2, 3), 7.0), -jnp.ones((2, 3))])
    got = metrics.normalise_map(maps)
    np.testing.assert_allclose(got[0], np.arange(6).reshape(2, 3) / 5, rtol=1e-6)
    np.testing.assert_array_equal(got[1:], np.zeros((2, 2, 3)))
    np.testing.assert_allclose(metrics.normalise_map(1e-6 * maps)[0], got[0], rtol=1e-5)  # of small gradients
    assert metrics.normalise_map(maps[:0]).shape == (0, 2, 3)
    with pytest.raises(ValueError, match="maps must be"):
        metrics.normalise_map(maps[0])


def test_resize_map_keeps_range_and_place():
    maps = np.zeros((2, 4, 4), np.float32)
    maps[0, 3, 0], maps[1] = 1, 0.25
    got = np.asarray(metrics.resize_map(maps, 16, 20))
    assert got.shape == (2, 16, 20)
    assert np.unravel_index(got[0].argmax(), (16, 20)) == (14, 0) or got[0, 15, 0] == got[0].max()
    assert got.min() >= 0 and got.max() <= 1
    np.testing.assert_allclose(got[1], np.full((16, 20), 0.25), rtol=1e-6)
    ramp = np.asarray(metrics.resize_map(np.asarray([[[0.0, 1.0], [2.0, 3.0]]]), 4, 4))[0]
    between = np.asarray([0.0, 0.25, 0.75, 1.0])  # bilinear: centres of pixels, constant beyond the outermost
    np.testing.assert_allclose(ramp, 2 * between[:, None] + between, rtol=1e-6)
