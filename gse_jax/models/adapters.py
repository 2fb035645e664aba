"""Models of other JAX libraries as `(apply_fn, params)`, always in evaluation mode.

Each library keeps parameters, running statistics and the mode in its own way; an attack wants a
pure function of a pytree of arrays and a batch of NHWC images. None of the libraries is imported
before its adapter is called.
"""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# What flax.linen modules call the argument that chooses the mode, and its value in evaluation.
_EVALUATION = {"train": False, "training": False, "is_training": False, "deterministic": True,
               "use_running_average": True}

Adapted = tuple[Callable[[Any, jax.Array], jax.Array], Any]


def from_linen(module: Any, variables: Any, **options: Any) -> Adapted:
    """Adapt a `flax.linen` module.

    Args:
      module: The module; `module.apply(variables, x [N, H, W, C])` returns logits.
      variables: Its variables, with `batch_stats` where it has them; those are not updated.
      options: Further arguments of the module. `train`, `training`, `is_training`,
        `deterministic` and `use_running_average` need not be given.

    Returns:
      `(apply_fn, params)` for `gse_jax.attack`; `params` is `variables`.

    Raises:
      TypeError: If `module` is no Linen module, or an option asks for training mode.
    """
    from flax import linen

    if not isinstance(module, linen.Module):
        raise TypeError(f"module: got {type(module).__name__}, expected a flax.linen module")
    options = _evaluating(module, options)

    def apply_fn(params, x):
        return module.apply(params, x, **options)

    return apply_fn, variables


