"""`evaluate` without faults: what the records say, resuming, and what refuses to be resumed."""

import dataclasses
import functools
import json
import shutil
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gse_jax
from gse_jax.attacks import GSESettings
from gse_jax.evaluation import (
    AttackPlan,
    MismatchError,
    Plan,
    PreflightError,
    evaluate,
    open_run,
    verify,
)
from gse_jax.evaluation import evaluator, fingerprint
from gse_jax.evaluation.attacker import Advance, Attacker
from gse_jax.evaluation.cases import Case, Group
from gse_jax.evaluation.job import set_up
from gse_jax.evaluation.recorder import Recorder, flush_size
from gse_jax.evaluation.store import Finished
from gse_jax.types import Record
from tests.evaluation.small_run import CLASSES, PLAN, SHORT, dataset, model, same_runs, table
from tests.toy_model import small_logits


def evaluate_small(run_dir, plan=PLAN, **options):
    options = {"model": model(), "data": dataset(), **options}
    return evaluate(plan, run_dir, **options)


def part_of(whole, run_dir, *, keep=1):
    """A copy of the run as it stood when only so many of its array files were written."""
    shutil.copytree(whole.path, run_dir)
    for number, path in enumerate(sorted((run_dir / "arrays").iterdir())):
        if number >= keep:
            path.unlink()
    return run_dir


def test_every_pair_has_one_record_with_all_fields(whole):
    assert whole.complete and len(whole.records) == 120 == whole.total
    names = [case["name"] for case in whole.manifest["cases"]]
    assert names == ["gse/untargeted", "gse/targeted+1", "gse/targeted+3"]
    assert [(r["case"], r["index"]) for r in whole.records] == [
        (name, i) for name in names for i in range(40)]
    for record in whole.records:
        assert list(record) == list(Record.__annotations__)
        assert record["sample_id"] == f"s{record['index']:05d}"
        offset = {"gse/untargeted": None, "gse/targeted+1": 1, "gse/targeted+3": 3}[record["case"]]
        assert record["target"] == (None if offset is None else (record["label"] + offset) % 5)
    assert {r["status"] for r in whole.records} == {"found", "not_found", "already_misclassified"}
    assert whole.warnings == [] and whole.manifest["findings"] != []


def test_only_correctly_classified_images_are_attacked(whole):
    for record in whole.records:
        wrong = record["index"] % 10 == 0
        assert (record["status"] == "already_misclassified") == wrong
        assert (record["clean_prediction"] != record["label"]) == wrong
        assert (record["array"] is None) == wrong == (record["prediction"] is None)
        if wrong:
            assert record["gradient_evals"] == 0
            # Untargeted, a wrong prediction is the wanted one; targeted only if it is the target.
            assert record["success"] == (record["target"] in (None, record["clean_prediction"]))
    # Labels were moved by 1 and targets are label + 1 and + 3: none is the prediction.
    assert sum(r["success"] for r in whole.records if r["index"] % 10 == 0) == 4


def test_records_equal_a_plain_attack_and_their_own_images(whole):
    apply_fn, params = model()
    data = dataset()
    right = np.arange(40) % 10 != 0
    result = gse_jax.attack(params, apply_fn, data.images[right], data.labels[right],
                            settings=GSESettings(**SHORT), lanes=1)
    records = [r for r in whole.records if r["case"] == "gse/untargeted" and r["index"] % 10]
    np.testing.assert_array_equal([r["success"] for r in records], result.success)
    np.testing.assert_array_equal([r["gradient_evals"] for r in records], result.gradient_evals)
    assert sum(r["success"] for r in records) > 20
    for record, expected in zip(records, result.adversarials):
        clean, adversarial = whole.images(record)
        np.testing.assert_array_equal(clean, data.images[record["index"]])
        np.testing.assert_allclose(adversarial, expected, atol=1e-9)
        logits = np.asarray(apply_fn(params, jnp.asarray(adversarial)[None]))[0]
        assert record["prediction"] == logits.argmax()
        probabilities = np.exp(logits) / np.exp(logits).sum()
        np.testing.assert_allclose(record["confidence_after"], probabilities.max(), rtol=1e-9)

    for record in whole.records:
        if record["status"] != "found":
            assert record["changed_pixels"] is record["l2"] is None
            continue
        clean, adversarial = whole.images(record)
        assert record["changed_pixels"] == (adversarial != clean).any(-1).sum() > 0
        np.testing.assert_allclose(record["linf"], 2 * np.abs(adversarial - clean).max())
        np.testing.assert_allclose(record["l2"], 2 * np.linalg.norm(adversarial - clean))


