"""GSE's runs, search and bookkeeping against the rules written out once more, whatever the model says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gse_jax import GSEHyperparams, GSESettings, Status, ops
from gse_jax.attacks.algorithm import Evaluation, Sample
from gse_jax.attacks.gse import GSE

SHAPE, LOW, HIGH = (6, 7, 2), 0.0, 1.0
UNIT = 0.5  # of the caller's, in which images have a range of 2
FINE, IN_LOGITS, IN_LOSS, IN_GRADIENT = range(4)  # where the model begins to be not finite
prox, adapt = jax.jit(ops.half_quasinorm_prox), jax.jit(ops.update_tradeoff, static_argnames="blur_size")


def touched(mask, size):
    return np.lib.stride_tricks.sliding_window_view(mask, (size, size)).any((2, 3)).sum()


class Plain:
    """The search of one image."""

    def __init__(self, x, settings, hyperparams):
        self.x, self.settings, self.hyperparams = x, settings, hyperparams
        self.run, self.lower, self.upper, self.tradeoff, self.found = 0, 0.0, np.inf, 0.0, False
        self.best, self.best_patches, self.best_tradeoff = x, np.inf, 0.0
        self.status, self.evals, self.gradients = -1, 0, 0
        self.w, self.k = np.zeros_like(x), 0

    def point(self):
        return np.clip(self.x + UNIT * self.w, LOW, HIGH)

    def step_size(self):
        boosted = not self.found and self.run >= self.settings.num_runs - self.settings.num_boosted_runs
        return self.hyperparams.step_size * (self.hyperparams.boost if boosted else 1.0)

    def end(self, succeeded):
        if succeeded:
            self.lower, self.found = self.tradeoff, True
            self.tradeoff = 2.0 * self.tradeoff if self.upper == np.inf else 0.5 * (self.upper + self.tradeoff)
        else:
            self.upper, self.tradeoff = self.tradeoff, 0.9 * self.lower + 0.1 * self.tradeoff
        self.run += 1

    def begin(self):
        self.w = self.previous = np.zeros_like(self.x)
        self.momentum, self.k, self.checkpoint = 1.0, 0, np.inf
        can_die = self.hyperparams.q < 1.0 and self.settings.phase1_steps > 0
        while can_die and self.run < self.settings.num_runs:  # a first step of zeros is a whole run of them
            size = self.step_size()
            if (np.asarray(prox(size * self.clean, self.tradeoff * size)) != 0.0).any():
                break
            self.end(False)
        self.map = np.full(self.x.shape[:2], self.tradeoff)
        if self.run >= self.settings.num_runs:
            self.status = Status.FOUND if self.found else Status.NOT_FOUND

    def move(self, gradient):
        size, hyperparams = self.step_size(), self.hyperparams
        frozen = (self.map > self.tradeoff)[..., None]
        if self.k == self.settings.phase1_steps:
            self.w = self.previous = np.where(frozen, 0.0, self.w)
        moved = self.w - size * (gradient + 2.0 * hyperparams.mu * self.w)
        if self.k < self.settings.phase1_steps:
            point = np.asarray(prox(moved, (self.map * size)[..., None]))
        else:
            point = np.where(frozen, 0.0, moved)
        momentum = 0.5 * (1.0 + np.sqrt(1.0 + 4.0 * self.momentum**2))
        weight = self.momentum / momentum
        averaged = weight * point + (1.0 - weight) * self.previous
        if self.k < self.settings.phase1_steps:
            self.map = np.asarray(adapt(self.map, (averaged != 0.0).any(-1), q=hyperparams.q,
                                        blur_size=self.settings.blur_size, blur_sigma=hyperparams.blur_sigma))
        self.w = np.clip(averaged, (LOW - self.x) / UNIT, (HIGH - self.x) / UNIT)
        self.previous, self.momentum, self.k = point, momentum, self.k + 1

    def gives_up(self, margin):
        window, on_support = self.settings.give_up_window, self.k - self.settings.phase1_steps
        if window == 0 or on_support <= 0 or on_support % window:
            return False
        pace, self.checkpoint = (self.checkpoint - margin) / window, margin
        return margin > pace * (self.settings.max_steps - self.k)

    def hear(self, fooled, margin, gradient, fine):
        self.evals += 1
        if not fine:
            self.status = Status.FOUND if self.found else Status.NON_FINITE
        elif self.evals == 1 and fooled:
            self.status = Status.ALREADY_MISCLASSIFIED
        elif self.evals == 1:
            self.gradients, self.clean = 1, UNIT * gradient
            self.tradeoff = self.hyperparams.initial_fraction * float(
                ops.largest_active_tradeoff(self.clean, self.hyperparams.step_size))
            self.begin()
            self.move(self.clean)
        else:
            succeeded = fooled and (self.point() != self.x).any()
            hopeless = self.gives_up(margin)
            if not succeeded and self.k < self.settings.max_steps and not hopeless:
                self.gradients += 1
                self.move(UNIT * gradient)
                return
            patches = touched((self.w != 0.0).any(-1), self.settings.patch_size)
            if succeeded and patches < self.best_patches:
                self.best, self.best_patches, self.best_tradeoff = self.point(), patches, self.tradeoff
            self.end(succeeded)
            self.begin()
            self.move(self.clean)


# How often an iterate fools (None: in the last run alone), where the search begins, q, and what is not finite in the end.
RUNS = ((0.1, 0.01, 0.25, FINE), (0.0, 0.3, 0.25, FINE), (0.3, 50.0, 0.25, FINE), (0.05, 0.3, 0.5, IN_LOGITS),
        (0.1, 0.01, 1.5, IN_LOSS), (0.5, 0.1, 0.25, IN_GRADIENT), (0.5, 0.1, 0.5, IN_GRADIENT),
        (0.0, 3.0, 1.5, FINE), (0.2, 0.02, 0.25, IN_GRADIENT), (0.5, 1e9, 0.25, FINE), (0.3, 1.5e4, 0.25, FINE),
        (0.05, 0.5, 0.9, FINE), (None, 0.01, 0.25, FINE))


@pytest.mark.parametrize("phase1, window, boosted", [(4, 0, 2), (0, 0, 3), (2, 2, 0)])
def test_the_search_equals_a_plain_one(phase1, window, boosted):
    settings = GSESettings(num_runs=6, max_steps=8, phase1_steps=phase1, num_boosted_runs=boosted, blur_size=3,
                           patch_size=2, give_up_window=window)
    bound = lambda hyperparams: GSE.bind(settings, hyperparams, targeted=False, bounds=(LOW, HIGH), key=None)
    step = jax.jit(lambda hyperparams, state, evaluation: bound(hyperparams).step(state, evaluation))
    seen = set()
    for seed, (share, fraction, q, fault) in enumerate(RUNS):
        random = np.random.default_rng(seed)
        hyperparams = GSEHyperparams(mu=0.5, step_size=0.05, q=q, initial_fraction=fraction, boost=4.0)
        algorithm, traced = bound(hyperparams), jax.tree.map(jnp.asarray, hyperparams)
        x = np.where(random.random(SHAPE) < 0.2, random.integers(0, 2, SHAPE), random.random(SHAPE))
        plain = Plain(x, settings, hyperparams)
        state = algorithm.init(Sample(x, np.int32(0), np.int32(-1), np.int32(0)))
        slope = random.normal(size=SHAPE)
        while plain.status == -1:
            np.testing.assert_allclose(algorithm.query(state), plain.point(), atol=1e-12)
            fooled = bool(plain.evals and (plain.run == 5 if share is None else random.random() < share))
            margin = 0.0 if fooled else float(9.0 / (3.0 + plain.k) + random.random())
            logits, gradient = np.asarray([margin, 0.5 * fooled, -1.0]), slope + random.normal(size=SHAPE)
            loss, fine = np.float64(margin), True
            if fault and plain.evals > 12:
                fine = fault == IN_GRADIENT and fooled  # then it is not used
                if fault == IN_GRADIENT:
                    gradient[0, 0, 0] = np.nan
                elif fault == IN_LOSS:
                    loss = np.float64(np.nan)
                else:
                    logits[2] = -np.inf
            state = step(traced, state, Evaluation(logits, loss, gradient))
            plain.hear(fooled, margin, gradient, fine)
            search = state.search
            assert (int(state.status), int(state.forward_evals), int(state.gradient_evals)) == (
                plain.status, plain.evals, plain.gradients)
            np.testing.assert_allclose(state.best, plain.best, atol=1e-12)
            np.testing.assert_allclose(state.best_tradeoff, plain.best_tradeoff, rtol=1e-9)
            if plain.status == -1:
                assert (int(search.run), bool(search.found), int(state.iterate.step)) == (plain.run, plain.found, plain.k)
                np.testing.assert_allclose([search.tradeoff, search.lower, search.upper, state.checkpoint],
                                           [plain.tradeoff, plain.lower, plain.upper, plain.checkpoint], rtol=1e-9)
                np.testing.assert_allclose(state.iterate.w, plain.w, atol=1e-12)
                np.testing.assert_allclose(state.iterate.tradeoff, plain.map, rtol=1e-9)
        outcome = algorithm.finish(state)
        assert bool(outcome.success) == (plain.status == Status.FOUND)
        np.testing.assert_allclose(outcome.adversarials, plain.best, atol=1e-12)
        seen.add((plain.status, plain.evals))
    assert {status for status, _ in seen} >= {Status.FOUND, Status.NOT_FOUND, Status.NON_FINITE} and len(seen) > 5
