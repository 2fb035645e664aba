"""Elastic clusters: chunks of samples as Ray tasks.

A task is a pure function of its samples, so Ray may run it again when its worker dies; the driver
alone writes, once per finished chunk. Workers need no shared file system.
"""

import functools
import uuid
from typing import Any, NamedTuple

import jax
import numpy as np

from gse_jax.attacks.runner import default_lanes_per_device
from gse_jax.evaluation.attacker import Attacker, Model
from gse_jax.evaluation.cases import Group
from gse_jax.evaluation.forward import Forward
from gse_jax.evaluation.measuring import measured
from gse_jax.evaluation.store import Finished

_RETRIES = 10  # of a chunk whose worker died; one that kills every worker must end somewhere
_CHUNKS_PER_WORKER = 2  # one at work, one waiting: workers never idle, the driver holds little
# (case, sample) pairs per chunk and lane: enough that the lanes are full for most of a chunk, few
# enough that the death of a worker costs little. Ray ends a worker with a GPU after each chunk, so that the next
# one compiles anew.
_CHUNK_LANES = {"cpu": 4, "gpu": 16}
_LOOK_SECONDS = 1.0


class Spec(NamedTuple):
    """What every task needs; sent to each worker once.

    Attributes:
        key: unique text of this call.
        model: the model, parameters as NumPy arrays.
        groups: the attacks.
        num_samples: N.
        seed: of the run.
        lanes: images worked on at a time by one worker.
        x64: whether JAX computes in 64 bits.
    """

    key: str
    model: Model
    groups: tuple[Group, ...]
    num_samples: int
    seed: int
    lanes: int | None
    x64: bool


def require_ray():
    """Import Ray.

    Returns:
        The module.

    Raises:
        ImportError: naming the extra, if it is not installed.
    """
    try:
        import ray
    except ImportError:
        raise ImportError("engine='ray' needs Ray: pip install 'gse-jax[ray]'") from None
    return ray


def attack_chunk(spec: Spec, group_index: int, entries) -> tuple[list[Finished], int]:
    """Attack a few samples; the body of a task.

    Args:
        spec: the run.
        group_index: which of its groups.
        entries: list of (Read, positions of the cases to do).

    Returns:
        (finished samples with their images, gradient evaluations made).
    """
    jax.config.update("jax_enable_x64", spec.x64)
    model, forward = spec.model, _forward(spec)
    group = spec.groups[group_index]
    place = spec.key, group_index
    attacker = Attacker(model, group, forward, num_samples=spec.num_samples, seed=spec.seed,
                        lanes=_LANES.get(place, spec.lanes),
                        on_out_of_memory=functools.partial(_LANES.__setitem__, place))
    samples = [(read, [group.cases[i] for i in cases]) for read, cases in entries]
    finished, attacked, lane_evals = [], [], 0
    for advance in attacker.run(samples, sum(len(cases) for _, cases in samples)):
        finished += advance.settled
        attacked += advance.attacked
        lane_evals += advance.lane_evals
    return finished + measured(attacked, forward, model.bounds), lane_evals


_LANES: dict[tuple[str, int], int] = {}  # for how many there was room, where it was not for all
_FORWARDS: dict[str, Forward] = {}


def _forward(spec):
    # Compiled functions are kept between the tasks of one run, and only those.
    if spec.key not in _FORWARDS:
        _FORWARDS.clear()
        _LANES.clear()
        model = spec.model
        _FORWARDS[spec.key] = Forward(model.params, model.apply_fn, model.image_shape)
    return _FORWARDS[spec.key]


@functools.lru_cache(maxsize=1)
def _fetch(key, ref):
    """Fetch the spec once per worker: a new copy of the model would compile anew."""
    del key  # Part of the cache's key only.
    return require_ray().get(ref)


def _task(key, holder, group_index, entries):
    # The reference comes inside a list: Ray would resolve it anew for every task otherwise.
    return attack_chunk(_fetch(key, holder[0]), group_index, entries)


def run(job, work, recorder, moved, waiting) -> None:
    """Attack everything that is left on a Ray cluster.

    Args:
        job: the job.
        work: list of `evaluator.Work`.
        recorder: takes what is finished.
        moved: called after every finished chunk; may raise to stop.
        waiting: called while the cluster answers and nothing is finished; may raise to stop.
    """
    ray = require_ray()
    ours = not ray.is_initialized()
    if ours:
        ray.init(log_to_driver=False)  # RAY_ADDRESS decides which cluster; none starts a local one.
    gpus = int(ray.cluster_resources().get("GPU", 0))
    arrays = jax.tree.map(np.asarray, job.model.params)
    spec = Spec(uuid.uuid4().hex, job.model._replace(params=arrays), job.groups, job.num_samples,
                job.plan.seed, job.plan.lanes, bool(jax.config.read("jax_enable_x64")))
    holder = [ray.put(spec)]
    task = ray.remote(max_retries=_RETRIES, num_cpus=1, num_gpus=1 if gpus else 0)(_task)
    platform = "gpu" if gpus else "cpu"
    lanes = job.plan.lanes or default_lanes_per_device(platform, *job.model.image_shape[:2])
    chunks = _chunks(job, work, pairs=_CHUNK_LANES[platform] * lanes)
    pending: set[Any] = set()
    try:
        while True:
            # Looked up again each time: nodes come and go.
            slots = int(ray.cluster_resources().get("GPU" if gpus else "CPU", 1))
            while len(pending) < max(1, slots) * _CHUNKS_PER_WORKER:
                chunk = next(chunks, None)
                if chunk is None:
                    break
                pending.add(task.remote(spec.key, holder, *chunk))
            if not pending:
                return
            ready, _ = ray.wait(list(pending), num_returns=1, timeout=_LOOK_SECONDS)
            for ref in ready:
                pending.remove(ref)
                recorder.add_finished(*ray.get(ref))
            (moved if ready else waiting)()
    finally:
        for ref in pending:
            ray.cancel(ref)
        if ours:
            ray.shutdown()


def _chunks(job, work, *, pairs):
    """Yield (group index, entries) with about so many (case, sample) pairs each."""
    for group_index, part in enumerate(work):
        entries, count = [], 0
        for read, cases in part.samples(job):
            entries.append((read, [part.group.cases.index(case) for case in cases]))
            count += len(cases)
            if count >= pairs:
                yield group_index, entries
                entries, count = [], 0
        if entries:
            yield group_index, entries
