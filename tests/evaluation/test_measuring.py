"""Records are judged by a fresh forward pass, whatever the attack says."""

import math

import numpy as np
import pytest

from gse_jax.attacks.algorithm import Outcome
from gse_jax.evaluation.cases import Case
from gse_jax.evaluation.forward import Forward
from gse_jax.evaluation.measuring import Attacked, Task, measured, settled
from gse_jax.evaluation.sources import Read
from gse_jax.types import Status
from tests.evaluation.small_run import dataset, model

BOUNDS = (0.0, 1.0)
APPLY, PARAMS = model()
DATA = dataset()
LABEL = int(DATA.labels[1])


def another_class(label):
    """An image of the data that the model puts into another class."""
    return next(x for x, y in zip(DATA.images[1:10], DATA.labels[1:10]) if y != label)


def judge(adversarial, status=Status.FOUND, target=-1):
    task = Task(Case("gse/untargeted", 0, None), "gse", Read(1, "s1", DATA.images[1], LABEL, None),
                target, LABEL, 0.5)
    outcome = Outcome(adversarial, status == Status.FOUND, np.int32(status), np.int32(7),
                      np.int32(9), np.float64(0.25))
    (finished,) = measured([Attacked(task, outcome)],
                           Forward(PARAMS, APPLY, adversarial.shape), BOUNDS)
    return finished.record


def test_a_true_success_is_measured():
    image = another_class(LABEL)
    record = judge(image)
    assert (record["status"], record["success"], record["reason"]) == ("found", True, None)
    assert record["prediction"] not in (LABEL, None)
    assert (record["gradient_evals"], record["forward_evals"], record["tradeoff"]) == (7, 9, 0.25)
    assert record["changed_pixels"] == 64 and record["num_clusters"] == record["patch_count"] == 1  # 8 x 8 patches
    np.testing.assert_allclose(record["l2"], 2 * np.linalg.norm(image - DATA.images[1]))


def test_a_success_that_the_model_does_not_confirm_is_none():
    record = judge(DATA.images[1])
    assert (record["status"], record["success"]) == ("not_found", False)
    assert "does not confirm" in record["reason"]
    assert record["changed_pixels"] is None and record["prediction"] == LABEL
    image = another_class(LABEL)
    wrong = next(k for k in range(5) if k not in (LABEL, judge(image)["prediction"]))
    assert judge(image, target=wrong)["status"] == "not_found"
    assert judge(image, target=judge(image)["prediction"])["status"] == "found"


@pytest.mark.parametrize("value", [1.0 + 1e-9, -1e-9, np.nan])
def test_a_success_outside_the_bounds_is_none(value):
    image = another_class(LABEL).copy()
    image[0, 0, 0] = value
    record = judge(image)
    assert (record["status"], record["success"]) == ("not_found", False)
    assert "bounds" in record["reason"]


def test_other_outcomes():
    assert judge(DATA.images[1], Status.NOT_FOUND)["reason"] is None
    assert judge(DATA.images[1], Status.NON_FINITE)["status"] == "non_finite"
    record = judge(DATA.images[1], Status.ALREADY_MISCLASSIFIED)
    assert record["status"] == "not_found" and "depends on the batch size" in record["reason"]


def test_settled_records_hold_no_nan():
    task = Task(Case("c", 0, None), "gse", Read(1, "s1", None, -1, "torn"), -1, -1, math.nan)
    record = settled(task, "quarantined", "torn").record
    assert record["confidence_before"] is record["prediction"] is None
    assert (record["status"], record["reason"], record["success"]) == ("quarantined", "torn", False)


@pytest.mark.parametrize("target, prediction, success", [(-1, 3, True), (2, 3, False), (2, 2, True)])
def test_a_misclassified_image_is_a_success_where_its_class_is_the_wanted_one(target, prediction, success):
    task = Task(Case("c", 0, None), "gse", Read(1, "s1", DATA.images[1], LABEL, None), target, prediction, 0.5)
    assert settled(task, "already_misclassified").record["success"] is success


def test_a_batch_is_measured_like_single_images():
    rng = np.random.default_rng(0)
    tasks = []
    for i in range(1, 10):
        image = np.where(rng.random(DATA.images[i].shape) < 0.2, 0.5, DATA.images[i])
        task = Task(Case("c", 0, None), "gse", Read(i, f"s{i}", DATA.images[i],
                                                    int(DATA.labels[i]), None), -1, 0, 0.5)
        tasks.append(Attacked(task, Outcome(image, True, np.int32(0), np.int32(1), np.int32(1),
                                            np.float64(0))))
    classify = Forward(PARAMS, APPLY, DATA.images.shape[1:])
    classify.batch = 4  # 4, 4 and 1 of 9.
    together = [f.record for f in measured(tasks, classify, BOUNDS)]
    assert any(record["success"] for record in together)
    for record, one in zip(together, tasks, strict=True):
        (alone,) = measured([one], classify, BOUNDS)
        assert alone.record == record
