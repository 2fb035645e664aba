"""The run directory as its writers see it.

    manifest.json          what is run: plan, fingerprint, cases, findings; written once, widened by allowed mismatches
    records/<writer>.jsonl one line per (case, sample), each with a checksum
    arrays/<writer>-<n>.npz adversarial and clean images that records point to
    events/<writer>.jsonl  starts, lane counts, out-of-memory, quarantines, allowed mismatches
    locks/<writer>.lock    who is writing

An array file is on disk before the records that point to it, so a kill at any moment leaves every
record valid; what was not yet written is simply done again.
"""

import hashlib
import json
import re
import shutil
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gse_jax.evaluation.durable import (
    Journal,
    StoreError,
    explain,
    make_folder,
    read_journal,
    write_file,
)
from gse_jax.evaluation.lock import WriterLock
from gse_jax.types import Record

FORMAT_VERSION = 1
FOLDERS = ("records", "arrays", "events", "locks")
MANIFEST = "manifest.json"
_NEEDED = ("plan", "fingerprint", "cases", "num_samples", "image_shape", "dtype", "bounds", "forced")
_SPARE_BYTES = 16 << 20  # for records, events and the file system's own needs


class Finished(NamedTuple):
    """One finished (case, sample).

    Attributes:
        record: the record without its `array`.
        clean: [H, W, C] clean image, or None where nothing was attacked.
        adversarial: [H, W, C], or None likewise.
    """

    record: Record
    clean: np.ndarray | None
    adversarial: np.ndarray | None


def writer_name(residue: tuple[int, int], kind: str = "shard") -> str:
    """Name the writer of a residue class of samples.

    Args:
        residue: (i, n).
        kind: "shard" or "process".

    Returns:
        "main" for n = 1, else e.g. "shard-0-of-3".
    """
    index, count = residue
    return "main" if count == 1 else f"{kind}-{index}-of-{count}"


def read_manifest(run_dir) -> dict[str, Any]:
    """Read the manifest of a run.

    Args:
        run_dir: the run directory.

    Returns:
        Its content.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged or of another format version.
    """
    path = Path(run_dir) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"run directory: {run_dir} holds no {MANIFEST}; "
                                "expected a directory that gse-jax evaluate has begun")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format_version"]
        missing = [name for name in _NEEDED if name not in manifest] if version == FORMAT_VERSION else ()
        if missing:
            raise ValueError(f"without {missing[0]}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"run directory: {path} is damaged ({error}); restore it from a copy, or move it away and run "
                         "the same gse-jax evaluate with --allow-mismatch: what is stored is kept") from None
    if version != FORMAT_VERSION:
        raise ValueError(f"run directory: {path} has format version {version}, this gse_jax reads "
                         f"{FORMAT_VERSION}; use the gse_jax that wrote it")
    return manifest


def write_manifest(run_dir: Path, manifest: dict[str, Any]) -> bool:
    """Write the manifest unless there is one.

    Args:
        run_dir: the run directory.
        manifest: JSON values.

    Returns:
        False if another process was faster; its manifest stays.

    Raises:
        StoreError: if the system refuses.
    """
    content = json.dumps(manifest, indent=1, allow_nan=False).encode()
    return write_file(run_dir / MANIFEST, lambda file: file.write(content), exclusive=True)


def widen_manifest(run_dir: Path, cases: Sequence[dict[str, Any]], num_samples: int) -> None:
    """Let the manifest count cases and samples that an allowed mismatch has added.

    Args:
        run_dir: the run directory.
        cases: those of the run that goes on, as in the manifest.
        num_samples: its N.

    Raises:
        StoreError: if the system refuses.
    """
    manifest = read_manifest(run_dir)
    known = {case["name"] for case in manifest["cases"]}
    added = [case for case in cases if case["name"] not in known]
    if not added and num_samples <= manifest["num_samples"]:
        return
    manifest |= {"cases": manifest["cases"] + added,
                 "num_samples": max(num_samples, manifest["num_samples"])}
    content = json.dumps(manifest, indent=1, allow_nan=False).encode()
    write_file(run_dir / MANIFEST, lambda file: file.write(content))


def prepare(run_dir: Path, bytes_needed: int) -> None:
    """Create the folders and make sure that they can be written to, before anything is computed.

    Args:
        run_dir: the run directory.
        bytes_needed: room that one flush needs at least.

    Raises:
        StoreError: if the directory is read-only, the disk full, or `run_dir` something else.
    """
    for name in FOLDERS:
        make_folder(run_dir / name)
    # A file is written in truth: permissions alone do not tell of quotas and read-only mounts.
    # Each process has its own, so that array jobs that start together do not meet.
    probe = run_dir / "locks" / f".probe-{time.time_ns()}"
    try:
        write_file(probe, lambda file: file.write(bytes(4096)))
    finally:
        probe.unlink(missing_ok=True)
    free = shutil.disk_usage(run_dir).free
    if free < bytes_needed + _SPARE_BYTES:
        raise StoreError(f"run directory: {run_dir} has {free >> 20} MiB of free disk, expected at "
                         f"least {(bytes_needed + _SPARE_BYTES) >> 20}; free some space")


