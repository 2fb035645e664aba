"""Vision transformers (ViT-B/16) as Flax NNX modules, in timm's names and torchvision's.

Patches become tokens, a class token goes first, positions are added; each block adds attention and
a two-layer network to its normalised input; the normalised class token is classified.

References:
  Dosovitskiy et al., "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale",
  arXiv:2010.11929, Eqs. (1) to (4) and table 1.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

# The checkpoints' LayerNorm constant, and the width of a head in every ViT of arXiv:2010.11929's
# table 1 (768 features have 12 heads): shapes do not tell the number of heads.
_LAYER_NORM_EPSILON = 1e-6
_HEAD_WIDTH = 64

_FROM_TORCHVISION = (
    (r"class_token$", "cls_token"),
    (r"encoder\.pos_embedding$", "pos_embed"),
    (r"conv_proj\.", "patch_embed.proj."),
    (r"encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"(blocks\.\d+)\.ln_([12])\.", r"\1.norm\2."),
    (r"(blocks\.\d+)\.self_attention\.in_proj_", r"\1.attn.qkv."),
    (r"(blocks\.\d+)\.self_attention\.out_proj\.", r"\1.attn.proj."),
    # Files from before torchvision 0.14 say linear_1 and linear_2.
    (r"(blocks\.\d+)\.mlp\.(?:0|linear_1)\.", r"\1.mlp.fc1."),
    (r"(blocks\.\d+)\.mlp\.(?:3|linear_2)\.", r"\1.mlp.fc2."),
    (r"encoder\.ln\.", "norm."),
    (r"heads\.head\.", "linear."),
    (r"head\.", "linear."),
)


class VisionTransformerConfig(NamedTuple):
    """Describe one vision transformer; hashable, so that it can be static under jit.

    Attributes:
      patch: Height and width of a patch in pixels.
      grid: Patches along each side of the image.
      width: Features of a token, a multiple of 64.
      hidden: Features between the two layers of each block's network.
      depth: Number of blocks.
      num_classes: Number of logits, at least 1.
      num_channels: Image channels.
    """

    patch: int
    grid: int
    width: int
    hidden: int
    depth: int
    num_classes: int
    num_channels: int


class LayerNorm(nnx.Module):
    """Normalise each token, as PyTorch does.

    Not Flax's, which casts to float32 on the way and by default computes the variance as
    `mean(x^2) - mean(x)^2`, which cancels.

    Args:
      width: Features of a token.
    """

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[N, ..., width]` to the same shape."""
        centred = x - x.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        axes = tuple(range(x.ndim - 1))
        scale, bias = (jnp.expand_dims(v[...], axes) for v in (self.scale, self.bias))
        return centred * lax.rsqrt(variance + _LAYER_NORM_EPSILON) * scale + bias


class Attention(nnx.Module):
    """Multi-head self-attention with heads of 64 features.

    Args:
      width: Features of a token.
      rngs: Source of the initial weights.
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
        self.proj = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[N, tokens, width]` to the same shape."""
        n, tokens, width = x.shape
        heads = self.qkv(x).reshape(n, tokens, 3, width // _HEAD_WIDTH, _HEAD_WIDTH)
        query, key, value = (heads[:, :, i] for i in range(3))
        scores = jnp.einsum("nqhd,nkhd->nhqk", query, key) / math.sqrt(_HEAD_WIDTH)
        mixed = jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(scores, axis=-1), value)
        return self.proj(mixed.reshape(n, tokens, width))