@pytest.mark.parametrize("options", [
    pytest.param({"plan": dataclasses.replace(PLAN, lanes=2)}, marks=pytest.mark.slow),
    pytest.param({"plan": dataclasses.replace(PLAN, lanes=4)}, marks=pytest.mark.slow),
    {"flush_samples": 3, "shard": (0, 2)},
], ids=["two devices", "four devices", "shards"])
def test_resumed_with_other_lanes_devices_batches_or_shards(whole, tmp_path, options):
    run_dir = part_of(whole, tmp_path / "run")
    before = table(open_run(run_dir))
    assert 0 < len(before) < 60
    run = evaluate_small(run_dir, **options)
    if "shard" in options:
        assert not run.complete
        assert any("incomplete" in line for line in run.warnings)
        run = evaluate_small(run_dir, **{**options, "shard": (1, 2)})
    same_runs(run_dir, whole)
    # What was there was not done again.
    starts = [event for event in run.events if event["event"] == "start"]
    assert starts[-1]["remaining"] <= 120 - len(before)


def test_a_finished_run_is_not_touched_again(whole, tmp_path):
    shutil.copytree(whole.path, tmp_path / "run")
    seen = []
    run = evaluate_small(tmp_path / "run", on_progress=seen.append)
    assert [(p.done, p.total, p.resumed) for p in seen] == [(120, 120, 120)]
    assert run.events[-1]["event"] == "end"
    names = sorted(p.name for p in (tmp_path / "run" / "arrays").iterdir())
    assert names == sorted(p.name for p in (whole.path / "arrays").iterdir())


def changed(field, **values):
    attack = dataclasses.replace(PLAN.attacks[0], **{field: {**getattr(PLAN.attacks[0], field),
                                                             **values}})
    return dataclasses.replace(PLAN, attacks=(attack, PLAN.attacks[1]))


def other_pixel():
    data = dataset()
    images = data.images.copy()
    images[17, 3, 3, 0] += 1e-12
    return data._replace(images=images)


def shifted(shift):
    """A model that closes over an option, as adapted ones do."""
    return lambda params, x: small_logits(params, x + shift), model()[1]


@pytest.mark.parametrize(("options", "line"), [
    ({"model": (functools.partial(small_logits), model()[1])}, "model: .*small_logits in the run, now functools.partial"),
    ({"model": model(seed=2)}, r"weights: [0-9a-f]{12} in the run, now [0-9a-f]{12}"),
    ({"data": other_pixel()}, r"data: [0-9a-f]{12} in the run, now"),
    ({"data": dataset(30)}, "num_samples: 40 in the run, now 30"),
    ({"plan": dataclasses.replace(PLAN, seed=1)}, "seed: 0 in the run, now 1"),
    ({"plan": dataclasses.replace(PLAN, bounds=(-1.0, 1.0))}, r"bounds: \[0.0, 1.0\] in the run"),
    ({"plan": changed("settings", num_runs=5)},
     "gse/untargeted: settings.num_runs: 4 in the run, now 5"),
    ({"plan": changed("hyperparams", mu=0.5)},
     "gse/untargeted: hyperparams.mu: 1.0 in the run, now 0.5"),
    ({"plan": dataclasses.replace(PLAN, attacks=PLAN.attacks[:1])}, "cases: .* in the run, now"),
], ids=["model", "weights", "pixel", "data", "seed", "bounds", "settings", "hyperparams", "cases"])
def test_another_run_is_refused_with_the_difference(whole, tmp_path, options, line):
    run_dir = part_of(whole, tmp_path / "run", keep=0)
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()
              and path.suffix != ".lock"}
    with pytest.raises(MismatchError, match=line) as error:
        evaluate_small(run_dir, **options)
    assert "allow_mismatch=True" in str(error.value) and "\n" not in str(error.value)
    assert before == {path: path.read_bytes() for path in before}


def test_other_targets_in_the_same_file_are_another_run(tmp_path):
    data, plan = dataset(), Plan(attacks=(AttackPlan(target_file=str(tmp_path / "targets.json")),))

    def found(shift):
        targets = dict(zip(data.ids, ((data.labels + shift) % CLASSES).tolist()))
        (tmp_path / "targets.json").write_text(json.dumps(targets))
        return set_up(plan, model(), data).fingerprint

    (line,) = fingerprint.differences(found(1), found(2))
    assert line.startswith("gse/targeted_file: targets: ")


