"""GSE: group-wise sparse and explainable adversarial attacks (arXiv 2311.17434)."""

from gse_jax.attacks.gse.algorithm import GSE
from gse_jax.attacks.gse.settings import GSEHyperparams, GSESettings

__all__ = ["GSE", "GSEHyperparams", "GSESettings"]
