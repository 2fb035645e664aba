"""Arrays and records -> figures, tables and a page. Imports only `gse_jax.types`.

matplotlib and jinja2 are imported when first used.
"""

from gse_jax.report.figures import save_figure
from gse_jax.report.figures_curves import (
    distribution_plots,
    interpretability_curves,
    success_curves,
)
from gse_jax.report.figures_front import front_plot
from gse_jax.report.figures_panel import Prediction, attack_panel
from gse_jax.report.page import write_page
from gse_jax.report.tables import write_table, write_tables

__all__ = [
    "Prediction",
    "attack_panel",
    "distribution_plots",
    "front_plot",
    "interpretability_curves",
    "save_figure",
    "success_curves",
    "write_page",
    "write_table",
    "write_tables",
]
