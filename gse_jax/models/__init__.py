"""Image -> logits and features: architectures, weight files, normalisation."""

from gse_jax.models.classifier import Classifier
from gse_jax.models.registry import load, names
from gse_jax.models.weights_file import save

__all__ = ["Classifier", "load", "names", "save"]
