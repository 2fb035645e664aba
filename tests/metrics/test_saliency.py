"""Adversarial saliency and interpretability score against Jacobians and loops."""

from fractions import Fraction
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gse_jax import metrics
from gse_jax.metrics.saliency import _nearest_rank

PERCENTILES = (50, 60, 70, 80, 90)


def make_model(classes=4, shape=(5, 7, 3), seed=0):
    """A small convolutional network with smooth and non-smooth parts."""
    rng = np.random.default_rng(seed)
    params = {
        "kernel": jnp.asarray(rng.normal(size=(3, 3, shape[-1], 6)), jnp.float32),
        "head": jnp.asarray(rng.normal(size=(6, classes)), jnp.float32),
    }

    def apply_fn(params, x):
        kernel = params["kernel"].astype(x.dtype)
        y = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        y = jnp.tanh(y) * jax.nn.relu(y)
        return jnp.mean(y, axis=(1, 2)) @ params["head"].astype(x.dtype)

    return params, apply_fn


def make_batch(count, shape=(5, 7, 3), classes=4):
    rng = np.random.default_rng(count)
    x = rng.uniform(-1, 1, (count, *shape)).astype(np.float32)
    y = rng.integers(0, classes, count).astype(np.int32)
    return x, y, ((y + 1 + rng.integers(0, classes - 1, count)) % classes).astype(np.int32)


def test_saliency_equals_the_jacobian_formula_per_image():
    params, apply_fn = make_model()
    x, y, targets = make_batch(32)
    got = metrics.adversarial_saliency(params, apply_fn, x, y, targets)
    jacobian_of = jax.jit(jax.jacrev(lambda image: apply_fn(params, image[None])[0]))
    for i in range(32):  # One image at a time, all classes: nothing of the batch can leak in.
        jacobian = np.asarray(jacobian_of(x[i]))
        want = jacobian[targets[i]] * np.abs(jacobian[y[i]])
        np.testing.assert_allclose(got[i], want, rtol=2e-5, atol=1e-8)
    assert (np.asarray(got) < 0).any()


def test_saliency_does_not_depend_on_the_batch():
    params, apply_fn = make_model()
    x, y, targets = make_batch(32)
    whole = metrics.adversarial_saliency(params, apply_fn, x, y, targets)
    for i in (0, 17, 31):
        one = slice(i, i + 1)
        alone = metrics.adversarial_saliency(params, apply_fn, x[one], y[one], targets[one])
        np.testing.assert_allclose(whole[i], alone[0], rtol=1e-5, atol=1e-9)


def test_saliency_in_float64_under_jit_and_for_no_images():
    params, apply_fn = make_model()
    x, y, targets = make_batch(3)
    single = metrics.adversarial_saliency(params, apply_fn, x, y, targets)
    with jax.enable_x64(True):
        double = jax.jit(metrics.adversarial_saliency, static_argnums=1)(
            params, apply_fn, x.astype(np.float64), y, targets
        )
        assert double.dtype == jnp.float64
    np.testing.assert_allclose(single, double, rtol=2e-4, atol=1e-7)
    none = metrics.adversarial_saliency(params, apply_fn, x[:0], y[:0], targets[:0])
    assert none.shape == (0, 5, 7, 3)


def test_saliency_refuses_labels_that_would_be_misread():
    params, apply_fn = make_model()
    x, y, targets = make_batch(3)
    for bad in (targets + 4, targets - 4, np.asarray([0, 4, 3]), np.asarray([0, -1, 3])):
        with pytest.raises(ValueError, match=r"targets must lie in \[0, 4\)"):
            metrics.adversarial_saliency(params, apply_fn, x, y, bad)
    with pytest.raises(TypeError, match="y must be integer"):
        metrics.adversarial_saliency(params, apply_fn, x, y.astype(np.float32), targets)
    with pytest.raises(TypeError, match="x must be floating, got uint8"):
        metrics.adversarial_saliency(params, apply_fn, x.astype(np.uint8), y, targets)
    with pytest.raises(TypeError, match="apply_fn must return logits .* got a tuple"):
        metrics.adversarial_saliency(params, lambda *a: (apply_fn(*a), 0), x, y, targets)
    with pytest.raises(ValueError, match="targets must have shape"):
        metrics.adversarial_saliency(params, apply_fn, x, y, targets[:1])


def loop_score(w, saliency, percentile):
    """Nearest rank over one image's non-zero values, then two sums over entries."""
    values = sorted(v for v in saliency.reshape(-1).tolist() if v != 0)
    total = sum(v * v for v in w.reshape(-1).tolist())
    if not values or total == 0:
        return 0.0
    threshold = values[math.ceil(percentile * len(values) / 100) - 1]
    pairs = zip(w.reshape(-1).tolist(), saliency.reshape(-1).tolist(), strict=True)
    return math.sqrt(sum(v * v for v, s in pairs if s > threshold) / total)


