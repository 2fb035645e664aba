"""The convolution rewrite: equal values and derivatives for every kind of convolution."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from gse_jax.attacks import convolutions
from gse_jax.attacks.convolutions import canonical_convolutions

NHWC = ("NHWC", "HWIO", "NHWC")
NCHW = ("NCHW", "OIHW", "NCHW")
VARIANTS = {
    "same": dict(padding="SAME"),
    "valid": dict(padding="VALID"),
    "stride 2": dict(window_strides=(2, 2), padding=((1, 1), (1, 1))),
    "stride 3 by 2": dict(window_strides=(3, 2), padding=((0, 2), (1, 0))),
    "stride leaves a rest": dict(window_strides=(4, 4), padding="VALID"),
    "dilated": dict(padding="SAME", rhs_dilation=(2, 2)),
    "dilated stride 2": dict(window_strides=(2, 2), padding="SAME", rhs_dilation=(2, 1)),
    "transposed": dict(padding=((2, 1), (1, 2)), lhs_dilation=(2, 2)),
    "negative padding": dict(padding=((-1, 2), (0, -1))),
    "grouped": dict(padding="SAME", feature_group_count=2),
    "grouped stride 2": dict(window_strides=(2, 2), padding="SAME", feature_group_count=2),
    "depthwise": dict(padding="SAME", feature_group_count=4),
    "depthwise stride 2": dict(window_strides=(2, 2), padding="SAME", feature_group_count=4),
    "depthwise dilated": dict(padding="SAME", feature_group_count=4, rhs_dilation=(1, 2)),
    "depthwise transposed": dict(padding=((2, 1), (1, 2)), lhs_dilation=(2, 2),
                                 feature_group_count=4),
    "depthwise negative padding": dict(padding=((-1, 2), (0, -1)), feature_group_count=4),
    "pixel stride 2": dict(window_strides=(2, 2), padding="SAME"),
    "pixel, padding and strides": dict(window_strides=(3, 2), padding=((-1, 2), (1, 0))),
    "pixel transposed": dict(padding=((2, 1), (0, 2)), lhs_dilation=(2, 3)),
    "pixel, both": dict(window_strides=(1, 2), padding=((0, 0), (0, 0)), lhs_dilation=(2, 1)),
}


# Derivatives of second order, and of batches of batches, in the quick set; the others are slow.
FURTHER = ("same", "stride 2", "transposed", "grouped", "depthwise stride 2", "pixel, both")
NCHW_TOO = ("pixel, padding and strides", "stride 2", "transposed", "grouped", "depthwise stride 2")


@pytest.fixture(autouse=True)
def small_kernels_too(monkeypatch):
    """Those of the tests are smaller than what is worth it."""
    monkeypatch.setattr(convolutions, "_SMALLEST", 0)


def operands(groups=1, layout=NHWC, side=3):
    """Two images of 4 features and a kernel to 8."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 7, 9, 4)).astype(np.float32)
    k = rng.normal(size=(side, side, 4 // groups, 8)).astype(np.float32)
    if layout == NCHW:
        x, k = x.transpose(0, 3, 1, 2), k.transpose(3, 2, 0, 1)
    return jnp.asarray(x), jnp.asarray(k)


def convolution(layout=NHWC, **options):
    options = {"window_strides": (1, 1), "padding": "SAME"} | options
    return lambda x, k: lax.conv_general_dilated(x, k, dimension_numbers=layout, **options)


def assert_close(actual, expected):
    described = [jax.tree.map(lambda a: (a.shape, a.dtype), tree) for tree in (actual, expected)]
    assert described[0] == described[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * abs(b).max()),
                 actual, expected)


def assert_canonical(fn, *args):
    """Whatever convolutions are in the compiled program have the form that is fast in loops."""
    text = jax.jit(fn).lower(*args).as_text()
    found = re.findall(r"stablehlo\.convolution.*", text)
    for line in found:
        assert re.search(r"dim_numbers = \[b, ([0-2, ]+), f\]x\[\1, i, o\]->\[b, \1, f\]", line)
        assert "feature_group_count = 1" in line and "batch_group_count = 1" in line
        assert not re.search(r"lhs_dilate = \[(?!1(, 1)*\])", line) and "pad = [[-" not in line
    return len(found)


def derivatives(fn, transform, further=True):
    """A function of (x, k) -> values, first and second derivatives, of transformed gradients."""
    def loss(x, k):
        return jnp.sum(jnp.sin(fn(x, k)))

    gradient = transform(jax.value_and_grad(loss))

    def slope(x, k):
        return jnp.sum(gradient(x, k)[1] * jnp.cos(x))

    if not further:
        return gradient
    return lambda x, k: {
        "gradient": gradient(x, k),
        "again, reverse": jax.grad(slope, (0, 1))(x, k),
        "again, forward": jax.jvp(gradient, (x, k), (jnp.cos(x), jnp.cos(k))),
        "mapped over images": jax.vmap(gradient, (0, None))(x[:, None], k),
        "mapped over kernels": jax.vmap(gradient, (None, 0))(x, jnp.stack([k, 2.0 * k])),
    }


@pytest.mark.parametrize("name, layout, further", [(name, NHWC, name in FURTHER) for name in VARIANTS] +
                         [pytest.param(name, NHWC, True, marks=pytest.mark.slow)
                          for name in VARIANTS if name not in FURTHER] +
                         [pytest.param(name, NCHW, True, marks=pytest.mark.slow if i else [])
                          for i, name in enumerate(NCHW_TOO)])
def test_values_and_derivatives_are_unchanged(name, layout, further):
    options = VARIANTS[name]
    args = operands(options.get("feature_group_count", 1), layout, 1 if "pixel" in name else 3)
    fn = convolution(layout, **options)
    rewritten = derivatives(fn, canonical_convolutions, further)
    assert_close(jax.jit(rewritten)(*args), jax.jit(derivatives(fn, lambda f: f, further))(*args))
    assert_canonical(rewritten, *args)


def test_gradients_by_the_kernel():
    """Those of grouped convolutions pass through as they are."""
    for groups in (1, 2, 4):
        fn = convolution(feature_group_count=groups)
        gradient = jax.grad(lambda x, k: jnp.sum(jnp.sin(fn(x, k))), (0, 1))
        args = operands(groups)
        assert_close(canonical_convolutions(gradient)(*args), gradient(*args))
    assert assert_canonical(canonical_convolutions(jax.grad(
        lambda x, k: jnp.sum(jnp.sin(convolution()(x, k))), (0, 1))), *operands()) == 3


def nested(x, k):
    """Convolutions in every construct that is entered."""
    conv = convolution()

    @jax.custom_vjp
    def halved(x, k):
        return 0.5 * conv(x, k)

    halved.defvjp(lambda x, k: (halved(x, k), (x, k)),
                  lambda args, c: jax.vjp(lambda *a: 0.5 * conv(*a), *args)[1](c))
    x = jax.jit(conv)(x, k)[..., :4]
    x = jax.checkpoint(conv)(jax.nn.relu(x), k)[..., 4:]
    x = halved(x, k)[..., :4]
    x = lax.cond(x[0, 0, 0, 0] > 0, lambda x: conv(x, k)[..., :4], lambda x: x, x)
    return lax.scan(lambda x, s: (jnp.tanh(conv(x, s * k)[..., :4]), jnp.sum(x)), x,
                    jnp.asarray([0.1, 0.2], x.dtype))


def test_calls_loops_and_branches_are_entered():
    def loss(x, k):
        x, sums = nested(x, k)
        return jnp.sum(jnp.sin(x)) + jnp.sum(sums)

    def both(transform):
        gradient = transform(jax.value_and_grad(loss))
        return lambda x, k: (gradient(x, k), jax.grad(lambda k: jnp.sum(
            gradient(x, k)[1] * jnp.cos(x)))(k))

    args = operands()
    assert_close(jax.jit(both(canonical_convolutions))(*args), jax.jit(both(lambda f: f))(*args))
    assert assert_canonical(both(canonical_convolutions), *args) > 15


def test_a_while_loop_in_the_model_is_entered():
    x, k = operands()
    conv = lax.conv_general_dilated
    fn = lambda x: lax.fori_loop(0, 2, lambda _, x: jnp.tanh(conv(
        x, k, (1, 1), "SAME", lhs_dilation=(1, 1), dimension_numbers=NHWC)[..., :4]), x)
    loop = lambda x: lax.while_loop(lambda c: jnp.sum(convolution(NCHW)(
        jnp.moveaxis(c[0], 3, 1), jnp.transpose(k, (3, 2, 0, 1)))) + 1e3 * c[1] < 2e3,
        lambda c: (fn(c[0]), c[1] + 1.0), (x, jnp.float32(0.0)))
    assert_close(canonical_convolutions(loop)(x), loop(x))
    assert assert_canonical(canonical_convolutions(loop), x) >= 2


def test_a_custom_derivative_stays_the_derivative():
    conv = convolution()

    @jax.custom_jvp
    def scaled(x, k):
        return 2.0 * conv(x, k)

    @scaled.defjvp  # three times the true one, and it calls the function itself
    def _(primals, tangents):
        (x, k), (dx, dk) = primals, tangents
        return scaled(x, k), 3.0 * (scaled(dx, k) + scaled(x, dk))

    def outer(transform):
        def loss(x, k):
            return jnp.sum(jnp.sin(transform(lambda x, k: jnp.sum(jax.nn.relu(scaled(x, k)), 3))(
                x, k)))
        return jax.grad(loss, (0, 1))

    args = operands()
    args = args[0].at[0].set(0.0), args[1]  # relu's derivative at 0 is 0 by its own rule
    assert_close(outer(canonical_convolutions)(*args), outer(lambda f: f)(*args))


def test_the_smallest_kernels_are_left_alone(monkeypatch):
    x, k = operands()
    fn = convolution(NCHW)
    x, k = x.transpose(0, 3, 1, 2), k.transpose(3, 2, 0, 1)
    for smallest, left in ((k.size, True), (k.size - 1, False)):
        monkeypatch.setattr(convolutions, "_SMALLEST", smallest)
        traced = jax.make_jaxpr(canonical_convolutions(fn))(x, k)
        assert ("canonical_convolution" not in str(traced)) == left


OTHER_RANKS = [{}, dict(window_strides=2), dict(padding=(2, 1), lhs_dilation=2), dict(feature_group_count=2),
               dict(feature_group_count=4), dict(rhs_dilation=2), dict(padding=(-1, 2))]


@pytest.mark.parametrize("rank, options, further", [(1, o, True) for o in OTHER_RANKS] + [
    pytest.param(3, o, f, marks=pytest.mark.slow if f else []) for o in OTHER_RANKS for f in (False, True)], ids=str)
def test_convolutions_of_one_and_of_three_dimensions(rank, options, further):
    groups = options.get("feature_group_count", 1)
    shapes = {1: [(2, 7, 4), (3, 4 // groups, 8)], 3: [(2, 7, 6, 5, 4), (3, 2, 3, 4 // groups, 8)]}[rank]
    args = [jax.random.normal(jax.random.key(i), shape, jnp.float32) for i, shape in enumerate(shapes)]
    options = {name: value if name == "feature_group_count" else (value,) * rank for name, value in options.items()}
    layout = [("N" + "DHW"[-rank:] + "C"), "DHW"[-rank:] + "IO", "N" + "DHW"[-rank:] + "C"]
    fn = convolution(layout, **{"window_strides": (1,) * rank} | options)
    rewritten = derivatives(fn, canonical_convolutions, further)
    assert_close(jax.jit(rewritten)(*args), jax.jit(derivatives(fn, lambda f: f, further))(*args))
    assert_canonical(rewritten, *args)


def test_three_dimensions_with_features_first():
    layout = ("NCDHW", "OIDHW", "NCDHW")
    fn = convolution(layout, window_strides=(1, 2, 2))
    shapes = (2, 4, 5, 6, 7), (8, 4, 3, 3, 1)
    args = [jax.random.normal(jax.random.key(i), s, jnp.float32) for i, s in enumerate(shapes)]
    rewritten = derivatives(fn, canonical_convolutions, False)
    assert_close(rewritten(*args), derivatives(fn, lambda f: f, False)(*args))
    assert assert_canonical(rewritten, *args) == 2


@pytest.mark.parametrize("groups", [1, 4])
def test_an_empty_result_stays_one(groups):
    x, k = operands(groups)
    fn = convolution(padding="VALID", feature_group_count=groups)
    assert canonical_convolutions(fn)(x[:, :2], k).shape == fn(x[:, :2], k).shape == (2, 0, 7, 8)


def test_models_without_convolutions_are_left_alone():
    def fn(x):
        return jnp.tanh(x) @ x

    x = jnp.eye(3)
    assert str(jax.make_jaxpr(canonical_convolutions(fn))(x)) == str(jax.make_jaxpr(fn)(x))


def test_half_floats_keep_their_dtype():
    for groups in (1, 4):
        x, k = (a.astype(jnp.bfloat16) for a in operands(groups))
        fn = convolution(feature_group_count=groups)
        actual, expected = canonical_convolutions(fn)(x, k), fn(x, k)
        assert actual.dtype == expected.dtype
        np.testing.assert_allclose(actual.astype(np.float32), expected.astype(np.float32),
                                   rtol=0.02, atol=0.1)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sums_over_a_depthwise_kernel_are_rounded_once(dtype):
    random = np.random.default_rng(0)
    x, k = (jnp.asarray(random.uniform(size=shape), dtype) for shape in ((1, 9, 9, 2), (7, 7, 1, 2)))
    fn = convolution(feature_group_count=2)
    exact = fn(x.astype(jnp.float32), k.astype(jnp.float32))
    np.testing.assert_array_equal(jax.jit(canonical_convolutions(fn))(x, k), exact.astype(dtype))
    for groups in (1, 2):  # in more digits where the model asks for them
        more = convolution(feature_group_count=groups, preferred_element_type=jnp.float32)
        kernel = k if groups == 2 else jnp.concatenate([k, k], 2)
        assert_close(jax.jit(canonical_convolutions(more))(x, kernel), jax.jit(more)(x, kernel))


def test_works_inside_a_loop_with_traced_parameters():
    x, k = operands()

    def step(x, k, transform):
        grad = transform(jax.grad(lambda x: jnp.sum(jnp.tanh(convolution(
            window_strides=(2, 2))(x, k)))))
        return x - 0.1 * grad(x)

    def run(transform):
        return jax.jit(lambda x, k: lax.fori_loop(0, 5, lambda _, x: step(x, k, transform), x))

    assert_close(run(canonical_convolutions)(x, k), run(lambda f: f)(x, k))


def test_a_gradient_rule_of_its_own_is_kept():
    """A straight-through convolution: the derivative by its definition is zero."""
    conv = convolution()

    @jax.custom_vjp
    def quantised(x, k, levels):
        return conv(x, jnp.round(levels * k) / levels)

    def backward(args, cotangent):
        return *jax.vjp(conv, *args)[1](cotangent), None

    quantised.defvjp(lambda x, k, levels: (quantised(x, k, levels), (x, k)), backward)
    x, k = operands()
    scale = jnp.float32(1.5)  # what a rule closes over takes no part in it
    closing = jax.custom_vjp(lambda x, k: conv(x, k) * scale)
    closing.defvjp(lambda x, k: (closing(x, k), (x, k)), lambda args, c: jax.vjp(conv, *args)[1](c))
    assert_close(*(jax.jit(jax.grad(lambda k: jnp.sum(f(closing)(x, k) ** 2)))(k) for f in (canonical_convolutions, jax.jit)))

    def gradient(transform):
        fn = transform(quantised)
        return jax.jit(jax.value_and_grad(lambda x, k: jnp.sum(fn(x, k, 4) ** 2), (0, 1)))(x, k)

    expected = gradient(lambda f: f)
    assert abs(expected[1][1]).max() > 0
    assert_close(gradient(canonical_convolutions), expected)
    assert assert_canonical(canonical_convolutions(lambda x, k: quantised(x, k, 4)), x, k) == 1
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda k: canonical_convolutions(quantised)(x, k, 4), (k,), (k,))


@pytest.mark.parametrize("kernel, groups", [((31, 31, 1, 3), 3), ((3, 3, 32, 200), 100)],
                         ids=["large depthwise kernel", "many groups"])
def test_programs_do_not_grow_with_taps_and_groups(kernel, groups):
    fn = convolution(feature_group_count=groups)
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 32, 32, kernel[2] * groups), kernel)]
    assert len(jax.make_jaxpr(canonical_convolutions(fn))(*shapes).eqns) < 30
    args = [jax.random.normal(jax.random.key(i), s.shape, s.dtype) for i, s in enumerate(shapes)]
    assert_close(jax.jit(canonical_convolutions(fn))(*args), fn(*args))
