"""What a run's results depend on, as texts that can be compared and shown.

Devices, lanes, batch sizes and shards are left out on purpose: they change the speed only.
"""

import hashlib
import importlib.metadata
import platform
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import gse_jax
from gse_jax.evaluation.cases import Group

_PACKAGES = ("jax", "jaxlib", "numpy", "flax", "pillow", "scikit-image")
# These take part in the numbers; another major version stops a resume.
_DECISIVE = ("gse_jax", "jax")


def weights_digest(params) -> str:
    """Hash names, shapes, dtypes and values of all arrays.

    Args:
        params: pytree of arrays.

    Returns:
        SHA-256 in hexadecimal.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())  # .data knows no bfloat16
    return digest.hexdigest()


def model_name(apply_fn) -> str:
    """Name a model function without anything that changes between processes.

    Args:
        apply_fn: (params, x) -> logits.

    Returns:
        Description; for a `Classifier` its architecture and normalisation.
    """
    kind = type(apply_fn)
    if hasattr(apply_fn, "__qualname__"):
        return f"{apply_fn.__module__}.{apply_fn.__qualname__}"
    fields = getattr(apply_fn, "__dataclass_fields__", {})
    values = {name: getattr(apply_fn, name) for name in fields}
    shown = ", ".join(f"{name}={model_name(value) if callable(value) else repr(value)}"
                      for name, value in values.items())
    return f"{kind.__module__}.{kind.__qualname__}({shown})"


def program_digest(params, apply_fn, image_shape, dtype) -> str:
    """Hash what a model function computes: two functions of one name may close over other options.

    Args:
        params: the model's parameters; their values do not matter.
        apply_fn: (params, x) -> logits.
        image_shape: (H, W, C).
        dtype: of the images.

    Returns:
        JAX's version and the SHA-256, in hexadecimal, of the traced program and of the arrays that it holds.
    """
    images = jax.ShapeDtypeStruct((2, *image_shape), dtype)
    closed = jax.make_jaxpr(lambda params, x: apply_fn(params, x))(params, images)
    digest = hashlib.sha256(re.sub("0x[0-9a-f]+", "", str(closed.jaxpr)).encode())
    for array in _arrays_in(closed):
        if jax.dtypes.issubdtype(getattr(array, "dtype", None), jax.dtypes.prng_key):
            array = jax.random.key_data(array)
        array = np.asarray(array)
        digest.update(f"{array.dtype} {array.shape}\n".encode() + array.tobytes())
    return f"{jax.__version__} {digest.hexdigest()}"


def _arrays_in(closed):
    """Constants of a jaxpr and of those inside it: only their shapes are in its text."""
    yield from getattr(closed, "consts", ())
    for equation in getattr(closed, "jaxpr", closed).eqns:
        for value in equation.params.values():
            for part in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(part, "eqns"):  # both kinds of jaxprs
                    yield from _arrays_in(part)


def versions() -> dict[str, str]:
    """Return the full versions of Python and of the packages that take part."""
    found = {"python": platform.python_version(), "gse_jax": gse_jax.__version__}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def fingerprint(*, params, apply_fn, data: str, num_samples: int, image_shape, dtype, bounds, seed: int,
                groups: Sequence[Group]) -> dict[str, Any]:
    """Collect everything that decides the results.

    Args:
        params: the model's parameters.
        apply_fn: (params, x) -> logits.
        data: `sources.digest_of` the data.
        num_samples: N.
        image_shape: (H, W, C).
        dtype: of the images.
        bounds: (low, high).
        seed: of the run.
        groups: the attacks.

    Returns:
        Flat dict of plain values; equal for runs that may be joined.
    """
    found = versions()
    values: dict[str, Any] = {
        "weights": weights_digest(params), "model": model_name(apply_fn),
        "program of the model": program_digest(params, apply_fn, image_shape, dtype), "data": data,
        "num_samples": num_samples, "dtype": str(np.dtype(dtype)), "bounds": list(bounds),
        "seed": seed, "cases": [case.name for group in groups for case in group.cases],
    }
    for package in _DECISIVE:
        values[f"version of {package}"] = _major(found[package])
    for group in groups:
        for case in group.cases:
            described = group.describe()
            for name in ("method", "targeted"):
                values[f"{case.name}: {name}"] = described[name]
            for kind in ("settings", "hyperparams"):
                for name, value in described[kind].items():
                    values[f"{case.name}: {kind}.{name}"] = value
            if case.targets is not None:
                text = repr(sorted(case.targets.items())).encode()
                values[f"{case.name}: targets"] = hashlib.sha256(text).hexdigest()
    return values


def differences(stored: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Compare two fingerprints.

    Args:
        stored: of the run directory.
        now: of this call.

    Returns:
        One line per difference, e.g. "seed: 0 in the run, now 1"; empty if they agree.
    """
    lines = []
    for name in [*stored, *(name for name in now if name not in stored)]:
        before, after = stored.get(name, "absent"), now.get(name, "absent")
        if name == "program of the model" and before.split()[0] != after.split()[0]:
            continue  # another version of JAX may trace another program, and old runs know none
        if name == "cases" and set(before) == set(after):
            continue  # their order changes no result
        if before != after:
            lines.append(f"{name}: {_short(before)} in the run, now {_short(after)}")
    return lines


def _short(value):
    before, space, last = str(value).rpartition(" ")
    is_digest = len(last) == 64 and set(last) <= set("0123456789abcdef")
    return before + space + (last[:12] if is_digest else last)


def _major(version: str) -> str:
    """Return the part that changes when results may: before 1.0 that is the second number."""
    parts = version.split(".")
    return ".".join(parts[:2]) if parts[0] == "0" else parts[0]
