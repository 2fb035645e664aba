"""Settings and hyperparameters of the refinement.

References:
    gse_jax's own method; derived in `docs/refinement.md`.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from gse_jax.attacks.configuration import check_fits, check_whole_numbers, known_numbers

OBJECTIVES = ("patches", "pixels", "clusters", "l2")
MOVES = ("shrink", "relocate", "thin", "scale")

# What each objective tries, in this order; the ablation is in `docs/refinement.md`.
DEFAULT_MOVES = {
    "patches": ("shrink", "relocate", "thin"),
    "pixels": ("thin", "shrink"),
    "clusters": ("shrink", "relocate", "thin"),
    "l2": ("scale",),
}
PUBLISHED_EVALS = 362  # gradients that published GSE spends on a CIFAR-10 image, untargeted
PUBLISHED_EVALS_TARGETED = 521


@dataclasses.dataclass(frozen=True)
class RefineSettings:
    """Static configuration of the refinement.

    Attributes:
        objective: what shrinks first: "patches" (d_{2,0}), "pixels", "clusters" or "l2"; the others
            decide between equals, in this order.
        max_evals: gradient evaluations per image, >= 1; those that found the first adversarial
            image included, where the refinement is part of an attack.
        max_repairs: gradient steps that a smaller support gets to become adversarial, >= 1.
        max_failures: failures in a row after which a move rests until another one succeeds, >= 1.
        scales: standard deviations, in pixels, of the blurs under which the pixels are ranked. Each
            one is a fresh start from the given image; the best of all is returned.
        moves: which moves to try, in order; empty for those that suit the objective.
        patch_size: side of the patches of d_{2,0}, in pixels.
    """

    objective: str = "patches"
    max_evals: int = PUBLISHED_EVALS
    max_repairs: int = 8
    max_failures: int = 8
    scales: tuple[float, ...] = (3.0, 1.0, 2.0)
    moves: tuple[str, ...] = ()
    patch_size: int = 8


class RefineHyperparams(NamedTuple):
    """Traced configuration of the refinement; floats or arrays [].

    Lengths are in the units of images of range width 2, whatever the caller's `bounds`.

    Attributes:
        max_l2: largest l2 norm of the perturbation, > 0; infinite for none.
        max_linf: largest change of a pixel's channel, > 0; infinite for none.
        overshoot: how far beyond the decision boundary a gradient step aims, as a fraction of the
            standard deviation of the logits, > 0.
        patience: a support is given up when three steps leave more than this fraction of its first
            margin, in (0, 1].
    """

    max_l2: float = math.inf  # [] float
    max_linf: float = math.inf  # [] float
    overshoot: float = 0.25  # [] float
    patience: float = 0.7  # [] float


def moves_of(settings: RefineSettings) -> tuple[str, ...]:
    """Return the moves that these settings try, in order."""
    return settings.moves or DEFAULT_MOVES[settings.objective]


def check(settings: RefineSettings, hyperparams: RefineHyperparams, image_shape) -> None:
    """Refuse a configuration that cannot run; see `Method.check`."""
    if settings.objective not in OBJECTIVES:
        raise ValueError(f"objective={settings.objective!r} must be one of "
                         f"{', '.join(map(repr, OBJECTIVES))}")
    unknown = set(settings.moves) - set(MOVES)
    if unknown:
        raise ValueError(f"settings.moves holds {sorted(unknown)[0]!r}; "
                         f"use {', '.join(map(repr, MOVES))}")
    counts = ("max_evals", "max_repairs", "max_failures", "patch_size")
    check_whole_numbers(settings, dict.fromkeys(counts, 1), prefix="")
    numbers = np.asarray(settings.scales)
    if numbers.ndim != 1 or not numbers.size or numbers.dtype.kind not in "iuf" or not (numbers > 0.0).all():
        raise ValueError(f"settings.scales={settings.scales} must hold positive numbers of pixels, "
                         "e.g. (3.0, 1.0, 2.0)")
    check_fits(settings, "patch_size", image_shape)
    for name, number in known_numbers(hyperparams):
        largest = {"patience": 1.0, "overshoot": 1e6}.get(name, math.inf)
        if not 0.0 < number <= largest:
            raise ValueError(f"{name}={number:g} must be > 0"
                             + ("" if largest == math.inf else f" and <= {largest:g}"))
