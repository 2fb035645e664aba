"""Turn per-image numbers into the protocol's curves: success at a budget, best/average/worst.

Failures are counted, never averaged in: an attack that fails returns the image unchanged, and a
"0 changed pixels" of that kind would make a weak attack look sparse.

Differs from the reference:
    The published code averages the failures of the targeted "average" case in as zeros, and its
    file writer pairs metrics of successes with flags of all images.

References:
    arXiv 2311.17434, targeted protocol (CIFAR-10: label + 1 ... 9; ImageNet: ten labels).
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np


class Statistic(NamedTuple):
    """Describe a sample of one metric over the cases in which an attack succeeded.

    Attributes:
        mean: arithmetic mean, or None for an empty sample (never 0, never NaN).
        median: median, or None for an empty sample.
        standard_error: of the mean; sample standard deviation (n - 1) / sqrt(n) where every case is an
            image of its own, else as if the cases of an image were one draw. None for fewer than two
            images.
        count: n, the number of successes that were averaged.
    """

    mean: float | None
    median: float | None
    standard_error: float | None
    count: int


class TargetedCase(NamedTuple):
    """Hold one row (best, average or worst) of the targeted protocol.

    Attributes:
        metric: `Statistic` over the successes of this case only.
        failures: cases of this kind that were attacked and did not succeed.
        total: all cases of this kind that were attacked; metric.count + failures.
        success_rate: metric.count / total, or None where total is 0.
    """

    metric: Statistic
    failures: int
    total: int
    success_rate: float | None


class TargetedProtocol(NamedTuple):
    """Hold the three rows of the targeted protocol for one metric.

    Attributes:
        best: a case is an image; its smallest value over the targets that were reached; it
            fails where no target was reached.
        average: a case is an image-target pair.
        worst: a case is an image; its largest value; it fails where any target was missed.
    """

    best: TargetedCase
    average: TargetedCase
    worst: TargetedCase


def describe(values, images=None):
    """Return mean, median and standard error of a sample, with None where they do not exist.

    Args:
        values: finite numbers of any shape, concrete; flattened.
        images: which image each value is of, same shape; None where all are different.

    Returns:
        `Statistic` of Python numbers, computed in float64.

    Raises:
        ValueError: if a value is NaN or infinite.

    References:
        arXiv 2311.17434 (all its tables report means); Liang and Zeger, Biometrika 73 (1986), the error
        of a mean over clusters.
    """
    values = np.asarray(values, np.float64).reshape(-1)
    if not np.isfinite(values).all():
        raise ValueError("values hold NaN or infinity: leave failed cases out before averaging")
    n = values.size
    if n == 0:
        return Statistic(None, None, None, 0)
    _, image = np.unique(np.arange(n) if images is None else images, return_inverse=True)
    sums = np.bincount(image.reshape(-1), values - values.mean())
    m = sums.size
    error = float(np.sqrt(m / (m - 1) * np.sum(sums * sums)) / n) if m > 1 else None
    return Statistic(float(values.mean()), float(np.median(values)), error, n)


def success_at_k(counts, success, budgets, *, attacked=None):
    """Return the success rate within each sparsity budget: the curve of ASR versus k. Jittable.

    With `counts = changed_pixels(x, adversarials)` this is ASR@k for pixels, with
    `counts = patch_count(x, adversarials)` ASR@k for patches. The rate at an infinite budget is
    the plain success rate.

    Args:
        counts: cost of each adversarial image, [N], integer or floating.
        success: bool [N]; the returned image fools the model.
        budgets: increasing or not, [K]; an image counts where its cost is <= the budget.
        attacked: None for the denominator "all N images" (an already misclassified image is a
            success at k = 0), or bool [N] for the denominator "attacked images" (typically
            `status != ALREADY_MISCLASSIFIED`); the others then count nowhere.

    Returns:
        float32 [K] in [0, 1]. By convention 0 where the denominator is 0; a caller that needs to
        tell this from a real 0 looks at N or at `attacked`.

    Raises:
        ValueError: if the shapes do not match.

    References:
        Croce et al., "Sparse-RS", arXiv 2006.12834 (success rate under an l0 budget);
        Cina et al., "sigma-zero", arXiv 2402.01879 (ASR at k).
    """
    counts, success, budgets = jnp.asarray(counts), jnp.asarray(success, bool), jnp.asarray(budgets)
    attacked = jnp.ones(success.shape, bool) if attacked is None else jnp.asarray(attacked, bool)
    if counts.ndim != 1 or budgets.ndim != 1:
        raise ValueError(f"counts and budgets are vectors, got {counts.shape}, {budgets.shape}")
    if not counts.shape == success.shape == attacked.shape:
        raise ValueError(
            f"one entry per image: counts {counts.shape}, success {success.shape}, "
            f"attacked {attacked.shape}"
        )
    # One dtype for the comparison; float32 holds every pixel count below 2**24 exactly.
    within = counts.astype(jnp.float32)[None, :] <= budgets.astype(jnp.float32)[:, None]
    hits = jnp.sum(within & (success & attacked)[None, :], axis=1, dtype=jnp.int32)
    total = jnp.maximum(jnp.sum(attacked, dtype=jnp.int32), 1)
    return hits.astype(jnp.float32) / total.astype(jnp.float32)


def targeted_protocol(values, found, *, attacked=None):
    """Compute the paper's best / average / worst numbers of one metric over several targets.

    Each metric gets its own best and worst target, as in the paper: the target with the fewest
    changed pixels need not be the one with the smallest norm. Host-side, concrete arrays.

    Args:
        values: metric of every attack, [T, N] for T targets and N images; ignored where nothing
            was found, so it may be anything there.
        found: bool [T, N]; the attack reached the target.
        attacked: bool [T, N] or None for all; False leaves a pair out of everything, e.g. where
            the clean image already has the target as its prediction. An image without any
            attacked target is no case of `best` and `worst`.

    Returns:
        `TargetedProtocol`. Empty samples give None, not 0 and not NaN.

    Raises:
        ValueError: if the shapes are not equal and two-dimensional, a pair is found but not
            attacked, or a found value is not finite.

    References:
        arXiv 2311.17434, targeted protocol.
    """
    values, found = np.asarray(values, np.float64), np.asarray(found, bool)
    attacked = np.ones(found.shape, bool) if attacked is None else np.asarray(attacked, bool)
    if values.ndim != 2 or not values.shape == found.shape == attacked.shape:
        raise ValueError(
            "values, found and attacked must have one shape [targets, images]; "
            f"got {values.shape}, {found.shape}, {attacked.shape}"
        )
    if (found & ~attacked).any():
        raise ValueError("found is True for a pair that was not attacked")
    if not np.isfinite(values[found]).all():
        raise ValueError("values hold NaN or infinity where found is True")
    smallest = np.min(np.where(found, values, np.inf), axis=0, initial=np.inf)
    largest = np.max(np.where(found, values, -np.inf), axis=0, initial=-np.inf)
    image_attacked = attacked.any(axis=0)
    any_found = found.any(axis=0)
    every_found = image_attacked & (found | ~attacked).all(axis=0)
    images = int(image_attacked.sum())
    return TargetedProtocol(
        best=_case(smallest[any_found], images),
        average=_case(values[found], int(attacked.sum()), np.nonzero(found)[1]),
        worst=_case(largest[every_found], images),
    )


def _case(values, total, images=None):
    statistic = describe(values, images)
    rate = statistic.count / total if total else None
    return TargetedCase(statistic, total - statistic.count, total, rate)
