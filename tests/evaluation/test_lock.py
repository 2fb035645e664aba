"""One writer per name, and a dead one is no writer."""

import functools
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from gse_jax.evaluation import lock
from gse_jax.evaluation.durable import StoreError
from gse_jax.evaluation.lock import WriterLock

HOLD = """
import sys, time
from pathlib import Path
from gse_jax.evaluation.lock import WriterLock
with WriterLock(Path(sys.argv[1]), sys.argv[2], (int(sys.argv[3]), int(sys.argv[4]))):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Starts another process that holds a lock."""
    processes = []

    def start(writer, index, count):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path), writer, str(index), str(count)],
            stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_two_processes_cannot_both_write_and_a_killed_one_leaves_no_trace(tmp_path, holder):
    process = holder("main", 0, 1)
    with pytest.raises(StoreError, match=rf"process {process.pid} on .*'main'.*--shard I/N"):
        WriterLock(tmp_path, "main", (0, 1)).__enter__()
    with pytest.raises(StoreError, match=f"process {process.pid}"):  # It does all samples.
        WriterLock(tmp_path, "shard-1-of-3", (1, 3)).__enter__()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with WriterLock(tmp_path, "main", (0, 1)):
        pass


def test_shards_without_a_common_sample_work_side_by_side(tmp_path, holder):
    holder("shard-0-of-3", 0, 3)
    with WriterLock(tmp_path, "shard-1-of-3", (1, 3)):
        pass
    with pytest.raises(StoreError, match="shard-0-of-3"):  # 0, 3, 6 ... meets 0, 2, 4 ...
        WriterLock(tmp_path, "shard-0-of-2", (0, 2)).__enter__()
    with WriterLock(tmp_path, "main", (1, 3)):  # The refusal left nothing behind.
        pass


def test_within_one_process_as_well(tmp_path):
    with WriterLock(tmp_path, "main", (0, 1)):
        with pytest.raises(StoreError, match="is working in it"):
            WriterLock(tmp_path, "main", (0, 1)).__enter__()
    with WriterLock(tmp_path, "main", (0, 1)):
        pass


def foreign(tmp_path, age):
    path = tmp_path / "main.lock"
    path.write_text(json.dumps({"host": "elsewhere 1", "pid": 1, "residue": [0, 1]}))
    seen = path.stat().st_mtime - age
    os.utime(path, (seen, seen))
    return path


def test_a_writer_on_another_machine_is_dead_when_its_heart_has_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(lock.time, "sleep", None)  # dead without a wait
    foreign(tmp_path, lock._LONG_AGO + 5)
    with WriterLock(tmp_path, "main", (0, 1)):
        owner = json.loads((tmp_path / "main.lock").read_text())
        assert owner["pid"] == os.getpid()
    assert (tmp_path / "main.lock").read_text() == ""


def test_the_kernel_knows_better_than_a_process_number(tmp_path):
    """Another process may have been given that of the dead one."""
    (tmp_path / "main.lock").write_text(json.dumps({"host": lock._host(), "pid": os.getppid(), "residue": [0, 1]}))
    with WriterLock(tmp_path, "main", (0, 1)):
        pass


@pytest.mark.parametrize("broken", ["[]", "7", '{"host"', '{"host": "elsewhere", "pid": 1, "residue": 3}',
                                    '{"host": "elsewhere", "pid": 1, "residue": [0, 0]}',
                                    '{"host": "elsewhere", "pid": "x", "residue": [0, 1]}'])
def test_a_lock_that_a_crash_tore_is_free(tmp_path, broken):
    for name in ("main", "shard-0-of-2"):
        (tmp_path / f"{name}.lock").write_text(broken)
    with WriterLock(tmp_path, "main", (0, 1)):
        pass


@pytest.mark.parametrize("age", [lock.STALE_SECONDS - 30, lock.STALE_SECONDS + 60, -600],
                         ids=["seen lately", "our clock is ahead", "our clock is behind"])
def test_in_doubt_it_waits_for_a_heartbeat(tmp_path, monkeypatch, age):
    path = foreign(tmp_path, age)
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 3:
            os.utime(path)

    monkeypatch.setattr(lock.time, "sleep", sleep)
    with pytest.raises(StoreError, match="process 1 on elsewhere"):
        WriterLock(tmp_path, "main", (0, 1)).__enter__()
    assert len(slept) == 3


def test_writers_that_begin_together_do_not_take_each_other_for_the_dead_one(tmp_path, monkeypatch):
    """The first waits for a heartbeat of "main"; a second one that looks meanwhile is no reason."""
    foreign(tmp_path, lock.STALE_SECONDS - 30)
    second = []

    def sleep(seconds):
        if not second:
            second.append(None)
            second.append(WriterLock(tmp_path, "shard-1-of-3", (1, 3)).__enter__())
        old = time.time() - lock.STALE_SECONDS - 5
        os.utime(tmp_path / "main.lock", (old, old))

    monkeypatch.setattr(lock, "_alive", functools.partial(once_in_doubt, sleep))
    with WriterLock(tmp_path, "shard-0-of-3", (0, 3)):
        second[1].__exit__(None, None, None)


def once_in_doubt(sleep, path, *, trust_processes):
    del trust_processes
    if path.stem == "main":
        sleep(1.0)
    return False


def test_a_file_system_without_locks_is_judged_by_process_and_heartbeat(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_lock", lambda file, shared: False)
    path = tmp_path / "main.lock"
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    path.write_text(json.dumps({"host": lock._host(), "pid": child.pid, "residue": [0, 1]}))
    with pytest.raises(StoreError, match=f"process {child.pid}"):
        WriterLock(tmp_path, "main", (0, 1)).__enter__()
    child.communicate(b"\n")
    with WriterLock(tmp_path, "main", (0, 1)):
        pass


def test_the_heart_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.01)
    with WriterLock(tmp_path, "main", (0, 1)):
        path = tmp_path / "main.lock"
        os.utime(path, (1, 1))
        for _ in range(500):
            if path.stat().st_mtime > 1:
                break
            lock.time.sleep(0.01)
        assert path.stat().st_mtime > 1


def test_several_dead_writers_are_waited_for_together(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(lock.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    for i in range(5):
        path = tmp_path / f"shard-{i}-of-5.lock"
        path.write_text(json.dumps({"host": "elsewhere 1", "pid": 1, "residue": [i, 5]}))
    with WriterLock(tmp_path, "main", (0, 1)):
        assert lock.STALE_SECONDS <= clock[0] < lock.STALE_SECONDS + 2
