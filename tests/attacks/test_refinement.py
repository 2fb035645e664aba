"""The refinement: its stages against brute force, and that it never makes an image worse."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gse_jax
from gse_jax import Status, metrics, ops
from gse_jax.attacks.algorithm import Evaluation, Sample
from gse_jax.attacks.refinement import REFINE, RefineHyperparams, RefineSettings
from gse_jax.attacks.refinement.algorithm import _precedes
from gse_jax.attacks.refinement.descent import clip_to_caps, excess_over_caps, last_digit, step_to_boundary
from gse_jax.attacks.refinement.supports import _blurred, power, propose
from tests.toy_model import linear_logits, states_over, toy

BOUNDS = (-1.0, 1.0)


def masks(count=60, height=14, width=17):
    """Masks from empty to full."""
    random = np.random.default_rng(0)
    return [random.random((height, width)) < share for share in np.linspace(0.0, 1.0, count) ** 3]


def touched(mask, size):
    return np.lib.stride_tricks.sliding_window_view(mask, (size, size)).any((2, 3))


@pytest.mark.parametrize("size", [1, 3, 8])
def test_closing_adds_exactly_the_pixels_that_are_free(size):
    closing = jax.jit(ops.close_patches, static_argnums=1)
    grown = 0
    for mask in masks():
        found = np.asarray(closing(mask, size))
        patches = touched(mask, size)
        np.testing.assert_array_equal(np.asarray(ops.touched_patches(mask, size)), patches)
        np.testing.assert_array_equal(touched(found, size), patches)
        assert (found >= mask).all()
        grown += (found > mask).sum()
        for row, column in np.argwhere(~found)[::7]:  # one pixel more costs a patch
            more = found.copy()
            more[row, column] = True
            assert touched(more, size).sum() > patches.sum()
    assert (grown > 0) == (size > 1)


@pytest.mark.parametrize("size", [1, 4, 8])
def test_level_sets_touch_as_many_patches_as_maxima_exceed_the_level(size):
    values = np.random.default_rng(1).random((13, 11))
    largest = np.asarray(ops.largest_in_patches(values, size))
    for level in (0.0, 0.3, 0.9, 1.0):
        assert (largest > level).sum() == touched(values > level, size).sum()


@pytest.mark.parametrize("moves", [("shrink",), ("relocate",), ("thin",), ("scale",)])
@pytest.mark.parametrize("fraction", [1e-17, 0.01, 0.3])
def test_proposals_keep_their_promise(moves, fraction):
    random = np.random.default_rng(2)
    make = jax.jit(propose, static_argnames=("moves", "patch_size"))
    blur, near = jax.jit(_blurred), jax.jit(lambda mask: ops.dilate(mask, 11))
    removed = 0
    for mask in [m for m in masks() if 4 < m.sum() < m.size]:
        powers = random.random(mask.shape)
        patches, pixels = touched(mask, 8).sum(), mask.sum()
        closed = np.asarray(ops.close_patches(mask, 8))
        # What failures give up: pixels that were removed, or for "relocate" added.
        blocked = mask & (random.random(mask.shape) < 0.1)
        if moves == ("relocate",):
            blocked = ~closed & (np.arange(mask.shape[1]) < 8)
        proposal = make(jnp.asarray(powers), jnp.asarray(mask), jnp.asarray(blocked), 0, fraction,
                        float(patches), float(pixels), 1.0, moves=moves, patch_size=8)
        support = np.asarray(proposal.support)
        if moves == ("scale",):
            np.testing.assert_array_equal(support, mask)
        elif moves == ("thin",):
            kept = min(np.floor(pixels * (1 - fraction)), pixels - 1)
            assert support.sum() == max(kept, 1) or (support == (mask & blocked)).all()
            assert (support <= mask).all() and (support >= blocked).all()
            rank = np.where(blocked, np.inf, blur(powers, 0.5))  # single pixels under half of the blur
            assert rank[support].min() >= rank[mask & ~support].max(initial=-1.0)
        else:
            wanted = max(min(np.floor(patches * (1 - fraction)), patches - 1), 1)
            # Patches that share their most powerful pixel go together.
            allowed = closed if moves == ("shrink",) else np.asarray(near(closed)) & ~blocked
            rank = np.where(allowed, np.where(blocked, 1e30, blur(powers, 1.0)), -1.0)
            largest = np.lib.stride_tricks.sliding_window_view(rank, (8, 8)).max((2, 3)).ravel()
            level = np.sort(largest)[::-1][min(int(wanted), largest.size - 1)]
            assert touched(support, 8).sum() == (largest > level).sum() <= wanted
            if moves == ("shrink",):
                assert (support <= closed).all()
            else:
                # What is blocked comes back only where it is free.
                np.testing.assert_array_equal(touched(support & ~blocked, 8), touched(support, 8))
            np.testing.assert_array_equal(support, np.asarray(ops.close_patches(support, 8)))
        allowed = {"thin": mask, "scale": mask, "shrink": closed}
        given_up = support & ~closed if moves == ("relocate",) else allowed[moves[0]] & ~support
        np.testing.assert_array_equal(proposal.given_up, given_up)
        removed += (closed & ~support).sum()
    assert removed > 0


def test_a_step_reaches_the_boundary_of_a_linear_margin():
    random = np.random.default_rng(3)
    gradient = random.normal(size=(9, 9, 3))
    support = random.random((9, 9)) < 0.4
    lower, upper = np.full((9, 9, 3), -5.0), np.full((9, 9, 3), 5.0)
    w = random.normal(size=(9, 9, 3)) * 0.1
    margin = 0.7 + np.sum(gradient * w * support[..., None])
    moved = np.asarray(step_to_boundary(w, gradient, margin, support, lower, upper, np.inf, 0.2))
    assert (moved[~support] == 0.0).all()
    np.testing.assert_allclose(0.7 + np.sum(gradient * moved), -0.2, atol=1e-12)
    # The shortest such step: parallel to the gradient on the support.
    step = (moved - w)[support]
    np.testing.assert_allclose(step / gradient[support], (step / gradient[support])[0, 0])


def test_a_step_leaves_entries_on_their_bounds_alone_and_keeps_the_caps():
    gradient = np.ones((8, 8, 1))
    support = np.ones((8, 8), bool)
    lower, upper = np.full((8, 8, 1), -0.1), np.full((8, 8, 1), 0.1)
    w = np.zeros((8, 8, 1))
    w[:4] = -0.1  # cannot move further
    moved = np.asarray(step_to_boundary(w, gradient, 0.5, support, lower, upper, np.inf, 0.0))
    np.testing.assert_allclose(moved[:4], -0.1)
    np.testing.assert_allclose(moved[4:], -0.5 / 32)
    mirrored = step_to_boundary(-w, -gradient, 0.5, support, lower, upper, np.inf, 0.0)
    np.testing.assert_allclose(mirrored, -moved)
    for margin, length in ((100.0, 3.0), (-100.0, 3.0), (8.0, 1.0)):  # the margin is not linear further out
        far = step_to_boundary(0.0 * w, gradient, margin, support, 100.0 * lower, 100.0 * upper, np.inf, 0.0)
        np.testing.assert_allclose(far, -np.sign(margin) * length / 8.0)
    capped = np.asarray(clip_to_caps(10.0 * moved, lower, upper, 0.3))
    assert np.sqrt((capped**2).sum()) <= 0.3 * (1 + 1e-12) and (np.abs(capped) <= 0.1).all()


def test_a_blur_loses_nothing_at_borders():
    values = np.zeros((5, 7))
    values[0, 1], values[4, 6] = 2.0, 1.0
    blurred = np.asarray(_blurred(jnp.asarray(values), 1.0))
    np.testing.assert_allclose(blurred.sum(), 3.0)
    np.testing.assert_allclose(blurred[:3, :4].sum(), 2.0)  # it ends two pixels away
    assert blurred.argmax() == 1 and (blurred[3:, :4] == 0.0).all()


def test_caps_are_kept_to_the_digits_that_images_have():
    caps = RefineHyperparams(max_l2=2.0, max_linf=0.5)
    for beyond, excess in ((0.0, 0.0), (5e-6, 0.0), (2e-5, 2e-5), (0.01, 0.01)):
        for count in (4, 16):  # of the largest change alone, and of both
            image = np.zeros((8, 8, 1))
            image.reshape(-1)[:count] = 0.25 * (1 + beyond)
            np.testing.assert_allclose(excess_over_caps(image, 0 * image, caps, (0.0, 1.0)), excess, rtol=1e-9)
        image = np.full((8, 8, 1), 0.125 * (1 + beyond))  # of the norm alone
        np.testing.assert_allclose(excess_over_caps(image, 0 * image, caps, (0.0, 1.0)), excess, rtol=1e-9)
    assert last_digit(np.float32(0), 0.0, 255.0) == 2 * np.finfo(np.float32).eps


def test_power_is_the_largest_first_order_change_inside_the_bounds():
    random = np.random.default_rng(4)
    x, gradient = random.uniform(-1, 1, (4, 4, 2)), random.normal(size=(4, 4, 2))
    best = -np.min([gradient * (-1.0 - x), gradient * (1.0 - x)], axis=0)
    np.testing.assert_allclose(power(x, gradient, -1.0, 1.0), best.sum(-1))


def measured(image, x, max_l2, size):
    """Excess over the cap, patches, clusters, pixels and l2 norm."""
    mask, l2 = (image != x).any(-1), float(np.sqrt(((image - x) ** 2).sum()))
    excess = l2 / max_l2 - 1.0
    clusters = metrics.count_clusters_host(mask[None])[0]
    return excess if excess > 1e-5 else 0.0, touched(mask, size).sum(), clusters, mask.sum(), l2


def precedes(new, old, objective):
    first = {"patches": (0, 1, 2, 3, 4), "pixels": (0, 3, 1, 2, 4), "l2": (0, 4, 1, 2, 3)}[objective]
    better = [new[i] for i in first] < [old[i] for i in first]
    if objective == "patches" and new[2] > old[2] and new[0] >= old[0]:  # a cluster more must save eight patches
        better &= old[1] - new[1] >= 8 * (new[2] - old[2])
    return better


@functools.cache
def of_any_width():
    """The refinement of images in bounds of an odd width, its compiled step, and such an image."""
    algorithm = REFINE.bind(RefineSettings(), RefineHyperparams(), targeted=False, bounds=(-2.1179, 2.64), key=None)
    return algorithm, jax.jit(algorithm.step), np.random.default_rng(0).uniform(-2, -1, (8, 8, 1)).astype("f4")


def evaluated(logits, margin, slope, start):
    """The state after the first evaluation, of the image that was given."""
    algorithm, step, x = of_any_width()
    state = algorithm.init(Sample(x, np.int32(0), np.int32(-1), np.int32(0), start=start))
    return step(state, Evaluation(np.float32(logits), np.float32(margin), np.full(x.shape, slope, "f4")))


def test_what_is_tried_next_stays_inside_the_bounds():
    """Values that go to a bound come back into the caller's units with a rounding."""
    algorithm, _, x = of_any_width()
    point = np.asarray(algorithm.query(evaluated([-1, 0, 0], 1e6, -1, 0 * x + np.float32(2.6))))
    highest, unit = np.float32(2.64), np.float32(0.5 * (2.64 + 2.1179))
    assert (x + unit * ((highest - x) / unit)).max() > highest
    assert (point == highest).sum() >= 32 and point.max() == highest


