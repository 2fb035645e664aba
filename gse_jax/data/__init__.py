"""Where images come from: one string names a source, every source gives the same `Dataset`."""

from gse_jax.data.array_images import ArrayImages
from gse_jax.data.cifar import prepare as prepare_cifar
from gse_jax.data.dataset import Dataset
from gse_jax.data.image_files import ImageFiles
from gse_jax.data.registry import load, open_source, sources

__all__ = ["ArrayImages", "Dataset", "ImageFiles", "load", "open_source", "prepare_cifar",
           "sources"]
