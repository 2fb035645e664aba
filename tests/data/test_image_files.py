"""Image folders and the NIPS 2017 layout: order, labels, resizing, damage, streaming."""

import os
import struct
import threading
import zlib

import jax.numpy as jnp
import numpy as np
import pytest

from gse_jax import data
from gse_jax.data import image_files
from gse_jax.evaluation import AttackPlan, Plan, evaluate
from gse_jax.evaluation.sources import Reader, as_source, digest_of
from tests.toy_model import small_logits

Image = pytest.importorskip("PIL.Image")

RANDOM = np.random.default_rng(3)
PIXELS = RANDOM.integers(0, 256, (4, 9, 8, 3)).astype(np.uint8)


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two classes, a nested folder, files that are no images."""
    root = tmp_path / "set"
    names = ("cat/10.png", "cat/9.PNG", "cat/more/1.bmp", "dog/1.png")
    for name, pixels in zip(names, PIXELS):
        write(root / name, pixels)
    (root / "dog/notes.txt").write_text("no image")
    (root / "readme.md").write_text("no class")
    return root


def test_folder_has_the_order_and_labels_of_torchvision(folder):
    dataset = data.load(f"folder:{folder}")
    assert dataset.ids == ("cat/10.png", "cat/9.PNG", "cat/more/1.bmp", "dog/1.png")
    assert dataset.labels.tolist() == [0, 0, 0, 1] and dataset.class_names == ("cat", "dog")
    assert dataset.images.dtype == np.float32
    assert np.array_equal(np.rint(dataset.images * 255).astype(np.uint8), PIXELS)


def test_folders_inside_a_class_come_sorted(tmp_path):
    for name in "ecahgbdf":  # else in the order of the file system
        write(tmp_path / "cat" / name / "1.png", PIXELS[0])
    os.symlink(tmp_path / "cat/a", tmp_path / "cat/z")
    assert data.load(f"folder:{tmp_path}").ids == tuple(f"cat/{name}/1.png" for name in "abcdefghz")


def test_a_path_may_hold_what_looks_like_an_option(tmp_path):
    write(tmp_path / "a,size=4,b/cat/1.png", PIXELS[0])
    assert data.load(f"folder:{tmp_path}/a,size=4,b").images.shape == (1, 9, 8, 3)


def test_what_tools_leave_behind_is_no_class(folder):
    expected = data.load(f"folder:{folder}")
    for name in (".ipynb_checkpoints", "__MACOSX/cat", ".thumbnails"):
        write(folder / name / "9.png", PIXELS[0])
    for name in (".ipynb_checkpoints/1.png", "more/@eaDir/1.png", "._1.png"):
        write(folder / "cat" / name, PIXELS[0])
    dataset = data.load(f"folder:{folder}")
    assert dataset.ids == expected.ids and dataset.class_names == expected.class_names
    np.testing.assert_array_equal(dataset.labels, expected.labels)


def test_a_folder_without_images_leaves_numbers_labels(tmp_path):
    for name in ("0", "2", "10"):
        write(tmp_path / name / "1.png", PIXELS[0])
    (tmp_path / "notes").mkdir()
    assert data.load(f"folder:{tmp_path}").labels.tolist() == [0, 10, 2]
    (tmp_path / "10").rename(tmp_path / "20240115123000")
    with pytest.raises(ValueError, match="label 20240115123000 is too large"):
        data.load(f"folder:{tmp_path}")


def test_a_class_that_cannot_be_listed_is_not_left_out(folder, monkeypatch):
    scandir, closed = os.scandir, ("lost+found", "@eaDir")
    expected = data.load(f"folder:{folder}").ids
    for name in ("lost+found", "cat/@eaDir"):  # of the file system and of a server: no classes, and closed to users
        (folder / name).mkdir()

    def forgetful(path):
        if str(path).endswith(closed):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forgetful)
    assert data.load(f"folder:{folder}").ids == expected
    closed = "cat"
    with pytest.raises(PermissionError, match="cat"):
        data.open_source(f"folder:{folder}")


def test_a_name_that_is_no_text_is_refused(folder):
    (folder / "cat" / "9.PNG").rename(folder / "cat" / "caf\udce9.png")
    with pytest.raises(ValueError, match=r"'cat/caf\\udce9.png' is not UTF-8"):
        data.open_source(f"folder:{folder}")


@pytest.mark.parametrize("kind", ["RGB", "RGBA", "LA", "ppm of 65535", "ppm of 1023"])
def test_colours_of_16_bits_are_refused(folder, kind):
    def chunk(name, content):
        return (struct.pack(">I", len(content)) + name + content
                + struct.pack(">I", zlib.crc32(name + content)))

    if kind.startswith("ppm"):
        path, content = "cat/1.ppm", b"P6\n9 8\n" + kind[7:].encode() + b"\n" + bytes(9 * 8 * 6)
    else:
        code, channels = {"RGB": (2, 3), "RGBA": (6, 4), "LA": (4, 2)}[kind]
        rows = (b"\0" + bytes(9 * channels * 2)) * 8
        path, content = "cat/1.png", b"\x89PNG\r\n\x1a\n" + b"".join(
            chunk(*part) for part in ((b"IHDR", struct.pack(">IIBBBBB", 9, 8, 16, code, 0, 0, 0)),
                                      (b"IDAT", zlib.compress(rows)), (b"IEND", b"")))
    (folder / path).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path}: .*more than 8 bits per channel"):
        data.load(f"folder:{folder}")


def test_whatever_the_decoder_raises_names_the_file(folder, monkeypatch):
    """A broken chunk makes Pillow raise SyntaxError, a huge image DecompressionBombError."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match="cat/10.png: .*decompression bomb"):
        data.load(f"folder:{folder}")


