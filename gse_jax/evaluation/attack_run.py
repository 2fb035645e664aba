"""One attack on one data set in memory: run it, look at it afresh, keep it in one file.

`evaluate` is the road for large sets; this is the short one behind `gse-jax demo` and
`gse-jax attack`, and the file that `gse-jax explain` reads.
"""

import json
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import gse_jax
from gse_jax.attacks import Progress, attack, validation
from gse_jax.attacks.api import attack_chosen
from gse_jax.data.atomic import replacing
from gse_jax.devices import local_devices
from gse_jax.evaluation.cases import plain
from gse_jax.evaluation.forward import Forward
from gse_jax.metrics import ImageMetrics, Summary, image_metrics, summary
from gse_jax.types import ApplyFn, Status

class AttackRun(NamedTuple):
    """Images, what became of them, and what the model says: NumPy arrays with leading axis N.

    Attributes:
        x: [N, H, W, C] clean images in `about["bounds"]`.
        y: [N] true labels.
        targets: [N] targets, -1 where untargeted.
        adversarials: [N, H, W, C].
        success: [N] bool; the fresh pass's word: not `y`, or the target.
        status: [N], gradient_evals: [N], forward_evals: [N], tradeoff: [N]: as in AttackResult.
        predictions_before: [N] predicted classes of `x`, from a pass of their own; -1 where the
            logits are not finite.
        predictions_after: [N] of `adversarials`.
        confidences_before: [N] probability of the predicted class.
        confidences_after: [N].
        ids: [N] str, sample ids.
        about: what ran: method, preset, bounds, seed, versions, seconds, class names, and what the caller
            adds.
    """

    x: np.ndarray
    y: np.ndarray
    targets: np.ndarray
    adversarials: np.ndarray
    success: np.ndarray
    status: np.ndarray
    gradient_evals: np.ndarray
    forward_evals: np.ndarray
    tradeoff: np.ndarray
    predictions_before: np.ndarray
    predictions_after: np.ndarray
    confidences_before: np.ndarray
    confidences_after: np.ndarray
    ids: np.ndarray
    about: dict[str, Any]

    @property
    def found(self) -> np.ndarray:
        """[N] bool, images of which the attack made an adversarial one."""
        return self.status == Status.FOUND

    @property
    def attacked(self) -> np.ndarray:
        """[N] bool, images that were not misclassified from the start."""
        return self.status != Status.ALREADY_MISCLASSIFIED

    def metrics(self) -> ImageMetrics:
        """Return the metrics of every image."""
        return image_metrics(self.x, self.adversarials, bounds=tuple(self.about["bounds"]))

    def summary(self) -> Summary:
        """Return the run's numbers; success is the fresh pass's, not the attack's word."""
        return summary(self.x, self, bounds=tuple(self.about["bounds"]))

    @property
    def clean_accuracy(self) -> float | None:
        """Share of images that the model classifies correctly, None without images."""
        return float((self.predictions_before == self.y).mean()) if len(self.y) else None


def predict(params, apply_fn: ApplyFn, x) -> tuple[np.ndarray, np.ndarray]:
    """Classify images in batches of one shape.

    Args:
        params: the model's parameters.
        apply_fn: (params, x) -> logits.
        x: [N, H, W, C].

    Returns:
        (classes [N] int32, probabilities of these classes [N] float32); -1 and NaN where the logits
        are not finite.
    """
    return _classified(Forward(params, apply_fn, x.shape[1:]), x)


def _classified(forward, x):
    if not len(x):
        return np.zeros(0, np.int32), np.zeros(0, np.float32)
    found = forward(x)
    return found.classes.astype(np.int32), found.confidences.astype(np.float32)


def next_class(y, num_classes: int) -> np.ndarray:
    """Return the targets of the paper's first targeted setting.

    Args:
        y: [N] labels.
        num_classes: K.

    Returns:
        [N] int32, `(y + 1) mod K`.
    """
    return ((np.asarray(y) + 1) % num_classes).astype(np.int32)


