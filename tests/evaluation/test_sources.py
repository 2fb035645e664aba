"""Samples one by one, and the hash of a whole data set."""

import jax.numpy as jnp
import numpy as np
import pytest

from gse_jax.data import Dataset
from gse_jax.evaluation.attacker import unusable
from gse_jax.evaluation.fingerprint import weights_digest
from gse_jax.evaluation.sources import Read, Reader, as_source, digest_of
from tests.evaluation.small_run import dataset

BOUNDS = (0.0, 1.0)


def digest(data):
    return digest_of(Reader(as_source(data), BOUNDS))


def test_a_data_set_is_read_image_by_image():
    data = dataset()
    reader = Reader(as_source(data), BOUNDS)
    assert reader.image_shape == (8, 8, 1) and reader.dtype == np.float64
    for sample in reader.read_all([3, 0]):
        assert sample.sample_id == data.ids[sample.position]
        assert sample.label == data.labels[sample.position] and sample.reason is None
        np.testing.assert_array_equal(sample.x, data.images[sample.position])


def test_the_digest_changes_with_every_part_and_with_nothing_else():
    data = dataset()
    images = data.images.copy()
    assert digest(data) == digest(data._replace(images=images, class_names=("a",) * 5))
    images[39, 7, 7, 0] = np.nextafter(images[39, 7, 7, 0], 0)
    labels = data.labels.copy()
    labels[20] += 1
    order = np.arange(40)[::-1]
    others = [data._replace(images=images), data._replace(labels=labels),
              data._replace(ids=("x", *data.ids[1:])),
              data._replace(images=data.images[order], labels=data.labels[order])]
    assert len({digest(data), *map(digest, others)}) == 5


def test_a_source_may_bring_its_own_digest_and_is_then_not_read():
    class Lazy:
        ids, digest, reads = ("a", "b"), "v1", 0

        def __getitem__(self, index):
            self.reads += 1
            return np.zeros((8, 8, 1), np.float32), 0

    source = Lazy()
    reader = Reader(as_source(source), BOUNDS)
    before, reads = digest_of(reader), source.reads
    source.digest = "v2"
    assert digest_of(reader) != before and source.reads == reads == 1


def test_images_on_bounds_that_float32_rounds_are_used():
    mean, std = 0.1307, 0.3081
    pixels = np.random.default_rng(0).integers(0, 2, (3, 8, 8, 1))
    data = Dataset(((pixels - mean) / std).astype(np.float32), np.zeros(3, int), ("a", "b", "c"))
    reader = Reader(as_source(data), ((0 - mean) / std, (1 - mean) / std))
    assert [sample.reason for sample in reader.read_all(range(3))] == [None] * 3


def test_weights_without_a_buffer_are_hashed():
    weights = jnp.arange(4.0, dtype=jnp.bfloat16)
    assert weights_digest(weights) != weights_digest(weights + 1)
    values = np.arange(4.0).reshape(2, 2)
    assert weights_digest(values) == weights_digest(np.asfortranarray(values))


def test_images_that_leave_the_bounds_on_either_side_are_set_aside():
    data = dataset()
    data.images[3, 0, 0], data.images[4, 0, 0], data.images[5, 0, 0] = -0.1, 1.1, np.nan
    reasons = [sample.reason or "" for sample in Reader(as_source(data), BOUNDS).read_all(range(2, 6))]
    assert [words in reason for words, reason in zip(("", "from -0.1 to", "to 1.1", "NaN"), reasons)] == [True] * 4
    assert not reasons[0]
    with pytest.raises(ValueError, match="none of the first images can be used: .*-0.1"):
        Reader(as_source(Dataset(data.images[3:5], data.labels[3:5], ("a", "b"))), BOUNDS)


def test_the_first_images_are_as_many_as_asked_for():
    for limit, count in ((None, 40), (41, 40), (40, 40), (39, 39), (1, 1)):
        assert list(as_source(dataset(), limit).ids) == list(dataset().ids[:count])


def test_labels_that_are_no_classes_are_set_aside():
    reasons = [unusable(Read(0, "a", np.zeros((8, 8, 1)), label, None), None, 5) for label in (-1, 0, 4, 5)]
    assert reasons == ["label -1 lies outside [0, 4]", None, None, "label 5 lies outside [0, 4]"]


def test_no_source():
    with pytest.raises(TypeError, match="data must be a Dataset or have `ids`"):
        as_source([1, 2])
    empty = dataset()._replace(images=np.zeros((0, 8, 8, 1)), labels=np.zeros(0, int), ids=())
    with pytest.raises(ValueError, match="data holds no images"):
        as_source(empty)