@pytest.mark.parametrize("moved, logits, margin, slope, status", [
    (True, [-1, 0, 0], -1, 1, -1), (True, [1, 0, 0], 1, 1, Status.NOT_FOUND),
    (False, [1, 0, 0], 1, 1, Status.NOT_FOUND),
    (False, [-1, 0, 0], -1, np.nan, Status.ALREADY_MISCLASSIFIED), (True, [-1, 0, 0], -1, np.nan, Status.FOUND),
    (True, [1, np.nan, 0], np.nan, np.nan, Status.NON_FINITE), (True, [1, 0, -np.inf], 1, 1, Status.NON_FINITE),
    (True, [1, 0, 0], 1, np.nan, Status.NON_FINITE)])
def test_a_given_image_is_believed_as_far_as_the_model_confirms_it(moved, logits, margin, slope, status):
    algorithm, step, x = of_any_width()
    given = x - np.float32(0.1 * moved)
    state = evaluated(logits, margin, slope, given)
    outcome = algorithm.finish(state)
    assert int(state.status) == status and int(outcome.gradient_evals) == 1
    np.testing.assert_array_equal(outcome.adversarials, given if status == Status.FOUND else x)
    if status == -1:  # what was found stays true whatever the model says elsewhere
        state = step(state, Evaluation(np.float32([np.nan] * 3), np.float32(np.nan), np.full(x.shape, np.nan, "f4")))
        outcome = algorithm.finish(state)
        assert int(outcome.status) == Status.FOUND and bool(outcome.success)
        np.testing.assert_array_equal(outcome.adversarials, given)