def test_limit_and_relative_path(folder):
    dataset = data.load("folder:set", limit=2, data_dir=str(folder.parent))
    assert dataset.ids == ("cat/10.png", "cat/9.PNG")
    assert len(data.open_source("folder:set", limit=3, data_dir=str(folder.parent)).ids) == 3


def test_numbers_as_class_names_are_the_labels(tmp_path):
    for name, pixels in zip(("281", "7", "94"), PIXELS):
        write(tmp_path / name / "0.png", pixels)
    dataset = data.load(f"folder:{tmp_path}")
    assert dataset.labels.tolist() == [281, 7, 94] and dataset.class_names == ()


def test_gray_and_transparent_images_become_rgb(tmp_path):
    write(tmp_path / "a/gray.png", PIXELS[0, ..., 0])
    write(tmp_path / "a/rgba.png", np.dstack([PIXELS[1], PIXELS[1, ..., :1]]))
    images = np.rint(data.load(f"folder:{tmp_path}").images * 255).astype(np.uint8)
    assert np.array_equal(images[0], np.repeat(PIXELS[0, ..., :1], 3, axis=-1))
    assert np.array_equal(images[1], PIXELS[1])


def weights(size, out, start, scale):
    """Rows of an antialiased bilinear resize: triangles around each output pixel's centre."""
    centres = (np.arange(out) + start + 0.5) * scale
    rows = np.maximum(0, 1 - abs(np.arange(size) + 0.5 - centres[:, None]) / max(scale, 1))
    return rows / rows.sum(1, keepdims=True)


@pytest.mark.parametrize(("shape", "policy", "size"), [
    ((24, 36), "paper", 14), ((24, 36), "crop", 14), ((40, 16), "paper", 14), ((40, 16), "crop", 14),
    ((24, 36), "crop", 13)])
