"""TensorFlow Datasets without TensorFlow: `tfds.data_source` over prepared array_record files.

`tfds.load` and the default TFRECORD format need TensorFlow; `data_source` with array_record does
not. Downloading and preparing stay with the user: for most built-in sets they need TensorFlow.

References:
  https://www.tensorflow.org/datasets/data_source
"""

import re
from typing import Any

import numpy as np

from gse_jax.data.dataset import Dataset, checked_dataset

# NAME may end with a version (imagenet_v2:3.0.0) and SPLIT with a slice (test[:100]).
_NAME_AND_SPLIT = re.compile(r"(?P<name>.+):(?P<split>[^:\[\]]+(?:\[[^\]]*\])?)")
# Features that name an example: CIFAR's and ImageNet's.
_ID_FEATURES = ("id", "file_name")


def read(rest: str, *, limit: int | None, data_dir: str | None,
         keep_faulty: bool = False) -> Dataset:
    """Read a prepared TFDS set.

    TFDS stores examples shuffled. Where they carry an id, they come sorted by it, so that a limit
    gives the same images on every machine; else they come in stored order.

    Args:
      rest: `NAME:SPLIT`; the set needs the features `image` and `label`.
      limit: Keep the first so many images, or None.
      data_dir: TFDS's folder, or None for its default (`~/tensorflow_datasets`).
      keep_faulty: Keep floating-point images with values that no image has.

    Returns:
      The data set, with the class names that TFDS knows.

    Raises:
      ValueError: If the string is malformed, the set or split unknown, a feature missing, or the
        images differ in size.
      FileNotFoundError: If the set is not prepared as array_record.
      ImportError: If tensorflow-datasets or Pillow is not installed.
    """
    match = _NAME_AND_SPLIT.fullmatch(rest)
    if match is None:
        raise ValueError(
            f"source: got 'tfds:{rest}', expected tfds:NAME:SPLIT, as tfds:cifar10:test"
        )
    source = f"tfds:{rest}"
    records = _open(match["name"], match["split"], data_dir, source)
    features = records.dataset_info.features
    missing = [key for key in ("image", "label") if key not in features]
    if missing:
        raise ValueError(f"source: {source} has features {', '.join(features)}, "
                         f"expected image and label")  # fmt: skip
    positions, ids = _order(records, match["name"], match["split"], data_dir, source)
    images: list[np.ndarray] = []
    labels = []
    for position in positions[:limit]:
        example = records[int(position)]
        image = np.asarray(example["image"])
        if images and image.shape != images[0].shape:
            raise ValueError(
                f"source: {source} has images of different sizes ({images[0].shape}, {image.shape})"
                "; expected one size, so resize them and save them as npz"
            )
        images.append(image)
        labels.append(example["label"])
    if not images:
        raise ValueError(f"source: {source} is empty")
    return checked_dataset(
        np.stack(images),
        np.asarray(labels),
        None if ids is None else ids[:limit],
        getattr(features["label"], "names", None) or (),
        source=source,
        keep_faulty=keep_faulty,
    )


def _open(name: str, split: str, data_dir: str | None, source: str, **options: Any) -> Any:
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise ImportError(
            f"source: {source} needs tensorflow-datasets: pip install tensorflow-datasets pillow"
        ) from None
    try:
        return tfds.data_source(
            name,
            split=split,
            data_dir=data_dir,
            download=False,
            builder_kwargs={"file_format": "array_record"},
            **options,
        )
    except tfds.core.DatasetNotFoundError:  # Its own message lists several hundred names.
        raise ValueError(
            f"source: TFDS knows no set {name!r}, "
            f"and none is prepared in {data_dir or 'its default folder'}"
        ) from None
    except (KeyError, AssertionError, NotImplementedError, FileNotFoundError):
        where = f", data_dir={data_dir!r}" if data_dir else ""
        raise FileNotFoundError(
            f"source: {source} is not prepared as array_record; prepare it once where tensorflow "
            f"is installed: tfds.builder({name!r}{where}, file_format='array_record')"
            ".download_and_prepare()"
        ) from None
    except ValueError as error:  # For example an unknown split; the message names those there are.
        raise ValueError(f"source: {source}: {' '.join(str(error).split())[:300]}") from None


def _order(
    records: Any, name: str, split: str, data_dir: str | None, source: str
) -> tuple[np.ndarray, list[str] | None]:
    """Return the positions to read, in order, and the ids in that order (None without ids)."""
    features = records.dataset_info.features
    key = next((key for key in _ID_FEATURES if key in features), None)
    if key is None:
        return np.arange(len(records)), None
    import tensorflow_datasets as tfds

    # Every id must be seen to sort; skipping the image decoder makes that pass cheap.
    decoders = {"image": tfds.decode.SkipDecoding()}
    undecoded = _open(name, split, data_dir, source, decoders=decoders)
    ids = [_text(undecoded[i][key]) for i in range(len(undecoded))]
    positions = np.asarray(sorted(range(len(ids)), key=ids.__getitem__), dtype=int)
    return positions, [ids[i] for i in positions]


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
