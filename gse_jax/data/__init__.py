"""Where images come from: one string names a source, every source gives the same `Dataset`."""

from gse_jax.data.cifar10 import prepare as prepare_cifar10
from gse_jax.data.dataset import Dataset
from gse_jax.data.image_files import ImageFiles
from gse_jax.data.registry import load, open_source, sources

__all__ = ["Dataset", "ImageFiles", "load", "open_source", "prepare_cifar10", "sources"]
