"""Which of several attacks no other one beats in every number.

References:
    arXiv 2311.17434, section 4 (ACP, ANC, l2, d_{2,0}: no single number ranks sparse attacks).
"""

import numpy as np


def pareto_set(numbers, eligible=None) -> np.ndarray:
    """Mark the rows that no other row dominates; all columns are to be small.

    Args:
        numbers: [G, M]; a row with NaN is never marked.
        eligible: [G] bool, rows that take part; None for all.

    Returns:
        [G] bool. A row is dominated if another one is nowhere larger and somewhere smaller; equal
        rows do not dominate each other.

    Raises:
        ValueError: if `numbers` is no table, or `eligible` has another length.
    """
    numbers = np.asarray(numbers, float)
    if numbers.ndim != 2:
        raise ValueError(f"numbers must be [G, M], one row for each point, got shape {list(numbers.shape)}")
    eligible = np.ones(len(numbers), bool) if eligible is None else np.asarray(eligible, bool)
    if eligible.shape != (len(numbers),):
        raise ValueError(f"eligible must have shape [{len(numbers)}], one for each point, got {list(eligible.shape)}")
    eligible = eligible & ~np.isnan(numbers).any(1)
    nowhere_larger = (numbers[:, None] <= numbers[None]).all(-1)
    somewhere_smaller = (numbers[:, None] < numbers[None]).any(-1)
    dominates = nowhere_larger & somewhere_smaller & eligible[:, None]
    return eligible & ~dominates.any(0)
