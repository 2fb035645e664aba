"""The shared vocabulary of gse_jax: what every room calls the same thing.

| name | meaning |
|---|---|
| `x` | images [N, H, W, C], float, values inside `bounds` |
| `y` | true labels [N], int; never a target |
| `targets` | classes a targeted attack aims at [N], int |
| `adversarials` | attacked images [N, H, W, C], same range as `x` |
| `w` | the perturbation `adversarials - x` |
| `tradeoff` | lambda, the weight of the sparsity term |
| `bounds` | (lowest, highest) pixel value of the user's images |
| `lanes` | number of images that are worked on at the same time |
| `settings` | static configuration: loop lengths, window sizes |
| `hyperparams` | traced configuration: a pytree of floats, sweepable without recompiling |
"""

import dataclasses
import enum
from collections.abc import Callable
from typing import Any, Literal, TypedDict

import jax

# apply_fn(params, x[N, H, W, C]) -> logits [N, classes]
ApplyFn = Callable[[Any, jax.Array], jax.Array]

Bounds = tuple[float, float]


class Status(enum.IntEnum):
    """Outcome of an attack on one image; `Status(i).message` says it in words."""

    FOUND = 0
    NOT_FOUND = 1
    ALREADY_MISCLASSIFIED = 2
    NON_FINITE = 3

    @property
    def message(self) -> str:
        """One sentence for people."""
        return _MESSAGES[self]


_MESSAGES = {
    Status.FOUND: "an adversarial image was found",
    Status.NOT_FOUND: "no adversarial image was found; the image is returned unchanged",
    Status.ALREADY_MISCLASSIFIED: "the clean image already has the wanted prediction; "
    "it is returned unchanged",
    Status.NON_FINITE: "the model gave NaN or infinite logits or gradients; "
    "the image is returned unchanged",
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttackResult:
    """What an attack found, per image; a pytree.

    Attributes:
        adversarials: [N, H, W, C] in the caller's bounds; the clean image where nothing was found.
        success: [N] bool; the returned image has the wanted prediction (not `y`, or the target).
            True also for images that were already misclassified: see `status` to tell them apart.
        status: [N] int32, values of `Status`.
        gradient_evals: [N] int32; gradients of the model that the attack used on the image. A
            last iterate whose prediction alone is needed counts as a forward pass; that the
            engine computes its gradient in the same call shows in `Progress.lane_evals`. (The
            compared attacks count it, as their authors' code takes it: one for the clean image and
            one for each restart or run, in homotopy those of its last cuts.)
        forward_evals: [N] int32; forward passes, including those inside gradient evaluations.
        tradeoff: [N] trade-off (lambda) of the run that gave the adversarial, in the units of
            images of range width 2; 0 where no run succeeded.
        method: name of the attack (static).
        preset: the settings that were used, e.g. "cifar10 untargeted" or "custom" (static).
    """

    adversarials: jax.Array
    success: jax.Array
    status: jax.Array
    gradient_evals: jax.Array
    forward_evals: jax.Array
    tradeoff: jax.Array
    method: str = dataclasses.field(default="", metadata={"static": True})
    preset: str = dataclasses.field(default="", metadata={"static": True})


class Record(TypedDict):
    """What an evaluation says about one sample in one case; one JSON line of a run directory.

    Attributes:
        sample_id: the sample's id in its data source.
        index: its position there.
        case: e.g. "gse/untargeted" or "gse/targeted+1".
        method: name of the attack.
        label: true label; -1 where the sample could not be read.
        target: class aimed at; None in an untargeted case.
        clean_prediction: predicted class of the clean image; -1 where unknown.
        status: a `Status` in lower case, or "quarantined" for a sample that cannot be used.
        success: whether the image that came out has the wanted prediction (not `label`, or
            `target`), by a forward pass of its own over the stored array. True with status
            "already_misclassified" where the clean image had it from the start.
        prediction: predicted class of the image that came out; None where nothing was attacked.
        confidence_before: probability of `clean_prediction`; None where unknown.
        confidence_after: probability of `prediction`; None where nothing was attacked.
        gradient_evals: gradients spent by the attack.
        forward_evals: forward passes spent by the attack, those inside gradients included.
        tradeoff: as in `AttackResult`.
        changed_pixels: number of changed pixels; None unless status is "found", as the following.
        num_clusters: number of 4-connected clusters of them.
        l2: norm of the perturbation in [-1, 1] units.
        linf: largest absolute change in [-1, 1] units.
        patch_count: d_{2,0} with patches of 8 x 8 pixels.
        reason: why the sample is quarantined, non-finite or not counted; None otherwise.
        array: [file below arrays/, row] of the images; None where nothing was attacked.
    """

    sample_id: str
    index: int
    case: str
    method: str
    label: int
    target: int | None
    clean_prediction: int
    status: Literal["found", "not_found", "already_misclassified", "non_finite", "quarantined"]
    success: bool
    prediction: int | None
    confidence_before: float | None
    confidence_after: float | None
    gradient_evals: int
    forward_evals: int
    tradeoff: float
    changed_pixels: int | None
    num_clusters: int | None
    l2: float | None
    linf: float | None
    patch_count: int | None
    reason: str | None
    array: list[Any] | None


class StoreError(RuntimeError):
    """The run directory cannot be used; the message says in one line what to do."""