@pytest.mark.parametrize("new, old, better", [
    ((0, 9, 1, 9, 2), (0, 9, 1, 9, 2), False), ((0, 9, 1, 8, 3), (0, 9, 1, 9, 2), True),
    ((0, 9, 1, 9, 3), (0, 9, 1, 9, 2), False),
    ((0, 9, 1, 9, 2), (0.1, 1, 1, 1, 1), True), ((0.2, 1, 1, 1, 1), (0.1, 9, 1, 9, 2), False),
    # One cluster more must save eight patches, unless the caps come nearer; one fewer need not save any.
    ((0, 12, 2, 9, 2), (0, 20, 1, 9, 2), True), ((0, 13, 2, 9, 2), (0, 20, 1, 9, 2), False),
    ((0, 4, 3, 9, 2), (0, 20, 1, 9, 2), True), ((0, 5, 3, 9, 2), (0, 20, 1, 9, 2), False),
    ((0.1, 20, 3, 9, 2), (0.2, 20, 1, 9, 2), True), ((0, 20, 1, 9, 2), (0, 20, 2, 9, 2), True)])
def test_fewer_patches_are_not_bought_with_fragments(new, old, better):
    score = [jnp.asarray(one, float) for one in (new, old)]
    assert bool(_precedes(*score, "patches")) == better == precedes(new, old, "patches")


