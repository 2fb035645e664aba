"""Pre-flight checks of what can be judged without asking the model: shapes, values, accuracy."""

from typing import NamedTuple

import jax
import numpy as np

from gse_jax.attacks import validation
from gse_jax.evaluation.normalisation import IMAGENET, at_least

_ENOUGH = 20  # images, from which on chance-level accuracy is told from bad luck


class Finding(NamedTuple):
    """Hold what one check found.

    Attributes:
        name: of the check, e.g. "bounds".
        severity: "error" (the attack cannot run, or its numbers mean nothing), "warning" (the
            numbers are doubtful) or "info".
        message: one sentence with the measured number.
        fix: what to do about it; "" where nothing has to be done.
    """

    name: str
    severity: str
    message: str
    fix: str


def check_shapes(params, apply_fn, x, y, bounds, targets):
    """Report what `attack` would refuse, values of the images apart; nothing is computed.

    Args:
        params, apply_fn: as in `check`.
        x: [N, H, W, C] NumPy.
        y: [N] NumPy.
        bounds: (low, high).
        targets: [N] NumPy or None.

    Returns:
        List of `Finding`, all errors.
    """
    labels = [("y", y)] + ([] if targets is None else [("targets", targets)])
    try:
        validation.check_images(x[:0] if x.ndim else x, bounds)
    except (TypeError, ValueError) as error:
        return [_refusal("images", error)]
    if not len(x):
        return [Finding("images", "error", "x holds no image.", "Pass at least one image.")]
    found = []
    for name, values in labels:
        try:
            validation.check_labels(name, values, len(x))
        except (TypeError, ValueError) as error:
            found.append(_refusal("labels" if name == "y" else "targets", error))
    try:
        classes, _ = validation.check_model(params, apply_fn, x.shape[1:], x.dtype)
    except (TypeError, ValueError) as error:
        return [*found, _too_few_classes(params, apply_fn, x) or _refusal("model", error)]
    if not found:
        try:
            for name, values in labels:
                validation.check_label_values(name, values, classes)
            if targets is not None:
                validation.check_targets_differ(y, targets)
        except ValueError as error:
            found.append(_refusal("labels" if name == "y" else "targets", error))
    return found


def _refusal(name, error):
    message, _, fix = str(error).rpartition("; ")
    if not message:
        message, fix = fix, ("call apply_fn(params, x[:2]) and repair what it raises"
                             if name == "model" else "pass values in that range")
    return Finding(name, "error", f"{message}.", f"{fix[0].upper()}{fix[1:]}.")


def _too_few_classes(params, apply_fn, x):
    try:
        out = jax.eval_shape(apply_fn, params, jax.ShapeDtypeStruct((3, *x.shape[1:]), x.dtype))
        shape = tuple(out.shape)
    except Exception:  # noqa: BLE001  # Whatever it is, `check_model` has put it into words.
        return None
    if shape not in ((3,), (3, 0), (3, 1)):
        return None
    count = shape[1] if len(shape) == 2 else 1
    return Finding("classes", "error", f"The model gives {count} score per image; an attack needs "
                   "at least 2 classes.", "Return one logit per class; for a binary model with one "
                   "logit z: jnp.stack([jnp.zeros_like(z), z], axis=-1) of z [N].")


def broken_images(finite):
    """Report images with NaN or infinite pixels.

    Args:
        finite: bool [N], not all True.

    Returns:
        Finding.
    """
    return Finding("images", "warning" if finite.any() else "error",
                   f"{share_of(~finite)} images hold NaN or infinite pixels (first: image "
                   f"{int(np.argmin(finite))}).", "Repair or remove them; their results count as "
                   "non-finite, never as success.")


