"""Weight files: safetensors or npz in PyTorch layout <-> nested dicts of arrays.

A PyTorch state dict and our `params` differ mechanically: dots become nesting, convolution kernels
go from OIHW to HWIO, linear kernels are transposed, and BatchNorm's four vectors have other names.
So no table per architecture is needed, as long as a module names its layers like the checkpoint.
Pickles are refused: loading one can run any code.

References:
  safetensors format: https://github.com/huggingface/safetensors#format
"""

import os
import shlex
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gse_jax.data.atomic import replacing

_FROM_TORCH = {"running_mean": "mean", "running_var": "var", "bias": "bias"}
_TO_TORCH = {"mean": "running_mean", "var": "running_var", "bias": "bias", "scale": "weight"}


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read a weight file as float32 arrays by PyTorch name.

    A leading `module.` (left by DataParallel) is dropped, `fc.` becomes `linear.`, and
    `num_batches_tracked`, which evaluation does not use, is left out.

    Args:
      path: A safetensors or npz file; its content decides, not its name.

    Returns:
      Arrays by name, in PyTorch layout.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If it is a pickle, an HTML page, truncated, empty, or holds other than finite
        floating-point numbers.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"weights: {path} {what}; expected a .safetensors or .npz file")
    tensors = {}
    for name, array in _read_arrays(path).items():
        name = plain_name(name)
        if name is None:
            continue
        if name in tensors:
            raise ValueError(f"weights: {path} holds {name} twice (with and without a prefix)")
        floats = array.dtype.kind == "f" or array.dtype.name == "bfloat16"
        if not floats or not np.isfinite(as_float := array.astype("f4")).all():
            raise ValueError(f"weights: {path}: {name} ({array.dtype}) must be finite floats (and bfloat16 in a "
                             "safetensors file)")
        tensors[name] = as_float
    if not tensors:
        raise ValueError(f"weights: {path} holds no tensors")
    return tensors


def plain_name(name: str) -> str | None:
    """Return the name under which a tensor of a checkpoint is known here.

    Args:
      name: As stored.

    Returns:
      The name without `module.` in front and with `linear.` for `fc.`; None for a counter that
      evaluation does not use.
    """
    name = name.removeprefix("module.")
    if name.endswith("num_batches_tracked"):
        return None
    return "linear." + name.removeprefix("fc.") if name.startswith("fc.") else name


def to_params(tensors: Mapping[str, np.ndarray]) -> dict[Any, Any]:
    """Convert PyTorch names and layout to a nested dict in Flax names and layout.

    Args:
      tensors: Arrays by PyTorch name; rank 4 is OIHW, rank 2 is `[out, in]`, rank 3 is a token or
        position table of a transformer.

    Returns:
      Nested dict of NumPy arrays; kernels are HWIO and `[in, out]`, block numbers are ints.

    Raises:
      ValueError: If a name has another ending than PyTorch's, or nests under an array.
    """
    params: dict[Any, Any] = {}
    for name, array in tensors.items():
        *parents, leaf = name.split(".")
        if leaf == "weight" and array.ndim in (1, 2, 4):
            leaf = "scale" if array.ndim == 1 else "kernel"
        elif leaf in _FROM_TORCH:
            leaf = _FROM_TORCH[leaf]
        elif array.ndim != 3 or leaf == "weight":  # Tokens and positions keep names and layout.
            raise ValueError(f"weights: unexpected tensor {name} of shape {array.shape}")
        node = params
        for key in parents:
            node = node.setdefault(int(key) if key.isdigit() else key, {})
        axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(array.ndim)
        node[leaf] = array if axes is None else array.transpose(axes)
    return params


