"""Peak memory of reverse mode through the attack: 200 steps against 12.

    python benchmarks/reverse_memory.py [--batch 32]

Compiles the gradient by the image of the differentiable attack's result on a ResNet-20 (the paper's
CIFAR-10 network, else the digits') and reads the temporary memory that the compiled program
reserves; nothing has to run for that, and it is what the device will hold beside arguments
and results. The scan stores the iterates of about 2 sqrt(steps) iterations and the activations of one model call.
"""

import time

import jax
import jax.numpy as jnp

import patch_network
import results_file

STEPS = (12, 200)


def reserved(params, apply_fn, x, y, bounds, steps):
    """(temporary bytes, seconds to compile) of the reverse pass."""
    import gse_jax

    def objective(params, x, tradeoff):
        result = gse_jax.differentiable_attack(params, apply_fn, x, y, tradeoff=tradeoff,
                                               num_steps=steps, bounds=bounds)
        return jnp.sum((result.adversarials - x) ** 2) + jnp.sum(result.gap)

    gradient = jax.jit(jax.grad(objective, argnums=(0, 1, 2)))
    start = time.perf_counter()
    compiled = gradient.lower(params, x, jnp.full(len(x), 1e-3, x.dtype)).compile()
    return compiled.memory_analysis().temp_size_in_bytes, time.perf_counter() - start


def main():
    """Measure and print."""
    arguments = results_file.parser(__doc__.splitlines()[0])
    arguments.add_argument("--batch", type=int, default=32)
    args = arguments.parse_args()
    steps = (2,) if args.smoke else STEPS
    batch = 2 if args.smoke else args.batch
    params, apply_fn, x, y, bounds, name = results_file.network_and_images(2 * batch)
    if args.smoke:  # the same in a network that compiles in seconds
        params, apply_fn, x = patch_network.init(0), patch_network.apply_fn, x[:, ::2, ::2]
        bounds, name = (-1.0, 1.0), "patches"
    x, y = jnp.asarray(x[:batch]), jnp.asarray(y[:batch])
    rows = []
    for count in steps:
        size, seconds = reserved(params, apply_fn, x, y, bounds, count)
        rows.append({"model": name, "batch": batch, "steps": count, "temporary_mib": size / 2**20,
                     "compile_seconds": seconds,
                     "ratio": size / 2**20 / rows[0]["temporary_mib"] if rows else 1.0})
        results_file.show(rows[-1])
    results_file.write("reverse_memory", args, rows)


if __name__ == "__main__":
    main()
