"""SAPF and the homotopy attack: their single stages, and superpixels on their way to the attack."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gse_jax
from gse_jax import ops
from gse_jax.attacks import METHODS, Sample, attack_stream
from gse_jax.attacks.baselines import homotopy_search, homotopy_steps
from gse_jax.attacks.baselines import perturbation_factorization as sapf
from gse_jax.attacks.baselines import perturbation_factorization_steps as sapf_steps
from gse_jax.attacks.baselines.group_mirror_descent import GSMDSettings
from gse_jax.attacks.baselines.homotopy import HomotopySettings
from gse_jax.attacks.baselines.weight_search import next_weight
from gse_jax.attacks.segmentation import segments_of, slic_segments
from tests.toy_model import linear_logits, states_over, toy

SHORT = sapf.SAPFSettings(num_pixels=40, num_searches=2, rounds=1, magnitude_steps=6,
                          selection_steps=4, num_segments=20)


def smooth_images(count, side=16):
    """Images of three stripes, with superpixels that mean something."""
    rng = np.random.default_rng(0)
    x = np.repeat(rng.uniform(0.2, 0.8, (count, 4, 1, 3)), side // 4, axis=1)
    return jnp.asarray(np.broadcast_to(x, (count, side, side, 3)) + 0.0)


def linear_problem(count=3, side=16):
    x = smooth_images(count, side)
    rng = np.random.default_rng(1)
    params = (jnp.asarray(rng.normal(size=(side * side * 3, 4)) * 0.1), jnp.zeros(4))
    return params, x, linear_logits(params, x).argmax(-1).astype(jnp.int32)


@pytest.mark.slow
def test_the_tradeoff_of_homotopy_is_that_of_its_best_image():
    params, x, y = linear_problem()
    attack = lambda params, y, max_rounds=3: gse_jax.attack(
        params, linear_logits, x, y, method="homotopy",
        settings=HomotopySettings(max_steps=20, max_rounds=max_rounds, num_segments=20))
    result = attack(params, y)
    assert bool((result.status == gse_jax.Status.FOUND).any())
    np.testing.assert_array_equal(result.tradeoff > 0, result.status == gse_jax.Status.FOUND)
    hopeless = attack((params[0] * 1e-9, params[1].at[0].set(1.0)), 0 * y)
    np.testing.assert_array_equal(hopeless.status, gse_jax.Status.NOT_FOUND)
    np.testing.assert_array_equal(hopeless.tradeoff, 0.0)
    fewer = attack((params[0] * 1e-9, params[1].at[0].set(1.0)), 0 * y, max_rounds=2)
    one = attack((params[0] * 1e-9, params[1].at[0].set(1.0)), 0 * y, max_rounds=1)
    assert (one.gradient_evals < fewer.gradient_evals).all()
    assert (fewer.gradient_evals < hopeless.gradient_evals).all()


def states_of(method, settings, hyperparams, steps):
    params, x, y = linear_problem()
    algorithm = METHODS[method].bind(settings, jax.tree.map(jnp.asarray, hyperparams), targeted=False,
                                     bounds=(0.0, 1.0), key=None)
    segments = METHODS[method].segment(settings, np.asarray(x))
    samples = Sample(x, y, jnp.full(3, -1, jnp.int32), jnp.arange(3, dtype=jnp.int32),
                     None if segments is None else jnp.asarray(segments))
    return states_over(algorithm, lambda x: linear_logits(params, x), samples, steps)


def test_segments_are_numbered_without_gaps_and_follow_the_image():
    x = np.asarray(smooth_images(2))
    segments = slic_segments(x, 16)
    assert segments.shape == (2, 16, 16) and segments.dtype == np.int32
    for one in segments:
        assert set(np.unique(one)) == set(range(one.max() + 1)) and one.max() > 4
    noise = np.random.default_rng(0).uniform(size=(1, 9, 11, 1))
    assert slic_segments(noise, 10_000).max() < 99  # more than pixels are impossible


def test_selection_becomes_binary_and_meets_its_budget():
    """The lp-box ADMM alone, on a problem whose gradient prefers eight pixels of a stripe."""
    rng = np.random.default_rng(0)
    magnitude = jnp.ones((12, 12, 1))
    wanted = np.zeros((12, 12))
    wanted[4:6, 3:7] = 1.0
    gradient = jnp.asarray(-10.0 * wanted - rng.uniform(0.0, 1e-3, (12, 12)))[..., None]
    params = sapf.SAPFHyperparams(*(jnp.asarray(h) for h in (1.0, 1e-3, 0.1)))
    segments = jnp.asarray(np.arange(144).reshape(12, 12) // 8, jnp.int32)

    @jax.jit
    def solve():
        step = lambda n, now: sapf_steps.selection_step(*now, magnitude, gradient, segments, 8,
                                                        params, n)
        start = jnp.ones((12, 12)), sapf_steps.no_duals(magnitude)
        return jax.lax.fori_loop(0, 2500, step, start)[0]

    selection = np.asarray(solve())
    np.testing.assert_allclose(selection, wanted, atol=0.02)
    assert int(sapf_steps.binary_selection(jnp.asarray(selection), 8).sum()) == 8
    assert int(sapf_steps.binary_selection(jnp.ones((12, 12)), 8).sum()) == 8
    assert int(sapf_steps.binary_selection(jnp.full((12, 12), 0.5), 8).sum()) == 0


def test_a_step_on_the_selection_descends_its_lagrangian():
    rng = np.random.default_rng(0)
    segments = jnp.asarray(np.arange(48).reshape(6, 8) // 6, jnp.int32)
    s, magnitude, gradient = (jnp.asarray(rng.normal(size=shape)) for shape in ((6, 8), (6, 8, 3), (6, 8, 3)))
    duals = sapf_steps.Duals(*(jnp.asarray(1e-3 * rng.normal(size=shape)) for shape in ((6, 8),) * 3 + ((),)))
    penalties = sapf_steps.penalties_at(jnp.asarray(7), jnp.float64)
    at = [s + dual / penalty for dual, penalty in zip(duals[:3], penalties)]
    copies = [jnp.clip(at[0], 0.0, 1.0), ops.project_binary_sphere(at[1]),
              ops.superpixel_soft_threshold(at[2], 2e-3 / penalties[2], segments)]

    def gaps(s):
        return [*(s - copy for copy in copies), jnp.sum(s) - 5]

    def lagrangian(s):
        w = magnitude * s[..., None]
        return jnp.sum(w * w + gradient * w) + sum(
            jnp.sum(dual * gap + 0.5 * penalty * gap * gap) for dual, penalty, gap in zip(duals, penalties, gaps(s)))

    new, after = sapf_steps.selection_step(s, duals, magnitude, gradient, segments, 5,
                                           sapf.SAPFHyperparams(1.0, 2e-3, jnp.asarray(0.004)), jnp.asarray(7))
    np.testing.assert_allclose(new, s - 0.004 * jax.grad(lagrangian)(s), rtol=1e-9)
    for dual, before, penalty, gap in zip(after, duals, penalties, gaps(new)):
        np.testing.assert_allclose(dual, before + penalty * gap, rtol=1e-9)


def test_schedules_are_the_published_ones():
    count = lambda n: jnp.asarray(n, jnp.int32)
    step, penalties = 0.1, [5e-3, 5e-3, 5e-3, 1e-4]
    for n in range(1, 2501):
        penalties = [min(1.01 * p, m) for p, m in zip(penalties, (20, 20, 100, 0.01))]
        if n % 50 == 0:
            step = max(0.9 * step, 0.001)
        if n in (1, 49, 50, 999, 2500):
            np.testing.assert_allclose(sapf_steps.step_size_at(jnp.asarray(0.1), count(n)), step)
            np.testing.assert_allclose(sapf_steps.penalties_at(count(n), jnp.float64), penalties)


def test_lambda_grows_tenfold_until_a_success_and_is_then_halved():
    c, lower, upper = jnp.asarray(1e-3), jnp.asarray(0.0), jnp.asarray(jnp.inf)
    seen = []
    for good in (False, False, True, False, True):
        c, lower, upper = next_weight(c, lower, upper, jnp.asarray(good), 10.0)
        seen.append(float(c))
    np.testing.assert_allclose(seen, [0.01, 0.1, 0.055, 0.0775, 0.06625])


@pytest.mark.slow
def test_a_run_of_sapf_alternates_and_tests_in_budget_only():
    total = 6 + 4 + 3 + 1
    _, hyperparams = gse_jax.preset("sapf", "gse_paper")
    before = None
    for number, state in enumerate(states_of("sapf", SHORT, hyperparams, 2 * total), 1):
        np.testing.assert_array_equal(state.run, number // total)
        place = number % total
        if before is not None and place:
            chosen = (state.selection != before.selection).any()
            assert bool(chosen) == (7 <= place <= 10)
        if place >= 10:
            assert set(np.unique(state.selection)) <= {0.0, 1.0}
            assert (np.asarray(state.selection.sum((1, 2))) <= 40).all()
        if place < 11 and number < total:
            assert np.isinf(state.record.score).all()
        before = state


@pytest.mark.slow
@pytest.mark.parametrize("groups", [
    "superpixels", pytest.param("entries", marks=pytest.mark.slow)])
def test_the_objective_of_a_round_never_exceeds_its_average(groups):
    """nmAPG: F(x) <= c within a round, c never rises, and the prox caps new groups."""
    settings = HomotopySettings(groups=groups, num_segments=30, max_steps=8, num_new=2,
                                num_new_loose=2, tuning_steps=2)
    _, hyperparams = gse_jax.preset("homotopy", "gse_paper")
    before, iterations = None, 0
    for state in states_of("homotopy", settings, hyperparams, 150):
        now = state.search
        if before is not None:
            same = np.asarray((now.round == before.round) & (now.step == before.step + 1))
            iterations += same.sum()
            objective = np.asarray(homotopy_steps.objective(now.x, now.tradeoff))
            limit = np.asarray(before.average) * (1 + 2e-5) + 1e-3  # the code's own slack
            assert (objective[same] <= limit[same]).all()
            assert (np.asarray(now.average)[same] <= limit[same]).all()
            assert (np.asarray(now.x.groups) <= np.asarray(now.most)).all()
        before = now
    assert iterations > 10
    assert (np.asarray(state.search.phase) >= homotopy_search.CUT).any()


@pytest.mark.slow
def test_first_tradeoff_is_the_edge_of_the_first_step():
    rng = np.random.default_rng(0)
    gradient = jnp.asarray(rng.normal(size=(6, 6, 3)) * 100.0)
    limits = homotopy_steps.Limits(jnp.full((6, 6, 3), -0.05), jnp.full((6, 6, 3), 0.05),
                                   jnp.asarray(108, jnp.int32))
    zero = jnp.zeros((6, 6, 3))
    at = homotopy_steps.Looked(zero, jnp.zeros(()), gradient, jnp.zeros(()), jnp.asarray(False))
    for segments in (None, jnp.asarray(np.arange(36).reshape(6, 6) // 5, jnp.int32)):
        edge = homotopy_steps.first_tradeoff(gradient, limits, segments)
        for factor, moves in ((0.999, True), (1.001, False)):
            z = homotopy_steps.prox_step(at, homotopy_steps.FIRST_STEP, factor * edge, limits,
                                         segments)
            assert bool((z != 0.0).any()) == moves


def test_the_longest_step_is_that_of_the_largest_superpixel():
    segments = jnp.asarray([[0, 0, 1], [0, 2, 2]], jnp.int32)
    assert float(homotopy_steps.largest_group(jnp.zeros((2, 3, 3)), segments)) == 9.0
    assert float(homotopy_steps.largest_group(jnp.zeros((2, 3, 3)), None)) == 1.0
    np.testing.assert_allclose(homotopy_steps.longest_step(jnp.asarray(0.5), 0.1, 9.0), 2 * 0.1**2 * 9.0 / 0.5)


def test_tuning_stays_on_the_support_and_lowers_the_peak():
    w = jnp.zeros((4, 4, 1)).at[1, 1].set(0.5).at[2, 2].set(-0.2)
    gradient = jnp.ones_like(w)
    limits = homotopy_steps.Limits(w * 0 - 1.0, w * 0 + 1.0, jnp.asarray(2, jnp.int32))
    at = homotopy_steps.Looked(w, jnp.zeros(()), gradient, jnp.ones(()), jnp.asarray(False))
    moved = homotopy_steps.tuned(at, limits, 0.01, 0.1)
    expected = jnp.zeros((4, 4, 1)).at[1, 1].set(0.5 - 0.1 - 0.01).at[2, 2].set(-0.2 - 0.01)
    np.testing.assert_allclose(moved, expected, atol=1e-12)


@pytest.mark.slow
def test_superpixels_reach_the_attack_on_every_way():
    """One call, a stream of batches, and the caller's own jit give the same images."""
    params, x, y = linear_problem()
    options = dict(method="sapf", settings=SHORT, bounds=(0.0, 1.0))
    expected = gse_jax.attack(params, linear_logits, x, y, **options)
    jitted = jax.jit(lambda p, x, y: gse_jax.attack(p, linear_logits, x, y, **options))
    np.testing.assert_allclose(jitted(params, x, y).adversarials, expected.adversarials, atol=1e-9)
    batches = [Sample(x[:1], y[:1], np.full(1, -1), np.arange(1)),
               Sample(x[1:], y[1:], np.full(2, -1), np.arange(1, 3))]
    for stretch in attack_stream(params, linear_logits, batches, image_shape=x.shape[1:],
                                 dtype=x.dtype, lanes=1, **options):
        np.testing.assert_allclose(stretch.outcome.adversarials,
                                   expected.adversarials[stretch.sample_ids], atol=1e-9)


