"""The rows that no other row beats."""

import numpy as np
import pytest

from gse_jax import metrics


def test_pareto_set_keeps_what_nothing_dominates():
    numbers = [[1, 5], [2, 2], [3, 3], [2, 2], [2, 3], [np.nan, 0], [0, 0]]
    np.testing.assert_array_equal(
        metrics.pareto_set(numbers, [True] * 6 + [False]),
        [True, True, False, True, False, False, False])


def test_no_table_is_refused():
    with pytest.raises(ValueError, match=r"numbers must be \[G, M\].*got shape \[3\]"):
        metrics.pareto_set(np.ones(3))
    with pytest.raises(ValueError, match=r"eligible must have shape \[2\]"):
        metrics.pareto_set(np.ones((2, 2)), [True])
