"""`verify`: it must find what is planted, and nothing in an honest run."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from gse_jax import evaluation
from gse_jax.cli import main
from gse_jax.evaluation import MismatchError, evaluate, open_run, verification, verify
from gse_jax.evaluation.durable import Journal, StoreError
from gse_jax.evaluation.store import digest_of_records
from gse_jax.evaluation.verification import quantized
from tests.evaluation.small_run import PLAN, dataset, model


@pytest.fixture
def run_dir(whole, tmp_path):
    shutil.copytree(whole.path, tmp_path / "run")
    return tmp_path / "run"


def rewrite_records(run_dir, change):
    """Replace every record by `change(record)`, with a valid checksum."""
    records = open_run(run_dir).records
    (run_dir / "records" / "main.jsonl").unlink()
    with Journal(run_dir / "records" / "main.jsonl") as journal:
        journal.append(change(dict(record)) for record in records)


def rewrite_one(run_dir, victim, **change):
    key = victim["sample_id"], victim["case"]
    rewrite_records(run_dir, lambda record: record | (change if (record["sample_id"], record["case"]) == key else {}))


def rewrite_arrays(run_dir, name, change):
    path = run_dir / "arrays" / name
    with np.load(path) as arrays:
        arrays = dict(arrays)
    np.savez_compressed(path, **change(arrays))


def first_success(run_dir):
    return next(r for r in open_run(run_dir).records if r["status"] == "found")


def test_an_honest_run_is_confirmed(run_dir, whole):
    result = verify(run_dir, model=model())
    assert result.ok and result.problems == []
    for name, case in result.cases.items():
        records = [r for r in whole.records if r["case"] == name and r["array"]]
        found = sum(r["success"] for r in records)
        assert case == (len(records), found, found, 0, 0, 0)
        assert case.success_rate == found / len(records) > 0
    stored = json.loads((run_dir / "verification.json").read_text())
    assert stored["ok"] and stored["cases"]["gse/untargeted"]["attacked"] == 36


def test_a_success_that_is_none_is_found(run_dir):
    victim = first_success(run_dir)
    name, row = victim["array"]

    def undo(arrays):
        arrays["adversarial"][row] = arrays["clean"][arrays["clean_row"][row]]
        return arrays

    rewrite_arrays(run_dir, name, undo)
    result = verify(run_dir, model=model())
    case = result.cases[victim["case"]]
    assert not result.ok and case.confirmed == case.claimed - 1
    assert any(victim["sample_id"] in p and "recorded as a success" in p for p in result.problems)


def test_a_success_that_is_not_claimed_is_counted(run_dir):
    victim = first_success(run_dir)
    rewrite_one(run_dir, victim, success=False, status="not_found")
    result = verify(run_dir, model=model())
    case = result.cases[victim["case"]]
    assert (case.unclaimed, case.claimed) == (1, case.attacked - 1) and result.ok


def test_a_success_without_images_is_found(run_dir):
    victim = first_success(run_dir)
    rewrite_one(run_dir, victim, array=None)
    result = verify(run_dir, model=model())
    assert result.problems == [f"{victim['case']}, sample {victim['sample_id']}: recorded as found, but without images"]


@pytest.mark.parametrize("value", [1.0 + 1e-6, -1e-6, np.nan, np.inf])
def test_an_image_out_of_bounds_is_found(run_dir, value):
    victim = first_success(run_dir)
    name, row = victim["array"]

    def leave(arrays):
        arrays["adversarial"][row, 0, 0, 0] = value
        return arrays

    rewrite_arrays(run_dir, name, leave)
    result = verify(run_dir, model=model())
    case = result.cases[victim["case"]]
    assert case.out_of_bounds == 1 and case.confirmed == case.claimed - 1
    assert any("leaves the bounds" in problem for problem in result.problems)


def test_a_clean_image_of_another_class_is_found(run_dir):
    """But not judged after rounding, which may turn it."""
    rounded = verify(run_dir, model=model(), quantize=True).cases
    run, (apply_fn, params) = open_run(run_dir), model()

    def classes(record):
        image = run.images(record)[1]
        return [int(apply_fn(params, one[None]).argmax()) for one in (image, quantized(image, (0.0, 1.0)))]

    victim = next(r for r in run.records if r["status"] == "found" and r["target"] is None
                  and r["label"] not in classes(r))
    other = next(label for label in range(5) if label not in (victim["label"], *classes(victim)))
    rewrite_one(run_dir, victim, label=other)
    result = verify(run_dir, model=model())
    case = result.cases[victim["case"]]
    assert case.confirmed == case.claimed - 1 and result.num_problems == 1
    assert f"the clean image is classified as {victim['label']}, label {other}" in result.problems[0]
    assert verify(run_dir, model=model(), quantize=True).cases == rounded


@pytest.mark.parametrize("size", [1, 5, -1, 1000])
def test_every_image_is_looked_at_once(whole, size):
    size = size if size > 0 else sum(r["array"] is not None for r in whole.records) - 1  # one is left over
    batches = list(verification._batches(whole, None, size))
    assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
    looked_at = [(record["case"], record["sample_id"]) for batch in batches for record, _, _ in batch]
    assert sorted(looked_at) == sorted((r["case"], r["sample_id"]) for r in whole.records if r["array"])


def test_a_row_that_is_not_there_and_more_problems_than_are_listed(run_dir, monkeypatch):
    monkeypatch.setattr(verification, "_SHOWN_PROBLEMS", 2)
    records = open_run(run_dir).records
    rewrite_records(run_dir, lambda record: record | (
        {"array": [record["array"][0], 999]} if record["array"] and record["target"] is None else {}))
    result = verify(run_dir, model=model())
    assert result.num_problems == sum(r["array"] is not None and r["target"] is None for r in records)
    assert len(result.problems) == 2 and all("another file was put in its place" in problem for problem in result.problems)


def test_logits_that_are_not_finite_confirm_nothing(whole):
    record = next(r for r in whole.records if r["status"] == "found" and r["target"] is None)
    tally = verification._Tally(whole, None, False)
    tally._judge(record, record["label"], -1, True, {})
    result = tally.result()
    assert result.cases[record["case"]] == (1, 1, 0, 0, 0, 0) and result.num_problems == 1


@pytest.mark.parametrize("inside, unclaimed", [(True, 1), (False, 0)])
def test_an_image_out_of_bounds_is_no_success_that_was_not_claimed(whole, inside, unclaimed):
    record = next(r for r in whole.records if r["status"] == "found" and r["target"] is None) | {"success": False}
    tally = verification._Tally(whole, None, False)
    tally._judge(record, record["label"], record["label"] + 1, inside, {})
    assert tally.result().cases[record["case"]] == (1, 0, 0, unclaimed, 1 - unclaimed, 0)


@pytest.mark.parametrize("recorded, measured, differs", [
    ({"patch_count": 47_001}, {"patch_count": 47_000}, 1), ({"l2": 1.00001}, {"l2": 1.0}, 0), ({"l2": 1.001}, {"l2": 1.0}, 1)])
def test_counts_must_be_equal_and_norms_nearly(whole, recorded, measured, differs):
    record = next(r for r in whole.records if r["status"] == "found" and r["target"] is None) | recorded
    tally = verification._Tally(whole, None, False)
    tally._judge(record, record["label"], record["label"] + 1, True, measured)
    assert tally.result().cases[record["case"]] == (1, 1, 1, 0, 0, differs)


@pytest.mark.parametrize("field", ["changed_pixels", "num_clusters", "l2", "linf", "patch_count"])
def test_a_flattering_number_is_found(run_dir, field):
    victim = first_success(run_dir)
    rewrite_one(run_dir, victim, **{field: (1 - 2e-4) * victim[field]})  # twice what rounding is granted
    result = verify(run_dir, model=model())
    assert result.num_problems == 1 and field in result.problems[0]
    assert result.cases[victim["case"]].differing_metrics == 1


def test_a_damaged_or_lost_array_file_is_told(run_dir):
    names = sorted(path.name for path in (run_dir / "arrays").iterdir())
    content = bytearray((run_dir / "arrays" / names[0]).read_bytes())
    content[len(content) // 2] ^= 255
    (run_dir / "arrays" / names[0]).write_bytes(content)
    result = verify(run_dir, model=model())
    assert not result.ok
    assert any(f"{names[0]} is damaged" in problem and "delete it" in problem
               for problem in result.problems)


def test_a_lost_array_file_is_told_until_its_samples_are_made_anew(run_dir, whole):
    path = sorted((run_dir / "arrays").iterdir())[0]
    lost = [r for r in whole.records if r["array"] and r["array"][0] == path.name]
    path.unlink()
    result = verify(run_dir, model=model())
    assert result.num_problems == len(lost) > 0
    assert all(f"{path.name} is gone" in problem for problem in result.problems)
    evaluate(PLAN, run_dir, model=model(), data=dataset())
    assert verify(run_dir, model=model()).ok


def test_another_model_verifies_nothing(run_dir):
    with pytest.raises(MismatchError, match="another model .*weights: "):
        verify(run_dir, model=model(seed=5))
    with pytest.raises(ValueError, match="model is empty"):
        verify(run_dir)
    with pytest.raises(FileNotFoundError, match="manifest"):
        verify(run_dir / "arrays", model=model())


def test_after_eight_bits_small_perturbations_are_lost_and_told(run_dir, whole):
    result = verify(run_dir, model=model(), quantize=True)
    assert result.path.name == "verification-8bit.json" and result.quantized
    apply_fn, params = model()
    for name, case in result.cases.items():
        successes = [r for r in whole.records if r["case"] == name and r["status"] == "found"]
        images = np.stack([whole.images(r)[1] for r in successes])
        logits = np.asarray(apply_fn(params, np.rint(images * 255) / 255))
        wanted = [prediction == r["target"] if r["target"] is not None
                  else prediction != r["label"]
                  for prediction, r in zip(logits.argmax(-1), successes)]
        assert (case.claimed, case.confirmed) == (len(successes), sum(wanted))
        assert 0 < case.confirmed
    lost = sum(case.claimed - case.confirmed for case in result.cases.values())
    assert result.num_problems == lost
    assert all("after rounding to 8 bits" in problem for problem in result.problems)


def test_what_cannot_be_written_does_not_leave_an_older_verdict(run_dir, monkeypatch, capsys):
    assert verify(run_dir, model=model()).ok and (run_dir / "verification.json").is_file()

    def full(*_):
        raise StoreError("disk full")

    monkeypatch.setattr(verification, "write_file", full)
    result = verify(run_dir, model=model())
    assert result.path is None and not (run_dir / "verification.json").exists()
    monkeypatch.setattr(evaluation, "verify", lambda *_, **__: result._replace(num_problems=1, problems=["bad"]))
    assert main(["verify", str(run_dir)]) == 2
    assert "cannot be written to" in capsys.readouterr().err


def test_the_eight_bit_grid():
    grid = np.arange(256) / 255
    np.testing.assert_array_equal(quantized(grid, (0.0, 1.0)), grid)
    np.testing.assert_allclose(quantized(2 * grid - 1 + 0.003, (-1.0, 1.0))[:-1], 2 * grid[:-1] - 1,
                               atol=1e-12)
    assert quantized(np.float32([0.3]), (0.0, 1.0)).dtype == np.float32


def test_what_is_written_meanwhile_is_not_called_verified(run_dir, monkeypatch):
    records, before = open_run(run_dir).records, digest_of_records(run_dir)
    look_at = verification._Tally.look_at

    def writing(*arguments):
        if not written:
            written.append(None)
            with Journal(run_dir / "records" / "other.jsonl") as journal:
                journal.append([dict(records[0])])
        return look_at(*arguments)

    written = []
    monkeypatch.setattr(verification._Tally, "look_at", writing)
    verify(run_dir, model=model())
    assert json.loads((run_dir / "verification.json").read_text())["entries"] == before
    assert digest_of_records(run_dir) != before


def test_the_same_model_from_another_script_verifies(run_dir):
    apply_fn, params = model()

    def elsewhere(params, x):
        return apply_fn(params, x)

    assert verify(run_dir, model=(elsewhere, params)).ok
    # Of another version of JAX, whose programs differ, the name is all there is.
    manifest = json.loads((run_dir / "manifest.json").read_text())
    manifest["fingerprint"]["program of the model"] = f"0.1.0 {64 * 'a'}"
    (run_dir / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(MismatchError, match="model: .*elsewhere"):
        verify(run_dir, model=(elsewhere, params))
    assert verify(run_dir, model=model()).ok


def test_bounds_are_those_that_the_images_can_hold():
    """2.2 in float32 lies above 2.2; an image that touches it is inside."""
    run = SimpleNamespace(manifest={"cases": [{"name": "a"}], "bounds": [-1.8, 2.2], "dtype": "float32"})
    record = {"case": "a", "sample_id": "s", "label": 0, "target": None, "success": False}
    x = np.zeros((8, 8, 1), np.float32)
    for highest, outside in ((np.float32(2.2), 0), (np.nextafter(np.float32(2.2), np.float32(3)), 1)):
        tally = verification._Tally(run, lambda images: SimpleNamespace(classes=np.zeros(len(images), int)), False)
        adversarial = x.copy()
        adversarial[0, :2, 0] = -1.8, highest
        assert float(adversarial.max()) > 2.2
        tally.look_at([(record, x, adversarial)], 1)
        assert tally.result().cases["a"].out_of_bounds == outside
