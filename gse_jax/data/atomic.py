"""Files that are there whole or not at all, also after a crash."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that takes the place of `path` when the block ends without an error.

    Args:
      path: Destination, overwritten if present.

    Yields:
      The file, open for writing and reading bytes. It lies beside its destination, so that the
      rename stays on one file system.

    Raises:
      FileNotFoundError: If the folder does not exist.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: folder {path.parent} does not exist; create it first")
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would make a shared file unreadable.
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
