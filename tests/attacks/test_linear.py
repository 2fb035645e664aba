"""A linear classifier, where the smallest perturbation on a given support has a closed form."""

import jax.numpy as jnp
import numpy as np
import pytest

import gse_jax
from gse_jax import Status, ops
from gse_jax.attacks.baselines.projected_gradient_descent_l0 import PGD0Settings
from tests.toy_model import linear_logits

CLASSES = 5


def problem(num_images, shape, seed, group=None):
    """Random linear classifier and images with a clear margin.

    With `group`, the weights inside it are 30 times larger than outside.
    """
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(*shape, CLASSES)) * (0.15 if group is None else 0.02)
    if group is not None:
        kernel[group] *= 30.0
    params = (jnp.asarray(kernel.reshape(-1, CLASSES)), jnp.zeros(CLASSES))
    x = jnp.asarray(rng.uniform(-0.5, 0.5, (10 * num_images, *shape)))
    # GSE steps until the first success: right next to the boundary the first step overshoots.
    logits = linear_logits(params, x)
    top = jnp.sort(logits, axis=-1)
    x = x[jnp.argsort(top[:, -2] - top[:, -1])[:num_images]]
    return params, x, linear_logits(params, x).argmax(-1).astype(jnp.int32)


def smallest_l2(params, x, y, targets, support):
    """Distance to the nearest wanted half-space, moving only the pixels of `support` [H, W]."""
    kernel = np.asarray(params[0]).reshape(*x.shape, CLASSES)
    logits = np.asarray(linear_logits(params, x[None])[0])
    sides = []
    for k in range(CLASSES):
        if k == int(y) or (targets is not None and k != int(targets)):
            continue
        # Beating one class is necessary; in the untargeted case it is also sufficient.
        rival = int(y) if targets is None else int(np.delete(np.arange(CLASSES), k)[
            np.argmax(np.delete(logits, k))])
        normal = (kernel[..., k] - kernel[..., rival]) * support[..., None]
        sides.append((logits[rival] - logits[k]) / np.linalg.norm(normal))
    return min(sides)


@pytest.mark.parametrize("num_images, shape, targeted", [
    (3, (9, 14, 1), True),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (1, (12, 12, 3), False), (1, (12, 12, 3), True), (3, (9, 14, 1), False), (8, (16, 11, 3), False),
        (8, (16, 11, 3), True)))])
def test_success_near_the_optimum_of_the_chosen_support(num_images, shape, targeted):
    params, x, y = problem(num_images, shape, seed=num_images)
    targets = (y + 1) % CLASSES if targeted else None
    result = gse_jax.attack(params, linear_logits, x, y, targets=targets, bounds=(-1.0, 1.0))
    np.testing.assert_array_equal(result.status, Status.FOUND)
    predicted = np.asarray(linear_logits(params, result.adversarials).argmax(-1))
    np.testing.assert_array_equal(predicted == np.asarray(targets) if targeted
                                  else predicted != np.asarray(y), True)
    for i in range(num_images):
        w = np.asarray(result.adversarials[i] - x[i])
        optimum = smallest_l2(params, x[i], y[i], None if targets is None else targets[i],
                              (w != 0).any(-1))
        assert 0.999 * optimum <= np.linalg.norm(w) <= 1.5 * optimum


def test_the_planted_weak_group_is_the_one_that_is_found():
    for seed, (top, left) in enumerate([(2, 3), (10, 0), (6, 12)]):
        group = (slice(top, top + 4), slice(left, left + 4))
        params, x, y = problem(4, (16, 16, 3), seed=seed, group=group)
        result = gse_jax.attack(params, linear_logits, x, y, bounds=(-1.0, 1.0))
        np.testing.assert_array_equal(result.status, Status.FOUND)
        w = np.asarray(result.adversarials - x)
        energy = (w**2).sum((1, 2, 3))
        assert ((w[:, *group] ** 2).sum((1, 2, 3)) > 0.999 * energy).all()
        # The trade-off falls in the 5x5 neighbourhood of a perturbed pixel, so GSE may add a rim
        # of two pixels around the group, but nothing beyond.
        around = np.zeros((16, 16), bool)
        around[group] = True
        around = np.asarray(ops.dilate(jnp.asarray(around), 5))
        assert not (w != 0).any(-1)[:, ~around].any()


