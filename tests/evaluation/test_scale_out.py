"""Devices, processes, shards and a Ray cluster: the same samples and the same numbers."""

import dataclasses
import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from gse_jax.evaluation import (
    AttackPlan,
    Plan,
    StoreError,
    evaluate,
    open_run,
    parse_shard,
)
from gse_jax.evaluation.hosts import combined_residue
from tests.evaluation.small_run import (
    PLAN,
    ROOT,
    dataset,
    model,
    same_runs,
    same_tables,
    start,
    table,
)


def finish(*processes):
    for process in processes:
        out, errors = process.communicate(timeout=180)
        assert process.returncode == 0, out + errors


def free_address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


# The session has four devices; test_evaluate.py resumes on two and four of them.
@pytest.mark.slow
def test_eight_devices(whole, tmp_path, cache):
    finish(start(tmp_path / "run", devices=8, lanes=16, cache=cache))
    run = same_runs(tmp_path / "run", whole)
    assert run.manifest["machine"]["devices"] == 8


@pytest.mark.slow
def test_two_processes_of_jax_distributed(whole, tmp_path, cache):
    finish(*(start(tmp_path / "run", cache=cache, engine="distributed", distributed={
        "coordinator_address": address, "num_processes": 2, "process_id": i})
        for address in [free_address()] for i in range(2)))
    run = same_runs(tmp_path / "run", whole)
    starts = {e["writer"]: e for e in run.events if e["event"] == "start"}
    assert {name: e["residue"] for name, e in starts.items()} == {
        "process-0-of-2": [0, 2], "process-1-of-2": [1, 2]}
    assert [e["remaining"] for e in starts.values()] == [60, 60]


@pytest.mark.slow
def test_a_process_that_is_done_waits_for_the_others():
    """One that leaves would end the others five minutes later."""
    script = ("import sys, time, jax\nfrom gse_jax.evaluation.hosts import wait_for_others\n"
              "jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))\n"
              "for slow in (1, 0):\n    time.sleep(3 * (int(sys.argv[2]) == slow))\n    start = time.time()\n"
              "    wait_for_others()\n    print(time.time() - start)\n")
    address = free_address()
    processes = [subprocess.Popen([sys.executable, "-c", script, address, str(i)], stdout=subprocess.PIPE, text=True)
                 for i in range(2)]
    waited = [list(map(float, process.communicate(timeout=120)[0].split())) for process in processes]
    assert waited[0][0] > 2 > waited[0][1] and waited[1][1] > 2 > waited[1][0]


@pytest.mark.slow
def test_three_shards_of_which_one_is_killed_and_restarted(whole, tmp_path, cache):
    run_dir = tmp_path / "run"
    shards = [start(run_dir, cache=cache, shard=[i, 3], then="announce" if i == 1 else None)
              for i in range(3)]
    assert shards[1].stdout.readline()
    shards[1].kill()
    shards[1].communicate()
    assert shards[1].returncode == -9
    finish(shards[0], shards[2])
    run = open_run(run_dir)
    assert not run.complete
    assert {r["index"] % 3 for r in run.records if r["case"] == "gse/untargeted"} >= {0, 2}
    finish(start(run_dir, cache=cache, shard=[1, 3]))
    run = same_runs(run_dir, whole)
    names = {path.name for path in (run_dir / "records").iterdir()}
    assert names == {f"shard-{i}-of-3.jsonl" for i in range(3)}


def test_shards_that_share_samples_may_not_meet(tmp_path, cache):
    process = start(tmp_path / "run", cache=cache, shard=[0, 3], then="hang")
    try:
        lock = tmp_path / "run" / "locks" / "shard-0-of-3.lock"
        while process.poll() is None and not (lock.is_file() and lock.read_text()):
            time.sleep(0.01)
        with pytest.raises(StoreError, match="'shard-0-of-3'|is working in it"):
            evaluate(PLAN, tmp_path / "run", model=model(), data=dataset(), shard=(0, 2))
    finally:
        process.kill()
        process.communicate()


