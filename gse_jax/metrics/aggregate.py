"""Summarise one attack on one set of images: the row that a comparison table prints.

Averages are over found adversarials only, failures are counted beside them, and the success rate
is given with both denominators in use (all images / attacked images), because tables that mix the
two cannot be compared.

Differs from the reference:
    The published code divides by the correctly classified images in one table and by the
    successes in another, and leaves the time of batches without success out of the numerator only.

References:
    arXiv 2311.17434 (ASR, ACP, ANC, l2, d_{2,0}).
"""

from typing import NamedTuple

import numpy as np

from gse_jax.metrics.clusters import num_clusters_host
from gse_jax.metrics.protocol import Statistic, describe
from gse_jax.metrics.sparsity import changed_pixels, l2_norm, patch_count, unit_scale
from gse_jax.types import Status

# What tables call the fields of `ImageMetrics` and `Summary`.
SPARSITY = {"ACP": "changed_pixels", "ANC": "num_clusters", "l2": "l2", "d_{2,0}": "patch_count"}

_CHUNK = 256  # Images per step: 154 MB of float32 at 224 x 224 x 3.


class Summary(NamedTuple):
    """Hold the numbers of one attack on one set of images; `to_dict()` for JSON.

    Attributes:
        num_images: all images, N.
        num_attacked: images whose clean version did not already have the wanted prediction.
        num_found: attacked images for which an adversarial was found (status FOUND).
        num_non_finite: images on which the model or the attack gave NaN or infinity.
        asr_all: images whose returned version fools the model / all images; counts images that
            were misclassified from the start. None where N is 0.
        asr_attacked: found / attacked; None where nothing was attacked.
        asr_all_error: standard error of `asr_all`, sqrt(p (1 - p) / n).
        asr_attacked_error: standard error of `asr_attacked`.
        changed_pixels: `Statistic` over found images; its mean is ACP.
        num_clusters: the same for 4-connected clusters; its mean is ANC.
        l2: the same for the l2 norm in [-1, 1] units.
        patch_count: the same for d_{2,0}.
        gradient_evals: `Statistic` over attacked images, failures included: what was paid.
        forward_evals: the same for forward passes.
        patch_size: side of the patches of d_{2,0}.
    """

    num_images: int
    num_attacked: int
    num_found: int
    num_non_finite: int
    asr_all: float | None
    asr_attacked: float | None
    asr_all_error: float | None
    asr_attacked_error: float | None
    changed_pixels: Statistic
    num_clusters: Statistic
    l2: Statistic
    patch_count: Statistic
    gradient_evals: Statistic
    forward_evals: Statistic
    patch_size: int

    def to_dict(self):
        """Return the same numbers as nested plain dictionaries, ready for JSON."""
        return {
            name: value._asdict() if isinstance(value, Statistic) else value
            for name, value in self._asdict().items()
        }


class ImageMetrics(NamedTuple):
    """Hold the metrics of a batch, one NumPy entry per image; concatenate fields to join batches.

    Attributes:
        changed_pixels: int32 [N].
        num_clusters: int32 [N], 4-connected.
        l2: float [N], in [-1, 1] units.
        patch_count: int32 [N].
        finite: bool [N]; neither image holds NaN or infinity. The others' numbers mean nothing.
    """

    changed_pixels: np.ndarray
    num_clusters: np.ndarray
    l2: np.ndarray
    patch_count: np.ndarray
    finite: np.ndarray


def image_metrics(x, adversarials, *, bounds=(0.0, 1.0), patch_size=8):
    """Measure every image of a batch, in chunks, so that memory does not grow with N.

    Args:
        x: clean images, [N, H, W, C], in `bounds`, concrete; N may be 0.
        adversarials: perturbed images, same shape and range.
        bounds: (lo, hi), the range of valid pixels; l2 is given in [-1, 1] units.
        patch_size: side of the patches of d_{2,0}, at most min(H, W).

    Returns:
        `ImageMetrics`.

    Raises:
        ValueError, TypeError: as `perturbation`, `unit_scale` and `patch_count`.

    References:
        arXiv 2311.17434.
    """
    x, adversarials = np.asarray(x), np.asarray(adversarials)
    if x.shape != adversarials.shape:
        raise ValueError(f"x and adversarials must have one shape [N, H, W, C]; got {x.shape} and "
                         f"{adversarials.shape}")
    chunks = []
    # At least one chunk, so that wrong arguments are refused for N = 0 as well.
    for start in range(0, max(len(x), 1), _CHUNK):
        pair = x[start : start + _CHUNK], adversarials[start : start + _CHUNK]
        finite = [np.isfinite(images.astype(np.float32)).all(axis=(1, 2, 3)) for images in pair]
        chunks.append((
            changed_pixels(*pair),
            num_clusters_host(*pair),
            l2_norm(*pair, bounds=bounds),
            patch_count(*pair, patch_size=patch_size),
            finite[0] & finite[1],
        ))
    return ImageMetrics(*(np.concatenate(field) for field in zip(*chunks, strict=True)))