def test_superpixels_are_those_of_the_image_in_the_unit_range_and_blurred_where_asked(monkeypatch):
    images, seen = np.asarray(smooth_images(2)), []
    noted = lambda settings, images: seen.append(images) or np.zeros(images.shape[:3])
    method = METHODS["homotopy"]._replace(segment=noted)
    for low, high in ((0.0, 1.0), (-2.1, 2.6)):
        segments_of(method, None, low + (high - low) * images, (low, high))
        np.testing.assert_allclose(seen[-1], images)
    blurs = []

    def slic(image, **options):
        blurs.append(options["sigma"])
        return np.zeros(image.shape[:2], int)

    monkeypatch.setattr("skimage.segmentation.slic", slic)
    slic_segments(images, 4, blur=0.5)
    slic_segments(images[:1], 4)
    assert blurs == [0.5, 0.5, 0.0]
    METHODS["gsmd"].segment(GSMDSettings(groups="superpixels"), images[:1])
    METHODS["sapf"].segment(SHORT, images[:1])
    assert blurs[3:] == [5.0, 0.0]


def test_methods_without_superpixels_carry_none_along():
    assert METHODS["gse"].segment is None
    assert METHODS["homotopy"].segment(HomotopySettings(groups="entries"), np.zeros((1, 9, 9, 1))) \
        is None


