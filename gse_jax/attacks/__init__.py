"""(model function, images) -> adversarials: the attacks, and the engine that runs them."""

from gse_jax.attacks.algorithm import Sample
from gse_jax.attacks.api import attack, attack_stream, default_domain, refine
from gse_jax.attacks.gse import GSEHyperparams, GSESettings
from gse_jax.attacks.registry import METHODS, preset
from gse_jax.attacks.runner import Progress, Stretch

__all__ = [
    "METHODS",
    "GSEHyperparams",
    "GSESettings",
    "Progress",
    "Sample",
    "Stretch",
    "attack",
    "attack_stream",
    "default_domain",
    "preset",
    "refine",
]
