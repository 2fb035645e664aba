"""The summary of one attack: averages over successes, both denominators, no NaN."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from gse_jax import metrics
from gse_jax.types import AttackResult, Status


def make_result():
    """Two found, one failed, one misclassified from the start, one non-finite."""
    x = np.full((5, 10, 10, 3), 0.5, np.float32)
    adversarials = x.copy()
    adversarials[0, 0, 0, 0] = 1.0  # 1 pixel, 1 cluster, 1 patch; l2 is 1 in [-1, 1] units.
    adversarials[1, 4, 4:8, 1], adversarials[1, 9, 0, 1] = 0.0, 0.0  # 5 pixels, 2 clusters.
    result = AttackResult(
        adversarials=adversarials,
        success=np.array([True, True, False, True, False]),
        status=np.array([0, 0, 1, 2, 3], np.int32),
        gradient_evals=np.array([10, 20, 90, 1, 4], np.int32),
        forward_evals=np.array([11, 21, 91, 1, 4], np.int32),
        tradeoff=np.zeros(5, np.float32),
    )
    return x, result


def test_summary_by_hand():
    x, result = make_result()
    got = metrics.summary(x, result, bounds=(0.0, 1.0), patch_size=8)
    assert (got.num_images, got.num_attacked, got.num_found, got.num_non_finite) == (5, 4, 2, 1)
    assert (got.asr_all, got.asr_attacked) == (3 / 5, 2 / 4)
    np.testing.assert_allclose(got.asr_all_error, np.sqrt(0.6 * 0.4 / 5))
    np.testing.assert_allclose(got.asr_attacked_error, np.sqrt(0.25 / 4))
    # Statistic: mean, median, standard error (|a - b| / 2 for two values), count.
    assert got.changed_pixels == (3.0, 3.0, 2.0, 2)
    assert got.num_clusters == (1.5, 1.5, 0.5, 2)
    # Pixels (4, 4:8) meet all 9 patches of the 10 x 10 image; pixel (0, 0) meets one.
    assert got.patch_count == (5.0, 5.0, 4.0, 2)
    np.testing.assert_allclose(got.l2.mean, (1 + np.sqrt(5)) / 2, rtol=1e-6)
    assert (got.gradient_evals.mean, got.gradient_evals.count) == (31.0, 4)
    assert got.forward_evals.mean == 127 / 4


def test_failures_do_not_change_the_averages():
    x, result = make_result()
    both = metrics.summary(x, result)
    found = SimpleNamespace(**{
        name: getattr(result, name)[:2]
        for name in ("adversarials", "success", "status", "gradient_evals", "forward_evals")
    })
    alone = metrics.summary(x[:2], found)
    assert alone.asr_attacked == 1.0 != both.asr_attacked
    for name in ("changed_pixels", "num_clusters", "l2", "patch_count"):
        assert getattr(both, name) == getattr(alone, name)


def test_nothing_found_and_no_images_give_none_not_nan():
    x, result = make_result()
    for chosen in (slice(2, 5), slice(0, 0), slice(3, 4)):
        part = SimpleNamespace(**{
            name: getattr(result, name)[chosen]
            for name in ("adversarials", "success", "status", "gradient_evals", "forward_evals")
        })
        got = metrics.summary(x[chosen], part)
        assert got.changed_pixels == got.l2 == (None, None, None, 0)
        assert "NaN" not in json.dumps(got.to_dict())
    assert metrics.summary(x[:0], SimpleNamespace(**{
        name: getattr(result, name)[:0]
        for name in ("adversarials", "success", "status", "gradient_evals", "forward_evals")
    })).asr_all is None


def test_non_finite_adversarial_is_a_failure():
    x, result = make_result()
    result.adversarials[0, 0, 0, 0] = np.nan
    got = metrics.summary(x, result)
    assert (got.num_found, got.num_non_finite, got.asr_attacked) == (1, 2, 1 / 4)
    assert got.changed_pixels == (5.0, 5.0, None, 1)
    assert got.asr_all == 2 / 5
    result.adversarials[4, 0, 0, 0] = np.inf  # of the image with status NON_FINITE: counted once
    assert metrics.summary(x, result).num_non_finite == 2


def test_what_float32_can_hold_is_finite():
    x = np.full((1, 8, 8, 1), 1e5)
    assert metrics.image_metrics(x, x, bounds=(0.0, 2e5)).finite.all()


def test_image_metrics_do_not_depend_on_the_chunk(monkeypatch):
    rng = np.random.default_rng(0)
    x = rng.random((11, 9, 9, 3), np.float32)
    adversarials = np.where(rng.random(x.shape) < 0.05, 0, x).astype(np.float32)
    whole = metrics.image_metrics(x, adversarials)
    monkeypatch.setattr("gse_jax.metrics.aggregate._CHUNK", 4)
    parts = metrics.image_metrics(x, adversarials)
    for name in whole._fields:
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))
    np.testing.assert_array_equal(whole.changed_pixels, metrics.changed_pixels(x, adversarials))
    np.testing.assert_array_equal(whole.num_clusters, metrics.num_clusters(x, adversarials))
    np.testing.assert_allclose(whole.l2, 2 * metrics.l2_norm(x, adversarials), rtol=1e-6)


def test_more_of_one_than_of_the_other_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        metrics.image_metrics(np.zeros((2, 8, 8, 1), "f4"), np.zeros((3, 8, 8, 1), "f4"))


def test_result_that_contradicts_itself_is_refused():
    x, result = make_result()
    result.success[0] = False
    with pytest.raises(ValueError, match="FOUND but success"):
        metrics.summary(x, result)
    x, result = make_result()
    with pytest.raises(ValueError, match="one shape"):
        metrics.summary(x[:3], result)
    with pytest.raises(ValueError, match="one entry per image"):
        metrics.summarise(metrics.image_metrics(x[:3], x[:3]), result)
    with pytest.raises(ValueError, match="patch_size"):
        metrics.summary(x, result, patch_size=11)
    assert Status.FOUND == 0


def test_a_summary_refuses_images_outside_its_bounds():
    """Their l2 would be in other units."""
    x = np.linspace(-1, 1, 2 * 8 * 8 * 3, dtype="f4").reshape(2, 8, 8, 3)
    zero = np.zeros(2, np.int32)
    result = SimpleNamespace(adversarials=0.9 * x, success=zero == 0, status=zero, gradient_evals=zero, forward_evals=zero)
    with pytest.raises(ValueError, match=r"values from -1 to 1, outside bounds=\(0, 1\); pass the bounds"):
        metrics.summary(x, result)
    assert metrics.summary(x, result, bounds=(-1.0, 1.0)).num_found == 2
    for highest, refused in ((1.001, False), (1.003, True)):  # rounding is a thousandth of the range
        x[1, 7, 7, 2] = highest
        if refused:
            with pytest.raises(ValueError, match="outside bounds"):
                metrics.summary(x, result, bounds=(-1.0, 1.0))
        else:
            metrics.summary(x, result, bounds=(-1.0, 1.0))
    x[1, 7, 7, 2] = 1.0
    x[0, 0, 0] = np.nan, np.inf, -np.inf  # are told in other words
    assert metrics.summary(x, result, bounds=(-1.0, 1.0)).num_non_finite == 1
    with pytest.raises(ValueError, match="values from -0.98.* to 1, outside"):  # and hide nothing
        metrics.summary(x, result, bounds=(-1.0, 0.5))


def test_a_result_and_its_images_are_not_confused():
    x = np.zeros((2, 8, 8, 1), np.float32)
    zero = np.zeros(2, np.int32)
    result = AttackResult(x, zero > 0, zero, zero, zero, zero.astype(np.float32))
    with pytest.raises(TypeError, match="pass result.adversarials"):
        metrics.changed_pixels(x, result)
    with pytest.raises(TypeError, match="result must be what gse_jax.attack returned, got ndarray"):
        metrics.summary(x, x)
    for bounds in (1, "ab", (0.0, np.inf), (1.0, 0.0)):
        with pytest.raises(ValueError, match="bounds must be"):
            metrics.l2_norm(x, x, bounds=bounds)
