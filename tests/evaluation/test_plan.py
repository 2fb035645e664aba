"""Plan files and the cases they come to."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from gse_jax.evaluation import AttackPlan, Plan, load_plan
from gse_jax.evaluation.cases import resolve
from gse_jax.evaluation.job import load_model
from gse_jax.models import NORMALIZATIONS

TOML = """
data = "digits"
model = "resnet20"
weights = "digits"
bounds = [0.0, 1.0]
normalize = [0.5, [0.5, 0.5, 0.5]]
limit = 7
[[attacks]]
[[attacks]]
name = "few"
offsets = [1, 3]
settings = { num_runs = 2 }
hyperparams = { mu = 2 }
"""
EXPECTED = Plan(data="digits", model="resnet20", weights="digits", limit=7,
                normalize=(0.5, (0.5, 0.5, 0.5)),
                attacks=(AttackPlan(), AttackPlan(name="few", offsets=(1, 3),
                                                  settings={"num_runs": 2},
                                                  hyperparams={"mu": 2})))


def test_what_python_users_write_becomes_what_a_manifest_holds():
    plan = Plan(weights=Path("net.safetensors"), bounds=np.asarray([0.0, 1.0]),
                attacks=(AttackPlan(offsets=range(1, 4)), AttackPlan(name="b", offsets={5, 4})))
    assert plan.weights == "net.safetensors" and plan.bounds == (0.0, 1.0)
    assert [attack.offsets for attack in plan.attacks] == [(1, 2, 3), (4, 5)]
    assert Plan.from_dict(plan.to_dict()) == plan


def test_toml_json_and_python_say_the_same(tmp_path):
    (tmp_path / "plan.toml").write_text(TOML)
    assert load_plan(tmp_path / "plan.toml") == EXPECTED
    (tmp_path / "plan.json").write_text(json.dumps(EXPECTED.to_dict()))
    assert load_plan(tmp_path / "plan.json") == EXPECTED
    assert Plan.from_dict({}) == Plan()


@pytest.mark.parametrize(("text", "message"), [
    ("dat = 1", "dat is unknown; use one of data, model"),
    ("limit = 'ten'", "limit must be an integer of at least 1, got 'ten'"),
    ("seed = true", "seed must be an integer, got True"),
    ("seed = 4294967296", "seed must be from 0 to"),
    ("[[attacks]]\nhyperparams = { mu = 1" + 400 * "0" + " }", "hyperparams.mu must be a finite number"),
    ("normalize = 'imagnet'", "normalize = 'imagnet' is unknown; use half, imagenet, none or"),
    ("normalize = 0.5", r"normalize must be half, imagenet, none or \[mean, std\], got 0.5"),
    ("attacks = 3", "attacks must be a list of tables"),
    ("attacks = []", "attacks is empty"),
    ("[[attacks]]\nstep = 1", r"attacks\[0\].step is unknown"),
    ("[[attacks]]\noffsets = [0]", "integers of at least 1, got 0"),
    ("[[attacks]]\noffsets = [2, 2]", "name one twice"),
    ("[[attacks]]\noffsets = [2]\ntarget_file = 'f'", "expected one of them"),
    ("[[attacks]]\nhyperparams = { mu = 'x' }", "hyperparams.mu must be a finite number"),
    ("a = ", "cannot be read as toml"),
])
def test_mistakes_are_told_in_one_line(tmp_path, text, message):
    (tmp_path / "plan.toml").write_text(text)
    with pytest.raises((TypeError, ValueError), match=message) as error:
        load_plan(tmp_path / "plan.toml")
    assert str(error.value).startswith("plan: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["half", "imagenet", "none"])
def test_normalization_by_name_is_that_of_the_numbers(tmp_path, name):
    (tmp_path / "plan.toml").write_text(
        f'model = "resnet20"\nweights = "digits"\nnormalize = "{name}"')
    plan = load_plan(tmp_path / "plan.toml")
    assert plan.normalize == name and Plan.from_dict(plan.to_dict()) == plan
    by_name, _ = load_model(plan, None)
    by_numbers, _ = load_model(dataclasses.replace(plan, normalize=NORMALIZATIONS[name]), None)
    assert by_name == by_numbers  # architecture and normalisation


def test_files_that_are_no_plans(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        load_plan(tmp_path / "absent.toml")
    (tmp_path / "plan.yaml").write_text("")
    with pytest.raises(ValueError, match=r"must end with .toml or .json"):
        load_plan(tmp_path / "plan.yaml")
    (tmp_path / "plan.json").write_text("[]")
    with pytest.raises(TypeError, match="must hold one object"):
        load_plan(tmp_path / "plan.json")


def cases_of(*attacks, ids=("a", "b"), num_classes=10):
    return resolve(Plan(attacks=attacks), (32, 32, 3), num_classes, ids)


def test_presets_follow_size_and_direction_and_changes_are_applied():
    first, second = cases_of(AttackPlan(), EXPECTED.attacks[1])
    assert [case.name for case in first.cases] == ["gse/untargeted"]
    assert [case.name for case in second.cases] == ["few/targeted+1", "few/targeted+3"]
    assert (first.settings.phase1_steps, second.settings.phase1_steps) == (30, 50)
    assert (first.settings.num_runs, second.settings.num_runs) == (10, 2)
    assert (first.hyperparams.mu, second.hyperparams.mu) == (1.0, 2.0)
    large = resolve(Plan(), (224, 224, 3), 10, ("a",))[0]
    assert large.preset == "imagenet" and large.settings.phase1_steps == 50
    robust = cases_of(AttackPlan(preset="imagenet_robust"))[0]
    assert robust.settings.phase1_steps == 150
    assert second.cases[1].target("a", 8, 10) == 1
    assert first.cases[0].target("a", 8, 10) == -1


def test_lists_in_lists_become_tuples():
    settings = {"structure": "patch", "pattern": [[1, 1], [1, 1]], "num_pixels": 8}
    plan = Plan.from_dict({"attacks": [{"method": "sparse_pgd", "settings": settings}]})
    (group,) = resolve(plan, (32, 32, 3), 10, ("a",))
    assert group.settings.pattern == ((1, 1), (1, 1))


@pytest.mark.parametrize(("attack", "message"), [
    (AttackPlan(method="gsee"), "method='gsee' is unknown"),
    (AttackPlan(settings={"runs": 1}), "settings.runs is unknown to method 'gse'; use one of"),
    (AttackPlan(hyperparams={"m": 1}), "hyperparams.m is unknown to method 'gse'"),
    (AttackPlan(settings={"num_runs": 0}), "num_runs=0 must be >= 1"),
    (AttackPlan(offsets=(1, 20)), "offset 20 makes the target the label itself"),
    (AttackPlan(offsets=(1, 11)), "aim twice at the same of 10 classes"),
    (AttackPlan(preset="mnist"), "domain='mnist' has no preset"),
])
def test_attacks_that_cannot_run_are_refused(attack, message):
    with pytest.raises(ValueError, match=message):
        cases_of(attack)


@pytest.mark.parametrize(("fields", "message"), [
    (dict(attacks="gse"), "attacks must be a tuple of AttackPlan, got 'gse'"),
    (dict(attacks=({"method": "gse"},)), "attacks must be a tuple of AttackPlan"),
    (dict(attacks=AttackPlan()), "attacks must be a tuple of AttackPlan"),
    (dict(attacks=(AttackPlan(offsets=1),)), "offsets must be a tuple of integers, got 1"),
])
def test_attacks_of_another_type_are_refused(fields, message):
    with pytest.raises(TypeError, match=message):
        Plan(**fields)


def test_two_attacks_need_two_names():
    with pytest.raises(ValueError, match="two attacks give the case 'gse/untargeted'; set `name`"):
        cases_of(AttackPlan(), AttackPlan(settings={"num_runs": 2}))
    assert len(cases_of(AttackPlan(), AttackPlan(name="b"))) == 2


def test_target_files(tmp_path):
    np.save(tmp_path / "t.npy", np.asarray([4, 5]))
    (tmp_path / "t.json").write_text('{"a": 4, "b": 5, "more": 1}')
    (tmp_path / "t.csv").write_text("sample_id,target\na,4\nb,5\n")
    for name in ("t.npy", "t.json", "t.csv"):
        (group,) = cases_of(AttackPlan(target_file=str(tmp_path / name)))
        (case,) = group.cases
        assert group.targeted and case.name == "gse/targeted_file"
        assert (case.target("a", 0, 10), case.target("b", 0, 10)) == (4, 5)
        with pytest.raises(ValueError, match=r"sample 'a' \(label 4\) the target 4"):
            case.target("a", 4, 10)
        with pytest.raises(ValueError, match="no target for sample 'c'"):
            case.target("c", 0, 10)
        with pytest.raises(ValueError, match=r"the target 4, expected another class in \[0, 3\]"):
            case.target("a", 0, 4)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("t.json", "[1]", "t.json"), ("t.json", '{"a": "x"}', "invalid literal"),
    ("t.json", '{"a": 3.9}', "the target 3.9, expected an integer"), ("t.npy", "", "t.npy"),
    ("t.json", '{"a": 1e999}', "expected an integer"), ("t.json", '{"a": true}', "expected an integer"),
    ("t.npy", "PK\x03\x04", "t.npy"),
    ("t.csv", "id,target\na,1,2\n", "too many values"), ("t.txt", "", "must end with")])
def test_bad_target_files_are_told(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        cases_of(AttackPlan(target_file=str(tmp_path / name)))
    np.save(tmp_path / "t.npy", np.zeros(5, int))
    with pytest.raises(ValueError, match=r"int64 \[5\], expected integers \[2\]"):
        cases_of(AttackPlan(target_file=str(tmp_path / "t.npy")))
    with pytest.raises(FileNotFoundError):
        cases_of(AttackPlan(target_file=str(tmp_path / "absent.csv")))
