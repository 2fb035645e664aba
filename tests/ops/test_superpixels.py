"""Superpixel norms and the binary sphere against loops and brute force."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gse_jax import ops



def random_segments(rng, height, width, count):
    return jnp.asarray(rng.integers(0, count, (height, width)), jnp.int32)


@pytest.mark.parametrize("count", [1, 4, 30])
def test_sums_are_those_of_a_loop(count):
    rng = np.random.default_rng(count)
    values, segments = rng.normal(size=(5, 6)), random_segments(rng, 5, 6, count)
    expected = [values[np.asarray(segments) == s].sum() for s in range(30)]
    np.testing.assert_allclose(ops.superpixel_sums(jnp.asarray(values), segments), expected,
                               atol=1e-12)


def test_soft_threshold_is_the_argmin():
    """v - z = tradeoff z / |z| where active, |v_s| <= tradeoff elsewhere."""
    rng = np.random.default_rng(0)
    v, segments = rng.normal(size=(6, 7)), random_segments(rng, 6, 7, 9)
    z = np.asarray(ops.superpixel_soft_threshold(jnp.asarray(v), jnp.asarray(2.0), segments))
    active = 0
    for s in range(9):
        here = np.asarray(segments) == s
        norm = np.linalg.norm(z[here])
        if norm:
            active += 1
            np.testing.assert_allclose(v[here] - z[here], 2.0 * z[here] / norm, atol=1e-12)
        else:
            assert np.linalg.norm(v[here]) <= 2.0
    assert 0 < active < 9
    at_zero = jax.grad(lambda v: jnp.sum(ops.superpixel_soft_threshold(v, 2.0, segments)))(0.0 * v)
    np.testing.assert_array_equal(at_zero, 0.0 * v)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("count", [0, 1, 3, 6, 9])
def test_largest_scores_keep_their_number_at_ties(count, dtype):
    three = np.nextafter(np.asarray(3.0, dtype), np.asarray(4.0, dtype))  # the last of its bits is set
    score = jnp.asarray([1e-30, three, three, 0.0, three, -0.0], dtype)
    mask = np.asarray(ops.largest_scores(score, jnp.asarray(count, jnp.int32)))
    np.testing.assert_array_equal(np.flatnonzero(mask), sorted([1, 2, 4, 0, 3, 5][:count]))


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("most", [0, 2, 6])
@pytest.mark.parametrize("tradeoff", [0.0, 0.1, 0.5])
def test_count_prox_is_the_best_of_all_supports(grouped, most, tradeoff):
    """Every support is tried; on a support the best point is the clipped one."""
    rng = np.random.default_rng(most)
    v = rng.normal(size=(2, 3, 1))
    segments = jnp.asarray([[0, 1, 1], [2, 0, 3]], jnp.int32) if grouped else None
    groups = np.asarray(segments).reshape(-1) if grouped else np.arange(6)
    lower, upper = -0.3 - rng.uniform(size=v.shape), 0.3 + rng.uniform(size=v.shape)
    inside = np.clip(v, lower, upper)

    def cost(support):
        z = np.where(np.isin(groups, support).reshape(v.shape), inside, 0.0)
        return 0.5 * ((z - v) ** 2).sum() + tradeoff * len(support)

    names = range(groups.max() + 1)
    best = min(cost(support) for size in range(min(most, len(names)) + 1)
               for support in itertools.combinations(names, size))
    z = ops.count_prox(jnp.asarray(v), jnp.asarray(tradeoff), jnp.asarray(lower),
                       jnp.asarray(upper), jnp.asarray(most, jnp.int32), segments)
    count = int(ops.count_groups(z, segments))
    assert count <= most and ((z >= lower) & (z <= upper)).all()
    np.testing.assert_allclose(0.5 * float(((z - v) ** 2).sum()) + tradeoff * count, best,
                               atol=1e-12)


def test_one_channel_makes_a_group_count():
    x = jnp.zeros((2, 3, 3)).at[0, 1, 2].set(0.5)
    segments = jnp.asarray([[0, 1, 1], [2, 0, 3]], jnp.int32)
    assert ops.count_groups(x, segments) == ops.count_groups(x, None) == 1


def test_count_prox_of_a_long_step_does_not_cancel():
    v = jnp.asarray([3e6, -2e6, 1e6], jnp.float32).reshape(1, 3, 1)
    z = ops.count_prox(v, jnp.float32(1e5), 0.0 * v - 0.05, 0.0 * v + 0.05,
                       jnp.asarray(3, jnp.int32), None)  # savings 3e5, 2e5, 1e5; needed 2e5
    np.testing.assert_allclose(z.reshape(-1), [0.05, 0.0, 0.0], atol=1e-7)


def test_bregman_projection_is_that_of_static_groups():
    rng = np.random.default_rng(0)
    z = jnp.asarray(rng.normal(size=(8, 9, 3)) * 0.8)
    lower, upper = -rng.uniform(0.0, 1.5, z.shape), rng.uniform(0.0, 1.5, z.shape)
    cells = ops.grid_cells(8, 9, 3)

    @jax.jit
    def both(budget):
        return (ops.project_superpixel_maxima(z, jnp.asarray(cells), budget, lower, upper),
                ops.project_group_maxima(z, cells, budget, lower, upper))

    for budget in (0.05, 1.0, 3.0, 100.0):
        np.testing.assert_allclose(*both(jnp.asarray(budget)), atol=1e-12)


def test_the_binary_sphere():
    rng = np.random.default_rng(0)
    v = jnp.asarray(rng.normal(size=(4, 5)))
    z = ops.project_binary_sphere(v)
    np.testing.assert_allclose(((z - 0.5) ** 2).sum(), 20 / 4)
    directions = rng.normal(size=(2000, 20))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    others = 0.5 + 0.5 * np.sqrt(20) * directions
    nearest = np.linalg.norm(others - np.asarray(v).reshape(-1), axis=1).min()
    assert np.linalg.norm(z - v) < nearest
    binary = jnp.asarray(rng.integers(0, 2, (4, 5)), jnp.float64)
    np.testing.assert_allclose(ops.project_binary_sphere(binary), binary, atol=1e-12)
    np.testing.assert_allclose(ops.project_binary_sphere(jnp.full(3, 0.5)), np.ones(3))  # all are equally near
