"""A small evaluation for the tests, and a program that runs it in a process of its own.

`python -m tests.evaluation.small_run RUN_DIR '{"shard": [0, 3], ...}'`
"""

import contextlib
import dataclasses
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from gse_jax.data import Dataset
from gse_jax.evaluation import AttackPlan, Plan, evaluate, open_run
from tests.toy_model import small_logits

ROOT = Path(__file__).resolve().parents[2]
SIDE, CLASSES = 8, 5
SHORT = {"num_runs": 4, "max_steps": 30, "phase1_steps": 10, "blur_size": 3, "patch_size": 4}
PLAN = Plan(attacks=(AttackPlan(settings=SHORT),
                     AttackPlan(offsets=(1, 3), settings=SHORT)), lanes=1)


def model(seed=0):
    """(apply_fn, params) in float64."""
    rng = np.random.default_rng(seed)
    return small_logits, (rng.standard_normal((SIDE * SIDE, 8)) / SIDE,
                          rng.standard_normal((8, CLASSES)))


def dataset(count=40, seed=1):
    """`count` images of the model's own classes; every tenth label is wrong."""
    x = np.random.default_rng(seed).random((count, SIDE, SIDE, 1))
    first, second = model()[1]
    y = np.argmax(np.tanh((x.reshape(count, -1) - 0.5) @ first) @ second, axis=1)
    y[::10] = (y[::10] + 1) % CLASSES
    return Dataset(x, y.astype(np.int32), tuple(f"s{i:05d}" for i in range(count)))


def table(run):
    """What must not depend on interruptions and machines: records without `array`, by key."""
    rows = {}
    for record in run.records:
        key = record["case"], record["sample_id"]
        assert key not in rows
        rows[key] = {name: value for name, value in record.items() if name != "array"}
    return rows


def same_tables(a, b):
    """Compare two tables: texts and counts exactly, floats to 1e-9."""
    assert list(a) == list(b)
    for key in a:
        for name, value in a[key].items():
            other = b[key][name]
            if isinstance(value, float) and other is not None:
                np.testing.assert_allclose(value, other, rtol=1e-9, err_msg=f"{key} {name}")
            else:
                assert value == other, (key, name, value, other)


def arrays(run):
    """Adversarial images by key."""
    return {(record["case"], record["sample_id"]): run.images(record)[1]
            for record in run.records if record["array"] is not None}


def same_runs(run_dir, whole):
    """The same samples, none missing or doubled, and the same adversarials."""
    run = open_run(run_dir)
    assert run.complete
    same_tables(table(run), table(whole))
    found, expected = arrays(run), arrays(whole)
    assert list(found) == list(expected)
    for key, image in found.items():
        np.testing.assert_allclose(image, expected[key], atol=1e-9)
    return run


def start(run_dir, *, devices=1, cache=None, **options):
    """Start the program; `options` are those of `main`."""
    command = [sys.executable, "-m", "tests.evaluation.small_run", str(run_dir),
               json.dumps({"devices": devices, "cache": cache and str(cache), **options})]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})


def _announce(run_dir):
    del run_dir  # Unused.
    return lambda progress: print(progress.done, flush=True)


def _hang(run_dir):
    del run_dir  # Unused.
    return lambda progress: progress.done >= 20 and time.sleep(600)


def _fill_disk(run_dir):
    """Leave no byte free as soon as 20 samples are done."""
    def fill(progress):
        if progress.done >= 20:
            with open(Path(run_dir) / "filler", "ab", buffering=0) as file, contextlib.suppress(
                    OSError):
                while True:
                    file.write(bytes(1024))
    return fill


_ACTIONS = {"announce": _announce, "hang": _hang, "fill_disk": _fill_disk}


def main(run_dir, *, devices, cache, count=40, shard=None, flush_samples=4, distributed=None,
         lanes=4, file_size_limit=None, then=None, **options):
    """Run the small evaluation on float64; prints the number of records."""
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_enable_x64", True)
    if cache:
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if file_size_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size_limit, file_size_limit))
    if distributed:
        jax.distributed.initialize(**distributed)
    if then:
        options["on_progress"] = _ACTIONS[then](run_dir)
    run = evaluate(dataclasses.replace(PLAN, lanes=lanes), run_dir, model=model(),
                   data=dataset(count), flush_samples=flush_samples,
                   shard=shard and tuple(shard), **options)
    print(len(run.records))


if __name__ == "__main__":
    main(sys.argv[1], **json.loads(sys.argv[2]))
