"""The trade-off between d_{2,0}, changed pixels, clusters and l2 norm, with every attack on it.

References:
    arXiv 2311.17434, section 4 (ACP, ANC, l2, d_{2,0}); the front is that of `gse_refined` over its
    cap on the l2 norm.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gse_jax import metrics
from gse_jax.attacks import METHODS
from gse_jax.evaluation.attack_run import AttackRun, run_attack
from gse_jax.evaluation.comparison import configurations_of

CAPS = (math.inf, 3.0, 2.0, 1.5, 1.0, 0.75, 0.5)  # on the l2 norm, images of range width 2
_ROUNDING = 1e-5  # of a norm computed again, relative


class Front(NamedTuple):
    """Every attack as a point, and `gse_refined` as a curve over its cap; NumPy.

    Attributes:
        methods: G names of attacks; "gse_refined" once for each cap.
        max_l2: [G] cap on the l2 norm, infinite for the other attacks.
        correct: [N] bool, images that the model classifies correctly.
        attacked: [N] bool, those, and images for which its logits are not finite; only they count.
        success: [G, N] bool.
        images: [G, N, 4] ACP, ANC, l2 ([-1, 1] units) and d_{2,0} of every success; NaN elsewhere.
        image_pareto: [G, N] bool, per image the points that no other point beats.
        success_rate: [G] of the attacked images.
        success_within: [G] likewise, of a success whose l2 norm is at most `max_l2`: without those that
            a larger cap brought.
        means: [G, 4] over the successes; NaN where there are none.
        pareto: [G] bool, points with success on every attacked image that no other such point
            beats in the mean.
        gradient_evals: [G] per attacked image.
        forward_evals: [G] per attacked image.
    """

    methods: tuple[str, ...]
    max_l2: np.ndarray
    correct: np.ndarray
    attacked: np.ndarray
    success: np.ndarray
    images: np.ndarray
    image_pareto: np.ndarray
    success_rate: np.ndarray
    success_within: np.ndarray
    means: np.ndarray
    pareto: np.ndarray
    gradient_evals: np.ndarray
    forward_evals: np.ndarray

    def rows(self) -> list[dict[str, Any]]:
        """Return the points as table rows, plain dictionaries; None where there is nothing to average."""
        known = lambda number: None if np.isnan(number) else float(number)
        return [{"attack": name if np.isinf(cap) else f"{name}, l2 <= {cap:g}",
                 "attacked": int(self.attacked.sum()), "ASR": known(rate), "ASR within the cap": known(within),
                 **{number: known(mean) for number, mean in zip(metrics.SPARSITY, means, strict=True)},
                 "gradients": float(spent), "forwards": float(passes),
                 "on the front": "yes" if front else "no"}
                for name, cap, rate, within, means, spent, passes, front in zip(
                    self.methods, self.max_l2, self.success_rate, self.success_within, self.means,
                    self.gradient_evals, self.forward_evals, self.pareto, strict=True)]


def pareto(params, apply_fn, x, y, *, targets=None, methods: Sequence[str] | None = None,
           max_l2: Sequence[float] = CAPS, domain: str | None = None, bounds=(0.0, 1.0), key=None,
           lanes: int | None = None, progress: Callable[[str], Any] | None = None,
           on_front: Callable[[Front], Any] | None = None) -> Front:
    """Attack the same images with many attacks, and with `gse_refined` under several l2 caps.

    Args:
        params, apply_fn, y, targets, bounds, key, lanes: as in `gse_jax.attack`.
        x: as in `gse_jax.attack`; misclassified images are not attacked.
        methods: names of attacks, or one; None for all. "gse_refined" brings one point for each cap.
        max_l2: caps on the l2 norm in units of images of range width 2. The curve is complete: an
            image that a cap leaves without success keeps its image of the next larger cap, so
            means may exceed a cap that is too small for some images.
        domain: as in `compare`.
        progress: name of the attack that begins -> the `progress` function of `gse_jax.attack`.
        on_front: called after every point with the Front so far, e.g. to store it.

    Returns:
        Front.

    Raises:
        ValueError: for an unknown method or domain, or a cap that is not positive; before anything
            runs.
        ImportError: if scikit-image is missing for a method with superpixels, likewise.
    """
    methods = tuple(METHODS) if methods is None else (methods,) if isinstance(methods, str) else tuple(methods)
    if not methods:
        raise ValueError("methods must name at least one attack")
    wanted = np.ravel(max_l2)
    if not ((wanted.size or "gse_refined" not in methods) and wanted.dtype.kind in "iuf" and (wanted > 0).all()):
        raise ValueError(f"max_l2={max_l2!r} must hold positive numbers")
    caps = sorted(map(float, wanted), reverse=True) if "gse_refined" in methods else []
    configurations = configurations_of(methods, domain, np.shape(x)[1:], targets is not None)
    points = []
    for name in methods:
        settings, hyperparams = configurations[name]
        for cap in caps if name == "gse_refined" else [math.inf]:
            if name == "gse_refined":
                hyperparams = hyperparams._replace(max_l2=cap)
            run = run_attack(params, apply_fn, x, y, targets=targets, method=name,
                             settings=settings, hyperparams=hyperparams, bounds=bounds, key=key,
                             lanes=lanes, progress=progress(name) if progress else None)
            point = _point(run)
            if name == "gse_refined" and points and points[-1][0] == name:
                point = _completed(point, points[-1][2])
            points.append((name, cap, point))
            if on_front is not None:
                on_front(_front(points))
    return _front(points)


class _Point(NamedTuple):
    correct: np.ndarray  # [N] bool
    attacked: np.ndarray  # [N] bool
    success: np.ndarray  # [N] bool
    images: np.ndarray  # [N, 4]
    spent: np.ndarray  # [N, 2] gradients and forward passes


def _point(run: AttackRun) -> _Point:
    measured = run.metrics()
    images = np.stack([getattr(measured, field) for field in metrics.SPARSITY.values()], axis=-1).astype(float)
    return _Point(run.predictions_before == run.y, run.attacked, run.found,
                  np.where(run.found[:, None], images, np.nan),
                  np.stack([run.gradient_evals, run.forward_evals], axis=-1))


def _completed(point: _Point, larger: _Point) -> _Point:
    """Fill in what a larger cap found where this one found nothing; both were paid for."""
    missing = ~point.success & larger.success
    return point._replace(success=point.success | missing,
                          images=np.where(missing[:, None], larger.images, point.images),
                          spent=point.spent + missing[:, None] * larger.spent)


def _front(points) -> Front:
    names, caps, points = zip(*points, strict=True)
    attacked = points[0].attacked
    success, images, spent = (np.stack([getattr(p, field) for p in points])
                              for field in ("success", "images", "spent"))
    count = max(int(attacked.sum()), 1)
    within = success & (images[..., 2] <= np.asarray(caps)[:, None] * (1 + _ROUNDING))
    rate, rate_within = (hits.sum(1) / count if attacked.any() else np.full(len(points), np.nan)
                         for hits in (success, within))
    means = np.stack([i[s].mean(0) if s.any() else np.full(4, np.nan)
                      for i, s in zip(images, success, strict=True)])
    of_images = np.stack([metrics.pareto_set(images[:, i], success[:, i])
                          for i in range(len(attacked))], axis=1) if len(attacked) else success
    return Front(names, np.asarray(caps), points[0].correct, attacked, success, images, of_images, rate,
                 rate_within, means, metrics.pareto_set(means, rate == 1.0), *(spent.sum(1) / count).T)
