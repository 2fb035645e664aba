"""TFDS's own builders: the real CIFAR-10 one over a small archive, mocks of those that are large.

Without TensorFlow the real builder needs it for three things only: to open files, to make a text of
a name, and to encode PNG. Where TensorFlow is installed it runs as it is.
"""

import importlib.util
import io
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from tests.data.test_cifar import IMAGES, LABELS, NAMES, official

from gse_jax import data

tfds = pytest.importorskip("tensorflow_datasets")
pytest.importorskip("array_record")
image_module = pytest.importorskip("PIL.Image")
HAS_TENSORFLOW = importlib.util.find_spec("tensorflow") is not None


def prepared(folder, monkeypatch, file_format):
    """Run the installed builder's `download_and_prepare` on an archive of 18 images."""
    from tensorflow_datasets.core.download import checksums, extractor
    from tensorflow_datasets.core.features import image_feature
    from tensorflow_datasets.image_classification import cifar

    if not HAS_TENSORFLOW:
        shim = SimpleNamespace(
            compat=SimpleNamespace(as_text=lambda t: t.decode() if isinstance(t, bytes) else t),
            io=SimpleNamespace(gfile=SimpleNamespace(GFile=open)))
        monkeypatch.setattr(extractor, "tf", shim)
        monkeypatch.setattr(cifar, "tf", shim)
        monkeypatch.setattr(
            image_feature._ImageEncoder, "_encode_image",
            lambda self, array: self._encode_pil_image(image_module.fromarray(array)))
    (folder / "manual").mkdir()
    archive = official(folder / "manual" / "cifar-10-binary.tar.gz")
    builder = tfds.builder("cifar10", data_dir=folder / "tfds", file_format=file_format)
    # Our archive is not the published one, so its checksum is another.
    kind = type(builder)  # Not by monkeypatch: it reads the old value, a file that TFDS looks for.
    kind.url_infos = {builder._cifar_info.url: checksums.compute_url_info(archive)}
    try:
        builder.download_and_prepare(
            download_dir=folder / "downloads",
            download_config=tfds.download.DownloadConfig(manual_dir=folder / "manual"))
    finally:
        del kind.url_infos
    return archive, str(folder / "tfds")


@pytest.mark.parametrize("file_format", ["array_record", pytest.param(
    "tfrecord", marks=pytest.mark.skipif(not HAS_TENSORFLOW, reason="needs TensorFlow"))])
def test_the_real_cifar10_builder_gives_the_bytes_of_the_archive(tmp_path, monkeypatch,
                                                                 file_format):
    archive, folder = prepared(tmp_path, monkeypatch, file_format)
    for split, part in (("test", slice(15, 18)), ("train", slice(0, 15))):
        dataset = data.load(f"tfds:cifar10:{split}", data_dir=folder)
        direct = data.load(f"cifar10:{archive},split={split}")
        assert np.array_equal(np.rint(dataset.images * 255).astype(np.uint8), IMAGES[part])
        assert np.array_equal(dataset.labels, LABELS[part]) and dataset.class_names == NAMES
        assert dataset.ids == direct.ids and np.array_equal(dataset.images, direct.images)
        source = data.open_source(f"tfds:cifar10:{split}", data_dir=folder, limit=2)
        assert len(source) == 2 and np.array_equal(source[1][0], direct.images[1])
        assert source[1][1] == direct.labels[1]
    assert HAS_TENSORFLOW or "tensorflow" not in sys.modules


@pytest.mark.parametrize(("options", "side"), [(",size=48", 48), (",size=32,resize=crop", 32)])
def test_mocked_imagenet_is_resized(options, side):
    with tfds.testing.mock_data(num_examples=5):
        source = data.open_source(f"tfds:imagenet2012:validation{options}")
        assert len(source) == 5 and len(source.class_names) == 1000
        assert list(source.ids) == sorted(source.ids)
        for index in (3, 0):
            image, label = source[index]
            assert image.shape == (side, side, 3) and image.dtype == np.float32
            assert 0 <= image.min() < image.max() <= 1 and 0 <= label < 1000


@pytest.mark.parametrize(("name", "split", "shape", "classes"), [
    ("mnist", "test", (28, 28, 1), 10), ("cifar100", "train", (32, 32, 3), 100)])
def test_mocked_small_sets_keep_their_shape(name, split, shape, classes):
    with tfds.testing.mock_data(num_examples=4):
        dataset = data.load(f"tfds:{name}:{split}", limit=3)
    assert dataset.images.shape == (3, *shape) and len(dataset.class_names) == classes


def test_resizing_is_that_of_files(tmp_path):
    """The same picture as a file of a folder and as a record of a prepared set."""
    pixels = np.random.default_rng(3).integers(0, 256, (40, 70, 3)).astype(np.uint8)
    encoded = io.BytesIO()
    image_module.fromarray(pixels).save(encoded, "PNG")
    (tmp_path / "set" / "cat").mkdir(parents=True)
    (tmp_path / "set" / "cat" / "a.png").write_bytes(encoded.getvalue())
    from tests.data.test_tfds import prepare

    features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=["cat"])}
    prepare(str(tmp_path), "one", features,
            [(0, {"image": image_module.fromarray(pixels), "label": 0})])
    for options in ("size=24", "size=28,resize=crop"):
        as_file = data.load(f"folder:{tmp_path}/set,{options}").images
        record = data.load(f"tfds:one:test,{options}", data_dir=str(tmp_path)).images
        assert np.array_equal(as_file, record)