def check_range(x, bounds):
    """Compare the values of the images with the stated bounds.

    Args:
        x: [N, H, W, C] finite NumPy, N >= 1.
        bounds: (low, high).

    Returns:
        List of at most one `Finding`.
    """
    low, high = bounds = validation.rounded(bounds, x.dtype)
    lowest, highest = float(x.min()), float(x.max())
    spans = f"The images span {lowest:.4g} to {highest:.4g}"
    if lowest < low or highest > high:
        _, words, fix = guess_range(lowest, highest)
        return [Finding("bounds", "error", f"{spans}, outside bounds=({low:g}, {high:g}); they "
                        f"look like {words}.", fix)]
    share = (highest - lowest) / (high - low)
    if share < 0.25:
        fix = ("Check that the images were not scaled twice, e.g. divided by 255 again."
               if bounds == (0.0, 1.0) else guess_range(lowest, highest)[2])
        return [Finding("bounds", "warning", f"{spans}, {share:.1%} of bounds=({low:g}, {high:g}); "
                        "the attack could change pixels far beyond what images hold.", fix)]
    if low < 0 <= lowest:
        return [Finding("bounds", "warning", f"{spans} and never go below 0, while bounds=({low:g},"
                        f" {high:g}) allow it.", "Pass bounds=(0., 1.) if the images are in [0, 1]."
                        )]
    return []


def guess_range(lowest, highest):
    """Guess from the values alone what kind of images these are.

    Args:
        lowest: smallest pixel value.
        highest: largest pixel value.

    Returns:
        ((scale, shift) or None, words, fix): the images are `scale * u + shift` of images u in
        [0, 1].
    """
    if lowest >= 0 and highest <= 1:
        return (1.0, 0.0), "images in [0, 1]", "Pass bounds=(0., 1.)."
    if lowest >= -1 and highest <= 1:
        return (2.0, -1.0), "images in [-1, 1]", "Pass bounds=(-1., 1.)."
    if lowest >= 0 and highest <= 255:
        return (255.0, 0.0), "8-bit images (0-255)", (
            "Pass x / 255 with bounds=(0., 1.), or bounds=(0., 255.) if the model expects 0-255.")
    if lowest >= -3 and highest <= 4:
        mean, std = (np.asarray(a) for a in IMAGENET)
        return (1 / std, -mean / std), "images normalised by a mean and std", (
            "Pass the images before normalisation and normalise inside apply_fn; pixel bounds do "
            "not exist for normalised images.")
    return None, "no usual image range", "Pass bounds=(lowest, highest) of your images."


def check_accuracy(predictions, y, classes, expected):
    """Compare the clean accuracy with guessing and with what is expected.

    Args:
        predictions: [N] predicted classes, N >= 1.
        y: [N] labels.
        classes: K.
        expected: share in [0, 1] or None.

    Returns:
        List of exactly one `Finding`.
    """
    right, count = int((predictions == y).sum()), len(y)
    share, chance = right / count, 1 / classes
    said = f"Clean accuracy is {share:.1%} ({right} of {count}; chance is {chance:.1%})"
    offsets = np.bincount((y - predictions) % classes, minlength=classes)
    fix = "Check normalisation, channel order, weights, and that labels and classes match."
    if offsets[1:].max(initial=0) > 0.5 * count:
        offset = int(offsets[1:].argmax()) + 1
        offset = offset if offset <= classes // 2 else offset - classes
        sign = "-" if offset > 0 else "+"
        fix = (f"The labels look shifted: y is the prediction {offset:+d} for "
               f"{offsets.max() / count:.1%}; pass (y {sign} {abs(offset)}) % {classes}.")
    if at_least(right, count, chance) > 0.01 and share < max(0.5, 1.5 * chance):
        severity = "error" if count >= _ENOUGH else "warning"
        return [Finding("accuracy", severity, f"{said}: no better than guessing.", fix)]
    if expected is None:
        return [Finding("accuracy", "info", f"{said}.", "")]
    # The spread of the smaller expectation: 100 % expected would leave no room for one error.
    error = np.sqrt(max(expected * (1 - expected), 0.01) / count)
    said += f", expected {expected:.1%}"
    if share < expected - max(3 * error, 0.01):
        return [Finding("accuracy", "warning", f"{said}: {(expected - share) / error:.0f} standard "
                        "errors below.", fix)]
    if share > expected + max(3 * error, 0.01):
        return [Finding("accuracy", "warning", f"{said}: {(share - expected) / error:.0f} standard "
                        "errors above.", "Check that these are test images and the right weights.")]
    return [Finding("accuracy", "info", f"{said}.", "")]


def share_of(mask):
    """Say how many: "3 of 8 (37.5%)".

    Args:
        mask: bool [N], N >= 1.

    Returns:
        str.
    """
    return f"{int(mask.sum())} of {len(mask)} ({mask.mean():.1%})"
