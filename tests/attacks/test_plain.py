"""Whole attacks against plain NumPy loops, written from the papers, at settings that no golden run has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gse_jax
from gse_jax import GSEHyperparams, GSESettings, Status, ops
from gse_jax.attacks.baselines import random_search_moves
from gse_jax.attacks.baselines import perturbation_factorization_steps as sapf_steps
from gse_jax.attacks.baselines.group_mirror_descent import GSMDHyperparams, GSMDSettings
from gse_jax.attacks.baselines.homotopy import HomotopyHyperparams, HomotopySettings
from gse_jax.attacks.baselines.nuclear_frank_wolfe import FWnuclHyperparams, FWnuclSettings
from gse_jax.attacks.baselines.perturbation_factorization import SAPFHyperparams, SAPFSettings
from gse_jax.attacks.baselines.projected_gradient_descent import PGDHyperparams, PGDSettings
from gse_jax.attacks.baselines.projected_gradient_descent_l0 import PGD0Hyperparams, PGD0Settings
from gse_jax.attacks.baselines.random_search import SparseRSHyperparams, SparseRSSettings
from gse_jax.attacks.baselines.sigma_zero import SigmaZeroHyperparams, SigmaZeroSettings
from gse_jax.attacks.baselines.sparse_frank_wolfe import SAIFHyperparams, SAIFSettings
from gse_jax.attacks.segmentation import slic_segments
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
        self.params, self.x, self.y, self.targeted = params, x, y, target is not None
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

    def cross_entropy(self, w):
        return np.log(np.exp(self.logits(w)).sum()) - self.logits(w)[self.label]

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
        if settings.sigma_map:
            sigma = ops.sigma_map(jnp.asarray(at.x))
            return np.asarray(ops.project_sparse_sigma(at.x + v, at.x, sigma, settings.num_pixels, params.kappa)) - at.x
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


@pytest.mark.parametrize("targeted, pixels, kappa", [
    (False, 5, None), pytest.param(True, 5, None, marks=SLOW), (False, 30, 0.6)])
def test_pgd0_at_any_step_size(targeted, pixels, kappa):
    params, x, y, targets = problem(targeted)
    settings = PGD0Settings(pixels, max_steps=10, num_restarts=3, sigma_map=kappa is not None)
    key, found = jax.random.key(7), 0
    for step_size in (30.0, 300.0):
        hyperparams = PGD0Hyperparams(step_size, kappa or 0.8)
        result = gse_jax.attack(params, small_logits, x, y, targets=targets, method="pgd0", settings=settings,
                                hyperparams=hyperparams, key=key)
        for i in range(COUNT):

            def start(restart):
                drawn = np.asarray(jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, i), restart), SHAPE,
                                                      jnp.float64))
                return drawn if kappa is None else np.clip(x[i] + kappa * (2 * drawn - 1), 0, 1)

            w, calls = plain_pgd0(Plain(params, x[i], y[i], targets[i] if targeted else None), settings, hyperparams, start)
            np.testing.assert_allclose(result.adversarials[i] - x[i], w, atol=1e-9)
            assert int(result.forward_evals[i]) == calls
            found += w.any()
    assert 0 < found < 2 * COUNT


def found_as(plain, targeted, method, settings, hyperparams):
    """Compare whole attacks with `plain(at, its key) -> (perturbation, model calls, [weight])`.

    The images of the attack lie in [-1, 3]. Returns how many succeed.
    """
    params, x, y, targets = problem(targeted)
    result = gse_jax.attack(params, lambda p, x: small_logits(p, 0.25 * x + 0.25), 4.0 * x - 1.0, y, targets=targets,
                            bounds=(-1.0, 3.0), method=method, settings=settings, hyperparams=hyperparams,
                            key=jax.random.key(7))
    for i in range(COUNT):
        at = Plain(params, x[i], y[i], targets[i] if targeted else None)
        w, calls, *tradeoff = plain(at, jax.random.fold_in(jax.random.key(7), i))
        np.testing.assert_allclose(result.tradeoff[i], tradeoff[0] if tradeoff else 0.0, rtol=1e-9)
        np.testing.assert_allclose(0.25 * result.adversarials[i] + 0.25 - x[i], w, atol=1e-9)
        assert int(result.forward_evals[i]) == calls and bool(result.success[i]) == w.any()
    return int(result.success.sum())


def largest(scores, count):
    mask = np.zeros(scores.size, bool)
    mask[np.argsort(-scores.ravel(), kind="stable")[:count]] = True
    return mask.reshape(scores.shape)


@pytest.mark.parametrize("norm, radius, targeted", [
    ("linf", 0.02, True), ("l2", 0.3, False), pytest.param("l2", 0.5, True, marks=SLOW)])
def test_pgd_from_random_starts(norm, radius, targeted):
    settings, params = PGDSettings(norm, max_steps=3, num_restarts=2), PGDHyperparams(radius, 0.3 * radius)

    def start(key):
        if norm == "linf":
            return radius * np.asarray(jax.random.uniform(key, SHAPE, jnp.float64, -1.0, 1.0))
        direction, length = jax.random.split(key)
        w = np.asarray(jax.random.normal(direction, SHAPE, jnp.float64))
        return w * radius * float(jax.random.uniform(length, (), jnp.float64)) ** (1 / w.size) / np.linalg.norm(w)

    def plain(at, key):
        calls = 1  # of the clean image
        for restart in range(2):
            w = np.clip(start(jax.random.fold_in(key, restart)), at.lower, at.upper)
            for _ in range(4):
                calls += 1
                if at.fools(w):
                    return w, calls
                gradient = at.climb(w)
                if norm == "linf":
                    w = np.clip(w + 0.3 * radius * np.sign(gradient), -radius, radius)
                else:
                    w = w + 0.3 * radius * gradient / np.linalg.norm(gradient)
                    w = w * min(1.0, radius / np.linalg.norm(w))
                w = np.clip(w, at.lower, at.upper)
        return np.zeros(SHAPE), calls

    assert 0 < found_as(plain, targeted, "pgd", settings, params) < COUNT


@pytest.mark.parametrize("targeted", [True, pytest.param(False, marks=SLOW)])
def test_gsmd_at_any_hyperparameters(targeted):
    cells, found = ops.grid_cells(*SHAPE[:2], 4), 0
    project = jax.jit(lambda z, *limits: ops.project_group_maxima(z, cells, *limits))
    for budget, rate, learning_rate in ((2.0, 0.1, 1.0), (8.0, 0.3, 0.2)):
        def plain(at, key):
            w, kept, size, squares, best, score = np.zeros(SHAPE), True, budget, 0.0, np.zeros(SHAPE), np.inf
            for step in range(17):
                adversarial, norm = at.fools(w / 2), np.linalg.norm(w)
                now = w.any(-1).sum() + norm / (1 + norm)
                if adversarial and now < score:
                    best, score = w / 2, now
                size = max(size * (1 - rate if adversarial else 1 + rate), 1e-3)
                gradient, sure = -at.climb(w / 2) / 2, np.exp(-at.cross_entropy(w / 2))
                squares += (gradient**2).max()
                dual = np.sign(w) * np.log1p(np.abs(w)) - learning_rate / np.sqrt(squares + 1e-12) * gradient
                w = np.asarray(project(dual, size, 2 * at.lower, 2 * at.upper))
                if step == 8:  # most: 10 / 22.5 of 16 cells, rounded down
                    maxima = np.asarray([np.abs(w[cells == cell]).max() for cell in range(16)])
                    kept = largest(maxima, int(np.round(1 + 6 * (1 - sure))))[cells][..., None]
                w = np.where(kept, w, 0.0)
            return best, 17

        found += found_as(plain, targeted, "gsmd", GSMDSettings(16, 4), GSMDHyperparams(budget, rate, learning_rate))
    assert found > COUNT


@pytest.mark.parametrize("targeted", [False, pytest.param(True, marks=SLOW)])
def test_saif_at_any_settings(targeted):
    def plain(at, key):
        lower, upper = np.maximum(at.lower, -params.radius), np.minimum(at.upper, params.radius)
        loss = lambda w: (1 if targeted else -1) * at.cross_entropy(w)

        def vertex_p(slope, s):
            slope = slope * s[..., None]
            return np.where(slope > 0, lower, np.where(slope < 0, upper, 0.0))

        def vertex_s(slope, p):
            slope = (slope * p).sum(-1)
            return 1.0 * (largest(-slope, settings.num_pixels) & (slope < 0))

        p = p_to = vertex_p(-at.climb(0.0), np.ones(SHAPE[:2]))
        s = s_to = vertex_s(-at.climb(0.0), p)
        lowest, step, halvings, calls = np.inf, 0, settings.halvings, 1
        while True:
            size = 0.5**halvings / np.sqrt(max(step, 1))
            p_trial, s_trial = p + size * (p_to - p), s + size * (s_to - s)
            w, calls = s_trial[..., None] * p_trial, calls + 1
            accepted, within = loss(w) <= lowest, (s_trial > 0).sum() <= settings.num_pixels
            if accepted:
                p, s, lowest, step = p_trial, s_trial, loss(w), step + 1
                p_to, s_to = vertex_p(-at.climb(w), s), vertex_s(-at.climb(w), p)
            else:
                halvings += 1
            last = step > settings.max_steps or halvings > 24
            if within and at.fools(w):
                return w, calls
            if not within and (accepted and at.fools(w) or last):
                w, calls = np.where(largest(s, settings.num_pixels), s, 0.0)[..., None] * p, calls + 1
                if at.fools(w):
                    return w, calls
            if last:
                return np.zeros(SHAPE), calls

    settings, found = SAIFSettings(12, max_steps=12, halvings=0), 0
    for radius in (0.1, 0.2):
        params = SAIFHyperparams(radius)
        found += found_as(plain, targeted, "saif", settings, params)
    assert 0 < found < 2 * COUNT


@pytest.mark.parametrize("targeted", [True, pytest.param(False, marks=SLOW)])
def test_sparse_rs_at_any_budget(targeted):
    settings, alpha = SparseRSSettings(9, max_queries=20, num_restarts=3), 0.5
    move = jax.jit(lambda key, pattern, query, begin: random_search_moves.move_pixels(
        key, pattern, 9, random_search_moves.redrawn_fraction("l0", query, 20, jnp.asarray(alpha)), begin))

    def plain(at, key):
        pattern, calls = random_search_moves.empty_pattern(SHAPE), 1
        for restart in range(3):
            at_query = lambda query: jax.random.fold_in(jax.random.fold_in(key, restart), query)
            candidate, lowest = move(at_query(0), pattern, 0, True), np.inf
            for query in range(1, 21):
                corner, calls = np.where(candidate.high, at.upper, at.lower), calls + 1
                w = np.where(candidate.mask[..., None], corner, 0.0)
                if at.fools(w):
                    return w, calls
                loss = at.cross_entropy(w) if targeted else at.margin(w)[0]
                if loss < lowest:
                    pattern, lowest = candidate, loss
                candidate = move(at_query(query), pattern, query, False)
        return np.zeros(SHAPE), calls

    assert 0 < found_as(plain, targeted, "sparse_rs", settings, SparseRSHyperparams(alpha)) < COUNT


@pytest.mark.parametrize("stop, targeted", [
    (False, True), pytest.param(False, False, marks=SLOW), pytest.param(True, False, marks=SLOW)])
def test_fwnucl_at_any_radius(stop, targeted):
    vertex_of = jax.jit(lambda gradient, radius: ops.nuclear_group_vertex(gradient, 5, radius))
    advance = jax.jit(ops.advance_line_search)

    def plain(at, key):
        w, search, near = np.zeros(SHAPE), ops.start_line_search(jnp.asarray(0.382)), False
        best, score, calls = None, np.inf, 0

        def look(w):  # its loss, and whether the attack ends
            nonlocal best, score, calls
            calls, loss = calls + 1, (1 if targeted else -1) * at.cross_entropy(0.5 * w)
            fools = at.fools(0.5 * w) and calls > 1
            if fools and loss < score:
                best, score = np.clip(0.5 * w, at.lower, at.upper), loss
            return loss, fools and stop

        for step in range(7):
            if look(w)[1] or step == 6:
                break
            vertex = np.asarray(vertex_of(-0.5 * at.climb(0.5 * w), radius))
            for _ in range(2 if near else 5):
                known = np.isfinite(score)  # before the search's last evaluation
                loss, over = look(w + float(search.trial) * (vertex - w))
                if over:
                    return best, calls
                search = advance(search, loss)
            w, near = w + float(search.best) * (vertex - w), known
            guess = jnp.clip(search.best, 1e-3, 0.9)
            search = ops.start_line_search(guess, jnp.minimum(4 * guess, 1.0) if near else 1.0)
        return np.zeros(SHAPE) if best is None else best, calls

    found = 0
    for radius in (0.5, 3.0):
        found += found_as(plain, targeted, "fwnucl", FWnuclSettings(6, 2, 5, stop), FWnuclHyperparams(radius))
    assert 0 < found < 2 * COUNT


@pytest.mark.parametrize("targeted", [False, pytest.param(True, marks=SLOW)])
def test_homotopy_at_any_hyperparameters(targeted):
    """Single values as groups."""
    settings = HomotopySettings("entries", max_steps=4, max_rounds=9, num_new=6, num_new_loose=9, tuning_steps=2,
                                tuning_every=3, tuning_levels=3)
    prox = jax.jit(lambda w, *a: ops.count_prox(w, *a, None))

    def plain(at, key):
        radius, best, score, calls, tradeoff = params.radius, (np.zeros(SHAPE), 0.0), np.inf, 0, 0.0
        lower, upper = np.maximum(2 * at.lower, -radius), np.minimum(2 * at.upper, radius)

        class Look:
            def __init__(self, w):
                nonlocal best, score, calls
                calls, self.w, self.groups, (margin, slope) = calls + 1, w, np.count_nonzero(w), at.margin(0.5 * w)
                self.loss, self.slope = max(margin, 0.0), 0.5 * slope * (margin >= 0)
                self.fools = at.fools(0.5 * w) and w.any()
                now = self.groups + 0.5 * np.abs(w).max() / radius
                if self.fools and now < score:
                    best, score = (0.5 * w, tradeoff), now

        def step_from(here, length):
            return Look(np.asarray(prox(here.w - length * here.slope, length * tradeoff, lower, upper,
                                           np.int32(most))))

        def spectral(here, before):
            s, r = here.w - before.w, here.slope - before.slope
            longest = 2 * radius**2 / max(tradeoff, 1e-20)
            moved = np.abs(s).sum() >= 1e-5 and (r * r).sum() > 0
            return np.clip((s * r).sum() / (r * r).sum() if moved else longest, 1e-20, longest)

        def cut(x):
            low, high = 0.0, np.abs(x.w).max()
            for _ in range(16):
                level = 0.5 * (low + high)
                low, high = (low, level) if Look(np.clip(x.w, -level, level)).fools else (level, high)
            return best[0], calls, best[1]

        F = lambda at: at.loss + tradeoff * at.groups
        x, most, fall = Look(np.zeros(SHAPE)), settings.num_new, lambda a, b: 0.3 * ((a.w - b.w) ** 2).sum()
        v = -1e-3 * x.slope
        inside = np.clip(v, lower, upper)
        tradeoff = params.first_factor * (inside * (2 * v - inside)).max() / 2e-3 / params.decrease
        for number in range(1, settings.max_rounds + 1):
            tradeoff *= params.decrease
            y = before = x
            length, inertia, average, weight, last, stood_still = 1e-3, 1.0, F(x), 1.0, 0.0, 0
            for step in range(1, 2 * settings.max_steps + 1):
                for tries in range(60):
                    z = step_from(y, length)
                    value = F(z) - 1e-5 * abs(F(z))
                    if value <= average - fall(z, y) or value <= F(y) - fall(z, y):
                        break
                    length *= 0.8
                new = z
                if value > average - fall(z, y):
                    length = 1e-3 if step == 1 else spectral(x, before)
                    for tries in range(10):
                        v = step_from(x, length)
                        bound = average - fall(v, x)
                        if fine := F(v) <= bound or abs(F(v) - bound) < 1e-3:
                            break
                        length *= 0.8
                    new = z if F(z) <= F(v) else v
                    new = x if not fine and F(new) > F(x) else new
                stood_still += step >= settings.max_steps and abs(new.loss - last) < 1e-3
                fixed = step > 1 and all((new.w == other.w).all() for other in (x, y, before))
                average, weight = (0.9 * weight * average + F(new)) / (0.9 * weight + 1), 0.9 * weight + 1
                after = 0.5 * (np.sqrt(4 * inertia**2 + 1) + 1)
                further = new.w + inertia / after * (z.w - new.w) + (inertia - 1) / after * (new.w - x.w)
                x, before, last, inertia = new, y, new.loss, after
                if x.fools:
                    return cut(x)
                if stood_still > 1 or fixed or step == 2 * settings.max_steps:
                    break
                further = np.clip(further, lower, upper)
                y = x if (further == x.w).all() else Look(further)
                length = spectral(y, before)
            size, changed = np.abs(x.w), np.count_nonzero(x.w)
            loose = size.sum() <= params.saturation * radius * changed
            most = x.groups + (settings.num_new_loose if loose else settings.num_new)
            if changed > int(0.95 * size.size) or number == settings.max_rounds:
                break
            for _ in range(2 * (1 + min(changed // 3, 2)) if loose and changed else 0):
                top = np.abs(x.w) == np.abs(x.w).max()
                moved = x.w - params.norm_step * top * np.sign(x.w) / top.sum() - params.loss_step * x.slope
                x = Look(np.where(x.w != 0, np.clip(moved, lower, upper), 0.0))
                if x.fools:
                    return cut(x)
        return best[0], calls, best[1]

    found = 0
    for params in (HomotopyHyperparams(0.3, 0.8, 0.5, 2e-3, 1e-3, 0.9),
                   HomotopyHyperparams(0.5, 0.6, 2.0, 1e-2, 1e-4, 1.0)):
        found += found_as(plain, targeted, "homotopy", settings, params)
    assert 0 < found


@pytest.mark.parametrize("targeted", [False, pytest.param(True, marks=SLOW)])
def test_sapf_at_any_hyperparameters(targeted):
    settings = SAPFSettings(num_pixels=40, num_searches=9, rounds=2, magnitude_steps=5, selection_steps=4,
                            num_segments=12, range_width=1.0)
    select = jax.jit(sapf_steps.selection_step, static_argnums=5)

    def plain(at, key):
        segments = jnp.asarray(slic_segments(at.x[None], 12)[0])
        weight, low, high, best, score, calls = params.tradeoff, 0.0, np.inf, (np.zeros(SHAPE), 0.0), np.inf, 0
        for run in range(9):
            m, s, succeeded = np.zeros(SHAPE), np.ones(SHAPE[:2]), False
            for step in range(18 + 2 + 1):  # rounds, tuning, and the test of what it left
                wished, calls = m * s[..., None], calls + 1
                w = np.clip(wished, at.lower, at.upper)
                if step >= 18 and at.fools(w) and w.any():
                    succeeded = True
                    if (w * w).sum() < score:
                        best, score = (w, 4 * weight), (w * w).sum()
                margin, slope = at.margin(w)
                slope = np.where((wished == w) & (margin >= 0), weight * slope, 0.0)
                whole, part = divmod(step, 9)
                if step < 18 and part >= 5:
                    duals = sapf_steps.no_duals(jnp.asarray(m)) if part == 5 else duals
                    s, duals = select(s, duals, m, slope, segments, 40, params, np.int32(4 * whole + part - 5))
                    s = np.asarray(s if step < 17 else sapf_steps.binary_selection(s, 40))
                else:
                    m = m - params.step_size * (2 * m * s[..., None] ** 2 + slope * s[..., None])
            low, high = (low, min(high, weight)) if succeeded else (max(low, weight), high)
            if succeeded and weight < 0.01 * params.tradeoff:
                break
            weight = 10 * weight if np.isinf(high) else (low + high) / 2
        return best[0], calls, best[1]

    found = 0
    for tradeoff, group_weight in ((1e-3, 1e-4), (300.0, 1e-4)):
        params = SAPFHyperparams(tradeoff, group_weight, 0.1)
        found += found_as(plain, targeted, "sapf", settings, params)
    assert found == 2 * COUNT
