"""Count connected clusters of changed pixels, in the compiled graph or on the host.

`num_clusters` labels the clusters inside the compiled graph (`ops/clusters.py`); `num_clusters_host`
gives the same numbers through SciPy and is the faster one on a CPU.

Differs from the reference:
    The published code counts with a depth-first search from a random start, on the host, image by
    image; an older version of it was 8-connected. Ours is 4-connected unless told otherwise.

References:
    arXiv 2311.17434 (ANC).
"""

import jax.numpy as jnp
import numpy as np

from gse_jax import ops
from gse_jax.metrics.sparsity import changed_mask
from gse_jax.ops.clusters import STEPS


def _check(mask, connectivity):
    if connectivity not in STEPS:
        raise ValueError(f"connectivity must be 4 or 8, got {connectivity}")
    if mask.ndim != 3 or mask.dtype != bool:
        raise ValueError(f"mask must be bool [N, H, W], got {mask.dtype} {mask.shape}")


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
    return ops.count_clusters(mask, connectivity)[0]


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