@pytest.mark.slow
@pytest.mark.parametrize("bounds", [
    pytest.param((0.0, 1.0), marks=pytest.mark.slow), (0.0, 255.0), (-3.0, -1.0)])
def test_another_range_gives_the_same_relative_perturbation(bounds):
    params, x, y = problem(3, (10, 10, 3), seed=7)
    low, high = bounds
    there = (x + 1.0) * 0.5 * (high - low) + low

    def rescaled(params, images):
        return linear_logits(params, (images - low) / (high - low) * 2.0 - 1.0)

    a = gse_jax.attack(params, linear_logits, x, y, bounds=(-1.0, 1.0))
    b = gse_jax.attack(params, rescaled, there, y, bounds=bounds)
    np.testing.assert_array_equal(a.gradient_evals, b.gradient_evals)
    np.testing.assert_allclose((b.adversarials - there) * 2.0 / (high - low), a.adversarials - x,
                               atol=1e-9)
    assert float(b.adversarials.min()) >= low and float(b.adversarials.max()) <= high


@pytest.mark.slow
def test_images_on_the_border_stay_inside_exactly():
    params, x, y = problem(4, (12, 12, 3), seed=3)
    x = jnp.sign(x).astype(jnp.float32)  # every pixel at a bound
    y = linear_logits(params, x.astype(jnp.float64)).argmax(-1)
    result = gse_jax.attack(tuple(p.astype(jnp.float32) for p in params), linear_logits, x, y,
                            bounds=(-1.0, 1.0))
    np.testing.assert_array_equal(result.status, Status.FOUND)
    assert float(jnp.abs(result.adversarials).max()) <= 1.0


@pytest.mark.slow
def test_a_constant_model_is_not_found_and_finite():
    params, x, y = problem(2, (12, 12, 3), seed=5)

    def constant(params, images):
        return jnp.zeros((images.shape[0], CLASSES), images.dtype).at[:, 0].set(1.0)

    result = gse_jax.attack(params, constant, x, jnp.zeros(2, jnp.int32), bounds=(-1.0, 1.0))
    np.testing.assert_array_equal(result.status, Status.NOT_FOUND)
    np.testing.assert_array_equal(result.adversarials, x)


@pytest.mark.parametrize("gap", [pytest.param(20.0, marks=pytest.mark.slow), 26.0])
def test_pgd0_goes_as_far_in_any_range_where_the_model_is_sure(gap):
    """Its normalisation has a floor, which the tiny gradients of a sure model come near to."""
    rng = np.random.default_rng(0)
    x = rng.uniform(0.2, 0.8, (4, 8, 8, 1))
    w = rng.normal(size=(64, 2)) * 3
    b = np.asarray([gap, 0.0]) - np.mean(x.reshape(4, -1) @ w, axis=0)

    def attacked(high):
        return gse_jax.attack((w, b), lambda params, x: (x / high).reshape(len(x), -1) @ params[0] + params[1][None],
                              x * high, np.zeros(4, np.int32), bounds=(0.0, high), method="pgd0",
                              settings=PGD0Settings(num_pixels=12, max_steps=5, num_restarts=1), key=0)

    one, other = attacked(1.0), attacked(256.0)
    assert (np.asarray(one.status) != gse_jax.Status.ALREADY_MISCLASSIFIED).all()
    np.testing.assert_allclose(other.adversarials, np.asarray(one.adversarials) * 256, rtol=1e-12)
    np.testing.assert_array_equal(one.gradient_evals, other.gradient_evals)
