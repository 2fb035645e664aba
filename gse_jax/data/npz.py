"""NumPy archives: the simplest way to hand over images of one's own."""

import zipfile
from pathlib import Path

import numpy as np

from gse_jax.data.dataset import Dataset, checked_dataset


def read(rest: str, *, limit: int | None, data_dir: str | None,
         keep_faulty: bool = False) -> Dataset:
    """Read arrays `x`, `y` and optionally `ids` from an npz file.

    Args:
      rest: Path of the file; a relative one starts from `data_dir`.
      limit: Keep the first so many images, or None.
      data_dir: Folder, or None for the working directory.
      keep_faulty: Keep images with values that no image has.

    Returns:
      The data set. `x` is `[N, H, W, C]`, uint8 or floats in [0, 1]; `y` is `[N]` integers; without
      `ids` (strings or integers) the ids are positions, such as "000042".

    Raises:
      ValueError: If the path is missing, the file is damaged, lacks an array or holds wrong values.
      TypeError: If an array has another dtype.
      FileNotFoundError: If there is no such file.
    """
    if not rest:
        raise ValueError("source: npz needs a file, npz:FILE")
    path = Path(data_dir or "", rest)
    if not path.is_file():
        raise FileNotFoundError(f"source: there is no file {path}; npz:FILE names an .npz file")
    arrays = _arrays(path)
    for key, what in (("x", "images"), ("y", "labels")):
        if key not in arrays:
            found = ", ".join(arrays) or "nothing"
            raise ValueError(f"source: {path} holds {found}, expected an array {key} ({what})")
    source, images, labels = f"npz {path}", arrays["x"], arrays["y"]
    # All arrays are compared before any is cut: a limit must not hide that they do not match.
    lengths = {key: np.shape(array)[:1] for key, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{key} {np.shape(arrays[key])}" for key in lengths)
        raise ValueError(f"{source}: lengths differ ({listed}), expected as many of each")
    ids = None
    if (given := arrays.get("ids")) is not None:
        if given.ndim != 1 or given.dtype.kind not in "Uui":
            raise TypeError(f"{source}: ids are {given.dtype} of shape {given.shape}, "
                            "expected strings or integers of shape [N]")  # fmt: skip
        ids = [str(i) for i in given[:limit]]
    if images.ndim == 0 or labels.ndim == 0:
        raise ValueError(f"{source}: x and y must be arrays [N, H, W, C] and [N], got scalars")
    return checked_dataset(images[:limit], labels[:limit], ids, source=source,
                           keep_faulty=keep_faulty)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """Read every array that a data set can have; others may be large and are not touched."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"source: {path} is no npz file (or truncated); write it with numpy.savez")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files if key in ("x", "y", "ids")}
    except (ValueError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise ValueError(
            f"source: {path} cannot be read ({error}); expected plain arrays, no Python objects"
        ) from None