def _evaluating(module: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The options with those added that choose the mode and that the module's `__call__` takes."""
    accepted = inspect.signature(type(module).__call__).parameters
    _refuse_training(options)
    return {name: value for name, value in _EVALUATION.items() if name in accepted} | options


def _refuse_training(options: dict[str, Any]) -> None:
    for name in _EVALUATION.keys() & options.keys():
        if options[name] is not _EVALUATION[name]:
            raise TypeError(f"{name}={options[name]!r}: attacks need evaluation mode, "
                            f"{name}={_EVALUATION[name]}")


def from_nnx(model: Any, **options: Any) -> Adapted:
    """Adapt a `flax.nnx` module.

    Args:
      model: The module; `model(x [N, H, W, C])` returns logits. It is copied, and the copy put in
        evaluation mode.
      options: Further arguments of the module. `train`, `training`, `is_training`,
        `deterministic` and `use_running_average` need not be given.

    Returns:
      `(apply_fn, params)` for `gse_jax.attack`; `params` is a nested dict of the parameters and
      running statistics.

    Raises:
      TypeError: If `model` is no NNX module, or an option asks for training mode.
    """
    from flax import nnx

    if not isinstance(model, nnx.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a flax.nnx module")
    clone = nnx.clone(model)
    clone.eval()
    # Keys of dropout are no parameters, and are not used in evaluation.
    graphdef, keys, state = nnx.split(clone, nnx.RngState, ...)
    options = _evaluating(model, options)

    def apply_fn(params, x):
        return nnx.merge(graphdef, keys, params)(x, **options)

    return apply_fn, nnx.to_pure_dict(state)


def from_equinox(model: Any, state: Any = None, *, channels_first: bool = True) -> Adapted:
    """Adapt an Equinox module.

    Args:
      model: The module for one image, as Equinox has it: `model(x)` returns logits, or with a state
        `model(x, state)` returns `(logits, state)`. It is not changed.
      state: Its `equinox.nn.State`, for example of BatchNorm, or None; it is not updated.
      channels_first: Whether the model takes `[C, H, W]`, as Equinox's convolutions do, or
        `[H, W, C]`.

    Returns:
      `(apply_fn, params)` for `gse_jax.attack`; `apply_fn` takes NHWC images either way.

    Raises:
      TypeError: If `model` is no Equinox module.
      ImportError: If Equinox is not installed.
    """
    try:
        import equinox
    except ImportError:
        raise ImportError("from_equinox needs Equinox: pip install equinox") from None
    if not isinstance(model, equinox.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected an equinox.Module")
    arrays, static = equinox.partition(equinox.nn.inference_mode(model), equinox.is_array)

    def apply_fn(params, x):
        arrays, state = params
        evaluated = equinox.combine(arrays, static)
        if channels_first:
            x = jnp.moveaxis(x, -1, 1)
        if state is None:
            return jax.vmap(evaluated)(x)
        # BatchNorm insists on the name of the mapped axis, also where it does not use it.
        return jax.vmap(lambda image: evaluated(image, state)[0], axis_name="batch")(x)

    return apply_fn, (arrays, state)


def from_haiku(transformed: Any, params: Any, state: Any = None, **options: Any) -> Adapted:
    """Adapt a function transformed by Haiku.

    Args:
      transformed: What `haiku.transform` or `haiku.transform_with_state` returned, for a function
        of images `[N, H, W, C]`, with or without `without_apply_rng`.
      params: Its parameters.
      state: Its state where it has one, for example of BatchNorm; it is not updated.
      options: Further arguments of the function, such as `is_training=False`: Haiku does not tell
        which it has. `apply_fn` raises TypeError where the function updates its state nevertheless.

    Returns:
      `(apply_fn, params)` for `gse_jax.attack`; `params` holds parameters and state.

    Raises:
      TypeError: If `transformed` is none of Haiku's, if its state is missing, or an option asks for
        training mode.
      ImportError: If Haiku is not installed.
    """
    try:
        import haiku
    except ImportError:
        raise ImportError("from_haiku needs Haiku: pip install dm-haiku") from None
    if not isinstance(transformed, (haiku.Transformed, haiku.TransformedWithState)):
        raise TypeError(f"transformed: got {type(transformed).__name__}, expected the result of "
                        "haiku.transform or haiku.transform_with_state")
    stateful = isinstance(transformed, haiku.TransformedWithState)
    if stateful != (state is not None):
        raise TypeError("state: haiku.transform_with_state needs it, haiku.transform has none")
    _refuse_training(options)
    # No key: a function that draws random numbers is an error, not a silent coin toss.
    key = (None,) if "rng" in inspect.signature(transformed.apply).parameters else ()

    def apply_fn(params, x):
        if stateful:
            logits, new = transformed.apply(*params, *key, x, **options)
            # Haiku hands untouched state back as it was.
            if list(map(id, jax.tree.leaves(new))) != list(map(id, jax.tree.leaves(params[1]))):
                raise TypeError("transformed: the function updates its state, as in training mode; attacks need "
                                "evaluation mode, for example from_haiku(..., is_training=False)")
            return logits
        return transformed.apply(params, *key, x, **options)

    return apply_fn, (params, state) if stateful else params


def from_torch(module: Any) -> Adapted:
    """Adapt a PyTorch module, such as a RobustBench model, by tracing it into JAX with torchax.

    Args:
      module: The `torch.nn.Module`; `module(x [N, C, H, W])` returns logits. It is copied, and the
        copy put in evaluation mode. Code that looks at the values of tensors cannot be traced.

    Returns:
      `(apply_fn, params)` for `gse_jax.attack`; `apply_fn` takes NHWC images, `params` holds JAX
      arrays by PyTorch's names. PyTorch takes no part in the computation.

    Raises:
      TypeError: If `module` is no PyTorch module.
      ImportError: If PyTorch or torchax is not installed, or they do not fit each other.
    """
    try:
        import torch
        import torchax
    except (ImportError, AttributeError) as error:  # The latter from versions that do not fit.
        raise ImportError("from_torch needs PyTorch and torchax: pip install --pre "
                          f"'gse-jax[torch]' ({error})") from None
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module: got {type(module).__name__}, expected a torch.nn.Module")
    params, function = torchax.extract_jax(copy.deepcopy(module).eval())

    def apply_fn(params, x):
        # torchax promotes as PyTorch does, which a session that is strict about it would refuse.
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return function(params, (jnp.moveaxis(x, -1, 1),))

    return apply_fn, params
