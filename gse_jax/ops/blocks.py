"""Masks on a grid of blocks: from one number per block to pixels and back, for one image.

A block is a small pattern of pixels (say, a 3 x 3 square, a whole row) that is put down at every
grid position; blocks may overlap.

References:
    Zhong, Huang, Liu, Sparse-PGD, arXiv 2405.05075v4, section on structured perturbations.
"""

import jax.numpy as jnp
import numpy as np


def grid_shape(image_shape, pattern, stride: int) -> tuple[int, int]:
    """Return how many blocks fit into an image along each axis.

    Args:
        image_shape: (H, W).
        pattern: [h, w] static array of 0 and 1.
        stride: int, pixels between neighbouring blocks.

    Returns:
        (rows, columns); not positive where a block does not fit.
    """
    return tuple((size - block) // stride + 1 for size, block in zip(image_shape, pattern.shape))


def _windows(pattern, stride, grid):
    """For every pixel of the pattern, the pixels of the image it falls on."""
    for row, column in np.argwhere(pattern):
        yield (slice(int(row), int(row) + (grid[0] - 1) * stride + 1, stride),
               slice(int(column), int(column) + (grid[1] - 1) * stride + 1, stride))


def expand_blocks(grid, image_shape, pattern, stride: int):
    """Put every block's number down on its pixels; overlaps add up to at most 1.

    Args:
        grid: [rows, columns] numbers >= 0.
        image_shape: (H, W).
        pattern: [h, w] static array of 0 and 1.
        stride: int.

    Returns:
        [H, W] in [0, 1]; 0 where no block reaches.
    """
    pixels = jnp.zeros(image_shape, grid.dtype)
    for window in _windows(pattern, stride, grid.shape):
        pixels = pixels.at[window].add(grid)
    return jnp.minimum(pixels, 1.0)


def average_blocks(pixels, pattern, stride: int):
    """Return the mean over the pixels of each block, the transpose of putting blocks down.

    Args:
        pixels: [H, W].
        pattern: [h, w] static array of 0 and 1.
        stride: int.

    Returns:
        [rows, columns].
    """
    shape = grid_shape(pixels.shape, pattern, stride)
    total = sum(pixels[window] for window in _windows(pattern, stride, shape))
    return total / int(np.sum(pattern))