@pytest.mark.parametrize("objective, max_l2, size, moves", [
    ("patches", 1.5, 2, ("shrink", "relocate", "thin")), ("pixels", np.inf, 8, ("thin", "shrink")),
    ("l2", np.inf, 2, ("scale",))])
def test_the_walk_equals_a_plain_one_whatever_the_model_says(objective, max_l2, size, moves):
    """Made-up evaluations: all that is counted, kept and tried next, against the rules written out once more."""
    settings = RefineSettings(objective, max_evals=80, max_repairs=4, max_failures=3, scales=(2.0, 1.0),
                              patch_size=size)
    num_walks = 1 if objective == "l2" else 2  # its supports depend on no blur
    algorithm = REFINE.bind(settings, RefineHyperparams(max_l2=max_l2), targeted=False, bounds=BOUNDS, key=None)
    step, ends = jax.jit(algorithm.step), set()
    for seed in range(4):
        random = np.random.default_rng(seed)
        x, noise = (random.uniform(-0.5, 0.5, (8, 8, 1)) for _ in range(2))
        # Sparse inside the cap, dense and beyond it, one pixel, and one pixel beyond it.
        given = np.where(random.random((8, 8, 1)) < (0.3, 1.0, 0.0, 0.0)[seed], x + (1 + seed) * noise, x).clip(-1, 1)
        x[0, 0], given[0, 0] = -0.9, (0.0, 0.0, 0.0, 0.9)[seed]
        score = lambda image: measured(image, x, max_l2, size)
        state = jax.tree.map(np.asarray, algorithm.init(Sample(x, np.int32(0), np.int32(-1), np.int32(0), start=given)))
        move = repairs = failures = resting = walks = evals = 0
        fraction, first_margin, blocked = 0.25, 0.0, np.zeros((8, 8), bool)
        while int(state.status) == -1:
            here, given_up = state.walk.point, state.walk.given_up
            fooled = bool(random.random() < (0.5, 0.15, 0.8, 0.5)[seed] or evals == 0)
            margin = float(random.uniform(-1, 0) if fooled else random.uniform(0, 1))
            state = jax.tree.map(np.asarray, step(
                state, Evaluation(np.asarray([margin, 0.0]), np.float64(margin), random.normal(size=x.shape))))
            fooled, evals = fooled and bool((here != x).any()), evals + 1
            if evals == 1:
                origin = current = best = here
                anew = succeeded = True
            else:
                succeeded = fooled and precedes(score(here), score(current), objective)
                repairs += 1
                first_margin = margin if repairs == 1 else first_margin
                hopeless = repairs >= 3 and margin > 0.7 * first_margin
                failed = not succeeded and (fooled or ((repairs >= 4 or hopeless) and score(current)[0] == 0.0))
                unit = score(current)[3 if moves[move] == "thin" else 1]
                single = fraction * unit <= 1.0
                blocked = (blocked | given_up if failed and single else blocked) & (not succeeded)
                if succeeded:
                    current, failures, resting, fraction = here, 0, 0, min(1.5 * fraction, 0.5)
                    best = here if precedes(score(here), score(best), objective) else best
                elif failed:
                    failures, fraction = failures + 1, 0.5 * fraction
                anew = succeeded or failed
            if anew:
                repairs = 0
                if failures >= 3 or (blocked | (current == x).all(-1)).all():
                    move, fraction, failures, resting = (move + 1) % len(moves), max(fraction, 0.1), 0, resting + 1
                    blocked = np.zeros_like(blocked)
                if resting >= len(moves):
                    move, fraction, resting, walks, current = 0, 0.25, 0, walks + 1, origin
            walk = state.walk
            assert (int(walk.move), int(walk.repairs), int(walk.failures), int(walk.resting), int(walk.round),
                    int(state.evals)) == (move, repairs, failures, resting, walks, evals)
            np.testing.assert_allclose(walk.fraction, fraction)
            np.testing.assert_array_equal(walk.blocked, blocked)
            np.testing.assert_array_equal(state.current.image, current)
            np.testing.assert_array_equal(state.best, best)
            kept, (_, patches, _, pixels, _) = score(best)[0] == 0.0, score(best)
            over = evals >= 80 or walks >= num_walks or (objective != "l2" and kept and patches <= 1 and pixels <= 1)
            assert int(state.status) == ((Status.FOUND if kept else Status.NOT_FOUND) if over else -1)
            # What is tried next lies in the bounds and, unless it is pulled inside the cap first, on the support.
            assert np.abs(walk.point).max() <= 1.0 and score(walk.point)[0] == 0.0
            assert walk.support.all() or score(current)[0] == 0.0 or not anew
            assert not (walk.point != x).any(-1)[~walk.support].any()
        outcome = algorithm.finish(state)
        np.testing.assert_array_equal(outcome.adversarials, best if outcome.success else x)
        ends.add((evals == 80, walks))
    assert len(ends) > 1


