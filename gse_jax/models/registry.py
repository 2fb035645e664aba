"""Model names -> loaders. A new architecture is one module file and one line in `_MODELS`."""

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gse_jax.models import (
    download,
    imagenet_resnet,
    resnet,
    vgg,
    vision_transformer,
    weights_file,
    wide_resnet,
)
from gse_jax.models.classifier import Classifier, expected_params, normalization

# x in [0, 1] to [-1, 1]: what the embedded weights and the GSE authors' checkpoints were trained
# with. Other public checkpoints often use ImageNet's mean and std, which the caller must state.
DEFAULT_NORMALIZATION = "half"


class _Model(NamedTuple):
    """One registry row: the module class, and how its config follows from a state dict.

    `renamed` maps the names of public checkpoints to the module's, where they differ.
    """

    module: Callable[..., nnx.Module]
    config: Callable[[Mapping[str, np.ndarray], str], Any]
    renamed: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]] = dict


_MODELS = {
    f"resnet{depth}": _Model(
        resnet.CifarResNet, functools.partial(resnet.config_from_tensors, depth)
    )
    for depth in resnet.DEPTHS
} | {
    f"resnet{depth}": _Model(
        imagenet_resnet.ImageNetResNet,
        functools.partial(imagenet_resnet.config_from_tensors, depth),
    )
    for depth in (18, 50)
} | {
    "vgg19": _Model(vgg.VGG, vgg.config_from_tensors, vgg.renamed),
    "vit_b_16": _Model(vision_transformer.VisionTransformer,
                       vision_transformer.config_from_tensors, vision_transformer.renamed),
    "wide_resnet28_10": _Model(wide_resnet.WideResNet,
                               functools.partial(wide_resnet.config_from_tensors, 28),
                               wide_resnet.without_unused),
}

# Word for `weights` -> (model name, file). Each file is made by gse_jax.models.train.
_EMBEDDED = {"digits": ("resnet20", Path(__file__).parent / "weights/digits_resnet20.safetensors")}


def names() -> tuple[str, ...]:
    """Return the model names that `load` knows, sorted."""
    return tuple(sorted(_MODELS))


def load(
    name: str, *, weights: str | os.PathLike, normalize: Any = None
) -> tuple[Classifier, dict[Any, Any]]:
    """Load a classifier as a pure function and its parameters.

    Args:
      name: A name from `names()`, for example "resnet20".
      weights: A safetensors or npz file in PyTorch layout, with torchvision's, timm's or (for the
        WideResNet) RobustBench's names; or `hf:OWNER/REPO@REVISION` for `model.safetensors` of a
        repository on the Hugging Face Hub (`,file=NAME` for another, `,sha256=HEX` to insist on a
        content), which is fetched once; or "digits" for the ResNet-20 that is shipped with the
        package and classifies `gse_jax.data.load("digits")`. The file's shapes decide the number of
        classes, the widths and the image channels.
      normalize: What the model does to images, `(x - mean) / std`: "half" (0.5, 0.5; the default,
        which suits "digits" and other weights trained on [-1, 1] when `x` is in [0, 1]), "imagenet"
        (what torchvision's and timm's ImageNet weights were trained with, but for most of timm's ViTs, which
        want "half": see `mean` in the model's config.json), "none" (when `x`
        already is in the range that the weights were trained with), or `(mean, std)`, numbers or
        one number per channel, in the unit of the images.

    Returns:
      `(apply_fn, params)`: `apply_fn(params, x [N, H, W, C]) -> logits [N, classes]` is a hashable
      `Classifier` (see there for `features` and `head`); `params` is a nested dict of float32 JAX
      arrays, to be cast with `jax.tree.map` where another precision is wanted.

    Raises:
      ValueError: If the name, or that of `normalize`, is unknown, or the file is damaged or of another architecture.
      TypeError: If `normalize` is no pair of numbers, or `weights` no name.
      FileNotFoundError: If there is no such weight file, or it cannot be fetched.
    """
    if name not in _MODELS:
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(names())}")
    path = _weights_path(name, weights)
    model = _MODELS[name]
    tensors = model.renamed(weights_file.read(path))
    config = model.config(tensors, str(path))
    _check_tensors(tensors, model.module, config, f"{path} as {name}")
    mean, std = normalization(
        DEFAULT_NORMALIZATION if normalize is None else normalize, config.num_channels
    )
    params = jax.tree.map(jnp.asarray, weights_file.to_params(tensors))
    return Classifier(model.module, config, mean, std), params


def _weights_path(name: str, weights: str | os.PathLike) -> Path:
    if not isinstance(weights, (str, os.PathLike)):
        raise TypeError(f"weights: got {type(weights).__name__}, expected a path or 'digits'")
    if download.is_location(weights):
        return download.fetch(weights)
    if weights not in _EMBEDDED:
        return Path(weights)
    embedded_name, path = _EMBEDDED[weights]
    if name != embedded_name:
        raise ValueError(f"weights: {weights!r} is a {embedded_name}, got name={name!r}")
    return path


def _check_tensors(tensors: Mapping[str, np.ndarray], module: Callable[..., nnx.Module],
                   config: Any, source: str) -> None:
    """Compare names and shapes with what the module needs; one line says all that is wrong."""
    expected = expected_params(module, config)
    # Expected shapes are in Flax layout; broadcasting a scalar gives an array of that shape free of
    # memory, which then takes the same road back to PyTorch layout as real parameters.
    blank = jax.tree.map(lambda s: np.broadcast_to(np.float32(0), s.shape), expected)
    shapes = {name: array.shape for name, array in weights_file.to_tensors(blank).items()}
    missing = sorted(shapes.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - shapes.keys())
    wrong = [
        f"{name} {tensors[name].shape} instead of {shape}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    problems = [
        f"{what} {_listed(found)}"
        for what, found in (("lacks", missing), ("has unknown", unexpected), ("has", wrong))
        if found
    ]
    if module is resnet.CifarResNet and any("shortcut" in key or "downsample" in key
                                            for key in unexpected):
        problems.append("only parameter-free shortcuts (option A) are supported")
    if problems:
        raise ValueError(f"weights: {source}: {'; '.join(problems)}")


def _listed(found: list[str]) -> str:
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return ", ".join(found[:3]) + more