@pytest.mark.parametrize("shape", [(5, 7, 3), (6, 6, 1), (10, 10, 1), (1, 3, 1)], ids=str)
def test_score_equals_a_loop(shape):
    rng = np.random.default_rng(2)
    x = rng.uniform(0, 1, (25, *shape)).astype(np.float32)
    w = rng.normal(size=x.shape) * (rng.random(x.shape) < 0.3)
    adversarials = (x + w).astype(np.float32)
    saliency = rng.normal(size=x.shape).astype(np.float32)
    saliency = np.where(rng.random(x.shape) < 0.2, 0, saliency).round(1)  # Zeros and ties.
    got = metrics.interpretability_score(x, adversarials, saliency)
    assert got.shape == (25, 5)
    want = [
        [loop_score(b - a, s, percentile) for percentile in PERCENTILES]
        for a, b, s in zip(x, adversarials, saliency, strict=True)
    ]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert len(np.unique(np.round(want, 3))) > 2


@pytest.mark.parametrize("percentile", [50, 66.667, 33.333, 99.9])
def test_ranks_of_many_entries_do_not_overflow(percentile):
    number = np.asarray([0, 1, 999, 65_000, 150_528, 2**31 - 1])
    exact = [math.ceil(Fraction(str(percentile)) / 100 * int(n)) for n in number]
    np.testing.assert_array_equal(_nearest_rank(percentile, jnp.asarray(number, jnp.int32)), exact)


def test_percentile_is_the_exact_nearest_rank():
    # 0.07 * 100 is 7.000000000000001 in floating point: a float ceil would take rank 8.
    x = np.zeros((1, 10, 10, 1), np.float32)
    saliency = np.arange(1, 101, dtype=np.float32).reshape(x.shape)
    for percentile in (7, 29, 50, 57, 99.5, 100):
        adversarials = x + 1
        got = metrics.interpretability_score(x, adversarials, saliency, percentiles=(percentile,))
        above = 100 - math.ceil(round(percentile, 6))
        np.testing.assert_allclose(got[0, 0], math.sqrt(above / 100), rtol=1e-6)


def test_score_is_one_inside_and_zero_outside_the_salient_set():
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 1, (4, 8, 8, 3)).astype(np.float32)
    saliency = rng.normal(size=x.shape).astype(np.float32)
    threshold = np.sort(saliency.reshape(4, -1), axis=1)[:, -40].reshape(4, 1, 1, 1)
    salient = saliency > threshold  # 39 of 192 entries: inside the top 30 %, at P = 70.
    inside = metrics.interpretability_score(
        x, np.where(salient, x + 0.3, x), saliency, percentiles=(50, 60, 70)
    )
    np.testing.assert_array_equal(inside, np.ones((4, 3)))
    # The top 20 % and the top 10 % are subsets of these 39 entries (20.3 %).
    outside = metrics.interpretability_score(
        x, np.where(salient, x, x + 0.3), saliency, percentiles=(80, 90)
    )
    np.testing.assert_array_equal(outside, np.zeros((4, 2)))


def test_score_is_never_nan():
    x = np.full((3, 6, 6, 3), 0.5, np.float32)
    adversarials = x.copy()
    adversarials[1, 0, 0, 0] = 1
    adversarials[2, 0, 0, 0] += 1e-6
    saliency = np.zeros(x.shape, np.float32)
    for maps in (saliency, saliency + 1, np.full_like(saliency, np.nan)):
        got = metrics.interpretability_score(x, adversarials, maps)
        np.testing.assert_array_equal(got, np.zeros((3, 5)))
    saliency[:, 0, 0, 0], saliency[:, 1, 1, 1] = 2, 1
    got = metrics.interpretability_score(x, adversarials, saliency)
    # Two values: the 50th percentile is the smaller one, every higher one the larger.
    np.testing.assert_array_equal(got[:, 0], [0, 1, 1])
    np.testing.assert_array_equal(got[:, 1:], np.zeros((3, 4)))
    assert metrics.interpretability_score(x[:0], x[:0], saliency[:0]).shape == (0, 5)


def test_values_that_are_not_finite_take_no_rank():
    x, saliency = np.zeros((1, 2, 4, 1), np.float32), np.asarray([1, 2, 3, 4] + [np.nan, np.inf, -np.inf, np.nan], "f4")
    adversarials = np.asarray([1, 1, 1, 1, 0, 0, 0, 0], "f4").reshape(x.shape)
    got = metrics.interpretability_score(x, adversarials, saliency.reshape(x.shape), percentiles=(25, 50, 75, 100))
    np.testing.assert_allclose(got, np.sqrt([[0.75, 0.5, 0.25, 0.0]]), rtol=1e-6)


def test_score_does_not_underflow():
    x = np.zeros((1, 4, 4, 1), np.float32)
    adversarials, saliency = x.copy(), np.arange(16, dtype=np.float32).reshape(x.shape)
    adversarials[0, 3, 3, 0], adversarials[0, 0, 1, 0] = 3e-25, 4e-25  # Squares are 0 in float32.
    got = metrics.interpretability_score(x, adversarials, saliency, percentiles=(50,))
    np.testing.assert_allclose(got, [[0.6]], rtol=1e-5)


def test_score_refuses_wrong_arguments():
    x = np.zeros((1, 4, 4, 1), np.float32)
    for percentile in (0, -1, 100.5):
        with pytest.raises(ValueError, match="percentiles"):
            metrics.interpretability_score(x, x, x, percentiles=(50, percentile))
    with pytest.raises(ValueError, match="percentiles must be a list"):
        metrics.interpretability_score(x, x, x, percentiles=90)
    with pytest.raises(ValueError, match="does not fit"):
        metrics.interpretability_score(x, x, x[0])
