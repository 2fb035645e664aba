"""Keep convolutions fast inside compiled loops on CPU.

XLA:CPU brings a convolution into its fast canonical form (NHWC images, HWIO kernel, no input
dilation) only in the entry computation of a program, not in the body of a loop. The gradient by
the input, which has a reversed kernel with swapped feature axes and, for strides, a dilated input,
was measured up to 36 times slower there, 19 times for 3 x 3 (`benchmarks/loop_cost.py`).
`canonical_convolutions` writes that form down explicitly: the function is traced, and every
convolution is evaluated as transpose, canonical convolution, transpose, without the pixels that a
stride skips under a kernel of one pixel and without the zeros of an input dilation. Values change by rounding only. The smallest kernels (three features to three, 3 x 3) are
left as they are: for them XLA's slow form is the faster one.

The rewritten convolution is a primitive of its own, so that it stays canonical when the result is
differentiated or mapped: its transposes and its batched form are those of JAX's convolution,
rewritten again.

GPU and TPU do not have the problem; `attacks` applies this on CPU alone.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core
from jax.interpreters import ad, batching, mlir

# Groups are merged until a convolution has this many input features: XLA multiplies the zeros of a
# kernel of 32 x 32 features faster than it loops over narrow groups.
_WIDTH = 32

# A kernel of at most so many numbers is left as it is: up to 3 x 3 x 3 x 3 the loop over its numbers took
# 0.5 to 0.9 of the time of the canonical form, with 4 x 4 x 4 x 4 and 3 x 3 x 3 x 8 1.4 and 1.6 times as long.
_SMALLEST = 81

# More taps of a depthwise kernel than this would be a program of thousands of operations: those kernels are
# merged too. More blocks of groups become a loop, a tenth slower, where each took 0.1 s to compile.
_MOST_TAPS, _MOST_UNROLLED = 128, 8

# Calls whose body is evaluated in place, and the parameter that holds the body.
_INLINED = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
}
# Functions with a derivative rule of their own, which they keep.
_CUSTOM = ("custom_jvp_call", "custom_vjp_call")
# The model's own loops and branches, whose bodies are replaced.
_BODIES = {"scan": ("jaxpr",), "while": ("cond_jaxpr", "body_jaxpr"), "cond": ("branches",)}


def canonical_convolutions(fn):
    """Return `fn` with its convolutions of one to three dimensions in canonical form.

    Args:
        fn: a function of arrays (pytrees allowed) to arrays.

    Returns:
        A function with the same arguments, results, shapes, dtypes and derivatives. Models without
        convolutions pass through unchanged.
    """

    def rewritten(*args):
        closed, out_shape = jax.make_jaxpr(fn, return_shape=True)(*args)
        if not _contains_convolution(closed.jaxpr):
            return fn(*args)
        out = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(out_shape), out)

    return rewritten


def _contains_convolution(jaxpr):
    return any(_is_convolution(eqn) or any(map(_contains_convolution, _bodies(eqn)))
               for eqn in jaxpr.eqns)


def _is_convolution(eqn):
    if eqn.primitive is not _plain or not 3 <= eqn.invars[0].aval.ndim <= 5 or not eqn.outvars[0].aval.size:
        return False
    grouped = eqn.params["feature_group_count"] > 1 or eqn.params["batch_group_count"] > 1
    return grouped or eqn.invars[1].aval.size > _SMALLEST


def _bodies(eqn):
    """The jaxprs of a call, loop or branch that is entered; none for other equations."""
    name = eqn.primitive.name
    names = _BODIES.get(name) or (["call_jaxpr"] if name in _CUSTOM else
                                  [_INLINED[name]] if name in _INLINED else [])
    found = [eqn.params[n] for n in names if n in eqn.params]
    found = [body for value in found for body in (value if isinstance(value, tuple) else [value])]
    return [getattr(body, "jaxpr", body) for body in found]


def _evaluate(jaxpr, consts, args):
    values = dict(zip(jaxpr.constvars, consts))
    values.update(zip(jaxpr.invars, args))

    def read(atom):
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for eqn in jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        if _is_convolution(eqn):
            outputs = [_convolution(*inputs, eqn.params)]
        elif any(map(_contains_convolution, _bodies(eqn))):
            outputs = _entered(eqn, inputs)
        else:
            outputs = _bind(eqn, inputs)
        values.update(zip(eqn.outvars, outputs))
    return [read(atom) for atom in jaxpr.outvars]


def _entered(eqn, inputs):
    """The outputs of an equation that has convolutions in its bodies."""
    name = eqn.primitive.name
    if name in _INLINED:
        body = eqn.params[_INLINED[name]]
        return _evaluate(getattr(body, "jaxpr", body), getattr(body, "consts", ()), inputs)
    if name == "custom_jvp_call":
        return _with_own_derivative(eqn)(*inputs)
    if name == "custom_vjp_call":
        return _with_own_pullback(eqn)(*inputs)
    replaced = {n: jax.tree.map(_replaced, eqn.params[n], is_leaf=_is_closed)
                for n in _BODIES[name]}
    return eqn.primitive.bind(*inputs, **eqn.params | replaced)


def _is_closed(value):
    return isinstance(value, core.ClosedJaxpr)


def _replaced(closed):
    """A loop's body with its convolutions rewritten."""
    def body(*args):
        return _evaluate(closed.jaxpr, closed.consts, args)

    return jax.make_jaxpr(body)(*(v.aval for v in closed.jaxpr.invars))


