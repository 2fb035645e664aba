"""Many attacks on the same images, and the table of them."""

import csv
import sys

import numpy as np
import pytest

import gse_jax
from gse_jax import metrics, report
from gse_jax.evaluation import AttackPlan, Plan, compare, pareto
from gse_jax.evaluation.cases import resolve
from gse_jax.evaluation.comparison import configurations_of
from tests.toy_model import toy

METHODS = ("pgd", "pgd0")


def misclassified(y):
    """The labels of the toy images, of which one is wrong and so not attacked."""
    return np.where(np.arange(6) == 1, (y + 3) % 5, y)


@pytest.fixture(scope="module")
def untargeted():
    params, apply_fn, x, y = toy()
    return list(compare(params, apply_fn, x, misclassified(y), methods=METHODS, bounds=(-1.0, 1.0),
                        budgets=(50, 100, 400)))


def test_rows_say_what_the_runs_say(untargeted):
    assert [one.method for one in untargeted] == list(METHODS)
    for one in untargeted:
        (row,), (run,) = one.rows, one.runs
        found, attacked = run.status == 0, np.arange(6) != 1
        assert row["ASR"] == found[attacked].mean() and row["attacked"] == 5
        assert row["s/image"] == run.about["seconds"] / 5
        pixels = np.asarray(metrics.changed_pixels(run.x, run.adversarials))
        np.testing.assert_allclose(row["ACP"], pixels[found].mean())
        np.testing.assert_allclose(row["gradients"], run.gradient_evals[attacked].mean())
        for k in (50, 100, 400):
            np.testing.assert_allclose(row[f"ASR@{k}"], (found & (pixels <= k))[attacked].mean())


def test_the_table_is_written_in_three_forms(untargeted, tmp_path):
    rows = [row for one in untargeted for row in one.rows]
    paths = report.write_table(rows, tmp_path / "table")
    assert [p.suffix for p in paths] == [".csv", ".md", ".tex"]
    with open(paths[0], encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert [r["attack"] for r in read] == list(METHODS)
    assert float(read[0]["ACP"]) == rows[0]["ACP"]
    assert paths[1].read_text().count("\n") == 2 + len(METHODS)
    assert "\\toprule" in paths[2].read_text()


def test_targeted_gives_best_average_and_worst():
    params, apply_fn, x, y = toy()
    y = misclassified(y)
    (one,) = compare(params, apply_fn, x, y, methods=("pgd",), offsets=(1, 4), num_classes=5, bounds=(-1.0, 1.0))
    assert [row["over targets"] for row in one.rows] == ["best", "average", "worst"]
    assert len(one.runs) == 2 and [row["attacked"] for row in one.rows] == [5, 10, 5]
    for run, offset in zip(one.runs, (1, 4), strict=True):
        np.testing.assert_array_equal(run.targets, (y + offset) % 5)
    for name, of in (("gradients", lambda run: run.gradient_evals.sum()),
                     ("forwards", lambda run: run.forward_evals.sum()), ("s/image", lambda run: run.about["seconds"])):
        np.testing.assert_allclose([row[name] for row in one.rows], sum(map(of, one.runs)) / 10)
    values = np.stack([np.asarray(metrics.l2_norm(r.x, r.adversarials)) for r in one.runs])
    found = np.stack([r.status == 0 for r in one.runs])
    if found.any():
        best = np.where(found, values, np.inf).min(0)
        np.testing.assert_allclose(one.rows[0]["l2"], best[np.isfinite(best)].mean())


@pytest.mark.parametrize("offsets", [(1, 5), (1, 6), (0,)])
def test_offsets_that_hit_the_label_or_a_class_twice_end_it_before_anything_runs(offsets):
    params, apply_fn, x, y = toy()
    ran = []
    with pytest.raises(ValueError, match="must differ modulo 5 classes"):
        list(compare(params, apply_fn, x, np.asarray(y), methods=("pgd",), offsets=offsets,
                     num_classes=5, bounds=(-1.0, 1.0), progress=ran.append))
    assert not ran


def test_an_unknown_method_ends_it_before_anything_runs():
    params, apply_fn, x, y = toy()
    with pytest.raises(ValueError, match="gze"):
        next(compare(params, apply_fn, x, np.asarray(y), methods=("gse", "gze")))


@pytest.mark.parametrize("side, domain", [(32, "cifar10"), (224, "imagenet")])
def test_the_settings_are_those_of_the_image_size(side, domain):
    methods = "gse", "gse_refined", "sparse_rs", "fwnucl", "strattack"
    expected = {method: gse_jax.preset(method, domain, True) for method in methods}
    for name in (None, "gse_paper"):
        assert configurations_of(methods, name, (side, side, 3), True) == expected
    original = configurations_of(methods, "original", (side, side, 3), True)
    assert original["sparse_rs"] == gse_jax.preset("sparse_rs", "original", True)
    assert original["gse"] == expected["gse"]  # it has no other
    with pytest.raises(ValueError, match="domain='orignal' is unknown; use one of .*'original'"):
        configurations_of(methods, "orignal", (side, side, 3), True)


def test_an_attack_that_cannot_take_such_images_ends_it_before_anything_runs():
    x, ran = np.zeros((1, 8, 8, 1), np.float32), []
    with pytest.raises(ValueError, match="settings.num_pixels=90 must lie in"):
        pareto(None, lambda _, x: x[:, 0, :2, 0], x, np.zeros(1, int), methods=("pgd", "pgd0"), progress=ran.append)
    assert not ran


def test_without_scikit_image_it_ends_before_anything_runs(monkeypatch):
    params, apply_fn, x, y = toy()
    monkeypatch.setitem(sys.modules, "skimage.segmentation", None)
    ran = []
    for call in (lambda **o: list(compare(params, apply_fn, x, np.asarray(y), **o)),
                 lambda **o: pareto(params, apply_fn, x, np.asarray(y), **o)):
        with pytest.raises(ImportError, match="baselines"):
            call(methods=("pgd", "sapf"), bounds=(-1.0, 1.0), progress=ran.append)
    assert not ran
    # A plan too, whose other attacks would else run for a night first.
    with pytest.raises(ImportError, match="baselines"):
        resolve(Plan(attacks=(AttackPlan(), AttackPlan(method="sapf"))), (32, 32, 3), 10, ["a"])
