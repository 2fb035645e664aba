"""The prox family against a brute-force argmin, and its derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gse_jax import ops

FAMILY = {
    "half": (ops.half_quasinorm_prox, 0.5),
    "two_thirds": (ops.two_thirds_quasinorm_prox, 2.0 / 3.0),
    "soft": (ops.soft_threshold, 1.0),
    "hard": (ops.hard_threshold, 0.0),
}


def penalty(z, p):
    return (z != 0).astype(float) if p == 0.0 else np.abs(z) ** p


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("tradeoff", [0.0, 1e-6, 0.1, 1.0, 3.0])
def test_attains_the_brute_force_minimum(name, dtype, tradeoff):
    prox, p = FAMILY[name]
    v = np.linspace(-3, 3, 61)
    grid = np.linspace(-3.2, 3.2, 64001)
    best = ((grid[None] - v[:, None]) ** 2 + tradeoff * penalty(grid, p)[None]).min(1)
    z = jax.jit(prox)(v.astype(dtype), np.asarray(tradeoff, dtype))
    assert z.dtype == dtype
    z = np.asarray(z, np.float64)
    reached = (z - v) ** 2 + tradeoff * penalty(z, p)
    # The grid misses the minimum by up to (1e-4 / 2)^2 times half the curvature.
    np.testing.assert_allclose(reached, best, atol=2e-6 if dtype == jnp.float32 else 1e-8)
    assert (reached <= best + (2e-6 if dtype == jnp.float32 else 1e-12)).all()


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_value_and_derivatives_are_finite_everywhere(name, dtype):
    prox, _ = FAMILY[name]
    tiny = float(jnp.finfo(dtype).tiny)
    v = np.asarray([0.0, tiny, -tiny, 1e-20, 1e-6, 0.5, -2.0, 1e6, 1e15], dtype)
    derivatives = jax.jit(jax.vmap(jax.value_and_grad(prox, (0, 1)), (0, None)))
    for tradeoff in (0.0, tiny, 1e-12, 1.0, 1e20, 1e30):
        value, (by_v, by_t) = jax.device_get(derivatives(v, np.asarray(tradeoff, dtype)))
        for array in (value, by_v, by_t):
            assert np.isfinite(array).all(), (tradeoff, array)
        assert (np.abs(value) <= np.abs(v) * (1 + 1e-6)).all() and float(value[0]) == 0.0


@pytest.mark.parametrize("name", FAMILY)
def test_derivative_matches_central_differences(name):
    prox, _ = FAMILY[name]
    tradeoff, h = 0.3, 1e-6
    for v in (-2.0, 0.9, 1.5):
        exact = jax.grad(prox, (0, 1))(v, tradeoff)
        by_v = (prox(v + h, tradeoff) - prox(v - h, tradeoff)) / (2 * h)
        by_t = (prox(v, tradeoff + h) - prox(v, tradeoff - h)) / (2 * h)
        np.testing.assert_allclose(exact, (by_v, by_t), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype, rounding", [(np.float64, 4e-15), (np.float32, 1e-6)])
def test_the_half_quasinorm_equals_its_published_formula(dtype, rounding):
    """From just above the threshold to a thousand thresholds, over many magnitudes."""
    tradeoff = np.geomspace(1e-12, 1e6, 19)[:, None]
    v = 54.0 ** (1 / 3) / 4 * tradeoff ** (2 / 3) * (1 + np.geomspace(1e-6, 1e3, 200))
    angle = 2 / 3 * np.arccos(tradeoff / 8 * (v / 3) ** -1.5)
    published = 2 / 3 * v * (1 + np.cos(2 * np.pi / 3 - angle))
    z = jax.vmap(jax.vmap(ops.half_quasinorm_prox, (0, None)))(
        jnp.asarray(v, dtype), jnp.asarray(tradeoff[:, 0], dtype))
    assert z.dtype == dtype
    np.testing.assert_allclose(z, published, rtol=rounding)


def test_threshold_separates_zero_from_nonzero():
    assert ops.hard_threshold(2.0, 4.0) == 0.0  # a tie
    for tradeoff in (1e-4, 0.2, 5.0):
        edge = ops.half_quasinorm_threshold(jnp.asarray(tradeoff))
        assert ops.half_quasinorm_prox(edge * (1 - 1e-9), tradeoff) == 0.0
        just_above = ops.half_quasinorm_prox(edge * (1 + 1e-9), tradeoff)
        # The 1/2-quasinorm prox jumps at its threshold, to two thirds of it.
        np.testing.assert_allclose(just_above, 2.0 / 3.0 * edge, rtol=1e-6)
