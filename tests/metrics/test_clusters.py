"""Connected components, in the graph and on the host, against SciPy image by image."""

import jax
import numpy as np
import pytest
from scipy import ndimage

from gse_jax import metrics
from gse_jax import ops

STRUCTURES = {4: [[0, 1, 0], [1, 1, 1], [0, 1, 0]], 8: [[1] * 3] * 3}


def reference(mask, connectivity):
    return [ndimage.label(one, STRUCTURES[connectivity])[1] for one in mask]


def spiral(side):
    """One path of a single pixel's width that winds to the middle: the hardest shape."""
    mask = np.zeros((side, side), bool)
    row, column, step, turns = 0, 0, (0, 1), 0
    mask[0, 0] = True
    while turns < 2:
        ahead = row + step[0], column + step[1]
        beyond = row + 2 * step[0], column + 2 * step[1]
        inside = 0 <= ahead[0] < side and 0 <= ahead[1] < side
        free = not (0 <= beyond[0] < side and 0 <= beyond[1] < side) or not mask[beyond]
        if inside and free and not mask[ahead]:
            row, column = ahead
            mask[ahead] = True
            turns = 0
        else:
            step = step[1], -step[0]
            turns += 1
    return mask


def special_masks(side):
    checkers = np.indices((side, side)).sum(0) % 2 == 0
    comb = np.zeros((side, side), bool)
    comb[::2], comb[-1] = True, True
    shapes = [np.zeros((side, side), bool), np.ones((side, side), bool), spiral(side)]
    return np.stack([*shapes, ~spiral(side), checkers, comb, comb.T])


def test_the_spiral_is_one_long_path():
    for side in (32, 224):
        mask = spiral(side)
        assert ndimage.label(mask)[1] == 1
        assert mask.sum() > side * side / 2 - side


@pytest.mark.parametrize("connectivity", [4, 8])
def test_thousand_random_masks(connectivity):
    rng = np.random.default_rng(connectivity)
    sparse = rng.random((500, 32, 32)) < np.linspace(0, 1, 500).reshape(-1, 1, 1)
    noise = ndimage.gaussian_filter(rng.normal(size=(500, 32, 32)), (0, 1.5, 1.5))
    blobs = noise > np.quantile(noise, np.linspace(0.05, 0.95, 500)).reshape(-1, 1, 1)
    mask = np.concatenate([sparse, blobs])
    want = reference(mask, connectivity)
    assert len(set(want)) > 50  # The masks differ in what is counted.
    np.testing.assert_array_equal(metrics.count_clusters(mask, connectivity=connectivity), want)
    np.testing.assert_array_equal(
        metrics.count_clusters_host(mask, connectivity=connectivity), want
    )


@pytest.mark.parametrize("connectivity", [4, 8])
@pytest.mark.parametrize("side", [32, 224])
def test_full_empty_spiral_checkers_combs(side, connectivity):
    mask = special_masks(side)
    want = reference(mask, connectivity)
    assert want[:3] == [0, 1, 1]
    np.testing.assert_array_equal(metrics.count_clusters(mask, connectivity=connectivity), want)
    np.testing.assert_array_equal(
        metrics.count_clusters_host(mask, connectivity=connectivity), want
    )


def test_rounds_grow_like_a_logarithm():
    # Passing labels from pixel to pixel takes as many rounds as the path is long, 25,000 here.
    rounds = [int(ops.count_clusters(special_masks(side), 4)[1]) for side in (32, 224)]
    assert rounds[0] <= 8 and rounds[1] <= 12


@pytest.mark.parametrize("shape", [(5, 1, 17), (5, 17, 1), (3, 1, 1), (4, 5, 23)], ids=str)
def test_odd_shapes(shape):
    mask = np.random.default_rng(0).random(shape) < 0.6
    for connectivity in (4, 8):
        want = reference(mask, connectivity)
        got = metrics.count_clusters(mask, connectivity=connectivity)
        np.testing.assert_array_equal(got, want)


def test_images_of_a_batch_do_not_touch():
    mask = np.ones((6, 4, 4), bool)
    assert metrics.count_clusters(mask).tolist() == [1] * 6
    assert metrics.count_clusters_host(mask).tolist() == [1] * 6
    mask[::2] = False
    assert metrics.count_clusters_host(mask).tolist() == [0, 1] * 3


def test_corners_join_only_with_eight_neighbours():
    mask = np.eye(5, dtype=bool)[None]
    assert metrics.count_clusters(mask).tolist() == [5]
    assert metrics.count_clusters(mask, connectivity=8).tolist() == [1]
    x, adversarials = np.zeros((1, 5, 5, 1), np.float32), mask[..., None].astype(np.float32)
    for count in (metrics.num_clusters, metrics.num_clusters_host):
        assert count(x, adversarials).tolist() == [5]
        assert count(x, adversarials, connectivity=8).tolist() == [1]


def test_from_images_any_channel_counts():
    x = np.zeros((2, 9, 9, 3), np.float32)
    adversarials = x.copy()
    adversarials[0, 2, 2, 0], adversarials[0, 2, 3, 2], adversarials[0, 7, 7, 1] = 1, -1, 0.5
    for count in (metrics.num_clusters, metrics.num_clusters_host):
        assert count(x, adversarials).tolist() == [2, 0]
        assert count(x[:0], adversarials[:0]).shape == (0,)


def test_works_under_jit_and_vmap():
    mask = np.random.default_rng(3).random((6, 2, 12, 12)) < 0.5
    want = np.reshape(reference(mask.reshape(12, 12, 12), 4), (6, 2))
    np.testing.assert_array_equal(jax.jit(jax.vmap(metrics.count_clusters))(mask), want)


def test_wrong_arguments_are_refused():
    mask = np.zeros((2, 4, 4), bool)
    for count in (metrics.count_clusters, metrics.count_clusters_host):
        with pytest.raises(ValueError, match="4 or 8"):
            count(mask, connectivity=6)
        with pytest.raises(ValueError, match="bool"):
            count(mask.astype(np.float32))
        with pytest.raises(ValueError, match="bool"):
            count(mask[0])
    huge = jax.ShapeDtypeStruct((1 << 15, 256, 256), bool)
    with pytest.raises(ValueError, match="split the batch"):
        jax.eval_shape(metrics.count_clusters, huge)
