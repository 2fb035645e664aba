"""Does the memory of `evaluate` grow with the data set? It must not.

    python benchmarks/evaluate_memory.py            # 2,000 and 20,000 images
    python benchmarks/evaluate_memory.py --smoke    # 1,000 and 4,000 images, for CI

Synthetic 32 x 32 x 3 images, made when they are read; a linear model; a short GSE search, so that
the time goes into streaming and storing. Each size runs in a process of its own and reports its
peak resident memory. Ends with code 1 where the larger exceeds the smaller by more than 15 %.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time

import numpy as np

LIMIT = 1.15
SHAPE, CLASSES = (32, 32, 3), 10
# Below 1,000 what is bounded still grows: queues, files being written, the allocator's arenas.
SIZES, SMOKE_SIZES = (2_000, 20_000), (1_000, 4_000)


class Synthetic:
    """Random images of the model's own classes; the data set is never in memory."""

    def __init__(self, count, kernel):
        self.ids = [f"{i:06d}" for i in range(count)]
        self.digest = f"synthetic {count}"
        self._kernel = kernel

    def __getitem__(self, index):
        image = np.random.default_rng(index).random(SHAPE, np.float32)
        return image, int(np.argmax(image.reshape(-1) @ self._kernel))


def logits(kernel, x):
    """A linear model."""
    return x.reshape(x.shape[0], -1) @ kernel


def measure(count):
    """Evaluate `count` images in this process; print seconds and peak memory."""
    import resource

    from gse_jax.evaluation import AttackPlan, Plan, evaluate

    kernel = np.random.default_rng(0).standard_normal((np.prod(SHAPE), CLASSES)).astype(np.float32)
    settings = {"num_runs": 1, "max_steps": 3, "phase1_steps": 1, "num_boosted_runs": 1}
    plan = Plan(attacks=(AttackPlan(settings=settings, hyperparams={"initial_fraction": 0.2}),),
                lanes=64)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run = evaluate(plan, folder, model=(logits, kernel), data=Synthetic(count, kernel))
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB.
        assert run.complete and sum(r["success"] for r in run.records) > 0
    print(json.dumps({"images": count, "seconds": round(seconds, 1), "peak_mib": round(peak)}))


def main():
    """Compare two sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="fewer images")
    parser.add_argument("--images", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.images:
        measure(options.images)
        return 0
    peaks = []
    for count in SMOKE_SIZES if options.smoke else SIZES:
        ended = subprocess.run([sys.executable, __file__, "--images", str(count)], check=True,
                               stdout=subprocess.PIPE, text=True)
        print(ended.stdout.strip().splitlines()[-1], flush=True)
        peaks.append(json.loads(ended.stdout.strip().splitlines()[-1])["peak_mib"])
    ratio = peaks[1] / peaks[0]
    print(f"peak memory grows by a factor of {ratio:.3f}, allowed {LIMIT}")
    return int(ratio > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