def random_network(key, dtype=jnp.float32, side=20, classes=4):
    keys = jax.random.split(key, 3)
    size = side * side * 3
    params = (jax.random.normal(keys[0], (size, 16), dtype) * 0.1,
              jax.random.normal(keys[1], (16, classes), dtype))
    x = jax.random.uniform(keys[2], (6, side, side, 3), dtype, -0.9, 0.9)
    return params, x, two_layers(params, x).argmax(-1).astype(jnp.int32)


def two_layers(params, x):
    first, second = params
    return jnp.tanh(x.reshape(x.shape[0], -1) @ first) @ second


def fools(params, images, y):
    return np.asarray(two_layers(params, images).argmax(-1)) != np.asarray(y)


def numbers(x, adversarials):
    measured = metrics.image_metrics(np.asarray(x), np.asarray(adversarials), bounds=BOUNDS)
    return {"patches": measured.patch_count, "pixels": measured.changed_pixels,
            "clusters": measured.num_clusters, "l2": measured.l2}


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["patches", "l2", "pixels", "clusters"])
def test_never_worse_than_what_was_given_over_random_models(objective):
    """Random networks and dense starts; one compiled program for all."""
    better = total = 0
    for seed in range(8):
        params, x, y = random_network(jax.random.key(seed))
        given = jnp.clip(x + 0.5 * jnp.sign(jax.random.normal(jax.random.key(99 + seed), x.shape, x.dtype)),
                         *BOUNDS)
        fooled = fools(params, given, y)
        result = gse_jax.refine(params, two_layers, x, given, y, objective=objective, max_evals=40,
                                bounds=BOUNDS)
        np.testing.assert_array_equal(result.success, fooled)
        assert fools(params, result.adversarials, y)[fooled].all()
        np.testing.assert_array_equal(result.adversarials[~fooled], x[~fooled])
        before, after = numbers(x, given)[objective], numbers(x, result.adversarials)[objective]
        assert (after <= before)[fooled].all()
        better += (after < before)[fooled].sum()
        total += fooled.sum()
        assert np.asarray(result.gradient_evals).max() <= 40
        assert float(jnp.abs(result.adversarials).max()) <= 1.0
    assert total > 10
    # A dense start is one cluster already.
    assert better == 0 if objective == "clusters" else better > 0.5 * total, (better, total)


