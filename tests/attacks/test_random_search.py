"""The moves of Sparse-RS: budgets, schedules, and what a move may change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gse_jax
from gse_jax.attacks.baselines import random_search_moves as moves
from gse_jax.attacks.baselines.random_search import SparseRSSettings

SHAPE = (12, 15, 3)
MOVE_PIXELS = jax.jit(moves.move_pixels, static_argnums=2)


def keys(count):
    return jax.random.split(jax.random.key(0), count)


def test_schedule_of_the_paper():
    alpha = jnp.asarray(0.8)
    for kind, table in (("l0", {0: 1, 1: 2, 50: 2, 51: 4, 201: 5, 501: 6, 1001: 8, 2001: 10,
                                4001: 12, 6001: 15, 8001: 20, 9999: 20}),
                        ("patches", {0: 1, 10: 1, 11: 2, 51: 4, 201: 8, 501: 16, 1001: 32,
                                     3000: 32, 4001: 64, 7000: 64, 8001: 128})):
        for query, divisor in table.items():
            for scale in (1, 3):  # the schedule stretches with the number of queries
                now = jnp.asarray(scale * query)
                got = moves.redrawn_fraction(kind, now, scale * 10_000, alpha)
                np.testing.assert_allclose(got, 0.8 / divisor)


@pytest.mark.parametrize("fraction, count", [(0.8, 16), (0.35, 7), (0.01, 1), (1.0, 20)])
def test_pixels_are_exchanged_within_the_budget(fraction, count):
    budget = 20
    pattern = jax.device_get(MOVE_PIXELS(jax.random.key(1), moves.empty_pattern(SHAPE), budget, fraction, True))
    assert int(pattern.mask.sum()) == budget and 0.2 < pattern.high[pattern.mask].mean() < 0.8
    seen = np.zeros(SHAPE[:2], bool)
    for key in keys(40):
        moved = jax.device_get(MOVE_PIXELS(key, pattern, budget, fraction, False))
        assert int(moved.mask.sum()) == budget
        gone, new = pattern.mask & ~moved.mask, moved.mask & ~pattern.mask
        assert int(gone.sum()) == int(new.sum()) == count
        stayed = pattern.mask & moved.mask
        np.testing.assert_array_equal(moved.high[stayed], pattern.high[stayed])
        seen |= np.asarray(new)
    assert seen.sum() > 30  # anywhere, not always the same


def test_a_budget_of_the_whole_image_leaves_nothing_to_exchange():
    total = SHAPE[0] * SHAPE[1]
    full = moves.move_pixels(jax.random.key(1), moves.empty_pattern(SHAPE), total,
                             jnp.asarray(0.5), jnp.asarray(True))
    moved = moves.move_pixels(jax.random.key(2), full, total, jnp.asarray(0.5), jnp.asarray(False))
    assert bool(full.mask.all()) and bool(moved.mask.all())


def test_patches_stay_squares_inside_the_image():
    move = jax.jit(lambda key, pattern, query, begin: moves.move_patch(
        key, pattern, 18, jnp.asarray(0.3), begin, query, 1000))
    pattern = move(jax.random.key(1), moves.empty_pattern(SHAPE), jnp.asarray(0), jnp.asarray(True))
    corners = set()
    for query, key in enumerate(keys(60)):
        moved = move(key, pattern, jnp.asarray(query), jnp.asarray(False))
        top, left = map(int, moved.corner)
        corners.add((top, left))
        expected = np.zeros(SHAPE[:2], bool)
        expected[top:top + 4, left:left + 4] = True  # isqrt(18) = 4
        np.testing.assert_array_equal(moved.mask, expected)
        if (top, left) == tuple(map(int, pattern.corner)):  # recoloured: one square, one colour
            changed = np.asarray((moved.high != pattern.high).any(-1)) & expected
            assert changed.sum() <= 4
        else:  # shifted with its colours
            assert query % 5 == 0
            np.testing.assert_array_equal(moved.high[top:top + 4, left:left + 4],
                                          pattern.high[tuple(slice(int(c), int(c) + 4)
                                                             for c in pattern.corner)])
        pattern = moved
    assert len(corners) > 3


def test_patches_shift_ever_more_rarely():
    move = jax.jit(lambda key, pattern, query, begin: moves.move_patch(
        key, pattern, 16, jnp.asarray(0.3), begin, query, 10_000))
    pattern = move(jax.random.key(1), moves.empty_pattern(SHAPE), jnp.asarray(0), jnp.asarray(True))
    for query, shifts in ((995, True), (1005, False), (1010, True), (3010, False), (3020, True)):
        corners = [move(key, pattern, jnp.asarray(query), jnp.asarray(False)).corner for key in keys(9)]
        assert any((corner != pattern.corner).any() for corner in corners) == shifts


def test_frames_are_the_border_within_the_budget():
    assert moves.frame_width(49, 12, 15) == 0 and moves.frame_width(50, 12, 15) == 1
    assert moves.frame_width(91, 12, 15) == 1 and moves.frame_width(92, 12, 15) == 2
    begin = jnp.asarray(True)
    pattern = moves.move_frame(jax.random.key(1), moves.empty_pattern(SHAPE), 92, jnp.asarray(0.05),
                               begin)
    expected = np.ones(SHAPE[:2], bool)
    expected[2:-2, 2:-2] = False
    moved = moves.move_frame(jax.random.key(2), pattern, 92, jnp.asarray(0.05), ~begin)
    for one in (pattern, moved):
        np.testing.assert_array_equal(one.mask, expected)
    changed = int(((moved.high != pattern.high).any(-1) & expected).sum())
    assert 1 <= changed <= 4 * 4  # four seeds of 2 x 2 pixels


@pytest.mark.slow
def test_a_frame_may_be_the_whole_image():
    """20 x 9 pixels: five thick, more than half the width."""
    pattern = moves.move_frame(jax.random.key(1), moves.empty_pattern((20, 9, 3)), 180,
                               jnp.asarray(0.05), jnp.asarray(True))
    assert bool(pattern.mask.all())


@pytest.mark.parametrize("settings, message", [
    (SparseRSSettings(num_pixels=0), "num_pixels=0"),
    (SparseRSSettings(num_pixels=25.6), "num_pixels=25.6 must be a whole number"),
    (SparseRSSettings(num_pixels=256), "none is left to exchange"),
    (SparseRSSettings(num_pixels=1000), "num_pixels=1000"),
    (SparseRSSettings(num_pixels=20, kind="frames"), "at least 60"),
    (SparseRSSettings(num_pixels=20, kind="lines"), "'l0', 'patches', 'frames'"),
    (SparseRSSettings(num_pixels=20, max_queries=10**6), "200000"),
])
def test_budgets_that_cannot_be_met_are_refused(settings, message):
    x = jnp.zeros((1, 16, 16, 3))
    with pytest.raises(ValueError, match=message):
        gse_jax.attack((), lambda _, x: x.mean((1, 2)), x, jnp.zeros(1, jnp.int32),
                       method="sparse_rs", settings=settings)


def test_no_gradient_is_ever_taken():
    """A model whose backward pass would fail at run time: the attack never runs it."""
    calls = []

    @jax.custom_vjp
    def model(x):
        return x.mean((1, 2))

    def backward(_, cotangent):
        jax.debug.callback(lambda: calls.append(1))
        return (jnp.zeros((cotangent.shape[0], 16, 16, 3), cotangent.dtype),)

    model.defvjp(lambda x: (model(x), None), backward)
    x = jnp.full((2, 16, 16, 3), 0.5).at[..., 0].set(0.9)
    options = dict(method="sparse_rs", lanes=1,
                   settings=SparseRSSettings(num_pixels=30, max_queries=20))
    result = gse_jax.attack((), lambda _, x: model(x), x, jnp.zeros(2, jnp.int32), **options)
    assert int(result.gradient_evals.max()) == 0 and int(result.forward_evals.min()) > 1
