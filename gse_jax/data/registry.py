"""Source strings -> readers. A new source is one module file and one line in `_SOURCES`."""

import numbers
from collections.abc import Callable
from typing import NamedTuple

from gse_jax.data import digits, npz, tfds
from gse_jax.data.dataset import Dataset


class _Source(NamedTuple):
    """One registry row: how the string is written, and its reader.

    A reader is called as `read(rest, limit=..., data_dir=..., keep_faulty=...)`, `rest` being what
    follows the first colon of the source string, "" without one.
    """

    usage: str
    read: Callable[..., Dataset]


_SOURCES = {
    "digits": _Source("digits[:test|:train]", digits.read),
    "npz": _Source("npz:FILE", npz.read),
    "tfds": _Source("tfds:NAME:SPLIT", tfds.read),
}


def sources() -> tuple[str, ...]:
    """Return how the source strings that `load` knows are written."""
    return tuple(row.usage for row in _SOURCES.values())


def load(source: str, *, limit: int | None = None, data_dir: str | None = None,
         keep_faulty: bool = False) -> Dataset:
    """Load labelled images.

    Args:
      source: One of
        `digits` or `digits:train`: scikit-learn's handwritten digits as 32x32x3 images, 360 or
        1437 of a fixed split; needs scikit-learn, no download.
        `npz:FILE`: arrays `x` (uint8, or floats in [0, 1], NHWC), `y` (integers), optionally `ids`.
        `tfds:NAME:SPLIT`: a TensorFlow Datasets set already prepared as array_record; needs
        tensorflow-datasets and Pillow, not TensorFlow.
      limit: Keep the first so many images, at least 1; None keeps all.
      data_dir: Folder of the prepared TFDS sets, and the folder that a relative FILE starts from;
        `digits` does not need it.
      keep_faulty: Keep floating-point images that hold NaN or leave [0, 1], for a caller that sets
        them aside one by one as `gse_jax.evaluation` does; else one of them refuses the whole.

    Returns:
      The images with labels and stable ids.

    Raises:
      ValueError: If the source string, the limit or the content is not as described.
      TypeError: If an argument or an array has another type.
      FileNotFoundError: If the file or prepared data set is not there.
      ImportError: If the package that reads this source is not installed.
    """
    if not isinstance(source, str):
        raise TypeError(f"source: got {type(source).__name__}, expected a string, {_usage()}")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, numbers.Integral)):
        raise TypeError(f"limit: got {limit!r}, expected an integer of at least 1, or None")
    if limit is not None and limit < 1:
        raise ValueError(f"limit: got {limit}, expected an integer of at least 1, or None")
    kind, _, rest = source.partition(":")
    if kind not in _SOURCES:
        raise ValueError(f"source: got {source!r}, expected {_usage()}")
    return _SOURCES[kind].read(rest, limit=limit, data_dir=data_dir, keep_faulty=keep_faulty)


def _usage() -> str:
    return " or ".join(sources())