@pytest.mark.slow
@pytest.mark.parametrize("targeted", [False, True])
def test_the_result_of_an_attack_becomes_sparser_inside_the_caps(targeted):
    params, apply_fn, x, y = toy(jnp.float32)
    targets = (y + 2) % 5 if targeted else None
    attacked = gse_jax.attack(params, apply_fn, x, y, targets=targets, method="pgd", bounds=BOUNDS)
    found = np.asarray(attacked.status) == Status.FOUND
    assert found.sum() >= 3
    free = gse_jax.refine(params, apply_fn, x, attacked.adversarials, y, targets=targets,
                          bounds=BOUNDS)
    norms = numbers(x, attacked.adversarials)["l2"][found]
    capped = gse_jax.refine(params, apply_fn, x, attacked.adversarials, y, targets=targets,
                            max_l2=float(norms.max()), max_linf=0.9, bounds=BOUNDS)
    for result in (free, capped):
        np.testing.assert_array_equal(np.asarray(result.status)[found], Status.FOUND)
        after = numbers(x, result.adversarials)
        assert after["patches"][found].mean() < 0.5 * 169
        assert result.method == "refine" and result.preset == "refine patches"
    inside = numbers(x, capped.adversarials)["l2"][found]
    assert (inside <= norms.max() * (1 + 1e-5)).all()
    assert np.abs(np.asarray(capped.adversarials - x)).max() <= 0.9 * (1 + 1e-5)


def test_an_image_that_needs_the_whole_of_a_small_cap_is_inside_it():
    """x + w is rounded to the digits of x, of which a small w has few."""
    cap = np.float32(0.5 / 255)
    sign = np.sign(np.random.default_rng(0).normal(size=64)).astype("f4")
    x = np.random.default_rng(1).uniform(0.6, 0.95, (4, 8, 8, 1)).astype("f4")
    given = x - cap * sign.reshape(8, 8, 1)
    assert (np.abs(given.astype("f8") - x).max(axis=(1, 2, 3)) > cap * (1 + 1e-5)).all()

    def apply_fn(params, x):  # class 0 until 0.9999 of the cap is used
        score = ((x.reshape(len(x), -1) - params[None]) @ sign)[:, None]
        return jnp.concatenate([score, jnp.zeros_like(score)], axis=1)

    for image, adversarial in zip(x[:, None], given[:, None]):
        params = image.reshape(-1) - np.float32(0.9999) * cap * sign
        result = gse_jax.refine(params, apply_fn, image, adversarial, np.zeros(1, np.int32), max_linf=float(cap),
                                max_evals=3)
        assert bool(result.success[0])


@pytest.mark.slow
def test_an_image_beyond_the_cap_is_pulled_inside_or_not_found():
    """Linear model: the smallest l2 norm that fools is known."""
    random = np.random.default_rng(5)
    kernel = jnp.asarray(random.normal(size=(192, 2)), jnp.float32)
    params = (kernel, jnp.zeros(2, jnp.float32))
    x = jnp.asarray(random.uniform(-0.2, 0.2, (4, 8, 8, 3)), jnp.float32)
    y = linear_logits(params, x).argmax(-1).astype(jnp.int32)
    slope = (kernel[:, 0] - kernel[:, 1]).reshape(8, 8, 3)
    sign = jnp.where(y == 0, -1.0, 1.0).astype(jnp.float32)[:, None, None, None]
    given = jnp.clip(x + sign * 0.5 * jnp.sign(slope)[None], *BOUNDS)
    logits = linear_logits(params, x)
    smallest = np.abs(np.asarray(logits[:, 0] - logits[:, 1])) / float(jnp.linalg.norm(slope))
    cap = float(np.median(smallest) * 1.05)
    assert (numbers(x, given)["l2"] > cap).all()
    result = gse_jax.refine(params, linear_logits, x, given, y, max_l2=cap, bounds=BOUNDS)
    possible = smallest < cap / 1.02
    assert possible.any() and (smallest > cap).any()
    np.testing.assert_array_equal(np.asarray(result.status)[possible], Status.FOUND)
    np.testing.assert_array_equal(np.asarray(result.status)[smallest > cap], Status.NOT_FOUND)
    assert (numbers(x, result.adversarials)["l2"] <= cap * (1 + 1e-5)).all()
    # Least l2 norm, of a linear model: the projection onto the boundary.
    least = gse_jax.refine(params, linear_logits, x, given, y, objective="l2", bounds=BOUNDS)
    ratio = numbers(x, least.adversarials)["l2"] / smallest
    assert (ratio >= 1.0 - 1e-5).all() and (ratio <= 1.1).all()


