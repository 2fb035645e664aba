"""The architectures against the original PyTorch modules' logits and input gradients.

The goldens are make_torch_goldens.py's; torch is not needed here.
"""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from tests.models import seeded_tensors

from gse_jax import models

GOLDENS = np.load(Path(__file__).parent / "torch_goldens.npz", allow_pickle=False)
# "model library size"
CASES = sorted({name.split("/")[0] for name in GOLDENS.files})


@functools.partial(jax.jit, static_argnums=0)
def logits_and_gradient(apply_fn, params, images, cotangent):
    logits, pull_back = jax.vjp(lambda x: apply_fn(params, x), images)
    return logits, pull_back(cotangent)[0]


def relative_errors(found, expected):
    """Differences in each image, relative to its largest value."""
    axes = tuple(range(1, expected.ndim))
    return (np.abs(np.asarray(found, np.float64) - expected)
            / np.abs(expected).max(axes, keepdims=True))


def answers(case, folder):
    """Golden arrays, and logits and gradient of the model that is loaded from a file."""
    golden = {name.split("/")[1]: GOLDENS[name] for name in GOLDENS.files
              if name.startswith(f"{case}/")}
    file = folder / f"{case}.safetensors"
    save_file(seeded_tensors.tensors(json.loads(str(golden["shapes"]))), file)
    apply_fn, params = models.load(case.split()[0], weights=file,
                                   normalize=str(golden["normalize"]))
    file.unlink()  # up to 570 MB
    images = seeded_tensors.images(case, int(golden["draw"]), golden["images"])
    expected = golden["logits"]
    # Not a comparison of constants: logits differ between classes and images.
    assert np.ptp(expected, -1).min() > 0.1
    assert len(expected) == 1 or np.abs(expected[0] - expected[1]).max() > 1e-2
    logits, gradient = map(np.asarray, logits_and_gradient(
        apply_fn, params, images, seeded_tensors.cotangent(expected.shape)))
    assert logits.dtype == gradient.dtype == np.float32
    return golden, logits, gradient


@pytest.mark.parametrize("case", [
    pytest.param(c, marks=[pytest.mark.slow] if c.startswith(("resnet50", "vgg19", "wide")) else [])
    for c in CASES if c.endswith("small")])
def test_logits_and_input_gradients_equal_pytorch(tmp_path, case):
    golden, logits, gradient = answers(case, tmp_path)
    assert relative_errors(logits, golden["logits"]).max() < 1e-4
    assert relative_errors(gradient, golden["gradient"]).max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in CASES if c.endswith("full")])
def test_published_sizes_equal_pytorch(tmp_path, case):
    golden, logits, gradient = answers(case, tmp_path)
    assert relative_errors(logits, golden["logits"]).max() < 1e-4
    # Among ten million ReLUs a few are so close to zero that float32 decides otherwise than
    # float64; that moves the gradient of the pixels that see them, so it is its median that counts.
    assert np.median(relative_errors(gradient[:, ::16, ::16], golden["gradient"])) < 1e-4
    norm = np.sqrt(np.square(gradient, dtype=np.float64).sum((1, 2, 3)))
    assert norm == pytest.approx(golden["gradient_norm"], rel=1e-3)
