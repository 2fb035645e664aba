"""Explain a run: where the model looks, and whether the perturbations lie there.

References:
    arXiv 2311.17434, section 4 (interpretability); arXiv 1511.07528 (adversarial saliency map);
    arXiv 1512.04150 (class activation map); arXiv 1610.02391 (Grad-CAM).
"""

from typing import NamedTuple

import jax
import numpy as np

from gse_jax import metrics
from gse_jax.evaluation.attack_run import AttackRun, predict
from gse_jax.metrics.saliency import PERCENTILES

_BATCH = 64


class Explanation(NamedTuple):
    """Maps and scores of every image of a run; NumPy arrays with leading axis N.

    Attributes:
        saliency: [N, H, W] adversarial saliency, the largest of the channels.
        activation: [N, H, W] class activation map of the true class, or None for a model without
            a known feature map.
        activation_kind: "CAM" or "Grad-CAM".
        interpretability: [N, 5] interpretability score at `PERCENTILES`.
        saliency_overlap: Overlap of perturbation and saliency with its control.
        activation_overlap: Overlap of perturbation and activation map, or None.
        found: [N] bool; the images whose scores mean something.
    """

    saliency: np.ndarray
    activation: np.ndarray | None
    activation_kind: str
    interpretability: np.ndarray
    saliency_overlap: metrics.Overlap
    activation_overlap: metrics.Overlap | None
    found: np.ndarray


def explain(run: AttackRun, params, apply_fn) -> Explanation:
    """Compute saliency, activation maps and their scores for a run.

    Args:
        run: N >= 1 images.
        params: the parameters of the model that was attacked.
        apply_fn: the model. With a method `features(params, x) -> (logits, features)` the
            activation map is computed too: by Grad-CAM, or by CAM where the model also has
            `head(params) -> [channels, classes]`, as `gse_jax.models.load` gives.

    Returns:
        Explanation. The saliency map aims at the target, or in an untargeted attack at the class
        that the adversarial image is given; for an image that nothing was found for, at the next
        class.

    Raises:
        ValueError: if the run has no image, or the model is not the one that was attacked.
    """
    if not len(run.y):
        raise ValueError("run has no images to explain; attack at least one")
    found = run.found
    # Two good models agree on clean images; on adversarial ones, hardly beyond the boundary, only the same do.
    for images, said, chosen, kind in ((run.x, run.predictions_before, np.ones(len(run.y), bool), "clean"),
                                       (run.adversarials, run.predictions_after, found, "adversarial")):
        same = int((predict(params, apply_fn, images)[0] == said)[chosen].sum())
        if same + 1 < 0.9 * chosen.sum():  # rounding on another machine changes hardly any, but one of a few may be
            raise ValueError(f"params: this model predicts as the run's did for {same} of {chosen.sum()} {kind} "
                             "images only; pass the model, weights and normalisation that were attacked")
    goals = np.where(run.targets >= 0, run.targets, run.predictions_after)
    # Aiming at the true class, or at none, would be a map of nothing; that happens for failures only.
    num_classes = jax.eval_shape(apply_fn, params, run.x[:1]).shape[-1]
    goals = np.where((goals == run.y) | (goals < 0), (run.y + 1) % num_classes, goals)
    has_features, has_head = hasattr(apply_fn, "features"), hasattr(apply_fn, "head")

    @jax.jit
    def maps(params, x, y, goals):
        full = metrics.adversarial_saliency(params, apply_fn, x, y, goals)
        if not has_features:
            return full, None
        if has_head:
            heat = metrics.cam(apply_fn.features(params, x)[1], apply_fn.head(params), y)
        else:
            heat = metrics.grad_cam(params, apply_fn.features, x, y)
        return full, metrics.resize_map(heat, *x.shape[1:3])

    saliency, activation, scores = [], [], []
    for start in range(0, len(run.y), _BATCH):
        part = slice(start, start + _BATCH)
        full, heat = maps(params, run.x[part], run.y[part], goals[part])
        scores.append(np.asarray(metrics.interpretability_score(
            run.x[part], run.adversarials[part], full, percentiles=PERCENTILES)))
        saliency.append(np.asarray(full).max(-1))
        activation.append(None if heat is None else np.asarray(heat))
    saliency = np.concatenate(saliency)
    activation = np.concatenate(activation) if has_features else None

    def overlap(maps):
        return jax.tree.map(np.asarray, metrics.overlap_score(run.x, run.adversarials, maps))

    return Explanation(saliency, activation, "CAM" if has_head else "Grad-CAM", np.concatenate(scores), overlap(saliency),
                       overlap(activation) if has_features else None, found)
