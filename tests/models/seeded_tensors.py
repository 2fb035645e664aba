"""Random weights and images that follow from their names alone, so that no file stores them.

From PCG64's raw stream, which NumPy promises never to change, unlike its distributions; whole
numbers of 2**-24, so that every machine gets the same float32.
"""

import zlib
from collections.abc import Mapping, Sequence

import numpy as np


def uniform(name: str, shape: Sequence[int]) -> np.ndarray:
    """Numbers in [-0.5, 0.5), float32."""
    size = int(np.prod(shape))
    words = np.random.PCG64(zlib.crc32(name.encode())).random_raw((size + 1) // 2)
    bits = words.astype("<u8", copy=False).view("<u4")[:size] >> np.uint32(8)
    numbers = bits.astype(np.float32) * np.float32(2**-24) - np.float32(0.5)
    return numbers.reshape(shape)


def images(case: str, draw: int, shape: Sequence[int]) -> np.ndarray:
    """Images in [0, 1), NHWC, float32."""
    return uniform(f"{case} images {draw}", shape) + np.float32(0.5)


def cotangent(shape: Sequence[int]) -> np.ndarray:
    """Weights of the sum of logits whose gradient is compared, float32."""
    return np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)


def tensors(shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """A state dict in PyTorch's names and layout whose activations stay of order 1.

    Variances are so small that BatchNorm's and (for the class token) LayerNorm's epsilon matters.
    """
    return {name: _tensor(name, shape, shapes) for name, shape in shapes.items()}


def _tensor(name: str, shape: Sequence[int], shapes: Mapping[str, Sequence[int]]) -> np.ndarray:
    layer, _, leaf = name.rpartition(".")
    if leaf == "num_batches_tracked":
        return np.array(7)
    numbers = uniform(name, shape)
    if leaf == "running_var":
        return np.float32(0.1) * (numbers + 1)
    if len(shape) in (2, 4):  # He's variance, 2 / inputs
        return numbers * np.float32(np.sqrt(24 / np.prod(shape[1:])))
    if len(shape) == 3:  # class token and positions
        return numbers * np.float32(0.06)
    if not leaf.endswith("weight"):
        return numbers * np.float32(0.5)
    after_batch_norm = f"{layer}.running_var" in shapes
    return (numbers + 1) * np.float32(0.16 if after_batch_norm else 1)