def test_more_pairs_than_numbers_are_refused():
    group = Group("gse", None, None, "cifar10", True, (Case("gse/targeted+3", 3, None),))
    Attacker(None, group, None, num_samples=2**29 - 1, seed=0, lanes=1)
    with pytest.raises(ValueError, match="split the data"):
        Attacker(None, group, None, num_samples=2**29, seed=0, lanes=1)


def test_a_model_of_the_same_name_that_computes_something_else_is_refused(tmp_path):
    plan = dataclasses.replace(PLAN, attacks=PLAN.attacks[:1])
    evaluate_small(tmp_path, plan, shard=(0, 2), model=shifted(0.0))
    evaluate_small(tmp_path, plan, shard=(0, 2), model=shifted(0.0))
    for other in (shifted(0.1), shifted(jnp.full((1, 1, 1, 1), 0.1))):
        with pytest.raises(MismatchError, match=r"\(program of the model: \S+ [0-9a-f]{12} in the run, now"):
            evaluate_small(tmp_path, plan, shard=(1, 2), model=other)
        with pytest.raises(MismatchError, match="another model .program of the model"):
            verify(tmp_path, model=other)
    assert verify(tmp_path, model=shifted(0.0)).ok


def test_arrays_that_inner_programs_hold_take_part_in_the_digest():
    from gse_jax.evaluation.fingerprint import program_digest

    def digest(value, wrap):
        kernel = np.full((12, 2), value)
        inner = wrap(lambda x: x.reshape(len(x), -1) @ kernel)
        return program_digest(None, lambda _, x: inner(x), (2, 2, 3), np.float64)

    for wrap in (jax.jit, jax.checkpoint, lambda fn: fn):
        assert digest(1.0, wrap) == digest(1.0, wrap) != digest(2.0, wrap)


def test_limit_holds_for_given_data_too(tmp_path):
    plan = dataclasses.replace(PLAN, attacks=PLAN.attacks[:1], limit=np.int64(7))
    run = evaluate_small(tmp_path, plan)
    assert run.complete and run.total == 7 and run.manifest["plan"]["limit"] == 7
    assert [record["sample_id"] for record in run.records] == [f"s{i:05d}" for i in range(7)]


def test_images_are_stored_as_the_attack_sees_them(tmp_path):
    plan = dataclasses.replace(PLAN, attacks=PLAN.attacks[:1], limit=4)
    in_float32 = small_logits, tuple(array.astype(np.float32) for array in model()[1])
    with jax.enable_x64(False):
        run = evaluate_small(tmp_path, plan, model=in_float32)
    stored = [record for record in run.records if record["array"] is not None]
    assert stored
    for record in stored:
        clean, adversarial = run.images(record)
        assert clean.dtype == adversarial.dtype == np.float32
        assert (clean != adversarial).any(-1).sum() == record["changed_pixels"]


@pytest.mark.parametrize(("options", "kind", "line"), [
    ({"plan": "plan.toml"}, TypeError, "plan must be a Plan, got str"),
    ({"plan": dataclasses.replace(PLAN, limit=0)}, ValueError, "limit must be at least 1, got 0"),
    ({"shard": "0/3"}, ValueError, r"shard must be a pair \(i, n\)"),
    ({"flush_samples": "3"}, ValueError, "flush_samples must be a positive number, got '3'"),
    ({"stall_seconds": 0}, ValueError, "stall_seconds must be a positive number, got 0"),
])
def test_wrong_arguments_are_named_in_one_line(tmp_path, options, kind, line):
    with pytest.raises(kind, match=line):
        evaluate_small(tmp_path, **options)


def test_other_package_versions_are_refused(whole, tmp_path, monkeypatch):
    run_dir = part_of(whole, tmp_path / "run")
    real = fingerprint.versions()
    for version, refused in (("0.99.1", True), (f"{real['jax'].rpartition('.')[0]}.99", False)):
        monkeypatch.setattr(fingerprint, "versions", lambda: {**real, "jax": version})
        if refused:
            with pytest.raises(MismatchError, match="version of jax: .* in the run, now 0.99"):
                evaluate_small(run_dir)
        else:
            assert evaluate_small(run_dir).complete


