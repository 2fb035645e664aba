"""`evaluate`: a whole robustness evaluation that can be killed at any moment and resumed.

Where the samples are worked on changes nothing in the records but what the model's own rounding does with
another number of lanes: all local devices, the processes of `jax.distributed`, array jobs with `shard`, or
a Ray cluster.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from gse_jax.attacks.runner import layout
from gse_jax.devices import local_devices
from gse_jax.evaluation.attacker import Attacker, unusable
from gse_jax.evaluation.durable import StoreError
from gse_jax.evaluation.fingerprint import differences, versions
from gse_jax.evaluation.forward import Forward
from gse_jax.evaluation.hosts import combined_residue, start_distributed, wait_for_others
from gse_jax.evaluation.interruption import Preempted, StopSignals, Watchdog
from gse_jax.evaluation.job import Job, manifest_of, preflight, set_up
from gse_jax.evaluation.plan import Plan
from gse_jax.evaluation.progress import RunProgress
from gse_jax.evaluation.recorder import Recorder, flush_size
from gse_jax.evaluation.run_directory import Run, open_run
from gse_jax.evaluation.store import (
    MANIFEST,
    Writer,
    prepare,
    read_manifest,
    valid_records,
    widen_manifest,
    write_manifest,
)

ENGINES = ("local", "distributed", "ray")
# How long the processes of one job wait for process 0, which loads and checks before it writes.
_MANIFEST_SECONDS = 600.0


class MismatchError(ValueError):
    """The run directory belongs to other weights, data or settings; the message says which."""


class PreflightError(ValueError):
    """The pre-flight checks found an error; the message says what, and how to repair it."""


def evaluate(plan: Plan, run_dir, *, model=None, data=None, shard: tuple[int, int] | None = None,
             engine: str = "local", on_progress: Callable[[RunProgress], None] | None = None,
             allow_mismatch: bool = False, force: bool = False, flush_samples: int = 256,
             flush_seconds: float = 20.0, stall_seconds: float | None = None) -> Run:
    """Attack every correctly classified image in every case of a plan, and store the results.

    Calling it again with the same arguments goes on where it stopped, whatever stopped it. The
    pre-flight checks run when a run begins, and are in its manifest.

    Args:
        plan: what to run.
        run_dir: directory of the run; made if absent. Shards and processes share it.
        model: (apply_fn, params) as from `gse_jax.models.load`; None loads the plan's.
        data: `gse_jax.data.Dataset`, or an `ImageSource` that is read image by image; None loads
            the plan's.
        shard: (i, n), 0 <= i < n: this call does samples i, i + n, i + 2 n ... only.
        engine: "local" uses all local devices; "distributed" the same in every process of
            `jax.distributed`, which it starts unless the caller has (under SLURM and Open MPI JAX gives each process
            one GPU: start one per GPU, or set `JAX_LOCAL_DEVICE_IDS`); "ray" a Ray cluster (on one with GPUs set
            `JAX_PLATFORMS=cpu` for this process, which would else hold the GPU of a worker).
        on_progress: called with a `RunProgress` after every stretch of work.
        allow_mismatch: go on in a directory of other weights, data or settings; it is recorded.
        force: go on where the pre-flight checks find an error; it is recorded.
        flush_samples: store after so many samples ...
        flush_seconds: ... or so many seconds; a kill costs the work since then.
        stall_seconds: end the process with `EXIT_RESUMABLE` when nothing moves for so long, as on
            a hung device; None never. A stretch of work and the pre-flight checks must be shorter.
            With "ray" only a cluster that no longer answers counts: workers are Ray's to watch.

    Returns:
        Run; not `complete` as long as other shards or processes are at work.

    Raises:
        ValueError, TypeError, FileNotFoundError: for a plan that cannot be run, in one line.
        MismatchError: if the directory belongs to another run.
        PreflightError: if the checks found an error.
        StoreError: if the directory cannot be written to, or another process writes to it.
        Preempted: after SIGTERM or Ctrl-C, everything finished being stored (on an accelerator but
            for the last stretch of work); a SystemExit with code `EXIT_RESUMABLE`.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r} is unknown; use one of {', '.join(ENGINES)}")
    _check_options(flush_samples=flush_samples, flush_seconds=flush_seconds,
                   stall_seconds=stall_seconds)
    if engine == "ray":
        from gse_jax.evaluation import ray_engine

        ray_engine.require_ray()
    if engine == "distributed":
        start_distributed()
    residue, name = combined_residue(shard)
    run_dir = Path(run_dir)
    job = set_up(plan, model, data)
    image_bytes = int(np.prod(job.model.image_shape)) * job.model.dtype.itemsize
    samples = flush_size(flush_samples, image_bytes)
    prepare(run_dir, 2 * samples * image_bytes)
    with (Writer(run_dir, name, residue) as writer, StopSignals() as signals,
          Watchdog(stall_seconds, lambda: writer.event("stalled", seconds=stall_seconds)) as watchdog):
        mismatch = _begin(job, run_dir, allow_mismatch, force, watchdog.beat)
        if mismatch:
            writer.event("mismatch", differences=mismatch)
        work, total, resumed = _remaining(job, run_dir, residue)
        devices = local_devices()
        writer.event("start", engine=engine, residue=list(residue), remaining=total - resumed,
                     devices=len(devices), device_kind=devices[0].device_kind,
                     platform=devices[0].platform, lanes=plan.lanes, versions=versions())
        forward = Forward(job.model.params, job.model.apply_fn, job.model.image_shape)
        with Recorder(writer, forward, job.model.bounds, samples=samples, seconds=flush_seconds,
                      total=total, resumed=resumed) as recorder:
            def waiting():
                watchdog.beat()
                if signals.requested:
                    raise Preempted(signals.requested)

            def moved():
                if on_progress is not None:
                    on_progress(recorder.progress)
                waiting()

            moved()
            if engine == "ray":
                ray_engine.run(job, work, recorder, moved, waiting)
            else:
                _run_here(job, work, run_dir, writer, recorder, forward, moved)
        writer.event("end")
    if engine == "distributed":
        wait_for_others()
    return open_run(run_dir)


