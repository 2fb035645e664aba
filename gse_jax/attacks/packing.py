"""The tail: when hardly an image waits any more, keep the lanes full with those that are left.

A fixed number of lanes would idle until the slowest image is done. Instead the unfinished images are
worked in fewer lanes while the others are parked half-way, on the device: a lane that falls free takes
the next of them at once. Every few calls those that have most of their work ahead, as far as the attack
can tell, change places with those that have less: a long image that waits makes the tail longer. That
keeps lanes busy at few widths, so at few compilations: on CPU, where a call costs nearly what its lanes
cost, a fourth of the default, two lanes or one (8 first, if there were more); on an accelerator, whose
narrow calls hardly cost less than wider ones, a fourth and a sixteenth of it.

`benchmarks/tail.py` replays the runs of real images through the engine, at what the calls cost: what the order
brings stands in `docs/speed.md`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gse_jax.attacks.algorithm import NO_SAMPLE
from gse_jax.attacks.lanes import LanesState, Parked, idle_lanes
from gse_jax.attacks.program import under

# An image of a ResNet-20 costs 5 % more in a call of 4 than in one of 8 to 24, 10 % in one of 2, 20 to 50 % alone.
CPU_WIDTH = 8
CPU_WIDTH_FOR_FEW = 4  # keeps the lanes of fewer images full for longer
_STEP = 4  # each narrower width is a compilation
# Of an accelerator's lanes; below, a narrower call with images parked costs less.
FULL_ENOUGH = 0.95
_CALLS_OF_A_TURN, _CALLS_OF_A_TURN_ELSEWHERE = 128, 32  # on a CPU at least, and on an accelerator
FULL_AT_FIRST = 0.85  # of lanes that all images begin in together, where a narrower one takes turns


def parked_places(width: int) -> int:
    """Return how many images one device can park beside `width` lanes; more where a CPU narrows from many."""
    return max(CPU_WIDTH, (_STEP - 1) * width)


def next_places(width: int, narrow: int, num_places: int, platform: str) -> int:
    """Return how many parking places per device there are from now on.

    Args:
        width: lanes per device up to now.
        narrow: from now on; `tail_width` narrows when fewer images than `width` are left for each device.
        num_places: places up to now.
        platform: "cpu", "gpu" or "tpu".

    Returns:
        Enough for all images that find no lane, and few, because a CPU moves them all.
    """
    if narrow == width:
        return num_places
    return max(parked_places(narrow), width) if platform == "cpu" else parked_places(narrow)


def _calls_of_a_turn(num_places: int, platform: str) -> int:
    """Return after how many model calls images that have more ahead take the lanes."""
    # A CPU moves 24 places in the time of four calls of one lane, 1,024 in that of thirty calls of eight.
    return max(_CALLS_OF_A_TURN, num_places // 2) if platform == "cpu" else _CALLS_OF_A_TURN_ELSEWHERE


def tail_width(unfinished: int, width: int, num_devices: int, platform: str,
               narrowest: int = 1, full: float = FULL_ENOUGH) -> int:
    """Return how many lanes per device the tail takes.

    Args:
        unfinished: images left, >= 1; none of them waits in a queue.
        width: lanes per device now.
        num_devices: D.
        platform: "cpu", "gpu" or "tpu".
        narrowest: lanes per device below which an accelerator's call costs the same.
        full: part of an accelerator's lanes below which they are too many.

    Returns:
        At most `width`; the others of the unfinished can be parked.
    """
    share = -(-unfinished // num_devices)
    if platform == "cpu":
        if share >= width or width < CPU_WIDTH_FOR_FEW:  # whoever asked for so few lanes compiles one program
            return width
        return CPU_WIDTH if share >= CPU_WIDTH else min(width, CPU_WIDTH) // _STEP
    # Of a width that four does not divide the rest counts as none: lanes and places would not hold all images.
    while share <= full * (width - width % _STEP) and width // _STEP >= narrowest:
        width //= _STEP
    return width


class Places(NamedTuple):
    """Where the unfinished images go.

    Attributes:
        lanes: [D, L] int64, which row of lanes and parked images, one after the other, goes into
            each lane; -1 where it idles.
        parked: [D, P] int64, likewise for those that are parked, in order from the left.
        swaps: images that leave a lane for another image.
    """

    lanes: np.ndarray
    parked: np.ndarray
    swaps: int


def place(occupied, parked, progress, room, width: int, num_places: int) -> Places:
    """Deal unfinished images to lanes and parking places, those with the least progress first.

    Args:
        occupied: [D, L_old] bool, lanes with an image.
        parked: [D, P_old] bool, places with an image that no lane has taken.
        progress: [D * (L_old + P_old)], of lanes and then of places; see `Algorithm`.
        room: [D] lanes of each device to fill; the rest is left to its queue.
        width: L, lanes per device from now on.
        num_places: P, parking places per device from now on.

    Returns:
        Places; images of equal progress stay in the order of lanes, parked ones after them.
    """
    num_devices = len(occupied)
    in_lane = np.flatnonzero(occupied)
    # The first of every device, then the second: as they were dealt.
    waiting = np.arange(parked.size).reshape(parked.shape).T[parked.T] + occupied.size
    images = np.concatenate([in_lane, waiting])
    images = images[np.argsort(np.asarray(progress)[images], kind="stable")]
    depth, device = np.nonzero(np.arange(width)[:, None] < np.asarray(room)[None, :])
    number = min(len(images), len(depth))
    lanes = np.full((num_devices, width), -1)
    lanes[device[:number], depth[:number]] = images[:number]
    rest = images[number:]
    places = np.full((num_devices, num_places), -1)
    count = np.arange(len(rest))
    places[count % num_devices, count // num_devices] = rest
    return Places(lanes, places, int((rest < occupied.size).sum()))


def pack(xp, lanes: LanesState, parked: LanesState, sources) -> tuple[LanesState, ...]:
    """Move images to where `place` wants them.

    Args:
        xp: numpy or jax.numpy.
        lanes: [D * L_old, ...] the lanes of all devices.
        parked: [D * P_old, ...] what was parked.
        sources: `Places.lanes` and `Places.parked`.

    Returns:
        (lanes [D * L, ...], parked [D * P, ...]).
    """
    everything = jax.tree.map(lambda a, b: xp.concatenate([a, b]), lanes, parked)
    # Places without an image repeat one, whose state is finite: what they compute in vain stays so.
    some = xp.maximum(*(source.max() for source in sources))

    def moved(source):
        source = source.reshape(-1)
        rows = xp.where(source >= 0, source, some)
        packed = jax.tree.map(lambda a: a[rows], everything)
        return packed._replace(sample_id=xp.where(source >= 0, packed.sample_id, NO_SAMPLE))

    return tuple(map(moved, sources))


def put_idle(algorithm, sample, width: int, sharding, platform: str) -> LanesState:
    """Return `width` idle lanes per device, on the devices."""
    lanes = idle_lanes(algorithm, sample, width * sharding.num_devices)  # zeros that nobody has touched yet
    if platform == "cpu":
        return jax.device_put(lanes, sharding)
    leaves, tree = jax.tree.flatten(lanes)  # hundreds of megabytes, not to be sent
    with under(sharding.mesh):
        zeros = _zeros(tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in leaves), sharding)
    lanes = jax.tree.unflatten(tree, zeros)
    return lanes._replace(sample_id=jax.device_put(np.full(lanes.sample_id.shape, NO_SAMPLE, np.int32), sharding))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _zeros(shapes, sharding):
    return jax.lax.with_sharding_constraint([jnp.zeros(a.shape, a.dtype) for a in shapes], sharding)


class Tail:
    """What is parked while the last images are worked on, and when they change places."""

    def __init__(self, algorithm, sample, width, platform, narrowest, sharding):
        self._ordered = algorithm.progress is not None
        self._platform, self._narrowest = platform, narrowest
        self._sharding, self._devices = sharding, sharding.num_devices
        none, self._places = np.zeros(self._devices, np.int32), parked_places(width)
        self.parked = Parked(put_idle(algorithm, sample, self._places, sharding, platform),
                             *jax.device_put((none, none), sharding))
        self._end, self._progress = none, np.zeros((self._devices, self._places))
        self._begun = self._sweeps = False
        self._calls = 0  # since images changed places

    def pack(self, state, occupied, progress, begin, waiting, calls):
        """Move images between lanes and parking places, if it is time.

        Args:
            state: LanesState of all devices.
            occupied: [D, L] bool, lanes with an image.
            progress: [D * L] of the images in the lanes.
            begin: [D] first parked image of each device that no lane has taken.
            waiting: [D] images in the queues; there will be no more.
            calls: model calls since the last look.

        Returns:
            (state, lanes per device) for the next stretch.
        """
        width = occupied.shape[1]
        count = np.arange(self._places)
        parked = (count >= begin[:, None]) & (count < self._end[:, None])
        load = occupied.sum(1) + parked.sum(1) + waiting
        self._calls += calls
        self._begun |= load.sum() <= (width + len(count)) * self._devices
        if not self._begun:
            return state, width
        narrow = width if waiting.any() else tail_width(
            int(load.sum()), width, self._devices, self._platform, self._narrowest)
        progress = np.concatenate([progress, self._progress.ravel()])
        # An image in a queue has more ahead than any other.
        room = narrow - np.minimum(waiting, narrow) if self._ordered else np.full(self._devices, narrow)
        num_places = next_places(width, narrow, self._places, self._platform)
        places = place(occupied, parked, progress, room, narrow, num_places)
        # On an accelerator in turns only until all have begun: after that it gains nothing there. On CPU only
        # after that: before, it gains 2 % and whoever watches sees no image done for half of the time.
        in_turns = not waiting.any() if self._platform == "cpu" else self._sweeps or waiting.any()
        turn = in_turns and self._calls >= _calls_of_a_turn(len(count), self._platform) and places.swaps > 0
        # The states of an accelerator's lanes are megabytes: not for a few of them.
        least = 1 if self._platform == "cpu" else max(1, width // 8)
        uneven = load.min() < width and load.max() - load.min() > least
        if narrow == width and not turn and not uneven:
            return state, width
        self._calls, self._sweeps, self._places = 0, waiting.any(), num_places
        self._progress = progress[places.parked]
        self._end = (places.parked >= 0).sum(1).astype(np.int32)
        state, lanes = self._moved(state, places)
        self.parked = Parked(lanes, *jax.device_put((np.zeros_like(self._end), self._end), self._sharding))
        return state, narrow

    def _moved(self, state, places):
        both = state, self.parked.lanes
        if self._platform == "cpu":
            moved = pack(np, *jax.device_get(both), places[:2])
            return jax.device_put(moved, self._sharding)
        with under(self._sharding.mesh):
            return _packed(*both, places[:2], self._sharding)


@functools.partial(jax.jit, static_argnums=3)
def _packed(lanes, parked, sources, sharding):
    """On an accelerator: the states stay there."""
    return jax.lax.with_sharding_constraint(pack(jnp, lanes, parked, sources), sharding)
