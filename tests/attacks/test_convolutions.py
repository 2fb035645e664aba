"""The convolution rewrite: equal values and gradients for every kind of convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from gse_jax.attacks.convolutions import canonical_convolutions

NHWC = ("NHWC", "HWIO", "NHWC")
NCHW = ("NCHW", "OIHW", "NCHW")
VARIANTS = {
    "same": dict(window_strides=(1, 1), padding="SAME"),
    "valid": dict(window_strides=(1, 1), padding="VALID"),
    "stride 2": dict(window_strides=(2, 2), padding=((1, 1), (1, 1))),
    "stride 3 by 2": dict(window_strides=(3, 2), padding=((0, 2), (1, 0))),
    "dilated": dict(window_strides=(1, 1), padding="SAME", rhs_dilation=(2, 2)),
    "transposed": dict(window_strides=(1, 1), padding=((2, 1), (1, 2)), lhs_dilation=(2, 2)),
    "negative padding": dict(window_strides=(1, 1), padding=((-1, 2), (0, -1))),
}


def check(fn, *args, changes=True):
    def loss(*args):
        return jnp.sum(jnp.sin(fn(*args)))

    both = jax.value_and_grad(loss, argnums=tuple(range(len(args))))
    rewritten = canonical_convolutions(both)
    expected, actual = both(*args), rewritten(*args)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), expected) == jax.tree.map(
        lambda a: (a.shape, a.dtype), actual)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), expected,
                 actual)
    specs = {str(eqn.params["dimension_numbers"])
             for eqn in jax.make_jaxpr(rewritten)(*args).jaxpr.eqns
             if eqn.primitive.name == "conv_general_dilated"}
    if changes:
        canonical = lax.conv_dimension_numbers((1, 4, 4, 1), (3, 3, 1, 1), NHWC)
        assert specs == {str(canonical)}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("layout", [NHWC, NCHW])
def test_values_and_gradients_are_unchanged(name, layout):
    rng = np.random.default_rng(0)
    x, k = rng.normal(size=(2, 9, 11, 3)), rng.normal(size=(3, 3, 3, 4))
    if layout == NCHW:
        x, k = x.transpose(0, 3, 1, 2), k.transpose(3, 2, 0, 1)

    def conv(x, k):
        return lax.conv_general_dilated(x, k, dimension_numbers=layout, **VARIANTS[name])

    check(conv, jnp.asarray(x), jnp.asarray(k))


def test_nested_calls_are_entered():
    rng = np.random.default_rng(0)
    x, k = jnp.asarray(rng.normal(size=(2, 8, 8, 3))), jnp.asarray(rng.normal(size=(3, 3, 3, 3)))

    def conv(x, k):
        return lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=NHWC)

    @jax.custom_jvp
    def scaled(x, k):
        return 2.0 * conv(x, k)

    scaled.defjvp(lambda p, t: (scaled(*p), 2.0 * conv(t[0], p[1]) + 2.0 * conv(p[0], t[1])))
    nested = jax.jit(lambda x, k: jax.checkpoint(conv)(jax.nn.relu(scaled(x, k)), k))
    check(nested, x, k)


@pytest.mark.parametrize("groups", [3, 6])
def test_grouped_convolutions_pass_through(groups):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 8, 8, 6)))
    k = jnp.asarray(rng.normal(size=(3, 3, 6 // groups, 6)))
    check(lambda x, k: lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=NHWC,
                                                feature_group_count=groups), x, k, changes=False)


def test_models_without_convolutions_are_left_alone():
    def fn(x):
        return jnp.tanh(x) @ x

    x = jnp.eye(3)
    assert str(jax.make_jaxpr(canonical_convolutions(fn))(x)) == str(jax.make_jaxpr(fn)(x))


def test_works_inside_a_loop_with_traced_parameters():
    rng = np.random.default_rng(0)
    x, k = jnp.asarray(rng.normal(size=(2, 8, 8, 3))), jnp.asarray(rng.normal(size=(3, 3, 3, 3)))

    def step(x, k, transform):
        grad = transform(jax.grad(lambda x: jnp.sum(jnp.tanh(lax.conv_general_dilated(
            x, k, (2, 2), "SAME", dimension_numbers=NHWC)))))
        return x - 0.1 * grad(x)

    def run(transform):
        return jax.jit(lambda x, k: lax.fori_loop(0, 5, lambda _, x: step(x, k, transform), x))

    np.testing.assert_allclose(run(canonical_convolutions)(x, k), run(lambda f: f)(x, k),
                               atol=1e-12)
