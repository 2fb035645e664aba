"""Count the connected clusters of masks inside the compiled graph.

Hook-and-pointer-jumping: a pixel points to a pixel of its own cluster with a smaller or equal
index; each round hooks neighbouring trees together and shortens the pointers, so the number of
rounds grows with the logarithm of a cluster's diameter (8 for a 224 x 224 spiral, where passing
labels from pixel to pixel needs tens of thousands).

References:
    Shiloach and Vishkin, "An O(log n) parallel connectivity algorithm", Journal of Algorithms 3
    (1982), for the hooking scheme.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

# (row, column) steps to the neighbours of a pixel, for each kind of connectivity.
STEPS = {4: ((-1, 0), (1, 0), (0, -1), (0, 1))}
STEPS[8] = STEPS[4] + ((-1, -1), (-1, 1), (1, -1), (1, 1))


def _smallest_neighbour(labels, connectivity, outside):
    """Minimum of each label and its neighbours' labels; all [N, H, W] int32."""
    padded = jnp.pad(labels, ((0, 0), (1, 1), (1, 1)), constant_values=outside)
    _, height, width = labels.shape
    smallest = labels
    for row, column in STEPS[connectivity]:
        shifted = padded[:, 1 + row : 1 + row + height, 1 + column : 1 + column + width]
        smallest = jnp.minimum(smallest, shifted)
    return smallest


@functools.partial(jax.jit, static_argnames="connectivity")
def count_clusters(mask, connectivity=4):
    """Count the connected clusters of each mask.

    Args:
        mask: [N, H, W] bool, N * H * W below 2**31 - 1.
        connectivity: 4 (edges) or 8 (edges and corners), static.

    Returns:
        [N] int32 clusters, and [] int32 rounds it took.
    """
    outside = mask.size  # Label of unchanged pixels: larger than every pixel's index.
    own = jnp.arange(outside, dtype=jnp.int32).reshape(mask.shape)
    start = jnp.where(mask, own, outside)

    def follow(pointers, index):
        return pointers.at[index].get(mode="fill", fill_value=outside)

    def round_(state):
        labels, _, rounds = state
        smallest = _smallest_neighbour(labels, connectivity, outside)
        smallest = jnp.where(mask, smallest, outside).reshape(-1)
        # Hook: the pixel that a cluster's members point to learns of the smallest label they saw.
        pointers = smallest.at[labels.reshape(-1)].min(smallest, mode="drop")
        # Two jumps per round were about the best of one to four.
        pointers = follow(pointers, pointers)
        pointers = follow(pointers, pointers).reshape(mask.shape)
        return pointers, jnp.any(pointers != labels), rounds + 1

    # A loop outside the drivers: how many rounds are needed depends on the masks.
    # Labels never grow, so the loop ends; when a round changes nothing, every label equals those
    # of its neighbours, i.e. it is constant on each cluster and names one pixel of it.
    initial = (start, jnp.any(mask), jnp.int32(0))
    labels, _, rounds = lax.while_loop(lambda state: state[1], round_, initial)
    return jnp.sum(labels == own, axis=(1, 2), dtype=jnp.int32), rounds