def test_a_mismatch_may_be_allowed_and_is_told_ever_after(whole, tmp_path):
    run_dir = part_of(whole, tmp_path / "run")
    run = evaluate_small(run_dir, model=model(seed=2), allow_mismatch=True)
    assert run.complete
    assert any(line.startswith("allowed mismatch: weights: ") for line in run.warnings)


def test_a_mismatch_of_fewer_attacks_leaves_the_records_of_the_others(whole, tmp_path):
    run_dir = part_of(whole, tmp_path / "run")
    kept = len(open_run(run_dir).records)
    evaluate_small(run_dir, dataclasses.replace(PLAN, attacks=PLAN.attacks[:1]), allow_mismatch=True)
    cases = [record["case"] for record in open_run(run_dir).records]
    assert cases.count("gse/untargeted") == 40 and len(cases) >= kept and len(set(cases)) == 3


def test_what_an_allowed_mismatch_adds_counts(tmp_path):
    plan = dataclasses.replace(PLAN, attacks=PLAN.attacks[:1])
    assert evaluate_small(tmp_path, plan, data=dataset(10)).total == 10
    with pytest.raises(MismatchError):
        evaluate_small(tmp_path, PLAN, data=dataset(20))
    assert open_run(tmp_path).total == 10
    run = evaluate_small(tmp_path, PLAN, data=dataset(20), allow_mismatch=True)
    assert run.total == len(run.records) == 60 and run.complete
    assert set(verify(tmp_path, model=model()).cases) == {
        "gse/untargeted", "gse/targeted+1", "gse/targeted+3"}


def test_the_pre_flight_checks_stop_and_may_be_overruled(tmp_path):
    data = dataset()
    wrong = data._replace(labels=(data.labels + 1) % 5)
    plan = dataclasses.replace(PLAN, attacks=PLAN.attacks[:1], expected_accuracy=0.9)
    with pytest.raises(PreflightError, match="force=True"):
        evaluate_small(tmp_path, plan, data=wrong)
    assert not (tmp_path / "manifest.json").exists()
    run = evaluate_small(tmp_path, plan, data=wrong, force=True)
    assert run.complete and run.manifest["forced"]
    assert any(finding["severity"] == "error" for finding in run.manifest["findings"])


def test_every_target_of_an_image_is_attacked_and_force_alone_overrules_nothing(tmp_path):
    plan = dataclasses.replace(PLAN, attacks=(AttackPlan(offsets=(2, 3, 4), settings=SHORT),), limit=6)
    run = evaluate_small(tmp_path, plan, force=True)
    assert run.complete and len(run.records) == 18 and not run.manifest["forced"] and run.warnings == []


@pytest.mark.parametrize("samples, image_bytes, expected", [(256, 3072, 256), (256, 1 << 20, 32), (256, 1 << 30, 1)])
def test_a_flush_holds_clean_and_adversarial_images_of_64_mib_at_most(samples, image_bytes, expected):
    assert flush_size(samples, image_bytes) == expected


def test_results_are_stored_after_so_many_samples_or_seconds(monkeypatch):
    now, written = [0.0], []
    monkeypatch.setattr("gse_jax.evaluation.recorder.time", SimpleNamespace(monotonic=lambda: now[0]))
    writer = SimpleNamespace(write=lambda finished: written.append(len(finished)))
    forward = SimpleNamespace(batch=1)
    with Recorder(writer, forward, (0.0, 1.0), samples=2, seconds=10.0, total=4, resumed=0) as recorder:
        for now[0], sizes in ((1.0, []), (2.0, [2]), (12.0, [2, 1]), (13.0, [2, 1])):
            recorder.add(Advance([Finished({}, None, None)], [], 0))
            assert written == sizes
    assert written == [2, 1, 1]


def test_progress_counts_what_was_done(tmp_path):
    seen = []
    run = evaluate_small(tmp_path, on_progress=seen.append)
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    last = seen[-1]
    assert (last.done, last.total, last.attacked) == (120, 120, 108)
    assert last.found == sum(r["status"] == "found" for r in run.records)
    assert last.lane_evals >= sum(r["gradient_evals"] for r in run.records)


