"""Drive a compiled attack over any number of images on all local devices.

The device program (`lanes.drain`) works for a bounded number of model calls and returns. Between
two stretches the host deals the waiting images out to the devices again, and in the tail packs the
unfinished ones into fewer lanes (`packing.py`). What is finished it stores while the next stretch
works. The images wait in host memory, so device memory does not grow with their number. Nothing here
depends on time, so a run repeats itself, but for the rounding of a GPU's kernels.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gse_jax.attacks.algorithm import NO_SAMPLE, Outcome, Sample
from gse_jax.attacks.lanes import Queue
from gse_jax.attacks.packing import (
    CPU_WIDTH,
    CPU_WIDTH_FOR_FEW,
    FULL_AT_FIRST,
    Tail,
    tail_width,
)
from gse_jax.attacks.program import Program, filled_on_mesh, make_mesh, on_mesh, replicate, split, under
from gse_jax.devices import hint_at_idle_cores, local_devices


class Progress(NamedTuple):
    """How far an attack is; passed to the caller's `progress` function after each stretch of model calls.

    Attributes:
        done: images finished.
        total: images in all.
        found: images with `success`, of those finished.
        gradient_evals: gradient evaluations spent on the finished images.
        lane_evals: gradient evaluations made so far, those of idle lanes included; more than
            `gradient_evals` by what unfinished images have spent and by what was idle.

    It is told while the next stretch is worked on. On an accelerator the last images, up to four per lane,
    advance together: most of them are done near the end.
    """

    done: int
    total: int
    found: int
    gradient_evals: int
    lane_evals: int


# Model calls between two looks of the host, per 64 x 64 pixels; fixed, never timed. A look costs
# milliseconds, a call of one lane on a CPU as many; an accelerator has eight calls at least. Calls of more
# lanes than these take a CPU seconds, in which the lanes of images that are done would idle.
_CALLS, _FEWEST_CALLS = 32, 8
_FEWEST_CALLS_ON_CPU, _LANES_OF_ALL_CALLS = 2, 32
# Fewer lanes than this are a small job: not worth a remark about idle cores.
_LARGE_JOB = 4
# Places of a device's queue per lane: in a stretch of n calls a lane takes n images at most, and rarely
# more than one in four calls. Dealt again when half of them are taken.
_QUEUE_PER_LANE = 8
_KEYS = "threefry2x32"  # kind of random keys, whatever JAX's default is
_FEW = 16  # images per device up to which a CPU works in fewer lanes


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
        return CPU_WIDTH if height * width <= 64 * 64 else CPU_WIDTH_FOR_FEW
    # Enough parallel work to fill an accelerator, less for large images, whose activations weigh. An
    # H100's bare ResNet-20 gives 95 % of its best at 1,024 images of 32 x 32 pixels.
    return int(np.clip(2 ** (20 - int(np.log2(height * width))), 32, 1024))


def _platform(devices):
    return devices[0].platform


def _narrowest(devices, image_shape):
    return max(1, default_lanes_per_device(_platform(devices), *image_shape[:2]) // 16)


def _calls(platform: str, image_shape, width: int) -> int:
    """How many model calls of `width` lanes a device makes before the host looks again."""
    calls = _CALLS * 64 * 64 // max(64 * 64, image_shape[0] * image_shape[1])
    if platform == "cpu":
        return max(min(_FEWEST_CALLS_ON_CPU, _CALLS), calls * _LANES_OF_ALL_CALLS // max(_LANES_OF_ALL_CALLS, width))
    return max(min(_FEWEST_CALLS, _CALLS), calls)


def layout(num_images: int | None, lanes: int | None, image_shape) -> tuple[list, int]:
    """Choose where to work.

    Args:
        num_images: how many images will come; None where it is not known.
        lanes: as in `stream`.
        image_shape: (H, W, C).

    Returns:
        (devices, lanes per device to begin with).
    """
    devices = local_devices()
    if lanes is not None:
        devices = devices[:lanes]
        width = -(-lanes // len(devices))
        few = num_images and -(-num_images // len(devices)) <= _FEW
        if few and _platform(devices) == "cpu" and width > CPU_WIDTH_FOR_FEW:
            width = min(width, layout(num_images, None, image_shape)[1])  # no wider than without a wish
        return devices, width
    width = default_lanes_per_device(_platform(devices), *image_shape[:2])
    if num_images:
        devices = devices[:num_images]
        share = -(-num_images // len(devices))
        platform = _platform(devices)
        if platform == "cpu" and share <= _FEW:
            width = tail_width(num_images, CPU_WIDTH_FOR_FEW, len(devices), "cpu")
        elif platform != "cpu" and share <= width:
            # Fewer than they are, so that images wait: lanes stay full for longer.
            width = tail_width(num_images, width, len(devices), platform,
                               _narrowest(devices, image_shape), FULL_AT_FIRST)
        # A power of two, so that attacks on 40 and on 60 images share one program.
        width = min(width, 1 << (share - 1).bit_length())
    return devices, width


class _Dealer:
    """Deals waiting samples to the queues of the devices, evenly, and takes back what is left."""

    def __init__(self, batches: Iterator[Sample], sharding, platform):
        self._batches = batches
        self._devices = sharding.num_devices
        self._sharding, self._platform = sharding, platform
        self.stock: list[Sample] = []  # single samples, views into the batches
        self._dealt: list[list[Sample]] = [[] for _ in range(self._devices)]
        self._padding: Sample | None = None

    def fill(self, count: int) -> None:
        """Pull batches until `count` samples are in stock or there are none left."""
        while len(self.stock) < count:
            batch = next(self._batches, None)
            if batch is None:
                return
            self.stock += [Sample(*(None if a is None else a[i] for a in batch))
                           for i in range(len(batch.sample_id))]

    def waiting(self, begin) -> np.ndarray:
        """Return how many dealt samples no lane has taken yet, per device."""
        return np.asarray([len(dealt) - int(b) for dealt, b in zip(self._dealt, begin)])

    def deal(self, begin, places: int, at_work) -> tuple[Queue, int]:
        """Return new queues of `places` per device, and the number of samples fresh from stock.

        Devices with fewer images in their lanes, `at_work` [D], are served first.
        """
        returned = [s for dealt, b in zip(self._dealt, begin) for s in dealt[int(b):]]
        room = self._devices * places - len(returned)
        self.fill(room)
        fresh, self.stock = self.stock[:room], self.stock[room:]
        waiting = returned + fresh
        rank = np.argsort(np.argsort(at_work, kind="stable"))
        self._dealt = [waiting[int(first)::self._devices] for first in rank]
        # Padding repeats some image: what idle lanes compute in vain stays finite.
        self._padding = waiting[0] if waiting else self._padding
        ends = np.asarray([len(dealt) for dealt in self._dealt], np.int32)
        # A thousand lanes have room for megabytes more than the images of most attacks: an accelerator
        # repeats the last row itself.
        sent = places if self._platform == "cpu" else min(places, 1 << int(ends.max() - 1).bit_length())
        rows = [s for dealt in self._dealt for s in dealt + [self._padding] * (sent - len(dealt))]
        samples = Sample(*(None if column[0] is None else np.stack(column)
                           for column in zip(*rows)))
        samples, begin, ends = jax.device_put((samples, np.zeros_like(ends), ends), self._sharding)
        if sent < places:
            with under(self._sharding.mesh):
                samples = _first(samples, self._sharding, places)
        return Queue(samples, begin, ends), len(fresh)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _first(arrays, sharding, length: int):
    """Return the first `length` rows of every device's share; the last one again where there are fewer."""
    def first(array):
        shares = array.reshape(sharding.num_devices, -1, *array.shape[1:])
        shares = shares[:, jnp.minimum(jnp.arange(length), shares.shape[1] - 1)]
        return jax.lax.with_sharding_constraint(shares.reshape(-1, *array.shape[1:]), sharding)

    return jax.tree.map(first, arrays)


