"""What lies around a pixel: dilation, Gaussian blur, and the patches that touch a mask. One image.

All maps are separable and written as shifted sums: a convolution primitive would be slow inside
XLA:CPU loops, and there are only a few taps.
"""

import jax.numpy as jnp
from jax import lax


def _require_window(name, size, shape):
    if len(shape) != 2:
        raise ValueError(f"expected one image [H, W], got shape {list(shape)}; use jax.vmap for several")
    height, width = shape
    if size < 1:
        raise ValueError(f"{name}={size} must be at least 1 pixel")
    if size > min(height, width):
        raise ValueError(f"{name}={size} is larger than the image of {height}x{width} pixels; "
                         f"use {name} <= {min(height, width)}")


def _running(combine, values, size):
    """Combine over `size` x `size` windows of [H, W], without padding, in log2(size) shifts along each axis."""
    for axis in (0, 1):
        covered = 1
        while covered < size:
            shift = min(covered, size - covered)
            length = values.shape[axis]
            values = combine(lax.slice_in_dim(values, 0, length - shift, axis=axis),
                             lax.slice_in_dim(values, shift, length, axis=axis))
            covered += shift
    return values


def dilate(mask, size):
    """Mark every pixel whose `size` x `size` neighbourhood meets the mask.

    Args:
        mask: [H, W] bool.
        size: odd int >= 1; side of the neighbourhood, centred at the pixel.

    Returns:
        [H, W] bool.
    """
    return _running(jnp.logical_or, jnp.pad(mask, size // 2), size)


def gaussian_kernel(size, sigma):
    """Return `size` samples of a centred Gaussian that sum to 1.

    Args:
        size: odd int >= 1.
        sigma: [] standard deviation in pixels, > 0; may be traced.

    Returns:
        [size] weights.
    """
    offsets = jnp.asarray([float(i - size // 2) for i in range(size)], jnp.result_type(sigma))
    weights = jnp.exp(-0.5 * (offsets / sigma) ** 2)
    return weights / jnp.sum(weights)


def gaussian_blur(image, size, sigma):
    """Blur one map with a separable Gaussian and reflect padding (the border pixel not repeated).

    Args:
        image: [H, W] float, H and W > size // 2.
        size: odd int >= 1; taps per axis.
        sigma: [] standard deviation in pixels, > 0; may be traced.

    Returns:
        [H, W] float.
    """
    _require_window("size", size // 2 + 1, image.shape)
    weights = gaussian_kernel(size, jnp.asarray(sigma, image.dtype))
    half = size // 2
    for axis in (0, 1):
        pad = [(half, half) if a == axis else (0, 0) for a in (0, 1)]
        padded = jnp.pad(image, pad, mode="reflect")
        length = image.shape[axis]
        image = sum(weights[i] * lax.slice_in_dim(padded, i, i + length, axis=axis)
                    for i in range(size))
    return image


def count_patches(mask, patch_size):
    """Count the overlapping patches that contain a marked pixel: d_{2,0}.

    Args:
        mask: [H, W] bool.
        patch_size: int, 1 <= patch_size <= min(H, W); side of the square patches, stride 1,
            no padding.

    Returns:
        [] int32 in [0, (H - patch_size + 1) * (W - patch_size + 1)].

    Raises:
        ValueError: if a patch does not fit into the image.

    References:
        arXiv 2311.17434, section 4 (definition of d_{2,0}).
    """
    return jnp.sum(touched_patches(mask, patch_size), dtype=jnp.int32)


def touched_patches(mask, patch_size):
    """Tell which overlapping patches contain a marked pixel.

    Args:
        mask: [H, W] bool.
        patch_size: as in `count_patches`.

    Returns:
        [H - patch_size + 1, W - patch_size + 1] bool, a patch at the place of its first pixel.

    Raises:
        ValueError: if a patch does not fit into the image.
    """
    _require_window("patch_size", patch_size, mask.shape)
    return _running(jnp.logical_or, mask, patch_size)


def close_patches(mask, patch_size):
    """Mark every pixel that can be marked without touching another patch.

    The morphological closing of the mask by a patch: what gaps and notches it fills costs nothing
    in d_{2,0}.

    Args:
        mask: [H, W] bool.
        patch_size: as in `count_patches`.

    Returns:
        [H, W] bool, the largest mask that touches exactly the patches that `mask` touches.

    Raises:
        ValueError: if a patch does not fit into the image.
    """
    untouched = jnp.pad(~touched_patches(mask, patch_size), patch_size - 1)
    return ~_running(jnp.logical_or, untouched, patch_size)


def largest_in_patches(values, patch_size):
    """Return the largest value in each overlapping patch.

    Args:
        values: [H, W] float.
        patch_size: as in `count_patches`.

    Returns:
        [H - patch_size + 1, W - patch_size + 1]. As many of them exceed t as patches are touched by
        the mask `values > t`.

    Raises:
        ValueError: if a patch does not fit into the image.
    """
    _require_window("patch_size", patch_size, values.shape)
    return _running(jnp.maximum, values, patch_size)
