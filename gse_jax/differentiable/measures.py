"""How sparse a perturbation is, as functions with useful derivatives.

d_{2,0} and the number of changed pixels are counts: their derivative is 0 wherever it exists. These
are the smooth quantities to descend instead. One number per image, for perturbations in the
[-1, 1] units of the paper.

References:
    arXiv 2311.17434, eq. (1) (the half-quasinorm) and section 4 (d_{2,0}).
    arXiv 2402.01879, eq. (4) (count smoothed by s / (s + smoothing)).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from gse_jax.attacks.validation import is_traced
from gse_jax.metrics import perturbation
from gse_jax.metrics.sparsity import unit_scale


def half_quasinorm(x, adversarials, *, bounds=(0.0, 1.0)):
    """Return `sum |w|^(1/2)` of the perturbation, the sparsity term of GSE.

    Args:
        x: [N, H, W, C] clean images.
        adversarials: [N, H, W, C].
        bounds: (lowest, highest) pixel value.

    Returns:
        [N] >= 0. The derivative by an entry that is not changed is 0 (it would be infinite).

    Raises:
        ValueError: for `bounds` that are not low < high, or shapes that differ.
    """
    return _half_quasinorm(perturbation(x, adversarials) * unit_scale(bounds))


@jax.jit
def _half_quasinorm(w):
    changed = w != 0.0
    # Two `where`s: 0 * infinity would be NaN.
    roots = jnp.sqrt(jnp.where(changed, jnp.abs(w), 1.0))
    return jnp.sum(jnp.where(changed, roots, 0.0), axis=(1, 2, 3))


def smooth_patch_count(x, adversarials, *, patch_size=8, smoothing=0.01, bounds=(0.0, 1.0)):
    """Return a smooth surrogate of d_{2,0}: patches weighted by `s / (s + smoothing)`.

    `s` is the squared l2 norm of the perturbation in a patch (all overlapping patches, stride 1,
    no padding, channels jointly), so a patch counts nearly 1 if it is changed by much more than
    `smoothing`, and 0 if it is not changed. It tends to d_{2,0} from below as `smoothing` -> 0.

    Args:
        x: [N, H, W, C] clean images.
        adversarials: [N, H, W, C].
        patch_size: side of the patches in pixels.
        smoothing: [] > 0, in squared [-1, 1] units.
        bounds: (lowest, highest) pixel value.

    Returns:
        [N] between 0 and d_{2,0}.

    Raises:
        ValueError: if a patch does not fit, for `smoothing` that is not positive, or for `bounds` that
            are not low < high.
    """
    if not is_traced(smoothing) and not np.all(np.asarray(smoothing) > 0.0):
        raise ValueError(f"smoothing={smoothing} must be > 0; an untouched patch would count 0 / 0")
    w = perturbation(x, adversarials) * unit_scale(bounds)
    if not 1 <= patch_size <= min(w.shape[1:3]):
        raise ValueError(f"patch_size={patch_size} must lie between 1 and the image's side "
                         f"{min(w.shape[1:3])}")
    return _smooth_count(w, smoothing, patch_size)


@functools.partial(jax.jit, static_argnames="patch_size")
def _smooth_count(w, smoothing, patch_size):
    squares = jnp.sum(w * w, axis=-1)
    # Sums over windows as differences of cumulative sums would round; the windows are small.
    for axis in (1, 2):
        length = squares.shape[axis] - patch_size + 1
        squares = sum(jax.lax.slice_in_dim(squares, i, i + length, axis=axis)
                      for i in range(patch_size))
    return jnp.sum(squares / (squares + smoothing), axis=(1, 2))
