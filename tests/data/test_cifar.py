"""CIFAR-10 and CIFAR-100 from small archives in the official binary layouts."""

import io
import os
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest

from gse_jax import data

RANDOM = np.random.default_rng(5)
LABELS = RANDOM.integers(0, 10, 18).astype(np.uint8)
PLANES = RANDOM.integers(0, 256, (18, 3, 32, 32)).astype(np.uint8)  # red, green, blue
IMAGES = PLANES.transpose(0, 2, 3, 1)
NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def records(part):
    return b"".join(bytes([y]) + x.tobytes() for y, x in zip(LABELS[part], PLANES[part]))


def write(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def official(path, **changes):
    """Three images in each of the six files; train batches stored in another order."""
    parts = {f"data_batch_{b}": slice(3 * b - 3, 3 * b) for b in (2, 1, 3, 5, 4)}
    parts["test_batch"] = slice(15, 18)
    members = {f"cifar-10-batches-bin/{name}.bin": records(part) for name, part in parts.items()}
    for name, content in changes.items():
        members[f"cifar-10-batches-bin/{name}.bin"] = content
    members["cifar-10-batches-bin/batches.meta.txt"] = "\n".join(NAMES + ("", "")).encode()
    return write(path, {"cifar-10-batches-bin/readme.html": b"<html>", **members})


def official100(path):
    """Twelve training and six test images; a superclass stands before the class."""
    labels = RANDOM.permutation(100)[:18].astype(np.uint8)
    content = [bytes([y // 5, y]) + x.tobytes() for y, x in zip(labels, PLANES)]
    names = {f"{kind}_label_names.txt": "".join(f"{kind}_{i}\n" for i in range(count)).encode()
             for kind, count in (("fine", 100), ("coarse", 20))}
    files = {"train.bin": b"".join(content[:12]), "test.bin": b"".join(content[12:])} | names
    return labels, write(path, {f"cifar-100-binary/{name}": c for name, c in files.items()})


@pytest.mark.parametrize(("option", "part", "split"), [("", slice(15, 18), "test"),
                                                       (",split=test", slice(15, 18), "test"),
                                                       (",split=train", slice(0, 15), "train")])
def test_pixels_labels_and_order_are_those_of_the_archive(tmp_path, option, part, split):
    official(tmp_path / "a.tar.gz")
    dataset = data.load(f"cifar10:a.tar.gz{option}", data_dir=str(tmp_path))
    assert np.array_equal(np.rint(dataset.images * 255).astype(np.uint8), IMAGES[part])
    assert np.array_equal(dataset.labels, LABELS[part])
    assert dataset.ids == tuple(f"{split}_{i:05d}" for i in range(len(LABELS[part])))
    assert dataset.class_names == NAMES
    few = data.load(f"cifar10:{tmp_path}/a.tar.gz{option}", limit=2)
    assert few.ids == dataset.ids[:2] and np.array_equal(few.images, dataset.images[:2])


def test_prepared_npz_is_the_same_data_set(tmp_path):
    archive = official(tmp_path / "a.tar.gz")
    assert data.prepare_cifar("cifar10", archive, tmp_path / "train.npz", split="train") == 15
    from_npz, direct = data.load(f"npz:{tmp_path}/train.npz"), data.load(
        f"cifar10:{archive},split=train")
    assert from_npz.ids == direct.ids and np.array_equal(from_npz.images, direct.images)
    assert np.array_equal(from_npz.labels, direct.labels)
    assert from_npz.class_names == NAMES
    assert sorted(os.listdir(tmp_path)) == ["a.tar.gz", "train.npz"]


@pytest.mark.parametrize(("split", "part"), [("test", slice(12, 18)), ("train", slice(0, 12))])
def test_cifar100_has_its_fine_classes(tmp_path, split, part):
    labels, archive = official100(tmp_path / "a.tar.gz")
    dataset = data.load(f"cifar100:{archive},split={split}")
    assert np.array_equal(dataset.labels, labels[part])
    assert np.array_equal(np.rint(dataset.images * 255).astype(np.uint8), IMAGES[part])
    assert dataset.class_names == tuple(f"fine_{i}" for i in range(100))
    assert data.prepare_cifar("cifar100", archive, tmp_path / "a.npz", split=split) == len(
        dataset.ids)
    prepared = data.load(f"npz:{tmp_path}/a.npz")
    assert prepared.ids == dataset.ids and prepared.class_names == dataset.class_names
    assert np.array_equal(prepared.images, dataset.images)


def test_the_two_archives_are_not_taken_for_each_other(tmp_path):
    _, archive = official100(tmp_path / "100.tar.gz")
    with pytest.raises(ValueError, match="holds no test_batch.bin; is it another archive"):
        data.load(f"cifar10:{archive}")
    with pytest.raises(ValueError, match="holds no test.bin; is it another archive"):
        data.load(f"cifar100:{official(tmp_path / '10.tar.gz')}")
    with pytest.raises(ValueError, match="got 'cifar1', expected cifar10 or cifar100"):
        data.prepare_cifar("cifar1", archive, tmp_path / "out.npz")


def test_an_archive_with_other_names_or_a_folder_for_a_file(tmp_path):
    archive = write(tmp_path / "a.tar.gz", {"test_batch.bin": records(slice(15, 18)), "batches.meta.txt": b"cat\ndog"})
    dataset = data.load(f"cifar10:{archive}")
    assert dataset.class_names == () and np.array_equal(dataset.labels, LABELS[15:])
    with tarfile.open(archive, "w:gz") as tar:
        folder = tarfile.TarInfo("test_batch.bin")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    with pytest.raises(ValueError, match="holds no test_batch.bin"):
        data.load(f"cifar10:{archive}")


def test_images_stay_in_eight_bits_until_they_are_asked_for(tmp_path):
    official(tmp_path / "a.tar.gz")
    source = data.open_source(f"cifar10:{tmp_path}/a.tar.gz")
    whole = data.load(f"cifar10:{tmp_path}/a.tar.gz")
    assert isinstance(source, data.ArrayImages) and len(source) == 3
    for index in (2, 0, 1):
        image, label = source[index]
        assert image.dtype == np.float32 and label == whole.labels[index]
        assert np.array_equal(image, whole.images[index])


def test_a_failed_preparation_leaves_nothing(tmp_path, monkeypatch):
    archive = official(tmp_path / "a.tar.gz")

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        data.prepare_cifar("cifar10", archive, tmp_path / "out.npz")
    assert os.listdir(tmp_path) == ["a.tar.gz"]


def test_tensorflow_datasets_reads_the_same_records(tmp_path, monkeypatch):
    """The installed builder's own generator over the same files: pixels, labels and ids agree."""
    cifar = pytest.importorskip("tensorflow_datasets.image_classification.cifar")
    archive = official(tmp_path / "a.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    # All that the generator takes from TensorFlow is how to open a file.
    opened = SimpleNamespace(io=SimpleNamespace(gfile=SimpleNamespace(GFile=open)))
    monkeypatch.setattr(cifar, "tf", opened)
    info = cifar.Cifar10._cifar_info.fget(SimpleNamespace(name="cifar10"))
    for split, files in (("train", info.train_files), ("test", info.test_files)):
        rows = [row for _, row in cifar.Cifar10._generate_examples(
            SimpleNamespace(_cifar_info=info), f"{split}_",
            [str(tmp_path / info.prefix / name) for name in files])]
        dataset = data.load(f"cifar10:{archive},split={split}")
        assert dataset.ids == tuple(row["id"] for row in rows)
        assert dataset.labels.tolist() == [int(row["label"]) for row in rows]
        pixels = np.rint(dataset.images * 255).astype(np.uint8)
        assert np.array_equal(pixels, [row["image"] for row in rows])


BAD = {
    "label": (lambda p: official(p, test_batch=b"\x0a" + bytes(3072)), "has label 10"),
    "cut_batch": (lambda p: official(p, test_batch=records(slice(0, 2))[:-1]), "6145 bytes"),
    "empty_batch": (lambda p: official(p, test_batch=b""), "has 0 bytes"),
    "python": (lambda p: write(p, {"cifar-10-batches-py/test_batch": b"\x80\x02."}),
               "Python version, whose pickles can run code; fetch the binary version"),
    "other": (lambda p: write(p, {"a/b.txt": b"x"}), "holds no test_batch.bin; is it"),
    "html": (lambda p: p.write_text("<html>not found</html>"), "truncated or no tar archive"),
    "truncated": (lambda p: (official(p), p.write_bytes(p.read_bytes()[:9000])), "is truncated"),
    "damaged": (lambda p: (official(p), flip(p)), "is truncated or no tar archive"),
    "folder": (lambda p: p.mkdir(), "truncated or no tar archive"),
}


def flip(path):
    content = bytearray(path.read_bytes())
    content[20000:20020] = bytes(255 - b for b in content[20000:20020])
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("case", BAD)
def test_bad_archives_are_refused_in_one_line(tmp_path, case):
    make, message = BAD[case]
    make(tmp_path / "a.tar.gz")
    with pytest.raises(ValueError, match=message) as caught:
        data.load(f"cifar10:{tmp_path}/a.tar.gz")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_unknown_split_and_missing_file(tmp_path):
    official(tmp_path / "a.tar.gz")
    with pytest.raises(ValueError, match="no split 'valid', expected test or train"):
        data.load(f"cifar10:{tmp_path}/a.tar.gz,split=valid")
    with pytest.raises(FileNotFoundError, match="there is no .*absent.tar.gz"):
        data.load(f"cifar10:{tmp_path}/absent.tar.gz")
