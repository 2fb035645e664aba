"""Projections and masks of the compared attacks against brute force."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gse_jax import ops


@pytest.mark.parametrize("seed", range(5))
def test_sparse_box_is_the_nearest_point(seed):
    """Against all ways of choosing the pixels."""
    rng = np.random.default_rng(seed)
    v = rng.normal(size=(2, 3, 2)) * 2
    lower, upper = -rng.uniform(0, 1, v.shape), rng.uniform(0, 1, v.shape)
    best, inside = np.inf, np.clip(v, lower, upper)
    for chosen in itertools.combinations(range(6), 2):
        z = np.zeros_like(v)
        for pixel in chosen:
            z[pixel // 3, pixel % 3] = inside[pixel // 3, pixel % 3]
        best = min(best, ((z - v) ** 2).sum())
    z = ops.project_sparse_box(jnp.asarray(v), 2, lower, upper)
    assert int((z != 0).any(-1).sum()) <= 2
    assert bool((z >= lower).all()) and bool((z <= upper).all())
    np.testing.assert_allclose(((z - v) ** 2).sum(), best, rtol=1e-12)


def test_ties_do_not_break_the_budget():
    for count in (1, 7, 35):
        mask = ops.largest_pixels(jnp.ones((5, 7)), count)
        assert int(mask.sum()) == count
        assert bool(mask.reshape(-1)[:count].all())


@pytest.mark.parametrize("channels", [1, 3])
def test_sparse_sigma_is_the_nearest_point(channels):
    """Against a fine grid of factors on every pixel, and all ways of choosing the pixels."""
    rng = np.random.default_rng(channels)
    clean = rng.uniform(0, 1, (2, 2, channels))
    clean[0, 0], clean[0, 1] = 1.0, 0.0  # cannot become brighter, and darker
    sigma, kappa = rng.uniform(0, 0.8, clean.shape), 0.9
    target = rng.normal(0.5, 1.0, clean.shape)
    target[0, 1] = -3.0
    gain = np.zeros(4)
    for pixel in range(4):
        c, s = clean[pixel // 2, pixel % 2], sigma[pixel // 2, pixel % 2]
        factors = np.linspace(-kappa, kappa, 200_001)[:, None]
        z = c + factors * s * (c if channels == 3 else 1.0)
        z = z[((z >= 0) & (z <= 1)).all(-1)]
        t = target[pixel // 2, pixel % 2]
        gain[pixel] = ((c - t) ** 2).sum() - ((z - t) ** 2).sum(-1).min()
    best = ((clean - target) ** 2).sum() - np.sort(gain)[-2:].sum()
    z = ops.project_sparse_sigma(jnp.asarray(target), jnp.asarray(clean), jnp.asarray(sigma), 2,
                                 kappa)
    assert int((z != clean).any(-1).sum()) <= 2
    assert float(z.min()) >= 0.0 and float(z.max()) <= 1.0
    np.testing.assert_allclose(((z - target) ** 2).sum(), best, rtol=1e-4)


def test_sigma_map_by_hand():
    image = np.random.default_rng(0).uniform(0, 1, (4, 5, 3))
    expected = np.zeros_like(image)
    for i, j, c in np.ndindex(image.shape):
        column = [image[min(max(i + d, 0), 3), j, c] for d in (-1, 0, 1)]
        row = [image[i, min(max(j + d, 0), 4), c] for d in (-1, 0, 1)]
        expected[i, j, c] = np.sqrt(min(np.std(column), np.std(row)))
    np.testing.assert_allclose(ops.sigma_map(jnp.asarray(image)), expected, rtol=1e-12)


def test_l2_ball():
    v = jnp.asarray([3.0, 4.0])
    np.testing.assert_allclose(ops.project_l2_ball(v, 2.5), [1.5, 2.0])
    for radius in (5.0, 7.5):
        np.testing.assert_array_equal(ops.project_l2_ball(v, radius), v)
    np.testing.assert_array_equal(ops.project_l2_ball(0.0 * v, 1.0), 0.0 * v)
    np.testing.assert_array_equal(jax.jacobian(ops.project_l2_ball)(0.0 * v, 1.0), np.eye(2))


def test_cross_entropy_and_gap():
    logits = np.asarray([1.0, 3.0, -2.0])
    for label in range(3):
        expected = -np.log(np.exp(logits)[label] / np.exp(logits).sum())
        np.testing.assert_allclose(ops.cross_entropy(jnp.asarray(logits), label), expected)
        np.testing.assert_allclose(ops.logit_gap(jnp.asarray(logits), label),
                                   logits[label] - np.delete(logits, label).max())
    for label in (3, -1):
        assert np.isnan(ops.cross_entropy(jnp.asarray(logits), label))
        assert np.isnan(ops.logit_gap(jnp.asarray(logits), label))


def test_smooth_l0_gradient():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)) * 0.05)
    smooth = lambda w: jnp.mean(w * w / (w * w + 1e-3))
    np.testing.assert_allclose(ops.smooth_l0_gradient(w, 1e-3), jax.grad(smooth)(w), rtol=1e-10)


PATTERNS = [(np.ones((3, 3), bool), 1), (np.ones((1, 9), bool), 1),
            (np.asarray([[1, 0], [1, 1]], bool), 2)]


@pytest.mark.parametrize("pattern, stride", PATTERNS)
def test_blocks_are_put_down_where_they_belong(pattern, stride):
    shape = ops.grid_shape((8, 9), pattern, stride)
    rng = np.random.default_rng(0)
    grid = (rng.uniform(size=shape) < 0.3).astype(float)
    expected = np.zeros((8, 9))
    for i, j in np.argwhere(grid):
        for a, b in np.argwhere(pattern):
            expected[i * stride + a, j * stride + b] = 1.0
    expand = lambda g: ops.expand_blocks(g, (8, 9), pattern, stride)
    np.testing.assert_array_equal(expand(jnp.asarray(grid)), expected)
    # The average is the transpose of putting down, divided by the pixels of a block.
    pixels = jnp.asarray(rng.normal(size=(8, 9)))
    small = 0.01 * jnp.asarray(rng.uniform(size=shape))  # overlaps stay below 1
    np.testing.assert_allclose(jnp.sum(ops.average_blocks(pixels, pattern, stride) * small)
                               * float(pattern.sum()), jnp.sum(pixels * expand(small)), rtol=1e-10)
