"""Scikit-learn's handwritten digits: real images that come with a package, so nothing to download.

The 8x8 originals (values 0 to 16) are enlarged four times, nearest neighbour, and repeated to three
channels, so that networks for 32x32x3 images take them.

References:
  Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
  Repository, 1998, https://doi.org/10.24432/C50P49 (its test part is what scikit-learn ships).
"""

import numpy as np

from gse_jax.data.dataset import Dataset, checked_dataset

_TEST_SIZE = 360
_SPLIT_SEED = 0
_ENLARGEMENT = 4


def open_files(rest: str, *, limit: int | None, data_dir: str | None) -> Dataset:
    """Load the digits.

    Args:
      rest: "" or "test" for the 360 test images, "train" for the other 1437.
      limit: Keep the first so many images, or None.
      data_dir: Ignored.

    Returns:
      Images `[N, 32, 32, 3]`; ids are positions in scikit-learn's array, such as "digits-0042".

    Raises:
      ValueError: If there is no such split.
    """
    del data_dir  # Unused: the images are inside scikit-learn.
    if rest not in ("", "test", "train"):
        raise ValueError(f"source: digits has no split {rest!r}, expected test or train")
    from sklearn.datasets import load_digits  # when needed: it takes long

    images, labels = load_digits(return_X_y=True)
    test = positions_of_test(labels)
    chosen = np.setdiff1d(np.arange(len(labels)), test) if rest == "train" else test
    chosen = chosen[:limit]
    small = (images[chosen] / 16.0).reshape(-1, 8, 8)
    large = small.repeat(_ENLARGEMENT, axis=1).repeat(_ENLARGEMENT, axis=2)
    return checked_dataset(
        np.repeat(large[..., None], 3, axis=-1),
        labels[chosen],
        [f"digits-{i:04d}" for i in chosen],
        [str(digit) for digit in range(10)],
        source="digits",
    )


def positions_of_test(labels: np.ndarray) -> np.ndarray:
    """Choose the test images: each class in proportion, by largest remainder.

    Written out instead of scikit-learn's splitter, whose choice may change with its version: the
    shipped weights must never have seen a test image.

    Args:
      labels: `[1797]` integers, 0 to 9.

    Returns:
      `[360]` positions, ascending.
    """
    random = np.random.RandomState(_SPLIT_SEED)  # The legacy stream is frozen by NumPy's policy.
    shares = np.bincount(labels) * (_TEST_SIZE / len(labels))
    counts = np.floor(shares).astype(int)
    most_wronged = np.argsort(counts - shares, kind="stable")
    counts[most_wronged[: _TEST_SIZE - counts.sum()]] += 1
    chosen = [
        random.permutation(np.flatnonzero(labels == label))[:count]
        for label, count in enumerate(counts)
    ]
    return np.sort(np.concatenate(chosen))
