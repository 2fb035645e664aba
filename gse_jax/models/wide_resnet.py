"""Wide residual networks for CIFAR (WideResNet-28-10) as Flax NNX modules.

Normalisation and ReLU come before each convolution ("pre-activation"); where a block changes its
width, the shortcut is a 1x1 convolution of the activated input. Attribute names are those of the
checkpoints that RobustBench and TRADES publish.

References:
  Zagoruyko and Komodakis, "Wide Residual Networks", arXiv:1605.07146, table 1; He et al.,
  "Identity Mappings in Deep Residual Networks", arXiv:1603.05027 (pre-activation).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from gse_jax.models.layers import batch_norm, convolution, convolution_and_norm, scale_and_shift

_STAGES = (1, 2, 3)


class WideResNetConfig(NamedTuple):
    """Describe one WideResNet; hashable, so that it can be static under jit.

    Attributes:
      depth: Number of weighted layers, `6n + 4`.
      stem: Channels of the stem, 16 in the paper.
      widths: Channels of the three stages, `(16k, 32k, 64k)` in the paper.
      num_classes: Number of logits, at least 1.
      num_channels: Image channels.
    """

    depth: int
    stem: int
    widths: tuple[int, int, int]
    num_classes: int
    num_channels: int


class PreActivationBlock(nnx.Module):
    """Add the output of two pre-activated 3x3 convolutions to a shortcut.

    Args:
      in_features: Channels of the input.
      out_features: Channels of the output.
      stride: 1, or 2 to halve height and width.
      rngs: Source of the initial weights.
    """

    def __init__(self, in_features: int, out_features: int, stride: int, *, rngs: nnx.Rngs):
        self.bn1 = batch_norm(in_features, rngs)
        self.conv1 = convolution(in_features, out_features, 3, stride, rngs)
        self.bn2 = batch_norm(out_features, rngs)
        self.conv2 = convolution(out_features, out_features, 3, 1, rngs)
        self.projects = in_features != out_features
        if self.projects:
            self.convShortcut = convolution(in_features, out_features, 1, stride, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[N, H, W, in_features]` to `[N, ceil(H/stride), ceil(W/stride), out_features]`."""
        activated = jax.nn.relu(_norm(self.bn1, x))
        y = jax.nn.relu(convolution_and_norm(self.conv1, self.bn2, activated))
        shortcut = self.convShortcut(activated) if self.projects else x
        return shortcut + self.conv2(y)


class Stage(nnx.Module):
    """Blocks of one width, under the name that the checkpoints give them.

    Args:
      in_features: Channels of the input.
      out_features: Channels of the output.
      stride: Of the first block.
      num_blocks: At least 1.
      rngs: Source of the initial weights.
    """

    def __init__(self, in_features: int, out_features: int, stride: int, num_blocks: int, *,
                 rngs: nnx.Rngs):
        self.layer = nnx.List(
            PreActivationBlock(in_features if b == 0 else out_features, out_features,
                               stride if b == 0 else 1, rngs=rngs)
            for b in range(num_blocks)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[N, H, W, in_features]` to `[N, ceil(H/stride), ceil(W/stride), out_features]`."""
        for block in self.layer:
            x = block(x)
        return x


class WideResNet(nnx.Module):
    """Classify small images with a WideResNet.

    Args:
      config: The architecture.
      rngs: Source of the initial weights.

    References:
      arXiv:1605.07146, table 1.
    """

    def __init__(self, config: WideResNetConfig, *, rngs: nnx.Rngs):
        self.conv1 = convolution(config.num_channels, config.stem, 3, 1, rngs)
        inputs, num_blocks = (config.stem, *config.widths[:2]), (config.depth - 4) // 6
        self.block1, self.block2, self.block3 = (
            Stage(i, o, stride, num_blocks, rngs=rngs)
            for i, o, stride in zip(inputs, config.widths, (1, 2, 2), strict=True)
        )
        self.bn1 = batch_norm(config.widths[-1], rngs)
        self.linear = nnx.Linear(config.widths[-1], config.num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return `(logits [N, num_classes], last feature map [N, H/4, W/4, widths[2]])`.

        Args:
          x: Normalised images `[N, H, W, num_channels]`, float.
        """
        x = self.conv1(x)
        for stage in (self.block1, self.block2, self.block3):
            x = stage(x)
        x = jax.nn.relu(_norm(self.bn1, x))
        return self.linear(x.mean((1, 2))), x


def without_unused(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Drop what TRADES-style checkpoints hold beside the network.

    Args:
      tensors: Arrays by PyTorch name.

    Returns:
      The others; without `sub_block1`, a stage that those modules build and never call.
    """
    return {n: array for n, array in tensors.items() if not n.startswith("sub_block1.")}


def config_from_tensors(
    depth: int, tensors: Mapping[str, np.ndarray], source: str
) -> WideResNetConfig:
    """Read the architecture off the shapes of a RobustBench-named state dict.

    Args:
      depth: The depth that the caller asked for, `6n + 4`.
      tensors: Arrays by PyTorch name, `linear` for the last layer.
      source: Where the tensors come from, for error messages.

    Returns:
      The configuration. Names and shapes beyond those read here are not checked.

    Raises:
      ValueError: If the tensors are of another architecture or depth.
    """
    anchors = tuple(f"block{s}.layer.0.conv1.weight" for s in _STAGES)
    ranks = dict.fromkeys(("conv1.weight", *anchors), 4) | {"linear.weight": 2}
    wrong = [n for n, rank in ranks.items() if n not in tensors or tensors[n].ndim != rank]
    if wrong:
        raise ValueError(f"weights: {source} is no WideResNet (missing or of wrong rank: "
                         f"{', '.join(wrong[:3])}); expected names such as {anchors[0]}")
    blocks = [sum(f"block{s}.layer.{b}.conv1.weight" in tensors for b in range(len(tensors)))
              for s in _STAGES]
    if set(blocks) != {(depth - 4) // 6}:
        raise ValueError(f"weights: {source} has {'/'.join(map(str, blocks))} blocks in its three "
                         f"stages, but a WideResNet of depth {depth} has {(depth - 4) // 6} in "
                         "each")
    first, second, third = (int(tensors[name].shape[0]) for name in anchors)
    return WideResNetConfig(
        depth=depth,
        stem=int(tensors["conv1.weight"].shape[0]),
        widths=(first, second, third),
        num_classes=int(tensors["linear.weight"].shape[0]),
        num_channels=int(tensors["conv1.weight"].shape[1]),
    )


def _norm(norm: Any, x: jax.Array) -> jax.Array:
    """Apply a BatchNorm that no convolution precedes."""
    if not norm.use_running_average:
        return norm(x)
    scale, shift = scale_and_shift(norm)
    return x * scale[None, None, None, :] + shift[None, None, None, :]
