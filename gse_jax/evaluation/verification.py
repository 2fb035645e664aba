"""Check the numbers of a run against its stored images, without believing a single record.

References:
    Carlini et al., "On Evaluating Adversarial Robustness", arXiv 1902.06705 (release and verify
    the adversarial examples).
"""

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gse_jax.attacks import validation
from gse_jax.evaluation.durable import StoreError, write_file
from gse_jax.evaluation.evaluator import MismatchError
from gse_jax.evaluation.fingerprint import differences, model_name, program_digest, weights_digest
from gse_jax.evaluation.forward import Forward
from gse_jax.evaluation.job import load_model
from gse_jax.evaluation.measuring import measure
from gse_jax.evaluation.plan import Plan
from gse_jax.evaluation.run_directory import Run, open_run
from gse_jax.evaluation.store import digest_of_records, lost_records
from gse_jax.types import Record

_LEVELS = 255  # of an 8-bit pixel
_SHOWN_PROBLEMS = 1000  # more are counted, not listed
# Float32 norms differ in the last digits between devices; counts must be equal.
_TOLERANCE = 1e-4


class CaseVerification(NamedTuple):
    """What the stored images of one case say.

    Attributes:
        attacked: records with images.
        claimed: of those, recorded as successes.
        confirmed: of those, with the wanted prediction in the fresh forward pass, inside the
            bounds, and (unless rounded) with a clean image that is classified correctly.
        unclaimed: images with the wanted prediction that are not recorded as successes.
        out_of_bounds: images that leave the bounds or are not finite.
        differing_metrics: successes whose recorded sparsity or norms differ from the images'.
    """

    attacked: int
    claimed: int
    confirmed: int
    unclaimed: int
    out_of_bounds: int
    differing_metrics: int

    @property
    def success_rate(self) -> float | None:
        """Confirmed / attacked, None where nothing was attacked."""
        return self.confirmed / self.attacked if self.attacked else None


class Verification(NamedTuple):
    """The result of `verify`.

    Attributes:
        cases: by name of the case.
        problems: one sentence each, the first thousand.
        num_problems: how many there are.
        quantized: whether the images were rounded to 8 bits before.
        path: the file that holds all this, or None where the directory is read-only.
    """

    cases: dict[str, CaseVerification]
    problems: list[str]
    num_problems: int
    quantized: bool
    path: Path | None

    @property
    def ok(self) -> bool:
        """Whether every success was confirmed and nothing differs."""
        return self.num_problems == 0

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        cases = {name: {**case._asdict(), "success_rate": case.success_rate}
                 for name, case in self.cases.items()}
        return {"ok": self.ok, "quantized": self.quantized, "cases": cases,
                "num_problems": self.num_problems, "problems": self.problems}


def verify(run_dir, *, model=None, quantize: bool = False) -> Verification:
    """Classify and measure the stored images of a run afresh and compare with its records.

    Args:
        run_dir: the run directory.
        model: (apply_fn, params) where the run was given one; None loads the plan's.
        quantize: round the images to 8 bits first, as saving them as PNG would. A success that is
            lost by that is a problem; metrics are not compared.

    Returns:
        Verification; also written to verification.json, or verification-8bit.json, in `run_dir`.

    Raises:
        MismatchError: if the weights are not those of the run.
        FileNotFoundError, ValueError: if the directory is not a run, or names no model.
    """
    run = open_run(run_dir)
    entries = digest_of_records(run.path)  # before they are read: what a writer adds meanwhile is not looked at
    apply_fn, params = load_model(Plan.from_dict(run.manifest["plan"]), model)
    stored = run.manifest["fingerprint"]
    now = {"weights": weights_digest(params), "model": model_name(apply_fn),
           "program of the model": program_digest(params, apply_fn, run.manifest["image_shape"],
                                                  run.manifest["dtype"])}
    if now["program of the model"] == stored.get("program of the model"):
        del now["model"]  # another script calls its module otherwise; here only logits matter
    found = differences({name: stored[name] for name in now if name in stored}, now)
    if found:
        raise MismatchError(f"run directory: {run_dir} was made with another model "
                            f"({'; '.join(found)}); pass the run's own model and weights")
    forward = Forward(params, apply_fn, run.manifest["image_shape"])
    tally = _Tally(run, forward, quantize)
    size = forward.batch  # which halves where memory runs out
    for batch in _batches(run, tally, size):
        tally.look_at(batch, size)
    verification = tally.result()
    return verification._replace(path=_save(run, verification, entries))


def quantized(x, bounds) -> np.ndarray:
    """Round images to the 256 values of 8-bit files.

    Args:
        x: images in `bounds`.
        bounds: (low, high); low becomes 0 and high 255.

    Returns:
        The nearest images that an 8-bit file can hold, same dtype and range.
    """
    low, high = bounds
    levels = np.rint((np.asarray(x, np.float64) - low) / (high - low) * _LEVELS)
    return (low + levels / _LEVELS * (high - low)).astype(x.dtype)


