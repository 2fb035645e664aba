"""The tail: every unfinished image is in a lane or parked, once; lanes are full and even."""

import jax
import numpy as np
import pytest

from gse_jax.attacks.algorithm import NO_SAMPLE
from gse_jax.attacks.lanes import LanesState
from gse_jax.attacks.packing import lanes_to_fill, pack, tail_width


def lanes_of(ids):
    ids = np.asarray(ids, np.int32)
    return LanesState({"value": ids * 10.0, "more": np.stack([ids, ids], 1)}, ids)


@pytest.mark.parametrize("unfinished,width,num_devices,expected", [
    (16, 8, 2, 8), (15, 8, 2, 8), (14, 8, 2, 1), (1, 8, 2, 1), (7, 4, 2, 4), (6, 4, 2, 1),
    (8, 4, 2, 4), (3, 2, 2, 2), (1, 2, 1, 2), (1, 1, 4, 1), (500, 512, 1, 8), (7, 512, 1, 1)])
def test_widths_on_cpu(unfinished, width, num_devices, expected):
    assert tail_width(unfinished, width, num_devices, "cpu") == expected


@pytest.mark.parametrize("unfinished,width,num_devices,expected", [
    (1024, 1024, 1, 1024), (769, 1024, 1, 1024), (768, 1024, 1, 256), (193, 256, 1, 256),
    (192, 256, 1, 64), (1, 64, 1, 64), (1, 1024, 1, 64), (800, 1024, 4, 256), (1, 32, 1, 32)])
def test_widths_on_accelerators(unfinished, width, num_devices, expected):
    assert tail_width(unfinished, width, num_devices, "gpu", narrowest=64) == expected


@pytest.mark.parametrize("platform,least", [("cpu", 1), ("gpu", 3)])
def test_nothing_is_lost_until_all_are_done(platform, least):
    """Finish images at random and pack whenever the engine would."""
    random = np.random.default_rng(0)
    for _ in range(50):
        num_devices, width = int(random.integers(1, 5)), int(random.integers(1, 9))
        ids = np.arange(num_devices * width)
        ids[random.random(ids.size) < 0.3] = NO_SAMPLE
        lanes, parked, done = lanes_of(ids), None, []
        everything = set(ids[ids != NO_SAMPLE].tolist())
        while unfinished := len(everything) - len(done):
            narrow = tail_width(unfinished, width, num_devices, platform)
            if narrow < width or lanes_to_fill(lanes.sample_id, parked, num_devices, least):
                width = narrow
                lanes, parked = pack(lanes, parked, width, num_devices)
            occupied = lanes.sample_id[lanes.sample_id != NO_SAMPLE]
            waiting = [] if parked is None else parked.sample_id.tolist()
            assert sorted([*occupied.tolist(), *waiting, *done]) == sorted(everything)
            # States travel with their images, and idle lanes hold the state of some image.
            assert (lanes.attack["value"] == 10.0 * lanes.attack["more"][:, 0]).all()
            np.testing.assert_array_equal(lanes.attack["value"][lanes.sample_id != NO_SAMPLE],
                                          10.0 * occupied)
            assert len(occupied) > min(unfinished, width * num_devices) - least or not waiting
            left = (lanes.sample_id != NO_SAMPLE).reshape(num_devices, -1).sum(1)
            assert left.max() - left.min() <= least
            over = random.random(lanes.sample_id.size) < 0.4
            over &= lanes.sample_id != NO_SAMPLE
            done += lanes.sample_id[over].tolist()
            lanes = lanes._replace(sample_id=np.where(over, NO_SAMPLE, lanes.sample_id))
        assert sorted(done) == sorted(everything)


def test_parked_images_keep_their_order():
    lanes, parked = pack(lanes_of([5, 3, NO_SAMPLE, 8, 1, 9]), None, 1, 2)
    np.testing.assert_array_equal(lanes.sample_id, [5, 3])
    np.testing.assert_array_equal(parked.sample_id, [8, 1, 9])
    lanes = lanes._replace(sample_id=np.asarray([NO_SAMPLE, 3], np.int32))
    assert lanes_to_fill(lanes.sample_id, parked, 2)
    lanes, parked = pack(lanes, parked, 1, 2)
    np.testing.assert_array_equal(lanes.sample_id, [3, 8])
    np.testing.assert_array_equal(parked.sample_id, [1, 9])
    assert jax.tree.map(len, parked.attack) == {"value": 2, "more": 2}


def test_images_far_from_their_end_come_first():
    lanes, parked = pack(lanes_of([5, 3, NO_SAMPLE, 8, 1, 9]), None, 1, 2,
                         lambda states: states["value"] // 50)
    np.testing.assert_array_equal(lanes.sample_id, [3, 1])
    np.testing.assert_array_equal(parked.sample_id, [5, 8, 9])
    lanes, parked = pack(lanes, parked, 1, 2, lambda states: -states["value"])
    np.testing.assert_array_equal(lanes.sample_id, [9, 8])
    np.testing.assert_array_equal(parked.sample_id, [5, 3, 1])
