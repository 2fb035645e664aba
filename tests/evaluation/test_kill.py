"""Kill -9 at random moments: the final table is that of an uninterrupted run."""

import random
import time

import pytest

from gse_jax.evaluation import open_run
from tests.evaluation.small_run import same_runs, start, table


def kill_at_random_moments(run_dir, cache, whole, kills, seed):
    """Start, kill and resume until so many kills have hit; then finish and compare."""
    draw = random.Random(seed)
    hits = finished = 0
    kept = []
    while hits < kills:
        process = start(run_dir / str(finished), cache=cache, then="announce")
        # A quarter of the kills hit the start, the rest the work with its many small writes.
        if draw.random() < 0.25:
            time.sleep(draw.uniform(0.0, 4.0))
        else:
            progress = map(int, process.stdout)
            first = min(next(progress, 0), 119)
            last = draw.randint(first, min(first + 40, 119))
            next((done for done in progress if done > last), None)
            time.sleep(draw.uniform(0.0, 0.02))
        process.kill()
        process.communicate()
        if process.returncode == 0:  # It was faster; the next one starts from nothing.
            finished += 1
            continue
        assert process.returncode == -9
        hits += 1
        if (run_dir / str(finished) / "manifest.json").is_file():
            kept.append(len(table(open_run(run_dir / str(finished)))))  # Never twice.
            finished += kept[-1] == 120  # Nothing left to kill.
    for number in range(finished + 1):
        process = start(run_dir / str(number), cache=cache)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        same_runs(run_dir / str(number), whole)
    return kept


def test_killed_twice(whole, tmp_path, cache):
    kept = kill_at_random_moments(tmp_path, cache, whole, 2, seed=0)
    assert any(0 < count < 120 for count in kept), kept  # Some hit the middle.


@pytest.mark.slow
def test_killed_fifty_times(whole, tmp_path, cache):
    kept = kill_at_random_moments(tmp_path, cache, whole, 50, seed=1)
    assert sum(0 < count < 120 for count in kept) >= 25, kept  # Most hit the middle.
