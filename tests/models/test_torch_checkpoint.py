"""Reading PyTorch checkpoints without torch, and above all without running them."""

import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from gse_jax import models
from gse_jax.models import torch_checkpoint

REAL = Path(__file__).resolve().parent / "torch_checkpoint.pth"
NUMBERS = np.arange(24, dtype=np.float32)


def test_a_real_checkpoint_gives_its_tensors():
    found = torch_checkpoint.read(REAL)
    expected = {
        "0.weight": NUMBERS[:2].reshape(2, 1, 1, 1), "0.bias": NUMBERS[:2],
        "1.weight": NUMBERS[:2], "1.bias": NUMBERS[:2], "1.running_mean": NUMBERS[:2],
        "1.running_var": NUMBERS[:2], "1.num_batches_tracked": np.array(0),
        "transposed": NUMBERS.reshape(4, 6).T, "part": NUMBERS[[5, 7, 9]],
        "parameter": NUMBERS.reshape(2, 3, 4), "half": NUMBERS[:4].astype(np.float16),
        "bfloat": np.array([0, 0.333984375, 0.66796875, 1], np.float32),
        "double": NUMBERS[:2].astype(np.float64), "flags": np.array([True, False]),
        "bytes": np.arange(3, dtype=np.uint8), "scalar": np.array(-3),
        "empty": np.zeros((0, 3), np.float32),
    }
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array), name


def test_convert_writes_them_as_safetensors(tmp_path):
    assert models.convert(REAL, tmp_path / "out.safetensors") == 17
    written, expected = load_file(tmp_path / "out.safetensors"), torch_checkpoint.read(REAL)
    assert written.keys() == expected.keys()
    assert all(np.array_equal(written[name], array) for name, array in expected.items())
    assert os.listdir(tmp_path) == ["out.safetensors"]


class _Call:
    """Pickled as a call of any function."""

    def __init__(self, function, *arguments):
        self._call = function, arguments

    def __reduce__(self):
        return self._call


def archive(path, description, *, compression=zipfile.ZIP_STORED, **members):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", description)
        for name, content in members.items():
            file.writestr(f"archive/{name.replace('__', '/')}", content)
    return path


def dumped(value):
    return pickle.dumps(value, protocol=2)


def tensor(*, numel=4, offset=0, size=(2, 2), stride=(2, 1), kind="FloatStorage"):
    """A description of {"w": tensor}, assembled by hand."""
    out = io.BytesIO()
    out.write(b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00"
              b"storagectorch\n" + kind.encode() + b"\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu")
    out.write(integer(numel) + b"tQ" + integer(offset))
    for numbers in (size, stride):
        out.write(b"(" + b"".join(map(integer, numbers)) + b"t")
    out.write(b"\x89ccollections\nOrderedDict\n)RtRs.")
    return out.getvalue()


def integer(value):
    encoded = value.to_bytes(12, "little", signed=True)
    return b"\x8a" + struct.pack("<B", len(encoded)) + encoded


FOUR = np.arange(4, dtype="<f4").tobytes()


def test_a_description_by_hand(tmp_path):
    path = archive(tmp_path / "w", tensor(), data__0=FOUR)
    assert np.array_equal(torch_checkpoint.read(path)["w"], [[0, 1], [2, 3]])


@pytest.mark.parametrize("function", [os.system, eval, exec, __import__, open, getattr])
@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, function, protocol):
    touched = tmp_path / "touched"
    command = {eval: f"open({str(touched)!r}, 'w')", exec: f"open({str(touched)!r}, 'w')",
               os.system: f"touch {touched}"}.get(function, str(touched))
    arguments = (command, "w") if function is open else (command,)
    content = {"state_dict": {"w": _Call(function, *arguments)}}
    path = archive(tmp_path / "evil.pth", pickle.dumps(content, protocol=protocol))
    with pytest.raises(ValueError, match="evil.pth is refused: it ") as caught:
        models.convert(path, tmp_path / "out.safetensors")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert os.listdir(tmp_path) == ["evil.pth"]


