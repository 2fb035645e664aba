"""TensorFlow Datasets that are prepared on this machine, with TensorFlow or without.

Sets prepared as array_record are read by `tfds.data_source`, which gives single examples by their
number and needs no TensorFlow; all others by `tfds.load`, which needs it and gives examples in
sequence only, so their encoded images are copied to a temporary file first. Either way images are
decoded when they are asked for. Preparing stays with the user: it may download very much.

References:
  https://www.tensorflow.org/datasets/data_source, https://www.tensorflow.org/datasets/api_docs
"""

import contextlib
import importlib.util
import os
import re
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from gse_jax.data.arguments import split_options
from gse_jax.data.dataset import checked_names
from gse_jax.data.image_files import OPTIONS, ImageFiles, resize_from_options

USAGE = "tfds:NAME:SPLIT[,size=PIXELS][,resize=paper|crop]"
# NAME may end with a version (imagenet_v2:3.0.0) and SPLIT with a slice (test[:100]).
_NAME_AND_SPLIT = re.compile(r"(?P<name>.+):(?P<split>[^:\[\]]+(?:\[[^\]]*\])?)")
# Features that name an example: CIFAR's and ImageNet's.
_ID_FEATURES = ("id", "file_name")


def open_files(rest: str, *, limit: int | None, data_dir: str | None) -> ImageFiles:
    """Open a prepared TFDS set.

    TFDS stores examples shuffled. Where they carry an id, they come sorted by it, so that a limit
    gives the same images on every machine; else they come in stored order.

    Args:
      rest: `NAME:SPLIT` and options; the set needs the features `image` and `label`.
      limit: Keep the first so many images, or None.
      data_dir: TFDS's folder, or None for its default (`~/tensorflow_datasets`).

    Returns:
      The images, with the class names that TFDS knows.

    Raises:
      ValueError: If the string is malformed, the set or split unknown or empty, a feature missing
        or an option wrong.
      FileNotFoundError: If the set is not prepared, or not as array_record and TensorFlow is not
        installed.
    """
    text, options = split_options(rest, OPTIONS)
    resize, match = resize_from_options(options), _NAME_AND_SPLIT.fullmatch(text)
    if match is None:
        raise ValueError(f"source: got 'tfds:{rest}', expected {USAGE}, as tfds:cifar10:test")
    source = f"tfds:{text}"
    features, images, labels, ids = _open(match["name"], match["split"], data_dir, source)
    if not labels:
        raise ValueError(f"source: {source} is empty")
    order = range(len(labels)) if ids is None else sorted(range(len(ids)), key=ids.__getitem__)
    order = np.asarray(order)[:limit]
    names = tuple(getattr(features["label"], "names", None) or ())
    labels, ids = checked_names(len(order), np.asarray(labels)[order],
                                None if ids is None else [ids[i] for i in order], names, source)
    return ImageFiles(_Selected(images, order), labels, ids, names, resize, source,
                      channels=1 if features["image"].shape[-1:] == (1,) else 3)


class _Selected(Sequence):
    """Some images of a sequence, in another order."""

    def __init__(self, images: Any, order: np.ndarray):
        self._images, self._order = images, order

    def __len__(self):
        return len(self._order)

    def __getitem__(self, index):
        return self._images[int(self._order[index])]


class _Images:
    """The images of a `tfds.data_source`, encoded as they are stored.

    TFDS's own decoding takes the numbers of a palette for grey values, and CMYK for RGBA.
    """

    def __init__(self, records: Any):
        self._records = records

    def __getitem__(self, index):
        return self._records[index]["image"]


class _Spool:
    """Encoded images in a temporary file, which goes with this object."""

    def __init__(self):
        self._file, self._ends = tempfile.TemporaryFile(), [0]

    def __del__(self):
        self._file.close()

    def append(self, content: bytes) -> None:
        self._file.write(content)
        self._ends.append(self._ends[-1] + len(content))

    def __getitem__(self, index):
        self._file.flush()
        start, end = self._ends[index:index + 2]
        return os.pread(self._file.fileno(), end - start, start)  # Has no position to share.