def _check_range(x, bounds):
    if bounds is None:
        return
    unit_scale(bounds)  # or say what is wrong with them
    low, high = bounds
    rounding = 1e-3 * (high - low)
    # What is not finite is for `finite` to tell. Image by image, which copies one at a time.
    numbers = (image[np.isfinite(image.astype(np.float32))] for image in np.asarray(x))
    ends = np.asarray([(some.min(), some.max()) for some in numbers if some.size], np.float64).reshape(-1, 2)
    lowest, highest = ends[:, 0].min(initial=high), ends[:, 1].max(initial=low)
    if lowest < low - rounding or high + rounding < highest:
        raise ValueError(f"x has values from {lowest:g} to {highest:g}, outside bounds=({low:g}, {high:g}); pass the "
                         "bounds of these images")


def summarise(metrics, result, *, patch_size=8):
    """Summarise metrics that are already there, e.g. read back from records.

    Args:
        metrics: `ImageMetrics` of N images.
        result: any object with the fields `success`, `status`, `gradient_evals` and
            `forward_evals`, each [N]; `gse_jax.types.AttackResult` is one.
        patch_size: what `metrics.patch_count` was computed with; only passed on.

    Returns:
        `Summary`. A found image that holds NaN or infinity counts as a failure and under
        `num_non_finite`.

    Raises:
        ValueError: if there is not one entry per image, or an image is FOUND without success.

    References:
        arXiv 2311.17434.
    """
    status, success = np.asarray(result.status), np.asarray(result.success, bool)
    if not status.shape == success.shape == metrics.finite.shape:
        raise ValueError(
            f"one entry per image: metrics {metrics.finite.shape}, status {status.shape}, "
            f"success {success.shape}"
        )
    found = status == Status.FOUND
    if (found & ~success).any():
        raise ValueError("an image has status FOUND but success is False")
    found, fooled = found & metrics.finite, success & metrics.finite
    attacked = status != Status.ALREADY_MISCLASSIFIED
    return Summary(
        num_images=found.size,
        num_attacked=int(attacked.sum()),
        num_found=int(found.sum()),
        num_non_finite=int((~metrics.finite | (status == Status.NON_FINITE)).sum()),
        asr_all=_rate(fooled),
        asr_attacked=_rate(found[attacked]),
        asr_all_error=_rate_error(fooled),
        asr_attacked_error=_rate_error(found[attacked]),
        changed_pixels=describe(metrics.changed_pixels[found]),
        num_clusters=describe(metrics.num_clusters[found]),
        l2=describe(metrics.l2[found]),
        patch_count=describe(metrics.patch_count[found]),
        gradient_evals=describe(np.asarray(result.gradient_evals)[attacked]),
        forward_evals=describe(np.asarray(result.forward_evals)[attacked]),
        patch_size=patch_size,
    )


def summary(x, result, *, bounds=(0.0, 1.0), patch_size=8):
    """Summarise the result of one attack. Host-side; for one number per image use the metrics.

    Args:
        x: clean images, [N, H, W, C], in `bounds`; N may be 0.
        result: what `gse_jax.attack` returned, or any object with the fields `adversarials`
            [N, H, W, C], `success`, `status`, `gradient_evals` and `forward_evals`, each [N].
        bounds: (lo, hi), the range of valid pixels; l2 is reported in [-1, 1] units.
        patch_size: side of the patches of d_{2,0}, at most min(H, W).

    Returns:
        `Summary`.

    Raises:
        ValueError, TypeError: as `image_metrics` and `summarise`; for clean images outside `bounds`, whose l2 would
            be in other units.

    References:
        arXiv 2311.17434.
    """
    if not hasattr(result, "adversarials"):
        raise TypeError(f"result must be what gse_jax.attack returned, got {type(result).__name__}; the metrics of "
                        "images alone are those of image_metrics")
    _check_range(x, bounds)
    metrics = image_metrics(x, result.adversarials, bounds=bounds, patch_size=patch_size)
    return summarise(metrics, result, patch_size=patch_size)


def _rate(hits):
    return float(hits.mean()) if hits.size else None


def _rate_error(hits):
    if not hits.size:
        return None
    rate = hits.mean()
    return float(np.sqrt(rate * (1 - rate) / hits.size))
