"""The metrics on real CIFAR-10 images against the published code's.

    python benchmarks/reference_parity.py [--num 64]

Needs the CIFAR-10 images and the authors' network (folder named by GSE_JAX_SHARED); without them,
and with --smoke, it attacks the embedded digits and has nothing to compare with.
"""

import time
from pathlib import Path

import numpy as np

import gse_jax
import results_file
from gse_jax import metrics

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden" / "cifar10_resnet20.npz"


def main():
    """Measure and print."""
    arguments = results_file.parser(__doc__.splitlines()[0])
    arguments.add_argument("--num", type=int, default=64)
    args = arguments.parse_args()
    gse_jax.use_all_cpu_cores()
    params, apply_fn, x, y, bounds, name = results_file.network_and_images(
        2 if args.smoke else args.num)
    golden = np.load(GOLDEN)
    settings = gse_jax.GSESettings(num_runs=2, max_steps=5, phase1_steps=3) if args.smoke else None
    rows = []
    for word, targets in (("untargeted", None), ("targeted", (y + 1) % 10)):
        start = time.perf_counter()
        result = gse_jax.attack(params, apply_fn, x, y, targets=targets, bounds=bounds,
                                settings=settings)
        seconds = time.perf_counter() - start
        numbers = metrics.summary(x, result, bounds=bounds)
        row = {"attack": word, "model": name, "images": len(x), "ASR": numbers.asr_attacked,
               "evals_per_image": numbers.gradient_evals.mean,
               "forwards_per_image": numbers.forward_evals.mean,
               "seconds_per_image_with_compilation": seconds / len(x)}
        published = {k: golden[f"{word[0]}_{k}"] for k in ("ACP", "ANC", "l2", "d20")}
        ours = {"ACP": numbers.changed_pixels, "ANC": numbers.num_clusters, "l2": numbers.l2,
                "d20": numbers.patch_count}
        for metric, statistic in ours.items():
            row[metric] = statistic.mean
            if "CIFAR" in name and len(x) == len(published["ACP"]):
                row[f"{metric}_published"] = float(published[metric].mean())
        rows.append(row)
        results_file.show(row)
    results_file.write("reference_parity", args, rows)


if __name__ == "__main__":
    main()
