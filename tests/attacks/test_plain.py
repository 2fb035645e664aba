"""Whole attacks against plain NumPy loops, written from the papers, at settings that no golden run has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gse_jax
from gse_jax import GSEHyperparams, GSESettings, Status
from gse_jax.attacks.baselines.projected_gradient_descent_l0 import PGD0Hyperparams, PGD0Settings
from gse_jax.attacks.baselines.sigma_zero import SigmaZeroHyperparams, SigmaZeroSettings
from tests.toy_model import small_logits

SHAPE, CLASSES, COUNT = (12, 14, 3), 4, 4
# Every direction is a program of its own.
SLOW = pytest.mark.slow


def network(seed):
    """Parameters of `small_logits`; logits of a few units."""
    rng = np.random.default_rng(seed)
    inputs = int(np.prod(SHAPE))
    return 3.0 * rng.normal(size=(inputs, 9)) / np.sqrt(inputs), 2.0 * rng.normal(size=(9, CLASSES))


def problem(targeted, seed=0):
    """(params, images with some values on the bounds, labels, targets)."""
    params = network(seed)
    x = np.random.default_rng(3).uniform(size=(COUNT, *SHAPE))
    x[:, :3] = np.round(x[:, :3])
    y = np.asarray(small_logits(params, x)).argmax(-1)
    return params, x, y, (y + 1 + np.arange(COUNT) % 3) % CLASSES if targeted else None


class Plain:
    """What the attacks may ask about one image; all points are perturbations in units of range width 1."""

    def __init__(self, params, x, y, target):
        self.params, self.x, self.targeted = params, x, target is not None
        self.label = target if self.targeted else y
        self.lower, self.upper = -x, 1.0 - x

    def logits(self, w):
        return np.tanh((np.clip(self.x + w, 0.0, 1.0).reshape(-1) - 0.5) @ self.params[0]) @ self.params[1]

    def fools(self, w):
        return (self.logits(w).argmax() == self.label) == self.targeted

    def pulled(self, w, by_logits):
        hidden = np.tanh((np.clip(self.x + w, 0.0, 1.0).reshape(-1) - 0.5) @ self.params[0])
        return (self.params[0] @ ((1.0 - hidden**2) * (self.params[1] @ by_logits))).reshape(SHAPE)

    def margin(self, w):
        """(margin, its gradient)."""
        z = self.logits(w)
        others = np.where(np.arange(CLASSES) == self.label, -np.inf, z)
        by_logits = np.eye(CLASSES)[self.label] - np.eye(CLASSES)[others.argmax()]
        sign = -1.0 if self.targeted else 1.0
        return sign * (z[self.label] - others.max()), self.pulled(w, sign * by_logits)

    def climb(self, w):
        """Gradient along which the cross entropy leads to success."""
        share = np.exp(self.logits(w))
        by_logits = share / share.sum() - np.eye(CLASSES)[self.label]
        return self.pulled(w, -by_logits if self.targeted else by_logits)


def prox(v, tradeoff):
    tradeoff, size = np.broadcast_to(tradeoff, v.shape), np.abs(v)
    out, on = np.zeros_like(v), size > 54 ** (1 / 3) / 4 * tradeoff ** (2 / 3)
    phi = np.arccos(tradeoff[on] / 8 * (size[on] / 3) ** -1.5)
    out[on] = v[on] * (2 / 3) * (1 + np.cos(2 * np.pi / 3 - 2 * phi / 3))
    return out


def adapted(tradeoff, mask, q, taps, sigma):
    half, offsets = taps // 2, np.arange(taps) - taps // 2
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    weights /= weights.sum()
    padded = np.pad(mask.astype(float), half, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (taps, taps))
    blurred = np.einsum("hwab,a,b->hw", windows, weights, weights)
    return np.where(windows.any((2, 3)), tradeoff / (1 + blurred), tradeoff / q)


def plain_gse(at, settings, params):
    """(perturbation, its initial trade-off) in units of range width 1; zeros where nothing is found."""
    margin = lambda w: (at.margin(0.5 * w)[0], 0.5 * at.margin(0.5 * w)[1])  # of images of range width 2
    step_size, zero = params.step_size, np.zeros(SHAPE)
    largest = (4 * step_size * np.abs(margin(zero)[1]).max() / 54 ** (1 / 3)) ** 1.5 / step_size
    start, lower, upper = params.initial_fraction * largest, 0.0, np.inf
    best, fewest, best_start, found = zero, np.inf, 0.0, False
    for run in range(settings.num_runs):
        boosted = not found and run >= settings.num_runs - settings.num_boosted_runs
        size = step_size * (params.boost if boosted else 1.0)
        w, old, tradeoff, momentum = zero, zero, np.full(SHAPE[:2], start), 1.0
        succeeded, checkpoint = False, np.inf
        for k in range(settings.max_steps):
            gradient = margin(w)[1] + 2 * params.mu * w
            after = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
            weight, momentum = momentum / after, after
            if k < settings.phase1_steps:
                point = prox(w - size * gradient, (tradeoff * size)[..., None])
            else:
                if k == settings.phase1_steps:
                    frozen = (tradeoff > start)[..., None]
                    w = old = np.where(frozen, 0.0, w)
                point = np.where(frozen, 0.0, w - size * gradient)
            w, old = weight * point + (1 - weight) * old, point
            if k < settings.phase1_steps:
                tradeoff = adapted(tradeoff, (w != 0).any(-1), params.q, settings.blur_size, params.blur_sigma)
            w = np.clip(w, 2 * at.lower, 2 * at.upper)
            succeeded = at.fools(0.5 * w) and w.any()
            if succeeded:
                break
            on_support, window = k + 1 - settings.phase1_steps, settings.give_up_window
            if window and on_support > 0 and on_support % window == 0:
                now = max(margin(w)[0], 0.0)
                if now > (settings.max_steps - k - 1) / window * (checkpoint - now):
                    break
                checkpoint = now
        if succeeded:
            windows = np.lib.stride_tricks.sliding_window_view((w != 0).any(-1), (settings.patch_size,) * 2)
            patches = windows.any((2, 3)).sum()
            if patches < fewest:
                best, fewest, best_start = 0.5 * w, patches, start
            found, lower, start = True, start, 2 * start if np.isinf(upper) else (upper + start) / 2
        else:
            upper, start = start, 0.9 * lower + 0.1 * start
    return best, best_start


BOOSTED = GSESettings(num_runs=5, max_steps=25, phase1_steps=10, num_boosted_runs=3, blur_size=7, patch_size=4)
GIVING_UP = GSESettings(num_runs=8, max_steps=30, phase1_steps=8, blur_size=3, patch_size=5, give_up_window=4)


@pytest.mark.parametrize("settings, targeted", [
    (BOOSTED, False), (GIVING_UP, True), pytest.param(BOOSTED, True, marks=SLOW),
    pytest.param(GIVING_UP, False, marks=SLOW)])
def test_gse_at_any_settings_and_hyperparameters(settings, targeted):
    rng, found, failed = np.random.default_rng(0), 0, 0
    for trial in range(8):
        params, x, y, targets = problem(targeted, seed=trial % 3)
        hyperparams = GSEHyperparams(
            mu=10 ** rng.uniform(-3, 1), step_size=10 ** rng.uniform(-3.5, 0), q=rng.choice([0.2, 0.5, 0.9, 1.05]),
            blur_sigma=rng.uniform(0.3, 4), initial_fraction=10 ** rng.uniform(-3, 0.5), boost=10 ** rng.uniform(-0.5, 2))
        result = gse_jax.attack(params, small_logits, x, y, targets=targets, settings=settings, hyperparams=hyperparams)
        for i in range(COUNT):
            at = Plain(params, x[i], y[i], targets[i] if targeted else None)
            w, tradeoff = plain_gse(at, settings, hyperparams)
            np.testing.assert_allclose(result.adversarials[i] - x[i], w, atol=1e-9)
            np.testing.assert_allclose(result.tradeoff[i], tradeoff, rtol=1e-9)
            assert int(result.status[i]) == (Status.FOUND if w.any() else Status.NOT_FOUND)
            found, failed = found + w.any(), failed + (not w.any())
    assert found > 10 and failed > 0


def plain_sigma_zero(at, settings, params):
    w, mean, square, threshold = np.zeros(SHAPE), np.zeros(SHAPE), np.zeros(SHAPE), params.threshold
    rate = lambda step: params.learning_rate * (0.1 + 0.45 * (1 + np.cos(np.pi * step / settings.max_steps)))
    best, fewest = w, np.inf
    for step in range(settings.max_steps + 1):
        adversarial, (margin, gradient) = at.fools(w), at.margin(w)
        if adversarial and np.count_nonzero(w) < fewest:
            best, fewest = w, np.count_nonzero(w)
        gradient = (0.0 if margin < 0 else gradient) + 2 * params.sigma * w / (w * w + params.sigma) ** 2 / w.size
        gradient = gradient / max(np.abs(gradient).max(), 1e-12)
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        direction = mean / (1 - 0.9 ** (step + 1)) / (np.sqrt(square / (1 - 0.999 ** (step + 1))) + 1e-8)
        w = np.clip(w - rate(step) * direction, at.lower, at.upper)
        threshold += (1 if adversarial else -1) * params.threshold_rate * rate(step + 1)
        threshold = min(max(threshold, 0.0), 1.0)
        w = np.where(np.abs(w) < threshold, 0.0, w)
    return best


@pytest.mark.parametrize("targeted", [pytest.param(False, marks=SLOW), True])
def test_sigma_zero_at_any_hyperparameters(targeted):
    params, x, y, targets = problem(targeted)
    settings, found = SigmaZeroSettings(30), 0
    for change in ({}, {"learning_rate": 0.3}, {"sigma": 0.1}, {"threshold": 1.0}, {"threshold_rate": 0.1}):
        hyperparams = SigmaZeroHyperparams(**change)
        result = gse_jax.attack(params, small_logits, x, y, targets=targets, method="sigma_zero", settings=settings,
                                hyperparams=hyperparams)
        for i in range(COUNT):
            w = plain_sigma_zero(Plain(params, x[i], y[i], targets[i] if targeted else None), settings, hyperparams)
            np.testing.assert_allclose(result.adversarials[i] - x[i], w, atol=1e-8)
            found += w.any()
    assert found > 10


def plain_pgd0(at, settings, params, start):
    """(perturbation, model calls)."""
    def project(v):
        inside = np.clip(v, at.lower, at.upper)
        saved = (v**2 - (v - inside) ** 2).sum(-1).reshape(-1)
        kept = np.zeros(saved.size, bool)
        kept[np.argsort(-saved, kind="stable")[:settings.num_pixels]] = True
        return np.where(kept.reshape(SHAPE[:2])[..., None], inside, 0.0)

    calls = 1  # of the clean image
    for restart in range(settings.num_restarts):
        w = project(start(restart) - at.x)
        for step in range(settings.max_steps + 1):
            calls += 1
            if at.fools(w):
                return w, calls
            gradient = at.climb(w)
            w = project(w + params.step_size * gradient / (np.abs(gradient).sum() + 1e-10))
    return np.zeros(SHAPE), calls


@pytest.mark.parametrize("targeted", [False, pytest.param(True, marks=SLOW)])
def test_pgd0_at_any_step_size(targeted):
    params, x, y, targets = problem(targeted)
    settings, key, found = PGD0Settings(num_pixels=5, max_steps=10, num_restarts=3), jax.random.key(7), 0
    for step_size in (30.0, 300.0):
        hyperparams = PGD0Hyperparams(step_size=step_size)
        result = gse_jax.attack(params, small_logits, x, y, targets=targets, method="pgd0", settings=settings,
                                hyperparams=hyperparams, key=key)
        for i in range(COUNT):
            start = lambda restart: np.asarray(jax.random.uniform(
                jax.random.fold_in(jax.random.fold_in(key, i), restart), SHAPE, jnp.float64))
            w, calls = plain_pgd0(Plain(params, x[i], y[i], targets[i] if targeted else None), settings, hyperparams, start)
            np.testing.assert_allclose(result.adversarials[i] - x[i], w, atol=1e-9)
            assert int(result.forward_evals[i]) == calls
            found += w.any()
    assert 0 < found < 2 * COUNT
