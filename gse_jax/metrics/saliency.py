r"""Measure how well a perturbation falls onto the pixels that matter to the model: ASM and IS.

Symbols: Z_c logit of class c, t target class, y true class, w perturbation,
nu_P the P-th percentile of the non-zero values of one image's saliency map.

    ASM(x) = dZ_t/dx * |dZ_y/dx|                     (elementwise)
    IS_P   = || 1[ASM > nu_P] * w ||_2 / ||w||_2

Differs from the reference:
    The published code sets the targets of the whole batch in every row, so in batches larger than
    one each image's map is a sum over all the batch's classes; here every image has its own. It
    takes rank ceil(P (n + 1) / 100) of n values; ours is the nearest rank, ceil(P n / 100). It
    pools failed attacks that moved the image into the score; here the caller chooses, by mask.
    The sign condition of Papernot et al. is off there, and it is off here (the paper's formula).

References:
    Papernot et al., "The Limitations of Deep Learning in Adversarial Settings", arXiv 1511.07528;
    Xu et al., "Structured Adversarial Attack", arXiv 1808.01664 (ASM and IS); arXiv 2311.17434.
"""

from fractions import Fraction
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from gse_jax.metrics.sparsity import perturbation

PERCENTILES = (50, 60, 70, 80, 90)  # arXiv 2311.17434, figure of IS versus percentile.


def require_labels(name, labels, num_images, num_classes):
    """Return class labels as int32 [N], refusing those that JAX would silently misread.

    Args:
        name: what to call the labels in an error.
        labels: integer class labels, [N].
        num_images: N.
        num_classes: number of classes.

    Returns:
        int32 [N].

    Raises:
        TypeError: if the labels are not integers.
        ValueError: if there is not one label per image, or a concrete label is outside
            [0, num_classes); traced labels cannot be checked.

    References:
        None; indexing with an out-of-range label gives another class's logit in JAX.
    """
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"{name} must be integer class labels, got {labels.dtype}")
    if labels.shape != (num_images,):
        raise ValueError(f"{name} must have shape ({num_images},), got {labels.shape}")
    if not isinstance(labels, jax.core.Tracer):
        values = np.asarray(labels)
        if ((values < 0) | (values >= num_classes)).any():
            raise ValueError(f"{name} must lie in [0, {num_classes}), got {values.tolist()}")
    return labels.astype(jnp.int32)


def adversarial_saliency(params, apply_fn, x, y, targets):
    """Compute the adversarial saliency map of every image, at the clean image.

    A large value marks an entry whose increase raises the target's logit and to which the true
    class is sensitive. One forward pass and two backward passes for the whole batch; the model
    must treat images independently (no batch statistics), and then an image's map does not depend
    on its neighbours in the batch.

    Args:
        params: parameters of the model, any pytree.
        apply_fn: (params, x) -> logits [N, classes].
        x: clean images, [N, H, W, C] floating, in the range that `apply_fn` expects.
        y: true classes, int [N].
        targets: target classes, int [N]; for an untargeted attack the class that the adversarial
            image is given by the model.

    Returns:
        [N, H, W, C] of x's dtype; signed.

    Raises:
        TypeError: if labels are not integers, x is not floating, or the model returns no array.
        ValueError: if labels do not fit, or concrete labels are out of range.

    References:
        arXiv 1511.07528; arXiv 1808.01664, section on interpretability.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be floating, got {x.dtype}; use x.astype('float32') / 255 for 8-bit images")

    def rows_of_logits(images):
        logits = apply_fn(params, images)
        if not hasattr(logits, "reshape"):
            raise TypeError(f"apply_fn must return logits [N, K], got a {type(logits).__name__}")
        return logits.reshape(len(images), logits.shape[-1])  # a model may squeeze a batch of one

    with jax.default_matmul_precision("highest"):
        logits, pull_back = jax.vjp(rows_of_logits, x)
    num_classes = logits.shape[-1]
    y = require_labels("y", y, x.shape[0], num_classes)
    targets = require_labels("targets", targets, x.shape[0], num_classes)

    def gradient(labels):
        return pull_back(jax.nn.one_hot(labels, num_classes, dtype=logits.dtype))[0]

    return gradient(targets) * jnp.abs(gradient(y))


def interpretability_score(x, adversarials, saliency, *, percentiles=PERCENTILES):
    """Measure the share of a perturbation's norm that lies on the most salient entries.

    Args:
        x: clean images, [N, H, W, C].
        adversarials: perturbed images, same shape and range.
        saliency: map of the clean images, [N, H, W, C], as `adversarial_saliency` gives.
        percentiles: static numbers in (0, 100]; P keeps the entries above the nearest-rank P-th
            percentile of the image's own non-zero finite saliency values.

    Returns:
        [N, len(percentiles)] in [0, 1]: 1 where the perturbation lies inside the salient set, 0
        outside. By convention 0 for an unchanged image and for an image whose map is zero
        everywhere; select the successes before averaging, so that these do not dilute the mean.

    Raises:
        ValueError: if shapes differ or a percentile is outside (0, 100].
        TypeError: as `perturbation`.

    References:
        arXiv 1808.01664 (IS); arXiv 2311.17434.
    """
    w, saliency = perturbation(x, adversarials), jnp.asarray(saliency)
    if saliency.shape != w.shape:
        raise ValueError(f"saliency {saliency.shape} does not fit the images {w.shape}")
    if np.ndim(percentiles) != 1:
        raise ValueError(f"percentiles must be a list of numbers, got {percentiles!r}; use ({percentiles!r},)")
    if not all(0 < percentile <= 100 for percentile in percentiles):
        raise ValueError(f"percentiles must lie in (0, 100], got {percentiles}")
    return _scores(w, saliency, tuple(percentiles))


@functools.partial(jax.jit, static_argnames="percentiles")
def _scores(w, saliency, percentiles):
    entries = math.prod(w.shape[1:])  # Not -1: a batch of no images must work too.
    saliency, w = saliency.reshape(-1, entries), w.reshape(-1, entries)
    # Relative to the largest entry, so that squares of tiny perturbations do not underflow.
    size = jnp.max(jnp.abs(w), axis=1, keepdims=True)
    energy = jnp.square(w / jnp.where(size > 0, size, 1))
    total = jnp.sum(energy, axis=1)
    total = jnp.where(total > 0, total, 1)

    usable = jnp.isfinite(saliency) & (saliency != 0)
    ranked = jnp.sort(jnp.where(usable, saliency, jnp.inf), axis=1)
    number = jnp.sum(usable, axis=1, dtype=jnp.int32)
    scores = []
    for percentile in percentiles:
        index = jnp.maximum(_nearest_rank(percentile, number) - 1, 0)
        threshold = jnp.take_along_axis(ranked, index[:, None], axis=1)
        inside = jnp.sum(jnp.where(saliency > threshold, energy, 0), axis=1)
        scores.append(jnp.sqrt(jnp.minimum(inside / total, 1)))
    return jnp.stack(scores, axis=1) if scores else jnp.zeros((w.shape[0], 0), w.dtype)


def _nearest_rank(percentile, number):
    """ceil(percentile / 100 * number) in exact integers: float rounding would move whole ranks."""
    share = Fraction(percentile).limit_denominator(1000) / 100
    above, below = share.numerator, share.denominator
    # Split off the quotient, and take the rest's ranks from NumPy's int64: number * above overflows int32.
    ranks = -(-np.arange(below, dtype=np.int64) * above // below)
    return number // below * above + jnp.asarray(ranks, jnp.int32)[number % below]
