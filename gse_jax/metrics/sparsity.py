"""Count and measure what an attack changed: pixels, norms, patches, grid cells, super-pixels.

Every function is pure and jittable, takes the clean and the adversarial images and returns one
number per image. An unchanged image, which is what a failed attack returns, gives 0 everywhere.

Symbols: N images, H rows, W columns, C channels.

Differs from the reference:
    The published code asks whether the channel *mean* of `|w|` is non-zero and whether a patch's
    l2 *norm* is non-zero; both can underflow. Here a pixel counts exactly when a channel differs.

References:
    "GSE: Group-wise Sparse and Explainable Adversarial Attacks", arXiv 2311.17434 (ACP, d_{2,0}).
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from gse_jax.ops import count_patches


def _as_images(x, adversarials):
    """Returns both batches as arrays, or explains why they do not match."""
    if hasattr(adversarials, "adversarials"):
        raise TypeError("adversarials must be images [N, H, W, C], got an attack's result; pass result.adversarials")
    x, adversarials = jnp.asarray(x), jnp.asarray(adversarials)
    if x.ndim != 4 or x.shape != adversarials.shape:
        shapes = f"{x.shape} and {adversarials.shape}"
        raise ValueError(f"x and adversarials must have one shape [N, H, W, C]; got {shapes}")
    floats = [jnp.issubdtype(images.dtype, jnp.floating) for images in (x, adversarials)]
    if floats[0] != floats[1]:
        # Almost always 0-255 images against 0-1 images: every pixel would count as changed.
        raise TypeError(f"x is {x.dtype} but adversarials is {adversarials.dtype}: "
                        "bring both to one scale")
    if floats[0] and x.dtype != adversarials.dtype:
        # One of them was stored with fewer digits: what that changed is no perturbation.
        narrow = min(x.dtype, adversarials.dtype, key=lambda dtype: jnp.finfo(dtype).nmant)
        x, adversarials = x.astype(narrow), adversarials.astype(narrow)
    # At least float32: differences of uint8 wrap around, sums of squares in bfloat16 round badly.
    wide = jnp.float64 in (x.dtype, adversarials.dtype)
    dtype = jnp.float64 if wide else jnp.float32
    return x.astype(dtype), adversarials.astype(dtype)


def _changed_entries(x, adversarials):
    # NaN != NaN, so a broken input image that is returned untouched would count as changed.
    return ~((x == adversarials) | (jnp.isnan(x) & jnp.isnan(adversarials)))


# Compiled: op by op, every new shape would compile a dozen programs and copy the batch each time.
@jax.jit
def perturbation(x, adversarials):
    """Return `w = adversarials - x` in the user's units, exactly 0 where nothing changed.

    Args:
        x: clean images, [N, H, W, C], integer or floating, any range.
        adversarials: perturbed images, same shape, range and kind of dtype.

    Returns:
        [N, H, W, C] float32, or float64 where an input is; 0 where both images hold the same
        infinity or NaN.

    Raises:
        ValueError: if the shapes differ or are not [N, H, W, C].
        TypeError: if one batch is integer and the other floating.

    References:
        arXiv 2311.17434.
    """
    x, adversarials = _as_images(x, adversarials)
    return jnp.where(_changed_entries(x, adversarials), adversarials - x, 0)


@jax.jit
def changed_mask(x, adversarials):
    """Mark the pixels in which any channel was changed.

    Args:
        x: clean images, [N, H, W, C].
        adversarials: perturbed images, same shape and range.

    Returns:
        bool [N, H, W].

    Raises:
        ValueError, TypeError: as `perturbation`.

    References:
        arXiv 2311.17434.
    """
    return jnp.any(_changed_entries(*_as_images(x, adversarials)), axis=-1)


@jax.jit
def changed_pixels(x, adversarials):
    """Count the changed pixels of each image; its mean over successes is the paper's ACP.

    Args:
        x: clean images, [N, H, W, C].
        adversarials: perturbed images, same shape and range.

    Returns:
        int32 [N], between 0 and H * W: pixels, not entries.

    Raises:
        ValueError, TypeError: as `perturbation`.

    References:
        arXiv 2311.17434 (ACP, average number of changed pixels).
    """
    return jnp.sum(changed_mask(x, adversarials), axis=(1, 2), dtype=jnp.int32)


def unit_scale(bounds):
    """Return the factor that takes differences from `bounds` to [-1, 1] units.

    Args:
        bounds: (lo, hi), the range of valid pixels, or None to leave the units alone.

    Returns:
        float: 2 / (hi - lo), or 1.0 for None.

    Raises:
        ValueError: unless these are two finite numbers and hi is the larger one.

    References:
        arXiv 2311.17434 (all its norms are in [-1, 1] units).
    """
    if bounds is None:
        return 1.0
    try:
        low, high = (float(bound) for bound in bounds)
    except (TypeError, ValueError):
        raise ValueError(f"bounds must be two numbers (lo, hi), or None, got {bounds!r}") from None
    if not (high > low and math.isfinite(high - low)):
        raise ValueError(f"bounds must be (lo, hi) with lo < hi, both finite, got {bounds}")
    return 2.0 / (high - low)


def l2_norm(x, adversarials, *, bounds=None):
    """Measure the l2 norm of the perturbation over H, W and C.

    Args:
        x: clean images, [N, H, W, C].
        adversarials: perturbed images, same shape and range.
        bounds: None gives the norm in the images' own units; (lo, hi), the range of valid pixels,
            gives it in [-1, 1] units, as the paper prints it: scaled by 2 / (hi - lo), which
            doubles the number for images in [0, 1] and keeps it for images in [-1, 1].

    Returns:
        float32 [N] (float64 for float64 images), >= 0; its gradient at no change is 0, not NaN.

    Raises:
        ValueError, TypeError: as `perturbation` and `unit_scale`.

    References:
        arXiv 2311.17434.
    """
    return _l2(x, adversarials) * unit_scale(bounds)


@jax.jit
def _l2(x, adversarials):
    squares = jnp.sum(jnp.square(perturbation(x, adversarials)), axis=(1, 2, 3))
    positive = squares > 0
    # Two `where`s: the derivative of sqrt at 0 is infinite, and 0 * infinity is NaN.
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), squares)


def linf_norm(x, adversarials, *, bounds=None):
    """Measure the largest absolute change of any entry.

    Args:
        x: clean images, [N, H, W, C].
        adversarials: perturbed images, same shape and range.
        bounds: as in `l2_norm`: None for the images' own units, (lo, hi) for [-1, 1] units.

    Returns:
        float32 [N] (float64 for float64 images), >= 0; in [-1, 1] units at most 2.

    Raises:
        ValueError, TypeError: as `perturbation` and `unit_scale`.

    References:
        arXiv 2311.17434.
    """
    return _linf(x, adversarials) * unit_scale(bounds)


@jax.jit
def _linf(x, adversarials):
    size = jnp.abs(perturbation(x, adversarials))
    # XLA on CPU drops NaN in a maximum over more than a few hundred entries.
    broken = jnp.any(jnp.isnan(size), axis=(1, 2, 3))
    return jnp.where(broken, jnp.nan, jnp.max(size, axis=(1, 2, 3)))


@functools.partial(jax.jit, static_argnames="patch_size")
def patch_count(x, adversarials, *, patch_size=8):
    """Count the overlapping patches that contain a changed pixel: d_{2,0} of the paper.

    Args:
        x: clean images, [N, H, W, C].
        adversarials: perturbed images, same shape and range.
        patch_size: side n of the square patches, 1 <= n <= min(H, W); stride 1, no padding.
            With 1 this is `changed_pixels`.

    Returns:
        int32 [N], at most (H - n + 1) * (W - n + 1).

    Raises:
        ValueError, TypeError: as `perturbation`; ValueError if no patch of this size fits.

    References:
        arXiv 2311.17434 (d_{2,0}, n = 8).
    """
    _check_side(patch_size)
    mask = changed_mask(x, adversarials)
    return jax.vmap(lambda one: count_patches(one, patch_size))(mask)


@functools.partial(jax.jit, static_argnames=("patch_size", "offset"))
def grid_group_count(x, adversarials, *, patch_size=8, offset=(0, 0)):
    """Count the cells of a fixed, non-overlapping grid that contain a changed pixel: l_{2,0}.

    The older measure: its value depends on where the grid lies (1 to 4 cells for a patch of the
    cell's own size), so the paper replaced it by `patch_count`.

    Args:
        x: clean images, [N, H, W, C].
        adversarials: perturbed images, same shape and range.
        patch_size: side n of the cells, >= 1. Cells cut by the border count as cells.
        offset: (row, column) of a grid corner, static integers; taken modulo n.

    Returns:
        int32 [N].

    Raises:
        ValueError, TypeError: as `perturbation`; ValueError if patch_size is not positive.

    References:
        Xu et al., "Structured Adversarial Attack", arXiv 1808.01664; arXiv 2311.17434.
    """
    _check_side(patch_size)
    mask = changed_mask(x, adversarials)
    pads = []
    for side, start in zip(mask.shape[1:], offset, strict=True):
        before = -start % patch_size
        pads.append((before, -(before + side) % patch_size))
    padded = jnp.pad(mask, ((0, 0), *pads))
    rows, columns = (side // patch_size for side in padded.shape[1:])
    cells = padded.reshape(mask.shape[0], rows, patch_size, columns, patch_size)
    return jnp.sum(jnp.any(cells, axis=(2, 4)), axis=(1, 2), dtype=jnp.int32)


def active_superpixels(x, adversarials, label_map, *, num_groups=None):
    """Count the groups of a given label map that contain a changed pixel.

    Args:
        x: clean images, [N, H, W, C].
        adversarials: perturbed images, same shape and range.
        label_map: group of every pixel, integer [H, W] or [N, H, W]; negative: in no group.
        num_groups: number of groups, static. None takes the largest label + 1, which needs a
            concrete label map. Under tracing, labels beyond it are ignored.

    Returns:
        int32 [N], at most num_groups.

    Raises:
        ValueError: if the label map does not fit the images, holds a label >= num_groups, or is
            traced while num_groups is None; and as `perturbation`.
        TypeError: if the label map is not of integer dtype; and as `perturbation`.

    References:
        Fan et al., "Sparse Adversarial Attack via Perturbation Factorization" (ECCV 2020).
    """
    mask = changed_mask(x, adversarials)
    label_map = jnp.asarray(label_map)
    if not jnp.issubdtype(label_map.dtype, jnp.integer):
        raise TypeError(f"label_map must be of integer dtype, got {label_map.dtype}")
    if label_map.shape not in (mask.shape, mask.shape[1:]):
        raise ValueError(f"label_map {label_map.shape} does not fit the images {mask.shape}")
    if isinstance(label_map, jax.core.Tracer):
        if num_groups is None:
            raise ValueError("num_groups must be given when label_map is traced")
    else:
        largest = int(np.max(label_map)) if label_map.size else -1
        num_groups = largest + 1 if num_groups is None else num_groups
        if largest >= num_groups:
            raise ValueError(f"label_map holds label {largest}, but num_groups is {num_groups}")
    return _count_groups(mask, label_map, num_groups)


@functools.partial(jax.jit, static_argnames="num_groups")
def _count_groups(mask, label_map, num_groups):
    def count(one_mask, one_labels):
        # JAX wraps negative indices around; one past the end is dropped instead.
        # As int32: num_groups would wrap around in the few bits of some label maps.
        index = jnp.where(one_mask & (one_labels >= 0), one_labels.astype(jnp.int32), num_groups)
        hit = jnp.zeros((num_groups,), bool).at[index.reshape(-1)].set(True, mode="drop")
        return jnp.sum(hit, dtype=jnp.int32)

    return jax.vmap(count)(mask, jnp.broadcast_to(label_map, mask.shape))


def _check_side(patch_size):
    if patch_size < 1:
        raise ValueError(f"patch_size must be at least 1, got {patch_size}")
