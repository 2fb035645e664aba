"""Dilation, blur and patch counts against naive loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gse_jax.ops import count_patches, dilate, gaussian_blur, gaussian_kernel, touched_patches

DILATE, BLUR = jax.jit(dilate, static_argnums=1), jax.jit(gaussian_blur, static_argnums=1)
COUNT = jax.jit(count_patches, static_argnums=1)
SHAPES = [(8, 8), (9, 13), (32, 32), (17, 10)]


def masks(shape, seed=0):
    rng = np.random.default_rng(seed)
    yield np.zeros(shape, bool)
    yield np.ones(shape, bool)
    for density in (0.01, 0.1, 0.5):
        yield rng.random(shape) < density
    corner = np.zeros(shape, bool)
    corner[0, -1] = True
    yield corner


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1, 3, 5])
def test_dilate_equals_the_loop(shape, size):
    r = size // 2
    for mask in masks(shape):
        expected = np.array([[mask[max(0, i - r):i + r + 1, max(0, j - r):j + r + 1].any()
                              for j in range(shape[1])] for i in range(shape[0])])
        np.testing.assert_array_equal(DILATE(mask, size), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("patch", [1, 3, 7, 8])
def test_count_patches_equals_the_loop(shape, patch):
    for mask in masks(shape):
        expected = sum(mask[i:i + patch, j:j + patch].any()
                       for i in range(shape[0] - patch + 1) for j in range(shape[1] - patch + 1))
        assert int(COUNT(mask, patch)) == expected


def test_patch_larger_than_the_image_is_refused():
    with pytest.raises(ValueError, match="patch_size=9"):
        count_patches(jnp.zeros((8, 12), bool), 9)
    with pytest.raises(ValueError, match="size=3 is larger than the image of 2x12"):
        gaussian_blur(jnp.zeros((2, 12)), 5, 1.5)


@pytest.mark.parametrize("shape", SHAPES)
def test_blur_equals_the_loop(shape):
    rng = np.random.default_rng(1)
    image, size, sigma = rng.normal(size=shape), 5, 1.5
    offsets = np.arange(size) - size // 2
    weights = np.exp(-offsets**2 / (2 * sigma**2))
    kernel = np.outer(weights, weights) / weights.sum() ** 2
    padded = np.pad(image, size // 2, mode="reflect")
    expected = np.array([[(padded[i:i + size, j:j + size] * kernel).sum()
                          for j in range(shape[1])] for i in range(shape[0])])
    np.testing.assert_allclose(BLUR(image, size, sigma), expected,
                               atol=1e-12)
    np.testing.assert_allclose(gaussian_kernel(size, sigma).sum(), 1.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_dilation_says_where_the_blur_is_positive(shape):
    for mask in masks(shape):
        blurred = BLUR(mask.astype(float), 5, 1.5)
        np.testing.assert_array_equal(DILATE(mask, 5), np.asarray(blurred) > 0)


def test_windows_of_no_pixel_and_batches_are_refused():
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"patch_size={size} must be at least 1"):
            count_patches(jnp.zeros((8, 8), bool), size)
    with pytest.raises(ValueError, match=r"expected one image \[H, W\], got shape \[2, 8, 8\]"):
        touched_patches(jnp.zeros((2, 8, 8), bool), 3)