class Writer:
    """Writes records, arrays and events under one writer's name; a context manager with its lock.

    Raises `StoreError` on entering where another process has the name, and wherever the system
    refuses a write.
    """

    def __init__(self, run_dir: Path, name: str, residue: tuple[int, int]):
        """Prepare a writer; nothing is touched before entering.

        Args:
            run_dir: a directory that `prepare` has made.
            name: of the writer; part of its files' names.
            residue: (i, n), the samples that it takes.
        """
        self._run_dir, self.name = run_dir, name
        self._lock = WriterLock(run_dir / "locks", name, residue)
        self._next = 0

    def __enter__(self):
        self._lock.__enter__()
        try:
            self._records = Journal(self._run_dir / "records" / f"{self.name}.jsonl")
            self._events = Journal(self._run_dir / "events" / f"{self.name}.jsonl")
            self._next = self._remove_orphans()
        except BaseException:
            self._lock.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self._records.__exit__()
        self._events.__exit__()
        self._lock.__exit__()

    def event(self, kind: str, **details: Any) -> None:
        """Note something that a reader of the results should know.

        Args:
            kind: e.g. "start", "out_of_memory".
            **details: JSON values.
        """
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._events.append([{"time": now, "event": kind, **details}])

    def write(self, finished: Sequence[Finished]) -> None:
        """Store finished samples: first the arrays, then the records that point to them.

        Args:
            finished: any number of them; they share one array file.
        """
        attacked = [one for one in finished if one.adversarial is not None]
        name = f"{self.name}-{self._next:05d}.npz"
        if attacked:
            self._write_arrays(name, attacked)
            self._next += 1
        rows = {id(one): row for row, one in enumerate(attacked)}
        self._records.append(
            {**one.record, "array": [name, rows[id(one)]] if id(one) in rows else None}
            for one in finished)

    def _write_arrays(self, name, attacked):
        # The cases of one image come close together; its clean image is stored once.
        place: dict[int, int] = {}
        for one in attacked:
            place.setdefault(one.record["index"], len(place))
        first = {one.record["index"]: one.clean for one in attacked}
        arrays = {"adversarial": np.stack([one.adversarial for one in attacked]),
                  "clean": np.stack([first[index] for index in place]),
                  "clean_row": np.asarray([place[one.record["index"]] for one in attacked]),
                  "index": np.asarray([one.record["index"] for one in attacked])}
        write_file(self._run_dir / "arrays" / name, lambda file: _save(file, arrays))

    def _remove_orphans(self) -> int:
        """Remove array files that a kill left without records; return the next free number."""
        folder, own = self._run_dir / "arrays", re.compile(rf"{re.escape(self.name)}-(\d+)\.npz")
        used = {record["array"][0] for record in read_journal(
            self._run_dir / "records" / f"{self.name}.jsonl") if record["array"]}
        try:
            for path in folder.iterdir():
                is_ours = own.fullmatch(path.name) or (path.name.startswith(f".{self.name}-")
                                                       and path.suffix == ".tmp")
                if is_ours and path.name not in used:
                    path.unlink()
        except OSError as error:
            raise explain(folder, error) from error
        # A name that was ever pointed to is not given again, even if its file is gone: old records
        # would come back to life with other images.
        return max((int(match[1]) for match in map(own.fullmatch, used) if match), default=-1) + 1


def _save(file, arrays) -> None:
    """Write an npz file as `numpy.savez_compressed` does, but at the fastest level.

    CIFAR-10's images take as many bytes as at NumPy's level in a fifth of the time, which is most of
    what the host does beside an attack.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)


def valid_records(run_dir: Path) -> Iterator[Record]:
    """Walk over the records of all writers whose array file is there.

    Args:
        run_dir: the run directory.

    Yields:
        Records, writer by writer in the order of writing; a (case, sample) may come twice.
    """
    return (record for record, there in _all_records(run_dir) if there)


def lost_records(run_dir: Path) -> list[Record]:
    """Return the records whose array file is gone and which nothing has made anew.

    Args:
        run_dir: the run directory.

    Returns:
        One for each (case, sample).
    """
    lost, kept = {}, set()
    for record, there in _all_records(run_dir):
        key = record["case"], record["sample_id"]
        kept.add(key) if there else lost.setdefault(key, record)
    return [record for key, record in lost.items() if key not in kept]


def digest_of_records(run_dir: Path) -> str:
    """Return a digest of all records that were ever written and can be read; it changes with the results.

    Args:
        run_dir: the run directory.

    Returns:
        Hexadecimal digits; of records that lost their images and those made anew, too.
    """
    digest = hashlib.sha256()
    for record, _ in _all_records(run_dir):
        digest.update(json.dumps(record).encode())
    return digest.hexdigest()


def _all_records(run_dir: Path) -> Iterator[tuple[Record, bool]]:
    """Walk over all records, and tell whether the array file that each points to is there."""
    known: dict[str, bool] = {}
    for path in sorted((run_dir / "records").glob("*.jsonl")):
        for record in read_journal(path):
            name = record["array"][0] if record["array"] is not None else None
            if name is not None and name not in known:
                known[name] = (run_dir / "arrays" / name).is_file()
            yield record, name is None or known[name]
