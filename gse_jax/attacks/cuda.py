"""What a compiled attack asks of XLA on an NVIDIA GPU, beyond its defaults: the same numbers, sooner.

Two options, both off by default in XLA, on an H200:

- Convolutions in CUDA graphs. The host launches a graph as a whole instead of kernel by kernel, which
  decides the time of narrow calls. XLA leaves them out because not every convolution can be captured.
- Convolutions in NCHW layout, for float32 without TF32 (`precision="highest"`). XLA chooses NHWC, for
  which cuDNN has no such kernels: it transposes before and after each convolution, a fifth of the time of
  a ResNet-20. With TF32 it has them, and NCHW would be slower by 40 %.

Whoever sets one of these flags in `XLA_FLAGS` decides it alone.
"""

import functools
import logging
import os

import jax
import jax.numpy as jnp

from gse_jax.devices import is_out_of_memory

_LOGGER = logging.getLogger("gse_jax")

# XLA's default kinds of work, and convolutions.
GRAPHS = {"xla_gpu_enable_command_buffer":
          "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONVOLUTION"}
NCHW = {"xla_gpu_force_conv_nchw": True}
_LAYOUTS = {"xla_gpu_force_conv_nchw", "xla_gpu_force_conv_nhwc"}


def is_cuda(device) -> bool:
    """Tell whether a device is an NVIDIA GPU."""
    return "NVIDIA" in device.device_kind or "cuda" in device.client.platform_version.lower()


def choices(jaxpr) -> list[dict]:
    """Return compiler options to try for a program, the fastest first; the last are XLA's defaults.

    Args:
        jaxpr: what the program computes.

    Returns:
        Dicts of compiler options, all different.
    """
    flags = {flag.lstrip("-").partition("=")[0] for flag in os.environ.get("XLA_FLAGS", "").split()}
    graphs = {} if "xla_gpu_enable_command_buffer" in flags else GRAPHS
    layout = NCHW if _convolves_in_float32(jaxpr) and not flags & _LAYOUTS else {}
    # One of the two may be unknown to another version of XLA, or not work for this model.
    found = [graphs | layout, layout, graphs, {}]
    return [options for i, options in enumerate(found) if options not in found[:i]]


def _convolves_in_float32(jaxpr) -> bool:
    """Whether there are convolutions, all of float32 images in full precision."""
    found = list(_convolutions(jaxpr))
    return bool(found) and all(
        eqn.invars[0].aval.dtype == jnp.float32 and eqn.params["precision"] is not None
        and all(one == jax.lax.Precision.HIGHEST for one in eqn.params["precision"]) for eqn in found)


def _convolutions(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            yield eqn
        for body in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            if hasattr(body, "eqns"):
                yield from _convolutions(body)


class Tuned:
    """A function, jitted with the fastest of `choices` that works for it.

    The first call with arguments of given shapes and dtypes finds out which; later ones take that. Where memory
    runs out meanwhile, which a copy of what is donated may be the reason for, that is XLA's own choice.
    """

    def __init__(self, jitted, donated: int):
        """Tune a function.

        Args:
            jitted: compiler options -> the jitted function.
            donated: which of its arguments is donated.
        """
        self._jitted = functools.cache(lambda *options: jitted(dict(options)))
        self._donated = donated
        self._chosen = {}  # by what the arguments look like

    def __call__(self, *arguments):
        """Call the function."""
        leaves, tree = jax.tree.flatten(arguments)
        looks = tree, *((leaf.shape, leaf.dtype) for leaf in leaves)
        if looks in self._chosen:
            return self._chosen[looks](*arguments)
        *first, last = self._choices(arguments)
        for options in first:
            run = self._jitted(*options.items())
            copied = list(arguments)  # what is donated would be gone if this fails
            try:
                copied[self._donated] = jax.tree.map(jnp.copy, arguments[self._donated])
                result = jax.block_until_ready(run(*copied))
                self._chosen[looks] = run
                return result
            except jax.errors.JaxRuntimeError as error:
                del copied  # room for the next
                if is_out_of_memory(error):
                    break
                _LOGGER.info("compiled without %s: %s", ", ".join(options), error)
        self._chosen[looks] = self._jitted(*last.items())
        return self._chosen[looks](*arguments)

    def lower(self, *arguments):
        """Lower the function with the first of its choices, as `jax.jit` does."""
        return self._jitted(*self._choices(arguments)[0].items()).lower(*arguments)

    def _choices(self, arguments):
        return choices(self._jitted().trace(*arguments).jaxpr)
