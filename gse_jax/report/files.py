"""Write a file whole or not at all."""

import os
import uuid
from pathlib import Path


def write_whole(path, content):
    """Write bytes beside their destination and rename: a reader never sees half a file.

    Args:
        path: destination, overwritten if present. Missing folders are made.
        content: bytes.

    Returns:
        The path.

    Raises:
        OSError: if the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not of the process's number: those of containers that share a folder may be equal.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path
