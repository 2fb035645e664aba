"""VGG-19 (configuration E, without BatchNorm) as a Flax NNX module.

Five stages of 3x3 convolutions, each ended by max pooling; the last map is averaged to the side
that the first dense layer was made for (7x7, which 224x224 images have by themselves), then three
dense layers.

References:
  Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition",
  arXiv:1409.1556, table 1.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gse_jax.models.layers import convolution

# arXiv:1409.1556, table 1, column E: convolutions in each stage.
_STAGES = (2, 2, 4, 4, 4)
# torchvision's classifier is a Sequential, timm's first two dense layers are convolutions.
_DENSE = {"classifier.0": "fc1", "classifier.3": "fc2", "classifier.6": "linear",
          "pre_logits.fc1": "fc1", "pre_logits.fc2": "fc2", "head.linear": "linear",
          "head.fc": "linear"}


class VGGConfig(NamedTuple):
    """Describe one VGG-19; hashable, so that it can be static under jit.

    Attributes:
      widths: Channels of the 16 convolutions.
      side: Height and width of the map that the first dense layer takes.
      hidden: Features of the first two dense layers.
      num_classes: Number of logits, at least 1.
      num_channels: Image channels.
    """

    widths: tuple[int, ...]
    side: int
    hidden: tuple[int, int]
    num_classes: int
    num_channels: int


class VGG(nnx.Module):
    """Classify images with a VGG-19.

    Args:
      config: The architecture.
      rngs: Source of the initial weights.

    References:
      arXiv:1409.1556, table 1.
    """

    pooled = False  # The head is not linear in the feature map.

    def __init__(self, config: VGGConfig, *, rngs: nnx.Rngs):
        inputs = (config.num_channels, *config.widths[:-1])
        self.convolutions = nnx.List(
            convolution(i, o, 3, 1, rngs, use_bias=True)
            for i, o in zip(inputs, config.widths, strict=True)
        )
        self.side = config.side
        features = config.widths[-1] * config.side**2
        self.fc1 = nnx.Linear(features, config.hidden[0], rngs=rngs)
        self.fc2 = nnx.Linear(config.hidden[0], config.hidden[1], rngs=rngs)
        self.linear = nnx.Linear(config.hidden[1], config.num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return `(logits [N, num_classes], last convolution's map [N, H/16, W/16, widths[15]])`.

        Args:
          x: Normalised images `[N, H, W, num_channels]`, float; at least 32x32.
        """
        layer = iter(self.convolutions)
        features = x
        for num_convolutions in _STAGES:
            for _ in range(num_convolutions):
                x = jax.nn.relu(next(layer)(x))
            features = x
            x = nnx.max_pool(x, (2, 2), strides=(2, 2))
        for axis in (1, 2):
            x = _averaged(x, axis, self.side)
        # The dense kernel's rows are in the order of PyTorch's NCHW map.
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        x = jax.nn.relu(self.fc2(jax.nn.relu(self.fc1(x))))
        return self.linear(x), features


def renamed(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Give torchvision's and timm's tensors the names of `VGG`.

    Args:
      tensors: Arrays by PyTorch name: `features.N` for the convolutions, `classifier.N` or
        `pre_logits.fcN` and `head.fc` for the dense layers; others stay.

    Returns:
      Arrays by the names of `VGG`; dense layers that are stored as convolutions become matrices.
    """
    numbers = {int(m[1]) for n in tensors if (m := re.match(r"features\.(\d+)\.", n))}
    positions = {f"features.{n}": f"convolutions.{i}" for i, n in enumerate(sorted(numbers))}
    result = {}
    for name, array in tensors.items():
        layer, _, leaf = name.rpartition(".")
        layer = positions.get(layer) or _DENSE.get(layer, layer)
        if layer in ("fc1", "fc2") and array.ndim == 4:
            array = array.reshape(len(array), -1)
        result[f"{layer}.{leaf}"] = array
    return result


def config_from_tensors(tensors: Mapping[str, np.ndarray], source: str) -> VGGConfig:
    """Read the architecture off the shapes of a `renamed` state dict.

    Args:
      tensors: Arrays by the names of `VGG`.
      source: Where the tensors come from, for error messages.

    Returns:
      The configuration. Names and shapes beyond those read here are not checked.

    Raises:
      ValueError: If the tensors are of another architecture.
    """
    kernels = [f"convolutions.{i}.weight" for i in range(sum(_STAGES))]
    ranks = dict.fromkeys(kernels, 4) | dict.fromkeys(
        ("fc1.weight", "fc2.weight", "linear.weight"), 2)
    wrong = [n for n, rank in ranks.items() if n not in tensors or tensors[n].ndim != rank]
    more = f"convolutions.{len(kernels)}.weight" in tensors
    if wrong or more:
        raise ValueError(f"weights: {source} is no vgg19 without BatchNorm (expected torchvision's "
                         "or timm's names: 16 convolutions features.N, three dense layers)")
    widths = tuple(int(tensors[name].shape[0]) for name in kernels)
    first = tensors["fc1.weight"]
    side = math.isqrt(first.shape[1] // widths[-1])
    if side < 1 or side**2 * widths[-1] != first.shape[1]:
        raise ValueError(f"weights: {source}: the first dense layer takes {first.shape[1]} "
                         f"features, expected a square map of {widths[-1]} channels")
    return VGGConfig(
        widths=widths,
        side=side,
        hidden=(int(first.shape[0]), int(tensors["fc2.weight"].shape[0])),
        num_classes=int(tensors["linear.weight"].shape[0]),
        num_channels=int(tensors[kernels[0]].shape[1]),
    )


def _averaged(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Average an axis to `size` bins as PyTorch's adaptive pooling does: bins may overlap."""
    length = x.shape[axis]
    if length == size:
        return x
    starts = [i * length // size for i in range(size)]
    ends = [-(-(i + 1) * length // size) for i in range(size)]
    bins = np.zeros((length, size))
    for i, (start, end) in enumerate(zip(starts, ends)):
        bins[start:end, i] = 1 / (end - start)
    return jnp.moveaxis(jnp.moveaxis(x, axis, -1) @ jnp.asarray(bins, x.dtype), -1, axis)
