"""Make adversarial images sparser while they stay adversarial; `method="gse_refined"`."""

from gse_jax.attacks.refinement.descent import within_caps
from gse_jax.attacks.refinement.method import (
    GSE_REFINED,
    REFINE,
    GSERefinedHyperparams,
    GSERefinedSettings,
)
from gse_jax.attacks.refinement.settings import RefineHyperparams, RefineSettings

__all__ = [
    "GSE_REFINED",
    "REFINE",
    "GSERefinedHyperparams",
    "GSERefinedSettings",
    "RefineHyperparams",
    "RefineSettings",
    "within_caps",
]
