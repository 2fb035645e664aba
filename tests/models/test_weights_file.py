"""Weight files: every accepted spelling, every damage, and saving."""

import json
import os
import pickle
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.models.numpy_resnet import random_tensors
from safetensors.numpy import load_file, save_file

from gse_jax import models
from gse_jax.models.weights_file import plain_name, to_params

SHAPE = dict(blocks=3, widths=(2, 4, 6), num_classes=4, num_channels=3)
TENSORS = random_tensors(np.random.default_rng(0), **SHAPE)


def load(path, name="resnet20"):
    return models.load(name, weights=path)


def leaves_of(tensors, path):
    save_file(tensors, path)
    return jax.tree.leaves(load(path)[1])


def test_other_spellings_of_the_same_weights(tmp_path):
    expected = leaves_of(TENSORS, tmp_path / "plain")
    counters = {"bn1.num_batches_tracked": np.array(7), **TENSORS}
    prefixed = {f"module.{name}": array for name, array in counters.items()}
    fc = {name.replace("linear.", "fc."): array for name, array in TENSORS.items()}
    spellings = [leaves_of(t, tmp_path / "other") for t in (counters, prefixed, fc)]
    np.savez(tmp_path / "weights.npz", **prefixed)
    spellings.append(jax.tree.leaves(load(str(tmp_path / "weights.npz"))[1]))
    for leaves in spellings:
        assert all(np.array_equal(a, b) for a, b in zip(leaves, expected, strict=True))


def test_only_the_front_of_a_name_is_dropped():
    assert plain_name("module.fc.bias") == "linear.bias"
    assert plain_name("blocks.module.fc.bias") == "blocks.module.fc.bias"


def test_a_weight_of_rank_3_has_no_name_here():
    with pytest.raises(ValueError, match=r"unexpected tensor conv.weight of shape \(2, 3, 5\)"):
        to_params({"conv.weight": np.zeros((2, 3, 5), np.float32)})
    assert to_params({"cls_token": np.zeros((1, 1, 4))})["cls_token"].shape == (1, 1, 4)


def test_half_precision_files_are_widened(tmp_path):
    half = {name: array.astype(np.float16) for name, array in TENSORS.items()}
    leaves = leaves_of(half, tmp_path / "half")
    exact = leaves_of({n: a.astype(np.float32) for n, a in half.items()}, tmp_path / "exact")
    assert all(np.array_equal(a, b) for a, b in zip(leaves, exact, strict=True))


def test_bfloat16_files_are_widened(tmp_path):
    half = {name: np.asarray(array, jnp.bfloat16) for name, array in TENSORS.items()}
    parts, header = [], {}
    for name, array in half.items():
        begin = sum(map(len, parts))
        parts.append(array.tobytes())
        header[name] = {"dtype": "BF16", "shape": list(array.shape), "data_offsets": [begin, begin + array.nbytes]}
    text = json.dumps(header).encode()
    (tmp_path / "half").write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))
    exact = leaves_of({n: a.astype(np.float32) for n, a in half.items()}, tmp_path / "exact")
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(load(tmp_path / "half")[1]), exact, strict=True))
    (tmp_path / "eighth").write_bytes((tmp_path / "half").read_bytes().replace(b'"BF16"', b'"F8_X"'))
    with pytest.raises(ValueError, match="truncated|F8_X"):
        load(tmp_path / "eighth")


def changed(**changes):
    """Return TENSORS with entries replaced, or left out where the new value is None."""
    merged = {**TENSORS, **{name.replace("__", "."): a for name, a in changes.items()}}
    return {name: array for name, array in merged.items() if array is not None}


NAN = np.full_like(TENSORS["linear.bias"], np.nan)
WRONG_TENSORS = {
    "missing": (changed(layer3__2__bn2__bias=None), r"lacks layer3.2.bn2.bias$"),
    "many_missing": (
        {n: a for n, a in TENSORS.items() if "layer1.1.bn" not in n},
        r"lacks layer1.1.bn1.bias, .* and 5 more$",
    ),
    "unexpected": (changed(extra__weight=TENSORS["linear.weight"]), r"unknown extra.weight$"),
    "odd_name": (changed(layer1__0__gain=TENSORS["linear.bias"]), r"unknown layer1.0.gain$"),
    "shape": (
        changed(linear__bias=TENSORS["linear.bias"][:2]),
        r"linear.bias \(2,\) instead of \(4,\)$",
    ),
    "option_b": (
        changed(layer2__0__shortcut__0__weight=TENSORS["conv1.weight"]),
        r"unknown layer2.0.shortcut.0.weight; only parameter-free shortcuts",
    ),
    "other_family": ({"features.0.weight": TENSORS["conv1.weight"]}, r"is no CIFAR ResNet"),
    "other_depth": (
        random_tensors(np.random.default_rng(0), **{**SHAPE, "blocks": 5}),
        r"5/5/5 blocks .* resnet20 has 3 in each; load it as resnet32$",
    ),
    "bottleneck_depths": (
        changed(layer2__3__conv1__weight=TENSORS["conv1.weight"]),
        r"3/4/3 blocks .* resnet20 has 3 in each$",
    ),
    "narrowing": (
        random_tensors(np.random.default_rng(0), **{**SHAPE, "widths": (4, 4, 4)})
        | {"layer2.0.conv2.weight": np.zeros((2, 2, 3, 3), np.float32)},
        r"widths that do not decrease",
    ),
    "nan": (changed(linear__bias=NAN), r"linear.bias \(float32\) must be finite floats"),
    "integers": (changed(linear__bias=np.arange(4)), r"\(int64\) must be finite floats"),
    "twice": (changed(fc__bias=TENSORS["linear.bias"]), r"holds linear.bias twice"),
    "empty": ({}, r"holds no tensors"),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_wrong_tensors_are_refused_in_one_line(tmp_path, case):
    tensors, message = WRONG_TENSORS[case]
    save_file(tensors, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path / "wrong.safetensors")
    assert "wrong.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def torch_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights/data.pkl", pickle.dumps({}))


