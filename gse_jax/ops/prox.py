"""Proximal maps of |z|^p for p in {0, 1/2, 2/3, 1}, elementwise, value and gradient finite everywhere.

Convention of this module: `prox(v) = argmin_z (z - v)^2 + tradeoff * |z|^p`, *without* a factor 1/2
in front of the square, as the GSE paper writes it. In the more common convention the same map is
the prox of `tradeoff / 2`.

References:
    Sadiku, Wagner, Pokutta, GSE, arXiv 2311.17434, section 2.2.
    Xu, Chang, Xu, Zhang, L1/2 regularization, 2012, doi 10.1109/tnnls.2012.2197412 (p = 1/2).
    Cao, Sun, Xu, Fast image deconvolution using closed-form thresholding formulas of Lq
    (q = 1/2, 2/3) regularization, 2013, doi 10.1016/j.jvcir.2012.10.006.
"""

import math

import jax
import jax.numpy as jnp

# Threshold of the 1/2-quasinorm: (54^(1/3) / 4) * tradeoff^(2/3), Xu et al. 2012, eq. (11).
_HALF_THRESHOLD = 54.0 ** (1.0 / 3.0) / 4.0
# From an error of at most 0.05 after the first: 5e-3, 5e-5, 6e-9, below 1e-16.
_NEWTON_STEPS = 4


def half_quasinorm_threshold(tradeoff):
    r"""Return the largest |v| that the 1/2-quasinorm prox maps to zero.

    Args:
        tradeoff: [...] weight of the quasinorm, >= 0.

    Returns:
        [...] `(54^(1/3) / 4) * tradeoff^(2/3)`.
    """
    root = jnp.cbrt(tradeoff)  # squared after the root: tradeoff^2 would overflow float32
    return _HALF_THRESHOLD * root * root


def survives_half_quasinorm(v, tradeoff):
    r"""Tell where the 1/2-quasinorm prox is not zero.

    Args:
        v: [...] real.
        tradeoff: broadcastable to `v`, >= 0.

    Returns:
        [...] bool, `|v| > half_quasinorm_threshold(tradeoff)`, compared as powers of 3/2: a square
        root takes CPUs a fortieth of the time of a cube root.
    """
    size = jnp.abs(v)
    return size * jnp.sqrt(size) > _HALF_THRESHOLD**1.5 * tradeoff


@jax.custom_jvp
def half_quasinorm_prox(v, tradeoff):
    r"""Solve argmin_z (z - v)^2 + tradeoff * |z|^(1/2), elementwise.

    Args:
        v: [...] real, any range.
        tradeoff: broadcastable to `v`, >= 0.

    Returns:
        [...] the minimiser; 0 where |v| is at most the threshold (also at a tie).

    The derivative is that of the stationarity condition `2 (z - v) + (tradeoff / 2) z^(-1/2) = 0`
    on the active set, zero off it (the jump at the threshold has none).

    References:
        Xu et al. 2012, theorem 1; arXiv 2311.17434, eq. (4).

    Differs from the reference:
        The cubic equation behind the published cosine of a third of an arccosine is solved by
        Newton's method instead, to rounding and in a tenth of the time on a CPU.
    """
    active = survives_half_quasinorm(v, tradeoff)
    # The branch not taken must be finite too: jax_debug_nans looks at it.
    safe_size = jnp.where(active, jnp.abs(v), 1.0)
    safe_tradeoff = jnp.where(active, tradeoff, 0.0)
    inverse = 1.0 / safe_size
    # u = sqrt(z / v) is the largest root of u^3 - u + kappa. kappa = tradeoff |v|^(-3/2) / 4, multiplied
    # in an order that cannot overflow, is at most sqrt(2/27) on the active set, and u in [sqrt(2/3), 1].
    kappa = (0.25 * safe_tradeoff * inverse) * jnp.sqrt(inverse)
    root = 1.0 - 0.5 * kappa  # the first step from 1
    for _ in range(_NEWTON_STEPS):
        square = root * root
        root -= (root * (square - 1.0) + kappa) / (3.0 * square - 1.0)
    return jnp.where(active, v * (root * root), 0.0)


