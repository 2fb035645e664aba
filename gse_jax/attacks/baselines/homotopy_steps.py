r"""The formulas of the homotopy attack: prox, step length, extrapolated point, tuning.

References:
    Li, Lin, Accelerated proximal gradient methods for nonconvex programming, NeurIPS 2015,
    algorithm 2 and its supplement's version with line search (nmAPG).
    Zhu, Chen, Wang, Sparse and imperceptible adversarial attack via a homotopy algorithm,
    arXiv 2106.06027, algorithms 1 to 3; github VITA-Group/SparseADV_Homotopy, demo_attack.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gse_jax.ops import count_prox, group_savings, superpixel_sums

FIRST_STEP = 1e-3  # alpha_x and alpha_y of a round; demo_attack.py
_SHORTEST_STEP = 1e-20  # alpha_min; demo_attack.py
_SAME = 1e-5  # sum |s| below which two points count as one; demo_attack.py
_MEMORY = 0.9  # eta, of the average of past objectives; demo_attack.py


class Looked(NamedTuple):
    """A point and what the model said there.

    Attributes:
        w: [H, W, C] perturbation.
        loss: [] f there.
        gradient: [H, W, C] of f there.
        groups: [] number of groups that are not zero, as a float.
        fools: [] bool, whether it is a success.
    """

    w: jax.Array  # [H, W, C] float
    loss: jax.Array  # [] float
    gradient: jax.Array  # [H, W, C] float
    groups: jax.Array  # [] float
    fools: jax.Array  # [] bool


def objective(at: Looked, tradeoff):
    """Return F = f + lambda * groups.

    Args:
        at: a point.
        tradeoff: [] lambda.

    Returns:
        [].
    """
    return at.loss + tradeoff * at.groups


class Limits(NamedTuple):
    """What a perturbation may be.

    Attributes:
        lower: [H, W, C] smallest values, <= 0.
        upper: [H, W, C] largest values, >= 0.
        most: [] int32 groups that may be non-zero.
    """

    lower: jax.Array  # [H, W, C] float
    upper: jax.Array  # [H, W, C] float
    most: jax.Array  # [] i32


def prox_step(at: Looked, length, tradeoff, limits: Limits, segments):
    """Do one proximal gradient step.

    Args:
        at: where from.
        length: [] alpha.
        tradeoff: [] lambda.
        limits: Limits.
        segments: [H, W] int32 superpixels, None for entries.

    Returns:
        [H, W, C].
    """
    return count_prox(at.w - length * at.gradient, length * tradeoff, limits.lower, limits.upper,
                      limits.most, segments)


def longest_step(tradeoff, radius, entries):
    """Return twice the step that brings every kept pixel of the prox to its bound.

    A value is kept from `radius |g| > lambda` on, and at its bound after `radius / |g|`. A superpixel
    shares its lambda among its entries: those whose gradient is its mean get there, flatter ones may not.

    Args:
        tradeoff: [] lambda.
        radius: [] largest change of a value.
        entries: [] of the largest group.

    Returns:
        [].
    """
    # A gradient of 0 gives lambda = 0; the step then only has to be finite.
    return 2.0 * radius * radius * entries / jnp.maximum(tradeoff, 1e-20)


def largest_group(image, segments):
    """Return the number of entries of the largest group.

    Args:
        image: [H, W, C].
        segments: [H, W] int32 superpixels, None for entries.

    Returns:
        [] float.
    """
    if segments is None:
        return jnp.ones((), image.dtype)
    pixels = superpixel_sums(jnp.ones(segments.shape, image.dtype), segments)
    return image.shape[-1] * jnp.max(pixels)


def spectral_length(here: Looked, before: Looked, longest):
    """Return the Barzilai-Borwein step length `s.r / r.r` between two points.

    Args:
        here: one point.
        before: the other.
        longest: [] bound on the length.

    Returns:
        [] > 0; the bound where the points are the same.
    """
    s, r = here.w - before.w, here.gradient - before.gradient
    square = jnp.sum(r * r)
    length = jnp.sum(s * r) / jnp.where(square > 0.0, square, 1.0)
    moved = (jnp.sum(jnp.abs(s)) >= _SAME) & (square > 0.0)
    return jnp.clip(jnp.where(moved, length, longest), _SHORTEST_STEP, longest)


def accelerated(x, before, z, inertia, inertia_before, limits: Limits):
    """Return the extrapolated point y, inside the box.

    Args:
        x: [H, W, C] iterate.
        before: [H, W, C] the one before.
        z: [H, W, C] last result of the step from y.
        inertia: [] t_k.
        inertia_before: [] t_{k-1}.
        limits: Limits.

    Returns:
        [H, W, C].
    """
    y = x + (inertia_before / inertia) * (z - x) + ((inertia_before - 1.0) / inertia) * (x - before)
    return jnp.clip(y, limits.lower, limits.upper)


def remembered(average, weight, latest):
    """Update the average of past objectives that a step must not exceed.

    Args:
        average: [] c_k.
        weight: [] q_k.
        latest: [] F of the new iterate.

    Returns:
        (c_{k+1}, q_{k+1}).
    """
    heavier = _MEMORY * weight + 1.0
    return (_MEMORY * weight * average + latest) / heavier, heavier


def first_tradeoff(gradient, limits: Limits, segments):
    """Return the largest lambda for which the first prox step from 0 is not 0.

    Args:
        gradient: [H, W, C] of f at 0.
        limits: Limits.
        segments: [H, W] int32 superpixels, None for entries.

    Returns:
        [] >= 0.
    """
    v = -FIRST_STEP * gradient
    saved = group_savings(v, jnp.clip(v, limits.lower, limits.upper), segments)
    return jnp.max(saved) / (2.0 * FIRST_STEP)


def tuned(x: Looked, limits: Limits, loss_step, norm_step):
    """Do one step of the tuning on the support: lower the loss and the largest entry.

    Args:
        x: where from.
        limits: Limits.
        loss_step: [] step along the gradient of f.
        norm_step: [] step along the subgradient of the l-infinity norm.

    Returns:
        [H, W, C], zero where x is.
    """
    size = jnp.abs(x.w)
    top = size == jnp.max(size)
    peak = jnp.where(top, jnp.sign(x.w), 0.0) / jnp.sum(top, dtype=size.dtype)
    moved = jnp.clip(x.w - norm_step * peak - loss_step * x.gradient, limits.lower, limits.upper)
    return jnp.where(x.w != 0.0, moved, 0.0)
