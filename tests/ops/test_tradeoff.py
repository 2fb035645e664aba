"""The trade-off's first value and its update."""

import jax
import jax.numpy as jnp
import numpy as np

from gse_jax.ops import half_quasinorm_prox, largest_active_tradeoff, update_tradeoff


def test_largest_active_tradeoff_is_the_border():
    rng = np.random.default_rng(0)
    for step_size in (0.005, 0.05, 0.75):
        gradient = jnp.asarray(rng.normal(size=(9, 9, 3)))
        edge = largest_active_tradeoff(gradient, step_size)
        for factor, moves in ((1 - 1e-9, True), (1 + 1e-9, False)):
            point = half_quasinorm_prox(-step_size * gradient, edge * factor * step_size)
            assert bool((point != 0).any()) == moves


def test_zero_gradient_gives_zero_with_finite_derivative():
    zero = jnp.zeros((8, 8, 3))
    assert largest_active_tradeoff(zero, 0.005) == 0.0
    assert np.isfinite(jax.grad(lambda g: largest_active_tradeoff(g, 0.005))(zero)).all()


def test_update_falls_near_the_mask_and_grows_elsewhere():
    mask = jnp.zeros((20, 20), bool).at[10, 10].set(True)
    now = jnp.full((20, 20), 0.5)
    after = np.asarray(update_tradeoff(now, mask, q=0.25, blur_size=5, blur_sigma=1.5))
    near = np.zeros((20, 20), bool)
    near[8:13, 8:13] = True
    assert (after[near] < 0.5).all()
    np.testing.assert_allclose(after[~near], 2.0)
    weights = np.exp(-np.arange(-2, 3.0) ** 2 / (2 * 1.5**2))
    kernel = np.outer(weights, weights) / weights.sum() ** 2
    np.testing.assert_allclose(after[8:13, 8:13], 0.5 / (1 + kernel), rtol=1e-12)


def test_an_underflow_of_the_blur_is_near_all_the_same():
    mask = jnp.zeros((8, 8), bool).at[4, 4].set(True)
    after = np.asarray(update_tradeoff(jnp.ones((8, 8)), mask, q=0.25, blur_size=5, blur_sigma=0.05))
    np.testing.assert_array_equal(after[2:7, 2:7], np.where(np.asarray(mask)[2:7, 2:7], 0.5, 1.0))
    assert (after == 4.0).sum() == 64 - 25


def test_update_survives_the_published_growth_in_float32():
    value = jnp.full((8, 8), 1e-4, jnp.float32)
    for _ in range(50):
        value = update_tradeoff(value, jnp.zeros((8, 8), bool), q=0.25, blur_size=5,
                                blur_sigma=1.5)
    np.testing.assert_allclose(value, 1e-4 * 4.0**50, rtol=1e-4)