@pytest.mark.parametrize(("options", "message"), [
    ({"model": (1, 2)}, r"model must be \(apply_fn, params\)"),
    ({"model": None}, "plan: model is empty"),
    ({"data": None}, "plan: data is empty"),
    ({"data": 3}, "data must be a Dataset"),
    ({"data": dataset()._replace(ids=("same",) * 40)}, "ids must differ"),
    ({"shard": (3, 3)}, "counted from 0"),
    ({"engine": "dask"}, "engine='dask' is unknown; use one of local, distributed, ray"),
    ({"flush_samples": 0}, "flush_samples must be a positive number, got 0"),
    ({"plan": dataclasses.replace(PLAN, lanes=0)}, "lanes must be a whole number >= 1"),
    ({"plan": dataclasses.replace(PLAN, bounds=(1.0, 0.0))}, "low < high"),
])
def test_wrong_arguments_are_told_in_one_line(tmp_path, options, message):
    with pytest.raises((TypeError, ValueError), match=message) as error:
        evaluate_small(tmp_path / "run", **options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


DIGITS = Plan(data="digits", model="resnet20", weights="digits", limit=4,
              attacks=(AttackPlan(settings={"num_runs": 1, "max_steps": 12}),))


def test_a_plan_names_model_and_data():
    job = set_up(DIGITS)
    assert (job.num_samples, job.model.num_classes) == (4, 10)
    assert (job.model.image_shape, job.model.dtype) == ((32, 32, 3), np.float32)


@pytest.mark.slow
def test_a_plan_alone_is_enough(tmp_path):
    """The shipped data and weights, as the command line does it; float32."""
    run = evaluate(DIGITS, tmp_path)
    assert run.complete and run.manifest["dtype"] == "float32"
    assert run.manifest["class_names"][3] == "3"
    assert Plan.from_dict(run.manifest["plan"]) == DIGITS


def test_a_model_of_ones_own_is_named_without_addresses():
    from gse_jax.evaluation.fingerprint import model_name

    assert model_name(small_logits) == "tests.toy_model.small_logits"
    from gse_jax import models

    apply_fn, _ = models.load("resnet20", weights="digits")
    other, _ = models.load("resnet20", weights="digits", normalize=(0.0, 1.0))
    assert " at 0x" not in model_name(apply_fn) and model_name(apply_fn) != model_name(other)


def test_fast_writers_agree_on_one_manifest(tmp_path, monkeypatch):
    """Another shard writes the manifest while this one is still checking."""
    real = evaluator.preflight

    def slow(job):
        found = real(job)
        monkeypatch.setattr(evaluator, "preflight", real)
        evaluate_small(tmp_path, shard=(1, 2), plan=PLAN)
        return found

    monkeypatch.setattr(evaluator, "preflight", slow)
    assert evaluate_small(tmp_path, shard=(0, 2)).complete


def test_the_watchdog_covers_the_pre_flight(tmp_path, monkeypatch):
    """Where a hung device is first used."""
    def preflight(job):
        del job  # Unused.
        raise RuntimeError("watched" if any(t.name == "gse-jax watchdog" for t in threading.enumerate()) else "not")

    monkeypatch.setattr(evaluator, "preflight", preflight)
    with pytest.raises(RuntimeError, match="watched"):
        evaluate_small(tmp_path, stall_seconds=600)


def test_images_that_need_no_attack_are_told_as_they_are_classified(tmp_path):
    """Else a long stretch of them is neither stored nor seen by the watchdog."""
    data, seen = dataset(200), []
    wrong = data._replace(labels=((data.labels + 2) % CLASSES).astype(np.int32))
    evaluate(dataclasses.replace(PLAN, attacks=PLAN.attacks[:1]), tmp_path, model=model(), data=wrong,
             force=True, on_progress=lambda progress: seen.append(progress.done))
    assert seen[-1] == 200 and len({done for done in seen if 0 < done < 200}) >= 2


def test_random_search_evaluates_a_model_without_derivatives(tmp_path):
    apply_fn, params = model()

    def looped(params, x):
        return jax.lax.while_loop(lambda c: c[0] < 1, lambda c: (c[0] + 1, apply_fn(params, x)),
                                  (0, jnp.zeros((len(x), 5), x.dtype)))[1]

    search = AttackPlan(method="sparse_rs", settings={"num_pixels": 8, "max_queries": 10, "num_restarts": 1})
    run = evaluate(Plan(attacks=(search,)), tmp_path / "run", model=(looped, params), data=dataset(12))
    assert run.complete and any(record["status"] == "found" for record in run.records)
    assert [f["severity"] for f in run.manifest["findings"] if f["name"] == "gradients"] == ["warning"]
    with pytest.raises(ValueError, match="cannot be differentiated"):
        evaluate(Plan(attacks=(search, AttackPlan())), tmp_path / "both", model=(looped, params), data=dataset(12))
