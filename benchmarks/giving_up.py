"""What it saves and costs to give up runs of GSE that will probably fail (`give_up_window`).

    python benchmarks/giving_up.py [--num 64] [--windows 0 40 20 10 5]

0 is the published attack. Needs the CIFAR-10 images and the authors' network (folder named by
GSE_JAX_SHARED); without them, and with --smoke, it attacks the embedded digits.
"""

import dataclasses

import numpy as np

import gse_jax
import results_file
from gse_jax import metrics


def main():
    """Measure and print."""
    arguments = results_file.parser(__doc__.splitlines()[0])
    arguments.add_argument("--num", type=int, default=64)
    arguments.add_argument("--windows", type=int, nargs="+", default=[0, 40, 20, 10, 5])
    args = arguments.parse_args()
    gse_jax.use_all_cpu_cores()
    params, apply_fn, x, y, bounds, name = results_file.network_and_images(
        2 if args.smoke else args.num)
    rows = []
    for targets in (None,) if args.smoke else (None, (np.asarray(y) + 1) % 10):
        for window in (0, 2) if args.smoke else args.windows:
            settings, _ = gse_jax.preset("gse", "cifar10", targets is not None)
            shorter = {"num_runs": 2, "max_steps": 8, "phase1_steps": 3} if args.smoke else {}
            settings = dataclasses.replace(settings, give_up_window=window, **shorter)
            result = gse_jax.attack(params, apply_fn, x, y, targets=targets, settings=settings,
                                    bounds=bounds)
            numbers = metrics.summary(x, result, bounds=bounds)
            rows.append({
                "model": name, "images": len(x), "targeted": targets is not None,
                "give_up_window": window, "ASR": numbers.asr_attacked,
                "ACP": numbers.changed_pixels.mean, "ANC": numbers.num_clusters.mean,
                "l2": numbers.l2.mean, "d20": numbers.patch_count.mean,
                "gradients": numbers.gradient_evals.mean,
                "forwards": numbers.forward_evals.mean})
            results_file.show(rows[-1])
    results_file.write("giving_up", args, rows)


if __name__ == "__main__":
    main()
