"""Weights from the Hugging Face Hub: fetched once, checked, and there whole or not at all.

The Hub keeps large files behind a small text, the Git LFS pointer, that states their SHA-256. The
pointer is fetched first, so a file that was cut or replaced on its way is noticed. A hash of the
caller's own (`,sha256=`) also protects from a changed repository.

References:
  https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md (the pointer)
"""

import hashlib
import http.client
import os
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import BinaryIO, NamedTuple

from gse_jax.data.arguments import split_options
from gse_jax.data.atomic import replacing

USAGE = "hf:OWNER/REPO@REVISION[,file=NAME][,sha256=HEX]"
_DEFAULT_FILE = "model.safetensors"
_ENDPOINT = "https://huggingface.co"
_SECONDS = 60.0  # without a byte
_CHUNK = 1 << 20
_POINTER_BYTES = 1024  # More than any pointer has.


class _Location(NamedTuple):
    """Where a file is on the Hub, and its hash where the caller gave one."""

    repository: str
    revision: str
    file: str
    sha256: str | None

    def url(self, kind: str) -> str:
        endpoint = os.environ.get("HF_ENDPOINT", _ENDPOINT).rstrip("/")
        if not endpoint.startswith(("https://", "http://")):  # urllib would open file: as well.
            raise ValueError(f"HF_ENDPOINT: got {endpoint!r}, expected an http(s) address")
        return f"{endpoint}/{self.repository}/{kind}/{self.revision}/{self.file}"


def is_location(weights: object) -> bool:
    """Whether `weights` names a file on the Hub.

    Args:
      weights: What the caller of `load` gave.
    """
    return isinstance(weights, str) and weights.startswith("hf:")


def fetch(weights: str) -> Path:
    """Return the local copy of a file on the Hub; fetch it if there is none.

    Args:
      weights: As `USAGE` says; the file is `model.safetensors` unless named. REVISION should be a
        commit hash: of a branch the file stays as first fetched. The address comes from the
        environment variable HF_ENDPOINT, the folder for copies from GSE_JAX_CACHE (default
        `~/.cache/gse_jax`).

    Returns:
      A file whose SHA-256 was compared in this call.

    Raises:
      ValueError: If the text is malformed or the content has another hash.
      FileNotFoundError: If the file cannot be fetched; the message says what to download.
    """
    location = _parsed(weights)
    path = _cache_path(location)
    note = path.with_name(path.name + ".sha256")
    if path.is_file() and note.is_file():
        expected = location.sha256 or note.read_text(encoding="ascii").strip()
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected:
            raise ValueError(f"weights: {path} has SHA-256 {found}, expected {expected}; delete it")
        return path
    try:
        expected = location.sha256 or _stated_hash(location)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            found = _download(location.url("resolve"), file)
            if found != expected:
                raise ValueError(f"weights: {location.url('resolve')} has SHA-256 {found}, "
                                 f"expected {expected}; fetch it again, or check the hash")
            note.write_text(expected + "\n", encoding="ascii")
    except urllib.error.HTTPError as error:
        error.close()
        raise FileNotFoundError(_advice(location, path, f"HTTP {error.code}")) from None
    except (OSError, http.client.HTTPException) as error:  # No network, no name, timeout, broken off.
        reason = getattr(error, "reason", None) or error
        raise FileNotFoundError(_advice(location, path, str(reason))) from None
    return path


def _parsed(weights: str) -> _Location:
    rest, options = split_options(weights.removeprefix("hf:"), ("file", "sha256"))
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)@([\w.-]+)", rest, re.ASCII)
    file = options.get("file", _DEFAULT_FILE)
    sha256 = options.get("sha256")
    if (match is None or not re.fullmatch(r"[\w./-]+", file, re.ASCII)
            # Each part becomes a part of a path on this machine.
            or any(part in ("", ".", "..") for part in (*rest.replace("@", "/").split("/"),
                                                        *file.split("/")))):
        raise ValueError(f"weights: got {weights!r}, expected {USAGE}")
    if sha256 is not None and not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError(f"weights: sha256={sha256!r}, expected 64 lower-case hexadecimal digits")
    return _Location(match[1], match[2], file, sha256)


def _cache_path(location: _Location) -> Path:
    root = Path(os.environ.get("GSE_JAX_CACHE") or Path.home() / ".cache" / "gse_jax")
    return root.joinpath("weights", *location.repository.split("/"), location.revision,
                         *location.file.split("/"))


def _stated_hash(location: _Location) -> str:
    """Return the SHA-256 that the pointer states."""
    url = location.url("raw")
    with urllib.request.urlopen(url, timeout=_SECONDS) as response:
        text = response.read(_POINTER_BYTES)
    match = re.search(rb"^oid sha256:([0-9a-f]{64})$", text, re.MULTILINE)
    if match is None:
        raise ValueError(f"weights: {url} states no SHA-256; pass the file's own as ,sha256=HEX")
    return match[1].decode()


def _download(url: str, file: BinaryIO) -> str:
    """Write what is at `url` to a file and return its SHA-256."""
    digest = hashlib.sha256()
    with urllib.request.urlopen(url, timeout=_SECONDS) as response:
        while chunk := response.read(_CHUNK):
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()


def _advice(location: _Location, path: Path, reason: str) -> str:
    hashed = f" (SHA-256 {location.sha256})" if location.sha256 else ""
    return (f"weights: cannot fetch {location.url('resolve')} ({reason}); where there is network, "
            f"download that file{hashed} and pass its path as weights; nothing is at {path}")