def run_attack(params, apply_fn: ApplyFn, x, y, *, targets=None, ids=None, method: str = "gse",
               settings=None, hyperparams=None, bounds=(0.0, 1.0), key=None, lanes: int | None = None, about=None,
               progress: Callable[[Progress], None] | None = None) -> AttackRun:
    """Attack the correctly classified images of a data set and classify the results afresh.

    Args:
        params, apply_fn, x, y, targets, method, settings, hyperparams, bounds, key, lanes, progress:
            as in `gse_jax.attack`.
        ids: [N] sample ids; None numbers them.
        about: more facts to keep with the run; JSON values.

    Returns:
        AttackRun. Images that the model misclassifies are not attacked and come back unchanged
        as ALREADY_MISCLASSIFIED, those with logits that are not finite as NON_FINITE. An image whose
        success does not hold in the fresh pass over the stored arrays (which may round differently) is
        counted as not found and comes back unchanged.

    Raises:
        TypeError: as `gse_jax.attack`.
        ValueError: as `gse_jax.attack`.
    """
    x, y = np.asarray(x), np.asarray(y)
    if x.dtype == np.float64:  # as the attack sees it
        x = x.astype(jax.dtypes.canonicalize_dtype(x.dtype), copy=False)
    targets = None if targets is None else np.asarray(targets)
    bounds = validation.check_bounds(bounds)
    validation.check_problem(params, apply_fn, x, y, targets, bounds)
    if ids is not None and len(ids) != len(x):
        raise ValueError(f"ids must name each of the {len(x)} images, got {len(ids)}")
    options = dict(method=method, settings=settings, hyperparams=hyperparams, bounds=bounds, key=key, lanes=lanes)
    # Says what is wrong with them before anything compiles.
    attack(params, apply_fn, x[:0], y[:0], targets=None if targets is None else targets[:0], **options)
    forward = Forward(params, apply_fn, x.shape[1:])
    before = _classified(forward, x)
    chosen = np.flatnonzero(before[0] == y)
    start = time.perf_counter()
    # An image's random numbers do not depend on which others the model gets right, so that models can be compared.
    result = attack_chosen(params, apply_fn, x, y, chosen, targets=targets, progress=progress, **options)
    adversarials = x.copy()
    adversarials[chosen] = np.asarray(result.adversarials)
    seconds = time.perf_counter() - start
    after = _classified(forward, adversarials)
    fooled = after[0] == targets if targets is not None else after[0] != y
    fooled &= after[0] >= 0
    # A success that does not survive the fresh pass is none, nor a clean image that only the attack's own
    # batch, which rounds differently, misclassified.
    lost = np.zeros(len(x), bool)
    lost[chosen] = np.isin(result.status, (Status.FOUND, Status.ALREADY_MISCLASSIFIED)) & ~fooled[chosen]
    adversarials[lost] = x[lost]
    for now, was in zip(after, before):
        now[lost] = was[lost]
    status = np.where(before[0] < 0, Status.NON_FINITE, Status.ALREADY_MISCLASSIFIED).astype(np.int32)
    status[chosen] = np.where(lost[chosen], Status.NOT_FOUND, result.status)

    def spread(values):
        full = np.zeros(len(x), values.dtype)
        full[chosen] = np.asarray(values)
        return full

    devices = local_devices()
    facts = {"hyperparams": {} if hyperparams is None else plain(hyperparams),
             "settings": repr(settings) if settings is not None else "preset",
             "method": result.method, "preset": result.preset, "bounds": list(bounds),
             "seconds": seconds, "platform": devices[0].platform, "devices": len(devices),
             "jax": jax.__version__, "gse_jax": gse_jax.__version__}
    if key is None or isinstance(key, (int, np.integer)):
        facts["seed"] = int(key or 0)
    return AttackRun(
        x=x, y=y.astype(np.int32),
        targets=np.full(len(x), -1, np.int32) if targets is None else targets.astype(np.int32),
        adversarials=adversarials, success=fooled, status=status,
        gradient_evals=spread(result.gradient_evals), forward_evals=spread(result.forward_evals),
        tradeoff=np.where(lost, result.tradeoff.dtype.type(0), spread(result.tradeoff)),
        predictions_before=before[0], predictions_after=after[0],
        confidences_before=before[1], confidences_after=after[1],
        ids=np.asarray([str(i) for i in (range(len(x)) if ids is None else ids)], str),
        about={**facts, **(about or {})})


def save_run(run: AttackRun, path) -> Path:
    """Write a run as one npz file, whole or not at all.

    Args:
        run: the run.
        path: file; missing folders are made.

    Returns:
        The path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: value for name, value in run._asdict().items() if name != "about"}
    with replacing(path) as file:
        np.savez_compressed(file, about=np.asarray(json.dumps(run.about)), **arrays)
    return path


def load_run(path) -> AttackRun:
    """Read a run that `save_run` wrote.

    Args:
        path: file, or a folder with `adversarials.npz` in it.

    Returns:
        AttackRun.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a run, in one line.
    """
    path = Path(path)
    path = path / "adversarials.npz" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no run at {path}; expected the npz file of gse-jax attack, "
                                "or its folder")
    try:
        # Opened here: NumPy leaves a file open that is no archive.
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            fields = {name: file[name] for name in AttackRun._fields}
        return AttackRun(**{**fields, "about": json.loads(str(fields["about"]))})
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a run of gse-jax attack: {error}") from None
