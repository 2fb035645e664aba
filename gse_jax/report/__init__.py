"""Arrays and records -> figures. Imports only `gse_jax.types`; matplotlib when first used."""

from gse_jax.report.figures import save_figure
from gse_jax.report.figures_curves import (
    distribution_plots,
    interpretability_curves,
    success_curves,
)
from gse_jax.report.figures_panel import Prediction, attack_panel

__all__ = [
    "Prediction",
    "attack_panel",
    "distribution_plots",
    "interpretability_curves",
    "save_figure",
    "success_curves",
]
