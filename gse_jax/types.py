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
from typing import Any

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
        gradient_evals: [N] int32; gradients of the model spent on the image.
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
