"""The tail: every unfinished image is in a lane or parked, once; lanes are full and even."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gse_jax.attacks import packing
from gse_jax.attacks.algorithm import NO_SAMPLE
from gse_jax.attacks.lanes import LanesState
from gse_jax.attacks.packing import next_places, pack, parked_places, place, tail_width


def lanes_of(ids):
    ids = np.asarray(ids, np.int32).reshape(-1)
    return LanesState({"value": ids * 10.0, "more": np.stack([ids, ids], 1)}, ids)


@pytest.mark.parametrize("unfinished,width,num_devices,expected", [
    (16, 8, 2, 8), (15, 8, 2, 8), (14, 8, 2, 2), (1, 8, 2, 2), (7, 4, 2, 4), (6, 4, 2, 1),
    (8, 4, 2, 4), (3, 2, 2, 2), (1, 2, 1, 2), (1, 1, 4, 1), (512, 512, 1, 512), (511, 512, 1, 8), (7, 512, 1, 2)])
def test_widths_on_cpu(unfinished, width, num_devices, expected):
    assert tail_width(unfinished, width, num_devices, "cpu") == expected


@pytest.mark.parametrize("unfinished,width,num_devices,expected", [
    (1024, 1024, 1, 1024), (973, 1024, 1, 1024), (972, 1024, 1, 256), (244, 256, 1, 256),
    (243, 256, 1, 64), (1, 64, 1, 64), (1, 1024, 1, 64), (1000, 1024, 4, 256), (1, 32, 1, 32)])
def test_widths_on_accelerators(unfinished, width, num_devices, expected):
    assert tail_width(unfinished, width, num_devices, "gpu", narrowest=64) == expected


@pytest.mark.parametrize("width,narrow,expected", [(80, 80, 240), (80, 8, 80), (16, 8, 24), (8, 2, 8), (4, 1, 8)])
def test_a_cpu_parks_no_more_than_it_must(width, narrow, expected):
    assert next_places(width, narrow, parked_places(width), "cpu") == expected


@pytest.mark.parametrize("platform,narrowest", [("cpu", 1), ("gpu", 1), ("gpu", 8)])
def test_whatever_finds_no_lane_has_a_place(platform, narrowest):
    for width in range(1, 200):
        for share in range(1, width + 1):
            narrow = tail_width(3 * share, width, 3, platform, narrowest)
            assert narrow + next_places(width, narrow, parked_places(width), platform) >= share, (width, share)


@pytest.mark.parametrize("places,platform,expected", [(24, "cpu", 128), (1024, "cpu", 512), (3072, "gpu", 32)])
def test_a_cpu_moves_many_parked_images_less_often(places, platform, expected):
    assert packing._calls_of_a_turn(places, platform) == expected


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("xp", [np, jnp])
def test_nothing_is_lost_until_all_are_done(platform, xp):
    """Finish images at random, let lanes take what is parked, and change places now and then."""
    random, on_device = np.random.default_rng(0), jax.jit(functools.partial(pack, jnp))
    for _ in range(20 if xp is np else 3):
        devices, width = int(random.integers(1, 5)), int(random.choice([1, 2, 4, 8, 80] if xp is np else [2, 8]))
        spots = parked_places(width)
        ids = np.arange(devices * width)
        ids[random.random(ids.size) < 0.3] = NO_SAMPLE
        everything, done = set(ids[ids != NO_SAMPLE].tolist()), []
        parked = lanes_of(np.full((devices, spots), NO_SAMPLE))
        lanes, begin, end = lanes_of(ids), np.zeros(devices, int), np.zeros(devices, int)
        while unfinished := len(everything) - len(done):
            narrow = tail_width(unfinished, width, devices, platform)
            count = np.arange(spots)
            waits = (count >= begin[:, None]) & (count < end[:, None])
            progress = random.random(devices * (width + spots))
            occupied = (np.asarray(lanes.sample_id) != NO_SAMPLE).reshape(devices, width)
            spots = next_places(width, narrow, spots, platform)
            places = place(occupied, waits, progress, np.full(devices, narrow), narrow, spots)
            width = narrow
            packed = pack(xp, lanes, parked, places[:2]) if xp is np else on_device(lanes, parked, places[:2])
            lanes, parked = jax.tree.map(np.array, packed)
            begin, end = np.zeros(devices, int), (places.parked >= 0).sum(1)
            occupied = lanes.sample_id[lanes.sample_id != NO_SAMPLE]
            waiting = parked.sample_id[parked.sample_id != NO_SAMPLE]
            assert sorted([*occupied.tolist(), *waiting.tolist(), *done]) == sorted(everything)
            # States travel with their images, and idle lanes hold the state of some image.
            for states in (lanes, parked):
                assert (states.attack["value"] == 10.0 * states.attack["more"][:, 0]).all()
                assert (states.attack["value"] >= 0.0).all()
                there = states.sample_id != NO_SAMPLE
                np.testing.assert_array_equal(states.attack["value"][there], 10.0 * states.sample_id[there])
            assert len(occupied) == min(unfinished, width * devices)
            left = (lanes.sample_id != NO_SAMPLE).reshape(devices, -1).sum(1)
            assert left.max() - left.min() <= 1 and end.max() - end.min() <= 1
            over = (random.random(lanes.sample_id.size) < 0.4) & (lanes.sample_id != NO_SAMPLE)
            done += lanes.sample_id[over].tolist()
            lanes = lanes._replace(sample_id=np.where(over, NO_SAMPLE, lanes.sample_id))
            for lane in np.flatnonzero(over):  # as `lanes.drain` does
                device = lane // width
                if begin[device] < end[device] and random.random() < 0.7:
                    row = device * spots + begin[device]
                    for to, of in zip(jax.tree.leaves(lanes), jax.tree.leaves(parked)):
                        to[lane] = of[row]
                    begin[device] += 1
        assert sorted(done) == sorted(everything)


def moved(lanes, parked, places):
    lanes, parked = pack(np, lanes, parked, places[:2])
    return lanes.sample_id, parked.sample_id[parked.sample_id != NO_SAMPLE]


def test_images_far_from_their_end_come_first_and_equal_ones_stay():
    occupied, none = np.asarray([[1, 1, 0], [1, 1, 1]], bool), np.zeros((2, 9), bool)
    lanes, parked = lanes_of([5, 3, NO_SAMPLE, 8, 1, 9]), lanes_of(np.full(18, NO_SAMPLE))
    progress = np.zeros(24)
    places = place(occupied, none, progress, [1, 1], 1, 8)
    inside, waiting = moved(lanes, parked, places)
    assert inside.tolist() == [5, 3] and waiting.tolist() == [8, 9, 1] and places.swaps == 3
    progress[:6] = [1, 1, 0, 1, 0, 0]
    inside, waiting = moved(lanes, parked, place(occupied, none, progress, [1, 1], 1, 8))
    assert inside.tolist() == [1, 9] and waiting.tolist() == [5, 8, 3]


def test_parked_images_follow_those_in_lanes_and_a_queue_keeps_its_lanes():
    occupied = np.asarray([[1, 1], [0, 0]], bool)
    halfway = np.zeros((2, 8), bool)
    halfway[0, 1:3] = halfway[1, 0] = True
    lanes = lanes_of([4, 7, NO_SAMPLE, NO_SAMPLE])
    parked = lanes_of([[0, 10, 11, *[0] * 5], [20, *[0] * 7]])
    progress = np.zeros(4 + 16)
    inside, waiting = moved(lanes, parked, place(occupied, halfway, progress, [2, 2], 2, 8))
    assert inside.tolist() == [4, 20, 7, 10] and waiting.tolist() == [11]
    # A new image waits in the second device's queue: one lane of it is left idle.
    places = place(occupied, halfway, progress, [2, 1], 2, 8)
    inside, waiting = moved(lanes, parked, places)
    assert inside.tolist() == [4, 20, 7, NO_SAMPLE] and waiting.tolist() == [10, 11] and places.swaps == 0
    # The one that is parked last has most ahead.
    progress[:] = 1
    progress[4 + 2] = 0
    places = place(occupied, halfway, progress, [1, 0], 2, 8)
    inside, waiting = moved(lanes, parked, places)
    assert inside.tolist() == [11, NO_SAMPLE, NO_SAMPLE, NO_SAMPLE] and waiting.tolist() == [4, 20, 7, 10]
    assert places.swaps == 2