@half_quasinorm_prox.defjvp
def _half_quasinorm_jvp(primals, tangents):
    v, tradeoff = primals
    z = half_quasinorm_prox(v, tradeoff)
    size = jnp.where(z != 0.0, jnp.abs(z), 1.0)
    root = jnp.sqrt(size)
    # Off the active set too, 1 - tradeoff / 8 must not vanish: second derivatives divide by it.
    safe_tradeoff = jnp.where(z != 0.0, tradeoff, 0.0)
    by_v = jnp.where(z != 0.0, 1.0 / (1.0 - (0.125 * safe_tradeoff / size) / root), 0.0)
    by_tradeoff = -0.25 * jnp.sign(z) / root * by_v
    return z, by_v * tangents[0] + by_tradeoff * tangents[1]


@jax.custom_jvp
def two_thirds_quasinorm_prox(v, tradeoff):
    r"""Solve argmin_z (z - v)^2 + tradeoff * |z|^(2/3), elementwise.

    Args:
        v: [...] real, any range.
        tradeoff: broadcastable to `v`, >= 0.

    Returns:
        [...] the minimiser; 0 where |v| <= (2/3) * (3 * tradeoff^3)^(1/4).

    References:
        Cao, Sun, Xu 2013, eq. (10).
    """
    size = jnp.abs(v)
    # Thresholds below the dtype's own resolution of |v| change nothing but divide by zero.
    positive = tradeoff > 0.0
    quarter = jnp.sqrt(jnp.sqrt(jnp.where(positive, tradeoff, 1.0)))
    threshold = (2.0 / 3.0) * 3.0**0.25 * quarter**3
    active = positive & (size > threshold)
    safe_size = jnp.where(active, size, threshold)
    # In units of the threshold the problem has no scale left; beyond 1e12 thresholds the prox is v.
    ratio = jnp.minimum(safe_size / threshold, 1e12)
    phi = jnp.arccosh((0.75 * math.sqrt(3.0)) * ratio * ratio)
    scale = (2.0 / math.sqrt(3.0)) * (1.5 / 3.0**0.25) ** (1.0 / 3.0)
    a = scale * jnp.sqrt(jnp.cosh(phi / 3.0))
    shrunk = ((a + jnp.sqrt(2.0 * ratio / a - a * a)) * 0.5) ** 3 / ratio
    return jnp.where(active, v * shrunk, jnp.where(positive, 0.0, v))


@two_thirds_quasinorm_prox.defjvp
def _two_thirds_quasinorm_jvp(primals, tangents):
    v, tradeoff = primals
    z = two_thirds_quasinorm_prox(v, tradeoff)
    size = jnp.where(z != 0.0, jnp.abs(z), 1.0)
    root = jnp.cbrt(size)
    safe_tradeoff = jnp.where(z != 0.0, tradeoff, 0.0)  # as above
    # Compiled, this is a division by size * root. That underflows where z is tiny, as only a z that nothing
    # shrinks can be.
    curved = jnp.where(safe_tradeoff > 0.0, size, 1.0)
    by_v = jnp.where(z != 0.0, 1.0 / (1.0 - (safe_tradeoff / 9.0 / curved) / jnp.cbrt(curved)), 0.0)
    by_tradeoff = -jnp.sign(z) / (3.0 * root) * by_v
    return z, by_v * tangents[0] + by_tradeoff * tangents[1]


def soft_threshold(v, tradeoff):
    r"""Solve argmin_z (z - v)^2 + tradeoff * |z|, elementwise.

    Args:
        v: [...] real, any range.
        tradeoff: broadcastable to `v`, >= 0.

    Returns:
        [...] `sign(v) * max(|v| - tradeoff / 2, 0)`.
    """
    return jnp.where(jnp.abs(v) > 0.5 * tradeoff, v - 0.5 * tradeoff * jnp.sign(v), 0.0)


def hard_threshold(v, tradeoff):
    r"""Solve argmin_z (z - v)^2 + tradeoff * [z != 0], elementwise.

    Args:
        v: [...] real, any range.
        tradeoff: broadcastable to `v`, >= 0.

    Returns:
        [...] `v` where v^2 > tradeoff, else 0.
    """
    return jnp.where(v * v > tradeoff, v, 0.0)
