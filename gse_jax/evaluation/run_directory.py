"""The run directory as its readers see it: `open_run`."""

import functools
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from gse_jax.evaluation.durable import read_journal
from gse_jax.evaluation.store import read_manifest, valid_records
from gse_jax.types import Record


class Run:
    """A run on disk, finished or not; made by `open_run`.

    Attributes:
        path: the run directory.
        manifest: content of manifest.json.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]):
        """Use `open_run`.

        Args:
            path: the run directory.
            manifest: its manifest.
        """
        self.path, self.manifest = path, manifest
        self._shard = functools.lru_cache(maxsize=2)(self._load_shard)

    @functools.cached_property
    def records(self) -> list[Record]:
        """All valid records, one per (case, sample), ordered by case and position in the data.

        Read when first asked for. A record whose array file is gone is left out: a resume makes it
        anew.
        """
        found: dict[tuple[str, str], Record] = {}
        for record in valid_records(self.path):
            key = record["case"], record["sample_id"]
            if key not in found or found[key]["status"] == "quarantined":  # one made anew counts
                found[key] = record
        order = {case["name"]: i for i, case in enumerate(self.manifest["cases"])}
        return sorted(found.values(), key=lambda r: (order.get(r["case"], len(order)), r["index"]))

    @functools.cached_property
    def events(self) -> list[dict[str, Any]]:
        """What happened, by time; each has `time`, `event` and `writer`.

        Starts with their devices, out-of-memory, allowed mismatches, stalls, ends.
        """
        entries = [{**entry, "writer": path.stem}
                   for path in sorted((self.path / "events").glob("*.jsonl"))
                   for entry in read_journal(path)]
        return sorted(entries, key=lambda entry: entry["time"])

    @property
    def total(self) -> int:
        """Number of records of the complete run."""
        return self.manifest["num_samples"] * len(self.manifest["cases"])

    @property
    def complete(self) -> bool:
        """Whether every (case, sample) has its record."""
        return len(self.records) == self.total

    @property
    def warnings(self) -> list[str]:
        """Sentences that belong beside the numbers: mixed machines, allowed mismatches, gaps."""
        starts = [event for event in self.events if event["event"] == "start"]
        lines = [f"allowed mismatch: {line}" for event in self.events
                 if event["event"] == "mismatch" for line in event["differences"]]
        machines = [{"device": event["device_kind"], **event["versions"]} for event in starts]
        for what in sorted({name for machine in machines for name in machine}):
            kinds = sorted({machine.get(what, "none") for machine in machines})
            if len(kinds) > 1:
                lines.append(f"written with more than one {what}: {', '.join(kinds)}")
        if self.manifest["forced"]:
            lines.append("errors of the pre-flight checks were overruled (see findings)")
        quarantined = {r["sample_id"] for r in self.records if r["status"] == "quarantined"}
        if quarantined:
            lines.append(f"{len(quarantined)} samples could not be used and are quarantined")
        if not self.complete:
            lines.append(f"incomplete: {len(self.records)} of {self.total} records")
        return list(dict.fromkeys(lines))  # those of every shard and every resume once

    def images(self, record: Record) -> tuple[np.ndarray, np.ndarray]:
        """Return the images of a record.

        Args:
            record: one of `records` whose `array` is not None.

        Returns:
            (clean [H, W, C], adversarial [H, W, C]).

        Raises:
            ValueError: if the record has no images, or their file is damaged.
        """
        if record["array"] is None:
            raise ValueError(f"record {record['sample_id']!r} of case {record['case']!r} has no "
                             f"images: its status is {record['status']}")
        name, row = record["array"]
        arrays = self._shard(name)
        if row >= len(arrays["index"]) or arrays["index"][row] != record["index"]:
            raise ValueError(f"run directory: {self.path / 'arrays' / name} does not hold the images of record "
                             f"{record['sample_id']!r}: another file was put in its place; delete it and run gse-jax "
                             "evaluate again to make its samples anew")
        clean_row = arrays["clean_row"][row]
        return arrays["clean"][clean_row], arrays["adversarial"][row]

    def _load_shard(self, name: str) -> dict[str, np.ndarray]:
        path = self.path / "arrays" / name
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                return {key: arrays[key] for key in ("clean", "clean_row", "adversarial", "index")}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"run directory: {path} is damaged ({error}); delete it and run "
                             "gse-jax evaluate again to make its samples anew") from None


def open_run(run_dir) -> Run:
    """Open a run directory for reading; also while it is being written.

    Args:
        run_dir: the run directory.

    Returns:
        Run.

    Raises:
        FileNotFoundError: if it holds no manifest.
        ValueError: if the manifest is damaged or of another format version.
    """
    return Run(Path(run_dir), read_manifest(run_dir))
