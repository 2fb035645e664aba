"""CIFAR-10 from its official archive, in the original order, without TensorFlow.

Only the binary version is read: the Python version holds pickles, which can run code.

References:
  Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009; layout of the files:
  https://www.cs.toronto.edu/~kriz/cifar.html
"""

import os
import tarfile
import zlib
from pathlib import Path

import numpy as np

from gse_jax.data.arguments import existing_path, split_options
from gse_jax.data.atomic import replacing
from gse_jax.data.dataset import Dataset, checked_dataset

USAGE = "cifar10:ARCHIVE[,split=test|train]"
CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
               "truck")  # fmt: skip
_FILES = {
    "test": ("test_batch.bin",),
    "train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
}
_SHAPE = (3, 32, 32)  # After one byte of label: planes of red, green and blue, row by row.
_RECORD = 1 + 3 * 32 * 32


def read(rest: str, *, limit: int | None, data_dir: str | None,
         keep_faulty: bool = False) -> Dataset:
    """Read one split of the archive.

    Args:
      rest: `cifar-10-binary.tar.gz`, `test` unless `,split=train` follows; a relative path starts
        from `data_dir`.
      limit: Keep the first so many images, or None.
      data_dir: Folder, or None for the working directory.
      keep_faulty: Ignored; bytes are always valid pixels.

    Returns:
      Images `[N, 32, 32, 3]`; ids are positions in the split, such as "test_00042", which is what
      TensorFlow Datasets calls them.

    Raises:
      ValueError: If the file is no such archive, is truncated, or the split is unknown.
      FileNotFoundError: If there is no such file.
    """
    del keep_faulty
    name, options = split_options(rest, ("split",))
    split = options.get("split", "test")
    images, labels = _read_split(existing_path(name, data_dir, USAGE), split)
    ids = _ids(split, len(labels))
    return checked_dataset(images[:limit], labels[:limit], ids[:limit], CLASS_NAMES,
                           source=f"cifar10 {name}")


def prepare(archive: str | os.PathLike, out: str | os.PathLike, *, split: str = "test") -> int:
    """Write one split of the archive as an npz file that `npz:FILE` reads.

    The file is whole or not there, also after a crash.

    Args:
      archive: `cifar-10-binary.tar.gz`.
      out: Destination, overwritten if present; its folder must exist.
      split: "test" (10,000 images) or "train" (50,000).

    Returns:
      Number of images.

    Raises:
      ValueError: As in `read`.
      FileNotFoundError: If there is no such file, or no folder for the result.
    """
    images, labels = _read_split(existing_path(os.fspath(archive), None, "an archive"), split)
    with replacing(Path(out)) as file:
        np.savez(file, x=images, y=labels, ids=np.asarray(_ids(split, len(labels))))
    return len(labels)


def _ids(split: str, count: int) -> list[str]:
    return [f"{split}_{i:05d}" for i in range(count)]


def _read_split(archive: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return images `[N, 32, 32, 3]` uint8 and labels `[N]` int32."""
    if split not in _FILES:
        raise ValueError(f"source: cifar10 has no split {split!r}, expected test or train")
    try:
        contents, names = _contents(archive, _FILES[split])
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"source: {archive} is truncated or no tar archive "
                         f"({type(error).__name__}); fetch cifar-10-binary.tar.gz again") from None
    for name in _FILES[split]:
        _check_content(contents.get(name), name, names, archive)
    contents = [contents[name] for name in _FILES[split]]
    records = np.concatenate([np.frombuffer(c, np.uint8) for c in contents]).reshape(-1, _RECORD)
    labels = records[:, 0].astype(np.int32)
    if labels.max() >= len(CLASS_NAMES):
        raise ValueError(f"source: {archive} has label {labels.max()}, expected 0 to 9; is it "
                         "CIFAR-10?")  # fmt: skip
    images = records[:, 1:].reshape(-1, *_SHAPE).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), labels


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


def _check_content(content: bytes | None, name: str, names: set[str], archive: Path) -> None:
    if content is None:
        fix = ("it is the Python version, whose pickles can run code; fetch the binary version, "
               "cifar-10-binary.tar.gz") if "test_batch" in names else "is it another archive?"
        raise ValueError(f"source: {archive} holds no {name}; {fix}")
    if not content or len(content) % _RECORD:
        raise ValueError(f"source: {archive}: {name} has {len(content)} bytes, expected a multiple "
                         f"of {_RECORD}")
