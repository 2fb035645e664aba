"""The Bregman projection of mirror descent: optimality conditions, and no better point nearby."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gse_jax import ops
from gse_jax.ops import bregman


def problem(seed, shape=(8, 9, 3), per_axis=3):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=shape) * 0.8
    lower, upper = -rng.uniform(0.0, 1.5, shape), rng.uniform(0.0, 1.5, shape)
    return z, ops.grid_cells(*shape[:2], per_axis), lower, upper


def group_maxima(x, cells):
    return np.asarray([np.abs(x)[cells == g].max() for g in range(cells.max() + 1)])


@pytest.mark.parametrize("shape", [(8, 9, 3), (14, 15, 3)])  # of at most 36 and of 60 to 90 members
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [0.05, 1.0, 3.0, 9.0])
def test_optimality_conditions(shape, seed, budget):
    """Primal and dual feasibility, complementary slackness and stationarity of every group."""
    z, cells, lower, upper = problem(seed, shape)
    x = np.asarray(ops.project_group_maxima(jnp.asarray(z), cells, budget, lower, upper))
    assert (x >= lower).all() and (x <= upper).all()
    radii = group_maxima(x, cells)
    np.testing.assert_allclose(radii.sum(), budget, rtol=1e-9)  # the budget binds
    side = np.where(z >= 0, upper, -lower)
    free = np.minimum(np.expm1(np.abs(z)), side)  # without the budget
    np.testing.assert_allclose(np.abs(x), np.minimum(free, radii[cells][..., None]), atol=1e-12)
    # Stationarity: what the cut takes from the dual, summed over the group, is the multiplier;
    # members at their bound may take less, and a group at zero gives at most the multiplier.
    multipliers, at_zero = [], []
    for g, radius in enumerate(radii):
        inside = cells == g
        pull = np.abs(z)[inside] - np.log1p(radius)
        cut = free[inside] > radius + 1e-9
        bound = np.abs(free[inside] - radius) <= 1e-9
        if radius < 1e-12:
            at_zero.append(pull[free[inside] > 0].sum())
        elif not bound.any():
            multipliers.append(pull[cut].sum())
    assert len(multipliers) >= 1 or budget < 0.1
    if multipliers:
        np.testing.assert_allclose(multipliers, multipliers[0], rtol=1e-6)
        assert all(total <= multipliers[0] * (1 + 1e-6) for total in at_zero)


@pytest.mark.parametrize("seed", range(3))
def test_no_feasible_point_is_nearer(seed):
    z, cells, lower, upper = problem(seed)
    budget = 1.5
    start = np.sign(z) * np.expm1(np.abs(z))
    phi = lambda x: (np.abs(x) + 1) * np.log1p(np.abs(x)) - np.abs(x)
    distance = lambda x: (phi(x) - phi(start) - z * (x - start)).sum()
    x = np.asarray(ops.project_group_maxima(jnp.asarray(z), cells, budget, lower, upper))
    rng = np.random.default_rng(seed)
    tried = 0
    for _ in range(200):
        other = np.clip(x + rng.normal(size=x.shape) * 10.0 ** rng.uniform(-4, -1), lower, upper)
        total = group_maxima(other, cells).sum()
        other *= min(1.0, budget / total)
        assert distance(other) >= distance(x) - 1e-12
        tried += 1
    assert tried == 200


def test_inside_the_ball_only_the_box_counts():
    z, cells, lower, upper = problem(0)
    x = ops.project_group_maxima(jnp.asarray(z), cells, 1e6, lower, upper)
    expected = np.clip(np.sign(z) * np.expm1(np.abs(z)), lower, upper)
    np.testing.assert_allclose(x, expected, atol=1e-12)
    np.testing.assert_allclose(ops.to_dual(jnp.sign(z) * jnp.expm1(jnp.abs(z))), z, atol=1e-12)


def test_zero_and_uneven_cells():
    cells = ops.grid_cells(7, 8, 3)
    assert sorted(set(cells.reshape(-1))) == list(range(9))
    assert (cells[:2, :2] == 0).all() and (cells[4:, 4:] == 8).all()
    zero = jnp.zeros((7, 8, 1))
    x = jax.jit(lambda z: ops.project_group_maxima(z, cells, 1.0, zero - 1.0, zero + 1.0))(zero)
    np.testing.assert_array_equal(x, zero)


@pytest.mark.parametrize("shape", [(8, 9, 3), (7, 7, 1), (3, 3, 1)])
def test_small_groups_are_projected_as_large_ones_are(shape, monkeypatch):
    """Also where members tie, at their bounds or below."""
    z, cells, lower, upper = problem(5, shape)
    z, lower, upper = np.round(z, 1), np.round(lower, 1), np.round(upper, 1)
    small = ops.project_group_maxima(jnp.asarray(z), cells, 1.0, lower, upper)
    monkeypatch.setattr(bregman, "_MOST_PAIRED", 0)
    large = ops.project_group_maxima(jnp.asarray(z), cells, 1.0, lower, upper)
    np.testing.assert_allclose(small, large, rtol=0, atol=1e-13)
    assert 0 < np.count_nonzero(large) and not np.isclose(np.abs(large), np.expm1(np.abs(z))).all()
