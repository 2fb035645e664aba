"""What a convolution's gradient costs inside a compiled loop, against the same call on its own.

    python benchmarks/loop_cost.py [--only grouped]

On CPU, XLA brings convolutions into their fast form only outside loops. Rows: kinds of convolutions
(value, gradient by the image and a step along it, alone, in a `fori_loop` as JAX writes it, in the
same loop rewritten by `gse_jax.attacks.convolutions`), small networks of four libraries, and whole
attacks per call of the model. `as it is` and `rewritten` are multiples of `alone`; `rewritten`
should be at most about 1.1.

Times are CPU times with one thread per convolution (the library works with one XLA device per
core), the least of several rounds in turn, so that a busy machine disturbs the ratios little.
"""

import itertools
import os
import time

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import results_file  # noqa: E402
from jax import lax  # noqa: E402

KINDS = {  # features in, features out, side of the kernel, options
    "3x3": (32, 32, 3, {}),
    "stride 2": (32, 64, 3, {"window_strides": (2, 2)}),
    "1x1 stride 2": (64, 64, 1, {"window_strides": (2, 2)}),
    "7x7 stride 2": (3, 32, 7, {"window_strides": (2, 2)}),
    "patches 4x4": (3, 64, 4, {"window_strides": (4, 4), "padding": "VALID"}),
    "dilated": (32, 32, 3, {"rhs_dilation": (2, 2)}),
    "transposed": (32, 32, 4, {"lhs_dilation": (2, 2), "padding": ((2, 2), (2, 2))}),
    "2 groups": (64, 64, 3, {"feature_group_count": 2}),
    "4 groups stride 2": (32, 64, 3, {"feature_group_count": 4, "window_strides": (2, 2)}),
    "32 groups": (128, 128, 3, {"feature_group_count": 32}),
    "32 groups of 16": (512, 512, 3, {"feature_group_count": 32}),
    "depthwise": (64, 64, 3, {"feature_group_count": 64}),
    "depthwise stride 2": (64, 64, 3, {"feature_group_count": 64, "window_strides": (2, 2)}),
    "depthwise 7x7": (64, 64, 7, {"feature_group_count": 64}),
    "depthwise, 2 outputs": (32, 64, 3, {"feature_group_count": 32}),
    "one dimension": (32, 32, 3, {}),
    "three dimensions": (16, 16, 3, {}),
    "three dimensions, stride 2": (16, 32, 3, {"window_strides": (2, 2, 2)}),
}
STEPS = 4


def kind(name, layout, side):
    """(value-and-gradient, kernel, images) of one convolution."""
    inputs, outputs, size, options = KINDS[name]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, side, side, inputs)).astype("f4")
    groups = options.get("feature_group_count", 1)
    kernel = rng.normal(size=(size, size, inputs // groups, outputs)).astype("f4") / size
    numbers = ("NHWC", "HWIO", "NHWC")
    options = {"window_strides": (1, 1), "padding": "SAME"} | options
    if layout == "NCHW":
        x, kernel = x.transpose(0, 3, 1, 2), kernel.transpose(3, 2, 0, 1)
        numbers = ("NCHW", "OIHW", "NCHW")
    if name == "one dimension":  # all pixels in a row
        height = numbers[0].index("H")
        x = x.reshape(*x.shape[:height], -1, *x.shape[height + 2:])
        kernel = kernel.take(0, numbers[1].index("H"))
        numbers = tuple(spec.replace("H", "") for spec in numbers)
        options["window_strides"] = (1,)
    if "three dimensions" in name:  # four slices one above the other
        height = numbers[0].index("H")
        x = x.reshape(*x.shape[:height], 4, -1, *x.shape[height + 1:])
        kernel = np.stack([kernel] * size, numbers[1].index("H")) / size
        numbers = tuple(spec.replace("H", "DH") for spec in numbers)
        options["window_strides"] = (options["window_strides"] * 2)[:3]

    def loss(kernel, x):
        return jnp.sum(jnp.tanh(lax.conv_general_dilated(x, kernel, dimension_numbers=numbers,
                                                         **options)))

    return jax.value_and_grad(loss, 1), jnp.asarray(kernel), jnp.asarray(x)


def networks(features):
    """name -> (apply_fn, params): two convolutions, the second with stride 2, in each library."""
    import equinox
    import haiku
    from flax import linen, nnx

    from gse_jax.models import from_equinox, from_haiku, from_linen, from_nnx

    x, key = jnp.zeros((1, 32, 32, 3)), jax.random.key(0)
    mean = lambda x: x.mean((1, 2))
    net = linen.Sequential([linen.Conv(features, (3, 3)), linen.relu,
                            linen.Conv(2 * features, (3, 3), 2), linen.relu, mean, linen.Dense(10)])
    yield "Linen", from_linen(net, net.init(key, x))
    rngs = nnx.Rngs(0)
    yield "NNX", from_nnx(nnx.Sequential(
        nnx.Conv(3, features, (3, 3), rngs=rngs), nnx.relu,
        nnx.Conv(features, 2 * features, (3, 3), 2, rngs=rngs), nnx.relu, mean,
        nnx.Linear(2 * features, 10, rngs=rngs)))
    relu, average = equinox.nn.Lambda(jax.nn.relu), equinox.nn.Lambda(lambda x: x.mean((1, 2)))
    yield "Equinox", from_equinox(equinox.nn.Sequential([
        equinox.nn.Conv2d(3, features, 3, padding=1, key=key), relu,
        equinox.nn.Conv2d(features, 2 * features, 3, 2, padding=1, key=key), relu, average,
        equinox.nn.Linear(2 * features, 10, key=key)]))
    transformed = haiku.without_apply_rng(haiku.transform(lambda x: haiku.Sequential([
        haiku.Conv2D(features, 3), jax.nn.relu, haiku.Conv2D(2 * features, 3, 2), jax.nn.relu, mean,
        haiku.Linear(10)])(x)))
    yield "Haiku", from_haiku(transformed, transformed.init(key, x))
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, 3, 3, 3)).astype("f4") / 3)

    def scanned(params, x):
        def layer(x, kernel):
            return jnp.tanh(lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))), None
        return lax.scan(layer, x, params)[0].mean((1, 2))

    yield "a scan over layers", (scanned, kernel)