def test_a_shorter_norm_is_tried_ever_closer_to_what_failed():
    """Far from the image the margin is not what its slope there says: after failures the way back gets shorter."""
    x = jnp.full((8, 8, 1), 0.5)
    given = x.at[2:4, 2:4].set(0.9)
    count = jnp.zeros((), jnp.int32)
    samples = jax.tree.map(lambda a: a[None], Sample(x, count, count - 1, count, start=given))
    attack = REFINE.bind(RefineSettings("l2"), RefineHyperparams(*map(jnp.asarray, RefineHyperparams())), targeted=False,
                         bounds=BOUNDS)

    def only_given(images):
        outside = jnp.abs(images - given[None]).max((1, 2, 3)) > 0.0
        return jnp.stack([jnp.where(outside, 1.0, -1.0), jnp.zeros(len(images))], 1)

    share = [float(jnp.linalg.norm(attack.query(jax.tree.map(lambda a: a[0], state)) - x) / jnp.linalg.norm(given - x))
             for state in states_over(attack, only_given, samples, 24)]
    assert min(share) < 0.76 and 0.98 < max(share) < 1.0


@pytest.mark.slow
def test_one_pixel_is_the_end_for_the_count_not_for_the_norm():
    """A single changed pixel in the corner, much larger than it need be."""
    kernel = jnp.zeros((192, 2)).at[0, 1].set(1.0)
    params = (kernel, jnp.asarray([0.1, 0.0]))
    x = jnp.zeros((1, 8, 8, 3))
    given = x.at[0, 0, 0, 0].set(0.9)
    y = jnp.zeros(1, jnp.int32)
    refine = functools.partial(gse_jax.refine, params, linear_logits, x, given, y, bounds=BOUNDS)
    assert int(refine().gradient_evals[0]) == 1
    for options in (dict(objective="l2"), dict(max_l2=0.3)):
        result = refine(**options)
        assert result.status[0] == Status.FOUND
        assert 0.1 < float(jnp.abs(result.adversarials).sum()) <= 0.3


@pytest.mark.slow
def test_lanes_order_units_and_jit_do_not_matter():
    params, x, y = random_network(jax.random.key(3), jnp.float64)
    given = jnp.clip(x + 0.7 * jnp.sign(jax.random.normal(jax.random.key(7), x.shape, x.dtype)),
                     *BOUNDS)
    assert fools(params, given, y).sum() >= 2

    def refine(x, given, y, bounds=BOUNDS, **options):
        return gse_jax.refine(params, two_layers, x, given, y, max_evals=30, max_l2=10.0,
                              bounds=bounds, **options)

    expected = refine(x, given, y, lanes=4)
    order = jnp.asarray([3, 0, 5, 1, 4, 2])
    for result, indices in ((refine(x, given, y, lanes=1), slice(None)),
                            (refine(x[order], given[order], y[order], lanes=4), order),
                            (jax.jit(refine)(x, given, y), slice(None))):
        np.testing.assert_array_equal(result.status, expected.status[indices])
        np.testing.assert_array_equal(result.gradient_evals, expected.gradient_evals[indices])
        np.testing.assert_allclose(result.adversarials, expected.adversarials[indices], atol=1e-9)

    # The same images in [0, 1]: caps are in the caller's units.
    def in_unit_range(params, x):
        return two_layers(params, 2.0 * x - 1.0)

    unit = gse_jax.refine(params, in_unit_range, (x + 1.0) / 2.0, (given + 1.0) / 2.0, y,
                          max_evals=30, max_l2=5.0, lanes=4)
    np.testing.assert_allclose(2.0 * unit.adversarials - 1.0, expected.adversarials, atol=1e-9)


@pytest.mark.slow
def test_states_of_images_that_cannot_be_refined():
    params, apply_fn, x, y = toy(jnp.float32)
    given = gse_jax.attack(params, apply_fn, x, y, method="pgd", bounds=BOUNDS).adversarials
    given = given.at[0].set(jnp.clip(x[0] + 1e-4, *BOUNDS))  # not adversarial
    given = given.at[1].set(x[1])  # unchanged and classified correctly
    y = y.at[2].set((y[2] + 1) % 5)
    given = given.at[2].set(x[2])  # unchanged and misclassified
    result = gse_jax.refine(params, apply_fn, x, given, y, max_evals=10, bounds=BOUNDS)
    assert [Status(s) for s in np.asarray(result.status)[:3]] == [
        Status.NOT_FOUND, Status.NOT_FOUND, Status.ALREADY_MISCLASSIFIED]
    np.testing.assert_array_equal(result.adversarials[:3], x[:3])
    empty = gse_jax.refine(params, apply_fn, x[:0], given[:0], y[:0], bounds=BOUNDS)
    assert empty.adversarials.shape == (0, 20, 20, 3)