def test_resize_policies_equal_their_definition(tmp_path, shape, policy, size):
    shorter = size * 256 // 224  # rounded down
    pixels = RANDOM.integers(0, 256, (*shape, 3)).astype(np.uint8)
    write(tmp_path / "a/0.png", pixels)
    image = data.load(f"folder:{tmp_path},size={size},resize={policy}").images[0]
    assert image.shape == (size, size, 3)
    ends = [size, size]
    if policy == "crop":
        ends = [shorter * side // min(shape) for side in shape]
    rows, columns = (weights(side, size, round((end - size) / 2), side / end)
                     for side, end in zip(shape, ends))
    expected = np.einsum("ih,hwc,jw->ijc", rows, pixels.astype(float), columns)
    assert np.abs(image * 255 - expected).max() < 1.5  # Pillow rounds after each direction.


def damage(folder):
    (folder / "cat/9.PNG").write_bytes((folder / "cat/10.png").read_bytes()[:-60])
    (folder / "dog/1.png").write_text("<html>not found</html>")


def test_damaged_files_are_set_aside_and_the_rest_is_read(folder):
    damage(folder)
    write(folder / "dog/2.png", PIXELS[3, :5])
    write(folder / "dog/3.png", PIXELS[0].astype(np.uint16)[..., 0] * 200)
    reader = Reader(as_source(data.open_source(f"folder:{folder}")), (0.0, 1.0))
    found = {sample.sample_id: sample for sample in reader.read_all(range(6))}
    assert [name for name, s in found.items() if s.x is not None] == ["cat/10.png",
                                                                     "cat/more/1.bmp"]
    assert "runcated" in found["cat/9.PNG"].reason and found["cat/9.PNG"].label == -1
    assert "UnidentifiedImageError" in found["dog/1.png"].reason
    assert "shape [5, 8, 3], expected [9, 8, 3]" in found["dog/2.png"].reason
    assert "more than 8 bits" in found["dog/3.png"].reason


def test_load_refuses_damaged_files_in_one_line(folder):
    damage(folder)
    with pytest.raises(ValueError, match="cat/9.PNG: .*evaluate sets such files aside") as caught:
        data.load(f"folder:{folder}")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_digest_follows_content_labels_and_resize(folder):
    def digest(options=""):
        return digest_of(Reader(as_source(data.open_source(f"folder:{folder}{options}")), (0, 1)))

    first = digest()
    assert first == digest()
    assert len({first, digest(",size=8"), digest(",size=8,resize=crop")}) == 3
    (folder / "cat").rename(folder / "eel")
    assert digest() != first
    (folder / "eel").rename(folder / "cat")
    write(folder / "cat/9.PNG", PIXELS[0])
    assert digest() != first
    tables = (nips(folder / "more", f"a,u,{label},1\n") for label in (1, 2))
    assert len({data.open_source(table).digest for table in tables}) == 2


def test_images_are_decoded_ahead_in_threads_and_not_kept(tmp_path, monkeypatch):
    for index in range(120):
        write(tmp_path / f"{index % 3}/{index:03d}.png", PIXELS[index % 4])
    opened, threads, count = image_files._opened, set(), []

    def counted(*arguments):
        threads.add(threading.current_thread().name)
        count.append(arguments)
        return opened(*arguments)

    monkeypatch.setattr(image_files, "_opened", counted)
    source = data.open_source(f"folder:{tmp_path}")
    assert not count
    for index in range(0, 120, 2):  # as one of two shards reads
        image, label = source[index]
        assert label == source.labels[index] and image.shape == (9, 8, 3)
        assert len(source._ahead) <= image_files._LOOK_AHEAD
        # Ahead of the reader, and once for nothing, before the step was known.
        assert len(count) <= index // 2 + 1 + 2 * image_files._LOOK_AHEAD
    assert len(count) <= 60 + image_files._LOOK_AHEAD
    assert all(name.startswith("gse_jax-decode") for name in threads)
    backwards = [source[i][0] for i in (5, 3, 3, 119)]
    assert np.array_equal(backwards[1], backwards[2])


def test_evaluate_streams_a_folder_and_sets_damaged_files_aside(tmp_path, monkeypatch):
    params = (RANDOM.standard_normal((8 * 8 * 3, 8)) / 8, RANDOM.standard_normal((8, 5)))
    images = RANDOM.integers(0, 256, (12, 8, 8, 3)).astype(np.uint8)
    labels = np.asarray(small_logits(params, images / 255.0)).argmax(-1)
    for index, (image, label) in enumerate(zip(images, labels)):
        write(tmp_path / f"set/{label}/{index}.png", image)
    (tmp_path / f"set/{labels[0]}/broken.png").write_text("<html>not found</html>")
    # The whole set in memory is what must not happen.
    monkeypatch.setattr(data.ImageFiles, "to_dataset", None)
    plan = Plan(data=f"folder:{tmp_path}/set", lanes=1, attacks=(AttackPlan(
        settings={"num_runs": 4, "max_steps": 30, "phase1_steps": 10, "blur_size": 3,
                  "patch_size": 4}),))
    model = small_logits, tuple(p.astype(np.float32) for p in params)
    run = evaluate(plan, tmp_path / "run", model=model, force=True)
    status = {record["sample_id"]: record["status"] for record in run.records}
    assert status.pop(f"{labels[0]}/broken.png") == "quarantined"
    assert set(status) == {f"{label}/{index}.png" for index, label in enumerate(labels)}
    assert "found" in status.values()
    again = evaluate(plan, tmp_path / "run", model=model)  # resumes: the digest is the same
    assert len(again.records) == 13


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("folder", ValueError, "the path is missing, expected folder:PATH"),
        ("folder:{}/absent", FileNotFoundError, "there is no .*absent"),
        ("folder:{}/set/readme.md", ValueError, "is a file, expected a folder"),
        ("folder:{}/set/cat", ValueError, None),
        ("folder:{}/set/dog", ValueError, "its images lie in no class folder"),
        ("folder:{}/set,size=0", ValueError, "size='0', expected pixels"),
        ("folder:{}/set,size=a", ValueError, "size='a', expected pixels"),
        ("folder:{}/set,size=4,size=5", ValueError, "size is given twice"),
        ("folder:{}/set,resize=crop", ValueError, "needs a size"),
        ("folder:{}/set,size=4,resize=zoom", ValueError, "'zoom' is unknown, expected paper or"),
        ("nips2017:{}/set", FileNotFoundError, "there is no .*images.csv"),
    ],
)
def test_bad_folders_and_options(folder, source, error, message):
    if message is None:  # A folder of images beside a folder is a class folder with one class.
        assert data.load(source.format(folder.parent)).ids == ("more/1.bmp",)
        return
    with pytest.raises(error, match=message) as caught:
        data.load(source.format(folder.parent))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_images_of_different_sizes_need_a_size(folder):
    write(folder / "dog/2.png", PIXELS[0, :5])
    with pytest.raises(ValueError, match=r"different sizes .*name one, as ,size=224"):
        data.load(f"folder:{folder}")
    assert data.load(f"folder:{folder},size=6").images.shape == (5, 6, 6, 3)


