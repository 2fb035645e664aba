"""Source strings -> readers. A new source is one module file and one line in `_SOURCES`."""

import numbers
from collections.abc import Callable
from typing import NamedTuple

from gse_jax.data import cifar10, digits, folder, nips2017, npz, tfds
from gse_jax.data.dataset import Dataset
from gse_jax.data.image_files import ImageFiles


class _Source(NamedTuple):
    """One registry row: how the string is written, and its reader.

    A reader is called as `read(rest, limit=..., data_dir=..., keep_faulty=...)`, `rest` being what
    follows the first colon of the source string, "" without one. Where images can stay in their
    files, `open_files(rest, limit=..., data_dir=...)` leaves them there.
    """

    usage: str
    read: Callable[..., Dataset]
    open_files: Callable[..., ImageFiles] | None = None


_SOURCES = {
    "digits": _Source("digits[:test|:train]", digits.read),
    "npz": _Source("npz:FILE", npz.read),
    "tfds": _Source("tfds:NAME:SPLIT", tfds.read),
    "cifar10": _Source(cifar10.USAGE, cifar10.read),
    "folder": _Source(folder.USAGE, folder.read, folder.open_files),
    "nips2017": _Source(nips2017.USAGE, nips2017.read, nips2017.open_files),
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
        `cifar10:ARCHIVE` or `cifar10:ARCHIVE,split=train`: the official cifar-10-binary.tar.gz.
        `folder:PATH`: image files in one folder per class; RGB, 8 bits.
        `nips2017:FOLDER`: `images.csv` (1-based labels) beside `images/*.png`.
        The last two may end with `,size=224` (height and width), which stretches the images, and
        `,resize=crop`, which keeps their centre instead (`resize=paper` is the default).
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
    kind, rest = _checked(source, limit)
    return _SOURCES[kind].read(rest, limit=limit, data_dir=data_dir, keep_faulty=keep_faulty)


def open_source(source: str, *, limit: int | None = None,
                data_dir: str | None = None) -> Dataset | ImageFiles:
    """Open labelled images for an evaluation, which reads them one by one.

    Args:
      source: As in `load`.
      limit: As in `load`.
      data_dir: As in `load`.

    Returns:
      For `folder` and `nips2017` an `ImageFiles`, which decodes an image only when it is asked for
      and raises for one that is damaged; else what `load` returns with `keep_faulty`.

    Raises:
      ValueError: As in `load`.
      TypeError: As in `load`.
      FileNotFoundError: As in `load`.
      ImportError: As in `load`.
    """
    kind, rest = _checked(source, limit)
    if (open_files := _SOURCES[kind].open_files) is not None:
        return open_files(rest, limit=limit, data_dir=data_dir)
    return _SOURCES[kind].read(rest, limit=limit, data_dir=data_dir, keep_faulty=True)


def _checked(source: str, limit: int | None) -> tuple[str, str]:
    """Return the kind of source and what follows its colon."""
    if not isinstance(source, str):
        raise TypeError(f"source: got {type(source).__name__}, expected a string, {_usage()}")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, numbers.Integral)):
        raise TypeError(f"limit: got {limit!r}, expected an integer of at least 1, or None")
    if limit is not None and limit < 1:
        raise ValueError(f"limit: got {limit}, expected an integer of at least 1, or None")
    kind, _, rest = source.partition(":")
    if kind not in _SOURCES:
        raise ValueError(f"source: got {source!r}, expected {_usage()}")
    return kind, rest


def _usage() -> str:
    return " or ".join(sources())
