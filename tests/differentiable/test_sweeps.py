"""Sweeps over hyperparameters, and the smooth measures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gse_jax
from gse_jax import differentiable, metrics
from gse_jax.differentiable import sweeps
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


def test_a_sweep_reads_what_its_points_gave(monkeypatch):
    """Three points: on four images two that fool by three or by two pixels, on the first two of them one by one pixel."""
    x = np.zeros((4, 8, 8, 1))
    found = np.asarray([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]], bool)
    adversarials = np.zeros((3, *x.shape))
    for point, (count, change) in enumerate([(3, 0.5), (2, 0.8), (1, 1.0)]):
        adversarials[point, found[point], 4, 3:3 + count] = change
    evals = np.arange(12, dtype=np.int32).reshape(3, 4)
    result = gse_jax.AttackResult(adversarials, found, np.where(found, 0, 1).astype("i4"), evals, evals, 1.0 * found)
    seen = []
    monkeypatch.setattr(sweeps, "compiled", lambda *_, **static: lambda params, samples, tradeoff, grid:
                        seen.append((tradeoff, grid)) or jax.tree.map(jnp.asarray, result))
    params = jnp.ones((64, 2)), jnp.zeros(2)
    settings = gse_jax.GSESettings(patch_size=2)
    grid = differentiable.hyperparam_grid(gse_jax.GSEHyperparams(), mu=[1.0, 2.0, 3.0])
    swept = lambda **options: differentiable.sweep(params, linear_logits, x, np.zeros(4, int), grid, settings=settings,
                                                   **options)
    sweep = swept(tradeoff=[0.1, 0.2, 0.3])
    np.testing.assert_array_equal(seen[0][0], np.repeat([[0.1], [0.2], [0.3]], 4, axis=1))
    assert seen[0][1].mu.tolist() == [1.0, 2.0, 3.0] and seen[0][1].q.shape == (3,)
    np.testing.assert_allclose(sweep.success_rate, [1.0, 1.0, 0.5])
    np.testing.assert_allclose(sweep.gradient_evals, [1.5, 5.5, 9.5])
    # Pixels, clusters, norm in units of a range of width 2, patches of 2 x 2 in a row of pixels.
    np.testing.assert_allclose(sweep.numbers, [[3, 1, np.sqrt(3.0), 8], [2, 1, 1.6 * np.sqrt(2.0), 6], [1, 1, 2.0, 4]],
                               rtol=1e-6)
    # The first has the least norm, the second the fewest pixels of those that fool on all images.
    assert sweep.pareto.tolist() == [True, True, False] and swept(min_success=0.5).pareto.tolist() == [True, False, True]
    assert swept(min_success=0.6).pareto.tolist() == [True, True, False]


def test_a_sweep_aims_at_the_targets_and_the_last_axis_of_a_grid_varies_fastest(monkeypatch):
    x, y = np.full((3, 8, 8, 1), 0.5), np.zeros(3, int)

    def attack(params, apply_fn, x, y, *, settings, targets, hyperparams, bounds):
        told = y if targets is None else targets
        return gse_jax.AttackResult(x + 0.1 * hyperparams.mu, told >= 0, 0 * told, told, told,
                                    hyperparams.q * jnp.ones(3))

    monkeypatch.setattr(sweeps, "attack", attack)
    grid = differentiable.hyperparam_grid(gse_jax.GSEHyperparams(), q=[0.25, 0.5], mu=[1.0, 2.0, 3.0])
    assert grid.q.tolist() == [0.25] * 3 + [0.5] * 3 and grid.mu.tolist() == [1.0, 2.0, 3.0] * 2
    for targets in (None, [1, 2, 1]):
        sweep = differentiable.sweep((jnp.ones((64, 3)), jnp.zeros(3)), linear_logits, x, y, grid, targets=targets)
        np.testing.assert_array_equal(sweep.result.gradient_evals, [targets or [0] * 3] * 6)
        np.testing.assert_array_equal(sweep.result.tradeoff[:, 0], grid.q)
        np.testing.assert_allclose(sweep.numbers[:, 2], 1.6 * grid.mu)


def test_smooth_measures():
    x = jnp.zeros((2, 12, 12, 3))
    adversarials = x.at[0, 3, 4].set(0.5).at[0, 9, 9, 1].set(-0.25)
    counts = metrics.patch_count(x, adversarials)
    smooth = differentiable.smooth_patch_count(x, adversarials, smoothing=1e-9)
    np.testing.assert_allclose(smooth, counts, rtol=1e-6)
    np.testing.assert_allclose(differentiable.half_quasinorm(x, adversarials),
                               [3.0 + np.sqrt(0.5), 0.0])  # in units of a range of width 2
    # A pixel in the corner, in one patch, and one in 9 of them: s is 3 * (2 * 0.5)^2 in each.
    corners = x.at[0, 0, 0].set(0.5).at[1, 2, 6].set(-0.5)
    smooth = differentiable.smooth_patch_count(x, corners, patch_size=3, smoothing=0.6)
    np.testing.assert_allclose(smooth, np.asarray([1.0, 9.0]) * 3.0 / 3.6)
    smooth = differentiable.smooth_patch_count(4.0 * x, 4.0 * corners, patch_size=3, smoothing=0.6, bounds=(-2.0, 2.0))
    np.testing.assert_allclose(smooth, np.asarray([1.0, 9.0]) * 3.0 / 3.6)
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
