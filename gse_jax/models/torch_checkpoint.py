"""Tensors of a PyTorch checkpoint, read without PyTorch and without running anything in it.

A checkpoint is a zip archive: `data.pkl` describes the tensors, `data/KEY` holds their bytes. The
description is a program for Python's pickle machine, whose GLOBAL and REDUCE instructions can call
any function. Here is a machine of our own for the few instructions that `torch.save` emits: it
imports nothing, and names are plain text to it. Five of them mean something (an ordered dict, a
tensor, a parameter, a kind of storage); any other ends the reading with an error.

References:
  The instructions: https://docs.python.org/3/library/pickletools.html and PEP 307 (protocol 2).
"""

import math
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gse_jax.data.atomic import replacing

_DICT, _TENSOR, _PARAMETER = (
    "collections.OrderedDict", "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter")
_STORAGES = {
    "torch.FloatStorage": "<f4", "torch.DoubleStorage": "<f8", "torch.HalfStorage": "<f2",
    "torch.LongStorage": "<i8", "torch.IntStorage": "<i4", "torch.ShortStorage": "<i2",
    "torch.CharStorage": "i1", "torch.ByteStorage": "u1", "torch.BoolStorage": "?",
    # NumPy has no bfloat16: the upper half of a float32, widened after reading.
    "torch.BFloat16Storage": "<u2",
}
# Under these keys training scripts keep the state dict beside the epoch and the like.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net")


class _Name(NamedTuple):
    """A name that the description asks for; never imported."""

    text: str


class _Storage(NamedTuple):
    """Numbers of one kind, not yet cut into tensors."""

    values: np.ndarray
    kind: str


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read the tensors of a `torch.save`d state dict.

    Args:
      path: A file of torch 1.6 or newer: a state dict, or a dict that holds one as `state_dict`,
        `model_state_dict`, `model` or `net`.

    Returns:
      Arrays by name, in the file's dtypes (bfloat16 as float32).

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If it is no such file, is damaged, or holds other than tensors, dicts, lists,
        numbers and texts.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights: there is no file {path}")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"weights: {path} is truncated or no checkpoint of torch 1.6 or newer; "
                         "for an older one load it in torch, which can run its code, and save it "
                         "again")
    try:
        with zipfile.ZipFile(path) as archive:
            root = _described(archive)
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError) as error:
        raise ValueError(f"weights: {path} is damaged ({error}); fetch it again") from None
    except _Refused as error:
        raise ValueError(f"weights: {path} is refused: {error}") from None
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, struct.error) as error:
        # The machine checks no types: whatever a broken description leads to is the same to users.
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        raise ValueError(f"weights: {path}: its description is broken ({reason})") from None
    tensors = _state_dict(root)
    if not tensors:
        raise ValueError(f"weights: {path} holds no state dict (tensors by name, alone or as "
                         f"{', '.join(_WRAPPERS)})")
    return tensors


def convert(path: str | os.PathLike, out: str | os.PathLike) -> int:
    """Write the tensors of a PyTorch checkpoint as a safetensors file that `load` reads.

    Args:
      path: As in `read`.
      out: Destination, overwritten if present; whole or not there. Its folder must exist.

    Returns:
      Number of tensors; names, shapes and dtypes are kept (bfloat16 becomes float32).

    Raises:
      FileNotFoundError: As in `read`; if the folder of `out` does not exist.
      ValueError: As in `read`.
    """
    from safetensors import numpy as safetensors

    tensors = read(path)
    with replacing(Path(out)) as file:
        file.write(safetensors.save(tensors))
    return len(tensors)


class _Refused(Exception):
    """The description asks for something that is none of a checkpoint's."""


def _described(archive: zipfile.ZipFile) -> Any:
    """Return the object that the archive describes."""
    entries = {info.filename: info for info in archive.infolist()}
    description = [name for name in entries if name.rsplit("/", 1)[-1] == "data.pkl"]
    if len(description) != 1:
        raise _Refused("it holds no data.pkl, so it is no PyTorch checkpoint")
    prefix = description[0].removesuffix("data.pkl")
    # torch stores without compression; what is compressed could grow without bound.
    if any(info.compress_type != zipfile.ZIP_STORED for info in entries.values()):
        raise _Refused("it is compressed, which torch never does")
    order = entries.get(f"{prefix}byteorder")
    if order is not None and archive.read(order) != b"little":
        raise _Refused("its numbers are not little-endian")

    def storage(identifier: Any) -> _Storage:
        word, name, key, _, count = identifier
        if word != "storage" or not isinstance(name, _Name) or name.text not in _STORAGES:
            raise _Refused(f"unknown storage {str(identifier)[:80]}")
        values = np.frombuffer(archive.read(f"{prefix}data/{key}"), _STORAGES[name.text])
        if len(values) != count:
            raise _Refused(f"storage {key} has {len(values)} values instead of {count}")
        return _Storage(values, name.text)

    return _Machine(archive.read(description[0]), storage).run()


def _state_dict(root: Any) -> dict[str, np.ndarray]:
    """Return the tensors by name; nothing where the object holds no state dict."""
    wrapped = [root[key] for key in _WRAPPERS if isinstance(root, dict) and key in root]
    for candidate in (*wrapped, root):
        if isinstance(candidate, dict):
            tensors = {name: value for name, value in candidate.items()
                       if isinstance(name, str) and isinstance(value, np.ndarray)}
            if tensors:
                return tensors
    return {}


