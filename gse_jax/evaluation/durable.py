"""Writes that survive a kill at any byte: whole files, and lines that carry their own checksum."""

import errno
import json
import os
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from gse_jax.types import StoreError


# FAT, exFAT and some mounted stores; the system tells it in many ways.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_MEANINGS = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EFBIG: "the file-size limit is reached; raise it (ulimit -f)",
    errno.ENOTDIR: "a file is where a folder is wanted; choose another directory",
    errno.EEXIST: "a file is where a folder is wanted; choose another directory",
    errno.EROFS: "the file system is read-only; choose another directory",
    errno.EACCES: "permission denied; choose another directory or change its owner",
    errno.EPERM: "permission denied; choose another directory or change its owner",
}


def explain(path: Path, error: OSError) -> StoreError:
    """Return the error as one line that names the file and the fix.

    Args:
        path: what was to be written.
        error: what the system said.

    Returns:
        StoreError.
    """
    return StoreError(f"run directory: cannot write {path}: {_meaning(error)}; what is stored is kept, "
                      "and the same command goes on from there")


def reason(error: OSError) -> str:
    """Return what the system said, with the file and, where there is one, the fix.

    Args:
        error: of any operation on files.

    Returns:
        One line.
    """
    if error.errno not in _MEANINGS:
        return str(error)
    return f"{error.filename or 'cannot write'}: {_meaning(error)}"


def _meaning(error):
    return _MEANINGS.get(error.errno or 0, f"{error.strerror or error}")


def make_folder(path: Path) -> None:
    """Create a folder and its parents.

    Args:
        path: the folder.

    Raises:
        StoreError: if that is impossible.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise explain(path, error) from error


def write_file(path: Path, write: Callable[[BinaryIO], Any], *, exclusive: bool = False) -> bool:
    """Write a whole file or nothing: temporary file, flush to disk, rename, flush the folder.

    Args:
        path: destination, replaced if it exists.
        write: writes the content to an open binary file.
        exclusive: leave an existing file alone, even one that appears meanwhile.

    Returns:
        Whether the file was written; False only with `exclusive`.

    Raises:
        StoreError: if the system refuses.
    """
    # Writers on several machines may share the folder, so a process id is not enough.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            if not exclusive or not _linked(temporary, path):
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)
    except FileExistsError:
        return False
    except OSError as error:
        raise explain(path, error) from error
    return True


def _linked(temporary: Path, path: Path) -> bool:
    """Give the file its name unless it is taken; False where the file system knows no second names."""
    try:
        os.link(temporary, path)  # Fails if the name exists; a rename would replace it.
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if path.exists():  # Here two writers that look in the same moment both write.
            raise FileExistsError(path) from None
        return False
    return True


def sync_folder(path: Path) -> None:
    """Flush a folder's list of names to disk.

    Args:
        path: the folder.
    """
    if os.name == "nt":  # Windows cannot open folders, and orders these writes itself.
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class Journal:
    """An append-only file of JSON lines, each with a checksum; a context manager."""

    def __init__(self, path: Path):
        """Open or create the file.

        Args:
            path: the file.

        Raises:
            StoreError: if that is impossible.
        """
        self._path = path
        self._torn = False  # An append failed half-way.
        try:
            binary = getattr(os, "O_BINARY", 0)  # on Windows
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | binary, 0o644)
            sync_folder(path.parent)
            size = os.fstat(self._file).st_size
            # A line that a kill has torn stays, and is ended so that the next one stands alone.
            if size:
                os.lseek(self._file, size - 1, os.SEEK_SET)  # appends go to the end nevertheless
                self._torn = os.read(self._file, 1) != b"\n"
        except OSError as error:
            raise explain(path, error) from error

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self._file)

    def append(self, entries: Iterable[dict[str, Any]]) -> None:
        """Write entries and flush them to disk.

        Args:
            entries: JSON values.

        Raises:
            StoreError: if the system refuses; the entries may then be there in part, each whole
                line being valid.
        """
        content = b"".join(_line(entry) for entry in entries)
        if not content:
            return
        if self._torn:
            content = b"\n" + content
        try:
            while content:
                content = content[os.write(self._file, content):]
                self._torn = bool(content)
            os.fsync(self._file)
        except OSError as error:
            self._torn = True
            raise explain(self._path, error) from error


def _line(entry) -> bytes:
    text = _canonical(entry)
    return f"{text[:-1]},\"checksum\":\"{zlib.crc32(text.encode()):08x}\"}}\n".encode()


def _canonical(entry) -> str:
    # NaN has no JSON: better an error here than a file that other tools cannot read.
    return json.dumps(entry, separators=(",", ":"), allow_nan=False)


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """Read back the valid lines of a journal; torn and damaged ones are dropped.

    Args:
        path: the file; may be absent.

    Yields:
        Entries without their checksums, in the order of writing.
    """
    if not path.is_file():
        return
    with open(path, "rb") as file:
        for line in file:
            try:
                entry = json.loads(line)
                # Python's JSON keeps the order of keys and every bit of a float.
                valid = entry.pop("checksum") == f"{zlib.crc32(_canonical(entry).encode()):08x}"
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
                continue
            if valid:
                yield entry
