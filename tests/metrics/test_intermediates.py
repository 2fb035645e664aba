"""The derivative by a returned intermediate value, wherever in the program it is made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gse_jax.metrics.intermediates import with_feature_offset

PARAMS = jnp.asarray([[1.0, -2.0], [0.5, 3.0], [2.0, 1.0]])
X = jax.random.uniform(jax.random.key(0), (4, 3), minval=-1.0)


def plain(params, x):
    features = jax.nn.relu(x @ params)
    return jnp.sum(features**2, axis=-1, keepdims=True), features


@jax.jit
def jitted(params, x):
    return plain(params, x)


def nested(params, x):
    return jax.checkpoint(lambda p, a: jitted(p, a))(params, x)


def handed_through(params, x):
    features = jax.nn.relu(x @ params)

    @jax.checkpoint
    def half(value):  # Returns its argument: the same value under a second name.
        return jnp.sum(value**2, axis=-1, keepdims=True) / 2, value

    logits, same = half(features)
    return logits + jnp.sum(features**2, axis=-1, keepdims=True) / 2, same


def used_twice(params, x):
    square = jax.jit(lambda value: value**2)
    features = square(jax.nn.relu(x @ params) ** 0.5)
    return jnp.sum(square(features), axis=-1, keepdims=True), features


def second_outputs(params, x):
    _, features = jax.lax.scan(lambda carry, row: (carry + 1, jax.nn.relu(row @ params)), 0, x)
    _, logits = jax.lax.scan(lambda carry, row: (carry + 1, jnp.sum(row**2, keepdims=True)), 0, features)
    return logits, features


@pytest.mark.parametrize("apply_fn", [plain, jitted, nested, handed_through, used_twice, second_outputs])
def test_the_offset_reaches_all_that_is_computed_from_the_features(apply_fn):
    offset_apply, shape = with_feature_offset(apply_fn, PARAMS, X)
    want = jax.nn.relu(X @ PARAMS)
    assert (shape.shape, shape.dtype) == (want.shape, want.dtype)
    offset = jax.random.normal(jax.random.key(1), shape.shape)
    logits, features = offset_apply(PARAMS, X, offset)
    np.testing.assert_allclose(features, want + offset, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(logits[:, 0], jnp.sum((want + offset) ** 2, -1), rtol=1e-5)
    gradient = jax.grad(lambda o: jnp.sum(offset_apply(PARAMS, X, o)[0]))(jnp.zeros(shape.shape))
    np.testing.assert_allclose(gradient, 2 * want, rtol=1e-5, atol=1e-6)


def test_features_that_are_a_side_branch_are_refused():
    def copied(params, x):
        features = jax.nn.relu(x @ params)
        return jnp.sum(features, axis=-1, keepdims=True), features.astype(jnp.bfloat16)

    with pytest.raises(ValueError, match="do not depend on the returned features"):
        with_feature_offset(copied, PARAMS, X)


def test_features_that_are_given_or_constant():
    """The images themselves take the offset; a number in the program cannot."""
    offset_apply, _ = with_feature_offset(lambda p, a: (a @ p, a), PARAMS, X)
    offset = jax.random.normal(jax.random.key(1), X.shape)
    logits, features = offset_apply(PARAMS, X, offset)
    np.testing.assert_allclose(features, X + offset, rtol=1e-6)
    np.testing.assert_allclose(logits, (X + offset) @ PARAMS, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="the returned features are a constant"):
        with_feature_offset(lambda p, a: (a @ p, 1.0), PARAMS, X)


def test_a_model_that_returns_something_else_is_refused():
    for apply_fn in (
        lambda p, a: a @ p,
        lambda p, a: (a @ p, {"one": a, "two": a}),
        lambda p, a: (a @ p, a, a),
    ):
        with pytest.raises(ValueError, match=r"\(logits, features\)"):
            with_feature_offset(apply_fn, PARAMS, X)
