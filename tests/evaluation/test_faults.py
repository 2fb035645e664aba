"""The fault matrix of an evaluation: one test per row.

Kill -9 and torn lines are in test_kill.py, test_durable.py and test_store.py; other weights, data,
settings, versions, devices and batches in test_evaluate.py; doubtful models in test_checks.py;
fresh verification in test_verification.py; pickles and damaged weights in tests/models.
"""

import dataclasses
import os
import signal
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gse_jax.attacks import runner
from gse_jax.evaluation import (
    EXIT_RESUMABLE,
    Preempted,
    StoreError,
    attacker,
    evaluate,
    evaluator,
    forward,
    open_run,
)
from gse_jax.evaluation.durable import Journal, read_journal
from gse_jax.evaluation.job import set_up
from tests.evaluation.small_run import (
    PLAN,
    ROOT,
    dataset,
    model,
    same_tables,
    start,
    table,
)
from tests.toy_model import failing_at, small_logits

UNTARGETED = dataclasses.replace(PLAN, attacks=PLAN.attacks[:1])
NO_MEMORY = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")


def evaluate_small(run_dir, plan=PLAN, **options):
    return evaluate(plan, run_dir, **{"model": model(), "data": dataset(), **options})


class Faulty:
    """The small data set as a source in which some images cannot be used."""

    FAULTS = {5: "unreadable", 6: "NaN or infinite", 7: "shape", 8: "bounds", 9: "label 7",
              11: "float64"}

    def __init__(self, repaired=()):
        self._data, self._repaired = dataset(), repaired
        self.ids = self._data.ids

    def __getitem__(self, index):
        image, label = self._data.images[index].copy(), self._data.labels[index]
        if index in self._repaired:
            return image, label
        if index == 5:
            raise OSError("unreadable: broken data stream")
        if index == 6:
            image[2, 2] = np.nan
        if index == 7:
            image = image[:, :-1]
        if index == 8:
            image *= 255
        if index == 11:
            image = (image * 255).astype(np.uint8)
        return image, 7 if index == 9 else label


def test_a_corrupt_image_is_set_aside_with_its_reason_and_the_run_goes_on(whole, tmp_path):
    run = evaluate_small(tmp_path, UNTARGETED, data=Faulty())
    assert run.complete
    expected = {key: row for key, row in table(whole).items() if key in table(run)}
    assert len(expected) == 40
    for key, row in table(run).items():
        if row["index"] in Faulty.FAULTS:
            assert row["status"] == "quarantined" and not row["success"]
            assert Faulty.FAULTS[row["index"]] in row["reason"]
            del expected[key]
    set_aside = [record for record in run.records if record["status"] == "quarantined"]
    assert len(set_aside) == 6 and all(r["prediction"] is r["array"] is None for r in set_aside)
    same_tables({k: v for k, v in table(run).items() if v["status"] != "quarantined"}, expected)
    assert "6 samples could not be used and are quarantined" in run.warnings


def test_what_was_set_aside_in_one_case_is_set_aside_in_the_others(tmp_path):
    """After a kill between the records of two cases."""
    evaluate_small(tmp_path, PLAN, data=Faulty())
    (path,) = (tmp_path / "records").iterdir()
    records = list(read_journal(path))
    path.unlink()
    with Journal(path) as journal:
        journal.append(r for r in records if r["status"] != "quarantined" or r["case"] == "gse/untargeted")
    run = evaluate_small(tmp_path, PLAN, data=Faulty())
    assert run.complete and len(run.records) == len(records) == 120


