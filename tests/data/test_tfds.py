"""The TFDS source, on real array_record files written and read without TensorFlow."""

import sys

import numpy as np
import pytest

from gse_jax import data
from gse_jax.data.tfds import _checked_features

pytest.importorskip("array_record")
tfds = pytest.importorskip("tensorflow_datasets")
image_module = pytest.importorskip("PIL.Image")

PIXELS = np.random.default_rng(1).integers(0, 256, (12, 8, 10, 3)).astype(np.uint8)
LABELS = np.arange(12) % 3


def prepare(folder, name, features, examples):
    """Prepare a set as a user's other program would: this process has no code for it."""

    def info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    with tfds.core.registered.skip_registration():
        builder = type(name, (tfds.core.GeneratorBasedBuilder,), {
            "VERSION": tfds.core.Version("1.0.0"),
            "name": name,
            "_info": info,
            "_split_generators": lambda self, _: {"test": iter(examples)},
            "_generate_examples": lambda self: None,
        })
    builder(data_dir=folder, file_format="array_record").download_and_prepare()


def image_of(pixels):
    return image_module.fromarray(pixels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("tfds"))
    label = tfds.features.ClassLabel(names=["cat", "dog", "eel"])
    image = tfds.features.Image(shape=(8, 10, 3))
    named = {"id": tfds.features.Text(), "image": image, "label": label}
    rows = [
        (i, {"id": f"test_{i:03d}", "image": image_of(PIXELS[i]), "label": int(LABELS[i])})
        for i in range(12)
    ]
    prepare(folder, "named", named, rows)
    prepare(folder, "nameless", {"image": image, "label": label},
            [(i, {k: v for k, v in row.items() if k != "id"}) for i, row in rows])
    sizes = [(i, {"image": image_of(PIXELS[i, : 5 + i]), "label": 0}) for i in range(2)]
    prepare(folder, "sizes", {"image": tfds.features.Image(), "label": label}, sizes)
    prepare(folder, "unlabelled", {"image": image}, [(0, {"image": image_of(PIXELS[0])})])
    return folder


def test_images_come_sorted_by_id_with_class_names(folder):
    dataset = data.load("tfds:named:test", data_dir=folder)
    assert dataset.ids == tuple(f"test_{i:03d}" for i in range(12))
    assert np.array_equal(np.rint(dataset.images * 255).astype(np.uint8), PIXELS)
    assert np.array_equal(dataset.labels, LABELS) and dataset.labels.dtype == np.int32
    assert dataset.class_names == ("cat", "dog", "eel")
    assert "tensorflow" not in sys.modules
    stored = tfds.data_source("named", split="test", data_dir=folder, download=False,
                              builder_kwargs={"file_format": "array_record"})
    # TFDS shuffled them, else sorting would have shown nothing.
    assert [stored[i]["id"].decode() for i in range(12)] != list(dataset.ids)


def test_limit_and_version_and_slice(folder):
    few = data.load("tfds:named:1.0.0:test", limit=4, data_dir=folder)
    assert few.ids == ("test_000", "test_001", "test_002", "test_003")
    assert np.array_equal(np.rint(few.images * 255).astype(np.uint8), PIXELS[:4])
    assert len(data.load("tfds:named:test[:5]", data_dir=folder).ids) == 5


def test_without_ids_the_stored_order_counts(folder):
    dataset = data.load("tfds:nameless:test", data_dir=folder)
    assert dataset.ids == tuple(f"{i:06d}" for i in range(12))
    pixels = np.rint(dataset.images * 255).astype(np.uint8)
    found = [int(np.flatnonzero((PIXELS == p).all((1, 2, 3)))[0]) for p in pixels]
    assert sorted(found) == list(range(12)) and np.array_equal(LABELS[found], dataset.labels)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("tfds:cifar10:test", FileNotFoundError, r"not prepared as array_record .*; prepare it"),
        ("tfds:no_such_set:test", ValueError, r"TFDS knows no set 'no_such_set'"),
        ("tfds:named:valid", ValueError, r"Unknown split 'valid'"),
        ("tfds:sizes:test", ValueError, r"images of different sizes"),
        ("tfds:unlabelled:test", ValueError, r"are image, expected image and label \(label"),
        ("tfds:named", ValueError, r"expected tfds:NAME:SPLIT"),
        ("tfds", ValueError, r"expected tfds:NAME:SPLIT"),
    ],
)
def test_errors_are_one_line(folder, source, error, message):
    with pytest.raises(error, match=message) as caught:
        data.load(source, data_dir=folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_colours_are_those_of_the_file_not_of_its_palette(tmp_path):
    """TFDS's decoder takes a palette's numbers for grey values, and CMYK for RGBA."""
    red = image_module.fromarray(np.full((8, 10, 3), (200, 30, 30), np.uint8))
    red.convert("P", palette=image_module.Palette.ADAPTIVE).save(tmp_path / "palette.png")
    red.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    rows = [(i, {"image": str(tmp_path / name), "label": 0}) for i, name in enumerate(("palette.png", "cmyk.jpg"))]
    label = tfds.features.ClassLabel(names=["red"])
    prepare(str(tmp_path), "colours", {"image": tfds.features.Image(), "label": label}, rows)
    images = data.load("tfds:colours:test", data_dir=str(tmp_path)).images
    np.testing.assert_allclose(images, np.broadcast_to(np.float32([200, 30, 30]) / 255, images.shape), atol=0.02)


@pytest.mark.parametrize("image", [tfds.features.Image(shape=(8, 10, 1), dtype=np.float32),
                                   tfds.features.Tensor(shape=(8, 10, 3), dtype=np.uint8)])
def test_images_that_are_stored_as_no_8_bit_pictures_are_refused(image):
    """TFDS stores float32 as four bytes of an RGBA picture."""
    features = tfds.features.FeaturesDict({"image": image, "label": tfds.features.ClassLabel(num_classes=3)})
    with pytest.raises(ValueError, match="expected Image of uint8"):
        _checked_features(features)