def _check_options(**options):
    for name, value in options.items():
        if value is None and name == "stall_seconds":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not value > 0:
            raise ValueError(f"{name} must be a positive number, got {value!r}")


class Work(NamedTuple):
    """What is left to do in one group.

    Attributes:
        group: the attack and its cases.
        todo: [cases, N] bool.
    """

    group: Any
    todo: np.ndarray

    def samples(self, job: Job):
        """Yield (Read, cases still to be done) one by one, reading images only then."""
        for index in np.flatnonzero(self.todo.any(axis=0)):
            cases = [case for case, todo in zip(self.group.cases, self.todo) if todo[index]]
            yield job.reader.read(int(index)), cases


def _begin(job: Job, run_dir: Path, allow_mismatch: bool, force: bool, beat) -> list[str]:
    """Write the manifest, or compare with the one that is there; return allowed differences."""
    # A run writes its manifest before any record, so records are looked for first.
    lost = any(True for _ in valid_records(run_dir)) and not (run_dir / MANIFEST).is_file()
    if lost and not allow_mismatch:
        raise MismatchError(f"run directory: {run_dir} holds records but no {MANIFEST}, so nobody knows what made them; "
                            "restore it from a copy, choose another directory, or allow_mismatch=True "
                            "(--allow-mismatch), which takes them as they are and is recorded")
    if not (run_dir / MANIFEST).is_file():
        # All processes check: each would compute with its own, possibly different, installation.
        findings = preflight(job)
        errors = [finding for finding in findings if finding.severity == "error"]
        if errors and not force:
            raise PreflightError(" ".join(f"{e.message} {e.fix}".strip() for e in errors)
                                 + " (force=True, or --force, goes on nevertheless)")
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        # Of several processes or shards that start together one writes; the others compare.
        if jax.process_index() == 0:
            write_manifest(run_dir, {**manifest_of(job, findings, created), "forced": bool(errors)})
        _wait_for(run_dir / MANIFEST, beat)
    found = ["manifest: lost, so what made the records before is unknown"] if lost else []
    found += differences(read_manifest(run_dir)["fingerprint"], job.fingerprint)
    if found and not allow_mismatch:
        raise MismatchError(f"run directory: {run_dir} belongs to another run ("
                            f"{'; '.join(found)}); choose another directory, or "
                            "allow_mismatch=True (--allow-mismatch), which is recorded")
    if found:
        widen_manifest(run_dir, manifest_of(job, (), "")["cases"], job.num_samples)
    return found


