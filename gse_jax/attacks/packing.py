"""The tail: when no image waits any more, keep the lanes full with the images that are left.

A fixed number of lanes would idle until the slowest image is done. Instead the unfinished images are
worked in fewer lanes while the others are parked on the host, half-way; a parked one takes the next
lane that falls free, and all are spread evenly over the devices. That keeps lanes busy at few widths,
so at few compilations: on CPU, where a call costs what its lanes cost, one lane (8 first, if there were
more); on an accelerator, whose narrow calls hardly cost less than wider ones, a fourth and a sixteenth of
the default.
Images that have most of their work ahead go first, as far as the attack can tell: a long one that
waits makes the tail longer.

`benchmarks/tail.py` replays the runs of 99 real images through the engine, at what the calls cost. With
an H100's times (1.60, 4.15 and 14.95 ms for 64, 256 and 1,024 lanes of a ResNet-20) the model works at
64 % of its best throughput for 1,024 images, 71 % for 1,500 and 87 % for 10,000; without the order at 60,
64 and 86 % (measured on an H200 without it, and narrower only where half of the lanes idle: 61 % for
1,024 and 83 % for 10,000). Were it known how long each image takes, and the longest begun first, it would
be at 78, 77 and 91 %.
"""

import jax
import numpy as np

from gse_jax.attacks.algorithm import NO_SAMPLE
from gse_jax.attacks.lanes import LanesState

# An image of a ResNet-20 costs 5 % more in a call of 4 than in one of 8 to 24, and 20 to 50 % more alone.
CPU_WIDTH = 8
CPU_WIDTH_FOR_FEW = 4  # keeps the lanes of fewer images full for longer
_STEP_ON_ACCELERATORS = 4  # each narrower width is a compilation
FULL_ENOUGH = 0.75  # of an accelerator's lanes; below, a narrower call with images parked costs less


def tail_width(unfinished: int, width: int, num_devices: int, platform: str,
               narrowest: int = 1) -> int:
    """Return how many lanes per device the tail takes.

    Args:
        unfinished: images left, >= 1; none of them waits in a queue.
        width: lanes per device now.
        num_devices: D.
        platform: "cpu", "gpu" or "tpu".
        narrowest: lanes per device below which an accelerator's call costs the same.

    Returns:
        At most `width`.
    """
    share = -(-unfinished // num_devices)
    if platform == "cpu":
        if share >= width or width < CPU_WIDTH_FOR_FEW:  # whoever asked for so few lanes compiles one program
            return width
        return CPU_WIDTH if share >= CPU_WIDTH else 1
    while share <= FULL_ENOUGH * width and width // _STEP_ON_ACCELERATORS >= narrowest:
        width //= _STEP_ON_ACCELERATORS
    return width


def lanes_to_fill(sample_id, parked: LanesState | None, num_devices: int, least: int = 1) -> bool:
    """Tell whether an idle lane could work on a parked image, or on one of another device.

    Args:
        sample_id: [L] int32 of the lanes, L / D per device.
        parked: what `pack` returned; None for nothing.
        num_devices: D.
        least: lanes that must gain, unless fewer images than that are parked.

    Returns:
        Whether to `pack` again.
    """
    occupied = (np.asarray(sample_id) != NO_SAMPLE).reshape(num_devices, -1)
    left = occupied.sum(1)
    waiting = 0 if parked is None else len(parked.sample_id)
    idle = occupied.size - left.sum()
    return bool((waiting and idle >= min(least, waiting, occupied.size)) or left.max() - left.min() > least)


def pack(lanes: LanesState, parked: LanesState | None, width: int, num_devices: int,
         progress=None) -> tuple[LanesState, LanesState]:
    """Fill `width` lanes per device with unfinished images, evenly, and park the rest.

    Args:
        lanes: the lanes of all devices; at least one is occupied.
        parked: what the last call returned; None for nothing.
        width: lanes per device from now on.
        num_devices: D.
        progress: see `Algorithm`; None for no preference.

    Returns:
        (lanes [D * width, ...], parked [P, ...]) of NumPy arrays. Images with the least progress come
        first, in a lane or parked; equal ones keep their order, parked ones after those in a lane.
    """
    everything = jax.device_get(lanes)  # all arrays at once
    if parked is not None:
        everything = jax.tree.map(lambda *a: np.concatenate(a), everything, parked)
    unfinished = np.flatnonzero(everything.sample_id != NO_SAMPLE)
    if progress is not None:
        order = np.argsort(progress(everything.attack)[unfinished], kind="stable")
        unfinished = unfinished[order]
    chosen, rest = np.split(unfinished, [min(len(unfinished), width * num_devices)])
    source = np.full((num_devices, width), -1)
    for place, lane in enumerate(chosen):
        source[place % num_devices, place // num_devices] = lane
    source = source.reshape(-1)
    # Idle lanes repeat an occupied one, whose state is finite.
    packed = jax.tree.map(lambda a: a[np.where(source >= 0, source, unfinished[0])], everything)
    ids = np.where(source >= 0, packed.sample_id, NO_SAMPLE).astype(np.int32)
    return packed._replace(sample_id=ids), jax.tree.map(lambda a: a[rest], everything)
