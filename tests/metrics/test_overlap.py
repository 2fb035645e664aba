"""The overlap score and its control against a loop over all placements."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gse_jax import metrics


def make_case(count=6, shape=(7, 9)):
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 1, (count, *shape, 3)).astype(np.float32)
    changed = rng.random((count, *shape)) < np.linspace(0.02, 0.6, count).reshape(-1, 1, 1)
    maps = rng.normal(size=(count, *shape)).astype(np.float32)
    return x, np.where(changed[..., None], x + 0.5, x).astype(np.float32), maps


def loop_overlap(mask, region):
    """Score, mean, deviation and p-value over all cyclic shifts of one mask."""
    scores = []
    for i in range(mask.shape[0]):
        for j in range(mask.shape[1]):
            moved = np.roll(mask, (i, j), (0, 1))
            scores.append((moved & region).sum() / max(mask.sum(), 1))
    scores = np.array(scores)
    return scores[0], scores.mean(), scores.std(), (scores >= scores[0] - 1e-9).mean()


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
def test_overlap_equals_a_loop_over_all_placements(share):
    x, adversarials, maps = make_case()
    got = metrics.overlap_score(x, adversarials, maps, top_share=share)
    region = np.asarray(metrics.salient_region(maps, share))
    mask = (x != adversarials).any(-1)
    want = [loop_overlap(m, r) for m, r in zip(mask, region, strict=True)]
    np.testing.assert_allclose(np.stack(got, axis=1), want, rtol=1e-5, atol=1e-6)


def test_salient_region_holds_the_largest_values():
    maps = np.random.default_rng(1).permutation(63).reshape(1, 7, 9).astype(np.float32)
    region = np.asarray(metrics.salient_region(maps, 0.2))
    assert sorted(maps[region].tolist()) == list(range(51, 63))  # floor(0.2 * 63) = 12 of them.
    assert not metrics.salient_region(np.ones((1, 7, 9), np.float32)).any()
    for share in (0, 1):
        with pytest.raises(ValueError, match="top_share"):
            metrics.salient_region(maps, share)


def test_inside_outside_and_chance():
    shape = (2, 224, 224)
    maps = np.zeros(shape, np.float32)
    maps[:, 50:150, 50:150] = 1 + np.random.default_rng(0).random((2, 100, 100))
    maps[:, 60:100, 60:100] += 1
    x = np.zeros((*shape, 3), np.float32)
    adversarials = x.copy()
    adversarials[0, 60:100, 60:100] = 1  # The brightest part of the map's square.
    adversarials[1, 160:200, 160:200] = 1  # Outside.
    got = metrics.overlap_score(x, adversarials, maps, top_share=0.199)
    np.testing.assert_array_equal(got.score, [1, 0])
    # 0.199 * 224 ** 2 = 9985.02: the region is nearly the square, and chance is its area.
    np.testing.assert_allclose(got.control, [9985 / 224**2] * 2, rtol=1e-5)
    assert got.p_value[0] < 0.1
    np.testing.assert_allclose(got.p_value[1], 1, rtol=1e-6)


def test_never_nan_and_no_images():
    x, adversarials, maps = make_case()
    for changed, heat in ((x, maps), (adversarials, np.ones_like(maps))):
        got = metrics.overlap_score(x, changed, heat)
        want = [[0.0] * 6, [0.0] * 6, [0.0] * 6, [1.0] * 6]
        np.testing.assert_allclose(jnp.stack(got), want, rtol=1e-6)
    none = metrics.overlap_score(x[:0], x[:0], maps[:0])
    assert [field.shape for field in none] == [(0,)] * 4
    with pytest.raises(ValueError, match="do not fit"):
        metrics.overlap_score(x, adversarials, maps[:, 1:])


def test_float64_and_vmap():
    x, adversarials, maps = make_case()
    want = metrics.overlap_score(x, adversarials, maps)
    split = [part.reshape(3, 2, *part.shape[1:]) for part in (x, adversarials, maps)]
    got = jax.vmap(metrics.overlap_score)(*split)
    np.testing.assert_allclose(got.score.reshape(-1), want.score, rtol=1e-6)
    with jax.enable_x64(True):
        double = metrics.overlap_score(x.astype("f8"), adversarials.astype("f8"), maps)
        assert double.control.dtype == jnp.float64
        np.testing.assert_allclose(double.control_deviation, want.control_deviation, rtol=1e-5)
