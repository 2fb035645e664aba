"""The npz source: what it reads, and one clear line for everything else."""

import subprocess
import sys
import zipfile

import numpy as np
import pytest

from gse_jax import data

RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (5, 4, 6, 3)).astype(np.uint8)
LABELS = np.array([3, 0, 2, 2, 1])


def write(folder, **arrays):
    np.savez(folder / "set.npz", **arrays)
    return f"npz:{folder / 'set.npz'}"


def test_eight_bit_images_become_the_unit_interval(tmp_path):
    dataset = data.load(write(tmp_path, x=PIXELS, y=LABELS))
    assert dataset.images.dtype == np.float32 and dataset.labels.dtype == np.int32
    assert np.array_equal(np.rint(dataset.images * 255).astype(np.uint8), PIXELS)
    assert dataset.images.max() <= 1 and np.array_equal(dataset.labels, LABELS)
    assert dataset.ids == ("000000", "000001", "000002", "000003", "000004")
    assert dataset.class_names == ()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floating_point_images_keep_their_values(tmp_path, dtype):
    x = RANDOM.uniform(size=(2, 3, 3, 1)).astype(dtype)
    dataset = data.load(write(tmp_path, x=x, y=np.array([0, 1], np.uint8)))
    assert dataset.images.dtype == np.float32
    assert np.array_equal(dataset.images, x.astype(np.float32))


@pytest.mark.parametrize("ids", [np.array(["c", "a", "e", "b", "d"]), np.array([9, 7, 5, 3, 1])])
def test_ids_and_limit(tmp_path, ids):
    dataset = data.load(write(tmp_path, x=PIXELS, y=LABELS, ids=ids), limit=np.int64(3))
    assert dataset.ids == tuple(str(i) for i in ids[:3])
    assert len(dataset.images) == len(dataset.labels) == 3


def test_relative_path_starts_from_data_dir(tmp_path):
    write(tmp_path, x=PIXELS, y=LABELS)
    assert len(data.load("npz:set.npz", data_dir=str(tmp_path)).ids) == 5


