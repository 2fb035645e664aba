"""GSE on real CIFAR-10 images and the network of the paper, against the published code's metrics.

Float32 rounding sends single images down other search paths, so means are compared, one-sided;
exactness is the business of test_golden.py.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import gse_jax
from gse_jax import metrics, models

TOLERANCE = {"ACP": 0.06, "d20": 0.04, "l2": 0.05, "ANC": 0.10}


def _mean(values):
    return float(np.asarray(values).mean())


@pytest.fixture(scope="module")
def network(shared):
    folder = shared / "data" / "cifar10"
    apply_fn, params = models.load("resnet20", weights=folder / "resnet20_gse_authors.safetensors",
                                   normalize=(0.0, 1.0))
    data = np.load(folder / "test_0000_0399.npz")
    return params, apply_fn, data["x"][:64].astype("f4") / np.float32(127.5) - 1, data["y"][:64]


@pytest.mark.parametrize("count, targeted, limit", [
    (16, False, 180),
    pytest.param(64, False, 180, marks=pytest.mark.slow),
    pytest.param(64, True, 360, marks=pytest.mark.slow),
])
def test_means_of_the_published_code(network, count, targeted, limit):
    params, apply_fn, x, y = network
    golden = np.load(Path(__file__).parents[1] / "golden" / "cifar10_resnet20.npz")
    golden = {k[2:]: golden[k] for k in golden.files if k.startswith("t_" if targeted else "u_")}
    rows = golden["index"] < count
    index = golden["index"][rows]
    x, y = x[index], y[index]
    np.testing.assert_array_equal(y, golden["label"][rows])
    targets = (y + 1) % 10 if targeted else None
    result = gse_jax.attack(params, apply_fn, x, y, targets=targets, bounds=(-1.0, 1.0))
    predicted = np.asarray(apply_fn(params, result.adversarials).argmax(-1))
    assert (predicted == targets if targeted else predicted != y).all()
    means = {
        "ACP": _mean(metrics.changed_pixels(x, result.adversarials)),
        "ANC": _mean(metrics.num_clusters(x, result.adversarials)),
        "l2": _mean(metrics.l2_norm(x, result.adversarials, bounds=(-1.0, 1.0))),
        "d20": _mean(metrics.patch_count(x, result.adversarials)),
    }
    for name, mean in means.items():
        assert mean <= golden[name][rows].mean() * (1 + TOLERANCE[name]), name
    assert np.mean(result.gradient_evals) <= limit


@pytest.mark.slow
def test_bounds_0_1_and_lanes_give_the_same_metrics(network):
    params, apply_fn, x, y = network
    correct = np.flatnonzero(np.asarray(apply_fn(params, x).argmax(-1)) == y)[:12]
    x, y = jnp.asarray(x[correct]), y[correct]

    def unit(params, images):
        return apply_fn(params, images * 2.0 - 1.0)

    reference = gse_jax.attack(params, apply_fn, x, y, bounds=(-1.0, 1.0), lanes=12)
    for result, low, high in (
        (gse_jax.attack(params, apply_fn, x, y, bounds=(-1.0, 1.0), lanes=4), -1.0, 1.0),
        (gse_jax.attack(params, unit, x * 0.5 + 0.5, y), 0.0, 1.0),
    ):
        np.testing.assert_array_equal(result.success, reference.success)
        scale = 2.0 / (high - low)
        clean = x if low == -1.0 else x * 0.5 + 0.5
        norm = metrics.l2_norm(clean, result.adversarials) * scale
        np.testing.assert_allclose(norm.mean(), metrics.l2_norm(x, reference.adversarials).mean(),
                                   rtol=0.02)
        np.testing.assert_allclose(metrics.patch_count(clean, result.adversarials).mean(),
                                   metrics.patch_count(x, reference.adversarials).mean(), rtol=0.02)
