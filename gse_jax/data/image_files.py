"""Images that stay in their files until somebody asks: memory does not grow with their number.

Decoding runs in threads (Pillow releases the interpreter lock), a few images ahead of a reader that
walks through them in even steps, as an evaluation or one of its shards does. Never in forked
processes: a fork of a process that runs JAX can deadlock.
"""

import functools
import hashlib
import io
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gse_jax.data.dataset import Dataset, checked_dataset

OPTIONS = ("size", "resize")
RESIZE_POLICIES = ("paper", "crop")
# Share of the shorter side that the crop keeps, 224 of 256, as torchvision's evaluation transforms of the
# first ImageNet weights have it.
_CROP_SHARE = 224 / 256
_THREADS = min(8, os.cpu_count() or 1)
_LOOK_AHEAD = 2 * _THREADS


class Resize(NamedTuple):
    """How images of any size become images of one size.

    Attributes:
      size: Height and width of the result, or None to leave the images as they are.
      policy: "paper" stretches the whole image to a square, as the GSE paper's experiments did;
        "crop" scales the shorter side to `size / 0.875` and keeps the centre, as the networks'
        authors did. Both bilinear, antialiased. Neither turns an image by its EXIF orientation.
    """

    size: int | None
    policy: str


def resize_from_options(options: dict[str, str]) -> Resize:
    """Read `size` and `resize` of a source string.

    Args:
      options: Texts by name, as from `split_options`.

    Returns:
      The resize.

    Raises:
      ValueError: If the size is no positive integer, the policy unknown or without a size.
    """
    policy = options.get("resize", "paper")
    if policy not in RESIZE_POLICIES:
        raise ValueError(f"source: resize={policy!r} is unknown, "
                         f"expected {' or '.join(RESIZE_POLICIES)}")
    if "size" not in options:
        if "resize" in options:
            raise ValueError(f"source: resize={policy} needs a size, as ,size=224")
        return Resize(None, policy)
    if not options["size"].isdecimal() or int(options["size"]) < 1:
        raise ValueError(f"source: size={options['size']!r}, expected pixels, as ,size=224")
    return Resize(int(options["size"]), policy)


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