def test_what_was_set_aside_is_tried_again(whole, tmp_path):
    """A mount may have been away; what is still broken stays as it is."""
    evaluate_small(tmp_path, UNTARGETED, data=Faulty())
    stored = [path.read_bytes() for path in sorted((tmp_path / "records").iterdir())]
    evaluate_small(tmp_path, UNTARGETED, data=Faulty())
    assert [path.read_bytes() for path in sorted((tmp_path / "records").iterdir())][:len(stored)] == stored
    repaired = {5, 6, 7, 8, 9}
    run = evaluate_small(tmp_path, UNTARGETED, data=Faulty(repaired), allow_mismatch=True)
    assert run.complete and "1 samples could not be used and are quarantined" in run.warnings
    same_tables({k: v for k, v in table(run).items() if v["index"] != 11},
                {k: v for k, v in table(whole).items() if k in table(run) and v["index"] != 11})


@pytest.mark.slow
def test_corrupt_images_of_a_named_file_are_set_aside_too(tmp_path):
    """`attack` refuses such a file as a whole; `evaluate` must go on without the two images."""
    data = dataset()
    images = data.images.astype(np.float32)
    images[6, 2, 2], images[8] = np.nan, images[8] * 255
    np.savez(tmp_path / "images.npz", x=images, y=data.labels, ids=np.asarray(data.ids))
    plan = dataclasses.replace(UNTARGETED, data=f"npz:{tmp_path / 'images.npz'}")
    in_float32 = small_logits, tuple(array.astype(np.float32) for array in model()[1])
    rows = table(evaluate(plan, tmp_path / "run", model=in_float32))
    quarantined = [row for row in rows.values() if row["status"] == "quarantined"]
    assert [row["index"] for row in quarantined] == [6, 8]
    assert "NaN" in quarantined[0]["reason"] and "bounds" in quarantined[1]["reason"]
    assert len(rows) == 40


def test_where_no_image_can_be_used_the_data_is_refused(tmp_path):
    data = dataset()
    with pytest.raises(ValueError, match="data: none of the first images.*inside bounds"):
        evaluate_small(tmp_path / "run", data=data._replace(images=data.images * 255))
    with pytest.raises(ValueError, match="NCHW"):
        evaluate_small(tmp_path / "run",
                       data=data._replace(images=data.images.transpose(0, 3, 1, 2)))
    assert not (tmp_path / "run").exists()


def logits_with_holes(params, x):
    """The small model, NaN on one clean image and wherever another one is touched."""
    *layers, images = params
    logits = small_logits(layers, x)
    clean = jnp.abs(x - images[:1]).max((1, 2, 3)) == 0
    distance = jnp.abs(x - images[1:]).max((1, 2, 3))
    return jnp.where((clean | ((distance > 0) & (distance < 0.2)))[:, None], jnp.nan, logits)


def test_nan_is_no_success_and_no_neighbour_notices(whole, tmp_path):
    apply_fn, params = logits_with_holes, (*model()[1], dataset().images[[3, 4]])
    run = evaluate_small(tmp_path, UNTARGETED, model=(apply_fn, params))
    rows, expected = table(run), table(whole)
    for sample in ("s00003", "s00004"):
        row = rows.pop(("gse/untargeted", sample))
        assert (row["status"], row["success"], row["changed_pixels"]) == ("non_finite", False, None)
        assert "NaN" in row["reason"]
    same_tables(rows, {key: expected[key] for key in rows})
    assert len(rows) == 38


def test_out_of_memory_halves_the_lanes_and_loses_nothing(whole, tmp_path, monkeypatch):
    real, widths = attacker.attack_stream, []

    def crowded(*args, lanes, **options):
        widths.append(lanes)
        for count, stretch in enumerate(real(*args, lanes=lanes, **options)):
            if lanes > 2 and count == 2:  # In the middle, with lanes at work.
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1")
            yield stretch

    monkeypatch.setattr(attacker, "attack_stream", crowded)
    run = evaluate_small(tmp_path, dataclasses.replace(PLAN, lanes=4))
    assert widths == [4, 2, 2]  # The size is remembered for the second attack ...
    assert run.complete
    same_tables(table(run), table(whole))
    assert [e["lanes"] for e in run.events if e["event"] == "out_of_memory"] == [2]
    for path in (tmp_path / "arrays").iterdir():
        path.unlink()
    widths.clear()
    evaluate_small(tmp_path, dataclasses.replace(PLAN, lanes=4))
    assert widths == [2, 2]  # ... and for the next start.


