"""The refinement: which image it tries next, and by which margin."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gse_jax import Status, ops
from gse_jax.attacks.algorithm import Evaluation, Sample
from gse_jax.attacks.refinement import REFINE, RefineHyperparams, RefineSettings
from gse_jax.attacks.refinement.supports import power, propose


@functools.cache
def in_four(objective):
    """The refinement in bounds of width 4, where walks differ in blur, and its compiled step."""
    def bound(hyperparams):
        return REFINE.bind(RefineSettings(objective, scales=(0.4, 3.0), patch_size=3), hyperparams, targeted=False,
                           bounds=(0.0, 4.0), key=None)

    return bound(RefineHyperparams()), jax.jit(lambda hyperparams, *rest: bound(hyperparams).step(*rest))


def first_move(objective, max_l2=np.inf, max_linf=np.inf, walks=0):
    """Image, given perturbation, the margin's gradient and the logits there, what is tried next, its support."""
    random = np.random.default_rng(0)
    x = random.uniform(0.5, 1.5, (12, 12, 1))
    before = np.where(random.random(x.shape) < 0.3, random.uniform(0.2, 0.5, x.shape), 0.0)
    gradient = -0.6 * before / (before**2).sum() + 0.02 * random.normal(size=x.shape)
    logits = np.asarray([-0.1, 0.0, 0.2])
    algorithm, step = in_four(objective)
    state = algorithm.init(Sample(x, np.int32(0), np.int32(-1), np.int32(0), start=x + 2.0 * before))
    state = state._replace(walk=state.walk._replace(round=jnp.asarray(walks, jnp.int32)))
    hyperparams = RefineHyperparams(*map(np.float64, (max_l2, max_linf)))
    state = step(jax.tree.map(np.float64, hyperparams), state, Evaluation(logits, np.float64(-0.3), gradient / 2.0))
    return x, before, gradient, logits, (np.asarray(algorithm.query(state)) - x) / 2.0, np.asarray(state.walk.support)


@pytest.mark.parametrize("objective, max_l2", [("patches", np.inf), ("l2", np.inf), ("l2", 1.8)])
def test_what_is_tried_next_crosses_the_linearised_boundary(objective, max_l2):
    """By the overshoot, by a tenth of it where only the norm shrinks; then from a quarter of the way back."""
    _, before, gradient, logits, w, support = first_move(objective, max_l2)
    norm = np.linalg.norm(before)
    assert norm > 1.8
    only_scaled = objective == "l2" and max_l2 > norm
    beyond = 0.25 * logits.std() * (0.1 if only_scaled else 1.0)
    np.testing.assert_allclose(-0.3 + (gradient * (w - before)).sum(), -beyond, rtol=1e-9)
    begin = before * (0.75 if only_scaled else min(1.0, max_l2 / norm))
    step = ((w - begin) / gradient)[support]
    np.testing.assert_allclose(step, step[0, 0], rtol=1e-9)
    mask = before.any(-1)
    assert support.all() if norm > max_l2 else (support == mask).all() if only_scaled else (support < mask).any()


def test_a_norm_is_pulled_back_once_and_then_repaired_where_it_stands():
    """Pulled back in every repair, what steps of limited length gain is lost again."""
    random = np.random.default_rng(1)
    x, before = np.full((12, 12, 1), 2.0), random.uniform(0.2, 0.5, (12, 12, 1))
    algorithm, step = in_four("l2")
    hyperparams = jax.tree.map(np.float64, RefineHyperparams())
    state = algorithm.init(Sample(x, np.int32(0), np.int32(-1), np.int32(0), start=x + 2.0 * before))
    gradient, logits = random.normal(size=x.shape), np.asarray([-0.1, 0.0, 0.2])
    state = step(hyperparams, state, Evaluation(logits, np.float64(-0.3), gradient / 2.0))
    w = (np.asarray(algorithm.query(state)) - x) / 2.0
    state = step(hyperparams, state, Evaluation(-logits, np.float64(0.1), gradient / 2.0))  # not adversarial
    moved = (np.asarray(algorithm.query(state)) - x) / 2.0 - w
    np.testing.assert_allclose(moved / gradient, (moved / gradient)[0, 0, 0], rtol=1e-7)
    assert (gradient * moved).sum() < -0.1


def test_equal_logits_are_crossed_by_more_than_they_are_rounded():
    """Of two classes the logits are equal at the boundary: their deviation says nothing."""
    x, before = np.full((12, 12, 1), 2.0), np.full((12, 12, 1), 0.3)
    algorithm, step = in_four("l2")
    hyperparams = jax.tree.map(np.float64, RefineHyperparams())
    state = algorithm.init(Sample(x, np.int32(0), np.int32(-1), np.int32(0), start=x + 2.0 * before))
    gradient = np.random.default_rng(2).normal(size=x.shape)
    state = step(hyperparams, state, Evaluation(np.asarray([-1e6, 1e-9 - 1e6]), np.float64(-0.3), gradient / 2.0))
    w = (np.asarray(algorithm.query(state)) - x) / 2.0
    np.testing.assert_allclose((gradient * (w - before)).sum() - 0.3, -16 * np.finfo(float).eps * 1e6, rtol=1e-4)


def test_single_pixels_are_ranked_nearly_without_blur_where_they_alone_count():
    x, before, gradient, _, _, support = first_move("pixels", walks=1)
    mask, powers = before.any(-1), power(0.0, gradient, -x / 2, (4 - x) / 2)
    thinned = [np.asarray(propose(
        powers, mask, 0 * mask > 0, 0, 0.25, float(ops.count_patches(mask, 3)), float(mask.sum()), 3.0,
        moves=("thin", "shrink"), patch_size=3, thin_blur=share).support) for share in (0.17, 0.5)]
    np.testing.assert_array_equal(support, thinned[0])
    assert (thinned[0] != thinned[1]).any()


def test_supports_are_ranked_by_power_inside_the_caps_under_the_blur_of_the_walk():
    for walks, sigma in enumerate((0.4, 3.0)):
        x, before, gradient, _, _, support = first_move("patches", max_linf=0.6, walks=walks)
        mask = before.any(-1)
        powers = power(0.0, gradient, np.maximum(-x / 2, -0.6), np.minimum((4 - x) / 2, 0.6))
        proposal = jax.jit(propose, static_argnames=("moves", "patch_size"))(
            powers, mask, 0 * mask > 0, 0, 0.25, float(ops.count_patches(mask, 3)), float(mask.sum()), sigma,
            moves=("shrink", "relocate", "thin"), patch_size=3)
        np.testing.assert_array_equal(support, proposal.support)
        assert walks == 0 or (support != last).any()
        last = support


@pytest.mark.parametrize("targeted, told", [
    (True, [([1, 0.5, 3], -2, -1), ([1, 5, 3], 2, Status.NOT_FOUND)]),
    (False, [([1, 5, 3], -4, -1), ([4, 0.5, 3], 1, Status.NOT_FOUND)])])
def test_the_margin_is_that_of_the_target_or_of_the_label(targeted, told):
    algorithm = REFINE.bind(RefineSettings("l2"), RefineHyperparams(), targeted=targeted, bounds=(-1.0, 1.0), key=None)
    x, step = np.zeros((8, 8, 1)), jax.jit(algorithm.step)
    state = algorithm.init(Sample(x, np.int32(0), np.int32(2), np.int32(0), start=x + 0.5))
    for logits, margin, status in told:
        logits = np.asarray(logits, float)
        assert float(algorithm.loss(state, logits)) == margin
        assert int(step(state, Evaluation(logits, np.float64(margin), np.ones_like(x))).status) == status