class ImageFiles:
    """Labelled image files as a source for `gse_jax.evaluation`; nothing is decoded before use.

    Attributes:
      ids: N different names.
      labels: `[N]` int32.
      class_names: Name of each class, or `()`.

    Args:
      files: N images: paths, or what a sequence gives when it is asked for image i, encoded bytes
        or uint8 pixels `[H, W, C]`. Asked by several threads at a time.
      labels: N labels.
      ids: N different names.
      class_names: Name of each class, or `()`.
      resize: How images become one size.
      source: Where they come from, for error messages.
      channels: 3 for RGB, 1 for grey.
    """

    def __init__(self, files: Sequence[Path | bytes | np.ndarray], labels: Sequence[int],
                 ids: Sequence[str], class_names: Sequence[str], resize: Resize, source: str,
                 channels: int = 3):
        unnamed = next((name for name in ids if not _is_text(name)), None)
        if unnamed is not None:
            raise ValueError(f"source: {source}: the file name {ascii(unnamed)} is not UTF-8; rename it")
        if max(labels, default=0) > np.iinfo(np.int32).max:
            raise ValueError(f"source: {source}: label {max(labels)} is too large, expected at most "
                             f"{np.iinfo(np.int32).max}")
        self.ids = tuple(ids)
        self.labels = np.asarray(labels, np.int32)
        self.class_names = tuple(class_names)
        self._files = files
        self._mode = {1: "L", 3: "RGB"}[channels]
        self._resize = resize
        self._source = source
        self._ahead: dict[int, Future] = {}
        self._last, self._step = -1, 1
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Return N."""
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Return `(image [H, W, C] float32 in [0, 1], label)`.

        Raises:
          OSError: If the file is not there or no readable image.
          ValueError: If it has more than 8 bits per channel.
        """
        with self._lock:
            future = self._ahead.pop(index, None) or self._submit(index)
            self._look_ahead(index)
        return future.result(), int(self.labels[index])

    @functools.cached_property
    def digest(self) -> str:
        """Hash of ids, labels, resize and the encoded files, which need not be decoded for it."""
        digest = hashlib.sha256(repr(self._resize).encode())
        for name, label, content in zip(self.ids, self.labels,
                                        self._pool.map(self._hash, range(len(self)))):
            digest.update(f"{name}\n{label}\n{content}\n".encode())
        return digest.hexdigest()

    def to_dataset(self) -> Dataset:
        """Decode everything into memory.

        Returns:
          The images, in order.

        Raises:
          ValueError: If a file cannot be decoded, or the images differ in size.
        """
        images: list[np.ndarray] = []
        for start in range(0, len(self), _LOOK_AHEAD):
            part = range(start, min(start + _LOOK_AHEAD, len(self)))
            for index, future in [(index, self._submit(index)) for index in part]:
                try:
                    image = future.result()
                except Exception as error:  # Pillow raises whatever a broken file leads to.
                    reason = " ".join(str(error).split())[:200]
                    raise ValueError(f"source: {self._source}: {self.ids[index]}: {reason}; remove "
                                     "it (evaluate sets such files aside by itself)") from None
                if images and image.shape != images[0].shape:
                    raise ValueError(
                        f"source: {self._source} has images of different sizes "
                        f"({images[0].shape}, {image.shape}); name one, as ,size=224")
                images.append(image)
        return checked_dataset(np.stack(images), self.labels, self.ids, self.class_names,
                               source=self._source)

    @functools.cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(_THREADS, thread_name_prefix="gse_jax-decode")

    def _submit(self, index: int) -> Future:
        return self._pool.submit(self._decode, index)

    def _decode(self, index: int) -> np.ndarray:
        with _opened(self._files[index]) as image:
            # Pillow cuts colours of 16 bits to 8; how they are stored shows in its tiles.
            tiles = getattr(image, "tile", ())  # none where it was made from an array
            arguments = tiles[0][3] if tiles else ""
            stored = f"{image.mode} {arguments}"
            # Those of a PPM end with its largest value.
            last = arguments[-1] if tiles and image.format == "PPM" else 0
            if isinstance(last, int) and last > 255 or image.mode.startswith(("I", "F")) or ";16" in stored:
                raise ValueError(f"{self.ids[index]} has more than 8 bits per channel ({stored})")
            image = _resized(image.convert(self._mode), self._resize)
            pixels = np.asarray(image, np.float32) / np.float32(255)
        return pixels[..., None] if self._mode == "L" else pixels

    def _hash(self, index: int) -> str:
        try:
            content = self._files[index]
            if isinstance(content, Path):
                with content.open("rb") as file:
                    return hashlib.file_digest(file, "sha256").hexdigest()
            return hashlib.sha256(np.ascontiguousarray(content) if isinstance(
                content, np.ndarray) else content).hexdigest()
        except OSError:  # Set aside when it is read; its absence is part of the digest.
            return "unreadable"

    def _look_ahead(self, index: int) -> None:
        """Start on the next images if the reader took the same step twice; drop what is stale."""
        step, self._last = index - self._last, index
        even, self._step = step == self._step and step > 0, step
        wanted = range(index + step, len(self), step)[:_LOOK_AHEAD] if even else ()
        for stale in self._ahead.keys() - set(wanted):
            self._ahead.pop(stale).cancel()
        for position in wanted:
            if position not in self._ahead:
                self._ahead[position] = self._submit(position)


def _opened(content: Path | bytes | np.ndarray) -> Any:
    """Return a Pillow image."""
    from PIL import Image

    if isinstance(content, np.ndarray):
        if content.dtype != np.uint8:
            raise ValueError(f"the image is {content.dtype}, expected uint8")
        return Image.fromarray(content.squeeze(-1) if content.shape[-1] == 1 else content)
    return Image.open(io.BytesIO(content) if isinstance(content, bytes) else content)


def _resized(image: Any, resize: Resize) -> Any:
    from PIL import Image

    size, bilinear = resize.size, Image.Resampling.BILINEAR
    if size is None:
        return image
    if resize.policy == "paper":
        return image.resize((size, size), bilinear)
    # Rounding down, as torchvision scales the longer side and timm computes the scale.
    shorter = int(size / _CROP_SHARE)
    width, height = (shorter * side // min(image.size) for side in image.size)
    image = image.resize((width, height), bilinear)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))
