"""Source strings -> readers. A new source is one module file and one line in `_SOURCES`."""

import functools
import numbers
from collections.abc import Callable
from typing import NamedTuple

from gse_jax.data import cifar, digits, folder, nips2017, npz, tfds
from gse_jax.data.array_images import ArrayImages
from gse_jax.data.dataset import Dataset
from gse_jax.data.image_files import ImageFiles


class _Source(NamedTuple):
    """One registry row: how the string is written, and what opens it.

    `open_files(rest, limit=..., data_dir=...)` is called with what follows the first colon of the
    source string, "" without one. It leaves images where they are; its result has `to_dataset()`,
    or is a `Dataset`.
    """

    usage: str
    open_files: Callable[..., Dataset | ArrayImages | ImageFiles]


_SOURCES = {
    "digits": _Source("digits[:test|:train]", digits.open_files),
    "npz": _Source("npz:FILE", npz.open_files),
    "tfds": _Source(tfds.USAGE, tfds.open_files),
    **{name: _Source(layout.usage, functools.partial(cifar.open_files, layout))
       for name, layout in cifar.LAYOUTS.items()},
    "folder": _Source(folder.USAGE, folder.open_files),
    "nips2017": _Source(nips2017.USAGE, nips2017.open_files),
}


def sources() -> tuple[str, ...]:
    """Return how the source strings that `load` knows are written."""
    return tuple(row.usage for row in _SOURCES.values())


def load(source: str, *, limit: int | None = None, data_dir: str | None = None) -> Dataset:
    """Load labelled images.

    Args:
      source: One of
        `digits` or `digits:train`: scikit-learn's handwritten digits as 32x32x3 images, 360 or
        1437 of a fixed split; needs scikit-learn, no download.
        `npz:FILE`: arrays `x` (uint8, or floats in [0, 1], NHWC), `y` (integers), optionally `ids`.
        `tfds:NAME:SPLIT`: a prepared TensorFlow Datasets set with image and label, such as
        cifar10, cifar100, mnist or imagenet2012; needs tensorflow-datasets and Pillow, and
        TensorFlow only where the set is not prepared as array_record.
        `cifar10:ARCHIVE` or `cifar10:ARCHIVE,split=train`: the official cifar-10-binary.tar.gz;
        `cifar100:ARCHIVE` likewise, with the 100 fine classes.
        `folder:PATH`: image files in one folder per class; RGB, 8 bits.
        `nips2017:FOLDER`: `images.csv` (1-based labels) beside `images/*.png`.
        `tfds`, `folder` and `nips2017` may end with `,size=224` (height and width), which stretches
        the images, and `,resize=crop`, which keeps their centre instead (`resize=paper` is the
        default).
      limit: Keep the first so many images, at least 1; None keeps all.
      data_dir: Folder of the prepared TFDS sets, and the folder that a relative FILE starts from;
        `digits` does not need it.

    Returns:
      The images with labels and stable ids.

    Raises:
      ValueError: If the source string, the limit or the content is not as described.
      TypeError: If an argument or an array has another type.
      FileNotFoundError: If the file or prepared data set is not there.
      ImportError: If the package that reads this source is not installed.
    """
    kind, rest = _checked(source, limit)
    opened = _SOURCES[kind].open_files(rest, limit=limit, data_dir=data_dir)
    return opened if isinstance(opened, Dataset) else opened.to_dataset()


def open_source(source: str, *, limit: int | None = None,
                data_dir: str | None = None) -> Dataset | ArrayImages | ImageFiles:
    """Open labelled images for an evaluation, which reads them one by one.

    Args:
      source, limit, data_dir: As in `load`.

    Returns:
      An `ImageFiles` or `ArrayImages`, which reads an image only when it is asked for; a damaged
      image raises then, and only then. For `digits`, which is small, a `Dataset`.

    Raises:
      ValueError, TypeError, FileNotFoundError, ImportError: As in `load`.
    """
    kind, rest = _checked(source, limit)
    return _SOURCES[kind].open_files(rest, limit=limit, data_dir=data_dir)


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
