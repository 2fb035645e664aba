"""One table drives every attack of the registry through the engine's contract."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gse_jax
from gse_jax.attacks import METHODS
from gse_jax.attacks.algorithm import Evaluation, Sample
from tests.toy_model import toy


class Row(NamedTuple):
    """One attack of the contract.

    Attributes:
        settings: short settings, so that the table runs quickly.
        targeted: whether the method is defined for targets.
    """

    settings: Any
    targeted: bool


TABLE = {
    "gse": Row(gse_jax.GSESettings(num_runs=4, max_steps=20, phase1_steps=8), targeted=True),
}
DTYPES = [jnp.float32, jnp.float64]


def test_table_covers_the_registry():
    assert TABLE.keys() == METHODS.keys()


@pytest.mark.parametrize("method", TABLE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(20, 20, 3), (8, 11, 1)])
def test_step_keeps_structure_shapes_and_dtypes(method, dtype, shape):
    _, hyperparams = gse_jax.preset(method, "cifar10", targeted=False)
    algorithm = METHODS[method].bind(TABLE[method].settings, hyperparams, targeted=False,
                                     bounds=(0.0, 1.0), key=jax.random.key(0))
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    image = jax.ShapeDtypeStruct(shape, dtype)
    state = jax.eval_shape(algorithm.init, Sample(image, scalar, scalar, scalar))
    evaluation = Evaluation(jax.ShapeDtypeStruct((5,), dtype), jax.ShapeDtypeStruct((), dtype),
                            image)
    stepped = jax.eval_shape(algorithm.step, state, evaluation)
    describe = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype, a.weak_type), tree)
    assert describe(stepped) == describe(state)
    assert jax.eval_shape(algorithm.query, state).shape == shape
    outcome = jax.eval_shape(algorithm.finish, state)
    assert outcome.adversarials.shape == shape and outcome.adversarials.dtype == dtype


@pytest.mark.parametrize("method", TABLE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("targeted", [False, True])
def test_result_is_true(method, dtype, targeted):
    """Flags, bounds, dtypes and counts say what a fresh look at the images says."""
    if targeted and not TABLE[method].targeted:
        pytest.skip("not defined for targets")
    params, apply_fn, x, y = toy(dtype)
    y = y.at[1].set((y[1] + 1) % 5)  # one image is misclassified from the start
    targets = (y + 2) % 5 if targeted else None
    result = gse_jax.attack(params, apply_fn, x, y, targets=targets, method=method,
                            settings=TABLE[method].settings, bounds=(-1.0, 1.0), key=1)
    predicted = apply_fn(params, result.adversarials).argmax(-1).astype(jnp.int32)
    fooled = predicted == targets if targeted else predicted != y
    np.testing.assert_array_equal(result.success, fooled)
    if not targeted:
        assert int(result.status[1]) == gse_jax.Status.ALREADY_MISCLASSIFIED
    assert result.adversarials.dtype == dtype and result.tradeoff.dtype == dtype
    assert float(jnp.abs(result.adversarials).max()) <= 1.0
    unchanged = ~np.asarray(result.success) | (
        np.asarray(result.status) == gse_jax.Status.ALREADY_MISCLASSIFIED)
    np.testing.assert_array_equal(result.adversarials[unchanged], x[unchanged])
    assert (np.asarray(result.gradient_evals) >= 0).all()
    assert (np.asarray(result.forward_evals) >= np.asarray(result.gradient_evals)).all()
    assert result.method == method and result.preset == "custom"


@pytest.mark.parametrize("method", TABLE)
@pytest.mark.parametrize("count", [0, 1, 5])
def test_any_number_of_images(method, count):
    params, apply_fn, x, y = toy()
    result = gse_jax.attack(params, apply_fn, x[:count], y[:count], method=method,
                            settings=TABLE[method].settings, bounds=(-1.0, 1.0))
    assert result.adversarials.shape == (count, 20, 20, 3)
    assert all(a.shape[0] == count for a in jax.tree.leaves(result))


@pytest.mark.parametrize("method", TABLE)
def test_default_preset_follows_size_and_direction(method):
    def constant(params, x):
        return jnp.zeros((x.shape[0], 3), x.dtype) + params

    y = jnp.ones(1, jnp.int32)
    for side, domain in ((64, "cifar10"), (65, "imagenet")):
        x = jnp.full((1, side, side, 1), 0.5, jnp.float32)
        for targets, word in ((None, "untargeted"), (y + 1, "targeted")):
            result = gse_jax.attack(jnp.float32(0.0), constant, x, y, targets=targets,
                                    method=method)
            assert result.preset == f"{domain} {word}"
