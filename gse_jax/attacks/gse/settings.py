"""Settings, hyperparameters and presets of GSE.

References:
    arXiv 2311.17434, section 5.1 and appendix (hyperparameters).
"""

import dataclasses
from typing import NamedTuple

from gse_jax.attacks.configuration import check_fits, check_numbers, check_types, check_whole_numbers


@dataclasses.dataclass(frozen=True)
class GSESettings:
    """Static configuration of GSE; a change compiles anew.

    Attributes:
        num_runs: runs of the search over the initial trade-off, >= 1.
        max_steps: iterations of one run at most, >= 1.
        phase1_steps: iterations with the quasinorm prox before the support is frozen (k-hat),
            >= 0.
        num_boosted_runs: the last runs, in which an image without any success so far takes
            larger steps (`Hyperparams.boost`).
        blur_size: taps of the Gaussian that spreads perturbed pixels, odd.
        patch_size: side of the patches of d_{2,0}, by which runs are compared, in pixels.
        give_up_window: 0 for the published attack. Else a run counts as failed, without being
            completed, when the margin fell so little over the last `give_up_window` iterations on
            its frozen support that at this rate it would not reach 0. Saves evaluations, and may
            miss runs that would still succeed: `benchmarks/giving_up.py` measures both.
    """

    num_runs: int = 10
    max_steps: int = 200
    phase1_steps: int = 30
    num_boosted_runs: int = 2
    blur_size: int = 5
    patch_size: int = 8
    give_up_window: int = 0


class GSEHyperparams(NamedTuple):
    """Traced configuration of GSE; floats or arrays [], free to sweep without compiling anew.

    All are in the units of images of range width 2, whatever the caller's `bounds`.

    Attributes:
        mu: weight of the squared l2 norm, >= 0.
        step_size: sigma, > 0.
        q: trade-off reduction factor, > 0, in the paper below 1: a pixel far from the perturbation has its
            trade-off divided by q.
        blur_sigma: standard deviation of the blur, in pixels, > 0.
        initial_fraction: first trade-off as a fraction of the largest one that moves any pixel.
        boost: factor on `step_size` in the last runs of an image without success.
    """

    mu: float = 1.0  # [] float
    step_size: float = 0.005  # [] float
    q: float = 0.25  # [] float
    blur_sigma: float = 1.5  # [] float
    initial_fraction: float = 0.01  # [] float
    boost: float = 10.0  # [] float


# domain -> targeted -> (settings, hyperparams); numbers from the paper's published configuration.
_CIFAR10 = GSEHyperparams(mu=1.0, step_size=0.005, q=0.25)
_IMAGENET = GSEHyperparams(mu=0.1, step_size=0.05, q=0.9)
_IMAGENET_ROBUST = GSEHyperparams(mu=0.0005, step_size=0.75, q=0.9)
PRESETS = {
    "cifar10": {False: (GSESettings(phase1_steps=30), _CIFAR10),
                True: (GSESettings(phase1_steps=50), _CIFAR10)},
    "imagenet": {False: (GSESettings(phase1_steps=50), _IMAGENET),
                 True: (GSESettings(phase1_steps=50), _IMAGENET)},
    "imagenet_robust": {False: (GSESettings(phase1_steps=150), _IMAGENET_ROBUST),
                        True: (GSESettings(phase1_steps=150), _IMAGENET_ROBUST)},
}


def preset(domain: str, targeted: bool) -> tuple[GSESettings, GSEHyperparams]:
    """Return the paper's configuration.

    Args:
        domain: "cifar10", "imagenet" (also NIPS2017), or "imagenet_robust" (adversarially trained
            ResNet-50, l2, eps = 3).
        targeted: direction of the attack.

    Returns:
        (settings, hyperparams).

    Raises:
        ValueError: for an unknown domain.
    """
    if domain not in PRESETS:
        raise ValueError(f"domain={domain!r} has no preset; "
                         f"use one of {', '.join(map(repr, PRESETS))}")
    return PRESETS[domain][bool(targeted)]


def check(settings: GSESettings, hyperparams: GSEHyperparams, image_shape) -> None:
    """Refuse a configuration that cannot run; see `Method.check`."""
    check_types("gse", settings, hyperparams, GSESettings, GSEHyperparams)
    check_whole_numbers(settings, {"num_runs": 1, "max_steps": 1, "phase1_steps": 0, "num_boosted_runs": 0,
                                   "blur_size": 1, "patch_size": 1, "give_up_window": 0})
    check_numbers(hyperparams, may_be_zero=("mu",))
    side = min(image_shape[:2])
    if settings.blur_size % 2 == 0 or settings.blur_size // 2 >= side:
        raise ValueError(f"settings.blur_size={settings.blur_size} must be odd and at most "
                         f"{2 * side - 1} for images of {image_shape[0]}x{image_shape[1]} pixels")
    check_fits(settings, "patch_size", image_shape)