def to_tensors(params: Mapping[Any, Any]) -> dict[str, np.ndarray]:
    """Convert `params` back to PyTorch names and layout; inverse of `to_params`.

    Args:
      params: Nested dict of arrays, as returned by `gse_jax.models.load`.

    Returns:
      Arrays by PyTorch name, views where that suffices.

    Raises:
      TypeError: If `params` is not a nested dict of arrays named as by `to_params`.
    """
    tensors: dict[str, np.ndarray] = {}

    def visit(prefix: str, node: Any) -> None:
        for key, value in node.items():
            if isinstance(value, Mapping):
                visit(f"{prefix}{key}.", value)
                continue
            array = np.asarray(value)
            axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(array.ndim)
            if key == "kernel" and axes is not None:
                name, array = "weight", array.transpose(axes)
            elif key in _TO_TORCH and array.ndim == 1:
                name = _TO_TORCH[key]
            elif array.ndim == 3:
                name = str(key)
            else:
                raise TypeError(f"params: cannot name {prefix}{key} of shape {array.shape}")
            tensors[prefix + name] = array

    if not isinstance(params, Mapping) or not params:
        raise TypeError(f"params: got {type(params).__name__}, expected a nested dict of arrays")
    visit("", params)
    return tensors


def save(path: str | os.PathLike, params: Mapping[Any, Any]) -> None:
    """Write `params` as a safetensors file in PyTorch layout.

    The file is written beside its destination, flushed and renamed: a reader sees the old file or
    the whole new one, also after a crash.

    Args:
      path: Destination, overwritten if present; its folder must exist.
      params: Nested dict of arrays, as returned by `gse_jax.models.load`.

    Raises:
      FileNotFoundError: If the folder does not exist.
      TypeError: If `params` is not a nested dict of arrays.
    """
    from safetensors import numpy as safetensors

    content = safetensors.save({name: np.ascontiguousarray(array) for name, array in to_tensors(params).items()})
    with replacing(Path(path)) as file:
        file.write(content)


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, deserialize

    with path.open("rb") as file:
        start = file.read(512)
    if start.startswith(b"PK\x03\x04"):
        return _read_npz(path)
    # Safetensors: 8 bytes of header length, then "{". Without that test a length byte could be "<".
    if start[8:9] != b"{":
        _refuse_known(path, start)
    try:
        views = deserialize(path.read_bytes())
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(
            f"weights: {path} is truncated or no safetensors/npz file ({error}); fetch it again"
        ) from None
    return {name: np.frombuffer(view["data"], _dtype(path, name, view["dtype"])).reshape(view["shape"])
            for name, view in views}


def _dtype(path: Path, name: str, stored: str):
    """The dtype of safetensors' F32, I64, BOOL ...; its own reader for NumPy knows no BF16."""
    if stored == "BF16":
        import jax.numpy as jnp

        return jnp.dtype(jnp.bfloat16)
    kind, bits = stored[:1], stored[1:]
    if stored == "BOOL":
        return np.dtype(bool)
    if kind not in "FIUC" or not bits.isdecimal():
        raise ValueError(f"weights: {path}: {name} is stored as {stored}; convert it to 16 or 32 bits")
    return np.dtype(f"{kind.lower()}{int(bits) // 8}")


def _refuse_known(path: Path, start: bytes) -> None:
    """Raise for the contents that are often found under a weight file's name."""
    if start.lstrip().startswith(b"<"):
        raise ValueError(f"weights: {path} is an HTML page, not weights; download the file itself")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"weights: {path} is a Git LFS pointer, not weights; run git lfs pull")
    if start.startswith(b"\x80"):
        raise ValueError(_pickle_message(path))


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            is_pickle = any(name.endswith("data.pkl") for name in archive.namelist())
        if not is_pickle:
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
        raise ValueError(
            f"weights: {path} is truncated or holds Python objects ({error}); fetch it again"
        ) from None
    raise ValueError(_pickle_message(path))


def _pickle_message(path: Path) -> str:
    return (
        f"weights: {path} is a PyTorch pickle, which can run code when loaded; convert it once, "
        f"without running any: gse-jax convert {shlex.quote(str(path))} --out "
        f"{shlex.quote(str(path.with_suffix('.safetensors')))}"
    )