def test_shards_are_written_as_i_of_n(monkeypatch):
    assert parse_shard("0/3") == (0, 3)
    for text in ("3/3", "1", "a/b", "-1/3", "1/3/4"):
        with pytest.raises(ValueError, match="shard must be I/N"):
            parse_shard(text)
    assert combined_residue(None) == ((0, 1), "main")
    assert combined_residue((2, 3)) == ((2, 3), "shard-2-of-3")


def test_processes_divide_a_shard(monkeypatch):
    import jax

    monkeypatch.setattr(jax, "process_count", lambda: 4)
    taken = []
    for shard in range(3):
        for process in range(4):
            monkeypatch.setattr(jax, "process_index", lambda process=process: process)
            (index, count), name = combined_residue((shard, 3))
            assert name == f"shard-{shard}-of-3-process-{process}-of-4"
            taken += range(index, 60, count)
    assert sorted(taken) == list(range(60))


def test_distributed_without_a_cluster_is_told_in_one_line(tmp_path, cache):
    process = start(tmp_path / "run", cache=cache, engine="distributed")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "engine='distributed': " in errors.strip().splitlines()[-1]
    assert "or use shard=(i, n)" in errors.strip().splitlines()[-1]


def test_without_ray_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"engine='ray' needs Ray: pip install 'gse-jax\[ray\]'"):
        evaluate(PLAN, tmp_path / "run", model=model(), data=dataset(), engine="ray")
    assert not (tmp_path / "run").exists()


def test_a_ray_cluster_of_two_nodes_of_which_one_is_killed(whole, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed (extra [ray])")
    ended = subprocess.run([sys.executable, "-m", "tests.evaluation.ray_cluster",
                            str(tmp_path / "run")], cwd=ROOT, capture_output=True, text=True,
                           timeout=400, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert ended.returncode == 0, ended.stdout + ended.stderr
    same_runs(tmp_path / "run", whole)


def test_a_chunk_of_ray_is_a_function_of_its_samples(whole):
    """The body of a Ray task, here without Ray: twice the same, and equal to the local engine."""
    import jax

    from gse_jax.evaluation import ray_engine
    from gse_jax.evaluation.evaluator import Work
    from gse_jax.evaluation.job import set_up

    job = set_up(PLAN, model(), dataset())
    group = job.groups[1]
    todo = np.zeros((2, 40), bool)
    todo[0, [3, 10]] = todo[1, [4, 3]] = True
    chunks = list(ray_engine._chunks(job, [Work(group, todo[:, :0]), Work(group, todo)], pairs=2))
    assert [(index, [read.position for read, _ in entries]) for index, entries in chunks] == [
        (1, [3]), (1, [4, 10])]
    arrays_only = jax.tree.map(np.asarray, job.model.params)
    spec = ray_engine.Spec("key", job.model._replace(params=arrays_only), (group, group), 40, 0, 1,
                           True)
    expected = table(whole)
    for _ in range(2):
        finished = [one for chunk in chunks for one in ray_engine.attack_chunk(spec, *chunk)[0]]
        rows = {(f.record["case"], f.record["sample_id"]): {
            name: value for name, value in f.record.items() if name != "array"} for f in finished}
        assert len(rows) == 4
        same_tables(dict(sorted(rows.items())), {key: expected[key] for key in sorted(rows)})


@pytest.mark.slow
def test_real_images_in_float32_on_other_devices(tmp_path):
    """Identical flags; means of the table within 1 %."""
    plan = Plan(data="digits", model="resnet20", weights="digits", limit=24,
                attacks=(AttackPlan(settings={"num_runs": 4, "max_steps": 60}),))
    runs = [evaluate(dataclasses.replace(plan, lanes=lanes), tmp_path / str(lanes)).records
            for lanes in (1, 8)]  # One device; four devices with two lanes each.
    one, four = ([r for r in records if r["status"] == "found"] for records in runs)
    assert [r["sample_id"] for r in one] == [r["sample_id"] for r in four] and len(one) > 10
    for name in ("changed_pixels", "num_clusters", "l2", "patch_count", "gradient_evals"):
        means = [np.mean([r[name] for r in records]) for records in (four, one)]
        np.testing.assert_allclose(*means, rtol=0.01, err_msg=name)