@pytest.mark.parametrize("code", [b"cos\nsystem\n(X\x04\x00\x00\x00truetR.",
                                  b"(X\x04\x00\x00\x00trueios\nsystem\n.",
                                  b"(cos\nsystem\nX\x04\x00\x00\x00trueo.",
                                  b"cos\nsystem\nX\x04\x00\x00\x00true\x85\x81.",
                                  b"\x8c\x02os\x8c\x06system\x93.", b"\x82\x01.", b"P0\n.",
                                  b"ctorch._utils\n_rebuild_tensor_v2\n)b.",
                                  b"ctorch\nload\n)R.", b"ccollections\nOrderedDict\n(K\x01tR."])
def test_each_road_to_a_call_is_closed(tmp_path, code):
    with pytest.raises(ValueError, match="is refused: it "):
        torch_checkpoint.read(archive(tmp_path / "evil.pth", b"\x80\x02" + code))


BROKEN = {
    "outside": (dict(offset=1), "does not fit its storage"),
    "far": (dict(stride=(2**70, 1)), "does not fit its storage"),
    "negative_offset": (dict(offset=-1), "has size"),
    "negative_stride": (dict(stride=(-1, 1)), "stride"),
    "negative_size": (dict(size=(-1, 2)), "has size"),
    "repeated": (dict(size=(2**40, 1), stride=(0, 0)), "does not fit its storage"),
    "ranks": (dict(size=(2,)), "has size"),
    "count": (dict(numel=3), "has 4 values instead of 3"),
    "kind": (dict(kind="ComplexFloatStorage"), "unknown storage"),
    "wider": (dict(kind="DoubleStorage"), "has 2 values instead of 4"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_tensors_outside_their_storage_are_refused(tmp_path, case):
    changes, message = BROKEN[case]
    path = archive(tmp_path / "w", tensor(**changes), data__0=FOUR)
    with pytest.raises(ValueError, match=f"is refused: .*{message}") as caught:
        torch_checkpoint.read(path)
    assert "\n" not in str(caught.value)


def test_other_files_are_refused_in_one_line(tmp_path):
    plain = {"w": 1}
    files = {
        "html": (b"<html>not found</html>", "no checkpoint of torch 1.6"),
        "legacy": (dumped(0x1950A86A20F9469CFC6C), "no checkpoint of torch 1.6"),
        "cut": (REAL.read_bytes()[:-200], "truncated"),
        "empty": (b"", "truncated"),
    }
    for name, (content, message) in files.items():
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, message)
    refused(archive(tmp_path / "numbers", dumped(plain)), "holds no state dict")
    refused(archive(tmp_path / "list", dumped([1, 2])), "holds no state dict")
    refused(archive(tmp_path / "zipped", dumped(plain), compression=zipfile.ZIP_DEFLATED),
            "is refused: it is compressed")
    refused(archive(tmp_path / "big", tensor(), data__0=FOUR, byteorder="big"), "little-endian")
    refused(archive(tmp_path / "absent", tensor()), "description is broken")
    refused(archive(tmp_path / "early", tensor()[:-30], data__0=FOUR), "ends early|broken")
    refused(archive(tmp_path / "underflow", b"\x80\x02R."), "description is broken")
    with zipfile.ZipFile(tmp_path / "other", "w") as file:
        file.writestr("a.txt", "text")
    refused(tmp_path / "other", "holds no data.pkl")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        torch_checkpoint.read(tmp_path / "nowhere")


def refused(path, message):
    with pytest.raises(ValueError, match=message) as caught:
        torch_checkpoint.read(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_damage_at_any_place_is_one_line(tmp_path):
    """Every byte of the description flipped: tensors or ValueError, nothing else."""
    description = tensor()
    for position in range(len(description)):
        for flip in (1, 0x80):
            damaged = bytearray(description)
            damaged[position] ^= flip
            path = archive(tmp_path / "w", bytes(damaged), data__0=FOUR)
            try:
                torch_checkpoint.read(path)
            except ValueError as error:
                assert "\n" not in str(error)
