"""ImageNet residual networks (ResNet-18, ResNet-50) as Flax NNX modules.

A 7x7 stem with stride 2, max pooling, four stages, global average pooling, one linear layer. Where
a block changes the shape its shortcut is a 1x1 convolution ("option B"). The stride of a bottleneck
is in its 3x3 convolution, as in every public PyTorch checkpoint; the paper has it in the first 1x1.

References:
  He et al., "Deep Residual Learning for Image Recognition", arXiv:1512.03385, table 1;
  Goyal et al., arXiv:1706.02677, section 5.1 (where the stride is).
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from gse_jax.models.layers import batch_norm, convolution, convolution_and_norm

# Blocks per stage and convolutions per block: arXiv:1512.03385, table 1.
_BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}
_CONVOLUTIONS = {18: 2, 50: 3}


class ImageNetResNetConfig(NamedTuple):
    """Describe one ImageNet ResNet; hashable, so that it can be static under jit.

    Attributes:
      depth: 18 or 50.
      stem: Channels of the stem.
      inner: Channels inside the blocks of each stage.
      outer: Channels that the blocks of each stage return.
      num_classes: Number of logits, at least 1.
      num_channels: Image channels.
    """

    depth: int
    stem: int
    inner: tuple[int, ...]
    outer: tuple[int, ...]
    num_classes: int
    num_channels: int


class Block(nnx.Module):
    """Add the output of two 3x3, or of a 1x1, a 3x3 and a 1x1 convolution, to a shortcut.

    Args:
      in_features: Channels of the input.
      inner: Channels between the convolutions.
      out_features: Channels of the output.
      stride: 1, or 2 to halve height and width.
      num_convolutions: 2 for a basic block, 3 for a bottleneck.
      rngs: Source of the initial weights.
    """

    def __init__(self, in_features: int, inner: int, out_features: int, stride: int,
                 num_convolutions: int, *, rngs: nnx.Rngs):
        bottleneck = num_convolutions == 3
        if bottleneck:
            self.conv1 = convolution(in_features, inner, 1, 1, rngs)
            self.conv2 = convolution(inner, inner, 3, stride, rngs)
            self.conv3 = convolution(inner, out_features, 1, 1, rngs)
            self.bn3 = batch_norm(out_features, rngs)
        else:
            self.conv1 = convolution(in_features, inner, 3, stride, rngs)
            self.conv2 = convolution(inner, out_features, 3, 1, rngs)
        self.bn1 = batch_norm(inner, rngs)
        self.bn2 = batch_norm(inner if bottleneck else out_features, rngs)
        self.bottleneck = bottleneck
        self.projects = stride != 1 or in_features != out_features
        if self.projects:
            self.downsample = nnx.List([convolution(in_features, out_features, 1, stride, rngs),
                                        batch_norm(out_features, rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[N, H, W, in_features]` to `[N, ceil(H/stride), ceil(W/stride), out_features]`."""
        y = jax.nn.relu(convolution_and_norm(self.conv1, self.bn1, x))
        y = convolution_and_norm(self.conv2, self.bn2, y)
        if self.bottleneck:
            y = convolution_and_norm(self.conv3, self.bn3, jax.nn.relu(y))
        if self.projects:
            x = convolution_and_norm(*self.downsample, x)
        return jax.nn.relu(y + x)


class ImageNetResNet(nnx.Module):
    """Classify images with an ImageNet ResNet; attributes are named as in the checkpoints.

    Args:
      config: The architecture.
      rngs: Source of the initial weights.

    References:
      arXiv:1512.03385, table 1.
    """

    def __init__(self, config: ImageNetResNetConfig, *, rngs: nnx.Rngs):
        self.conv1 = convolution(config.num_channels, config.stem, 7, 2, rngs)
        self.bn1 = batch_norm(config.stem, rngs)
        inputs = (config.stem, *config.outer[:3])
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nnx.List(
                Block(i if b == 0 else outer, inner, outer, stride if b == 0 else 1,
                      _CONVOLUTIONS[config.depth], rngs=rngs)
                for b in range(blocks)
            )
            for i, inner, outer, stride, blocks in zip(
                inputs, config.inner, config.outer, (1, 2, 2, 2), _BLOCKS[config.depth],
                strict=True)
        )
        self.linear = nnx.Linear(config.outer[-1], config.num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return `(logits [N, num_classes], last feature map [N, H/32, W/32, outer[3]])`.

        Args:
          x: Normalised images `[N, H, W, num_channels]`, float.
        """
        x = jax.nn.relu(convolution_and_norm(self.conv1, self.bn1, x))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = block(x)
        return self.linear(x.mean((1, 2))), x


def config_from_tensors(
    depth: int, tensors: Mapping[str, np.ndarray], source: str
) -> ImageNetResNetConfig:
    """Read the architecture off the shapes of a torchvision- or timm-named state dict.

    Args:
      depth: 18 or 50.
      tensors: Arrays by PyTorch name, `linear` for the last layer.
      source: Where the tensors come from, for error messages.

    Returns:
      The configuration. Names and shapes beyond those read here are not checked.

    Raises:
      ValueError: If the tensors are of another architecture.
    """
    last = _CONVOLUTIONS[depth]
    inner = tuple(f"layer{s}.0.conv1.weight" for s in (1, 2, 3, 4))
    outer = tuple(f"layer{s}.0.conv{last}.weight" for s in (1, 2, 3, 4))
    needed = ("conv1.weight", *inner, *outer, "linear.weight")
    wrong = [n for n in needed if n not in tensors or tensors[n].ndim != (2 if "lin" in n else 4)]
    bottleneck = "layer1.0.conv3.weight" in tensors
    if wrong or bottleneck != (last == 3):
        raise ValueError(
            f"weights: {source} is no resnet{depth} with ImageNet's four stages"
            + (f" (missing or of wrong rank: {', '.join(wrong[:3])})" if wrong
               else " (its blocks have three convolutions)")
        )
    channels = {name: int(tensors[name].shape[0]) for name in needed}
    return ImageNetResNetConfig(
        depth=depth,
        stem=channels["conv1.weight"],
        inner=tuple(channels[name] for name in inner),
        outer=tuple(channels[name] for name in outer),
        num_classes=channels["linear.weight"],
        num_channels=int(tensors["conv1.weight"].shape[1]),
    )
