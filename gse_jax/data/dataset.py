"""What every source returns, and the checks that every source's arrays pass through."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_CHANNELS = (1, 3)


class Dataset(NamedTuple):
    """Hold labelled images in memory.

    Attributes:
      images: `[N, H, W, C]` float32 in [0, 1], C is 1 or 3.
      labels: `[N]` int32, not negative.
      ids: N different names; each stays with its image whatever the limit.
      class_names: Name of each class, or `()` where the source has none.
    """

    images: np.ndarray
    labels: np.ndarray
    ids: tuple[str, ...]
    class_names: tuple[str, ...] = ()


def checked_dataset(
    images: np.ndarray,
    labels: np.ndarray,
    ids: Sequence[str] | None,
    class_names: Sequence[str] = (),
    *,
    source: str,
) -> Dataset:
    """Check raw arrays and convert them to a `Dataset`.

    Args:
      images: `[N, H, W, C]`, uint8 or floating point in [0, 1].
      labels: `[N]`, integers.
      ids: N different names, or None for the zero-padded position.
      class_names: Name of each class, or nothing.
      source: Where the arrays come from, for error messages.

    Returns:
      The data set; 8-bit images are divided by 255.

    Raises:
      TypeError: If images are neither uint8 nor floating point, or labels are no integers.
      ValueError: If a shape, a value or a length is not as described.
    """
    check_image_array(images, source)
    if images.dtype != np.uint8:
        low, high = float(images.min()), float(images.max())  # NaN in the images makes both NaN.
        if not (low >= 0.0 and high <= 1.0):
            raise ValueError(
                f"{source}: floating-point images span [{low:.9g}, {high:.9g}], expected [0, 1]; "
                + ("that is rounding: store images.clip(0, 1)" if low > -1e-5 and high < 1.0 + 1e-5 else
                   "rescale them, or store 8-bit images as uint8")
            )
    labels, ids = checked_names(len(images), labels, ids, class_names, source)
    return Dataset(to_float(images), labels, ids, tuple(class_names))


def to_float(images: np.ndarray) -> np.ndarray:
    """Return images as float32, 8-bit ones divided by 255.

    Args:
      images: `[...]` uint8 or floating point.

    Returns:
      `[...]` float32.
    """
    images = np.asarray(images)
    if images.dtype == np.uint8:
        return images.astype(np.float32) / np.float32(255)
    return images.astype(np.float32)


def check_image_array(images: np.ndarray, source: str) -> None:
    """Refuse an array that cannot be images, by shape and dtype only.

    Args:
      images: What should be `[N, H, W, C]`, not empty, C = 1 or 3, uint8 or floating point.
      source: Where it comes from, for error messages.

    Raises:
      TypeError: If it is neither uint8 nor floating point.
      ValueError: If it has another shape.
    """
    if images.ndim != 4 or 0 in images.shape or images.shape[-1] not in _CHANNELS:
        nchw = images.ndim == 4 and images.shape[1] in _CHANNELS
        fix = "; it looks like NCHW: transpose it by (0, 2, 3, 1)" if nchw else ""
        if images.ndim == 3:
            fix = "; add the channel axis, images[..., None]"
        raise ValueError(
            f"{source}: images have shape {images.shape}, "
            f"expected [N, H, W, C], not empty, with C = 1 or 3{fix}"
        )
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise TypeError(
            f"{source}: images are {images.dtype}, expected uint8, or floating point in [0, 1]"
        )


def checked_names(count: int, labels: np.ndarray, ids: Sequence[str] | None,
                  class_names: Sequence[str], source: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Check what is said about each image.

    Args:
      count: Number of images.
      labels: `[count]`, integers.
      ids: As many different names, or None for the zero-padded position.
      class_names: Name of each class, or nothing.
      source: Where they come from, for error messages.

    Returns:
      (labels int32, ids).

    Raises:
      TypeError: If labels are no integers.
      ValueError: If lengths differ, an id comes twice, or a label is negative or has no name.
    """
    labels = _checked_labels(labels, source)
    if ids is None:
        ids = [f"{i:06d}" for i in range(count)]
    ids = tuple(str(i) for i in ids)
    lengths = (count, len(labels), len(ids))
    if len(set(lengths)) != 1:
        raise ValueError("{}: {} images, {} labels and {} ids; expected as many of each".format(
            source, *lengths))
    if len(set(ids)) != len(ids):
        seen: set[str] = set()
        twice = next(i for i in ids if i in seen or seen.add(i))
        raise ValueError(f"{source}: id {twice!r} occurs twice; ids must differ")
    if class_names and labels.max() >= len(class_names):
        raise ValueError(f"{source}: label {labels.max()}, but {len(class_names)} class names")
    return labels, ids


def _checked_labels(labels: np.ndarray, source: str) -> np.ndarray:
    if labels.ndim == 2:
        raise ValueError(
            f"{source}: labels have shape {labels.shape}, expected [N]; "
            + ("store labels[:, 0]" if labels.shape[1] == 1 else
               "if they are one-hot, store labels.argmax(-1)")
        )
    if labels.ndim != 1:
        raise ValueError(f"{source}: labels have shape {labels.shape}, expected [N]")
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"{source}: labels are {labels.dtype}, expected integers")
    if labels.size and (labels.min() < 0 or labels.max() > np.iinfo(np.int32).max):
        raise ValueError(
            f"{source}: labels span {labels.min()} to {labels.max()}, expected 0 or more (int32)"
        )
    return labels.astype(np.int32)