@pytest.mark.parametrize("lanes, devices, wish, expected", [
    (2, 4, 4, 2), (8, 4, 16, 8),  # as many devices as now
    (16, 8, 16, 8), (4, 1, 64, 16),  # two in each of eight; four in one
    (2, 8, 16, 4),  # one is the least
    (4096, 8, None, None), (64, 1, None, None)])  # more than the default
def test_remembered_lanes_are_those_of_a_device(tmp_path, monkeypatch, lanes, devices, wish, expected):
    event = {"event": "out_of_memory", "lanes": lanes, "devices": devices, "device_kind": "cpu"}
    other = event | {"lanes": 1, "device_kind": "another"}
    monkeypatch.setattr(evaluator, "open_run", lambda _: types.SimpleNamespace(events=[event, other]))
    assert evaluator._remembered_lanes(tmp_path, "cpu", wish, (32, 32, 3)) == expected


def test_a_fill_that_settles_nothing_still_moves():
    """Images that a resumed run reads and need not attack: the watchdog must see it, and SIGTERM be seen."""
    apply_fn, params = model()
    data = dataset()
    job = set_up(UNTARGETED, (apply_fn, params), data)
    classify = forward.Forward(params, apply_fn, data.images.shape[1:])
    classify.batch, seen = 8, []
    task = attacker.Attacker(job.model, job.groups[0], classify, num_samples=40, seed=0, lanes=1, on_settled=seen.append)
    reads = [(job.reader.read(i), job.groups[0].cases) for i in range(40) if i % 10]  # all classified correctly
    finished = [one for advance in task.run(reads, 36) for one in advance.attacked]
    assert len(finished) == 36 and len(seen) == 5 and not any(advance.settled for advance in seen)


@pytest.mark.slow  # the engine's own test of it is quick
def test_out_of_memory_on_an_accelerator_loses_nothing(whole, tmp_path, monkeypatch):
    """What was finished before the error comes too."""
    monkeypatch.setattr(runner, "_platform", lambda devices: "gpu")
    monkeypatch.setattr(runner, "_CALLS", 8)
    monkeypatch.setattr(runner, "on_mesh", failing_at(runner.on_mesh, 4, NO_MEMORY))
    run = evaluate_small(tmp_path, dataclasses.replace(UNTARGETED, lanes=4))
    assert run.complete and len(table(run)) == 40
    same_tables(table(run), {key: row for key, row in table(whole).items() if key in table(run)})
    assert [e["lanes"] for e in run.events if e["event"] == "out_of_memory"] == [2]


def test_after_an_out_of_memory_comes_half_of_what_failed(tmp_path, monkeypatch):
    """Few images begin in fewer lanes than the default: 20 on four devices in four each."""
    monkeypatch.setattr(runner, "on_mesh", failing_at(runner.on_mesh, 1, NO_MEMORY))
    run = evaluate_small(tmp_path, dataclasses.replace(UNTARGETED, lanes=None), shard=(0, 2))
    assert len(run.records) == 20
    assert [e["lanes"] for e in run.events if e["event"] == "out_of_memory"] == [8]


def hungry_logits(params, x):
    """The small model, which asks for 35 TB where a device holds more than three images."""
    count = 1 << 43 if x.shape[0] > 3 else 2
    numbers = jax.lax.iota(jnp.float32, count) * jax.lax.stop_gradient(x.sum().astype(jnp.float32))
    memory = jnp.sort(jnp.sin(numbers))
    return small_logits(params, x) + 0 * memory[1].astype(x.dtype)


@pytest.mark.slow  # the same path runs with an error of the same kind above
def test_a_real_out_of_memory_halves_lanes_and_batches(whole, tmp_path):
    run = evaluate_small(tmp_path, dataclasses.replace(UNTARGETED, lanes=36), model=(
        hungry_logits, model()[1]))
    assert run.complete
    same_tables(table(run), {k: v for k, v in table(whole).items() if k in table(run)})
    assert len(table(run)) == 40
    assert [e["lanes"] for e in run.events if e["event"] == "out_of_memory"] == [8]  # of four on each device