def looped(value_and_grad, steps=STEPS):
    """The call repeated in a loop, each from where the last one led; for None once, without a loop."""
    def body(_, carry):
        total, params, x = carry
        value, gradient = value_and_grad(params, x)
        return total + value, params, x - 1e-6 * gradient

    def repeated(params, x):
        start = jnp.float32(0.0), params, x
        return body(0, start) if steps is None else lax.fori_loop(0, steps, body, start)

    return repeated


def least_times(functions, args, rounds):
    """Seconds of CPU of each function, called in turn."""
    functions = [jax.jit(fn).lower(*args).compile() for fn in functions]
    times = [[] for _ in functions]
    for _ in range(rounds + 1):
        for fn, seconds in zip(functions, times):
            start = time.process_time()
            jax.block_until_ready(fn(*args))
            seconds.append(time.process_time() - start)
    return [min(seconds[1:]) for seconds in times]


def compared(value_and_grad, params, x, rounds):
    """The numbers of one row."""
    from gse_jax.attacks.convolutions import canonical_convolutions

    alone, loop, rewritten = least_times(
        [looped(value_and_grad, None), looped(value_and_grad),
         looped(canonical_convolutions(value_and_grad))],
        (params, x), rounds)
    return {"alone_ms": 1e3 * alone, "as it is": loop / STEPS / alone,
            "rewritten": rewritten / STEPS / alone}


def whole_attacks(params, apply_fn, x, y, bounds, name, *, steps, rounds):
    """Rows of the attack under `jit` and of the differentiable attack, per step."""
    import gse_jax

    x, y = jnp.asarray(x), jnp.asarray(y)
    hyperparams = gse_jax.GSEHyperparams(step_size=1e-6)  # nothing succeeds: all steps are done
    options = {"bounds": bounds, "hyperparams": hyperparams, "settings": gse_jax.GSESettings(
        num_runs=1, num_boosted_runs=0, max_steps=steps, phase1_steps=steps // 2)}

    def margin(params, x):
        return jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(apply_fn(params, x)), y[:, None], 1))

    value_and_grad = jax.value_and_grad(margin, 1)
    bare = lambda params, x: value_and_grad(params, x)
    second = jax.grad(lambda params, x: jnp.sum(value_and_grad(params, x)[1] * jnp.cos(x)), (0, 1))
    attack = lambda params, x: gse_jax.attack(params, apply_fn, x, y, lanes=len(x), **options)

    def smooth(params, x):
        return gse_jax.differentiable_attack(params, apply_fn, x, y, tradeoff=1e-6, **options)

    reverse = jax.grad(lambda params, x: jnp.sum(smooth(params, x).gap), (0, 1))
    alone, twice, whole, forward, backward = least_times(
        [bare, second, attack, smooth, reverse], (params, x), rounds)
    calls = steps + 1
    yield {"kind": f"attack under jit, {name}", "alone_ms": 1e3 * alone,
           "rewritten": whole / calls / alone}
    yield {"kind": "differentiable_attack, forward", "alone_ms": 1e3 * alone,
           "rewritten": forward / calls / alone}
    # The forward pass, its repetition from checkpoints, and the reverse of each step.
    yield {"kind": "differentiable_attack, reverse by params and x",
           "alone_ms": 1e3 * (2 * alone + twice),
           "rewritten": backward / calls / (2 * alone + twice)}


def main():
    """Measure and print."""
    arguments = results_file.parser(__doc__.splitlines()[0])
    arguments.add_argument("--only", default="", help="rows whose name contains this")
    args = arguments.parse_args()
    side, rounds = (8, 1) if args.smoke else (32, 15)
    rows = []

    def add(row):
        rows.append(row)
        results_file.show(row)

    for i, name in enumerate(list(KINDS)[::10] if args.smoke else KINDS):
        for layout in (("NHWC", "NCHW")[i % 2],) if args.smoke else ("NHWC", "NCHW"):
            if args.only in name:
                add({"kind": name, "layout": layout,
                     **compared(*kind(name, layout, side), rounds)})
    for name, (apply_fn, params) in itertools.islice(networks(4 if args.smoke else 32),
                                                     1 if args.smoke else None):
        if args.only in name:
            x = jax.random.uniform(jax.random.key(1), (8, side, side, 3))
            add({"kind": name, **compared(jax.value_and_grad(
                lambda p, x, apply_fn=apply_fn: jnp.sum(jnp.tanh(apply_fn(p, x))), 1), params, x,
                rounds)})
    if not args.only:
        if args.smoke:  # the last small network, as it calls two images
            x = x[:2]
            problem = params, apply_fn, x, apply_fn(params, x).argmax(-1), (0.0, 1.0), name
        else:
            params, apply_fn, x, y, *about = results_file.network_and_images(16)
            problem = params, apply_fn, x[:8], y[:8], *about
        for row in whole_attacks(*problem, steps=2 if args.smoke else 12, rounds=rounds):
            add(row)
        results_file.write("loop_cost", args, rows)


if __name__ == "__main__":
    main()
