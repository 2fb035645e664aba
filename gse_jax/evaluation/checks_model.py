"""Pre-flight checks that ask the model: output, dependence on batch mates, gradients."""

import numpy as np

from gse_jax.evaluation.checks_data import Finding, guess_range, share_of
from gse_jax.evaluation.model_probe import evenly_chosen
from gse_jax.evaluation.normalisation import better_normalisation, candidates

_SATURATED = 80.0  # logits; e^-80 is where float32 softmax gradients vanish; usual margins: 5 to 40
_NOISE = 1e-4  # of the spread of the logits; above rounding, which may differ between calls on GPUs
_MIXING = 1e-2  # of the spread; batch statistics change logits by 10 % and more, rounding by 0.1 %
_ENOUGH = 20  # images, from which on one predicted class is told from chance


def broken_logits(usable):
    """Report images with NaN or infinite logits.

    Args:
        usable: bool [N], not all True.

    Returns:
        Finding.
    """
    return Finding("logits", "warning" if usable.any() else "error",
                   f"The model gives NaN or infinite logits for {share_of(~usable)} images (first: "
                   f"image {int(np.argmin(usable))}).", "Look for overflow (float16, exp, division "
                   "by zero) and for damaged weights; such images never count as success.")


def check_normalisation(probe, x, y, bounds):
    """Report a normalisation under which the model is significantly better.

    Args:
        probe: `ModelProbe`.
        x: [N, H, W, C] images.
        y: [N] labels.
        bounds: (low, high).

    Returns:
        List of at most one `Finding`.
    """
    low, high = bounds
    to_image, unit = (high - low, low), "x" if bounds == (0.0, 1.0) else (
        f"x / {high:g}" if low == 0 else f"(x - {low:g}) / {high - low:g}".replace("- -", "+ "))
    lowest, highest = float(x.min()), float(x.max())
    if lowest < low or highest > high:  # Then the bounds say nothing about the images.
        to_image = guess_range(lowest, highest)[0]
        if to_image is None or (np.size(to_image[0]) > 1 and x.shape[3] != 3):
            return []
        unit = {1.0: "x", 2.0: "(x + 1) / 2", 255.0: "x / 255"}.get(
            to_image[0] if np.size(to_image[0]) == 1 else None, "x * std + mean")
    verdict = better_normalisation(probe.logits, x, y, candidates(to_image, x.shape[3], unit))
    if verdict is None:
        return []
    return [Finding("normalisation", "warning", f"Clean accuracy is {verdict.before:.1%} as passed "
                    f"and {verdict.after:.1%} when {verdict.candidate.what} (on {verdict.count} "
                    "images).", verdict.candidate.fix)]


def check_output(probe, logits, x, y):
    """Look at the numbers themselves: constant, probabilities, saturated.

    Args:
        probe: `ModelProbe`.
        logits: [N, K] finite.
        x: [N, H, W, C] their images.
        y: [N] labels.

    Returns:
        List of `Finding`.
    """
    found = []
    pair = np.concatenate([x, _inverted(x)]) if len(x) == 1 else None  # One image needs another.
    others = logits[1:] if pair is None else probe.logits(pair)[1:]
    if np.array_equal(np.broadcast_to(logits[:1], others.shape), others):
        return [Finding("constant", "error", f"The model gives the same logits for all {len(x)} "
                        "images.", "Check the weights (all zero, or dead units), and that apply_fn "
                        "uses x; the range of the images may be wrong as well.")]
    counts = np.bincount(logits.argmax(-1))
    label_share = np.bincount(y).max() / len(y)
    if len(y) >= _ENOUGH and counts.max() > 0.95 * len(y) and label_share < 0.5:
        found.append(Finding("constant", "warning", f"The model predicts class {counts.argmax()} "
                             f"for {share_of(logits.argmax(-1) == counts.argmax())} images.",
                             "Check the range and normalisation of the images, and the weights."))
    sums = logits.sum(axis=1)
    if logits.min() >= 0 and logits.max() <= 1 and np.abs(sums - 1).max() < 1e-3:
        return [*found, Finding(
            "probabilities", "warning", f"The rows of the model's output lie in [0, 1] and sum to 1"
            f" (largest deviation {np.abs(sums - 1).max():.1g}): these look like probabilities, "
            "whose gradients vanish where the model is confident.", "Return the logits before "
            "softmax; jnp.log of the probabilities also does where none is 0.")]
    top = np.sort(logits, axis=1)[:, -2:]
    saturated = top[:, 1] - top[:, 0] > _SATURATED
    if saturated.mean() >= 0.1:
        median = float(np.median((top[:, 1] - top[:, 0])[saturated]))
        found.append(Finding(
            "saturated", "warning", f"The two largest logits are more than {_SATURATED:g} apart for"
            f" {share_of(saturated)} images (by {median:.3g} in the median of these): softmax is exactly 1 and its "
            "gradient 0, a common form of gradient masking.", "Check the scale of the images; if "
            f"the model is meant so, attack its logits divided by {median / 10:.0f}, which leaves "
            "all predictions as they are, and compare with an attack that needs no gradient."))
    return found