class _Tally:
    """Counts what the fresh look at the images brings, case by case."""

    def __init__(self, run: Run, forward: Forward, quantize: bool):
        names = [case["name"] for case in run.manifest["cases"]]
        self._counts = {name: dict.fromkeys(CaseVerification._fields, 0) for name in names}
        self._bounds = tuple(run.manifest["bounds"])
        self._limits = validation.rounded(self._bounds, run.manifest["dtype"])
        self._forward, self._quantize = forward, quantize
        self._problems: list[str] = []
        self._num_problems = 0

    def problem(self, record: Record, text: str) -> None:
        """Note what is wrong with one record."""
        self._num_problems += 1
        if self._num_problems <= _SHOWN_PROBLEMS:
            self._problems.append(f"{record['case']}, sample {record['sample_id']}: {text}")

    def look_at(self, batch: Sequence[tuple[Record, np.ndarray, np.ndarray]], size: int) -> None:
        """Judge a batch of at most `size` (record, clean, adversarial)."""
        clean = np.stack([clean for _, clean, _ in batch])
        adversarial = np.stack([adversarial for _, _, adversarial in batch])
        if self._quantize:
            clean, adversarial = (quantized(x, self._bounds) for x in (clean, adversarial))
        before, after = self._forward(clean).classes, self._forward(adversarial).classes
        numbers = measure(clean, adversarial, bounds=self._bounds, batch=size)
        low, high = self._limits
        for i, (record, _, _) in enumerate(batch):
            image = adversarial[i]
            inside = bool(image.min() >= low and image.max() <= high)  # not of NaN
            self._judge(record, int(before[i]), int(after[i]), inside,
                        {name: values[i].item() for name, values in numbers.items()})

    def _judge(self, record, before, after, inside, numbers):
        counts = self._counts.setdefault(record["case"], dict.fromkeys(CaseVerification._fields, 0))
        counts["attacked"] += 1
        target = record["target"]
        wanted = after >= 0 and (after != record["label"] if target is None else after == target)
        # Clean images that were no 8-bit images are others after rounding; that is not judged.
        valid = inside and (self._quantize or before == record["label"])
        if not inside:
            counts["out_of_bounds"] += 1
            self.problem(record, "the adversarial image leaves the bounds or is not finite")
        elif not valid:
            self.problem(record, f"the clean image is classified as {before}, label "
                                 f"{record['label']}")
        if not record["success"]:
            counts["unclaimed"] += wanted and valid
            return
        counts["claimed"] += 1
        counts["confirmed"] += wanted and valid
        if not wanted:
            self.problem(record, f"recorded as a success, but the model predicts {after}"
                                 + (" after rounding to 8 bits" if self._quantize else ""))
        differing = [] if self._quantize else [
            f"{name} {record[name]} recorded, {value} measured" for name, value in numbers.items()
            if not np.isclose(record[name], value, rtol=_TOLERANCE if isinstance(value, float) else 0, atol=0)]
        if differing:
            counts["differing_metrics"] += 1
            self.problem(record, "; ".join(differing))

    def result(self) -> Verification:
        """Return the counts."""
        cases = {name: CaseVerification(**counts) for name, counts in self._counts.items()}
        return Verification(cases, self._problems, self._num_problems, self._quantize, None)


def _batches(run: Run, tally: _Tally, size: int) -> Iterator[list[Any]]:
    """Yield the records with images, array file by array file, so that each is read once."""
    batch: list[Any] = []
    for record in run.records:
        if record["success"] and record["array"] is None and record["status"] == "found":
            tally.problem(record, "recorded as found, but without images")
    for record in lost_records(run.path):
        tally.problem(record, f"its array file {record['array'][0]} is gone; run gse-jax evaluate "
                              "again to make it anew")
    # By file and row, so that each array file is read once.
    stored = sorted((record["array"], i) for i, record in enumerate(run.records)
                    if record["array"] is not None)
    for _, i in stored:
        record = run.records[i]
        try:
            batch.append((record, *run.images(record)))
        except (ValueError, IndexError) as error:
            tally.problem(record, str(error))
            continue
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _save(run: Run, verification: Verification, entries: str) -> Path | None:
    name = "verification-8bit.json" if verification.quantized else "verification.json"
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    content = json.dumps({"time": now, "entries": entries,
                          **verification.to_dict()}, indent=1).encode()
    try:
        write_file(run.path / name, lambda file: file.write(content))
    except StoreError:
        with contextlib.suppress(OSError):  # on a full disk: what was found before no longer holds
            (run.path / name).unlink()
        return None  # Others' runs can be verified where one may only read.
    return run.path / name