def _begin_copy(written, counts, sharding):
    """Let what an accelerator has finished set out for host memory; without waiting for it."""
    length, places = 4, written[0].shape[0] // len(counts)
    while length < counts.max():  # few lengths, because each is a compilation
        length *= 4
    if length < places:  # all of them are megabytes
        with under(sharding.mesh):
            written = _first(written, sharding, length)
    for array in jax.tree.leaves(written):
        array.copy_to_host_async()
    return written


class Stretch(NamedTuple):
    """What one bounded stretch of work brought.

    Attributes:
        sample_ids: [M] int32, the images that were finished, M >= 0.
        outcome: Outcome of NumPy arrays with leading axis M.
        lane_evals: gradient evaluations made in this stretch, those of idle lanes included.
    """

    sample_ids: np.ndarray  # [M] i32
    outcome: Outcome  # [M, ...]
    lane_evals: int


def _stretch(written, counts, lane_evals) -> Stretch:
    """Make a Stretch of sample ids and outcomes, of which `counts` are written on each device."""
    def rows(array):
        if not np.any(counts):  # as after most looks at the tail, which shall cost next to nothing
            return np.zeros((0, *array.shape[1:]), array.dtype)
        shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
        return np.concatenate([np.asarray(shard.data)[:count]
                               for shard, count in zip(shards, counts)])

    return Stretch(*jax.tree.map(rows, written), lane_evals)


