"""The moves of Sparse-RS: how a pattern of corner colours changes from one query to the next.

A pattern colours its pixels with corners of the colour cube: every channel lowest or highest.

References:
    Croce, Andriushchenko, Singh, Flammarion, Hein, Sparse-RS, arXiv 2006.12834, sections 3 (l0), 5
    (patches) and 6 (frames), and the schedules of the appendix; github fra31/sparse-rs.

Differs from the reference:
    Frames are searched per image, not one for all. Images and patch positions need not be square,
    and a patch may also lie at the last row or column. Squares of a frame that leave the image go on at
    the opposite border. Every image has its own random numbers.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Query of 10,000 after which a fraction of alpha is redrawn: l0, then patches and frames.
_L0_QUERIES = (0, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_L0_DIVISORS = (1, 2, 4, 5, 6, 8, 10, 12, 15, 20)
_BLOCK_QUERIES = (10, 50, 200, 500, 1000, 4000, 8000)
_BLOCK_DIVISORS = (1, 2, 4, 8, 16, 32, 64, 128)

_HALF = np.float32(0.5)  # a coin; as float32 it is tossed alike for images of either dtype


class Pattern(NamedTuple):
    """Which pixels are coloured, and how.

    Attributes:
        mask: [H, W] bool, coloured pixels.
        high: [H, W, C] bool, highest or lowest value, where coloured.
        corner: [2] int32, upper left pixel of a patch; zero for the other kinds.
    """

    mask: jax.Array  # [H, W] bool
    high: jax.Array  # [H, W, C] bool
    corner: jax.Array  # [2] i32


def empty_pattern(shape) -> Pattern:
    """Return the pattern without coloured pixels.

    Args:
        shape: (H, W, C).

    Returns:
        Pattern.
    """
    return Pattern(jnp.zeros(shape[:2], bool), jnp.zeros(shape, bool), jnp.zeros(2, jnp.int32))


def redrawn_fraction(kind: str, query, max_queries: int, alpha):
    """Return the fraction of a pattern that is redrawn at a query.

    Args:
        kind: "l0", "patches" or "frames".
        query: [] int32, queries made.
        max_queries: int, of one restart.
        alpha: [] fraction at the beginning.

    Returns:
        [].
    """
    queries, divisors = ((_L0_QUERIES, _L0_DIVISORS) if kind == "l0"
                         else (_BLOCK_QUERIES, _BLOCK_DIVISORS))
    now = query * 10_000 // max_queries
    place = jnp.sum(now > jnp.asarray(queries, jnp.int32), dtype=jnp.int32)
    return alpha / jnp.asarray(divisors, alpha.dtype)[place]


def _count(fraction, total):
    """max(int(fraction * total), 1); the small term makes up for rounding just below an integer."""
    return jnp.maximum(jnp.floor(fraction * total * (1.0 + 1e-6)).astype(jnp.int32), 1)


def _mark(score, eligible, most, count):
    """Mark `count` <= `most` eligible entries of [H, W] with the largest scores, fewer if fewer."""
    flat = jnp.where(eligible, score, -1.0).reshape(-1)
    value, index = lax.top_k(flat, most)
    chosen = (jnp.arange(most, dtype=jnp.int32) < count) & (value >= 0.0)
    return jnp.zeros(flat.shape, bool).at[index].set(chosen).reshape(score.shape)


def move_pixels(key, pattern: Pattern, num_pixels: int, fraction, begin) -> Pattern:
    """Exchange some coloured pixels for others in new colours.

    Args:
        key: typed key.
        pattern: the best pattern so far.
        num_pixels: int, coloured pixels.
        fraction: [] of them to exchange.
        begin: [] bool; draw a new pattern instead.

    Returns:
        Pattern with `num_pixels` coloured pixels.
    """
    shape = pattern.high.shape
    key_out, key_in, key_colour = jax.random.split(key, 3)
    mask = pattern.mask & ~begin
    spare = shape[0] * shape[1] - num_pixels
    count = jnp.minimum(_count(fraction, num_pixels), spare)
    removed = _mark(jax.random.uniform(key_out, shape[:2], jnp.float32), mask, num_pixels, count)
    added = _mark(jax.random.uniform(key_in, shape[:2], jnp.float32), ~mask, num_pixels,
                  jnp.where(begin, num_pixels, count))
    colours = jax.random.bernoulli(key_colour, _HALF, shape)
    return Pattern((mask & ~removed) | added, jnp.where(added[..., None], colours, pattern.high),
                   pattern.corner)


def patch_side(num_pixels: int) -> int:
    """Return the side of the largest square patch within the budget."""
    return math.isqrt(num_pixels)


def move_patch(key, pattern: Pattern, num_pixels: int, fraction, begin, query,
               max_queries: int) -> Pattern:
    """Recolour a square of the patch, or, every few queries, shift the patch.

    Args:
        key: typed key.
        pattern: the best pattern so far.
        num_pixels: int, area of the patch at most.
        fraction: [] of the patch's area to recolour.
        begin: [] bool; draw a new patch of vertical stripes instead.
        query: [] int32, queries made.
        max_queries: int, of one restart.

    Returns:
        Pattern.
    """
    height, width, channels = pattern.high.shape
    side = patch_side(num_pixels)
    room = jnp.asarray([height - side, width - side], jnp.int32)
    key_place, key_colour, key_shift, key_stripes, key_start = jax.random.split(key, 5)
    rows = jnp.arange(height, dtype=jnp.int32)[:, None]
    columns = jnp.arange(width, dtype=jnp.int32)[None, :]

    def square(corner, size):
        top, left = corner
        return (rows >= top) & (rows < top + size) & (columns >= left) & (columns < left + size)

    # A square of side sqrt(fraction) * side gets one colour.
    size = jnp.minimum(_count(jnp.sqrt(fraction), side), side)
    place = pattern.corner + jax.random.randint(key_place, (2,), 0, side - size + 1, jnp.int32)
    colour = jax.random.bernoulli(key_colour, _HALF, (channels,))
    recoloured = jnp.where(square(place, size)[..., None], colour[None, None], pattern.high)

    # Shifts shrink from three quarters of the image to nothing, and become rarer.
    left_over = 0.75 * (max_queries - query).astype(jnp.float32) / max_queries
    reach = jnp.floor(left_over * jnp.asarray([height, width], jnp.float32)).astype(jnp.int32)
    period = 5 * (1 + query // 1000)
    shifts = (query % period == 0) & jnp.any(reach > 0)
    shift = jax.random.randint(key_shift, (2,), -reach, reach + 1, jnp.int32)
    moved = jnp.clip(pattern.corner + shift, 0, room)
    # The patch stays inside the image, so nothing of it goes round the border.
    travelled = jnp.roll(pattern.high, moved - pattern.corner, (0, 1))

    start = jax.random.randint(key_start, (2,), 0, room + 1, jnp.int32)
    stripes = jax.random.bernoulli(key_stripes, _HALF, (1, width, channels))
    corner = jnp.where(begin, start, jnp.where(shifts, moved, pattern.corner))
    high = jnp.where(shifts, travelled, recoloured)
    return Pattern(square(corner, side), jnp.where(begin, stripes, high), corner)


def frame_width(num_pixels: int, height: int, width: int) -> int:
    """Return the width of the widest frame within the budget, 0 if there is none."""
    def area(f):
        return height * width - max(height - 2 * f, 0) * max(width - 2 * f, 0)

    return max(f for f in range((min(height, width) + 1) // 2 + 1) if area(f) <= num_pixels)


def move_frame(key, pattern: Pattern, num_pixels: int, fraction, begin) -> Pattern:
    """Recolour some pixels of the frame, each with the pixels to one of its four diagonal sides.

    Args:
        key: typed key.
        pattern: the best pattern so far.
        num_pixels: int, area of the frame at most.
        fraction: [] of the frame's pixels to recolour.
        begin: [] bool; draw a new frame instead.

    Returns:
        Pattern.
    """
    height, width, channels = pattern.high.shape
    thick = frame_width(num_pixels, height, width)
    inner = (slice(thick, height - thick), slice(thick, width - thick))
    mask = jnp.ones((height, width), bool).at[inner].set(False)
    area = height * width - max(height - 2 * thick, 0) * max(width - 2 * thick, 0)
    key_seeds, key_colour, key_side, key_start = jax.random.split(key, 4)
    seeds = _mark(jax.random.uniform(key_seeds, (height, width), jnp.float32), mask, area,
                  _count(fraction, area))
    colours = jax.random.bernoulli(key_colour, _HALF, (height, width, channels))
    down, right = jax.random.bernoulli(key_side, _HALF, (2,))
    high = pattern.high
    for a in range(thick):
        for b in range(thick):
            # The seeds' squares: the pixel takes the colour of the seed a rows and b columns away.
            shift = (jnp.where(down, a, -a), jnp.where(right, b, -b))
            reached = jnp.roll(seeds, shift, (0, 1))
            high = jnp.where(reached[..., None], jnp.roll(colours, shift, (0, 1)), high)
    fresh = jax.random.bernoulli(key_start, _HALF, pattern.high.shape)
    return Pattern(mask, jnp.where(begin, fresh, high), pattern.corner)
