"""The digits source against scikit-learn's own arrays."""

import hashlib

import numpy as np
import pytest

from gse_jax import data

sklearn_datasets = pytest.importorskip("sklearn.datasets")


@pytest.fixture(scope="module")
def originals():
    return sklearn_datasets.load_digits(return_X_y=True)


def positions(dataset):
    return np.array([int(name.removeprefix("digits-")) for name in dataset.ids])


def test_split_is_complete_disjoint_stratified_and_never_changes(originals):
    test, training = data.load("digits"), data.load("digits:train")
    assert (len(test.ids), len(training.ids)) == (360, 1437)
    assert sorted([*positions(test), *positions(training)]) == list(range(1797))
    share = np.bincount(test.labels) - np.bincount(originals[1]) * 360 / 1797
    assert np.abs(share).max() < 1
    # The shipped weights were trained on the complement of exactly these images.
    digest = hashlib.sha256(" ".join(test.ids).encode()).hexdigest()
    assert digest[:16] == "5f18de0c32cf4e42"


@pytest.mark.parametrize("source", ["digits", "digits:test", "digits:train"])
def test_images_are_the_originals_enlarged(originals, source):
    dataset = data.load(source, limit=50)
    chosen = positions(dataset)
    assert dataset.images.shape == (50, 32, 32, 3) and dataset.images.dtype == np.float32
    blocks = dataset.images.reshape(50, 8, 4, 8, 4, 3)
    expected = (originals[0][chosen] / 16).reshape(50, 8, 1, 8, 1, 1)
    assert np.array_equal(blocks, np.broadcast_to(expected, blocks.shape))
    assert np.array_equal(dataset.labels, originals[1][chosen]) and dataset.labels.dtype == np.int32
    assert dataset.class_names == tuple("0123456789")


def test_limit_keeps_the_ids_of_the_images():
    all_of_it, few = data.load("digits"), data.load("digits", limit=7)
    assert few.ids == all_of_it.ids[:7]
    assert np.array_equal(few.images, all_of_it.images[:7])


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="digits has no split 'validation', expected"):
        data.load("digits:validation")
