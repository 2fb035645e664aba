"""Count connected clusters of changed pixels, in the compiled graph or on the host.

`num_clusters` is hook-and-pointer-jumping: a pixel points to a pixel of its own cluster with a
smaller or equal index; each round hooks neighbouring trees together and shortens the pointers, so
the number of rounds grows with the logarithm of a cluster's diameter (8 for a 224 x 224 spiral,
where passing labels from pixel to pixel needs tens of thousands). `num_clusters_host` gives the
same numbers through SciPy and is the faster one on a CPU.

Differs from the reference:
    The published code counts with a depth-first search from a random start, on the host, image by
    image; an older version of it was 8-connected. Ours is 4-connected unless told otherwise.

References:
    arXiv 2311.17434 (ANC); Shiloach and Vishkin, "An O(log n) parallel connectivity algorithm",
    Journal of Algorithms 3 (1982), for the hooking scheme.
"""

import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from gse_jax.metrics.sparsity import changed_mask

# (row, column) steps to the neighbours of a pixel, for each kind of connectivity.
_STEPS = {4: ((-1, 0), (1, 0), (0, -1), (0, 1))}
_STEPS[8] = _STEPS[4] + ((-1, -1), (-1, 1), (1, -1), (1, 1))


def _check(mask, connectivity):
    if connectivity not in _STEPS:
        raise ValueError(f"connectivity must be 4 or 8, got {connectivity}")
    if mask.ndim != 3 or mask.dtype != bool:
        raise ValueError(f"mask must be bool [N, H, W], got {mask.dtype} {mask.shape}")


def _smallest_neighbour(labels, connectivity, outside):
    """Minimum of each label and its neighbours' labels; all [N, H, W] int32."""
    padded = jnp.pad(labels, ((0, 0), (1, 1), (1, 1)), constant_values=outside)
    _, height, width = labels.shape
    smallest = labels
    for row, column in _STEPS[connectivity]:
        shifted = padded[:, 1 + row : 1 + row + height, 1 + column : 1 + column + width]
        smallest = jnp.minimum(smallest, shifted)
    return smallest


@functools.partial(jax.jit, static_argnames="connectivity")
def _count_in_graph(mask, connectivity):
    """Number of clusters per image, and how many rounds it took."""
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

    # Labels never grow, so the loop ends; when a round changes nothing, every label equals those
    # of its neighbours, i.e. it is constant on each cluster and names one pixel of it.
    initial = (start, jnp.any(mask), jnp.int32(0))
    labels, _, rounds = lax.while_loop(lambda state: state[1], round_, initial)
    return jnp.sum(mask & (labels == own), axis=(1, 2), dtype=jnp.int32), rounds


def count_clusters(mask, *, connectivity=4):
    """Count the connected components of each mask inside the compiled graph.

    Args:
        mask: bool [N, H, W]; N * H * W below 2**31 - 1, since pixels are numbered by int32.
        connectivity: 4 (edges) or 8 (edges and corners), static.

    Returns:
        int32 [N].

    Raises:
        ValueError: for another connectivity, another shape or dtype, or too many pixels.

    References:
        arXiv 2311.17434 (ANC).
    """
    mask = jnp.asarray(mask)
    _check(mask, connectivity)
    if mask.size >= np.iinfo(np.int32).max:
        raise ValueError(f"a mask of {mask.size} pixels is too large: split the batch")
    return _count_in_graph(mask, connectivity)[0]


def count_clusters_host(mask, *, connectivity=4):
    """Count the connected components of each mask on the host, with SciPy.

    Args:
        mask: bool [N, H, W], concrete.
        connectivity: 4 (edges) or 8 (edges and corners).

    Returns:
        NumPy int32 [N], equal to `count_clusters`.

    Raises:
        ValueError: for another connectivity, shape or dtype.

    References:
        arXiv 2311.17434 (ANC).
    """
    from scipy import ndimage  # Lazily: `import gse_jax` stays light.

    mask = np.asarray(mask)
    _check(mask, connectivity)
    if mask.size == 0:
        return np.zeros(mask.shape[0], np.int32)
    # One call for the whole batch: the structure joins nothing along the image axis.
    structure = np.zeros((3, 3, 3), bool)
    structure[1] = ndimage.generate_binary_structure(2, 1 if connectivity == 4 else 2)
    labels, total = ndimage.label(mask, structure)
    changed = np.flatnonzero(mask)
    owner = np.empty(total, np.int64)
    owner[labels.reshape(-1)[changed] - 1] = changed // mask[0].size
    return np.bincount(owner, minlength=mask.shape[0]).astype(np.int32)


def num_clusters(x, adversarials, *, connectivity=4):
    """Count the clusters of changed pixels; the mean over successes is the paper's ANC.

    Args:
        x: clean images, [N, H, W, C].
        adversarials: perturbed images, same shape and range.
        connectivity: 4 (edges, the paper's) or 8 (edges and corners), static.

    Returns:
        int32 [N]; 0 for an unchanged image.

    Raises:
        ValueError, TypeError: as `changed_mask` and `count_clusters`.

    References:
        arXiv 2311.17434 (ANC, average number of clusters).
    """
    return count_clusters(changed_mask(x, adversarials), connectivity=connectivity)


def num_clusters_host(x, adversarials, *, connectivity=4):
    """Count the clusters of changed pixels on the host; not jittable, fast on a CPU.

    Args:
        x: clean images, [N, H, W, C], concrete.
        adversarials: perturbed images, same shape and range.
        connectivity: 4 (edges, the paper's) or 8 (edges and corners).

    Returns:
        NumPy int32 [N], equal to `num_clusters`.

    Raises:
        ValueError, TypeError: as `changed_mask` and `count_clusters_host`.

    References:
        arXiv 2311.17434 (ANC).
    """
    return count_clusters_host(changed_mask(x, adversarials), connectivity=connectivity)
