"""Drive a compiled attack over any number of images on all local devices.

The device program (`lanes.drain`) works for a bounded number of model calls and returns. Between
two calls the host stores what is finished, deals the waiting images out to the devices again, and
in the tail, when fewer images are left than lanes, moves them into narrower lanes. The images
wait in host memory, so device memory does not grow with their number. Nothing here depends on
time, so a run repeats itself.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gse_jax.attacks.algorithm import NO_SAMPLE, Outcome, Sample
from gse_jax.attacks.lanes import LanesState, Queue, idle_lanes
from gse_jax.attacks.program import Program, make_mesh, on_mesh, replicate, split


class Progress(NamedTuple):
    """How far an attack is; passed to the caller's `progress` function between model calls.

    Attributes:
        done: images finished.
        total: images in all.
        found: images with `success`, of those finished.
        gradient_evals: gradient evaluations spent on the finished images.
        lane_evals: gradient evaluations made so far, those of idle lanes included; more than
            `gradient_evals` by what unfinished images have spent and by what was idle.
    """

    done: int
    total: int
    found: int
    gradient_evals: int
    lane_evals: int


# The tail is worked in lanes of a quarter of the width, again and again. A quarter, not a half:
# each width compiles anew. Attacks on fewer images than this keep one width.
_SHRINK = 4
_SMALLEST_WIDTH_THAT_SHRINKS = 16

# Model calls between two looks of the host, per 64 x 64 pixels; fixed, never timed.
_CALLS = 32


def default_lanes_per_device(platform: str, height: int, width: int) -> int:
    """Return how many images one device works on at a time.

    Args:
        platform: "cpu", "gpu" or "tpu".
        height: pixels.
        width: pixels.

    Returns:
        Power of two.
    """
    if platform == "cpu":
        return 16 if height * width <= 64 * 64 else 4
    # Enough parallel work to fill an accelerator, less for large images, whose activations weigh.
    return int(np.clip(2 ** (20 - int(np.log2(height * width))), 32, 1024))


def _layout(num_images, lanes, image_shape):
    """Choose (devices, lanes per device)."""
    devices = jax.local_devices()
    if lanes is None:
        devices = devices[:num_images]
        width = default_lanes_per_device(devices[0].platform, *image_shape[:2])
        share = -(-num_images // len(devices))
        # A power of two, so that attacks on 40 and on 60 images share one program.
        return devices, min(width, 1 << (share - 1).bit_length())
    devices = devices[:lanes]
    return devices, -(-lanes // len(devices))


class _Dealer:
    """Deals waiting samples to the queues of the devices, evenly, and takes back what is left."""

    def __init__(self, samples: Sample, num_devices: int, sharding):
        self._samples = samples
        self._devices = num_devices
        self._sharding = sharding
        self._next = 0
        self._dealt = [np.zeros(0, np.int32)] * num_devices  # sample ids per device

    def waiting(self, begin) -> list[int]:
        """Return how many dealt samples no lane has taken yet, per device."""
        return [len(ids) - int(b) for ids, b in zip(self._dealt, begin)]

    def left(self, begin) -> int:
        """Return how many samples no lane has taken yet."""
        return len(self._samples.y) - self._next + sum(self.waiting(begin))

    def deal(self, begin, places: int) -> Queue:
        """Return new queues of `places` per device with all samples that fit."""
        returned = [ids[int(b):] for ids, b in zip(self._dealt, begin)]
        room = self._devices * places - sum(map(len, returned))
        fresh = np.arange(self._next, min(self._next + room, len(self._samples.y)), dtype=np.int32)
        self._next += len(fresh)
        ids = np.concatenate([*returned, fresh])
        self._dealt = [ids[d::self._devices] for d in range(self._devices)]
        # Padding repeats image 0: what idle lanes compute in vain stays finite.
        index = np.zeros((self._devices, places), np.int32)
        for row, dealt in zip(index, self._dealt):
            row[:len(dealt)] = dealt
        samples = jax.tree.map(lambda a: a[index.reshape(-1)], self._samples)
        ends = np.asarray([len(dealt) for dealt in self._dealt], np.int32)
        return jax.device_put(Queue(samples, np.zeros_like(ends), ends), self._sharding)


def _store(results: Outcome, finished) -> int:
    """Copy finished outcomes into host memory; return their number."""
    counts = np.asarray(finished.count)
    if not counts.any():
        return 0
    places = finished.sample_id.shape[0] // len(counts)
    rows = np.concatenate([d * places + np.arange(c) for d, c in enumerate(counts)])
    ids = np.asarray(finished.sample_id)[rows]
    for store, new in zip(results, finished.outcome):
        store[ids] = np.asarray(new)[rows]
    return len(ids)


def _repack(lanes: LanesState, width: int, num_devices: int, sharding) -> LanesState:
    """Move the occupied lanes into `width` lanes per device, evenly."""
    sample_id = np.asarray(lanes.sample_id)
    occupied = np.flatnonzero(sample_id != NO_SAMPLE)
    source = np.full((num_devices, width), -1)
    for place, lane in enumerate(occupied):
        source[place % num_devices, place // num_devices] = lane
    source = source.reshape(-1)
    ids = np.where(source >= 0, sample_id[source], NO_SAMPLE).astype(np.int32)
    # Idle lanes repeat an occupied one, whose state is finite.
    source = np.where(source >= 0, source, occupied[0])
    attack = jax.tree.map(lambda a: np.asarray(a)[source], lanes.attack)
    return jax.device_put(LanesState(attack, ids), sharding)


def run(program: Program, params, hyperparams, key, samples: Sample, lanes: int | None,
        progress: Callable[[Progress], None] | None = None) -> Outcome:
    """Attack all samples on all local devices.

    Args:
        program: attack and model.
        params: the model's parameters.
        hyperparams: the attack's hyperparameters, arrays [].
        key: typed random key.
        samples: NumPy arrays with leading axis N >= 1, `sample_id` = 0 ... N - 1.
        lanes: number of images worked on at a time over all devices, rounded up to a multiple of
            their number; None for a default that suits the devices.
        progress: called with a `Progress` after every bounded stretch of work.

    Returns:
        Outcome of NumPy arrays with leading axis N.
    """
    total, image_shape = samples.x.shape[0], samples.x.shape[1:]
    devices, width = _layout(total, lanes, image_shape)
    mesh = make_mesh(devices)
    sharding = split(mesh)
    params, hyperparams, key = jax.device_put((params, hyperparams, key), replicate(mesh))
    limit = jax.device_put(
        np.int32(max(2, _CALLS * 4096 // max(4096, image_shape[0] * image_shape[1]))),
        replicate(mesh))

    algorithm = program.algorithm(hyperparams, key)
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), samples)
    shapes = jax.eval_shape(lambda s: algorithm.finish(algorithm.init(s)), one)
    results = jax.tree.map(lambda a: np.zeros((total, *a.shape), a.dtype), shapes)

    may_shrink = width >= _SMALLEST_WIDTH_THAT_SHRINKS
    dealer = _Dealer(samples, len(devices), sharding)
    state = jax.device_put(idle_lanes(algorithm, one, width * len(devices)), sharding)
    queue = dealer.deal([0] * len(devices), 2 * width)
    done = lane_evals = 0
    while done < total:
        advance = on_mesh(program, mesh, capacity=3 * width)
        state, queue, finished, model_calls = advance(params, hyperparams, key, state, queue, limit)
        done += _store(results, finished)
        lane_evals += width * int(np.asarray(model_calls).sum())
        if progress is not None:
            progress(Progress(done, total, int(results.success.sum()),
                              int(results.gradient_evals.sum()), lane_evals))
        begin = np.asarray(queue.begin)
        if dealer.left(begin):
            if min(dealer.waiting(begin)) == 0:
                queue = dealer.deal(begin, 2 * width)
        elif may_shrink and done < total:
            needed = -(-(total - done) // len(devices))
            narrow = width
            while narrow // _SHRINK >= needed:
                narrow //= _SHRINK
            if narrow < width:
                width = narrow
                state = _repack(state, width, len(devices), sharding)
                queue = dealer.deal(begin, 2 * width)
    return results


def as_key(key) -> jax.Array:
    """Return a typed random key.

    Args:
        key: None, an int seed, or a typed key.

    Returns:
        Typed key; seed 0 for None.

    Raises:
        TypeError: for anything else.
    """
    if key is None or isinstance(key, (int, np.integer)):
        return jax.random.key(0 if key is None else int(key))
    if hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    raise TypeError(f"key must be None, an int or a typed key from jax.random.key, "
                    f"got {type(key).__name__}")
