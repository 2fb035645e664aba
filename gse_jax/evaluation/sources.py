"""Images one by one: what an evaluation reads its samples through.

Nothing here holds the data: memory does not grow with its size, unless the source itself is in
memory.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from gse_jax.attacks import validation


class ImageSource(Protocol):
    """Labelled images by position; `gse_jax.data.Dataset` is accepted as well.

    Attributes:
        ids: N different sample ids.
        class_names (optional): names of the classes, or an empty tuple.
        digest (optional): a text that changes when any image or label does; without it, every
            image is read once more at the start to compute one.
    """

    ids: Sequence[str]

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return (image [H, W, C] float, label); raise for an image that cannot be read."""


class Read(NamedTuple):
    """One sample, or why it cannot be used.

    Attributes:
        position: in the source.
        sample_id: its id.
        x: [H, W, C], or None where it cannot be used.
        label: true label, -1 where unknown.
        reason: None, or why `x` is None.
    """

    position: int
    sample_id: str
    x: np.ndarray | None
    label: int
    reason: str | None


class _InMemory:
    """A `Dataset` as a source."""

    def __init__(self, dataset):
        self._dataset = dataset
        self.ids = dataset.ids
        self.class_names = tuple(dataset.class_names)

    def __getitem__(self, index):
        return self._dataset.images[index], self._dataset.labels[index]


class _First:
    """The first images of a source."""

    def __init__(self, source, limit):
        self._source = source
        self.ids = list(source.ids[:limit])
        self.class_names = tuple(getattr(source, "class_names", ()))
        if getattr(source, "digest", None) is not None:
            self.digest = f"{source.digest}, the first {limit}"

    def __getitem__(self, index):
        return self._source[index]


def as_source(data, limit: int | None = None) -> ImageSource:
    """Return `data` as a source.

    Args:
        data: a `gse_jax.data.Dataset` or an `ImageSource`.
        limit: keep the first so many images; None keeps all.

    Returns:
        ImageSource.

    Raises:
        TypeError: if it is neither.
        ValueError: if it is empty, two samples have one id, or `limit` is below 1.
    """
    if hasattr(data, "images") and hasattr(data, "labels"):
        data = _InMemory(data)
    if not hasattr(data, "ids") or not hasattr(data, "__getitem__"):
        raise TypeError(f"data must be a Dataset or have `ids` and `[index] -> (image, label)`, "
                        f"got {type(data).__name__}")
    if len(data.ids) == 0:
        raise ValueError("data holds no images, expected at least one")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if len({str(name) for name in data.ids}) != len(data.ids):
        raise ValueError("data has two samples with one id; ids must differ")
    return data if limit is None or limit >= len(data.ids) else _First(data, limit)


class Reader:
    """Reads samples of a source and sets aside those that cannot be used.

    The first usable image decides shape and dtype.
    """

    # Where not one of so many images can be used, the mistake is in the whole, not in a sample.
    _PROBE = 64

    def __init__(self, source: ImageSource, bounds):
        self.source = source
        self.bounds = bounds
        self.image_shape: tuple[int, ...] = ()  # Not yet known.
        self.dtype: Any = None
        first = None
        for index in range(min(self._PROBE, len(source.ids))):
            sample = self.read(index)
            if sample.x is not None:
                self.image_shape, self.dtype = sample.x.shape, sample.x.dtype
                return
            first = first or sample.reason
        raise ValueError(f"data: none of the first images can be used: {first}")

    def read(self, index: int) -> Read:
        """Return one sample.

        Args:
            index: position in the source.

        Returns:
            Read; `x` is None with a `reason` for an image that cannot be read, is not finite, lies
            outside the bounds, or has another shape than the others.
        """
        sample_id, label = str(self.source.ids[index]), -1
        try:
            image, label = self.source[index]
            label, image = int(label), np.asarray(image)
            if image.dtype == np.float64:  # as the attack sees it
                image = image.astype(jax.dtypes.canonicalize_dtype(image.dtype), copy=False)
            if not self.image_shape:
                validation.check_images(image[None], self.bounds)
            else:
                self._check(image)
        except Exception as error:  # A reader may raise anything; the run must go on.
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            return Read(index, sample_id, None, label, reason)
        return Read(index, sample_id, image.astype(self.dtype or image.dtype), label, None)

    def _check(self, image):
        """Refuse what differs from the first image; NumPy only, for it runs once per sample."""
        if image.shape != self.image_shape:
            raise ValueError(f"the image has shape {list(image.shape)}, expected "
                             f"{list(self.image_shape)} as the others")
        if image.dtype.kind != "f":
            raise TypeError(f"the image is {image.dtype}, expected {self.dtype} as the others")
        image = image.astype(self.dtype, copy=False)
        low, high = float(image.min()), float(image.max())
        bounds = validation.rounded(self.bounds, self.dtype)
        if not np.isfinite([low, high]).all():
            raise ValueError("the image holds NaN or infinite pixels")
        if low < bounds[0] or high > bounds[1]:
            raise ValueError(f"the image has values from {low:.9g} to {high:.9g}, expected them inside "
                             f"bounds={tuple(self.bounds)}")

    def read_all(self, indices) -> Iterator[Read]:
        """Read several samples, one at a time.

        Args:
            indices: positions.

        Yields:
            Read.
        """
        for index in indices:
            yield self.read(int(index))


def digest_of(reader: Reader) -> str:
    """Hash ids, labels and pixels.

    Args:
        reader: a reader of the source.

    Returns:
        Text that another set of samples, another order or a changed pixel changes.
    """
    given = getattr(reader.source, "digest", None)
    digest = hashlib.sha256()
    if given is not None:
        digest.update(f"{given}\n{reader.bounds}\n".encode())
        return digest.hexdigest()
    for sample in reader.read_all(range(len(reader.source.ids))):
        digest.update(f"{sample.sample_id}\n{sample.label}\n".encode())
        # An unreadable image is hashed by its being so, not by its message.
        digest.update(b"unusable" if sample.x is None else np.ascontiguousarray(sample.x).data)
    return digest.hexdigest()