HEADER = "ImageId,URL,TrueLabel,TargetClass\n"


def nips(folder, rows, header=HEADER):
    for index, pixels in enumerate(PIXELS):
        write(folder / f"images/{'dcba'[index]}.png", pixels)
    (folder / "images.csv").write_text(header + rows, encoding="utf-8")
    return f"nips2017:{folder}"


def test_nips2017_keeps_the_order_of_the_table_and_counts_labels_from_zero(tmp_path):
    source = nips(tmp_path, 'c,"http://a,b",1000,2\na,u,1,1\nd,u,5,1\n')
    dataset = data.load(source)
    assert dataset.ids == ("c", "a", "d") and dataset.labels.tolist() == [999, 0, 4]
    assert np.array_equal(np.rint(dataset.images * 255).astype(np.uint8), PIXELS[[1, 3, 0]])
    assert data.load(f"nips2017:{tmp_path}/images.csv", limit=1).ids == ("c",)


def test_nips2017_sets_missing_files_aside(tmp_path):
    source = data.open_source(nips(tmp_path, "a,u,1,1\nabsent,u,2,1\nb,u,3,1\n"))
    reader = Reader(as_source(source), (0.0, 1.0))
    assert [s.x is None for s in reader.read_all(range(3))] == [False, True, False]
    assert "FileNotFoundError" in reader.read(1).reason
    assert digest_of(reader) == digest_of(reader)


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        ("a,u,0,1\n", HEADER, r"line 2: TrueLabel is '0', expected 1 or more"),
        ("a,u,cat,1\n", HEADER, "TrueLabel is 'cat'"),
        ("a,u,1,1\na,u,2,1\n", HEADER, "line 3: id 'a' is missing, comes twice"),
        ("../a,u,1,1\n", HEADER, "id '../a' .* no plain name"),
        ("a\n", HEADER, "TrueLabel is ''"),
        ("", HEADER, "lists no images"),
        ("a,1\n", "name,label\n", "it has no column ImageId, TrueLabel"),
        ("", "", "it has no column"),
    ],
)
def test_bad_tables(tmp_path, rows, header, message):
    with pytest.raises(ValueError, match=message) as caught:
        data.load(nips(tmp_path, rows, header))
    assert "\n" not in str(caught.value)


def test_published_images_are_the_resized_ones(shared):
    """The 24 original PNGs against an independently resized and labelled copy."""
    original = data.load(f"nips2017:{shared}/data/nips2017/folder,size=224")
    with np.load(shared / "data/nips2017/first_100_224.npz") as arrays:
        position = {str(name): i for i, name in enumerate(arrays["ids"])}
        chosen = [position[name] for name in original.ids]
        assert np.array_equal(original.labels, arrays["y"][chosen])
        difference = np.abs(original.images - arrays["x"][chosen] / np.float32(255))
    assert original.images.shape == (24, 224, 224, 3) and difference.mean() < 0.01


def test_tiles_of_older_pillow_are_plain_tuples(folder, monkeypatch):
    opened = image_files._opened

    def older(content):
        image = opened(content)
        image.tile = [tuple(tile) for tile in image.tile]
        return image

    monkeypatch.setattr(image_files, "_opened", older)
    assert len(data.load(f"folder:{folder}").images) == 4


def test_images_of_many_sizes_stop_the_evaluation_of_a_folder_without_a_size(tmp_path):
    for i in range(9):
        write(tmp_path / "set" / "cat" / f"{i}.png", RANDOM.integers(0, 256, (8 + i % 3, 8, 3)).astype(np.uint8))

    def model(params, x):
        return jnp.stack([x.mean((1, 2, 3)), 0.4 + 0 * x.mean((1, 2, 3))], 1)

    with pytest.raises(ValueError, match=r"6 of 9 images cannot be used.*has shape.*size=224"):
        evaluate(Plan(data=f"folder:{tmp_path / 'set'}", attacks=(AttackPlan("sigma_zero"),)), tmp_path / "run",
                 model=(model, {}))
