"""Samples one by one, and the hash of a whole data set."""

import numpy as np
import pytest

from gse_jax.evaluation.sources import Reader, as_source, digest_of
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


def test_no_source():
    with pytest.raises(TypeError, match="data must be a Dataset or have `ids`"):
        as_source([1, 2])
    empty = dataset()._replace(images=np.zeros((0, 8, 8, 1)), labels=np.zeros(0, int), ids=())
    with pytest.raises(ValueError, match="data holds no images"):
        as_source(empty)
