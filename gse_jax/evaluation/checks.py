"""Pre-flight checks: what makes robustness numbers wrong before any attack runs.

Each check says in a plain sentence what was measured and how to repair it. What cannot be attacked
at all is an "error", what makes the numbers doubtful a "warning".

References:
    Croce, Hein, AutoAttack's `checks.py` (randomised models, probabilities, zero gradients),
    arXiv 2003.01690; Carlini et al., "On Evaluating Adversarial Robustness", arXiv 1902.06705
    (gradient masking); Athalye et al., arXiv 1802.00420.
"""

import numpy as np

from gse_jax.attacks import validation
from gse_jax.evaluation.checks_data import (
    Finding,
    broken_images,
    check_accuracy,
    check_range,
    check_shapes,
    share_of,
)
from gse_jax.evaluation.checks_model import (
    broken_logits,
    check_behaviour,
    check_gradients,
    check_normalisation,
    check_output,
)
from gse_jax.evaluation.model_probe import ModelProbe, evenly_chosen

__all__ = ["Finding", "check"]


def check(params, apply_fn, x, y, *, bounds=(0.0, 1.0), expected_accuracy=None, targets=None,
          needs_gradient=True):
    """Look for what makes an evaluation wrong: data, model, and how the two fit.

    Costs one forward pass of all images, some of a subset, and 64 gradients; two compilations.

    Args:
        params: any pytree of arrays; passed to `apply_fn`.
        apply_fn: (params, x [N, H, W, C]) -> logits [N, K].
        x: [N, H, W, C] float images; 20 or more, of several classes, tell most.
        y: [N] int, true labels.
        bounds: (lowest, highest) pixel value of `x`.
        expected_accuracy: share in [0, 1] that the model is known to reach, or None.
        targets: [N] int, classes that targeted attacks will aim at, or None.
        needs_gradient: whether an attack will use the model's gradient; what is wrong with it is else a warning.

    Returns:
        List of `Finding`. The clean accuracy is always among them, as "info" where it is plausible.
        An error in data or shapes ends the checks.

    Raises:
        ValueError: if `bounds` or `expected_accuracy` is impossible.

    References:
        arXiv 2003.01690; arXiv 1902.06705.
    """
    bounds = validation.check_bounds(bounds)
    if expected_accuracy is not None and not 0 <= expected_accuracy <= 1:
        raise ValueError(f"expected_accuracy must lie in [0, 1], got {expected_accuracy:g}; "
                         "e.g. 0.9066 for 90.66 %")
    x, y = np.asarray(x), np.asarray(y)
    targets = None if targets is None else np.asarray(targets)
    found = check_shapes(params, apply_fn, x, y, bounds, targets)
    if found:
        return found
    finite = np.isfinite(x).all(axis=(1, 2, 3))
    if not finite.all():
        found.append(broken_images(finite))
    if not finite.any():
        return found
    x, y, targets = (a if a is None or finite.all() else a[finite] for a in (x, y, targets))
    found += check_range(x, bounds)
    probe = ModelProbe(params, apply_fn, x)
    logits = probe.logits(x)
    usable = np.isfinite(logits).all(axis=1)
    if not usable.all():
        found.append(broken_logits(usable))
    if usable.any():
        good = (a if usable.all() else a[usable] for a in (x, y, logits))
        found += _of_usable(probe, *good, bounds, expected_accuracy)
        found += _targets(logits, targets)
    severity = "error" if needs_gradient else "warning"
    return found + check_gradients(probe, x, y, usable, severity)


def _of_usable(probe, x, y, logits, bounds, expected_accuracy):
    some = evenly_chosen(len(x), probe.many)
    found = check_accuracy(logits.argmax(-1), y, logits.shape[1], expected_accuracy)
    found += check_normalisation(probe, x[some], y[some], bounds)
    found += check_output(probe, logits, x, y)
    return found + check_behaviour(probe, x, logits)


def _targets(logits, targets):
    if targets is None:
        return []
    there = logits.argmax(-1) == targets
    if not there.any():
        return []
    return [Finding("targets", "info", f"{share_of(there)} clean images already have the target as "
                    "their prediction.", "They are counted apart as already misclassified.")]