def _work(program, params, hyperparams, key, batches, image_shape, devices, width):
    """Do the work of `stream`; yields the arguments of `_stretch`, and None whenever the devices have begun."""
    if width >= _LARGE_JOB:
        hint_at_idle_cores(devices)
    mesh = make_mesh(devices)
    sharding = split(mesh)
    platform, narrowest = _platform(devices), _narrowest(devices, image_shape)
    calls = _calls(platform, image_shape, width)
    per_lane = min(_QUEUE_PER_LANE, calls)
    params, hyperparams, key, calls = jax.device_put((params, hyperparams, key, np.int32(calls)), replicate(mesh))
    dealer = _Dealer(iter(batches), sharding, platform)
    dealer.fill(1)
    if not dealer.stock:
        return
    algorithm = program.algorithm(hyperparams, key)
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), dealer.stock[0])
    queue, unfinished = dealer.deal([0] * len(devices), per_lane * width, [0] * len(devices))
    with under(mesh):
        state, begin = filled_on_mesh(program, mesh, width)(hyperparams, key, queue)
    queue = queue._replace(begin=begin)
    with under(mesh):
        rest = Tail(algorithm, one, width, platform, narrowest, sharding)
    while unfinished:
        advance = on_mesh(program, mesh, (1 + per_lane) * width)
        with under(mesh):
            state, begin, parked_begin, finished, made, progress = advance(
                params, hyperparams, key, state, queue, rest.parked, calls)
        yield None
        queue = queue._replace(begin=begin)
        rest.parked = rest.parked._replace(begin=parked_begin)
        counts, begin, parked_begin, made, progress, sample_id = jax.device_get(
            (finished.count, begin, parked_begin, made, progress, state.sample_id))
        occupied = (sample_id != NO_SAMPLE).reshape(len(devices), width)
        unfinished -= int(counts.sum())
        written = finished.sample_id, finished.outcome
        written = written if platform == "cpu" else _begin_copy(written, counts, sharding)
        yield written, counts, width * int(made.sum())
        waiting = dealer.waiting(begin)
        low = 2 * min(waiting) <= per_lane * width
        if low:
            dealer.fill(1)
        if (low and dealer.stock) or (min(waiting) == 0 and sum(waiting)):
            queue, fresh = dealer.deal(begin, per_lane * width, occupied.sum(1))
            unfinished += fresh
        elif unfinished and low:
            state, narrow = rest.pack(state, occupied, progress, parked_begin, waiting, int(made.max()))
            if narrow < width:
                width, calls = narrow, _calls(platform, image_shape, narrow)
                per_lane = min(_QUEUE_PER_LANE, calls)
                calls = jax.device_put(np.int32(calls), replicate(mesh))
                # As many places of the empty queue as this width wants.
                with under(mesh):
                    samples = _first(queue.samples, sharding, per_lane * width)
                queue = queue._replace(samples=samples)


