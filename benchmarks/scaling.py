"""Does the cost of an image stay what it is with many images, and with many devices?

    python benchmarks/scaling.py [--parts small real full]

Small images (8 x 8) and a small network, so that 100,000 of them are attacked in minutes and what
is measured is the engine: 100 ... 100,000 images on all cores, then 20,000 on 1 ... 8 CPU devices
(more devices than cores share the cores; the total must not get worse). Then `attack_stream` with
ResNet-20 and real CIFAR-10 images, the same 400 again and again: 400, 20,000 and again 400 in a much
shorter attack than the default (`real`), and the same in the default one (`full`; two hours on two
cores). The bare model is
timed between stretches of work, as in `throughput.py`, so that the machine's own drift can be told
from the attack's. Each row is a process of its own, without compilation; one of 20,000 images says every
tenth of them what it has measured so far.
"""

import json
import resource
import subprocess
import sys
import time

# Images for `real` and `full` on an accelerator, whose lanes alone are 1,024.
ON_ACCELERATORS = {"real": (5_000, 20_000, 5_000), "full": (5_000, 20_000)}
COUNTS, SMOKE_COUNTS = (100, 1_000, 10_000, 100_000), (50,)
DEVICES = (1, 2, 4, 8)
REAL_COUNTS, SMOKE_REAL_COUNTS = (400, 20_000, 400), (3,)
FULL_COUNTS = REAL_COUNTS
SHORT_RUNS = 6  # runs of GSE's search, about 10 gradients an image; the default takes 160


def peak_mib():
    """The largest memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed(attack, count, **row):
    """Print the row of a call: its memory the first time, which may compile, its seconds the second."""
    import jax

    before = peak_mib()
    jax.block_until_ready(attack())
    more, start = peak_mib() - before, time.perf_counter()
    result = jax.block_until_ready(attack())
    seconds = time.perf_counter() - start
    print(json.dumps(row | {"us_per_image": seconds / count * 1e6,
                            "evals_per_image": float(result.gradient_evals.mean()), "more_mib": more}))


def measure_real(kind, count, devices):
    """A stream of real images through ResNet-20 on default lanes; print JSON."""
    import jax

    jax.config.update("jax_num_cpu_devices", devices)
    import numpy as np
    import results_file
    from throughput import Bare, Stopwatch

    import gse_jax
    from gse_jax.attacks.algorithm import Sample

    results_file.use_one_accelerator()
    params, apply_fn, x, y, bounds, name = results_file.network_and_images(400)
    x, y = np.asarray(x), np.asarray(y)
    settings = gse_jax.GSESettings(num_runs=SHORT_RUNS) if kind == "real" else None
    if count in SMOKE_REAL_COUNTS:
        settings = gse_jax.GSESettings(num_runs=2, max_steps=5, phase1_steps=3)

    def stretches(end):
        def batches():
            for ids in np.split(np.arange(end), range(100, end, 100)):
                images = ids % len(x)
                yield Sample(x[images], y[images], np.full(len(ids), -1), ids)

        return gse_jax.attack_stream(params, apply_fn, batches(), image_shape=x.shape[1:],
                                     settings=settings, bounds=bounds, num_images=count)

    # Compiles all widths of the tail. Short attacks come to the narrowest with some images only.
    warm = (400 if kind == "real" else 32) if jax.default_backend() == "cpu" else 2048
    for _ in stretches(min(count, warm)):
        pass
    bare = Bare(params, apply_fn, x[:64], batches=(4,) if count in SMOKE_REAL_COUNTS else None)
    before, evals, found = peak_mib(), 0, 0

    def row():
        return {"network": name, "images": found, "devices": devices,
                "us_per_image": watch.wall / found * 1e6,
                "bare_gradients_per_image": watch.model_times[0] / found,
                "evals_per_image": evals / found, "more_mib": peak_mib() - before}

    # The default attack of 20,000 images takes an hour and more: timing the bare model every second
    # would take another quarter of that.
    watch = Stopwatch(bare, pause=10 if kind == "full" else None)
    for stretch in stretches(count):
        watch()
        evals += int(stretch.outcome.gradient_evals.sum())
        tenths = found * 10 // count
        found += len(stretch.sample_ids)
        if count > 10_000 and found * 10 // count > tenths:
            results_file.show({"so far": time.strftime("%H:%M:%S")} | row(), file=sys.stderr)
    watch.stop()
    assert found == count
    print(json.dumps(row()))


def measure(count, devices):
    """Attack in one process; print JSON."""
    import jax

    jax.config.update("jax_num_cpu_devices", devices)
    import jax.numpy as jnp
    import numpy as np

    import gse_jax
    import results_file

    results_file.use_one_accelerator()
    rng = np.random.default_rng(0)
    params = tuple(rng.normal(size=s).astype("f4") / 8 for s in ((64, 32), (32, 5)))

    def apply_fn(params, x):
        return jnp.tanh((x.reshape(x.shape[0], -1) - 0.5) @ params[0]) @ params[1] * 8

    x = rng.random((min(count, 1000), 8, 8, 1), np.float32)
    y = np.asarray(apply_fn(params, x).argmax(-1))
    x, y = np.resize(x, (count, 8, 8, 1)), np.resize(y, count)
    settings = gse_jax.GSESettings(num_runs=3, max_steps=20, phase1_steps=10, blur_size=3,
                                   patch_size=4)
    lanes = 64 * devices if jax.default_backend() == "cpu" else 1024
    # Compiles the widths of the tail, whose memory is not the images'.
    for width in (lanes, 2 * devices) if jax.default_backend() == "cpu" else (lanes,):
        gse_jax.attack(params, apply_fn, x[:4 * width], y[:4 * width], settings=settings, lanes=width)
    timed(lambda: gse_jax.attack(params, apply_fn, x, y, settings=settings, lanes=lanes), count,
          network="small", images=count, devices=devices)


def main():
    """Measure and print."""
    if sys.argv[1:2] == ["--process"]:
        kind, count, devices, *_ = sys.argv[2:]
        if kind == "small":
            measure(int(count), int(devices))
        else:
            measure_real(kind, int(count), int(devices))
        return
    import os

    import results_file

    arguments = results_file.parser(__doc__.splitlines()[0])
    arguments.add_argument("--parts", nargs="*", choices=("small", "real", "full"),
                           default=("small", "real", "full"))
    args = arguments.parse_args()
    counts = SMOKE_COUNTS if args.smoke else COUNTS
    on_cpu = args.smoke or results_file.backend() == "cpu"
    all_devices = os.cpu_count() if on_cpu else 1
    real, full = (REAL_COUNTS, FULL_COUNTS) if on_cpu else ON_ACCELERATORS.values()
    cases = [("small", count, all_devices) for count in counts]
    cases += [("small", max(counts) // 5, number) for number in DEVICES if on_cpu and not args.smoke]
    cases += [("real", count, all_devices) for count in (SMOKE_REAL_COUNTS if args.smoke else real)]
    cases += [("full", count, all_devices) for count in full]
    for part in ("small", "real") if args.smoke else args.parts:
        rows = []
        for case in (case for case in cases if case[0] == part):
            done = subprocess.run([sys.executable, __file__, "--process", *map(str, case), *["--smoke"] * args.smoke],
                                  check=True, stdout=subprocess.PIPE, text=True)
            rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
            results_file.show(rows[-1])
        results_file.write(f"scaling_{part}", args, rows)


if __name__ == "__main__":
    main()
