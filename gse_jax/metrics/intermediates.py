"""Differentiate a model with respect to a value that it returns beside its logits.

JAX differentiates functions by their arguments; a feature map is made inside the model. So the
model's program (its jaxpr) is evaluated equation by equation, and where the returned feature map
is made, an offset is added. The derivative by the offset at 0 is the derivative by the feature
map. It works for any framework, and is why `grad_cam` needs no cooperation from the model.

References:
    arXiv 1610.02391, Eq. (1) needs this derivative; JAX documentation, "Writing custom Jaxpr
    interpreters in JAX".
"""

import jax
from jax.extend import core

# Calls that are opened up when the feature map is made inside them: what they wrap is plain code.
# Others (custom derivatives, loops) stay closed and get the offset on their result.
_OPENED_CALLS = frozenset({"jit", "pjit", "checkpoint", "remat2", "closed_call", "core_call"})


def with_feature_offset(apply_fn, params, x):
    """Turn a model that returns features into one that takes an offset on them.

    Args:
        apply_fn: (params, x) -> (logits, features), both arrays.
        params: parameters, any pytree; only shapes and dtypes matter here.
        x: images, [N, H, W, C]; only shape and dtype matter here.

    Returns:
        (offset_apply, features). offset_apply(params, x, offset) -> (logits, features + offset),
        where all that is computed from the features sees the offset; `features` is their
        `jax.ShapeDtypeStruct`.

    Raises:
        ValueError: if apply_fn does not return (logits, features), or the logits do not depend on
            the features: a map made from that derivative would be zero without a word.

    References:
        arXiv 1610.02391, Eq. (1).
    """
    closed, shapes = jax.make_jaxpr(apply_fn, return_shape=True)(params, x)
    leaves = jax.tree.leaves(shapes)
    if not isinstance(shapes, tuple) or len(shapes) != 2 or len(leaves) != 2:
        raise ValueError("apply_fn must return (logits, features), two arrays")

    def offset_apply(params, x, offset):
        arguments = jax.tree.leaves((params, x))
        return tuple(_evaluate(closed.jaxpr, closed.consts, arguments, 1, offset))

    program = jax.make_jaxpr(offset_apply)(params, x, leaves[1]).jaxpr
    if not _depends(program, program.outvars[0], program.invars[-1]):
        raise ValueError(
            "the logits do not depend on the returned features: return the value that the model "
            "goes on with, not a copy of another dtype or shape"
        )
    return offset_apply, leaves[1]


def _evaluate(jaxpr, consts, arguments, position, offset):
    """Evaluate a program, adding `offset` to its output number `position` where that is made."""
    values = dict(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))
    wanted = _origin(jaxpr, jaxpr.outvars[position])
    if wanted in values:  # An argument that is handed through.
        values[wanted] = values[wanted] + offset

    def read(atom):
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        made_here = wanted in equation.outvars
        inner, inner_consts = _opened(equation)
        if made_here and inner is not None:
            place = equation.outvars.index(wanted)
            outputs = _evaluate(inner, inner_consts, inputs, place, offset)
        else:
            keywords = equation.primitive.get_bind_params(equation.params)
            # Older JAX returns (functions, keywords), newer JAX the keywords alone.
            functions, keywords = keywords if isinstance(keywords, tuple) else ((), keywords)
            outputs = equation.primitive.bind(*functions, *inputs, **keywords)
            outputs = list(outputs) if equation.primitive.multiple_results else [outputs]
            if made_here:
                place = equation.outvars.index(wanted)
                outputs[place] = outputs[place] + offset
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _opened(equation):
    """Program and constants of a plain call, else (None, None)."""
    if equation.primitive.name not in _OPENED_CALLS:
        return None, None
    inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    if isinstance(inner, core.ClosedJaxpr):
        return inner.jaxpr, inner.consts
    return inner, ()


def _origin(jaxpr, atom):
    """Follow a value back through calls that hand it through, to where it is really made."""
    if isinstance(atom, core.Literal):
        raise ValueError("the returned features are a constant")
    for equation in jaxpr.eqns:
        if atom in equation.outvars:
            inner, _ = _opened(equation)
            if inner is None:
                return atom
            result = inner.outvars[equation.outvars.index(atom)]
            if result in inner.invars:
                return _origin(jaxpr, equation.invars[inner.invars.index(result)])
            return atom
    return atom


def _depends(jaxpr, goal, source):
    reached = {source}
    for equation in jaxpr.eqns:
        if any(not isinstance(atom, core.Literal) and atom in reached for atom in equation.invars):
            reached.update(equation.outvars)
    return not isinstance(goal, core.Literal) and goal in reached
