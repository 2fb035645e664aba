"""Sweeps over hyperparameters, and the smooth measures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gse_jax
from gse_jax import differentiable, metrics
from tests.toy_model import linear_logits, small_logits

BOUNDS = (-1.0, 1.0)


@pytest.mark.slow
def test_a_sweep_is_the_attacks_at_its_points_in_one_program():
    keys = jax.random.split(jax.random.key(0), 3)
    params = (0.3 * jax.random.normal(keys[0], (192, 16), jnp.float64),
              jax.random.normal(keys[1], (16, 4), jnp.float64))
    x = jax.random.uniform(keys[2], (2, 8, 8, 3), jnp.float64, -0.5, 0.5)
    y = small_logits(params, x).argmax(-1)
    settings = gse_jax.GSESettings(num_runs=2, max_steps=20, phase1_steps=10, patch_size=3)
    traces = []

    def counted(params, x):
        traces.append(1)
        return small_logits(params, x)

    def swept(mus):
        grid = differentiable.hyperparam_grid(gse_jax.GSEHyperparams(), mu=mus, q=[0.25, 0.5],
                                              step_size=[0.005, 0.02])
        return differentiable.sweep(params, counted, x, y, grid, settings=settings, bounds=BOUNDS)

    sweep = swept([0.5, 1.0])
    once = len(traces)
    again = swept([0.1, 0.2])  # other values compile nothing; the model check traces once
    assert len(traces) <= once + 1
    assert again.numbers.shape == (8, 4) and sweep.pareto.any()
    for g in (0, 5):
        point = gse_jax.GSEHyperparams(*(float(leaf[g]) for leaf in sweep.hyperparams))
        alone = gse_jax.attack(params, small_logits, x, y, settings=settings, hyperparams=point,
                               bounds=BOUNDS)
        np.testing.assert_allclose(sweep.result.adversarials[g], alone.adversarials, atol=1e-12)
        summary = metrics.summary(x, alone, bounds=BOUNDS, patch_size=3)
        assert sweep.success_rate[g] == summary.asr_all
        assert sweep.numbers[g, 0] == summary.changed_pixels.mean
        assert sweep.numbers[g, 3] == summary.patch_count.mean

    tradeoffs = np.repeat(np.asarray(sweep.result.tradeoff[:1]), 8, axis=0)
    grid = gse_jax.GSEHyperparams(*(np.repeat(leaf[:1], 8) for leaf in sweep.hyperparams))
    fixed = differentiable.sweep(params, small_logits, x, y, grid, tradeoff=tradeoffs,
                                 settings=settings, bounds=BOUNDS)
    np.testing.assert_allclose(fixed.result.adversarials[3], sweep.result.adversarials[0],
                               atol=1e-10)


def test_smooth_measures():
    x = jnp.zeros((2, 12, 12, 3))
    adversarials = x.at[0, 3, 4].set(0.5).at[0, 9, 9, 1].set(-0.25)
    counts = metrics.patch_count(x, adversarials)
    smooth = differentiable.smooth_patch_count(x, adversarials, smoothing=1e-9)
    np.testing.assert_allclose(smooth, counts, rtol=1e-6)
    np.testing.assert_allclose(differentiable.half_quasinorm(x, adversarials),
                               [3.0 + np.sqrt(0.5), 0.0])  # in units of a range of width 2
    for measure in (differentiable.smooth_patch_count, differentiable.half_quasinorm):
        gradient = jax.grad(lambda a: measure(x, a).sum())(adversarials)
        assert bool(jnp.isfinite(gradient).all()) and float(abs(gradient[0]).max()) > 0


def test_bad_arguments_are_named_in_one_line():
    params = jnp.ones((192, 2), jnp.float64), jnp.zeros(2, jnp.float64)
    x, y = np.zeros((1, 8, 8, 3)), np.zeros(1, int)
    good = differentiable.hyperparam_grid(gse_jax.GSEHyperparams(), mu=[0.1, 1.0])
    calls = [
        (TypeError, "must be a GSEHyperparams, got int", lambda: differentiable.hyperparam_grid(3, mu=[1.0])),
        (ValueError, "'nonsense' is no hyperparameter", lambda: differentiable.hyperparam_grid(
            gse_jax.GSEHyperparams(), nonsense=[1.0])),
        (ValueError, "mu must be a list", lambda: differentiable.hyperparam_grid(
            gse_jax.GSEHyperparams(), mu=[])),
        (TypeError, "grid must be a GSEHyperparams", lambda: differentiable.sweep(
            params, linear_logits, x, y, [1.0])),
        (ValueError, "grid must have leaves of one shape", lambda: differentiable.sweep(
            params, linear_logits, x, y, gse_jax.GSEHyperparams())),
        (ValueError, "tradeoff must be", lambda: differentiable.sweep(
            params, linear_logits, x, y, good, tradeoff=[1.0])),
        (ValueError, "hyperparams.mu=-1 must be", lambda: differentiable.sweep(
            params, linear_logits, x, y, differentiable.hyperparam_grid(
                gse_jax.GSEHyperparams(), mu=[0.1, -1.0]))),
        (ValueError, "tradeoff must hold finite numbers", lambda: differentiable.sweep(
            params, linear_logits, x, y, good, tradeoff=[1.0, np.nan])),
        (ValueError, "smoothing=0.0 must be > 0", lambda: differentiable.smooth_patch_count(
            x, x, smoothing=0.0)),
        (ValueError, "patch_size=9", lambda: differentiable.smooth_patch_count(
            x, x, patch_size=9)),
    ]
    for kind, message, call in calls:
        with pytest.raises(kind, match=message) as error:
            call()
        assert "\n" not in str(error.value)
