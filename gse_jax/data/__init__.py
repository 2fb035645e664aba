"""Where images come from: one string names a source, every source gives the same `Dataset`."""

from gse_jax.data.dataset import Dataset
from gse_jax.data.registry import load, sources

__all__ = ["Dataset", "load", "sources"]
