"""Tune GSE's mu and step size to a model by hypergradients; does d_{2,0} fall at equal evaluations?

    python benchmarks/hypergradient_tuning.py [--steps 15] [--num 60]

For each of two small classifiers of the digits (16 x 16 pixels): Adam on (log mu, log step size).
d_{2,0} itself is piecewise constant. What is descended is the margin that is left when a run ends
at *more* than the trade-off which the search found (`FACTOR`): where such runs come to succeed, the
search can go on to sparser ones. Training images tune; test images measure, with the same search.
"Equal evaluations" is a cap: the tuned attack's iterations per run are lowered until it spends, per
image, no more gradients than the start did. The control is a pair set by hand, that of
`adversarial_training.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import patch_network
import results_file

FACTOR = 2.0
PATCH_SIZE = 4
START = dict(mu=0.1, step_size=0.05)  # the ImageNet preset's; CIFAR-10's finds next to nothing
BY_HAND = dict(mu=0.01, step_size=0.5)
MODELS = {"16 features, 64 hidden": dict(seed=0), "16 features, 32 hidden": dict(seed=1, hidden=32)}


def settings_of(smoke, max_steps):
    """The search of all measurements here."""
    import gse_jax

    return gse_jax.GSESettings(num_runs=2 if smoke else 10, max_steps=max_steps, blur_size=3,
                               phase1_steps=min(30, max_steps), patch_size=PATCH_SIZE)


def tune(params, x, y, settings, steps):
    """Return (tuned hyperparameters, the objective per step)."""
    import gse_jax

    def hyperparams(logs):
        return gse_jax.GSEHyperparams(mu=jnp.exp(logs[0]), step_size=jnp.exp(logs[1]))

    @jax.jit
    def objective(logs):
        found = gse_jax.attack(params, patch_network.apply_fn, x, y, settings=settings,
                               hyperparams=hyperparams(jax.lax.stop_gradient(logs))).tradeoff
        # Images for which nothing was found are tried at a typical trade-off.
        typical = jnp.nanmedian(jnp.where(found > 0, found, jnp.nan))
        tradeoff = FACTOR * jnp.where(found > 0, found, jnp.nan_to_num(typical, nan=1e-3))
        result = gse_jax.differentiable_attack(
            params, patch_network.apply_fn, x, y, tradeoff=jax.lax.stop_gradient(tradeoff),
            settings=settings, hyperparams=hyperparams(logs))
        return jnp.mean(jax.nn.relu(result.gap))

    optimizer = optax.adam(0.3)
    logs = jnp.log(jnp.asarray([START["mu"], START["step_size"]]))
    state, values = optimizer.init(logs), []
    gradient = jax.jit(jax.value_and_grad(objective))
    for _ in range(steps):
        value, slope = gradient(logs)
        updates, state = optimizer.update(slope, state)
        logs = optax.apply_updates(logs, updates)
        values.append(float(value))
        print(f"  margin left {value:.4f}, mu {jnp.exp(logs[0]):.4g}, "
              f"step size {jnp.exp(logs[1]):.4g}", flush=True)
    return gse_jax.GSEHyperparams(*(float(h) for h in hyperparams(logs))), values


def measure(params, x, y, hyperparams, smoke, budget=None):
    """(patches [N], success [N], gradients per image, iterations per run), within a budget."""
    import gse_jax
    from gse_jax import metrics

    for max_steps in (5,) if smoke else (100, 75, 50, 30, 20, 10):
        result = gse_jax.attack(params, patch_network.apply_fn, x, y, hyperparams=hyperparams,
                                settings=settings_of(smoke, max_steps))
        spent = float(np.mean(result.gradient_evals))
        if budget is None or spent <= budget:
            break
    patches = metrics.patch_count(x, result.adversarials, patch_size=PATCH_SIZE)
    found = np.asarray(result.status) == gse_jax.Status.FOUND
    return np.asarray(patches), found, spent, max_steps


def main():
    """Tune, measure and print."""
    arguments = results_file.parser(__doc__.splitlines()[0])
    arguments.add_argument("--steps", type=int, default=15)
    arguments.add_argument("--num", type=int, default=60)
    arguments.add_argument("--tuning-images", type=int, default=32)
    args = arguments.parse_args()
    if args.smoke:
        args.steps, args.num, args.tuning_images = 1, 3, 3
    import gse_jax

    gse_jax.use_all_cpu_cores()
    rows = []
    for name, shape in list(MODELS.items())[:1 if args.smoke else None]:
        params, x, y, test_x, test_y = patch_network.standard(20 if args.smoke else 600, **shape)
        test_x, test_y = test_x[:args.num], test_y[:args.num]
        short = settings_of(args.smoke, 5 if args.smoke else 40)
        tuned, values = tune(params, x[:args.tuning_images], y[:args.tuning_images], short,
                             args.steps)
        start = gse_jax.GSEHyperparams(**START)
        before = measure(params, test_x, test_y, start, args.smoke)
        after = measure(params, test_x, test_y, tuned, args.smoke, budget=before[2])
        by_hand = gse_jax.GSEHyperparams(**BY_HAND)
        control = measure(params, test_x, test_y, by_hand, args.smoke, budget=before[2])
        both = before[1] & after[1]
        for label, hyperparams, (patches, found, spent, max_steps) in (
                ("start", start, before), ("tuned", tuned, after), ("by hand", by_hand, control)):
            attacked = np.asarray(patch_network.apply_fn(params, test_x)).argmax(-1) == test_y
            rows.append({"model": name, "accuracy": float(attacked.mean()),
                         "hyperparams": label, "mu": float(hyperparams.mu),
                         "step_size": float(hyperparams.step_size),
                         "asr": float(found[attacked].mean()) if attacked.any() else None,
                         "d20_of_images_found_by_both": float(patches[both].mean())
                         if both.any() else None,
                         "images_found_by_both": int(both.sum()),
                         "d20_of_its_own": float(patches[found].mean()) if found.any() else None,
                         "gradients_per_image": spent, "iterations_per_run": max_steps,
                         "objective": [values[0], values[-1]]})
            results_file.show(rows[-1])
    results_file.write("hypergradient_tuning", args, rows)


if __name__ == "__main__":
    main()
