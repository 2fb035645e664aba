"""CIFAR-10 and CIFAR-100 from their official archives, in the original order, without TensorFlow.

Only the binary versions are read: the Python versions hold pickles, which can run code.

References:
  Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009; layout of the files:
  https://www.cs.toronto.edu/~kriz/cifar.html
"""

import os
import tarfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gse_jax.data.arguments import existing_path, split_options
from gse_jax.data.array_images import ArrayImages
from gse_jax.data.atomic import replacing

_SHAPE = (3, 32, 32)  # After the bytes of label: planes of red, green and blue, row by row.
_PIXELS = 3 * 32 * 32


class Layout(NamedTuple):
    """What one of the two archives holds.

    Attributes:
      name: "cifar10" or "cifar100".
      archive: Name of the official archive.
      files: Files of each split, in order.
      pickles: A file of the Python version, which is refused.
      label_names: File with one class name a line.
      num_labels: Bytes of label in front of the pixels; the last one counts.
      num_classes: 10 or 100.
    """

    name: str
    archive: str
    files: dict[str, tuple[str, ...]]
    pickles: str
    label_names: str
    num_labels: int
    num_classes: int

    @property
    def usage(self) -> str:
        """How the source string is written."""
        return f"{self.name}:ARCHIVE[,split=test|train]"


CIFAR10 = Layout(
    "cifar10", "cifar-10-binary.tar.gz",
    {"test": ("test_batch.bin",), "train": tuple(f"data_batch_{i}.bin" for i in range(1, 6))},
    "test_batch", "batches.meta.txt", 1, 10)
# Two labels: one of 20 superclasses, then one of 100 classes.
CIFAR100 = Layout(
    "cifar100", "cifar-100-binary.tar.gz", {"test": ("test.bin",), "train": ("train.bin",)},
    "test", "fine_label_names.txt", 2, 100)
LAYOUTS = {layout.name: layout for layout in (CIFAR10, CIFAR100)}


def open_files(layout: Layout, rest: str, *, limit: int | None,
               data_dir: str | None) -> ArrayImages:
    """Read one split of an archive; the images stay in their 8 bits.

    Args:
      layout: `CIFAR10` or `CIFAR100`.
      rest: The archive, `test` unless `,split=train` follows; a relative path starts from
        `data_dir`.
      limit: Keep the first so many images, or None.
      data_dir: Folder, or None for the working directory.

    Returns:
      Images `[32, 32, 3]`; ids are positions in the split, such as "test_00042", which is what
      TensorFlow Datasets calls those of CIFAR-10.

    Raises:
      ValueError: If the file is no such archive, is truncated, or the split is unknown.
      FileNotFoundError: If there is no such file.
    """
    name, options = split_options(rest, ("split",))
    split = options.get("split", "test")
    images, labels, names = _read_split(layout, existing_path(name, data_dir, layout.usage), split)
    ids = _ids(split, len(labels))
    return ArrayImages(images[:limit], labels[:limit], ids[:limit], names,
                       source=f"{layout.name} {name}")


def prepare(dataset: str, archive: str | os.PathLike, out: str | os.PathLike, *,
            split: str = "test") -> int:
    """Write one split of an archive as an npz file that `npz:FILE` reads.

    The file is whole or not there, also after a crash.

    Args:
      dataset: "cifar10" or "cifar100" (its 100 fine classes).
      archive: `cifar-10-binary.tar.gz` or `cifar-100-binary.tar.gz`.
      out: Destination, overwritten if present; its folder must exist.
      split: "test" (10,000 images) or "train" (50,000).

    Returns:
      Number of images.

    Raises:
      ValueError: As in `open_files`, or for an unknown data set.
      FileNotFoundError: If there is no such file, or no folder for the result.
    """
    if dataset not in LAYOUTS:
        raise ValueError(f"dataset: got {dataset!r}, expected {' or '.join(LAYOUTS)}")
    path = existing_path(os.fspath(archive), None, "an archive")
    images, labels, names = _read_split(LAYOUTS[dataset], path, split)
    with replacing(Path(out)) as file:
        np.savez(file, x=images, y=labels, ids=np.asarray(_ids(split, len(labels))),
                 class_names=np.asarray(names, str))
    return len(labels)


def _ids(split: str, count: int) -> list[str]:
    return [f"{split}_{i:05d}" for i in range(count)]


def _read_split(layout: Layout, archive: Path,
                split: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Return images `[N, 32, 32, 3]` uint8, labels `[N]` int32 and class names."""
    if split not in layout.files:
        raise ValueError(f"source: {layout.name} has no split {split!r}, expected test or train")
    files = layout.files[split]
    try:
        contents, found = _contents(archive, (*files, layout.label_names))
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"source: {archive} is truncated or no tar archive "
                         f"({type(error).__name__}); fetch {layout.archive} again") from None
    record = layout.num_labels + _PIXELS
    for name in files:
        _check_content(layout, contents.get(name), record, name, found, archive)
    records = np.concatenate([np.frombuffer(contents[name], np.uint8)
                              for name in files]).reshape(-1, record)
    labels = records[:, layout.num_labels - 1].astype(np.int32)
    if labels.max() >= layout.num_classes:
        raise ValueError(f"source: {archive} has label {labels.max()}, expected 0 to "
                         f"{layout.num_classes - 1}; is it {layout.archive}?")
    images = records[:, layout.num_labels:].reshape(-1, *_SHAPE).transpose(0, 2, 3, 1)
    names = contents.get(layout.label_names, b"").decode("utf-8", "replace").split()
    # Names are a courtesy: an archive without them, or with others, is read all the same.
    names = tuple(names) if len(names) == layout.num_classes else ()
    return np.ascontiguousarray(images), labels, names


def _contents(archive: Path, wanted: tuple[str, ...]) -> tuple[dict[str, bytes], set[str]]:
    """Return the bytes of the wanted files, and the names of all, in one pass."""
    contents, names = {}, set()
    with tarfile.open(archive) as tar:
        # By their last part: the folder inside has had more than one name. Nothing is extracted to
        # disk, so a hostile name can do no harm.
        for member in tar:
            name = Path(member.name).name
            names.add(name)
            if name in wanted and member.isfile():
                contents[name] = tar.extractfile(member).read()
        while tar.fileobj.read(1 << 20):  # gzip compares its checksum at the very end only.
            pass
    return contents, names


def _check_content(layout: Layout, content: bytes | None, record: int, name: str, names: set[str],
                   archive: Path) -> None:
    if content is None:
        fix = ("it is the Python version, whose pickles can run code; fetch the binary version, "
               f"{layout.archive}") if layout.pickles in names else "is it another archive?"
        raise ValueError(f"source: {archive} holds no {name}; {fix}")
    if not content or len(content) % record:
        raise ValueError(f"source: {archive}: {name} has {len(content)} bytes, expected a multiple "
                         f"of {record}")
