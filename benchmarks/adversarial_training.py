"""Group-sparse adversarial training: how large are the groups that fool the trained model?

    python benchmarks/adversarial_training.py [--steps 200] [--num 100]

A small classifier of the digits (16 x 16 pixels) is trained on by the same number of steps in three
ways: on clean images (the control); on GSE's adversarials taken as data; and on GSE's adversarials
with the gradient through the attack, which also knows how the attack will answer. In both the
perturbation is stretched beyond the boundary (`STRETCH`), else a minimal attack's images are ties
from which little is learned. Before and after, each model meets the full GSE attack and an attack
it was not trained against.

Read the row of the other attack too: groups that grow against GSE alone show a model fitted to GSE.
Patches of d_{2,0} are 4 x 4 pixels here, blurs 3 x 3, because the images are small.
"""

import dataclasses
import time

import jax
import jax.numpy as jnp

import patch_network
import results_file

STRETCH = 3.0
PATCH_SIZE = 4
HYPERPARAMS = dict(mu=0.01, step_size=0.5)  # the presets are for steeper networks


def training_loss(mode):
    """loss(params, x, y): clean, or clean plus stretched adversarial cross entropy."""
    import gse_jax

    settings = gse_jax.GSESettings(num_runs=4, num_boosted_runs=0, max_steps=20, phase1_steps=10,
                                   blur_size=3, patch_size=PATCH_SIZE)

    def loss(params, x, y):
        clean = patch_network.cross_entropy(params, x, y)
        if mode == "clean":
            return clean
        attacked = gse_jax.differentiable_attack(
            params, patch_network.apply_fn, x, y, settings=settings,
            hyperparams=gse_jax.GSEHyperparams(**HYPERPARAMS)).adversarials
        if mode == "as data":
            attacked = jax.lax.stop_gradient(attacked)
        stretched = jnp.clip(x + STRETCH * (attacked - x), 0.0, 1.0)
        return clean + patch_network.cross_entropy(params, stretched, y)

    return loss


def measure(model, params, x, y, smoke):
    """Rows of the table: one per attack."""
    import gse_jax
    from gse_jax import metrics

    settings = gse_jax.GSESettings(num_runs=2 if smoke else 10, max_steps=5 if smoke else 100,
                                   blur_size=3, patch_size=PATCH_SIZE)
    attacks = {"gse": dict(settings=settings, hyperparams=gse_jax.GSEHyperparams(**HYPERPARAMS)),
               "sigma_zero": {}}
    if smoke:
        preset, _ = gse_jax.preset("sigma_zero", "cifar10")
        attacks["sigma_zero"]["settings"] = dataclasses.replace(preset, max_steps=5)
    rows = []
    for method, options in attacks.items():
        result = gse_jax.attack(params, patch_network.apply_fn, x, y, method=method, **options)
        found = metrics.summary(x, result, patch_size=PATCH_SIZE)
        rows.append({"model": model, "accuracy": patch_network.accuracy(params, x, y),
                     "attack": method, "asr": found.asr_attacked,
                     "acp": found.changed_pixels.mean, "anc": found.num_clusters.mean,
                     "l2": found.l2.mean, "d20": found.patch_count.mean,
                     "d20_error": found.patch_count.standard_error})
        results_file.show(rows[-1])
    return rows


def main():
    """Train, measure and print."""
    arguments = results_file.parser(__doc__.splitlines()[0])
    arguments.add_argument("--steps", type=int, default=200)
    arguments.add_argument("--num", type=int, default=100)
    arguments.add_argument("--learning-rate", type=float, default=1e-3)
    args = arguments.parse_args()
    if args.smoke:
        args.steps, args.num = 2, 4
    import gse_jax

    gse_jax.use_all_cpu_cores()
    params, x, y, test_x, test_y = patch_network.standard(steps=20 if args.smoke else 600)
    test_x, test_y = test_x[:args.num], test_y[:args.num]
    rows = measure("before", params, test_x, test_y, args.smoke)
    modes = ("clean", "as data", "through the attack")
    for mode in modes[2:] if args.smoke else modes:
        start = time.perf_counter()
        trained = patch_network.fit(params, x, y, steps=args.steps, batch_size=32, seed=1,
                                    learning_rate=args.learning_rate, loss=training_loss(mode))
        jax.block_until_ready(trained)
        seconds = time.perf_counter() - start
        after = measure(mode, trained, test_x, test_y, args.smoke)
        rows += [row | {"train_seconds": seconds} for row in after]
    results_file.write("adversarial_training", args, rows)


if __name__ == "__main__":
    main()
