"""How long the first call takes: cold, again in the same process, and with a compilation cache.

    python benchmarks/compile_time.py

Every process is a new one; the weights are loaded and the images chosen before the clock starts. The attack
on 16 images is cut to one short run, so that the time is compilation: `first call` of a process, `second
call` of the same process, `cached` the first call of a process that finds what another one has compiled
(`gse_jax.use_compilation_cache(FOLDER)`). `import` is `import gse_jax` after `import jax`. `whole` is what the
default attack on 24 images (on an accelerator 1,100, more than its lanes) takes longer in its first call than
in its second: it compiles the narrower programs of the tail too. `whole cached` is the same with the cache.
"""

import json
import subprocess
import sys
import tempfile
import time


def measure(folder, whole):
    """Time one process, of the default attack if `whole`; print JSON."""
    import jax
    import numpy as np

    start = time.perf_counter()
    import gse_jax

    seconds = {"import": time.perf_counter() - start}
    gse_jax.use_all_cpu_cores()
    if folder:
        gse_jax.use_compilation_cache(folder)
    import results_file

    params, apply_fn, x, y, bounds, _ = results_file.network_and_images(64)
    count = (24 if jax.default_backend() == "cpu" else 1100) if whole else 16
    x, y = np.resize(x, (count, *x.shape[1:])), np.resize(y, count)
    settings = None if whole else gse_jax.GSESettings(num_runs=1, max_steps=3, phase1_steps=2)
    for name in ("first call", "second call"):
        start = time.perf_counter()
        jax.block_until_ready(gse_jax.attack(params, apply_fn, x, y, bounds=bounds,
                                             settings=settings))
        seconds[name] = time.perf_counter() - start
    print(json.dumps(seconds))


def run(folder, *words):
    """Start a process and return its times."""
    done = subprocess.run([sys.executable, __file__, "--process", folder, *words], check=True,
                          stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def cold_and_cached(quick, *words):
    """Times of a process without compilation cache, and of one that finds what another has compiled."""
    with tempfile.TemporaryDirectory() as folder:
        # Filling the cache costs a little: in a smoke run the cold process does it.
        cold = run(folder if quick else "", *words)
        if not quick:
            run(folder, *words)
        return cold, run(folder, *words)


def main():
    """Measure and print."""
    if sys.argv[1:2] == ["--process"]:
        measure(sys.argv[2], "whole" in sys.argv)
        return
    import results_file

    arguments = results_file.parser(__doc__.splitlines()[0])
    arguments.add_argument("--rounds", type=int, default=3)
    args = arguments.parse_args()
    rows = []
    for _ in range(1 if args.smoke else args.rounds):
        cold, cached = cold_and_cached(args.smoke, *["--smoke"] * args.smoke)
        rows.append({**cold, "cached": cached["first call"]})
        if not args.smoke:
            for name, seconds in zip(("whole", "whole cached"), cold_and_cached(False, "whole")):
                rows[-1][name] = seconds["first call"] - seconds["second call"]
        results_file.show(rows[-1])
    results_file.write("compile_time", args, rows)


if __name__ == "__main__":
    main()
