"""CIFAR residual networks (ResNet-20/32/44/56) as Flax NNX modules.

Depth `6n + 2`: a 3x3 stem, three stages of `n` basic blocks with strides 1, 2, 2, global average
pooling, one linear layer. Shortcuts across a stride carry no parameters ("option A": every second
row and column, zero channels added on both sides), which is why a ResNet-20 has 0.27 M parameters.

References:
  He et al., "Deep Residual Learning for Image Recognition", arXiv:1512.03385, section 4.2
  (CIFAR-10 networks, shortcut option A).
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gse_jax.models.layers import batch_norm, convolution, convolution_and_norm

# arXiv:1512.03385 section 4.2.
NUM_STAGES = 3
DEPTHS = (20, 32, 44, 56)


class ResNetConfig(NamedTuple):
    """Describe one CIFAR ResNet; hashable, so that it can be static under jit.

    Attributes:
      depth: Number of weighted layers, `6n + 2`.
      widths: Channels of the three stages, not decreasing; the stem has the first one.
      num_classes: Number of logits, at least 1.
      num_channels: Image channels, 1 or 3.
    """

    depth: int
    widths: tuple[int, int, int]
    num_classes: int
    num_channels: int

    @property
    def blocks_per_stage(self) -> int:
        """Return `n` of depth `6n + 2`."""
        return (self.depth - 2) // (2 * NUM_STAGES)


class BasicBlock(nnx.Module):
    """Add the output of two 3x3 convolutions to a parameter-free shortcut.

    Args:
      in_features: Channels of the input.
      out_features: Channels of the output, at least `in_features`.
      stride: 1, or 2 to halve height and width.
      rngs: Source of the initial weights.
    """

    def __init__(self, in_features: int, out_features: int, stride: int, *, rngs: nnx.Rngs):
        self.stride = stride
        self.conv1 = convolution(in_features, out_features, 3, stride, rngs)
        self.bn1 = batch_norm(out_features, rngs)
        self.conv2 = convolution(out_features, out_features, 3, 1, rngs)
        self.bn2 = batch_norm(out_features, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[N, H, W, in_features]` to `[N, ceil(H/stride), ceil(W/stride), out_features]`."""
        y = jax.nn.relu(convolution_and_norm(self.conv1, self.bn1, x))
        y = convolution_and_norm(self.conv2, self.bn2, y)
        return jax.nn.relu(y + _shortcut(x, self.stride, y.shape[-1]))


class CifarResNet(nnx.Module):
    """Classify small images with a CIFAR ResNet.

    Attribute names are those of the PyTorch checkpoints, so that conversion needs no name table.

    Args:
      config: The architecture.
      rngs: Source of the initial weights.

    References:
      arXiv:1512.03385, section 4.2.
    """

    def __init__(self, config: ResNetConfig, *, rngs: nnx.Rngs):
        self.conv1 = convolution(config.num_channels, config.widths[0], 3, 1, rngs)
        self.bn1 = batch_norm(config.widths[0], rngs)
        inputs = (config.widths[0], *config.widths[:2])
        stages = [
            nnx.List(
                BasicBlock(i if b == 0 else o, o, stride if b == 0 else 1, rngs=rngs)
                for b in range(config.blocks_per_stage)
            )
            for i, o, stride in zip(inputs, config.widths, (1, 2, 2), strict=True)
        ]
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nnx.Linear(config.widths[-1], config.num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return `(logits [N, num_classes], last feature map [N, H/4, W/4, widths[2]])`.

        Args:
          x: Normalised images `[N, H, W, num_channels]`, float.
        """
        x = jax.nn.relu(convolution_and_norm(self.conv1, self.bn1, x))
        for stage in (self.layer1, self.layer2, self.layer3):
            for block in stage:
                x = block(x)
        return self.linear(x.mean((1, 2))), x


def config_from_tensors(
    depth: int, tensors: Mapping[str, np.ndarray], source: str
) -> ResNetConfig:
    """Read the architecture off the shapes of a PyTorch-layout state dict.

    Args:
      depth: The depth that the caller asked for, `6n + 2`.
      tensors: Arrays by PyTorch name (`layer1.0.conv1.weight` is `[out, in, 3, 3]`).
      source: Where the tensors come from, for error messages.

    Returns:
      The configuration. Names and shapes beyond those read here are not checked.

    Raises:
      ValueError: If the tensors are no CIFAR ResNet, or one of another depth.
    """
    anchors = ("conv1.weight", *(f"layer{s}.0.conv2.weight" for s in (1, 2, 3)), "linear.weight")
    ranks = (4, 4, 4, 4, 2)
    wrong = [n for n, r in zip(anchors, ranks, strict=True)
             if n not in tensors or tensors[n].ndim != r]
    if wrong:
        raise ValueError(
            f"weights: {source} is no CIFAR ResNet (missing or of wrong rank: {', '.join(wrong)}); "
            f"expected PyTorch names such as layer1.0.conv1.weight [out, in, 3, 3], linear.weight"
        )
    found = {s: _num_blocks(tensors, s) for s in (1, 2, 3)}
    expected = (depth - 2) // (2 * NUM_STAGES)
    if set(found.values()) != {expected}:
        blocks = "/".join(str(n) for n in found.values())
        named = 2 * NUM_STAGES * found[1] + 2
        hint = f"; load it as resnet{named}" if len(set(found.values())) == 1 and named in DEPTHS else ""
        if any(name.startswith("layer4.") for name in tensors):
            hint = "; with its fourth stage it is a resnet18 or resnet50"
        raise ValueError(
            f"weights: {source} has {blocks} blocks in its three stages, "
            f"but resnet{depth} has {expected} in each{hint}"
        )
    first, second, third = (int(tensors[name].shape[0]) for name in anchors[1:4])
    if not first <= second <= third:
        raise ValueError(
            f"weights: {source} has stages of {first}, {second}, {third} channels, but "
            "parameter-free shortcuts need widths that do not decrease"
        )
    return ResNetConfig(
        depth=depth,
        widths=(first, second, third),
        num_classes=int(tensors["linear.weight"].shape[0]),
        num_channels=int(tensors["conv1.weight"].shape[1]),
    )


def _num_blocks(tensors: Mapping[str, np.ndarray], stage: int) -> int:
    found = (re.match(rf"layer{stage}\.(\d+)\.", name) for name in tensors)
    return len({match.group(1) for match in found if match})


def _shortcut(x: jax.Array, stride: int, out_features: int) -> jax.Array:
    extra = out_features - x.shape[-1]
    if stride == 1 and extra == 0:
        return x
    # Half of the zero channels in front, as in the public CIFAR checkpoints; an odd one goes last.
    channels = (extra // 2, extra - extra // 2)
    return jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), channels))
