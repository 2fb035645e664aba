"""How much of the attack's wall time is the model itself, on one device.

    python benchmarks/efficiency.py [--num 64] [--lanes 16] [--devices 1]

ratio     = wall time / (evaluations that images needed x bare time)
with idle = the same with the evaluations of idle lanes in the tail counted as needed
bare      = jitted value-and-gradient of the same model at batch = lanes, per image

The bare model is timed in the middle of the attack, between its stretches of work, and each stretch
is divided by the bare times on both sides of it: another process on the machine slows both. The
attack is measured after compilation.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import results_file


def bare_model(params, apply_fn, x, batch, mesh):
    """A function that times one value-and-gradient on all devices, in seconds per image."""
    def gradient(params, x):
        return jax.grad(lambda x: apply_fn(params, x).max(-1).sum())(x)

    step = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=(P(), P("d")), out_specs=P("d"),
                                 check_vma=False))
    images = np.resize(x, (batch, *x.shape[1:]))
    images = jax.device_put(images, jax.sharding.NamedSharding(mesh, P("d")))
    step(params, images).block_until_ready()

    def seconds():
        times = []
        for _ in range(5):
            start = time.perf_counter()
            step(params, images).block_until_ready()
            times.append(time.perf_counter() - start)
        return float(np.median(times)) / batch

    return seconds


class Stopwatch:
    """Times the stretches between two calls of the attack's progress function."""

    def __init__(self, bare):
        self.bare, self.wall, self.model, self.lane_evals = bare, 0.0, 0.0, 0
        self.before = bare()
        self.start = time.perf_counter()

    def __call__(self, progress):
        wall, after = time.perf_counter() - self.start, self.bare()
        evals = progress.lane_evals - self.lane_evals
        self.wall += wall
        self.model += evals * 0.5 * (self.before + after)
        self.lane_evals, self.before = progress.lane_evals, after
        self.start = time.perf_counter()


def main():
    """Measure and print."""
    arguments = results_file.parser(__doc__.splitlines()[0])
    arguments.add_argument("--num", type=int, default=64)
    arguments.add_argument("--lanes", type=int, default=16, help="per device")
    arguments.add_argument("--devices", type=int, default=1)
    arguments.add_argument("--repeats", type=int, default=2)
    args = arguments.parse_args()
    if args.smoke:
        args.num, args.lanes, args.repeats = 3, 2, 1
    jax.config.update("jax_num_cpu_devices", args.devices)
    import gse_jax

    params, apply_fn, x, y, bounds, name = results_file.network_and_images(args.num)
    lanes = args.lanes * args.devices
    mesh = jax.make_mesh((args.devices,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    options = dict(bounds=bounds, lanes=lanes)
    if args.smoke:
        options["settings"] = gse_jax.GSESettings(num_runs=2, max_steps=5, phase1_steps=3)
    x, y = jnp.asarray(x), jnp.asarray(y)
    gse_jax.attack(params, apply_fn, x, y, **options)  # compiles
    rows, bare = [], bare_model(params, apply_fn, np.asarray(x), lanes, mesh)
    for _ in range(args.repeats):
        watch = Stopwatch(bare)
        result = gse_jax.attack(params, apply_fn, x, y, **options, progress=watch)
        # Every evaluation computes prediction and gradient, also where the attack uses one only.
        evals = int(np.sum(result.forward_evals))
        with_idle = watch.wall / watch.model
        rows.append({"model": name, "images": len(x), "devices": args.devices, "lanes": lanes,
                     "seconds_per_image": watch.wall / len(x), "evals_per_image": evals / len(x),
                     "bare_us": watch.model / watch.lane_evals * 1e6,
                     "ratio": with_idle * watch.lane_evals / evals,
                     "ratio_with_idle_lanes": with_idle})
        print(" | ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}"
                         for k, v in rows[-1].items()), flush=True)
    results_file.write(f"efficiency_{args.devices}_device", args, rows)


if __name__ == "__main__":
    main()