class FeedForward(nnx.Module):
    """Two dense layers with a GELU (the exact one) between.

    Args:
      width: Features of a token.
      hidden: Features between the layers.
      rngs: Source of the initial weights.
    """

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        self.fc1 = nnx.Linear(width, hidden, rngs=rngs)
        self.fc2 = nnx.Linear(hidden, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[N, tokens, width]` to the same shape."""
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class TransformerBlock(nnx.Module):
    """Attention and feed-forward network, each added to its normalised input.

    Args:
      width: Features of a token.
      hidden: Features inside the feed-forward network.
      rngs: Source of the initial weights.
    """

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(width)
        self.attn = Attention(width, rngs=rngs)
        self.norm2 = LayerNorm(width)
        self.mlp = FeedForward(width, hidden, rngs=rngs)

    def __call__(self, x: jax.Array, normalised: jax.Array | None = None) -> jax.Array:
        """Map `[N, tokens, width]` to the same shape.

        Args:
          x: Tokens.
          normalised: `norm1(x)` where the caller has it.
        """
        x = x + self.attn(self.norm1(x) if normalised is None else normalised)
        return x + self.mlp(self.norm2(x))


class PatchEmbedding(nnx.Module):
    """Map patches to tokens.

    Args:
      config: The architecture.
      rngs: Source of the initial weights.
    """

    def __init__(self, config: VisionTransformerConfig, *, rngs: nnx.Rngs):
        side = (config.patch, config.patch)
        self.proj = nnx.Conv(config.num_channels, config.width, side, strides=side,
                             padding="VALID", rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[N, H, W, channels]` to `[N, H * W / patch ** 2, width]`, row by row."""
        tokens = self.proj(x)
        return tokens.reshape(tokens.shape[0], -1, tokens.shape[-1])


class VisionTransformer(nnx.Module):
    """Classify images of one size with a vision transformer.

    Args:
      config: The architecture.
      rngs: Source of the initial weights.

    References:
      arXiv:2010.11929, Eqs. (1) to (4).
    """

    pooled = False  # The head is not linear in the feature map.

    def __init__(self, config: VisionTransformerConfig, *, rngs: nnx.Rngs):
        width = config.width
        self.patch, self.grid = config.patch, config.grid
        self.cls_token = nnx.Param(jnp.zeros((1, 1, width), jnp.float32))
        self.pos_embed = nnx.Param(jnp.zeros((1, 1 + config.grid**2, width), jnp.float32))
        self.patch_embed = PatchEmbedding(config, rngs=rngs)
        self.blocks = nnx.List(
            TransformerBlock(width, config.hidden, rngs=rngs) for _ in range(config.depth)
        )
        self.norm = LayerNorm(width)
        self.linear = nnx.Linear(width, config.num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return `(logits [N, num_classes], feature map [N, grid, grid, width])`.

        The map is the last block's normalised patch tokens: after that block, the logits depend on
        the class token alone.

        Args:
          x: Normalised images `[N, grid * patch, grid * patch, num_channels]`, float.

        Raises:
          ValueError: If the images have another size; positions are not interpolated.
        """
        side = self.grid * self.patch
        if x.shape[1:3] != (side, side):
            raise ValueError(f"x: images are {x.shape[1]}x{x.shape[2]}, but these weights have "
                             f"positions for {side}x{side}; resize the images")
        n, width = x.shape[0], self.pos_embed.shape[-1]
        first = jnp.broadcast_to(self.cls_token[...], (n, 1, width))
        tokens = jnp.concatenate([first, self.patch_embed(x)], axis=1) + self.pos_embed[...]
        for block in self.blocks[:-1]:
            tokens = block(tokens)
        last = self.blocks[-1]
        normalised = last.norm1(tokens)
        features = normalised[:, 1:].reshape(n, self.grid, self.grid, width)
        # Put together again from the map that is returned, so that Grad-CAM can vary it.
        patches = features.reshape(n, -1, width)
        tokens = last(tokens, jnp.concatenate([normalised[:, :1], patches], axis=1))
        return self.linear(self.norm(tokens[:, 0])), features


def renamed(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Give torchvision's tensors timm's names, and the last layer ours.

    Args:
      tensors: Arrays by PyTorch name.

    Returns:
      Arrays by the names of `VisionTransformer`; unknown names stay.
    """
    result = {}
    for name, array in tensors.items():
        for pattern, replacement in _FROM_TORCHVISION:
            name = re.sub(f"^{pattern}", replacement, name)
        result[name] = array
    return result


def config_from_tensors(tensors: Mapping[str, np.ndarray], source: str) -> VisionTransformerConfig:
    """Read the architecture off the shapes of a `renamed` state dict.

    Args:
      tensors: Arrays by the names of `VisionTransformer`.
      source: Where the tensors come from, for error messages.

    Returns:
      The configuration. Names and shapes beyond those read here are not checked.

    Raises:
      ValueError: If the tensors are of another architecture.
    """
    ranks = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4,
             "blocks.0.mlp.fc1.weight": 2, "linear.weight": 2}
    wrong = [n for n, rank in ranks.items() if n not in tensors or tensors[n].ndim != rank]
    if wrong:
        raise ValueError(f"weights: {source} is no vision transformer (missing or of wrong rank: "
                         f"{', '.join(wrong)}); expected torchvision's or timm's names")
    width, channels, patch, _ = tensors["patch_embed.proj.weight"].shape
    tokens = tensors["pos_embed"].shape[1]
    grid = math.isqrt(tokens - 1)
    if grid**2 + 1 != tokens or width % _HEAD_WIDTH or patch != 16:
        raise ValueError(f"weights: {source} has {tokens} positions, {width} features and patches "
                         f"of {patch} pixels; expected a square grid and one class token, a "
                         f"multiple of {_HEAD_WIDTH}, and 16")
    blocks = {m[1] for n in tensors if (m := re.match(r"blocks\.(\d+)\.", n))}
    return VisionTransformerConfig(
        patch=int(patch),
        grid=grid,
        width=int(width),
        hidden=int(tensors["blocks.0.mlp.fc1.weight"].shape[0]),
        depth=len(blocks),
        num_classes=int(tensors["linear.weight"].shape[0]),
        num_channels=int(channels),
    )