FLOATS = PIXELS / 255.0
BAD = {
    "scalar_names": (dict(x=PIXELS, y=LABELS, class_names=np.array("cat")), ValueError, r"class"),
    "missing_x": (dict(y=LABELS), ValueError, r"holds y, expected an array x"),
    "missing_y": (dict(x=PIXELS), ValueError, r"holds x, expected an array y"),
    "nchw": (dict(x=PIXELS.transpose(0, 3, 1, 2), y=LABELS), ValueError, r"NCHW: transpose"),
    "no_channels": (dict(x=PIXELS[..., 0], y=LABELS), ValueError, r"add the channel axis"),
    "four_channels": (dict(x=PIXELS[..., [0, 1, 2, 0]], y=LABELS), ValueError, r"C = 1 or 3"),
    "empty": (dict(x=PIXELS[:0], y=LABELS[:0]), ValueError, r"\(0, 4, 6, 3\).*not empty"),
    "no_pixels": (dict(x=PIXELS[:, :0], y=LABELS), ValueError, r"not empty"),
    "scalars": (dict(x=np.array(1.0), y=np.array(1)), ValueError, r"got scalars"),
    "one_hot": (dict(x=PIXELS, y=np.eye(4, dtype=int)[LABELS]), ValueError, r"argmax"),
    "label_rank": (dict(x=PIXELS, y=LABELS[:, None, None]), ValueError, r"expected \[N\]"),
    "float_labels": (dict(x=PIXELS, y=LABELS * 1.0), TypeError, r"float64, expected integers"),
    "bool_labels": (dict(x=PIXELS, y=LABELS > 1), TypeError, r"bool, expected integers"),
    "rounding": (dict(x=PIXELS / np.float32(PIXELS.max()) * np.float32(1.000001), y=LABELS), ValueError,
                 r"span \[0\.?\d*, 1\.0000\d*\], expected \[0, 1\]; that is rounding: store images.clip"),
    "no_rounding": (dict(x=FLOATS - 1e-3, y=LABELS), ValueError, r"rescale them"),
    "negative_label": (dict(x=PIXELS, y=LABELS - 1), ValueError, r"span -1 to 2"),
    "huge_label": (dict(x=PIXELS, y=LABELS + 2**32), ValueError, r"int32"),  # int32 would keep the low bits
    "too_few_names": (dict(x=PIXELS, y=LABELS, class_names=list("abc")), ValueError, r"label 3, but 3 class names"),
    "length": (dict(x=PIXELS, y=LABELS[:4]), ValueError, r"x \(5, 4, 6, 3\), y \(4,\)"),
    "ids_length": (dict(x=PIXELS, y=LABELS, ids=LABELS[:2]), ValueError, r"ids \(2,\)"),
    "ids_twice": (dict(x=PIXELS, y=LABELS, ids=LABELS), ValueError, r"id '2' occurs twice"),
    "ids_float": (dict(x=PIXELS, y=LABELS, ids=LABELS * 0.5), TypeError, r"ids are float64"),
    "zero_to_255": (dict(x=PIXELS * 1.0, y=LABELS), ValueError, r"expected \[0, 1\].*uint8"),
    "minus_one_to_one": (dict(x=2 * FLOATS - 1, y=LABELS), ValueError, r"\[-1?.*expected \[0, 1\]"),
    "nan": (dict(x=np.where(PIXELS > 99, np.nan, 0.5), y=LABELS), ValueError, r"\[nan, nan\]"),
    "int_images": (dict(x=PIXELS.astype(int), y=LABELS), TypeError, r"int64, expected uint8"),
    "objects": (dict(x=PIXELS, y=LABELS.astype(object)), ValueError, r"no Python objects"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arrays_are_refused_in_one_line(tmp_path, case):
    arrays, error, message = BAD[case]
    with pytest.raises(error, match=message) as caught:
        data.load(write(tmp_path, **arrays))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_members_without_the_usual_ending_are_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.npz", "w") as archive:
        for name, array in (("x", PIXELS), ("y.npy", LABELS)):
            with archive.open(name, "w") as member:
                np.lib.format.write_array(member, array)
    assert np.array_equal(data.load(f"npz:{tmp_path / 'set.npz'}").labels, LABELS)


def test_limit_does_not_hide_a_length_mismatch(tmp_path):
    with pytest.raises(ValueError, match="lengths differ"):
        data.load(write(tmp_path, x=PIXELS, y=LABELS[:4]), limit=2)


def test_missing_truncated_and_foreign_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file .*absent.npz"):
        data.load(f"npz:{tmp_path / 'absent.npz'}")
    with pytest.raises(ValueError, match="npz needs a file"):
        data.load("npz")
    write(tmp_path, x=PIXELS, y=LABELS)
    whole = (tmp_path / "set.npz").read_bytes()
    for name, content in {"cut": whole[:-40], "html": b"<html>not found</html>"}.items():
        (tmp_path / f"{name}.npz").write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.npz is no npz file"):
            data.load(f"npz:{tmp_path / name}.npz")
    # Flip bytes inside the stored images, far beyond their header: the archive's checksum must notice.
    write(tmp_path, x=np.tile(PIXELS, (1, 9, 9, 1)), y=LABELS)
    damaged = bytearray((tmp_path / "set.npz").read_bytes())
    damaged[20000:20010] = bytes(255 - b for b in damaged[20000:20010])
    (tmp_path / "damaged.npz").write_bytes(bytes(damaged))
    with pytest.raises(ValueError, match="cannot be read"):
        data.load(f"npz:{tmp_path / 'damaged.npz'}")


def test_images_stay_on_disk_where_the_file_is_not_compressed(tmp_path):
    """Peak memory of opening and reading one of many images, in a process of its own."""
    path = tmp_path / "large.npz"
    np.savez(path, y=np.zeros(40, int), x=np.zeros((40, 1000, 1000, 3), np.uint8))
    code = (f"import resource; from gse_jax import data; import numpy\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            f"image, label = data.open_source('npz:{path}')[17]\n"
            "print(image.shape, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    shape, _, kib = done.stdout.strip().rpartition(" ")
    assert shape == "(1000, 1000, 3)" and int(kib) < 60 * 1024  # the file has 117 MiB


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_opened_images_are_the_loaded_ones(tmp_path, save, order):
    save(tmp_path / "set.npz", x=np.asarray(PIXELS, order=order), y=LABELS,
         class_names=["a", "b", "c", "d"])
    source, whole = (call(f"npz:{tmp_path}/set.npz", limit=4)
                     for call in (data.open_source, data.load))
    assert len(source) == 4 and source.class_names == whole.class_names == ("a", "b", "c", "d")
    for index in range(4):
        image, label = source[index]
        assert np.array_equal(image, whole.images[index]) and label == whole.labels[index]
        assert np.array_equal(np.rint(255 * image), PIXELS[index])