def stream(program: Program, params, hyperparams, key, batches: Iterable[Sample], *,
           image_shape, lanes: int | None = None,
           num_images: int | None = None) -> Iterator[Stretch]:
    """Attack batches as they come; lanes stay full across the borders of batches.

    Args:
        program: attack and model.
        params: the model's parameters.
        hyperparams: the attack's hyperparameters, arrays [].
        key: typed random key.
        batches: Samples of NumPy arrays with a leading axis of any length, pulled as lanes fall
            free; `sample_id` >= 0 and unique. In memory are about as many images as the queues
            hold, eight for each lane (fewer of more than 64 x 64 pixels), and one batch.
        image_shape: (H, W, C).
        lanes: number of images worked on at a time over all devices, rounded up to a multiple of
            their number; None for a default that suits the devices. A CPU takes fewer for few images.
        num_images: how many images will come, if known; fewer lanes for few images.

    Yields:
        Stretch, in the order in which images finish. Every image is in exactly one. Each comes when the
        devices are at work on the next one, so that they need not wait for whoever takes it.
    """
    # Where is decided now, for JAX's default device may be another when the first stretch is asked for.
    devices, width = layout(num_images, lanes, image_shape)
    return _stretches(_work(program, params, hyperparams, key, batches, image_shape, devices, width))


def _stretches(work) -> Iterator[Stretch]:
    """Yield the stretches of `_work`, each as soon as the next one has begun."""
    last = None
    try:
        for done in work:
            if done is not None:
                last = done
            elif last is not None:
                done, last = last, None
                yield _stretch(*done)
    except (Exception, KeyboardInterrupt, SystemExit):  # what is finished comes out before it
        if last is not None:
            yield _stretch(*last)
        raise
    if last is not None:
        yield _stretch(*last)


def run(program: Program, params, hyperparams, key, samples: Sample, lanes: int | None,
        progress: Callable[[Progress], None] | None = None) -> Outcome:
    """Attack all samples on all local devices.

    Args:
        program, params, hyperparams, key, lanes: as in `stream`.
        samples: NumPy arrays with leading axis N >= 1, `sample_id` ascending.
        progress: called with a `Progress` after every bounded stretch of work.

    Returns:
        Outcome of NumPy arrays with leading axis N.
    """
    total = samples.x.shape[0]
    results = None
    done = lane_evals = 0
    for stretch in stream(program, params, hyperparams, key, [samples],
                          image_shape=samples.x.shape[1:], lanes=lanes, num_images=total):
        if results is None:
            results = jax.tree.map(lambda a: np.zeros((total, *a.shape[1:]), a.dtype),
                                   stretch.outcome)
        for store, new in zip(results, stretch.outcome):
            store[np.searchsorted(samples.sample_id, stretch.sample_ids)] = new
        done += len(stretch.sample_ids)
        lane_evals += stretch.lane_evals
        if progress is not None:
            progress(Progress(done, total, int(results.success.sum()),
                              int(results.gradient_evals.sum()), lane_evals))
    return results


def as_key(key) -> jax.Array:
    """Return a typed random key.

    Args:
        key: None, an int seed, or a typed key.

    Returns:
        Typed key; seed 0 for None.

    Raises:
        TypeError: for anything else.
        ValueError: for a seed outside [0, 2**32), or several keys.

    The key is one of threefry's: of a batch of the others, "rbg", JAX draws all numbers from the first key,
    so that an image's would be those of its neighbours.
    """
    if key is None or isinstance(key, (int, np.integer)):
        if key is not None and not 0 <= key < 2**32:  # JAX takes no more bits into a key
            raise ValueError(f"key must be from 0 to 2**32 - 1 as a seed, got {key}")
        return jax.random.key(0 if key is None else int(key), impl=_KEYS)
    if hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.shape:
            raise ValueError(f"key must be one key, got an array of them of shape {list(key.shape)}; pass key[0]")
        if str(jax.random.key_impl(key)) == _KEYS:
            return key
        return jax.random.wrap_key_data(jax.random.key_data(key)[:2], impl=_KEYS)
    raise TypeError(f"key must be None, an int or a typed key from jax.random.key, "
                    f"got {type(key).__name__}")
