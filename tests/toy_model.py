"""Models of the tests: the golden toy network, and a linear classifier with known optima."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gse_jax.attacks.lanes import evaluate

GOLDEN = Path(__file__).parent / "golden" / "gse_toy_trace.npz"
CASES = (("untargeted", "cifar10", False), ("targeted", "cifar10", True),
         ("targeted_infeasible", "cifar10", True), ("imagenet_preset", "imagenet", False))


def golden():
    """The golden trace file."""
    return np.load(GOLDEN, allow_pickle=False)


def toy(dtype=jnp.float64):
    """(params, apply_fn, images, labels) of the golden runs; images in [-1, 1]."""
    trace = golden()
    params = {k[4:]: jnp.asarray(trace[k], dtype) for k in trace.files if k.startswith("toy/")}
    x = jnp.asarray(trace["images"], dtype)
    y = toy_logits(params, x).argmax(-1).astype(jnp.int32)
    return params, toy_logits, x, y


def toy_logits(params, x):
    """Two tanh convolutions, a global maximum, a linear layer."""
    for name, stride in (("c1", 1), ("c2", 2)):
        x = lax.conv_general_dilated(x, params[f"{name}.weight"], (stride, stride),
                                     ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jnp.tanh(x + params[f"{name}.bias"].reshape(1, 1, 1, -1))
    return 3.0 * (x.max((1, 2)) @ params["fc.weight"] + params["fc.bias"][None])


def linear_logits(params, x):
    """Logits x . kernel + bias."""
    kernel, bias = params
    return x.reshape(x.shape[0], -1) @ kernel + bias[None]


def small_logits(params, x):
    """One hidden layer: a linear model's constant gradient would sit on the search's thresholds."""
    first, second = params
    return jnp.tanh((x.reshape(x.shape[0], -1) - 0.5) @ first) @ second


def states_over(algorithm, logits_fn, samples, steps):
    """Yield the states of an attack on some images after each of so many steps."""
    advance = jax.jit(lambda s: jax.vmap(algorithm.step)(s, evaluate(algorithm, logits_fn, s)[0]))
    state = jax.vmap(algorithm.init)(samples)
    for _ in range(steps):
        state = advance(state)
        yield state


def failing_at(on_mesh, number, error):
    """`runner.on_mesh` whose programs fail at a call, counted over all of them, and only there."""
    calls = []

    def failing(*arguments, **options):
        run = on_mesh(*arguments, **options)

        def call(*values):
            calls.append(1)
            if len(calls) == number:
                raise error
            return run(*values)

        return call

    return failing
