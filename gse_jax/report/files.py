"""Write a file whole or not at all."""

import os
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

    References:
        None.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path
