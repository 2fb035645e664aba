"""Pure array mathematics for one image: no model, no loop, no state."""

from gse_jax.ops.blocks import average_blocks, expand_blocks, grid_shape
from gse_jax.ops.bregman import grid_cells, project_group_maxima, to_dual
from gse_jax.ops.clusters import count_clusters
from gse_jax.ops.groups import cell_sums, group_soft_threshold
from gse_jax.ops.line_search import LineSearch, advance_line_search, start_line_search
from gse_jax.ops.losses import cross_entropy, smooth_l0_gradient
from gse_jax.ops.margin import is_adversarial, logit_gap, margin_loss, signed_margin
from gse_jax.ops.neighbours import (
    close_patches,
    count_patches,
    dilate,
    gaussian_blur,
    gaussian_kernel,
    largest_in_patches,
    touched_patches,
)
from gse_jax.ops.projections import (
    largest_pixels,
    project_binary_sphere,
    project_l2_ball,
    project_sparse_box,
    project_sparse_sigma,
    sigma_map,
)
from gse_jax.ops.prox import (
    half_quasinorm_prox,
    half_quasinorm_threshold,
    hard_threshold,
    soft_threshold,
    survives_half_quasinorm,
    two_thirds_quasinorm_prox,
)
from gse_jax.ops.superpixels import (
    count_groups,
    count_prox,
    group_savings,
    largest_scores,
    project_superpixel_maxima,
    superpixel_soft_threshold,
    superpixel_sums,
)
from gse_jax.ops.tradeoff import largest_active_tradeoff, update_tradeoff
from gse_jax.ops.vertices import (
    capped_simplex_vertex,
    leading_pair,
    nuclear_group_vertex,
)

__all__ = [
    "LineSearch",
    "advance_line_search",
    "average_blocks",
    "capped_simplex_vertex",
    "cell_sums",
    "close_patches",
    "count_clusters",
    "count_groups",
    "count_patches",
    "count_prox",
    "cross_entropy",
    "dilate",
    "expand_blocks",
    "gaussian_blur",
    "gaussian_kernel",
    "grid_cells",
    "grid_shape",
    "group_savings",
    "group_soft_threshold",
    "half_quasinorm_prox",
    "half_quasinorm_threshold",
    "hard_threshold",
    "is_adversarial",
    "largest_active_tradeoff",
    "largest_in_patches",
    "largest_pixels",
    "largest_scores",
    "leading_pair",
    "logit_gap",
    "margin_loss",
    "nuclear_group_vertex",
    "project_binary_sphere",
    "project_group_maxima",
    "project_l2_ball",
    "project_sparse_box",
    "project_sparse_sigma",
    "project_superpixel_maxima",
    "sigma_map",
    "signed_margin",
    "smooth_l0_gradient",
    "soft_threshold",
    "start_line_search",
    "superpixel_soft_threshold",
    "superpixel_sums",
    "survives_half_quasinorm",
    "to_dual",
    "touched_patches",
    "two_thirds_quasinorm_prox",
    "update_tradeoff",
]
