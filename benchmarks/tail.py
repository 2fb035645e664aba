"""How busy the engine's rules keep the lanes, by replaying recorded runs of GSE.

    python benchmarks/tail.py [--platform cpu] [--num 16 17 64 400]
    python benchmarks/tail.py --platform gpu [--num 1024 1500 10000] [--order none runs known]

First GSE attacks real images and notes after how many model calls each run of each image's search
ended. Then the engine itself (queues, widths, parking, order) works through `num` images that need
just those calls, with a model that costs nothing, and its calls are added up at what they cost with
a real one: measured here for `cpu`, in attacks whose lanes are full; for `gpu`, as one device, what an
H200 took for a ResNet-20 (`--ms`, `--host-ms` and `--bare-us` for another). So the rules for the tail can
be judged in minutes and without an accelerator. What is not replayed: the host's costs before and after, and
the machine's moods. Few images are drawn several times, because one long image among them changes everything.

efficiency = gradients the attack used x bare time / time of all calls
"""

import collections
import dataclasses
import functools
import itertools
import json
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import results_file
from gse_jax.attacks import METHODS, Sample, attack_stream, packing, preset, runner
from gse_jax.attacks.algorithm import Algorithm, Method, Outcome

SIDE = 8  # of the replayed images, whose pixels are the calls; to the engine as small as CIFAR-10's
H200_MS = {64: 1.21, 256: 3.29, 1024: 11.5}  # of a call, by lanes
H200_BARE_US = 10.6  # of the bare model per image, at its best, compiled as the attack is
# After each stretch of calls; to pack the lanes anew. Profiled at 0.15 s for 27 stretches with the set-up.
H200_HOST_MS = (3.0, 3.0)
# Timed in attacks on 16 and 60 images on two cores: a few ms longer after a long stretch than after a short one.
CPU_HOST_MS = (5.0, 16.0)
CPU_WIDTHS = (8, 4, 2, 1)
DRAWN = 200  # images in all draws, at least
ON_CPU, ON_GPU = [16, 17, 24, 32, 64, 128, 400], [1024, 1100, 1500, 2048, 10_000]


def recorded(settings, hyperparams, **call):
    """GSE, whose adversarials begin with the calls after which each run ended."""
    gse = METHODS["gse"].bind(settings, hyperparams, **call)
    runs = jnp.arange(settings.num_runs)

    def step(state, evaluation):
        old, ends = state
        new = gse.step(old, evaluation)
        return new, jnp.where(runs >= old.search.run, new.forward_evals, ends)

    def finish(state):
        outcome = gse.finish(state[0])
        flat = outcome.adversarials.ravel().at[:len(runs)].set(state[1].astype(outcome.adversarials.dtype))
        return outcome._replace(adversarials=flat.reshape(outcome.adversarials.shape))

    return Algorithm(lambda sample: (gse.init(sample), jnp.zeros_like(runs)), lambda s: gse.query(s[0]),
                     lambda s, logits: gse.loss(s[0], logits), step, lambda s: gse.done(s[0]), finish)


def _runs(state):
    """GSE's own order: by runs done, then by steps into the current one."""
    over = state.ends <= state.calls
    return over.sum() * 1000 + state.calls - jnp.max(jnp.where(over, state.ends, 0.0))


# What tells how near to its end an image is: GSE's own answer, nothing, or what nobody can know.
ORDERS = {"runs": _runs, "none": None, "known": lambda state: state.calls - state.ends[-1]}


class Replay(NamedTuple):
    """State of one replayed image."""

    ends: jax.Array  # [R] calls after which each run ends
    calls: jax.Array  # [] so far


def replayed(order, settings, hyperparams, **call):
    """An attack that needs the calls its image says, and has no other effect."""
    del hyperparams, call

    def finish(state):
        zero, no = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
        return Outcome(jnp.zeros((SIDE, SIDE, 1)), zero > 0, no, no, no, zero)

    return Algorithm(
        init=lambda sample: Replay(sample.x.ravel()[:settings.num_runs], jnp.zeros(())),
        query=lambda state: jnp.zeros((SIDE, SIDE, 1)), loss=lambda state, logits: logits.sum(),
        step=lambda state, evaluation: state._replace(calls=state.calls + 1),
        done=lambda state: state.calls >= state.ends[-1], finish=finish,
        progress=ORDERS[order])


def method(bind):
    """A registry row with GSE's configuration."""
    return Method(bind, METHODS["gse"].preset, lambda *_: None)


def samples(x, y):
    """All images as one batch."""
    return [Sample(x, y, np.full(len(x), -1, np.int32), np.arange(len(x), dtype=np.int32))]


def record(settings, network):
    """Return [N, R] calls at the end of each run, and [N] gradients used."""
    params, apply_fn, x, y, bounds, _ = network
    METHODS["recorded"] = method(recorded)
    found = list(attack_stream(params, apply_fn, samples(x, y), image_shape=x.shape[1:], bounds=bounds,
                               method="recorded", settings=settings, num_images=len(x)))
    ends = np.concatenate([s.outcome.adversarials for s in found])
    return (ends.reshape(len(x), -1)[:, :settings.num_runs],
            np.concatenate([s.outcome.gradient_evals for s in found]))


