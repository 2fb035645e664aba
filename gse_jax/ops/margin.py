"""The Carlini-Wagner margin and the success test, for one image.

References:
    Carlini, Wagner, Towards evaluating the robustness of neural networks, arXiv 1608.04644,
    section V-A, f6 with kappa = 0; arXiv 2311.17434, section 2.1.
"""

import jax.numpy as jnp


def logit_gap(logits, label):
    """Return by how much a class leads all others, `Z_label - max_{i != label} Z_i`.

    Args:
        logits: [K] of one image.
        label: [] int.

    Returns:
        [] any sign; NaN when `label` is not in [0, K): indexing would silently clamp it to a wrong class.
    """
    label = jnp.asarray(label, jnp.int32)
    chosen = jnp.arange(logits.shape[0], dtype=jnp.int32) == label
    own = jnp.sum(jnp.where(chosen, logits, 0.0))
    other = jnp.max(jnp.where(chosen, -jnp.inf, logits))
    return jnp.where((label >= 0) & (label < logits.shape[0]), own - other, jnp.nan)


def signed_margin(logits, label, *, targeted):
    """Return how far one image is from being adversarial, negative beyond the boundary.

    Args:
        logits: [K] of one image.
        label: [] int; the true label (untargeted) or the target (targeted).
        targeted: bool; direction of the attack.

    Returns:
        [] `logit_gap` of the label, of the target with the other sign.
    """
    gap = logit_gap(logits, label)
    return -gap if targeted else gap


def margin_loss(logits, label, *, targeted):
    """Return how far one image is from being adversarial, at least 0.

    Args:
        logits: [K] of one image.
        label: [] int; the true label (untargeted) or the target (targeted).
        targeted: bool; direction of the attack.

    Returns:
        [] untargeted `max(0, Z_y - max_{i != y} Z_i)`, targeted `max(0, max_{i != t} Z_i - Z_t)`.
        NaN when `label` is not in [0, K). Where two classes tie its derivative is the margin's, not 0: else
        an image that lies on the boundary could not be moved off it.
    """
    margin = signed_margin(logits, label, targeted=targeted)
    return jnp.where(margin < 0.0, 0.0, margin)


def is_adversarial(logits, label, *, targeted):
    """Tell whether the predicted class of one image is what the attack wants.

    Args:
        logits: [K] of one image.
        label: [] int; the true label (untargeted) or the target (targeted).
        targeted: bool; direction of the attack.

    Returns:
        [] bool; False when any logit is NaN or infinite (argmax of NaN would "fool" any label).
    """
    hit = jnp.argmax(logits).astype(jnp.int32) == jnp.asarray(label, jnp.int32)
    return jnp.all(jnp.isfinite(logits)) & (hit if targeted else ~hit)
