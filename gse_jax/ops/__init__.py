"""Pure array mathematics for one image: no model, no loop, no state."""

from gse_jax.ops.margin import is_adversarial, margin_loss
from gse_jax.ops.neighbours import count_patches, dilate, gaussian_blur, gaussian_kernel
from gse_jax.ops.prox import (
    half_quasinorm_prox,
    half_quasinorm_threshold,
    hard_threshold,
    soft_threshold,
    two_thirds_quasinorm_prox,
)
from gse_jax.ops.tradeoff import largest_active_tradeoff, update_tradeoff

__all__ = [
    "count_patches",
    "dilate",
    "gaussian_blur",
    "gaussian_kernel",
    "half_quasinorm_prox",
    "half_quasinorm_threshold",
    "hard_threshold",
    "is_adversarial",
    "largest_active_tradeoff",
    "margin_loss",
    "soft_threshold",
    "two_thirds_quasinorm_prox",
    "update_tradeoff",
]
