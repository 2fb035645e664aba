"""Layers that several architectures share, in PyTorch's conventions.

In evaluation mode each BatchNorm that follows a convolution is folded into its kernel: the fold
costs as many multiplications as the kernel has weights, the elementwise pass over the activations
that it saves costs far more, and its gradient as much again. Attacks spend nearly all of their time
in these layers.

References:
  Ioffe and Szegedy, arXiv:1502.03167 (BatchNorm).
"""

from typing import Any

import jax
from flax import nnx
from jax import lax

# PyTorch's default, with which the public checkpoints were trained.
BATCH_NORM_EPSILON = 1e-5


def convolution(in_features: int, out_features: int, side: int, stride: int, rngs: nnx.Rngs,
                *, use_bias: bool = False) -> nnx.Conv:
    """Return a square convolution padded by half its side.

    Not by "SAME": with stride 2 and an even size, that pads only at the far end.

    Args:
      in_features: Channels of the input.
      out_features: Channels of the output.
      side: Height and width of the kernel, odd.
      stride: Stride in both directions.
      rngs: Source of the initial weights.
      use_bias: Whether it adds a bias.
    """
    return nnx.Conv(
        in_features, out_features, (side, side), strides=stride, padding=side // 2,
        use_bias=use_bias, kernel_init=nnx.initializers.he_normal(), rngs=rngs,
    )


def batch_norm(features: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    """Return a BatchNorm with PyTorch's constants.

    Args:
      features: Channels.
      rngs: Source of the initial weights.
    """
    return nnx.BatchNorm(features, momentum=0.9, epsilon=BATCH_NORM_EPSILON, rngs=rngs)


def scale_and_shift(norm: Any) -> tuple[jax.Array, jax.Array]:
    """Return the BatchNorm of evaluation as `x * scale + shift`.

    Args:
      norm: A BatchNorm.

    Returns:
      `(scale [C], shift [C])`.
    """
    scale = norm.scale[...] * lax.rsqrt(norm.var[...] + norm.epsilon)
    return scale, norm.bias[...] - norm.mean[...] * scale


def convolution_and_norm(conv: Any, norm: Any, x: jax.Array) -> jax.Array:
    """Apply a convolution without bias and its BatchNorm; in evaluation, both in one.

    Args:
      conv: Made by `convolution`.
      norm: Made by `batch_norm`.
      x: `[N, H, W, C]`.

    Returns:
      `[N, H / stride, W / stride, features]`, sizes rounded up.
    """
    if not norm.use_running_average:
        return norm(conv(x))
    scale, shift = scale_and_shift(norm)
    half = conv.kernel[...].shape[0] // 2
    y = lax.conv_general_dilated(
        x,
        conv.kernel[...] * scale[None, None, None, :],
        window_strides=(conv.strides, conv.strides),
        padding=((half, half), (half, half)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y + shift[None, None, None, :]
