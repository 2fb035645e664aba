"""From what an attack returned to records; success is judged afresh, never taken on trust."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gse_jax.attacks import validation
from gse_jax.attacks.algorithm import Outcome
from gse_jax.evaluation.cases import Case
from gse_jax.evaluation.forward import Forward
from gse_jax.evaluation.sources import Read
from gse_jax.evaluation.store import Finished
from gse_jax.metrics import image_metrics, linf_norm
from gse_jax.types import Record, Status

_PATCH_SIDE = 8  # pixels; d_{2,0} of arXiv 2311.17434


class Task(NamedTuple):
    """One (case, sample) to do.

    Attributes:
        case: the case.
        method: name of the attack.
        sample: the sample.
        target: class to aim at, -1 in an untargeted case.
        clean_prediction: of the clean image; -1 where unknown.
        confidence: probability of that class; NaN where unknown.
    """

    case: Case
    method: str
    sample: Read
    target: int
    clean_prediction: int
    confidence: float


class Attacked(NamedTuple):
    """A task whose attack is over.

    Attributes:
        task: the task.
        outcome: Outcome of one image, NumPy.
    """

    task: Task
    outcome: Outcome


def settled(task: Task, status: str, reason: str | None = None) -> Finished:
    """Record a sample that was not attacked.

    Args:
        task: the task.
        status: "already_misclassified", "non_finite" or "quarantined".
        reason: in words, for the last two.

    Returns:
        Finished without images.
    """
    wanted = _wanted(task, task.clean_prediction)
    return Finished(_record(task, status=status, reason=reason,
                            success=status == "already_misclassified" and wanted), None, None)


def measured(attacked: Sequence[Attacked], forward: Forward, bounds) -> list[Finished]:
    """Classify and measure attacked images.

    Args:
        attacked: any number.
        forward: classifies in batches of one shape.
        bounds: (low, high).

    Returns:
        As many Finished, in their order.
    """
    finished, batch = [], forward.batch  # which halves where memory runs out
    for start in range(0, len(attacked), batch):
        finished += _measure_batch(attacked[start:start + batch], forward, bounds, batch)
    return finished


def _measure_batch(attacked, forward, bounds, batch):
    clean = np.stack([one.task.sample.x for one in attacked])
    adversarial = np.stack([one.outcome.adversarials for one in attacked])
    predictions = forward(adversarial)
    numbers = measure(clean, adversarial, bounds=bounds, batch=batch)
    return [
        Finished(_judged(one, int(predictions.classes[i]), float(predictions.confidences[i]),
                         {name: values[i].item() for name, values in numbers.items()},
                         in_bounds=_inside(adversarial[i], bounds)), clean[i], adversarial[i])
        for i, one in enumerate(attacked)
    ]


def measure(clean, adversarial, *, bounds, batch: int) -> dict[str, np.ndarray]:
    """Measure perturbations; padded to one shape, so that one set of programs is compiled.

    Args:
        clean: [M, H, W, C], M <= batch.
        adversarial: [M, H, W, C].
        bounds: (low, high).
        batch: M after padding.

    Returns:
        "changed_pixels", "num_clusters", "l2", "linf" and "patch_count", each [M].
    """
    count = len(clean)
    pair = [np.concatenate([images, np.repeat(images[:1], batch - count, axis=0)])
            for images in (clean, adversarial)]
    side = min(_PATCH_SIDE, *clean.shape[1:3])
    metrics = image_metrics(*pair, bounds=bounds, patch_size=side)
    numbers = {name: getattr(metrics, name) for name in ("changed_pixels", "num_clusters", "l2",
                                                         "patch_count")}
    numbers["linf"] = np.asarray(linf_norm(*pair, bounds=bounds))
    return {name: np.asarray(values)[:count] for name, values in numbers.items()}


def _judged(one: Attacked, prediction, confidence, numbers, *, in_bounds) -> Record:
    status = Status(int(one.outcome.status)).name.lower()
    wanted = prediction >= 0 and _wanted(one.task, prediction)
    reason = None
    if status == "found" and not in_bounds:
        status, reason = "not_found", "the adversarial image leaves the bounds"
    elif status == "found" and not wanted:
        status, reason = "not_found", "a fresh forward pass does not confirm the success"
    elif status == "already_misclassified":
        # The forward pass before the attack said otherwise: the image lies on the boundary.
        status, reason = "not_found", "the prediction of the clean image depends on the batch size"
    elif status == "non_finite":
        reason = Status.NON_FINITE.message
    found = status == "found"
    return _record(one.task, status=status, reason=reason, success=found, prediction=prediction,
                   confidence_after=_finite(confidence),
                   gradient_evals=int(one.outcome.gradient_evals),
                   forward_evals=int(one.outcome.forward_evals),
                   tradeoff=float(one.outcome.tradeoff), **(numbers if found else {}))


def _record(task: Task, *, status, reason, success, prediction=None, confidence_after=None,
            gradient_evals=0, forward_evals=0, tradeoff=0.0, **numbers: Any) -> Record:
    none: dict[str, Any] = dict.fromkeys(
        ("changed_pixels", "num_clusters", "l2", "linf", "patch_count"))
    return Record(
        sample_id=task.sample.sample_id, index=task.sample.position, case=task.case.name,
        method=task.method, label=task.sample.label,
        target=None if task.target < 0 else task.target,
        clean_prediction=task.clean_prediction, status=status, success=bool(success),
        prediction=prediction, confidence_before=_finite(task.confidence),
        confidence_after=confidence_after, gradient_evals=gradient_evals,
        forward_evals=forward_evals, tradeoff=tradeoff, **{**none, **numbers}, reason=reason,
        array=None)


def _wanted(task: Task, prediction: int) -> bool:
    return prediction == task.target if task.target >= 0 else prediction != task.sample.label


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _inside(image, bounds) -> bool:
    bounds = validation.rounded(bounds, image.dtype)
    return bool(np.isfinite(image).all() and image.min() >= bounds[0] and image.max() <= bounds[1])
