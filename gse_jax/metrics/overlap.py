"""Compare where a perturbation lies with where the model looks, against random placement.

A score alone says little: if the salient region covers 20 % of the image, a perturbation thrown
anywhere hits it 20 % of the time. So the score comes with its control: the same mask, same size,
same shape, moved to every position of the image (wrapping around at the borders). All H * W
positions are evaluated at once by a Fourier correlation, so the control is exact: no random key,
no sampling error.

The control does not know that objects, and with them maps and perturbations, tend to lie in the
middle. To rule that out as well, compare with the masks of *other* images:
`overlap_score(x, x + jnp.roll(adversarials - x, 1, axis=0), maps)`.

References:
    arXiv 2311.17434 compares perturbations and class activation maps by eye; the score and its
    control are ours.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gse_jax.metrics.sparsity import changed_mask


class Overlap(NamedTuple):
    """Hold the overlap of perturbations and heat maps with its random-placement control.

    Attributes:
        score: [N] in [0, 1]; share of the changed pixels that lie in the salient region.
        control: [N]; the mean score over all placements of the same mask, which is the area
            share of the salient region. `score / control` is the lift over chance.
        control_deviation: [N]; standard deviation of the score over all placements. Larger for
            clustered masks, which are all in or all out.
        p_value: [N] in (0, 1]; share of the placements that score at least as high, the actual
            one included.
    """

    score: jax.Array
    control: jax.Array
    control_deviation: jax.Array
    p_value: jax.Array


def salient_region(maps, top_share=0.2):
    """Mark the pixels of each map that lie above the rest: the top share of its area.

    Args:
        maps: [N, H, W] finite.
        top_share: share of the pixels to mark, static, in (0, 1); floor(top_share * H * W)
            pixels. Where values tie at the threshold fewer are marked, none for a constant map.

    Returns:
        bool [N, H, W].

    Raises:
        ValueError: if maps is not [N, H, W] or top_share is not in (0, 1).

    References:
        None; ours.
    """
    maps = jnp.asarray(maps)
    if maps.ndim != 3:
        raise ValueError(f"maps must be [N, H, W], got {maps.shape}")
    if not 0 < top_share < 1:
        raise ValueError(f"top_share must lie in (0, 1), got {top_share}")
    pixels = math.prod(maps.shape[1:])
    ranked = jnp.sort(maps.reshape(-1, pixels), axis=1)
    threshold = ranked[:, pixels - 1 - math.floor(top_share * pixels)]
    return maps > threshold[:, None, None]


@functools.partial(jax.jit, static_argnames="top_share")
def overlap_score(x, adversarials, maps, *, top_share=0.2):
    """Score how much of each perturbation lies where the model looks, and compare with chance.

    Args:
        x: clean images, [N, H, W, C].
        adversarials: perturbed images, same shape and range.
        maps: heat maps at the images' size, [N, H, W] finite, e.g. `resize_map(cam(...))`.
        top_share: share of the image that counts as salient, static, in (0, 1).

    Returns:
        `Overlap`, jittable. By convention an unchanged image has score, control and deviation 0
        and p-value 1; so has a constant map, which has no salient region.

    Raises:
        ValueError: if shapes do not fit or top_share is not in (0, 1).
        TypeError: as `perturbation`.

    References:
        None; ours.
    """
    mask, region = changed_mask(x, adversarials), salient_region(maps, top_share)
    if region.shape != mask.shape:
        raise ValueError(f"maps {region.shape} do not fit the images {mask.shape}")
    real = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
    spectra = [jnp.fft.rfft2(part.astype(real)) for part in (region, mask)]
    # hits[n, i, j]: changed pixels inside the region after moving the mask by (i, j).
    hits = jnp.fft.irfft2(spectra[0] * jnp.conj(spectra[1]), s=mask.shape[1:])
    hits = jnp.round(hits).astype(jnp.int32)  # Counts: rounding removes the transform's error.
    changed = jnp.sum(mask, axis=(1, 2), dtype=jnp.int32)[:, None, None]
    scores = hits.astype(real) / jnp.maximum(changed, 1).astype(real)
    as_good = jnp.sum(hits >= hits[:, :1, :1], axis=(1, 2), dtype=jnp.int32)
    return Overlap(
        score=scores[:, 0, 0],
        control=jnp.mean(scores, axis=(1, 2)),
        control_deviation=jnp.std(scores, axis=(1, 2)),
        p_value=as_good.astype(real) / math.prod(mask.shape[1:]),
    )