def replay(ends, settings, platform, order):
    """Let the engine work; returns [(lanes per device, calls)] of all stretches, and how often it packed."""
    METHODS["replayed"] = method(functools.partial(replayed, order))
    made, packed, on_mesh, moved = [], [], runner.on_mesh, packing.Tail._moved

    def watched(program, mesh, capacity):
        advance = on_mesh(program, mesh, capacity)

        def call(params, hyperparams, key, lanes, *rest):
            width = len(lanes.sample_id) // mesh.size
            result = advance(params, hyperparams, key, lanes, *rest)
            made.append((width, int(result[4].max())))
            return result

        return call

    def watched_moves(*arguments):
        packed.append(1)
        return moved(*arguments)

    x = np.zeros((len(ends), SIDE * SIDE), np.float32)
    x[:, :settings.num_runs] = ends
    x = x.reshape(-1, SIDE, SIDE, 1)
    own = runner._platform
    runner._platform, runner.on_mesh, packing.Tail._moved = lambda _: platform, watched, watched_moves
    try:
        stretches = attack_stream((), lambda params, x: x.reshape(len(x), -1)[:, :2],
                                  samples(x, np.zeros(len(x), np.int32)), image_shape=x.shape[1:],
                                  method="replayed", settings=settings, num_images=len(x),
                                  bounds=(0.0, float(ends.max())))
        assert sum(len(s.sample_ids) for s in stretches) == len(x)
    finally:
        runner._platform, runner.on_mesh, packing.Tail._moved = own, on_mesh, moved
    return made, len(packed)


def full_calls(network, width, devices):
    """Yield the ms of calls with `width` full lanes per device, a stretch of calls at a time."""
    params, apply_fn, x, y, bounds, _ = network
    lanes = width * devices
    images = np.arange(4 * lanes) % len(x)  # so many that none of the lanes idles
    start = None
    for stretch in attack_stream(params, apply_fn, samples(x[images], y[images]), image_shape=x.shape[1:],
                                 bounds=bounds, lanes=lanes, num_images=len(images)):
        if start is not None:
            yield (time.perf_counter() - start) * 1e3 * lanes / stretch.lane_evals
        start = time.perf_counter()


def costs(args, network, devices):
    """Return {lanes per device: ms per call}, ms of the bare model per image, and the host's ms."""
    if args.platform == "gpu":
        return {int(k): v for k, v in (args.ms or H200_MS).items()}, args.bare_us / 1e3, args.host_ms or H200_HOST_MS
    from throughput import Bare

    widths, seen = ((1,) if args.smoke else CPU_WIDTHS), collections.defaultdict(list)
    bare, times = Bare(*network[:3], batches=(4,) if args.smoke else None), []
    for again in range(1 if args.smoke else 6):
        for width in widths:
            most = 2 if args.smoke else max(2, 32 // width)
            stretches = list(itertools.islice(full_calls(network, width, devices), most))
            if again or args.smoke:  # the first time compiles
                seen[width] += stretches
        times.append(bare())
    ms = {width: float(np.median(found)) for width, found in seen.items()}
    return ms, float(np.median(times)) * 1e3, args.host_ms or CPU_HOST_MS


def main():
    """Record, replay and print."""
    arguments = results_file.parser(__doc__.splitlines()[0])
    arguments.add_argument("--platform", choices=("cpu", "gpu"), default="cpu")
    arguments.add_argument("--num", type=int, nargs="+")
    arguments.add_argument("--images", type=int, default=110, help="recorded, if the model is right about them")
    arguments.add_argument("--order", choices=ORDERS, nargs="+", default=["runs"],
                           help="who goes first in the tail")
    arguments.add_argument("--ms", type=json.loads, help='JSON, e.g. {"64": 1.6}: lanes to ms per call')
    arguments.add_argument("--host-ms", type=float, nargs=2,
                           help="after a stretch of calls, and to pack")
    arguments.add_argument("--bare-us", type=float, default=H200_BARE_US, help="gpu: per image")
    args = arguments.parse_args()
    if args.platform == "cpu":
        import gse_jax

        gse_jax.use_all_cpu_cores()
    settings, _ = preset("gse", "cifar10")
    if args.smoke:
        settings = dataclasses.replace(settings, num_runs=2, max_steps=5, phase1_steps=3)
        args.images, args.num = 4, [3]
    network = results_file.network_and_images(args.images)
    ends, gradients = record(settings, network)
    devices = jax.local_device_count() if args.platform == "cpu" else 1
    ms, bare, host = costs(args, network, devices)
    lanes = sorted(ms)
    rows = []
    counts = args.num or (ON_CPU if args.platform == "cpu" else ON_GPU)
    for order, count in itertools.product(args.order, counts):
        draws = 1 if args.smoke else -(-DRAWN // count)
        random = np.random.default_rng(0)  # the same images for every order
        calls, total, used, longest = collections.Counter(), 0.0, 0, []
        for _ in range(draws):
            chosen = np.resize(random.permutation(len(ends)), count)
            if order == "known":
                chosen = chosen[np.argsort(-ends[chosen, -1], kind="stable")]
            made, packed = replay(ends[chosen], settings, args.platform, order)
            for width, number in made:
                calls[width] += number
                total += number * np.interp(width, lanes, [ms[w] for w in lanes]) + host[0]
            total += packed * host[1]
            used += gradients[chosen].sum()
            longest.append(int(ends[chosen, -1].max()))
        rows.append({"platform": args.platform, "order": order, "devices": devices, "recorded": len(ends),
                     "images": count, "draws": draws, "longest": round(float(np.mean(longest))),
                     "calls": {w: round(calls[w] / draws) for w in sorted(calls)}, "ms": ms,
                     "efficiency": float(used * bare / total)})
        results_file.show(rows[-1])
    results_file.write("tail" if args.platform == "cpu" else "tail_accelerator", args, rows)


if __name__ == "__main__":
    main()
