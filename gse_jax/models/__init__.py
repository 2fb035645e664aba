"""Image -> logits and features: architectures, weight files, normalisation, other libraries."""

from gse_jax.models.adapters import from_equinox, from_haiku, from_linen, from_nnx, from_torch
from gse_jax.models.classifier import NORMALIZATIONS, Classifier
from gse_jax.models.registry import load, names
from gse_jax.models.torch_checkpoint import convert
from gse_jax.models.weights_file import save

__all__ = ["Classifier", "NORMALIZATIONS", "convert", "from_equinox", "from_haiku", "from_linen",
           "from_nnx", "from_torch", "load", "names", "save"]
