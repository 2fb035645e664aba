r"""Which smaller support to try next: level sets of a blurred map of what each pixel can do.

Let `p_i` be what pixel i can change in the margin to first order (`power`), B its Gaussian blur, and
M_w the largest B among the allowed pixels of patch w. The support {i : B_i > t} touches exactly the
patches with M_w > t. So with t the (d + 1)-th largest M_w it touches at most d patches, and the
patches it keeps are those that hold the most powerful neighbourhoods: one sort gives the support for
any wanted d_{2,0}. Its closing (`ops.close_patches`) adds every pixel that costs no further patch.

References:
    gse_jax's own method; derived in `docs/refinement.md`. d_{2,0}: arXiv 2311.17434, section 4.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gse_jax.ops import close_patches, dilate, largest_in_patches

_TRUNCATE = 2.0  # standard deviations at which the blur ends
_REACH = 5  # pixels on each side of the support over which a relocated one may spread
_NEVER = 1e30  # rank of pixels that must not be removed


class Proposal(NamedTuple):
    """A support to try.

    Attributes:
        support: [H, W] bool, pixels that may be perturbed.
        given_up: [H, W] bool, what to leave out of the next proposal should this one fail: pixels
            that were removed, or for "relocate" added.
    """

    support: jax.Array  # [H, W] bool
    given_up: jax.Array  # [H, W] bool


def power(x, gradient, low, high):
    """Return what each pixel can change in the margin, to first order, inside the bounds.

    Args:
        x: [H, W, C] clean image.
        gradient: [H, W, C] gradient of the margin.
        low: [] or [H, W, C] smallest value.
        high: [] or [H, W, C] largest value.

    Returns:
        [H, W] sum over channels of |gradient| times the room to move against it, >= 0.
    """
    room = jnp.where(gradient > 0.0, x - low, high - x)
    return jnp.sum(jnp.abs(gradient) * room, axis=-1)


def _above_largest(values, count):
    """Return the smallest t such that at most `count` of `values` exceed it, among the values."""
    ranked, _ = jax.lax.top_k(values.reshape(-1), values.size)  # twice as fast as `sort` on CPU
    return ranked[jnp.clip(count, 0, ranked.size - 1)]


def _blurred(values, sigma):
    """Blur [H, W] with a Gaussian as two matrix products: one kernel each, whatever sigma is."""
    for axis in (0, 1):
        place = jnp.arange(values.shape[axis], dtype=values.dtype)
        apart = place[:, None] - place[None, :]
        weights = jnp.where(jnp.abs(apart) <= _TRUNCATE * sigma, jnp.exp(-0.5 * (apart / sigma) ** 2), 0.0)
        weights = weights / jnp.sum(weights, axis=0, keepdims=True)  # nothing is lost at borders
        values = jnp.tensordot(weights, values, (1, axis), precision="highest")
        values = values if axis == 0 else values.T
    return values


def propose(powers, mask, blocked, move, fraction, num_patches, num_pixels, sigma, *,
            moves: tuple[str, ...], patch_size: int, thin_blur: float = 0.5) -> Proposal:
    """Return the support that a move tries next.

    Args:
        powers: [H, W] of `power`.
        mask: [H, W] bool, pixels perturbed now.
        blocked: [H, W] bool, see `Proposal.given_up`.
        move: [] int32 index into `moves`.
        fraction: [] share of the patches (or pixels) to remove, at least one is.
        num_patches: [] float, patches that `mask` touches.
        num_pixels: [] float, pixels in `mask`.
        sigma: [] standard deviation of the blur, in pixels.
        moves: names: "shrink" (fewer patches inside the closed support), "relocate" (fewer
            patches, near it), "thin" (fewer pixels), "scale" (the same support).
        patch_size: side of the patches.
        thin_blur: share of `sigma` under which "thin" ranks single pixels.

    Returns:
        Proposal.
    """
    is_move = lambda name: (move == moves.index(name)) if name in moves else jnp.zeros((), bool)
    thin, relocate, scale = is_move("thin"), is_move("relocate"), is_move("scale")
    closed = close_patches(mask, patch_size)
    # Single pixels are ranked with little blur: the scale is about the shape of groups.
    blurred = _blurred(powers, jnp.where(thin, thin_blur * sigma, sigma))
    near = dilate(closed, 2 * _REACH + 1) & ~blocked
    allowed = jnp.where(thin | scale, mask, jnp.where(relocate, near, closed))
    # Ranks must stay above those of pixels outside; powers are >= 0.
    rank = jnp.where(blocked & ~relocate, _NEVER, blurred)
    rank = jnp.where(allowed, rank, -1.0)

    now = jnp.minimum(jnp.where(thin, num_pixels, num_patches), mask.size)
    wanted = jnp.clip(jnp.floor(now * (1.0 - fraction)), 1.0, jnp.maximum(now - 1.0, 1.0))
    patches = largest_in_patches(rank, patch_size)
    gap = [(0, a - b) for a, b in zip(mask.shape, patches.shape)]
    patches = jnp.pad(patches, gap, constant_values=-1.0)
    level = _above_largest(jnp.where(thin, rank, patches), wanted.astype(jnp.int32))
    kept = allowed & (rank > level)
    support = jnp.where(thin, kept, close_patches(kept, patch_size))
    support = jnp.where(scale, mask, support)
    given_up = jnp.where(relocate, support & ~closed, allowed & ~support)
    return Proposal(support, given_up)