@pytest.mark.parametrize("change, error, words", [
    (dict(objective="group"), ValueError, "objective='group' must be one of 'patches'"),
    (dict(max_l2=0.0), ValueError, "max_l2=0 must be > 0"),
    (dict(max_linf=-1.0), ValueError, "max_linf=-1 must be > 0"),
    (dict(max_l2=float("nan")), ValueError, "max_l2=nan must be > 0"),
    (dict(max_l2=-3.0, bounds=(-4.0, 4.0)), ValueError, "max_l2=-3 must be > 0"),
    (dict(max_l2=True), TypeError, "max_l2 must be a number in the units of bounds, got True"),
    (dict(max_l2=np.ones(2)), TypeError, "max_l2 must be a number in the units of bounds, got array"),
    (dict(max_linf="1"), TypeError, "max_linf must be a number in the units of bounds, got '1'"),
    (dict(max_evals=0), ValueError, "max_evals=0 must be >= 1"),
    (dict(adversarials=np.zeros((2, 20, 20, 3), np.float32)), ValueError, "the shape of x"),
    (dict(adversarials=np.zeros((6, 20, 20, 3))), TypeError, "the dtype of x, float32"),
    (dict(adversarials=np.full((6, 20, 20, 3), 2.0, np.float32)), ValueError, "image 0 is not"),
    (dict(adversarials=np.full((6, 20, 20, 3), -2.0, np.float32)), ValueError, "image 0 is not"),
    (dict(adversarials=np.full((6, 20, 20, 3), np.nan, np.float32)), ValueError, "finite"),
    (dict(adversarials=gse_jax.AttackResult(*[np.zeros(6)] * 6)), TypeError, "result.adversarials"),
])
def test_wrong_arguments_get_one_clear_line(change, error, words):
    params, apply_fn, x, y = toy(jnp.float32)
    arguments = {"adversarials": x, "bounds": BOUNDS, **change}
    with pytest.raises(error, match=words) as caught:
        gse_jax.refine(params, apply_fn, x, y=y, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_gse_refined_beats_gse_at_the_published_budget_on_the_toy():
    params, apply_fn, x, y = toy(jnp.float32)
    plain = gse_jax.attack(params, apply_fn, x, y, bounds=BOUNDS)
    refined = gse_jax.attack(params, apply_fn, x, y, method="gse_refined", bounds=BOUNDS)
    found = np.asarray(plain.success)
    assert found.any() and np.asarray(refined.success)[found].all()
    before, after = numbers(x, plain.adversarials), numbers(x, refined.adversarials)
    assert after["patches"][found].mean() < before["patches"][found].mean()
    assert np.asarray(refined.gradient_evals)[found].max() <= 362


@pytest.mark.slow
@pytest.mark.parametrize("max_evals", [2, 9])
def test_the_budget_is_never_exceeded_and_a_larger_one_finds_more(max_evals):
    """GSE's share included: with a small step GSE needs many steps to its first success."""
    params, apply_fn, x, y = toy(jnp.float32)
    settings, hyperparams = gse_jax.preset("gse_refined", "cifar10", False)
    result = {}
    for budget in (max_evals, 60):
        result[budget] = gse_jax.attack(
            params, apply_fn, x, y, method="gse_refined", bounds=BOUNDS, lanes=4,
            settings=dataclasses.replace(settings, max_evals=budget),
            hyperparams=hyperparams._replace(step_size=0.002))
        evals = np.asarray(result[budget].gradient_evals)
        assert evals.max() <= budget and evals.min() >= 1
        gave_up = np.asarray(result[budget].status) == Status.NOT_FOUND
        np.testing.assert_array_equal(evals[gave_up], budget)
        assert not np.asarray(result[budget].success)[gave_up].any()
    found, later = (np.asarray(r.success) for r in result.values())
    assert (later >= found).all()
    if max_evals < 3:
        assert not found.any()  # one gradient of GSE, one evaluation of its iterate
