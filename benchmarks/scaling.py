"""Does the cost of an image stay what it is with many images, and with many devices?

    python benchmarks/scaling.py

Small images (8 x 8) and a small network, so that 100,000 of them are attacked in minutes and what
is measured is the engine: 100 ... 100,000 images on all cores, then 20,000 on 1 ... 8 CPU devices
(more devices than cores share the cores; the total must not get worse). Each row is a process of
its own; the time is that of the second call, without compilation.
"""

import json
import subprocess
import sys
import time

COUNTS, SMOKE_COUNTS = (100, 1_000, 10_000, 100_000), (50,)
DEVICES, SMOKE_DEVICES = (1, 2, 4, 8), (2,)


def measure(count, devices):
    """Attack in one process; print JSON."""
    import jax

    jax.config.update("jax_num_cpu_devices", devices)
    import jax.numpy as jnp
    import numpy as np

    import gse_jax

    rng = np.random.default_rng(0)
    params = tuple(rng.normal(size=s).astype("f4") / 8 for s in ((64, 32), (32, 5)))

    def apply_fn(params, x):
        return jnp.tanh((x.reshape(x.shape[0], -1) - 0.5) @ params[0]) @ params[1] * 8

    x = rng.random((min(count, 1000), 8, 8, 1), np.float32)
    y = np.asarray(apply_fn(params, x).argmax(-1))
    x, y = np.resize(x, (count, 8, 8, 1)), np.resize(y, count)
    settings = gse_jax.GSESettings(num_runs=3, max_steps=20, phase1_steps=10, blur_size=3,
                                   patch_size=4)
    lanes = 64 * devices
    gse_jax.attack(params, apply_fn, x[:4 * lanes], y[:4 * lanes], settings=settings, lanes=lanes)
    start = time.perf_counter()
    result = gse_jax.attack(params, apply_fn, x, y, settings=settings, lanes=lanes)
    jax.block_until_ready(result)
    seconds = time.perf_counter() - start
    print(json.dumps({"images": count, "devices": devices, "us_per_image": seconds / count * 1e6,
                      "evals_per_image": float(result.gradient_evals.mean())}))


def main():
    """Measure and print."""
    if sys.argv[1:2] == ["--process"]:
        measure(*map(int, sys.argv[2:]))
        return
    import os

    import results_file

    args = results_file.parser(__doc__.splitlines()[0]).parse_args()
    counts, devices = (SMOKE_COUNTS, SMOKE_DEVICES) if args.smoke else (COUNTS, DEVICES)
    cases = [(count, os.cpu_count()) for count in counts]
    cases += [(max(counts) // 5, number) for number in devices]
    rows = []
    for case in cases:
        done = subprocess.run([sys.executable, __file__, "--process", *map(str, case)], check=True,
                              stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
        results_file.show(rows[-1])
    results_file.write("scaling", args, rows)


if __name__ == "__main__":
    main()
