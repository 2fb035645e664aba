"""Linear minimisation and group shrinkage against dense or brute-force solutions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gse_jax import ops


def test_capped_simplex_vertex_against_all_vertices():
    rng = np.random.default_rng(0)
    capped_simplex_vertex = jax.jit(ops.capped_simplex_vertex, static_argnums=1)
    for _ in range(10):
        gradient = rng.normal(size=(2, 3))
        best = min(sum(gradient.reshape(-1)[list(chosen)]) for k in range(3)
                   for chosen in itertools.combinations(range(6), k))
        vertex = np.asarray(capped_simplex_vertex(gradient, 2))
        np.testing.assert_allclose(np.sum(vertex * gradient), best, rtol=1e-12)
        assert set(np.unique(vertex)) <= {0.0, 1.0} and float(vertex.sum()) <= 2
    assert not ops.capped_simplex_vertex(jnp.ones((3, 3)), 2).any()


@pytest.mark.parametrize("shape, dtype, scale", [
    ((40, 4, 4), jnp.float32, 1.0), ((40, 4, 4), jnp.float32, 1e-25),  # as where the model is sure
    ((7, 3, 32, 32), jnp.float32, 1e-12), ((5, 6, 3), jnp.float64, 1e-12)])
def test_leading_pair_against_a_dense_svd(shape, dtype, scale):
    matrices = np.random.default_rng(1).normal(size=shape) * scale
    leading_pair = jax.jit(ops.leading_pair)
    sigma, u, v = leading_pair(jnp.asarray(matrices, dtype))
    expected = np.linalg.svd(matrices, compute_uv=False)
    np.testing.assert_allclose(sigma, expected[..., 0], rtol=1e-4)
    clear = expected[..., 1] < 0.95 * expected[..., 0]
    assert clear.any()
    left, _, right = np.linalg.svd(matrices)
    outer = np.einsum("...m,...n->...mn", left[..., 0], right[..., 0, :])
    got = np.einsum("...m,...n->...mn", u, v)
    np.testing.assert_allclose(got[clear], outer[clear], atol=1e-4)
    assert not any(np.isnan(a).any() for a in leading_pair(jnp.zeros(shape, dtype)))


def test_leading_pair_that_lies_on_one_axis():
    for n in (2, 9):  # the other columns of the limit vanish
        sigma, u, v = ops.leading_pair(jnp.diag(jnp.asarray([1.0, 3.0] + [0.5] * (n - 2))))
        np.testing.assert_allclose(sigma, 3.0)
        np.testing.assert_allclose(np.outer(u, v), np.diag(np.eye(n)[1]), atol=1e-12)


@pytest.mark.parametrize("shape, size", [((9, 13, 3), 4), ((8, 8, 1), 8), ((12, 8, 3), 2)])
def test_nuclear_group_vertex_against_dense_svds(shape, size):
    """Feasible, and as far down as any vertex of any patch; dual of the norm of the gradient."""
    gradient = np.random.default_rng(2).normal(size=shape)
    gains = {}
    for top, left in itertools.product(range(0, shape[0] - size + 1, size),
                                       range(0, shape[1] - size + 1, size)):
        patch = gradient[top:top + size, left:left + size]
        gains[top, left] = sum(np.linalg.norm(patch[..., c], 2) for c in range(shape[2]))
    vertex = np.array(jax.jit(ops.nuclear_group_vertex, static_argnums=1)(gradient, size, 5.0))
    np.testing.assert_allclose((vertex * gradient).sum(), -5.0 * max(gains.values()), rtol=1e-4)
    top, left = max(gains, key=gains.get)
    patch = vertex[top:top + size, left:left + size].copy()
    vertex[top:top + size, left:left + size] = 0.0
    assert not vertex.any()
    for c in range(shape[2]):
        np.testing.assert_allclose(np.linalg.norm(patch[..., c], "nuc"), 5.0, rtol=1e-6)


@pytest.mark.parametrize("shape, size", [((6, 6, 3), 2), ((7, 5, 1), 3)])
def test_group_soft_threshold_cell_by_cell(shape, size):
    v = np.random.default_rng(3).normal(size=shape)
    z = np.asarray(jax.jit(ops.group_soft_threshold, static_argnums=2)(v, 1.7, size))
    kept = 0
    for top, left in itertools.product(range(0, shape[0], size), range(0, shape[1], size)):
        cell = np.s_[top:top + size, left:left + size]
        norm = np.linalg.norm(v[cell])
        np.testing.assert_allclose(z[cell], max(0.0, 1 - 1.7 / norm) * v[cell], atol=1e-12)
        kept += norm > 1.7
    assert 0 < kept
    # Nearby points are no better: 1/2 |z - v|^2 + tradeoff * sum |z_cell|.
    @jax.jit
    def value(z):
        norms = ops.cell_sums(jnp.sum(z * z, -1), size)
        weight = ops.cell_sums(jnp.ones(shape[:2]), size)  # every cell counts once
        return 0.5 * jnp.sum((z - v) ** 2) + 1.7 * jnp.sum(jnp.sqrt(norms) / weight)

    for seed in range(20):
        step = 0.01 * np.random.default_rng(seed).normal(size=shape)
        assert value(z + step) > value(z)
    assert np.isfinite(jax.jit(lambda v: ops.group_soft_threshold(v, 0.0, size))(0.0 * v)).all()
    at_zero = jax.grad(lambda v: jnp.sum(ops.group_soft_threshold(v, 1.7, size)))(0.0 * v)
    np.testing.assert_array_equal(at_zero, 0.0 * v)
