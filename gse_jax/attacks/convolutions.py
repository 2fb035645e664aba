"""Keep convolutions fast inside compiled loops on CPU.

XLA:CPU brings a convolution into its fast canonical form (NHWC images, HWIO kernel, no input
dilation) only in the entry computation of a program, not in the body of a loop. The gradient by
the input, which has a reversed kernel with swapped feature axes and, for strides, a dilated input,
was measured 7 to 10 times slower there. `canonical_convolutions` writes that form down explicitly:
the function is traced, and every plain two-dimensional convolution is evaluated as transpose,
explicit padding, canonical convolution, transpose. Values change by rounding only.

GPU and TPU do not have the problem; `attacks` applies this on CPU alone.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

_CANONICAL = ("NHWC", "HWIO", "NHWC")

# Calls whose body is evaluated in place, and the parameter that holds the body.
_INLINED = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
}


def canonical_convolutions(fn):
    """Return `fn` with its two-dimensional convolutions in canonical form.

    Args:
        fn: a function of arrays (pytrees allowed) to arrays. Differentiate it *before* wrapping it:
            the derivative's own convolutions are the slow ones.

    Returns:
        A function with the same arguments, results, shapes and dtypes. Grouped convolutions and
        models without convolutions pass through unchanged.
    """

    def rewritten(*args):
        closed, out_shape = jax.make_jaxpr(fn, return_shape=True)(*args)
        if not _contains_convolution(closed.jaxpr):
            return fn(*args)
        out = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(out_shape), out)

    return rewritten


def _body(eqn):
    """The (jaxpr, consts) of a call that is evaluated in place, else None."""
    name = _INLINED.get(eqn.primitive.name)
    if name is None or name not in eqn.params:
        return None
    body = eqn.params[name]
    return (body.jaxpr, body.consts) if hasattr(body, "consts") else (body, ())


def _contains_convolution(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            return True
        body = _body(eqn)
        if body is not None and _contains_convolution(body[0]):
            return True
    return False


def _evaluate(jaxpr, consts, args):
    values = dict(zip(jaxpr.constvars, consts))
    values.update(zip(jaxpr.invars, args))

    def read(atom):
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for eqn in jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        body = _body(eqn)
        if body is not None and _contains_convolution(body[0]):
            outputs = _evaluate(*body, inputs)
        elif _is_plain_convolution(eqn):
            outputs = [_canonical(*inputs, eqn.params)]
        else:
            outputs = _bind(eqn, inputs)
        values.update(zip(eqn.outvars, outputs))
    return [read(atom) for atom in jaxpr.outvars]


def _bind(eqn, inputs):
    params = eqn.primitive.get_bind_params(eqn.params)
    # Older JAX returns (functions, params), newer JAX one dict.
    functions, params = params if isinstance(params, tuple) else ((), params)
    outputs = eqn.primitive.bind(*functions, *inputs, **params)
    return outputs if eqn.primitive.multiple_results else [outputs]


def _is_plain_convolution(eqn):
    return (eqn.primitive.name == "conv_general_dilated"
            and eqn.invars[0].aval.ndim == 4
            and eqn.params["feature_group_count"] == 1
            and eqn.params["batch_group_count"] == 1)


def _canonical(lhs, rhs, params):
    numbers = params["dimension_numbers"]
    n, c, h, w = numbers.lhs_spec
    o, i, kh, kw = numbers.rhs_spec
    lhs = jnp.transpose(lhs, (n, h, w, c))
    rhs = jnp.transpose(rhs, (kh, kw, i, o))
    # Input dilation and negative padding become an explicit pad of the input.
    (top, bottom), (left, right) = params["padding"]
    down, across = params["lhs_dilation"]
    explicit = min(top, bottom, left, right) < 0 or (down, across) != (1, 1)
    if explicit:
        config = ((0, 0, 0), (top, bottom, down - 1), (left, right, across - 1), (0, 0, 0))
        lhs = lax.pad(lhs, jnp.zeros((), lhs.dtype), config)
    out = lax.conv_general_dilated(
        lhs, rhs,
        window_strides=params["window_strides"],
        padding=((0, 0), (0, 0)) if explicit else params["padding"],
        rhs_dilation=params["rhs_dilation"],
        dimension_numbers=_CANONICAL,
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )
    order = numbers.out_spec  # (n, c, h, w) positions in the result
    back = [0] * 4
    for source, position in zip((0, 3, 1, 2), order):
        back[position] = source
    return jnp.transpose(out, back)
