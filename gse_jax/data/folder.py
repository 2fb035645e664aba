"""Image folders in torchvision's ImageFolder layout: one folder per class."""

import os
from pathlib import Path

from gse_jax.data.arguments import existing_path, split_options
from gse_jax.data.image_files import OPTIONS, ImageFiles, resize_from_options

USAGE = "folder:PATH[,size=PIXELS][,resize=paper|crop]"
_SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}


def open_files(rest: str, *, limit: int | None, data_dir: str | None) -> ImageFiles:
    """List `PATH/CLASS/**/IMAGE`; classes sorted by name, images by folder and name.

    Hidden files and folders, `__MACOSX` and `@eaDir` are left out.

    Args:
      rest: Folder and options; a relative folder starts from `data_dir`. Names of classes that are
        all numbers *are* the labels (so that a part of ImageNet can be named by its labels); other
        names are numbered in sorted order, as torchvision does.
      limit: Keep the first so many images, or None.
      data_dir: Folder, or None for the working directory.

    Returns:
      The images; ids are paths inside the folder, such as "cat/0001.png".

    Raises:
      ValueError: If the folder holds no class folders with images, or an option is wrong.
      FileNotFoundError: If there is no such folder.
    """
    name, options = split_options(rest, OPTIONS)
    resize, root = resize_from_options(options), existing_path(name, data_dir, USAGE)
    if not root.is_dir():
        raise ValueError(f"source: {root} is a file, expected a folder with one folder per class")
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not _is_litter(entry.name))
    images = {name: _images_in(root / name) for name in classes}
    numeric = all(name.isdecimal() for name in classes if images[name])
    paths, labels, ids = [], [], []
    for position, class_name in enumerate(classes):
        for path in images[class_name]:
            paths.append(path)
            labels.append(int(class_name) if numeric else position)
            ids.append(path.relative_to(root).as_posix())
    if not paths:
        loose = any(_is_image(path.name) for path in root.iterdir())
        fix = "; its images lie in no class folder" if loose else ""
        raise ValueError(f"source: {root} has no images in class folders, expected "
                         f"CLASS/IMAGE.png or .jpg ...{fix}")
    # Numbers may leave gaps, so they name themselves.
    names = () if numeric else classes
    return ImageFiles(paths[:limit], labels[:limit], ids[:limit], names, resize, f"folder {root}")


def _images_in(folder: Path) -> list[Path]:
    found = []
    for parent, folders, files in os.walk(folder, onerror=_refuse, followlinks=True):
        folders[:] = [name for name in folders if not _is_litter(name)]  # not even entered
        found.append((parent, sorted(filter(_is_image, files))))
    return [Path(parent, name) for parent, files in sorted(found) for name in files]


def _refuse(error: OSError):
    raise error  # a class that cannot be listed must not be missing without a word


def _is_litter(name: str) -> bool:
    """What file systems, file managers, notebooks and archives leave behind."""
    return name.startswith(".") or name in ("__MACOSX", "@eaDir", "lost+found")


def _is_image(name: str) -> bool:
    return not _is_litter(name) and Path(name).suffix.lower() in _SUFFIXES
