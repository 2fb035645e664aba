"""Single stages of the compared attacks against closed forms, and what all of them must keep to."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gse_jax
from gse_jax import ops
from gse_jax.attacks import METHODS
from gse_jax.attacks.algorithm import Evaluation, Sample
from gse_jax.attacks.baselines import nuclear_frank_wolfe, projected_gradient_descent, sigma_zero
from gse_jax.attacks.baselines import (
    sparse_frank_wolfe,
    structured_attack,
    structured_attack_steps,
)
from gse_jax.attacks.baselines.group_mirror_descent import GSMDSettings, strongest_cells
from gse_jax.attacks.baselines.projected_gradient_descent_l0 import PGD0Hyperparams, PGD0Settings
from gse_jax.attacks.baselines.record import key_of
from gse_jax.attacks.baselines.weight_search import next_weight
from gse_jax.attacks.lanes import evaluate
from tests.toy_model import linear_logits, states_over, toy


def states_of(method, settings, steps, hyperparams=None, targeted=False):
    """The attack's states over some steps on the toy images, and the bounds' half width 1."""
    params, apply_fn, x, y = toy()
    hyperparams = jax.tree.map(jnp.asarray, hyperparams or gse_jax.preset(method, "gse_paper", targeted)[1])
    algorithm = METHODS[method].bind(settings, hyperparams, targeted=targeted, bounds=(-1.0, 1.0),
                                     key=jax.random.key(0))
    samples = Sample(x, y, jnp.full(6, -1, jnp.int32), jnp.arange(6, dtype=jnp.int32))
    return states_over(algorithm, lambda x: apply_fn(params, x), samples, steps)


def test_frank_wolfe_on_mask_and_perturbation_stays_inside_and_descends():
    settings = sparse_frank_wolfe.SAIFSettings(num_pixels=9)
    losses = []
    for state in states_of("saif", settings, 40):
        assert float(jnp.abs(state.p).max()) <= 0.5 + 1e-12  # the preset's radius
        assert float(state.s.min()) >= 0.0 and float(state.s.max()) <= 1.0
        assert float(state.s.sum((1, 2)).max()) <= 9 + 1e-9
        losses.append(np.asarray(state.loss))
    losses = np.stack(losses)
    assert (losses[1:] <= losses[:-1]).all() and (losses[-1] < losses[2]).any()


def test_frank_wolfe_in_the_nuclear_ball_stays_inside():
    settings = nuclear_frank_wolfe.FWnuclSettings(num_trials=3)
    moved = 0
    for state in states_of("fwnucl", settings, 40):
        w = np.asarray(state.w)
        tiles = w.reshape(6, 5, 4, 5, 4, 3).transpose(0, 1, 3, 5, 2, 4)
        norm = np.linalg.svd(tiles, compute_uv=False).sum(-1).max(-1).sum((1, 2))
        assert (norm <= 5.0 * (1 + 1e-9)).all()
        moved = max(moved, norm.max())
    assert moved > 0.5


def test_the_search_of_fwnucl_is_near_and_short_once_an_image_is_adversarial():
    settings = nuclear_frank_wolfe.FWnuclSettings(num_trials=3)
    lengths = {False: set(), True: set()}  # of searches without and with a success before them
    before = None
    for number, state in enumerate(states_of("fwnucl", settings, 90)):
        state = jax.tree.map(np.asarray, state)
        running = state.record.status < 0
        if before is not None:
            for i in np.flatnonzero((state.step > before.step) & running):  # one ends, one begins
                guess = state.search.trial[i]
                right = min(4.0 * guess, 1.0) if np.isfinite(before.record.score[i]) else 1.0
                assert state.search.right[i] == right
                lengths[bool(before.near[i])].add(int(before.search.count[i]) + 1)
        # Gradients are asked for in every fourth call, by all images that need one.
        assert number % 4 == 3 or state.searching[running].all()
        before = state
    assert lengths == {False: {7}, True: {3}}


def test_strattack_leaves_out_only_tests_that_change_nothing():
    """What is not tested is the clean image, or no shorter than the best one so far."""
    settings = structured_attack.StrAttackSettings(num_searches=4, max_steps=30, test_interval=1,
                                                   gradient_interval=1)
    _, hyperparams = gse_jax.preset("strattack", "gse_paper", False)
    x, before = np.asarray(toy()[2]), None
    tested = left_out = 0
    for state in states_of("strattack", settings, 160, hyperparams._replace(c=20.0)):
        y, best = np.asarray(state.blocks.y), np.asarray(state.record.score)
        size = ((np.clip(x + y, -1.0, 1.0) - x) ** 2).sum((1, 2, 3))
        could = (size > 0.0) & (size < best)
        running = (np.asarray(state.run) < 4) & (np.asarray(state.record.status) < 0)
        testing = np.asarray(state.testing)
        assert could[running & testing].all()
        if before is not None:  # a gradient was taken, and the run went on without a test
            went_on = running & ~before & ~testing & (np.asarray(state.step) > 0)
            assert not could[went_on].any()
            left_out += went_on.sum()
        tested, before = tested + (running & testing).sum(), testing
    assert tested > 20 and left_out > 20


def test_strattack_tests_every_third_iteration_once_it_has_an_adversarial_image():
    settings = structured_attack.StrAttackSettings(num_searches=4, max_steps=30, test_interval=3)
    _, hyperparams = gse_jax.preset("strattack", "gse_paper", False)
    steps = {False: set(), True: set()}  # tested ones, modulo 3, without and with a success before
    for state in states_of("strattack", settings, 160, hyperparams._replace(c=20.0)):
        testing = np.asarray(state.testing & (state.record.status < 0))
        for i in np.flatnonzero(testing):
            steps[bool(np.isfinite(state.record.score[i]))].add(int(state.step[i]) % 3)
    assert steps == {False: {0, 1, 2}, True: {0}}


@pytest.mark.parametrize("interval", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_strattack_evaluates_every_so_many_th_iteration_beyond_the_boundary(interval):
    """A run is that of a plain loop which takes the gradient for zero in between."""
    settings = structured_attack.StrAttackSettings(num_searches=1, max_steps=40, num_retrainings=0,
                                                   gradient_interval=interval)
    _, hyperparams = gse_jax.preset("strattack", "gse_paper", False)
    hyperparams = hyperparams._replace(c=20.0)
    params, apply_fn, x, y = toy()

    def margin(image):
        logits = apply_fn(params, image)
        loss = jax.vmap(lambda *a: ops.margin_loss(*a, targeted=False))(logits, y)
        return loss.sum(), loss

    blocks = structured_attack_steps.Blocks(*(jnp.zeros_like(x),) * 5)
    limits = jnp.maximum(-1.0 - x, -1.0), jnp.minimum(1.0 - x, 1.0)
    plain, evaluations, rest = [], np.zeros(6, int), np.zeros(6, int)
    margin_and_slope = jax.jit(jax.value_and_grad(margin, has_aux=True))
    move = jax.jit(jax.vmap(lambda b, g, k, *l: structured_attack_steps.admm_step(
        b, g, k, *l, hyperparams, 2), in_axes=(0, 0, None, 0, 0)))
    for iteration in range(40):
        (_, loss), slope = margin_and_slope(jnp.clip(x + blocks.z, -1.0, 1.0))
        evaluated = rest == 0
        evaluations += evaluated
        rest = np.where(evaluated, np.where(loss == 0.0, interval - 1, 0), rest - 1)
        slope = jnp.where(jnp.asarray(evaluated)[:, None, None, None], 20.0 * slope, 0.0)
        blocks = move(blocks, slope, jnp.asarray(iteration), *limits)
        plain.append(jax.tree.map(np.asarray, blocks))

    compared, counts = set(), np.zeros(6, int)  # counts: of evaluations of z
    running, testing = np.ones(6, bool), np.zeros(6, bool)
    for state in states_of("strattack", settings, 100, hyperparams):
        state = jax.tree.map(np.asarray, state)
        counts += running & ~testing
        running, testing = state.record.status < 0, state.testing
        made = state.step + state.testing  # iterations, those included that wait for their test
        for i in np.flatnonzero(running & (made > 0)):
            compared.add((i, int(made[i])))
            for got, expected in zip(state.blocks, plain[made[i] - 1]):
                np.testing.assert_allclose(got[i], expected[i], atol=1e-12)
    assert not running.any() and len(compared) >= 6 * 39 / interval
    np.testing.assert_array_equal(counts, evaluations)
    assert (evaluations < 40).sum() == (0 if interval == 1 else 6)


def test_strattack_ends_a_retraining_that_does_not_improve():
    settings = structured_attack.StrAttackSettings(num_searches=2, max_steps=35, more_steps=5,
                                                   num_retrainings=2, retrain_steps=40,
                                                   retrain_patience=7, gradient_interval=1)
    _, hyperparams = gse_jax.preset("strattack", "gse_paper", False)
    longest, searched = np.zeros(6, int), np.zeros(6, int)
    for state in states_of("strattack", settings, 300, hyperparams._replace(c=20.0)):
        step, since = np.asarray(state.step), np.asarray(state.since)
        running, again = np.asarray(state.record.status) < 0, np.asarray(state.run) >= 2
        assert (step - since < 7)[running & again].all() and (since <= step).all()
        longest = np.where(running & again, np.maximum(longest, step), longest)
        searched = np.where(running & ~again, np.maximum(searched, step), searched)
    assert not running.any()
    assert longest.max() > 7  # a run that improves goes on beyond its patience
    assert (searched == 39).all()  # the search is not cut short: the second run has five more steps


def test_any_success_of_a_retraining_of_strattack_lowers_its_weight_in_the_original():
    """c after runs that fool the model without an improvement: halved, or raised as after failures."""
    after = {}
    for must_improve in (True, False):
        settings = structured_attack.StrAttackSettings(
            num_searches=2, max_steps=40, num_retrainings=3, retrain_steps=6,
            retrain_must_improve=must_improve)
        _, hyperparams = gse_jax.preset("strattack", "gse_paper", False)
        weights = {}
        for state in states_of("strattack", settings, 130, hyperparams._replace(c=20.0)):
            for i in np.flatnonzero(np.asarray(state.record.status) < 0):
                weights[i, int(state.run[i])] = float(state.c[i])
        after[must_improve] = {weights[i, 3] for i in range(6)}
    assert gse_jax.preset("strattack", "original", False)[0].retrain_must_improve is False
    assert after[False] == {2.5} and 25.0 in after[True]


def test_sigma_zero_learning_rate_is_the_cosine():
    for step in (0, 25, 50, 100):
        expected = 0.1 * 2.0 + (2.0 - 0.2) * 0.5 * (1 + math.cos(math.pi * step / 100))
        got = sigma_zero.learning_rate_at(jnp.asarray(step), 100, jnp.asarray(2.0))
        np.testing.assert_allclose(got, expected)


def test_sigma_zero_threshold_zeroes_what_is_below():
    for state in states_of("sigma_zero", sigma_zero.SigmaZeroSettings(30), 25):
        w, threshold = np.abs(np.asarray(state.w)), np.asarray(state.threshold)
        for one, limit in zip(w, threshold):
            assert one[one > 0].size == 0 or one[one > 0].min() >= limit
    assert (threshold != 0.3).all()
    score, found = np.asarray(state.record.score), np.isfinite(state.record.score)
    entries = (np.asarray(state.record.best) != np.asarray(state.sample.x)).sum((1, 2, 3))
    assert found.any() and (score == entries)[found].all()  # values are counted, not pixels


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_ascent_stays_in_the_ball_and_random_points_fill_it(norm):
    size = lambda w: float(jnp.abs(w).max() if norm == "linf" else jnp.linalg.norm(w.reshape(-1)))
    rng = np.random.default_rng(0)
    w = jnp.zeros((4, 4, 3))
    for _ in range(30):
        gradient = jnp.asarray(rng.normal(size=w.shape)) * 1e-25
        w = projected_gradient_descent.ascend(w, gradient, norm, 0.3, 0.1)
        assert size(w) <= 0.3 * (1 + 1e-12)
    assert size(w) > 0.2
    still = projected_gradient_descent.ascend(w, 0.0 * w, norm, 0.3, 0.1)
    np.testing.assert_allclose(still, w, rtol=1e-12)
    draws = [projected_gradient_descent.random_point(key, (2, 2, 1), jnp.float64, norm, 0.3)
             for key in jax.random.split(jax.random.key(0), 200)]
    sizes = np.asarray([size(draw) for draw in draws])
    assert sizes.max() <= 0.3 and sizes.max() > 0.28 and sizes.min() < 0.2


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_stays_in_the_image_box(norm):
    """Half of the pixels lie on the bounds: what points outwards there must not use up the ball."""
    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.normal(size=(192, 3))), jnp.zeros(3)
    x = jnp.asarray(rng.choice([0.0, 1.0, 0.3, 0.6], (1, 8, 8, 3)))
    settings = projected_gradient_descent.PGDSettings(max_steps=12, norm=norm)
    hyperparams = projected_gradient_descent.PGDHyperparams(0.02, 0.01)
    attack = METHODS["pgd"].bind(settings, hyperparams, targeted=False, bounds=(0.0, 1.0),
                                 key=jax.random.key(0))
    y = linear_logits(params, x).argmax(-1).astype(jnp.int32)
    state = jax.jit(jax.vmap(attack.init))(Sample(x, y, -jnp.ones(1, jnp.int32), jnp.zeros(1, jnp.int32)))

    @jax.jit
    def step(state):
        evaluation, _ = evaluate(attack, lambda x: linear_logits(params, x), state)
        return jax.vmap(attack.step)(state, evaluation)

    for _ in range(10):
        state = step(state)
        image = np.asarray(x) + np.asarray(state.w)
        assert image.min() >= 0.0 and image.max() <= 1.0
    assert np.asarray(state.w).any()


def test_binary_search_over_the_margin_weight():
    c, lower, upper = jnp.asarray(2.0), jnp.asarray(0.0), jnp.asarray(jnp.inf)
    seen = [2.0]
    for improved in (False, True, False, True):
        c, lower, upper = next_weight(c, lower, upper, jnp.asarray(improved), 5.0)
        seen.append(float(c))
    assert seen == [2.0, 10.0, 6.0, 8.0, 7.0]
    assert (float(lower), float(upper)) == (6.0, 8.0)


@pytest.mark.parametrize("share", [1.0, 0.3, 0.002, 0.0])
def test_trimmed_support_is_the_percentile(share):
    rng = np.random.default_rng(0)
    y = rng.normal(size=(20, 20, 3)) * (rng.uniform(size=(20, 20, 3)) < share)
    support = np.asarray(structured_attack_steps.trimmed_support(jnp.asarray(y)))
    entries = np.abs(y[y != 0])
    edge = np.percentile(entries, 3) if entries.size else np.inf
    np.testing.assert_array_equal(support, np.abs(y) > edge)


def strattack_parts(seed=0):
    """(random variables of the ADMM, gradient, limits, hyperparameters)"""
    rng = np.random.default_rng(seed)
    parts = structured_attack_steps.Blocks(*(jnp.asarray(rng.normal(size=(6, 5, 2))) for _ in range(5)))
    limits = jnp.full((6, 5, 2), -0.7), jnp.full((6, 5, 2), 0.4)
    return parts, jnp.asarray(rng.normal(size=(6, 5, 2))), limits, structured_attack.StrAttackHyperparams(
        1.0, 0.3, 0.8, 1.7, 2.5, 1.0)


def test_an_iteration_of_strattack_minimises_each_part():
    now, gradient, (low, high), at = strattack_parts()
    new = structured_attack_steps.admm_step(now, gradient, jnp.asarray(3), low, high, at, 2)
    delta, y, w = (after - before + new.z for after, before in zip(new[2:], now[2:]))
    np.testing.assert_allclose(2 * at.gamma * delta + at.rho * (delta + now.dual_delta - now.z), 0.0, atol=1e-12)
    np.testing.assert_allclose(y, ops.group_soft_threshold(now.z - now.dual_y, at.tau / at.rho, 2), atol=1e-12)
    np.testing.assert_allclose(w, jnp.clip(now.z - now.dual_w, low, high), atol=1e-12)
    np.testing.assert_allclose(new.y, y, atol=1e-12)
    copies = sum(new.z - copy - dual for copy, dual in zip((delta, y, w), now[2:]))
    slope = gradient + at.rho * copies + at.alpha * 2.0 * (new.z - now.z)  # the root of the fourth iteration
    np.testing.assert_allclose(slope, 0.0, atol=1e-12)


def test_an_iteration_of_the_retraining_of_strattack():
    now, gradient, (low, high), at = strattack_parts()
    support = now.y > 0.0
    new = structured_attack_steps.retraining_step(now, gradient, support, low, high, at)
    pull = at.alpha * (new.z - now.z) + at.rho * (new.z - now.y - now.dual_delta) + at.rho * new.z  # published weights
    np.testing.assert_allclose(pull + jnp.where(support, gradient, 0.0), 0.0, atol=1e-12)
    np.testing.assert_allclose(new.dual_delta, now.dual_delta + now.y - new.z, atol=1e-12)
    shrunk = 1.7 / (1.7 + 0.01 * 0.3) * (new.z - new.dual_delta)
    np.testing.assert_allclose(new.y, jnp.where(support, jnp.clip(shrunk, low, high), 0.0), atol=1e-12)


def test_strattack_tests_points_that_are_zero_on_whole_cells():
    settings = structured_attack.StrAttackSettings(num_searches=1, max_steps=20, num_retrainings=0)
    _, hyperparams = gse_jax.preset("strattack", "gse_paper", False)
    active = emptied = 0
    for state in states_of("strattack", settings, 30, hyperparams._replace(c=20.0)):
        in_cells = lambda w: np.abs(np.asarray(w)).reshape(6, 10, 2, 10, 2, 3).sum((2, 4, 5)) > 0
        y, z = in_cells(state.blocks.y), in_cells(state.blocks.z)
        assert not (y & ~z).any()
        active, emptied = max(active, y.sum()), max(emptied, (z & ~y).sum())
    assert active > 0 and emptied > 100


def test_mirror_descent_stays_in_its_ball_and_keeps_its_cells():
    settings = GSMDSettings(max_steps=20, cells_per_axis=5)
    cells = ops.grid_cells(20, 20, 5)
    kept = None
    for number, state in enumerate(states_of("gsmd", settings, 18)):
        w = np.abs(np.asarray(state.w)).max(-1)
        total = np.stack([w[:, cells == g].max(-1) for g in range(25)]).sum(0)
        assert (total <= np.asarray(state.budget) * (1 + 1e-9)).all()
        if number > 10:
            assert kept is None or (np.asarray(state.kept) == kept).all()
            kept = np.asarray(state.kept)
            assert not w[~kept].any()
    assert (kept.reshape(6, -1).sum(1) <= 16 * int(10 / 22.5 * 25)).all()


def test_strongest_cells_by_their_largest_entry():
    cells = ops.grid_cells(4, 6, 2)
    w = jnp.zeros((4, 6, 1)).at[0, 0].set(-3.0).at[3, 5].set(2.0).at[0, 5].set(1.0)
    mask = strongest_cells(w, cells, jnp.asarray(2))
    np.testing.assert_array_equal(np.asarray(mask), np.isin(cells, [0, 3]))


def test_keys_follow_the_sample_and_the_counters():
    sample = lambda i: Sample(*(jnp.zeros(()),) * 3, jnp.asarray(i, jnp.int32))
    key = jax.random.key(0)
    draw = lambda *a: float(jax.random.uniform(key_of(key, *a)))
    places = [(sample(i), jnp.asarray(r), jnp.asarray(s)) for i in range(2) for r in range(2)
              for s in range(2)]
    assert len({draw(*place) for place in places}) == 8
    assert draw(*places[3]) == draw(*places[3])


@pytest.mark.parametrize("method, settings", [
    ("pgd", projected_gradient_descent.PGDSettings(max_steps=1, random_start=False)),
    ("sigma_zero", sigma_zero.SigmaZeroSettings(1)),
])
def test_the_point_after_the_last_step_counts(method, settings):
    """One step is enough for a model that any change fools; the attack must look at its result."""
    x = jnp.full((1, 8, 8, 1), 0.5)

    def brittle(params, images):
        moved = jnp.abs(images - 0.5).mean((1, 2, 3))
        return jnp.stack([1.0 + 0.0 * moved, 1e6 * moved + images.mean((1, 2, 3)) * 1e-3], 1)

    result = gse_jax.attack((), brittle, x, jnp.zeros(1, jnp.int32), method=method,
                            settings=settings)
    assert bool(result.success[0]) and int(result.forward_evals[0]) == 2


def test_pgd0_on_grey_images_starts_uniformly_in_what_it_may_reach():
    x = np.random.default_rng(0).uniform(0.4, 0.6, (12, 12, 1))
    settings = PGD0Settings(num_pixels=144, sigma_map=True)
    attack = METHODS["pgd0"].bind(settings, PGD0Hyperparams(), targeted=False, bounds=(0.0, 1.0), key=jax.random.key(0))
    zero = jnp.int32(0)
    state = attack.step(attack.init(Sample(x, zero, zero - 1, zero)),
                        Evaluation(jnp.asarray([1.0, 0.0]), jnp.zeros(()), jnp.zeros_like(x)))
    reach = 0.8 * gse_jax.ops.sigma_map(x)
    share = np.asarray(state.image - x) / np.where(reach > 0, reach, 1)
    assert np.abs(share).max() <= 1 + 1e-9 and 0.3 < np.abs(share)[reach > 0].mean() < 0.7
    assert abs(share[reach > 0].mean()) < 0.2  # brighter and darker
