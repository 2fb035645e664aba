"""Success curves and the targeted protocol against loops."""

import jax
import numpy as np
import pytest

from gse_jax import metrics


def test_success_at_k_equals_a_loop():
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 30, 40).astype(np.int32)
    success, attacked = rng.random(40) < 0.7, rng.random(40) < 0.8
    budgets = np.array([0, 3, 3, 29, 10, 1000], np.int32)
    every, some = [], []
    for budget in budgets:
        inside = [bool(s) and c <= budget for s, c in zip(success, counts, strict=True)]
        every.append(sum(inside) / 40)
        some.append(sum(i and a for i, a in zip(inside, attacked, strict=True)) / sum(attacked))
    np.testing.assert_allclose(metrics.success_at_k(counts, success, budgets), every, rtol=1e-6)
    got = jax.jit(metrics.success_at_k)(counts, success, budgets, attacked=attacked)
    np.testing.assert_allclose(got, some, rtol=1e-6)
    assert every != some


def test_success_at_k_for_pixels_and_patches():
    x = np.zeros((3, 12, 12, 3), np.float32)
    adversarials = x.copy()
    adversarials[0, 6, 6], adversarials[1, 2:9, 2:9] = 1, 1  # 1 pixel, 49 pixels, a failure.
    success = np.array([True, True, False])
    pixels = metrics.changed_pixels(x, adversarials)
    np.testing.assert_allclose(
        metrics.success_at_k(pixels, success, [0, 1, 48, 49]), [0, 1 / 3, 1 / 3, 2 / 3], rtol=1e-6
    )
    patches = metrics.patch_count(x, adversarials, patch_size=4)
    np.testing.assert_array_equal(patches, [16, 81, 0])
    np.testing.assert_allclose(
        metrics.success_at_k(patches, success, [15, 16, 80, 81]), [0, 1 / 3, 1 / 3, 2 / 3],
        rtol=1e-6,
    )


def test_success_at_k_of_nothing_is_zero_not_nan():
    none = np.zeros(0, np.int32)
    assert metrics.success_at_k(none, none.astype(bool), [1, 2]).tolist() == [0, 0]
    unattacked = metrics.success_at_k([1], [True], [5], attacked=[False])
    assert unattacked.tolist() == [0]
    with pytest.raises(ValueError, match="one entry per image"):
        metrics.success_at_k([1, 2], [True], [5])
    with pytest.raises(ValueError, match="vectors"):
        metrics.success_at_k([1], [True], 5)


def loop_protocol(values, found, attacked):
    """Success values and number of cases of (best, average, worst), image by image."""
    samples, totals = ([], [], []), [0, 0, 0]
    for image in range(values.shape[1]):
        targets = [t for t in range(values.shape[0]) if attacked[t, image]]
        reached = [float(values[t, image]) for t in targets if found[t, image]]
        totals[1] += len(targets)
        samples[1].extend(reached)
        if not targets:
            continue
        totals[0] += 1
        totals[2] += 1
        if reached:
            samples[0].append(min(reached))
        if len(reached) == len(targets):
            samples[2].append(max(reached))
    return samples, totals


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9, 1.0])
def test_targeted_protocol_equals_a_loop(rate):
    rng = np.random.default_rng(int(rate * 10))
    values = rng.uniform(1, 50, (5, 30))
    attacked = rng.random((5, 30)) < 0.8
    attacked[:, 4] = False  # An image that has every target already.
    found = (rng.random((5, 30)) < rate) & attacked
    values[~found] = np.nan  # Whatever a failure leaves there must not matter.
    protocol = metrics.targeted_protocol(values, found, attacked=attacked)
    samples, totals = loop_protocol(values, found, attacked)
    for case, sample, total in zip(protocol, samples, totals, strict=True):
        assert case.total == total
        assert case.failures == total - len(sample)
        assert case.success_rate == len(sample) / total
        assert case.metric.count == len(sample)
        if sample:
            np.testing.assert_allclose(case.metric.mean, sum(sample) / len(sample))
            np.testing.assert_allclose(case.metric.median, np.median(sample))
        else:
            assert case.metric == (None, None, None, 0)


def test_failures_are_not_averaged_in_as_zeros():
    values = np.array([[10.0, 0.0], [20.0, 0.0]])
    found = np.array([[True, False], [True, False]])
    protocol = metrics.targeted_protocol(values, found)
    assert protocol.average.metric.mean == 15.0
    assert (protocol.average.failures, protocol.average.total) == (2, 4)
    assert (protocol.best.metric.mean, protocol.best.failures) == (10.0, 1)
    assert (protocol.worst.metric.mean, protocol.worst.failures) == (20.0, 1)


def test_targeted_protocol_of_nothing():
    for shape in ((3, 0), (0, 3), (0, 0)):
        protocol = metrics.targeted_protocol(np.zeros(shape), np.zeros(shape, bool))
        for case in protocol:
            assert case == ((None, None, None, 0), 0, 0, None)


def test_targeted_protocol_refuses_what_does_not_fit():
    values, found = np.zeros((2, 3)), np.ones((2, 3), bool)
    with pytest.raises(ValueError, match="one shape"):
        metrics.targeted_protocol(values, found[:1])
    with pytest.raises(ValueError, match="not attacked"):
        metrics.targeted_protocol(values, found, attacked=~found)
    with pytest.raises(ValueError, match="NaN"):
        metrics.targeted_protocol(values * np.nan, found)


def test_targets_of_an_image_are_one_draw():
    """Nine targets that all say the same tell no more than one of them."""
    rng = np.random.default_rng(0)
    one = rng.uniform(1, 9, 10)
    protocol = metrics.targeted_protocol(np.tile(one, (9, 1)), np.ones((9, 10), bool))
    np.testing.assert_allclose(protocol.average.metric.standard_error,
                               metrics.describe(one).standard_error)
    # By hand: two images, values 1 and 3 of the first, 5 of the second; mean 3.
    error = metrics.describe([1.0, 3.0, 5.0], [0, 0, 1]).standard_error
    np.testing.assert_allclose(error, np.sqrt(2.0 * (2.0**2 + 2.0**2)) / 3.0)
    assert metrics.describe([1.0, 3.0], [7, 7]).standard_error is None


def test_describe():
    statistic = metrics.describe([1, 2, 3, 10])
    assert (statistic.mean, statistic.median, statistic.count) == (4.0, 2.5, 4)
    # Deviations -3, -2, -1, 6: variance 50 / 3, divided by n = 4.
    np.testing.assert_allclose(statistic.standard_error, np.sqrt(50 / 12))
    assert metrics.describe([5.0]) == (5.0, 5.0, None, 1)
    assert metrics.describe([]) == (None, None, None, 0)
    with pytest.raises(ValueError, match="NaN"):
        metrics.describe([1.0, np.nan])
