"""The NIPS 2017 adversarial-competition layout: `images.csv` beside a folder `images`.

References:
  Kurakin et al., "Adversarial Attacks and Defences Competition", arXiv:1804.00097.
"""

import csv
from pathlib import Path

from gse_jax.data.arguments import existing_path, split_options
from gse_jax.data.image_files import OPTIONS, ImageFiles, resize_from_options

USAGE = "nips2017:FOLDER[,size=PIXELS][,resize=paper|crop]"
_ID, _LABEL = "ImageId", "TrueLabel"


def open_files(rest: str, *, limit: int | None, data_dir: str | None) -> ImageFiles:
    """List the images of a CSV, in its order.

    Args:
      rest: The folder of `images.csv`, or another CSV file of that kind, and options. It needs the
        columns ImageId and TrueLabel (1-based, as published); the images are `images/ID.png`
        beside it.
      limit: Keep the first so many images, or None.
      data_dir: Folder that a relative path starts from, or None for the working directory.

    Returns:
      The images with 0-based labels; ids are those of the CSV. Listed images without a file are
      errors when they are read, not now.

    Raises:
      ValueError: If the CSV lacks a column, holds no row, a label below 1 or an id twice, or an
        option is wrong.
      FileNotFoundError: If there is no such file.
      ImportError: If Pillow is not installed.
    """
    name, options = split_options(rest, OPTIONS)
    resize, path = resize_from_options(options), existing_path(name, data_dir, USAGE)
    table = existing_path("images.csv", str(path), USAGE) if path.is_dir() else path
    rows = _rows(table)[:limit]
    ids = [name for name, _ in rows]
    paths = [table.parent / "images" / f"{name}.png" for name in ids]
    return ImageFiles(paths, [label for _, label in rows], ids, (), resize, f"nips2017 {table}")


def _rows(table: Path) -> list[tuple[str, int]]:
    """Return (id, 0-based label) of each row."""
    rows: dict[str, int] = {}
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = {_ID, _LABEL} - set(reader.fieldnames or ())
            if missing:
                raise ValueError(f"it has no column {', '.join(sorted(missing))}")
            for row in reader:
                name, text = row[_ID] or "", (row[_LABEL] or "").strip()
                # An id is a file name; one with a separator could name any file of the machine.
                if not name or Path(name).name != name or name in rows:
                    raise ValueError(f"line {reader.line_num}: id {name!r} is missing, comes twice "
                                     "or is no plain name")
                if not text.isdecimal() or int(text) < 1:
                    raise ValueError(f"line {reader.line_num}: {_LABEL} is {text!r}, expected "
                                     "1 or more (labels are 1-based)")
                rows[name] = int(text) - 1
    except (ValueError, csv.Error) as error:  # Undecodable bytes are a ValueError too.
        raise ValueError(f"source: {table}: {error}") from None
    if not rows:
        raise ValueError(f"source: {table} lists no images")
    return list(rows.items())
