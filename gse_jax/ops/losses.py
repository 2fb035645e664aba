"""Losses of one image that the compared attacks maximise or minimise, and never clip.

References:
    Madry et al., arXiv 1706.06083, section 2.1 (cross entropy).
"""

import jax
import jax.numpy as jnp


def cross_entropy(logits, label):
    """Return `log(sum exp Z) - Z_label` of one image.

    Args:
        logits: [K].
        label: [] int.

    Returns:
        [] >= 0; NaN when `label` is not in [0, K).
    """
    label = jnp.asarray(label, jnp.int32)
    chosen = jnp.arange(logits.shape[0], dtype=jnp.int32) == label
    # Not through log-probabilities: an infinite logit of another class must not become 0 * inf.
    loss = jax.nn.logsumexp(logits) - jnp.sum(jnp.where(chosen, logits, 0.0))
    return jnp.where((label >= 0) & (label < logits.shape[0]), loss, jnp.nan)


def smooth_l0_gradient(w, sigma):
    r"""Return the gradient of the smooth l0 norm `mean_j w_j^2 / (w_j^2 + sigma)`.

    Args:
        w: [...].
        sigma: [] > 0.

    Returns:
        [...] `2 sigma w / (w^2 + sigma)^2 / size`.

    References:
        arXiv 2402.01879, eq. (4).
    """
    denominator = w * w + sigma
    return (2.0 * sigma / w.size) * w / (denominator * denominator)