def _open(name: str, split: str, data_dir: str | None,
          source: str) -> tuple[Any, Any, list[int], list[str] | None]:
    """Return features, images by position, labels, and ids where the set has them."""
    import tensorflow_datasets as tfds  # when needed: it takes long

    try:
        try:
            return _by_number(tfds, name, split, data_dir)
        except (KeyError, AssertionError, NotImplementedError, FileNotFoundError,
                ValueError) as error:
            # NotImplementedError is TFDS's answer for a set that has no access by number, and a
            # ValueError that tells of another file format that of a set prepared as TFRECORD.
            if isinstance(error, ValueError) and "File format" not in str(error):
                raise
            if importlib.util.find_spec("tensorflow") is None:
                raise FileNotFoundError from None
        return _in_sequence(tfds, name, split, data_dir)
    except tfds.core.DatasetNotFoundError:  # Its own message lists several hundred names.
        raise ValueError(
            f"source: TFDS knows no set {name!r}, "
            f"and none is prepared in {data_dir or 'its default folder'}"
        ) from None
    except (KeyError, AssertionError, FileNotFoundError):
        where = f", data_dir={data_dir!r}" if data_dir else ""
        raise FileNotFoundError(
            f"source: {source} is not prepared as array_record (nor is tensorflow here for another "
            "format); prepare it once where tensorflow is installed: "
            f"tfds.builder({name!r}{where}, file_format='array_record').download_and_prepare()"
        ) from None
    except ValueError as error:  # For example an unknown split; the message names those there are.
        text = " ".join(str(error).split())[:300]
        raise ValueError(f"source: {source}: {text}") from None


def _by_number(tfds, name, split, data_dir):
    def records(**options):
        return tfds.data_source(name, split=split, data_dir=data_dir, download=False,
                                builder_kwargs={"file_format": "array_record"}, **options)

    whole = records()
    features = whole.dataset_info.features
    key = _checked_features(features)
    # Every id must be seen to sort; leaving the images encoded makes that pass cheap.
    examples = records(decoders={"image": tfds.decode.SkipDecoding()})
    try:
        if len(examples):
            examples[0]
    except ImportError:  # TFDS's own mock encodes its images for this, with TensorFlow.
        examples = whole
    read = lambda name, convert: [convert(examples[i][name]) for i in range(len(examples))]
    return features, _Images(examples), read("label", int), read(key, _text) if key else None


def _in_sequence(tfds, name, split, data_dir):
    import tensorflow as tf

    with contextlib.suppress(RuntimeError):  # it runs already
        tf.config.set_visible_devices([], "GPU")  # it would take all of the memory that JAX needs
    images, labels, ids = _Spool(), [], []
    examples, info = tfds.load(
        name, split=split, data_dir=data_dir, download=False, shuffle_files=False, with_info=True,
        decoders={"image": tfds.decode.SkipDecoding()},
        # One file after the other: the order in which array_record numbers them.
        read_config=tfds.ReadConfig(interleave_cycle_length=1))
    key = _checked_features(info.features)
    for example in tfds.as_numpy(examples):
        images.append(example["image"])
        labels.append(int(example["label"]))
        ids.append(_text(example[key]) if key else "")
    return info.features, images, labels, ids if key else None


def _checked_features(features: Any) -> str | None:
    """Return the feature that names an example, or None."""
    if missing := [key for key in ("image", "label") if key not in features]:
        raise ValueError(f"the features are {', '.join(features)}, expected image and label "
                         f"({missing[0]} is missing)")
    import tensorflow_datasets as tfds

    image = features["image"]
    kind = np.dtype(image.np_dtype)
    if not isinstance(image, tfds.features.Image) or kind != np.uint8:
        raise ValueError(f"image is {type(image).__name__} of {kind}, expected Image of uint8")
    return next((key for key in _ID_FEATURES if key in features), None)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