def object_npz(path):
    with open(path, "wb") as file:
        np.savez(file, a=np.array([{}], dtype=object))


def plain_npz(path):
    with open(path, "wb") as file:
        np.savez(file, **TENSORS)


def cut(path, save):
    save(path)
    path.write_bytes(path.read_bytes()[:-100])


def bfloat16_npz(path):
    """NumPy stores it as two bytes of no kind."""
    with open(path, "wb") as file:
        np.savez(file, **{name: np.asarray(jnp.asarray(a, jnp.bfloat16)) for name, a in TENSORS.items()})


DAMAGED = {
    "npz_bfloat16": (bfloat16_npz, r"must be finite floats \(and bfloat16 in a safetensors file\)"),
    "html": (lambda p: p.write_bytes(b"\n<!DOCTYPE html><p>404</p>"), r"is an HTML page"),
    "lfs": (lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), r"LFS"),
    "pickle": (lambda p: p.write_bytes(pickle.dumps({})), r"is a PyTorch pickle"),
    "torch_zip": (torch_zip, r"is a PyTorch pickle"),
    "npz_objects": (object_npz, r"weights is truncated or holds Python objects"),
    "npz_cut": (lambda p: cut(p, plain_npz), r"is truncated"),
    "cut": (lambda p: cut(p, lambda p: save_file(TENSORS, p)), r"is truncated"),
    "cut_header": (lambda p: p.write_bytes(b"\x40\0\0"), r"is truncated"),
    "empty": (lambda p: p.write_bytes(b""), r"is truncated"),
    "noise": (lambda p: p.write_bytes(bytes(range(200))), r"is truncated or no safetensors"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_refused_in_one_line(tmp_path, case):
    make, message = DAMAGED[case]
    make(tmp_path / "weights")
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path / "weights")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_header_length_that_looks_like_html_is_no_html(tmp_path):
    # Lengths are multiples of 8; 0x3C20 is stored as " <", which an HTML page may start with too.
    save_file(TENSORS, tmp_path / "w", metadata={"note": ""})
    length = int.from_bytes((tmp_path / "w").read_bytes()[:8], "little")
    save_file(TENSORS, tmp_path / "w", metadata={"note": "x" * (0x3C20 - length)})
    assert (tmp_path / "w").read_bytes()[:2] == b" <"
    load(tmp_path / "w")


def test_missing_file_folder_and_unknown_names(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        load(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        load(tmp_path)
    with pytest.raises(ValueError, match="name: got 'resnet21', expected one of resnet18, resnet2"):
        load("digits", "resnet21")
    with pytest.raises(ValueError, match="'digits' is a resnet20, got name='resnet32'"):
        load("digits", "resnet32")
    with pytest.raises(TypeError, match="weights: got int"):
        load(3)


def test_save_writes_pytorch_layout_and_loads_back(tmp_path):
    save_file(TENSORS, tmp_path / "a")
    apply_fn, params = load(tmp_path / "a")
    models.save(tmp_path / "b", params)
    saved = load_file(tmp_path / "b")
    assert saved.keys() == TENSORS.keys()
    assert all(np.array_equal(saved[name], array) for name, array in TENSORS.items())
    again, again_params = load(tmp_path / "b")
    assert again == apply_fn
    models.save(tmp_path / "c", again_params)
    assert (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    _, params = load("digits")
    (tmp_path / "kept").write_bytes(b"old")

    def full_disk(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="no space left"):
            models.save(tmp_path / "kept", params)
    with pytest.raises(TypeError, match="params: cannot name conv1.filter"):
        models.save(tmp_path / "kept", {"conv1": {"filter": np.ones((2, 2))}})
    with pytest.raises(TypeError, match="params: got list"):
        models.save(tmp_path / "kept", [params])
    assert (tmp_path / "kept").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["kept"]


def test_save_needs_its_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; create it first"):
        models.save(tmp_path / "absent" / "w", load("digits")[1])
