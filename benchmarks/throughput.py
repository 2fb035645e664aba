"""Images per second, and how much of the time is the model itself, over lanes and numbers of images.

    python benchmarks/throughput.py [--num 64 400] [--lanes default 1 2 4 8 16 32] [--targeted]
        [--precision highest] [--runs 6] [--repeats 3]

efficiency = gradient evaluations the attack used x bare time / wall time
lanes full = gradient evaluations the lanes made, idle ones included, x bare time / wall time
bare       = jitted value-and-gradient of the same model on all devices in the same precision, per
             image, at the batch size where it is fastest
tuned      = the same against the model as the attack runs it: on CPU in a compiled loop, with rewritten
             convolutions (`gse_jax/attacks/convolutions.py`), on an NVIDIA GPU with compiler options that
             make it faster (`gse_jax/attacks/cuda.py`)

One CPU device per core. Both bare models are timed again after every second of the attack (ten on an
accelerator), between its stretches of work, and each second is divided by the bare times on both sides of
it: another process on the machine slows both. The attack is measured after compilation; `compile_time.py`
measures that. `--runs 6` is a search of six runs, about 10 gradients an image for the default's 160: with it
thousands of lanes can be filled on a CPU. Of several repeats a row is the one of median efficiency, beside
the lowest and the highest.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import results_file
from gse_jax.attacks import cuda
from gse_jax.attacks.convolutions import canonical_convolutions
from gse_jax.attacks.precision import PRECISIONS, multiplying

CPU_BATCHES, GPU_BATCHES = (4, 8, 16, 32, 64), (512, 1024, 2048, 4096, 8192)  # per device
# More images than there are, on an accelerator: the same again.
ON_CPU, ON_ACCELERATORS = [64, 400], [1024, 10_000]
WARM = 2048
CALLS_IN_LOOP = 4
# Seconds of the attack between two timings of the bare model, which takes 0.2.
PAUSE_ON_CPU, PAUSE_ON_ACCELERATORS = 1.0, 10.0


class Bare:
    """Times one value-and-gradient on all devices, in seconds per image."""

    def __init__(self, params, apply_fn, x, precision="highest", batches=None, tuned=False):
        """Compile, and choose the fastest batch size of those for this platform, or of `batches`.

        Where `tuned`, as an attack runs it on this platform.
        """
        def gradient(params, x):
            with multiplying(precision):
                value, gradient = jax.value_and_grad(lambda x: apply_fn(params, x).max(-1).sum())(x)
            return value[None], gradient

        on_cpu = jax.default_backend() == "cpu"
        self._calls = 1
        if tuned and on_cpu:
            rewritten, self._calls = canonical_convolutions(gradient), CALLS_IN_LOOP

            def gradient(params, x):
                return jax.lax.fori_loop(0, CALLS_IN_LOOP, lambda _, x: x - 1e-6 * rewritten(params, x)[1], x)

        mesh = jax.make_mesh((jax.device_count(),), ("d",),
                             axis_types=(jax.sharding.AxisType.Auto,))
        self._params = jax.device_put(params, jax.sharding.NamedSharding(mesh, P()))
        spread = jax.shard_map(gradient, mesh=mesh, in_specs=(P(), P("d")), out_specs=P("d"), check_vma=False)
        batches = batches or (CPU_BATCHES if on_cpu else GPU_BATCHES)
        split = jax.sharding.NamedSharding(mesh, P("d"))
        choices = [jax.device_put(np.resize(x, (b * jax.device_count(), *x.shape[1:])), split)
                   for b in batches]
        on_cuda = cuda.is_cuda(jax.devices()[0])
        options = cuda.choices(jax.make_jaxpr(spread)(self._params, choices[0]))[0] if tuned and on_cuda else None
        self._step = jax.jit(spread, compiler_options=options)
        for images in choices:
            self._time(images)
        self._images = choices[0]
        times = np.asarray([[self._time(images) for images in choices] for _ in range(5)])
        best = int(np.median(times, axis=0).argmin())
        self.batch, self._images = batches[best], choices[best]

    def _time(self, images):
        start = time.perf_counter()
        jax.block_until_ready(self._step(self._params, images))
        return (time.perf_counter() - start) / (self._calls * len(images))

    def __call__(self):
        return float(np.median([self._time(self._images) for _ in range(5)]))


class Stopwatch:
    """Times the stretches between two calls of the attack's progress function, and what follows."""

    def __init__(self, *bares, pause=None):
        """Start; the bare models are timed every `pause` seconds."""
        self.bares, self.wall, self.model_times = bares, 0.0, np.zeros(len(bares))
        self.pause = pause or (PAUSE_ON_CPU if jax.default_backend() == "cpu" else PAUSE_ON_ACCELERATORS)
        self.before = self.bare()
        self.start = time.perf_counter()

    def bare(self):
        """Seconds per image of each bare model, now."""
        return np.asarray([bare() for bare in self.bares])

    def __call__(self, progress=None):
        if progress is not None:
            self.lane_evals = progress.lane_evals
        if time.perf_counter() - self.start > self.pause:
            self.stop()

    def stop(self):
        results_file.wait_for_devices()
        wall, after = time.perf_counter() - self.start, self.bare()
        self.wall += wall
        self.model_times += wall / (0.5 * (self.before + after))  # in evaluations of each
        self.before, self.start = after, time.perf_counter()


