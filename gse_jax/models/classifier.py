"""The model as attacks see it: a hashable `apply_fn(params, x)` beside a plain pytree of arrays.

NNX modules carry their arrays; a pure function wants them apart. `Classifier` holds only what is
static (architecture, normalisation), so two loads of the same architecture compare equal and share
one compiled program whatever their weights.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

# (mean, std) of images in [0, 1]: to [-1, 1] as the GSE paper and timm's ViT do; what torchvision's and
# timm's other ImageNet checkpoints were trained with; nothing, as for RobustBench's models.
NORMALIZATIONS = {
    "half": (0.5, 0.5),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "none": (0.0, 1.0),
}


@dataclasses.dataclass(frozen=True)
class Classifier:
    """Evaluate an NNX classifier, always in evaluation mode (running statistics, no dropout).

    Instances are hashable and equal for equal architecture and normalisation, so they can be static
    arguments of jit. Normalisation happens inside: callers pass images in their own range.

    Attributes:
      module: NNX module class; `module(config, rngs=...)` builds it and calling it on normalised
        images returns `(logits, last feature map)`. Its last layer is named `linear`; where that is
        not preceded by global average pooling alone, the class says `pooled = False`.
      config: Hashable configuration of the module, with a `num_channels` attribute.
      mean: Per-channel mean in the unit of the images, `num_channels` floats.
      std: Per-channel standard deviation in the same unit, positive.
    """

    module: Callable[..., nnx.Module]
    config: Any
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, params: Any, x: jax.Array) -> jax.Array:
        """Return the logits.

        Args:
          params: Nested dict of arrays, as returned by `gse_jax.models.load`.
          x: Images `[N, H, W, num_channels]`, float, in the range that the normalisation expects.

        Returns:
          `[N, num_classes]`, in the wider dtype of `x` and `params`.

        Raises:
          TypeError: If `x` is not floating point.
          ValueError: If `x` has another rank or channel count, or `params` another structure.
        """
        return self.features(params, x)[0]

    def features(self, params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the logits and the last feature map, before global average pooling.

        Args:
          params, x: As in `__call__`.

        Returns:
          `(logits [N, num_classes], features [N, h, w, channels])`; with the kernel from `head`,
          `features @ kernel` are the class activation maps (arXiv:1512.04150, Eq. 2).

        Raises:
          TypeError, ValueError: As in `__call__`.
        """
        x = self._checked_images(x)
        graphdef, structure = _static_parts(self.module, self.config)
        if jax.tree.structure(params) != structure:
            raise ValueError(
                f"params: got another tree than {self.config} has; "
                "pass the params that came with this apply_fn from gse_jax.models.load"
            )
        dtype = _wider_dtype(x.dtype, *{leaf.dtype for leaf in jax.tree.leaves(params)})
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        x = x.astype(dtype)
        mean, std = (jnp.asarray(v, dtype)[None, None, None, :] for v in (self.mean, self.std))
        return nnx.merge(graphdef, params)((x - mean) / std)

    @property
    def head(self) -> Callable[[Any], jax.Array]:
        """A function of `params`: the kernel `[channels, num_classes]` of the pooled features.

        Raises:
          AttributeError: If the logits are no linear function of the pooled feature map; then
            class activation maps need gradients (Grad-CAM).

        References:
          Zhou et al., "Learning Deep Features for Discriminative Localization", arXiv:1512.04150.
        """
        if not getattr(self.module, "pooled", True):
            raise AttributeError(f"{self.module.__name__} has no linear layer on pooled features")
        return _head_kernel

    def _checked_images(self, x: jax.Array) -> jax.Array:
        shape, channels = np.shape(x), self.config.num_channels
        if len(shape) != 4 or shape[-1] != channels:
            nchw = len(shape) == 4 and shape[1] == channels
            fix = "; it looks like NCHW: pass x.transpose(0, 2, 3, 1)" if nchw else ""
            raise ValueError(f"x: got shape {shape}, expected [N, H, W, {channels}] (NHWC){fix}")
        x = jnp.asarray(x)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(
                f"x: got dtype {x.dtype}, expected floating point; "
                "for 8-bit images pass x.astype('float32') / 255"
            )
        return x


def _head_kernel(params: Any) -> jax.Array:
    return params["linear"]["kernel"]


def normalization(normalize: Any, num_channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Turn `(mean, std)`, scalars or per channel, into two tuples of `num_channels` floats.

    Args:
      normalize: A name of `NORMALIZATIONS`, or a pair of mean and standard deviation, each a number
        or one number per channel.
      num_channels: Channels of the images.

    Returns:
      `(mean, std)`, always per channel, so that 0.5 and (0.5, 0.5, 0.5) give equal classifiers.

    Raises:
      TypeError: If `normalize` is not a pair of numbers.
      ValueError: If the name is unknown, a length differs from `num_channels`, a value is not
        finite or a std <= 0.
    """
    if isinstance(normalize, str):
        if normalize not in NORMALIZATIONS:
            raise ValueError(f"normalize: got {normalize!r}, expected "
                             f"{', '.join(NORMALIZATIONS)} or (mean, std)")
        normalize = NORMALIZATIONS[normalize]
    want = f"expected (mean, std), each a number or {num_channels} numbers, for example (0.5, 0.5)"
    try:
        mean, std = (np.asarray(v, np.float64).ravel() for v in normalize)
    except (TypeError, ValueError):
        raise TypeError(f"normalize: got {normalize!r}, {want}") from None
    if any(v.size not in (1, num_channels) for v in (mean, std)):
        raise ValueError(f"normalize: got {mean.size} means and {std.size} stds, {want}")
    if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
        raise ValueError(f"normalize: got {normalize!r}, expected finite values and std > 0")
    mean, std = (np.broadcast_to(v, (num_channels,)).tolist() for v in (mean, std))
    return tuple(mean), tuple(std)


def expected_params(module: Callable[..., nnx.Module], config: Any) -> Any:
    """Return the nested dict of shapes and dtypes that a module's `params` must have.

    Args:
      module: NNX module class, as in `Classifier`.
      config: Its configuration.

    Returns:
      Nested dict of `jax.ShapeDtypeStruct`.
    """
    return nnx.to_pure_dict(_abstract(module, config)[1])


@functools.cache
def _static_parts(module: Callable[..., nnx.Module], config: Any) -> tuple[nnx.GraphDef, Any]:
    graphdef, state = _abstract(module, config)
    return graphdef, jax.tree.structure(nnx.to_pure_dict(state))


@functools.cache
def _abstract(module: Callable[..., nnx.Module], config: Any) -> tuple[nnx.GraphDef, nnx.State]:
    # Shapes only: eager NNX initialisation compiles every initializer, tens of seconds for nothing.
    model = nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0)))
    model.eval()  # The mode is baked into the graphdef, so it must be set before the split.
    return nnx.split(model)


def _wider_dtype(*dtypes: Any) -> Any:
    # Strict promotion forbids mixing silently; here the mix is meant: nothing is ever narrowed.
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, dtypes)