def check_behaviour(probe, x, logits):
    """Repeat, permute and regroup: does a row depend on anything but its own image?

    Args:
        probe: `ModelProbe`.
        x: [N, H, W, C] images.
        logits: [N, K] finite, theirs.

    Returns:
        List of at most one `Finding`.
    """
    images = x[np.arange(probe.batch) % len(x)]
    half = probe.batch // 2
    base, again = probe.logits(images), probe.logits(images)
    mixed = probe.logits(np.concatenate([images[:half], _inverted(images[half:])]))
    spread = float(np.median(np.ptp(np.concatenate([logits, mixed]), axis=1)))
    if spread == 0:
        return []
    for other, how in ((again, "Two calls with the same images differ"),
                       (probe.logits_of_new_trace(images), "Two traces of apply_fn differ")):
        if other is not None and not np.abs(other - base).max() <= _NOISE * spread:
            return [Finding(
                "random", "warning", f"{how}: {_difference(base, other, spread)}.",
                "Turn dropout and augmentation off (evaluation mode); if the defence is meant to be"
                " random, attack its average over many draws: one draw inflates the success rate.")]
    pairs = [(base, probe.logits(images[::-1])[::-1]),  # Permuted: another position.
             (base[:half], mixed[:half]),  # Other mates.
             (base[:1], probe.logits(np.repeat(images[:1], probe.batch, 0))[:1])]  # No others.
    if probe.gradient_error() is None:  # Fewer: the batches of gradients are smaller.
        pairs.append((base[:half], probe.gradients(images[:half], np.zeros(half, int))[1]))
    worst = max(pairs, key=lambda pair: np.nan_to_num(np.abs(pair[0] - pair[1]), nan=np.inf).max())
    if np.abs(worst[0] - worst[1]).max() <= _MIXING * spread:
        return []
    return [Finding("batch", "warning", "The logits of an image change with its batch mates: "
                    f"{_difference(*worst, spread)}.", "Put the model in evaluation mode so that "
                    "BatchNorm uses its running statistics: Linen use_running_average=True, NNX "
                    "model.eval(), Haiku is_training=False, Equinox inference_mode(model).")]


def _difference(first, second, spread):
    largest = np.abs(first - second).max()
    flips = first.argmax(-1) != second.argmax(-1)
    return (f"by up to {largest:.3g}, {largest / spread:.1%} of a row's spread, and "
            f"{int(flips.sum())} of {len(flips)} predictions flip")


def _inverted(x):
    return (x.max() + x.min()) - x


def check_gradients(probe, x, y, usable, severity="error"):
    """Look for zero and non-finite input gradients.

    Args:
        probe: `ModelProbe`.
        x: [N, H, W, C] images.
        y: [N] labels.
        usable: bool [N]; the logits are finite.
        severity: of gradients that no attack can use.

    Returns:
        List of `Finding`.
    """
    if (error := probe.gradient_error()) is not None:
        return [Finding("gradients", severity, f"apply_fn cannot be differentiated: {error}.",
                        "Use lax.scan for while loops, give callbacks a custom_vjp, or use an "
                        "attack that needs no gradient (sparse_rs).")]
    some = evenly_chosen(len(x), probe.few)
    gradients, _ = probe.gradients(x[some], y[some])
    finite = np.isfinite(gradients).all(axis=(1, 2, 3))
    zero = (gradients == 0).all(axis=(1, 2, 3))
    broken = ~finite & usable[some]  # Non-finite logits have been reported already.
    found = []
    if broken.any():
        found.append(Finding("gradients", severity if broken.all() else "warning", "The input "
                             f"gradient is NaN or infinite for {share_of(broken)} images although "
                             "the logits are finite.", "Look for sqrt, norm, log or division at 0 "
                             "in the model; add a small constant inside, or use jnp.where twice."))
    if zero.any():
        found.append(Finding("gradients", severity if zero.all() else "warning", "The input "
                             f"gradient is exactly zero for {share_of(zero)} images: a gradient "
                             "attack cannot move them.", "Remove rounding, argmax, stop_gradient or"
                             " saturated softmax from apply_fn; otherwise use an attack that needs "
                             "no gradient (sparse_rs)."))
    return found
