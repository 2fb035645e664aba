r"""Superpixels as groups: sums, shrinkage, the prox of the group count, the Bregman projection.

Superpixels differ in size and number from image to image, so sums are kept in one place per pixel,
which no numbering from 0 can exceed; shapes stay the same for all images.

References:
    Fan et al., Sparse adversarial attack via perturbation factorization, ECCV 2020, section 3.3
    (group sparsity of the selection).
    Zhu, Chen, Wang, Sparse and imperceptible adversarial attack via a homotopy algorithm,
    arXiv 2106.06027, section 4.2 (l0 with box); arXiv 2311.17434, appendix (its group version).
    github jsve96/GSMD, attacks.py, GSMD_slic (Bregman projection).
"""

import jax.numpy as jnp
from jax import lax

from gse_jax.ops.bregman import fitting_radii
from gse_jax.ops.projections import safe_sqrt


def superpixel_sums(values, segments):
    """Sum a map over superpixels.

    Args:
        values: [H, W].
        segments: [H, W] int32 superpixel of every pixel, from 0, below H * W.

    Returns:
        [H * W] sum of each superpixel, 0 where there is none of that number.
    """
    return jnp.zeros(segments.size, values.dtype).at[segments.reshape(-1)].add(values.reshape(-1))


def superpixel_soft_threshold(v, tradeoff, segments):
    r"""Solve argmin_z 1/2 |z - v|^2 + tradeoff * sum_superpixels |z_s|_2.

    Args:
        v: [H, W].
        tradeoff: [] >= 0.
        segments: [H, W] int32, as in `superpixel_sums`.

    Returns:
        [H, W] `max(0, 1 - tradeoff / |v_s|) v`.
    """
    norm = safe_sqrt(superpixel_sums(v * v, segments))
    active = norm > tradeoff
    shrink = jnp.where(active, 1.0 - tradeoff / jnp.where(active, norm, 1.0), 0.0)
    return v * shrink[segments]


def largest_scores(score, count):
    """Mark the largest scores; unlike in `largest_pixels` their number need not be static.

    Args:
        score: [N] >= 0.
        count: [] int32.

    Returns:
        [N] bool with `count` True, all if `count` > N; of equal scores the first.
    """
    # The bits of floats >= 0 are in the order of the floats; abs turns -0 into 0.
    bits = lax.bitcast_convert_type(jnp.abs(score), f"int{8 * score.dtype.itemsize}")
    top = jnp.iinfo(bits.dtype).bits - 2

    def set_bit(step, edge):
        trial = edge | (jnp.ones((), bits.dtype) << (top - step).astype(bits.dtype))
        return jnp.where(jnp.sum(bits >= trial, dtype=jnp.int32) >= count, trial, edge)

    # A loop over the bits of the smallest score that is kept: a tenth of the time of a sort.
    edge = lax.fori_loop(0, top + 1, set_bit, jnp.zeros((), bits.dtype))
    above, tied = bits > edge, bits == edge
    room = count - jnp.sum(above, dtype=jnp.int32)
    return above | (tied & (jnp.cumsum(tied, dtype=jnp.int32) <= room))


def count_groups(x, segments):
    """Count the groups in which a perturbation is not zero.

    Args:
        x: [H, W, C].
        segments: [H, W] int32, as in `superpixel_sums`; None if every entry is its own group.

    Returns:
        [] int32.
    """
    changed = x != 0.0
    if segments is not None:
        pixels = jnp.any(changed, axis=-1).astype(x.dtype)
        changed = superpixel_sums(pixels, segments) > 0.0
    return jnp.sum(changed, dtype=jnp.int32)


def count_prox(v, tradeoff, lower, upper, most, segments):
    r"""Solve argmin_z 1/2 |z - v|^2 + tradeoff * (groups of z), lower <= z <= upper.

    At most `most` groups may be non-zero. Keeping a group saves `|v_g|^2 - |v_g - clip(v_g)|^2`;
    the largest savings above `2 tradeoff` are kept. It needs lower <= 0 <= upper.

    Args:
        v: [H, W, C].
        tradeoff: [] >= 0.
        lower: [H, W, C] <= 0.
        upper: [H, W, C] >= 0.
        most: [] int32.
        segments: [H, W] int32, as in `superpixel_sums`; None if every entry is its own group.

    Returns:
        [H, W, C].

    References:
        arXiv 2106.06027, eq. (9).
    """
    inside = jnp.clip(v, lower, upper)
    saved = group_savings(v, inside, segments)
    kept = (saved > 2.0 * tradeoff) & largest_scores(saved, most)
    kept = kept[segments][..., None] if segments is not None else kept.reshape(v.shape)
    return jnp.where(kept, inside, 0.0)


def group_savings(v, inside, segments):
    """Return by how much each group's squared distance to `v` falls if it is kept.

    Args:
        v: [H, W, C].
        inside: [H, W, C] `v` clipped.
        segments: as in `count_prox`.

    Returns:
        [H * W] for superpixels, [H * W * C] for entries; >= 0.
    """
    # Not as a difference of squares: those of a long step cancel in float32.
    saved = inside * (2.0 * v - inside)
    if segments is not None:
        return superpixel_sums(jnp.sum(saved, axis=-1), segments)
    return saved.reshape(-1)


def project_superpixel_maxima(z, segments, budget, lower, upper):
    r"""Solve argmin_x D_phi(x, x_0) with sum_s max_{i in s} |x_i| <= budget, lower <= x <= upper.

    The same problem and solution as `project_group_maxima`, for groups that differ from image to
    image.

    Args:
        z: [H, W, C] dual point.
        segments: [H, W] int32, as in `superpixel_sums`.
        budget: [] > 0.
        lower: [H, W, C] <= 0.
        upper: [H, W, C] >= 0.

    Returns:
        [H, W, C].
    """
    size = jnp.abs(z)
    side = jnp.where(z >= 0.0, upper, -lower)
    reach = jnp.minimum(size, jnp.log1p(side))
    label = jnp.broadcast_to(segments[..., None], z.shape).reshape(-1)
    label, falling, weight = lax.sort((label, -reach.reshape(-1), size.reshape(-1)), num_keys=2)
    first = jnp.concatenate([jnp.ones(1, bool), label[1:] != label[:-1]])

    # Sums that begin anew at every superpixel, rather than differences of one long sum.
    def add(left, right):
        return (jnp.where(right[2], right[0], left[0] + right[0]),
                jnp.where(right[2], right[1], left[1] + right[1]), left[2] | right[2])

    sums, rank, _ = lax.associative_scan(add, (weight, jnp.ones_like(weight), first))

    def dual_radii(multiplier):
        cut = jnp.minimum(-falling, (sums - multiplier) / rank)
        return jnp.zeros(segments.size, z.dtype).at[label].max(cut)

    radius = fitting_radii(dual_radii, jnp.max(sums), budget)[segments][..., None]
    return jnp.sign(z) * jnp.minimum(jnp.minimum(jnp.expm1(size), side), radius)