def _wait_for(path: Path, beat):
    end = time.monotonic() + _MANIFEST_SECONDS
    while not path.is_file():
        if time.monotonic() > end:
            raise StoreError(f"run directory: process 0 has not written {path} within "
                             f"{_MANIFEST_SECONDS:.0f} s; look at its output")
        beat()
        time.sleep(0.2)


def _remaining(job: Job, run_dir: Path, residue) -> tuple[list[Work], int, int]:
    """Return what is left to do, the pairs of this part in all, and how many of them are done."""
    mine = np.arange(job.num_samples) % residue[1] == residue[0]
    position = {str(name): i for i, name in enumerate(job.reader.source.ids)}
    done = {case.name: np.zeros(job.num_samples, bool) for group in job.groups
            for case in group.cases}
    set_aside = {name: np.zeros_like(mask) for name, mask in done.items()}
    for record in valid_records(run_dir):
        index = position.get(record["sample_id"])
        if index is not None and record["case"] in done:
            quarantined = record["status"] == "quarantined"
            (set_aside if quarantined else done)[record["case"]][index] = True
    # What could not be used may be there again: a mount that was away, a file that was repaired.
    for index in np.flatnonzero(mine & np.any(list(set_aside.values()), axis=0)):
        read = job.reader.read(int(index))
        for case in (case for group in job.groups for case in group.cases):
            if set_aside[case.name][index] and unusable(read, case, job.model.num_classes) is not None:
                done[case.name][index] = True
    work = [Work(group, np.stack([mine & ~done[case.name] for case in group.cases]))
            for group in job.groups]
    total = int(mine.sum()) * len(done)
    return work, total, total - sum(int(part.todo.sum()) for part in work)


def _run_here(job: Job, work, run_dir, writer, recorder, forward, moved):
    """Attack on all local devices."""
    devices = local_devices()
    kind = devices[0].device_kind

    def note(lanes):
        nonlocal limit
        limit = lanes
        writer.event("out_of_memory", lanes=lanes, devices=len(devices), device_kind=kind)

    def take(advance):
        recorder.add(advance)
        moved()

    limit = _remembered_lanes(run_dir, kind, job.plan.lanes, job.model.image_shape)
    for part in work:
        count = int(part.todo.sum())
        attacker = Attacker(job.model, part.group, forward, num_samples=job.num_samples,
                            seed=job.plan.seed, lanes=limit, on_out_of_memory=note, on_settled=take)
        for advance in attacker.run(part.samples(job), count) if count else ():
            take(advance)


def _remembered_lanes(run_dir: Path, kind: str, lanes: int | None, image_shape) -> int | None:
    """Return the lanes to start with: no more than fitted into such a device before."""
    here = len(local_devices())
    fitted = [event["lanes"] if event.get("devices", here) == here else max(1, event["lanes"] // event["devices"]) * here
              for event in open_run(run_dir).events
              if event["event"] == "out_of_memory" and event["device_kind"] == kind]
    devices, width = layout(None, lanes, image_shape)
    return min(fitted) if fitted and min(fitted) < width * len(devices) else lanes