def test_missing_scikit_image_is_one_clear_line():
    code = ("import sys; sys.modules['skimage.segmentation'] = None\n"
            "import numpy as np\nfrom gse_jax.attacks.segmentation import slic_segments\n"
            "try: slic_segments(np.zeros((1, 8, 8, 3)), 4)\n"
            "except ImportError as error: print(error)")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.count("\n") == 1 and "gse-jax[baselines]" in out.stdout


def test_a_wrong_choice_is_refused():
    _, hyperparams = gse_jax.preset("homotopy", "gse_paper")
    for wrong in (dict(groups="pixels"), dict(targeted_loss="hinge"), dict(range_width=0.0)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            METHODS["homotopy"].check(HomotopySettings(**wrong), hyperparams, (32, 32, 3))
    params, apply_fn, x, y = toy()
    with pytest.raises(ValueError, match="num_pixels"):
        gse_jax.attack(params, apply_fn, x, y, method="sapf", bounds=(-1.0, 1.0),
                       settings=sapf.SAPFSettings(num_pixels=401))


@pytest.mark.slow
def test_sapf_with_a_large_weight_fails_without_nan():
    """Magnitudes that leave the range of images made the step on the selection too long."""
    random = np.random.default_rng(0)
    kernel = np.float32(random.normal(size=(432, 3)) * 1e-2)
    x = np.float32(random.uniform(0.3, 0.7, (1, 12, 12, 3)))  # in float64 it takes longer to overflow

    def model(params, x):
        return x.reshape(len(x), -1) @ params + jnp.asarray([[100.0, 0.0, 0.0]], jnp.float32)

    settings = sapf.SAPFSettings(num_pixels=20, num_segments=20, num_searches=1, rounds=1)
    result = gse_jax.attack(kernel, model, x, np.zeros(1, int), method="sapf", settings=settings,
                            hyperparams=sapf.SAPFHyperparams(tradeoff=1e4))
    assert result.status[0] == gse_jax.Status.NOT_FOUND
