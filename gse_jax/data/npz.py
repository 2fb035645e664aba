"""NumPy archives: the simplest way to hand over images of one's own."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from gse_jax.data.array_images import ArrayImages

_KEYS = ("x", "y", "ids", "class_names")


def open_files(rest: str, *, limit: int | None, data_dir: str | None) -> ArrayImages:
    """Open arrays `x`, `y` and optionally `ids` and `class_names` of an npz file.

    `x` stays on disk where the file is not compressed, as `numpy.savez` and `gse-jax prepare` write
    it; a compressed one is read whole.

    Args:
      rest: Path of the file; a relative one starts from `data_dir`.
      limit: Keep the first so many images, or None.
      data_dir: Folder, or None for the working directory.

    Returns:
      The images. `x` is `[N, H, W, C]`, uint8 or floats in [0, 1]; `y` is `[N]` integers; without
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
            found = ", ".join(np.load(path, allow_pickle=False).files) or "nothing"
            raise ValueError(f"source: {path} holds {found}, expected an array {key} ({what})")
    source, images, labels = f"npz {path}", arrays["x"], arrays["y"]
    # All arrays are compared before any is cut: a limit must not hide that they do not match.
    lengths = {key: np.shape(array)[:1] for key, array in arrays.items() if key != "class_names"}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{key} {np.shape(arrays[key])}" for key in lengths)
        raise ValueError(f"{source}: lengths differ ({listed}), expected as many of each")
    ids = None
    if (given := arrays.get("ids")) is not None:
        if given.ndim != 1 or given.dtype.kind not in "Uui":
            raise TypeError(f"{source}: ids are {given.dtype} of shape {given.shape}, "
                            "expected strings or integers of shape [N]")
        ids = [str(i) for i in given[:limit]]
    if images.ndim == 0 or labels.ndim == 0:
        raise ValueError(f"{source}: x and y must be arrays [N, H, W, C] and [N], got scalars")
    names = [str(name) for name in np.atleast_1d(arrays.get("class_names", np.zeros(0, str)))]
    return ArrayImages(images[:limit], labels[:limit], ids, names, source=source)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """Read every array that a data set can have; others may be large and are not touched."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"source: {path} is no npz file (or truncated); write it with numpy.savez")
    try:
        with np.load(path, allow_pickle=False) as archive:
            keys = [key for key in archive.files if key in _KEYS]
            mapped = _mapped(path) if "x" in keys else None
            return {key: mapped if key == "x" and mapped is not None else archive[key]
                    for key in keys}
    except (ValueError, zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise ValueError(
            f"source: {path} cannot be read ({error}); expected plain arrays, no Python objects"
        ) from None


def _mapped(path: Path) -> np.ndarray | None:
    """Map `x` from the file; None where it is compressed or its header needs NumPy's own reader."""
    with zipfile.ZipFile(path) as archive:
        if "x.npy" not in archive.namelist():
            return None
    with zipfile.ZipFile(path) as archive, archive.open("x.npy") as member:
        info = archive.getinfo("x.npy")
        if info.compress_type != zipfile.ZIP_STORED:
            return None
        version = np.lib.format.read_magic(member)
        if version not in ((1, 0), (2, 0)):
            return None
        read_header = (np.lib.format.read_array_header_1_0 if version == (1, 0)
                       else np.lib.format.read_array_header_2_0)
        shape, fortran, dtype = read_header(member)
        header = member.tell()
        while member.read(1 << 20):  # The checksum is compared at the end; mapping would skip it.
            pass
    with path.open("rb") as file:
        # The local header's own lengths count; the central directory may have others.
        file.seek(info.header_offset + 26)
        name, extra = np.frombuffer(file.read(4), "<u2")
    if dtype.hasobject or 0 in shape:
        return None
    start = info.header_offset + 30 + int(name) + int(extra) + header
    return np.memmap(path, dtype, "r", start, shape, order="F" if fortran else "C")
