"""GSE against the published code, stage by stage, float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gse_jax
from gse_jax import ops
from gse_jax.attacks.gse.nesterov import Iterate, iterate
from tests.toy_model import CASES, golden, toy


def clean_gradient(case, targeted):
    params, apply_fn, x, y = toy()
    labels = jnp.asarray(golden()[f"{case}/labels"], jnp.int32)

    def loss(image, label):
        return ops.margin_loss(apply_fn(params, image[None])[0], label, targeted=targeted)

    return jax.jit(jax.vmap(jax.grad(loss)))(x, labels)


@pytest.mark.parametrize("case, domain, targeted", CASES)
def test_initial_tradeoff(case, domain, targeted):
    _, hyperparams = gse_jax.preset("gse", domain, targeted)
    edge = jax.vmap(lambda g: ops.largest_active_tradeoff(g, hyperparams.step_size))(
        clean_gradient(case, targeted))
    np.testing.assert_allclose(hyperparams.initial_fraction * edge, golden()[f"{case}/lam0"],
                               rtol=1e-6)


@pytest.mark.parametrize("case, domain, targeted", CASES)
@pytest.mark.parametrize("image", [0, 1, 2])
def test_every_stage_of_the_traces(case, domain, targeted, image):
    """Prox, average and trade-off of each recorded iteration, from the recorded inputs."""
    trace = {k.split("/")[-1]: v for k, v in golden().items() if k.startswith(f"{case}/run{image}/")}
    settings, hyperparams = gse_jax.preset("gse", domain, targeted)
    step_size = 10.0 * hyperparams.step_size  # the traces are of boosted runs
    start = jnp.asarray(np.float64(trace["tradeoff_start"]))
    x = jnp.asarray(golden()["images"][image])
    steps = len(trace["prox_in"])
    assert steps >= 1
    tradeoff, momentum = jnp.full(x.shape[:2], start), 1.0
    w = previous = jnp.zeros_like(x)
    for k in range(steps):
        np.testing.assert_allclose(
            ops.half_quasinorm_prox(jnp.asarray(trace["prox_in"][k]),
                                    (tradeoff * step_size)[..., None]),
            trace["prox_out"][k], atol=1e-8)
        # The gradient that leads from w to the recorded prox input.
        gradient = (w - trace["prox_in"][k]) / step_size - 2.0 * hyperparams.mu * w
        now = Iterate(w, previous, tradeoff, jnp.asarray(momentum), jnp.asarray(k, jnp.int32))
        unclipped = iterate(now, gradient, -jnp.inf, jnp.inf, start=start, step_size=step_size,
                            settings=settings, hyperparams=hyperparams)
        np.testing.assert_allclose(unclipped.w, trace["w_after_average"][k], atol=1e-8)
        np.testing.assert_allclose(unclipped.tradeoff, trace["tradeoff_after"][k], rtol=1e-8)
        clipped = iterate(now, gradient, -1 - x, 1 - x, start=start, step_size=step_size,
                          settings=settings, hyperparams=hyperparams)
        np.testing.assert_array_equal(clipped.w, jnp.clip(unclipped.w, -1 - x, 1 - x))
        w, previous = clipped.w, clipped.previous
        tradeoff, momentum = clipped.tradeoff, float(clipped.momentum)


@pytest.mark.parametrize("case, domain, targeted", [
    pytest.param(*case, marks=pytest.mark.slow) if "imagenet" in case[0] else case for case in CASES])
def test_full_attack(case, domain, targeted):
    params, apply_fn, x, y = toy()
    settings, hyperparams = gse_jax.preset("gse", domain, targeted)
    targets = jnp.asarray(golden()[f"{case}/labels"]) if targeted else None
    result = gse_jax.attack(params, apply_fn, x, y, targets=targets, settings=settings,
                            hyperparams=hyperparams, bounds=(-1.0, 1.0))
    np.testing.assert_array_equal(result.success, golden()[f"{case}/success"])
    np.testing.assert_allclose(result.adversarials, golden()[f"{case}/adv"], atol=1e-6)
    if case == "targeted_infeasible":
        np.testing.assert_array_equal(result.status, gse_jax.Status.NOT_FOUND)
        np.testing.assert_array_equal(result.adversarials, x)
        np.testing.assert_array_equal(result.tradeoff, 0.0)


@pytest.mark.slow  # the full attacks and the stages above are quick
def test_one_run_reproduces_the_recorded_adversarial():
    """The traces' runs as a whole: a search of one run, started at the recorded trade-off."""
    params, apply_fn, x, y = toy()
    for case, domain, targeted in CASES:
        if case == "targeted_infeasible":
            continue
        settings, hyperparams = gse_jax.preset("gse", domain, targeted)
        one_run = type(settings)(num_runs=1, phase1_steps=settings.phase1_steps)
        labels = golden()[f"{case}/labels"]
        edge = jax.vmap(lambda g: ops.largest_active_tradeoff(g, hyperparams.step_size))(
            clean_gradient(case, targeted))
        for image in range(3):
            start = np.float64(golden()[f"{case}/run{image}/tradeoff_start"])
            result = gse_jax.attack(
                params, apply_fn, x[image:image + 1], y[image:image + 1],
                targets=labels[image:image + 1] if targeted else None, settings=one_run,
                hyperparams=hyperparams._replace(initial_fraction=start / edge[image]),
                bounds=(-1.0, 1.0))
            assert bool(result.success[0])
            np.testing.assert_allclose(result.adversarials[0],
                                       golden()[f"{case}/run{image}/adv"], atol=1e-6)
