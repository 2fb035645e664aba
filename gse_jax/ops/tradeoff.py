"""The trade-off (lambda) between margin and sparsity: where it starts and how it grows groups.

References:
    arXiv 2311.17434, section 2.2 (trade-off adaptation, algorithm 1) and appendix (initial value).
"""

import jax.numpy as jnp

from gse_jax.ops.neighbours import dilate, gaussian_blur


def largest_active_tradeoff(gradient, step_size):
    r"""Return the trade-off above which the first prox step from w = 0 stays at zero.

    With p(lambda * s) = (54^(1/3) / 4) (lambda * s)^(2/3) the prox's threshold, the step
    `prox_{lambda * s}(-s g)` is zero iff `s * max|g| <= p(lambda * s)`, that is iff
    `lambda >= (1 / s) * (4 s max|g| / 54^(1/3))^(3/2)`.

    Args:
        gradient: [H, W, C] gradient of the margin at the clean image.
        step_size: [] s > 0.

    Returns:
        [] the trade-off; 0 for a zero gradient.

    Differs from the reference:
        The published code finds this number by doubling and 50 bisections; this is its closed form.
    """
    threshold = 4.0 / 54.0 ** (1.0 / 3.0) * step_size * jnp.max(jnp.abs(gradient))
    # threshold^(3/2); the inner `where` keeps the square root differentiable at 0.
    root = jnp.sqrt(jnp.where(threshold > 0.0, threshold, 1.0))
    return jnp.where(threshold > 0.0, threshold * root, 0.0) / step_size


def update_tradeoff(tradeoff, mask, *, q, blur_size, blur_sigma):
    r"""Lower the trade-off near perturbed pixels and raise it everywhere else.

    With m the mask of perturbed pixels and M its Gaussian blur: `tradeoff / (1 + M)` where M > 0,
    `tradeoff / q` where M = 0. M > 0 is decided by dilation of the mask, not by comparing floats.

    Args:
        tradeoff: [H, W] current map, > 0.
        mask: [H, W] bool, pixels with any perturbed channel.
        q: [] in (0, 1); reduction factor.
        blur_size: odd int; taps per axis of the blur.
        blur_sigma: [] standard deviation of the blur in pixels.

    Returns:
        [H, W] next map.

    References:
        arXiv 2311.17434, eq. (6) to (8).
    """
    blurred = gaussian_blur(mask.astype(tradeoff.dtype), blur_size, blur_sigma)
    near = dilate(mask, blur_size)
    return jnp.where(near, tradeoff / (1.0 + blurred), tradeoff / q)