def test_out_of_memory_in_one_lane_is_the_end_and_what_was_done_is_kept(tmp_path, monkeypatch):
    real = attacker.attack_stream

    def hopeless(*args, **options):
        for count, stretch in enumerate(real(*args, **options)):
            yield stretch
            if count == 6:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(attacker, "attack_stream", hopeless)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        evaluate_small(tmp_path, UNTARGETED)
    assert 0 < len(open_run(tmp_path).records) < 40


def test_out_of_memory_in_the_forward_pass_halves_its_batch(monkeypatch):
    apply_fn, params = model()
    x = dataset().images
    classify = forward.Forward(params, apply_fn, x.shape[1:])
    expected, real = classify(x), classify._logits

    def crowded(params, batch):
        if len(batch) > 10:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return real(params, batch)

    monkeypatch.setattr(classify, "_logits", crowded)
    found = classify(x)
    assert classify.batch == 8
    np.testing.assert_array_equal(found.classes, expected.classes)
    np.testing.assert_allclose(found.confidences, expected.confidences, rtol=1e-12)


def test_out_of_memory_while_the_lanes_are_fed_loses_no_sample(whole, tmp_path, monkeypatch):
    """The forward pass over the next clean images finds no room beside the lanes."""
    real, refused = forward.Forward.__call__, []

    def crowded(self, x):
        if len(refused) < 2 and len(x) < 30:  # Not the first chunk.
            refused.append(len(x))
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return real(self, x)

    monkeypatch.setattr(forward, "_LARGEST_BATCH", 32)  # The 40 images are 32 and 8.
    monkeypatch.setattr(forward.Forward, "__call__", crowded)
    run = evaluate_small(tmp_path, dataclasses.replace(UNTARGETED, lanes=4))
    assert refused == [8, 8]
    assert [e["lanes"] for e in run.events if e["event"] == "out_of_memory"] == [2, 1]
    assert run.complete
    rows = table(run)
    same_tables(rows, {key: table(whole)[key] for key in rows})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_flushes_and_ends_with_the_resumable_code(whole, tmp_path, number):
    seen = []

    def send(progress):
        seen.append(progress.done)
        if progress.done >= 30 and len(seen) < 1000:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(Preempted) as stopped:
        evaluate_small(tmp_path, on_progress=send)
    assert stopped.value.code == EXIT_RESUMABLE == 75
    assert signal.Signals(number).name in str(stopped.value)
    assert signal.getsignal(number) is before
    run = open_run(tmp_path)
    assert len(run.records) == seen[-1] < 120  # Everything finished is there.
    same_tables(table(evaluate_small(tmp_path)), table(whole))


def test_the_watchdog_ends_a_process_in_which_nothing_moves():
    script = ("import time\nfrom gse_jax.evaluation.interruption import Watchdog\n"
              "with Watchdog(0.5, lambda: print('stalled', flush=True)) as watchdog:\n"
              "    for _ in range(8):\n        time.sleep(0.1)\n        watchdog.beat()\n"
              "    print('moved', flush=True)\n    time.sleep(600)\n")
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                           timeout=60)
    assert (ended.returncode, ended.stdout) == (EXIT_RESUMABLE, "moved\nstalled\n")


def test_the_watchdog_spares_a_process_that_was_suspended():
    script = ("import time\nfrom gse_jax.evaluation.interruption import Watchdog\n"
              "with Watchdog(1.0, lambda: print('stalled', flush=True)) as watchdog:\n"
              "    print('begun', flush=True)\n"
              "    for _ in range(4):\n        time.sleep(0.2)\n        watchdog.beat()\n"
              "    print('done', flush=True)\n")
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    process.send_signal(signal.SIGCONT)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, "done\n")