def measure(attack, bare, tuned, count, lanes):
    """One row, compiled before; `tuned` is another `Bare` or None."""
    watch = Stopwatch(*filter(None, (bare, tuned)))
    result = jax.block_until_ready(attack(watch))
    watch.stop()
    used = int(np.sum(result.gradient_evals))
    row = {"images": count, "lanes": lanes, "devices": jax.device_count(),
           "ASR": float(np.mean(result.success)),
           "images_per_second": count / watch.wall, "evals_per_image": used / count,
           "bare_us": watch.wall / watch.model_times[0] * 1e6, "bare_batch": bare.batch,
           "efficiency": used / watch.model_times[0],
           "lanes_full": watch.lane_evals / watch.model_times[0]}
    if tuned is not None:
        row |= {"tuned_us": watch.wall / watch.model_times[1] * 1e6, "efficiency_tuned": used / watch.model_times[1]}
    return row


def main():
    """Measure and print."""
    arguments = results_file.parser(__doc__.splitlines()[0])
    arguments.add_argument("--num", type=int, nargs="+", help="default: 64 400, on an accelerator 1024 10000")
    arguments.add_argument("--lanes", nargs="+", default=["default"],
                           help="per device; `default` for what gse_jax takes")
    arguments.add_argument("--targeted", action="store_true")
    arguments.add_argument("--runs", type=int, help="of the search; default: the attack's own ten")
    arguments.add_argument("--repeats", type=int, help="default: 3, on an accelerator 1")
    arguments.add_argument("--precision", choices=PRECISIONS, default="highest")
    args = arguments.parse_args()
    if args.smoke:
        args.num, args.lanes, args.repeats = [3], ["2"], 1
    import gse_jax

    if jax.config.jax_platforms in (None, "", "cpu"):
        gse_jax.use_all_cpu_cores()
    params, apply_fn, images, labels, bounds, name = results_file.network_and_images(400)
    settings = gse_jax.GSESettings(num_runs=args.runs) if args.runs else None
    if args.smoke:
        settings = gse_jax.GSESettings(num_runs=2, max_steps=5, phase1_steps=3)
    bare = Bare(params, apply_fn, images[:64], args.precision, (4,) if args.smoke else None)
    known = jax.default_backend() == "cpu" or cuda.is_cuda(jax.devices()[0])
    known &= args.lanes == ["default"]  # timing it takes nearly as long as the attack on a CPU
    tuned = Bare(params, apply_fn, images[:64], args.precision, (4,) if args.smoke else None, True) if known else None
    rows = []
    on_cpu = jax.default_backend() == "cpu"
    args.num, args.repeats = args.num or (ON_CPU if on_cpu else ON_ACCELERATORS), args.repeats or (3 if on_cpu else 1)
    for count in args.num:
        # More than there are: the same again. np.resize repeats whole images.
        x = jnp.asarray(np.resize(images, (count, *images.shape[1:])))
        y = jnp.asarray(np.resize(labels, count))
        for lanes in args.lanes:
            width = None if lanes == "default" else int(lanes) * jax.device_count()

            def attack(progress, first=None, x=x, y=y, width=width):
                x, y = x[:first], y[:first]
                return gse_jax.attack(
                    params, apply_fn, x, y, targets=(y + 1) % 10 if args.targeted else None,
                    bounds=bounds, lanes=width, settings=settings, progress=progress,
                    precision=args.precision)

            attack(None, min(count, WARM))  # compiles all widths
            runs = sorted((measure(attack, bare, tuned, count, lanes) for _ in range(args.repeats)),
                          key=lambda row: row["efficiency"])
            rows.append({"model": name, "attack": "targeted" if args.targeted else "untargeted",
                         "precision": args.precision, **runs[len(runs) // 2], "repeats": len(runs)})
            for name_of in ("efficiency", "efficiency_tuned")[:1 if tuned is None else 2]:
                values = [run[name_of] for run in runs]
                rows[-1] |= {f"lowest_{name_of}": min(values), f"highest_{name_of}": max(values)}
            results_file.show(rows[-1])
    word = "targeted" if args.targeted else "untargeted"
    table = "" if args.lanes == ["default"] else "_lanes" if len(args.lanes) > 1 else f"_{args.lanes[0]}_lanes"
    table += f"_{args.runs}_runs" if args.runs else ""
    table += "" if args.precision == "highest" else f"_{args.precision}"
    results_file.write(f"throughput_{word}{table}", args, rows)


if __name__ == "__main__":
    main()
