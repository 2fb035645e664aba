"""Numbers and maps about adversarial images: (images, adversarials) -> one value per image."""

from gse_jax.metrics.activation_maps import cam, grad_cam, normalise_map, resize_map
from gse_jax.metrics.aggregate import SPARSITY, ImageMetrics, Summary, image_metrics, summarise, summary
from gse_jax.metrics.clusters import (
    count_clusters,
    count_clusters_host,
    num_clusters,
    num_clusters_host,
)
from gse_jax.metrics.overlap import Overlap, overlap_score, salient_region
from gse_jax.metrics.pareto import pareto_set
from gse_jax.metrics.protocol import (
    Statistic,
    TargetedCase,
    TargetedProtocol,
    describe,
    success_at_k,
    targeted_protocol,
)
from gse_jax.metrics.saliency import adversarial_saliency, interpretability_score
from gse_jax.metrics.sparsity import (
    active_superpixels,
    changed_mask,
    changed_pixels,
    grid_group_count,
    l2_norm,
    linf_norm,
    patch_count,
    perturbation,
)

__all__ = [
    "SPARSITY",
    "ImageMetrics",
    "Overlap",
    "Statistic",
    "Summary",
    "TargetedCase",
    "TargetedProtocol",
    "active_superpixels",
    "adversarial_saliency",
    "cam",
    "changed_mask",
    "changed_pixels",
    "count_clusters",
    "count_clusters_host",
    "describe",
    "grad_cam",
    "grid_group_count",
    "image_metrics",
    "interpretability_score",
    "l2_norm",
    "linf_norm",
    "normalise_map",
    "num_clusters",
    "num_clusters_host",
    "overlap_score",
    "pareto_set",
    "patch_count",
    "perturbation",
    "resize_map",
    "salient_region",
    "success_at_k",
    "summarise",
    "summary",
    "targeted_protocol",
]
