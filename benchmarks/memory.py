"""Peak memory of an attack against the number of images, the lanes and the image size.

    python benchmarks/memory.py

Each row is a process of its own and reports its peak resident memory less that before the images
were made; on an accelerator the peak of the device's memory. `images` is what the images themselves
and the result take on the host: N x (x + adversarials).
"""

import json
import resource
import subprocess
import sys

ROWS = [(100, 8, 32), (1000, 8, 32), (10000, 8, 32), (1000, 64, 32), (1000, 512, 32),
        (16, 4, 224), (64, 4, 224), (16, 16, 224)]
ON_ACCELERATORS = [(10000, 1024, 32), (100000, 1024, 32), (10000, 4096, 32)]
SMOKE = [(10, 2, 32)]


def peak():
    """Peak memory so far, MiB."""
    import jax

    if jax.default_backend() != "cpu":
        return jax.devices()[0].memory_stats()["peak_bytes_in_use"] / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB.


def measure(count, lanes, side):
    """Attack random images of one network with two convolutions; print JSON."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import gse_jax
    import results_file

    results_file.use_one_accelerator()
    rng = np.random.default_rng(0)
    params = (rng.normal(size=(3, 3, 3, 16)).astype("f4"), rng.normal(size=(16, 10)).astype("f4"))

    def apply_fn(params, x):
        x = jax.lax.conv_general_dilated(x, params[0], (2, 2), "SAME",
                                         dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.tanh(x).mean((1, 2)) @ params[1]

    jnp.zeros(1).block_until_ready()
    before = peak()
    x = rng.random((count, side, side, 3), np.float32)
    labels = jax.jit(lambda x: apply_fn(params, x).argmax(-1))
    # No more at a time than the attack itself has in its lanes.
    y = np.concatenate([np.asarray(labels(x[i:i + lanes])) for i in range(0, count, lanes)])
    settings = gse_jax.GSESettings(num_runs=2, max_steps=6, phase1_steps=3)
    jax.block_until_ready(gse_jax.attack(params, apply_fn, x, y, lanes=lanes, settings=settings))
    print(json.dumps({"images": count, "lanes": lanes, "side": side, "peak_mib": peak() - before,
                      "images_mib": 2 * x.nbytes / 2**20}))


def main():
    """Measure and print."""
    if sys.argv[1:2] == ["--process"]:
        measure(*map(int, sys.argv[2:]))
        return
    import results_file

    args = results_file.parser(__doc__.splitlines()[0]).parse_args()
    rows = []
    more = [] if args.smoke or results_file.backend() == "cpu" else ON_ACCELERATORS
    for row in SMOKE if args.smoke else ROWS + more:
        done = subprocess.run([sys.executable, __file__, "--process", *map(str, row)], check=True,
                              stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
        results_file.show(rows[-1])
    results_file.write("memory", args, rows)


if __name__ == "__main__":
    main()