def _with_own_derivative(eqn):
    """A `custom_jvp` function with its value and its derivative rule rewritten."""
    def original(*args):
        return _bind(eqn, args)

    body = eqn.params["call_jaxpr"]
    function = jax.custom_jvp(lambda *args: _evaluate(body.jaxpr, body.consts, args))

    @function.defjvp
    def derivative(primals, tangents):
        return canonical_convolutions(lambda p, t: jax.jvp(original, p, t))(primals, tangents)

    return function


def _with_own_pullback(eqn):
    """A `custom_vjp` function with its value and its derivative rule rewritten."""
    body = eqn.params["call_jaxpr"]
    # What the function closes over comes first; its rule has no derivative by that.
    smooth = [i >= eqn.params["num_consts"] and jnp.issubdtype(v.aval.dtype, jnp.inexact)
              for i, v in enumerate(eqn.invars)]

    def split(args):
        return [a for a, s in zip(args, smooth) if s], [a for a, s in zip(args, smooth) if not s]

    def joined(floats, others):
        floats, others = iter(floats), iter(others)
        return [next(floats if s else others) for s in smooth]

    def forward(*args):
        def pulled(floats, others):
            return jax.vjp(lambda *floats: _bind(eqn, joined(floats, others)), *floats)

        return canonical_convolutions(pulled)(*split(args))

    def backward(pullback, cotangents):
        found = canonical_convolutions(lambda pull, c: pull(c))(pullback, cotangents)
        return tuple(joined(found, [None] * len(smooth)))

    function = jax.custom_vjp(lambda *args: _evaluate(body.jaxpr, body.consts, args))
    function.defvjp(forward, backward)
    return function


def _bind(eqn, inputs):
    params = eqn.primitive.get_bind_params(eqn.params)
    # Older JAX returns (functions, params), newer JAX one dict.
    functions, params = params if isinstance(params, tuple) else ((), params)
    outputs = eqn.primitive.bind(*functions, *inputs, **params)
    return outputs if eqn.primitive.multiple_results else [outputs]


