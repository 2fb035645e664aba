"""The rows that no other row beats."""

import numpy as np

from gse_jax import metrics


def test_pareto_set_keeps_what_nothing_dominates():
    numbers = [[1, 5], [2, 2], [3, 3], [2, 2], [np.nan, 0], [0, 0]]
    np.testing.assert_array_equal(
        metrics.pareto_set(numbers, [True] * 5 + [False]),
        [True, True, False, True, False, False])