@pytest.mark.slow
def test_a_hung_device_ends_the_process_with_the_resumable_code(whole, tmp_path, cache):
    process = start(tmp_path / "run", cache=cache, then="hang", stall_seconds=15)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == EXIT_RESUMABLE, errors
    assert "the device seems to hang" in errors
    run = open_run(tmp_path / "run")
    assert 0 < len(run.records) < 120
    assert any(event["event"] == "stalled" for event in run.events)
    same_tables(table(evaluate_small(tmp_path / "run")), table(whole))


def test_two_writers_at_once(whole, tmp_path, cache):
    process = start(tmp_path / "run", cache=cache, then="hang")
    try:
        lock = tmp_path / "run" / "locks" / "main.lock"
        while process.poll() is None and not (lock.is_file() and lock.read_text()):
            time.sleep(0.01)
        with pytest.raises(StoreError, match=f"process {process.pid} on .* is working in it"):
            evaluate_small(tmp_path / "run")
    finally:
        process.kill()
        process.communicate()
    same_tables(table(evaluate_small(tmp_path / "run")), table(whole))


@pytest.mark.slow  # the path of the full disk
def test_a_file_that_may_not_grow_is_told_and_nothing_is_lost(whole, tmp_path, cache):
    """RLIMIT_FSIZE stands for a quota: a write ends in the middle of a line."""
    process = start(tmp_path / "run", cache=cache, file_size_limit=30_000)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors.strip().splitlines()[-1].startswith(
        "gse_jax.types.StoreError: run directory: cannot write"), errors
    assert "the file-size limit is reached" in errors
    kept = table(open_run(tmp_path / "run"))
    assert 0 < len(kept) < 120
    run = evaluate_small(tmp_path / "run")
    same_tables(table(run), table(whole))


def in_namespace(script, *arguments):
    """Run a shell script that may mount; skip where the system does not let us."""
    allowed = subprocess.run(["unshare", "-rm", "sh", "-c", "mount -t tmpfs none /mnt"],
                             capture_output=True)
    if allowed.returncode:
        pytest.skip("this machine lets tests mount no file systems")
    return subprocess.run(["unshare", "-rm", "sh", "-c", script, "sh", *map(str, arguments)],
                          cwd=ROOT, capture_output=True, text=True, timeout=180)


def program(cache, then=None):
    options = f'{{"devices": 1, "cache": "{cache}", "then": "{then or ""}"}}'
    return f"{sys.executable} -m tests.evaluation.small_run $1/run '{options}'"


@pytest.mark.slow
def test_a_full_disk_is_told_and_nothing_is_lost(whole, tmp_path, cache):
    """A small file system that fills up in the middle of the run, and is then freed."""
    (tmp_path / "disk").mkdir()
    ended = in_namespace(
        f"mount -t tmpfs -o size=20m none $1; {program(cache, 'fill_disk')}; echo rc=$?; "
        f"rm $1/run/filler; {program(cache)} && cp -r $1/run $2", tmp_path / "disk",
        tmp_path / "run")
    assert "rc=1" in ended.stdout and "the disk is full; free some space" in ended.stderr
    same_tables(table(open_run(tmp_path / "run")), table(whole))
    # Nothing was written after the disk was full, and nothing done was done again.
    starts = [e for e in open_run(tmp_path / "run").events if e["event"] == "start"]
    assert 0 < starts[1]["remaining"] < 120


def test_a_disk_without_room_and_a_read_only_one_are_refused_before_computing(tmp_path, cache):
    (tmp_path / "disk").mkdir()
    ended = in_namespace(f"mount -t tmpfs -o size=1m none $1; {program(cache)}; "
                         f"mount -o remount,ro $1; {program(cache)}", tmp_path / "disk")
    first, second = [line for line in ended.stderr.splitlines() if line.startswith(
        "gse_jax.types.StoreError")]
    assert "MiB of free disk, expected at least" in first
    assert "the file system is read-only; choose another directory" in second
    assert ended.returncode == 1