def _convolution(lhs, rhs, params):
    """One convolution of whatever kind, rewritten."""
    if lhs.ndim == 3:
        return _convolution(lhs[..., None], rhs[..., None], _with_unit_axis(params))[..., 0]
    if params["batch_group_count"] != 1:  # only in gradients by the kernel of grouped convolutions
        return _plain.bind(lhs, rhs, **params)
    groups = params["feature_group_count"]
    numbers = params["dimension_numbers"]
    if groups == 1:
        pixel = all(rhs.shape[axis] == 1 for axis in numbers.rhs_spec[2:])
        return (_pointwise if pixel else _conv.bind)(lhs, rhs, **params)
    inputs, channels = numbers.rhs_spec[1], numbers.lhs_spec[1]
    if rhs.shape[inputs] == 1 and rhs.size // groups <= _MOST_TAPS:
        return _depthwise(lhs, rhs, params)
    merged = next(m for m in range(1, groups + 1)
                  if groups % m == 0 and (m * rhs.shape[inputs] >= _WIDTH or m == groups))
    blocks, features = groups // merged, numbers.out_spec[1]
    params = params | {"feature_group_count": 1}

    def block(_, part):
        return None, _conv.bind(part[0], _block_diagonal(part[1], merged, numbers), **params)

    def split(array, axis):
        before, size, after = array.shape[:axis], array.shape[axis], array.shape[axis + 1:]
        return jnp.moveaxis(array.reshape(*before, blocks, size // blocks, *after), axis, 0)

    # A loop over canonical convolutions is as fast as they are.
    parts = split(lhs, channels), split(rhs, numbers.rhs_spec[0])
    out = lax.scan(block, None, parts, unroll=blocks if blocks <= _MOST_UNROLLED else 1)[1]
    return lax.collapse(jnp.moveaxis(out, 0, features), features, features + 2)


def _with_unit_axis(params):
    """What a convolution of one spatial dimension is of two, the last of one pixel."""
    numbers = params["dimension_numbers"]
    ones = {name: (*params[name], 1) for name in ("window_strides", "lhs_dilation", "rhs_dilation")}
    return params | ones | {"padding": (*params["padding"], (0, 0)), "dimension_numbers": lax.ConvDimensionNumbers(
        *((*spec, 3) for spec in (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec)))}


def _pointwise(lhs, rhs, **params):
    """A kernel of one pixel: pixels that the stride skips, and zeros of the dilation, stay out."""
    numbers = params["dimension_numbers"]
    strides, dilation = params["window_strides"], params["lhs_dilation"]
    ones = (1,) * len(strides)
    plain = params | {"window_strides": ones, "lhs_dilation": ones, "padding": ((0, 0),) * len(ones)}
    if dilation == ones and strides != ones:
        steps = [1] * lhs.ndim
        for axis, stride in zip(numbers.lhs_spec[2:], strides):
            steps[axis] = stride
        lhs = _padded(lhs, params, numbers.lhs_spec)
        return _conv.bind(lax.slice(lhs, (0,) * lhs.ndim, lhs.shape, steps), rhs, **plain)
    if strides == ones and dilation != ones:
        return _padded(_conv.bind(lhs, rhs, **plain), params, numbers.out_spec)
    return _conv.bind(lhs, rhs, **params)


def _padded(images, params, spec):
    """Images with their padding and dilation; `spec` names the axes of batch, features, H and W."""
    config = [(0, 0, 0)] * images.ndim
    for axis, (low, high), dilation in zip(spec[2:], params["padding"], params["lhs_dilation"]):
        config[axis] = (low, high, dilation - 1)
    return lax.pad(images, jnp.zeros((), images.dtype), config)


def _block_diagonal(kernel, groups, numbers):
    """The kernel of one group that does the work of `groups`."""
    outputs, inputs = numbers.rhs_spec[:2]
    dense = jnp.concatenate([kernel] * groups, inputs)
    group_of = [lax.broadcasted_iota(jnp.int32, dense.shape, axis) // (dense.shape[axis] // groups)
                for axis in (outputs, inputs)]
    return jnp.where(group_of[0] == group_of[1], dense, jnp.zeros((), dense.dtype))


def _depthwise(lhs, rhs, params):
    """One input feature per group: a weighted sum of shifted images, which XLA fuses."""
    lhs, rhs = _to_canonical(lhs, rhs, params)
    lhs = _padded(lhs, params, _numbers(lhs.ndim).lhs_spec)
    dtype = params["preferred_element_type"] or lhs.dtype
    wide = jnp.float32 if jnp.dtype(dtype).itemsize < 4 else dtype  # sums of half floats
    lhs = jnp.repeat(lhs, rhs.shape[-1] // lhs.shape[-1], axis=-1).astype(wide)
    strides, dilation = params["window_strides"], params["rhs_dilation"]
    last = [(size - (k - 1) * d - 1) // s * s for size, k, d, s in zip(
        lhs.shape[1:], rhs.shape, dilation, strides)]
    total = 0.0
    for tap in np.ndindex(*rhs.shape[:-2]):
        first = [i * d for i, d in zip(tap, dilation)]
        shifted = lax.slice(lhs, (0, *first, 0),
                            (lhs.shape[0], *(f + n + 1 for f, n in zip(first, last)), lhs.shape[-1]),
                            (1, *strides, 1))
        total += shifted * rhs[tap].reshape((1,) * (lhs.ndim - 1) + (-1,)).astype(wide)
    return _from_canonical(total.astype(dtype), params)


def _canonical(lhs, rhs, **params):
    lhs, rhs = _to_canonical(lhs, rhs, params)
    numbers = _numbers(lhs.ndim)
    ones = (1,) * (lhs.ndim - 2)
    dilated = params["lhs_dilation"] != ones
    if dilated and params["window_strides"] == params["rhs_dilation"] == ones:
        return _from_canonical(lax.optimization_barrier(_by_phases(lhs, rhs, params)), params)
    # What is left of input dilation, and negative padding, become an explicit pad of the input.
    explicit = min(map(min, params["padding"])) < 0 or dilated
    if explicit:
        lhs = _padded(lhs, params, numbers.lhs_spec)
    out = lax.conv_general_dilated(
        lhs, rhs,
        window_strides=params["window_strides"],
        padding=((0, 0),) * len(ones) if explicit else params["padding"],
        rhs_dilation=params["rhs_dilation"],
        dimension_numbers=numbers,
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )
    # Without the barrier XLA computes a chain of residual additions once more for every consumer.
    return _from_canonical(lax.optimization_barrier(out), params)


def _by_phases(lhs, rhs, params):
    """Input dilation without its zeros: an image per place between two pixels, then interleaved.

    Every output sees the same taps of the kernel as those a multiple of the dilation away, and no
    others; the taps of each such phase are a kernel for the images as they are.
    """
    kernel, padding, sizes, outputs = rhs, [], [], []
    phases = params["lhs_dilation"]
    for axis, (dilation, (low, high)) in enumerate(zip(phases, params["padding"])):
        taps, size = rhs.shape[axis], lhs.shape[axis + 1]
        output = (size - 1) * dilation + 1 + low + high - taps + 1
        # Output dilation * m + phase sees pixel m + t through tap dilation * t + low - phase.
        first, last = -(low // dilation), (taps + dilation - 2 - low) // dilation
        window, count = last - first + 1, -(-output // dilation)
        before = dilation - 1 - low - dilation * first
        config = [(0, 0, 0)] * kernel.ndim
        config[2 * axis] = (before, window * dilation - taps - before, 0)
        kernel = lax.pad(kernel, jnp.zeros((), kernel.dtype), config)
        shape = kernel.shape
        kernel = kernel.reshape(*shape[:2 * axis], window, dilation, *shape[2 * axis + 1:])
        padding.append((-first, count - size + first + window - 1))
        sizes.append(count)
        outputs.append(output)
    rank = len(phases)
    windows, places = range(0, 2 * rank, 2), range(1, 2 * rank, 2)
    kernel = jnp.transpose(jnp.flip(kernel, places), (*windows, 2 * rank, *places, 2 * rank + 1))
    out = _canonical(lhs, kernel.reshape(*kernel.shape[:rank + 1], -1), **params | {
        "dimension_numbers": _numbers(lhs.ndim), "lhs_dilation": (1,) * rank, "padding": tuple(padding)})
    out = out.reshape(len(lhs), *sizes, *phases, rhs.shape[-1])
    pairs = [axis for i in range(rank) for axis in (1 + i, 1 + rank + i)]
    out = out.transpose(0, *pairs, 2 * rank + 1)
    out = out.reshape(len(lhs), *(n * d for n, d in zip(sizes, phases)), rhs.shape[-1])
    return lax.slice(out, (0,) * out.ndim, (len(lhs), *outputs, rhs.shape[-1]))


def _numbers(ndim):
    """The canonical form's axes: batch, height, width (and more), features; a kernel's inputs, then outputs."""
    spatial = tuple(range(ndim - 2))
    images = (0, ndim - 1, *(axis + 1 for axis in spatial))
    return lax.ConvDimensionNumbers(images, (ndim - 1, ndim - 2, *spatial), images)


def _to_canonical(lhs, rhs, params):
    n, c, *spatial = params["dimension_numbers"].lhs_spec
    o, i, *taps = params["dimension_numbers"].rhs_spec
    return jnp.transpose(lhs, (n, *spatial, c)), jnp.transpose(rhs, (*taps, i, o))


def _from_canonical(out, params):
    back = [0] * out.ndim
    for source, position in zip(_numbers(out.ndim).out_spec, params["dimension_numbers"].out_spec):
        back[position] = source
    return jnp.transpose(out, back)


def _transposed_by_lhs(cotangent, lhs, rhs, **params):
    return _transposed(lambda unknown: _plain.bind(unknown, rhs, **params), lhs, cotangent)


def _transposed_by_rhs(cotangent, lhs, rhs, **params):
    return _transposed(lambda unknown: _plain.bind(lhs, unknown, **params), rhs, cotangent)


def _transposed(conv, unknown, cotangent):
    like = jax.ShapeDtypeStruct(unknown.aval.shape, unknown.aval.dtype)
    return canonical_convolutions(lambda c: jax.linear_transpose(conv, like)(c)[0])(cotangent)


def _mapped(args, dims, **params):
    conv = jax.vmap(functools.partial(_plain.bind, **params), in_axes=tuple(dims))
    return canonical_convolutions(conv)(*args), 0


_plain = core.primitives.conv_general_dilated_p
_conv = core.Primitive("canonical_convolution")
_conv.def_impl(_canonical)
_conv.def_abstract_eval(lambda *avals, **params: _plain.abstract_eval(*avals, **params)[0])
ad.defbilinear(_conv, _transposed_by_lhs, _transposed_by_rhs)
batching.primitive_batchers[_conv] = _mapped
mlir.register_lowering(_conv, mlir.lower_fun(_canonical, multiple_results=False))