def _called(name: Any, arguments: tuple[Any, ...]) -> Any:
    """Do what one of the known names means."""
    text = name.text if isinstance(name, _Name) else type(name).__name__
    if text == _DICT and not arguments:
        return {}
    if text == _TENSOR:
        return _tensor(*arguments[:4])
    if text == _PARAMETER:
        return arguments[0]
    raise _Refused(f"it calls {text[:80]}, which is none of a state dict's; save the state dict "
                   "alone")


def _tensor(storage: _Storage, offset: int, size: tuple[int, ...],
            stride: tuple[int, ...]) -> np.ndarray:
    """Cut a tensor out of its storage, which must hold it: strides can reach anywhere in memory."""
    values = storage.values
    if len(size) != len(stride) or min((offset, *size, *stride), default=0) < 0:
        raise _Refused(f"a tensor has size {size}, stride {stride}, offset {offset}")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if count and (last >= len(values) or count > len(values)):
        raise _Refused(f"a tensor of size {size} does not fit its storage of {len(values)} values")
    if not count:
        array = np.empty(size, values.dtype)
    else:
        steps = [step * values.itemsize for step in stride]
        array = np.lib.stride_tricks.as_strided(values[offset:], size, steps).copy()
    if storage.kind == "torch.BFloat16Storage":
        return (array.astype("<u4") << np.uint32(16)).view("<f4")
    return array


class _Machine:
    """The pickle machine without its imports and calls; one method per kind of instruction."""

    def __init__(self, program: bytes, storage: Callable[[Any], Any]):
        self._program, self._position = program, 0
        self._storage = storage
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Execute to the STOP instruction and return what lies on top."""
        while (code := self._take(1)) != b".":
            if code in _VALUES:
                self._stack.append(_VALUES[code](self))
            elif code in _ACTIONS:
                _ACTIONS[code](self)
            else:
                raise _Refused(f"it has the pickle instruction {code!r}, which torch never writes")
        return self._stack.pop()

    def _take(self, count: int) -> bytes:
        taken = self._program[self._position : self._position + count]
        if len(taken) != count:
            raise EOFError("its description ends early")
        self._position += count
        return taken

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _line(self) -> str:
        end = self._program.index(b"\n", self._position)
        return self._take(end + 1 - self._position)[:-1].decode()

    def _since_mark(self) -> list[Any]:
        start = self._marks.pop()
        taken, self._stack[start:] = self._stack[start:], []
        return taken

    def _top(self, count: int) -> tuple[Any, ...]:
        if len(self._stack) < count:
            raise IndexError("its description takes more than there is")
        taken, self._stack[len(self._stack) - count :] = self._stack[-count:], []
        return tuple(taken)

    def _name(self) -> _Name:
        module = self._line()
        return _Name(f"{module.replace('__builtin__', 'builtins')}.{self._line()}")

    def _put(self, form: str) -> None:
        self._memo[self._number(form)] = self._stack[-1]

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict):
            raise _Refused("it sets items of other than a dict")
        target.update(zip(items[::2], items[1::2], strict=True))

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, list):
            raise _Refused("it appends to other than a list")
        target.extend(items)

    def _build(self) -> None:
        """Leave attributes away: a state dict's `_metadata` is of no use here."""
        self._top(1)
        if not isinstance(self._stack[-1], dict):
            raise _Refused("it sets attributes of other than a dict")

    def _reduce(self) -> None:
        name, arguments = self._top(2)
        self._stack.append(_called(name, arguments))


# Instructions that push one value, and those that change the stack. Letters: PEP 307.
_VALUES: dict[bytes, Callable[[_Machine], Any]] = {
    b"N": lambda m: None,
    b"\x88": lambda m: True,
    b"\x89": lambda m: False,
    b"J": lambda m: m._number("<i"),
    b"K": lambda m: m._number("<B"),
    b"M": lambda m: m._number("<H"),
    b"\x8a": lambda m: int.from_bytes(m._take(m._number("<B")), "little", signed=True),
    b"G": lambda m: m._number(">d"),
    b"X": lambda m: m._take(m._number("<I")).decode(),
    b"c": lambda m: m._name(),
    b"}": lambda m: {},
    b"]": lambda m: [],
    b")": lambda m: (),
    b"\x85": lambda m: m._top(1),
    b"\x86": lambda m: m._top(2),
    b"\x87": lambda m: m._top(3),
    b"t": lambda m: tuple(m._since_mark()),
    b"h": lambda m: m._memo[m._number("<B")],
    b"j": lambda m: m._memo[m._number("<I")],
    b"Q": lambda m: m._storage(m._top(1)[0]),
}
_ACTIONS: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": lambda m: m._number("<B"),
    b"(": lambda m: m._marks.append(len(m._stack)),
    b"q": lambda m: m._put("<B"),
    b"r": lambda m: m._put("<I"),
    b"s": lambda m: m._set_items(list(m._top(2))),
    b"u": lambda m: m._set_items(m._since_mark()),
    b"a": lambda m: m._extend(list(m._top(1))),
    b"e": lambda m: m._extend(m._since_mark()),
    b"b": lambda m: m._build(),
    b"R": lambda m: m._reduce(),
}
