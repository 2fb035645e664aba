"""The networks against an independent NumPy forward pass, and the shipped weights."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tests.models.numpy_resnet import forward, random_tensors
from safetensors.numpy import save_file

from gse_jax import data, models
from gse_jax.models.layers import batch_norm, convolution, convolution_and_norm

HERE = Path(__file__).resolve().parent
ARCHITECTURES = {
    "resnet20": dict(blocks=3, widths=(4, 6, 9), num_classes=5, num_channels=3),
    "resnet32": dict(blocks=5, widths=(3, 3, 8), num_classes=2, num_channels=1),
    "resnet44": dict(blocks=7, widths=(2, 4, 8), num_classes=3, num_channels=3),
    "resnet56": dict(blocks=9, widths=(2, 4, 6), num_classes=11, num_channels=1),
}


def random_model(folder, name, seed=0, normalize=(0.0, 1.0)):
    tensors = random_tensors(np.random.default_rng(seed), **ARCHITECTURES[name])
    save_file(tensors, folder / f"{name}.safetensors")
    return tensors, *models.load(
        name, weights=folder / f"{name}.safetensors", normalize=normalize
    )


def features_and_oracle(folder, name, size, dtype):
    channels = ARCHITECTURES[name]["num_channels"]
    images = np.random.default_rng(1).uniform(-1, 1, (2, *size, channels)).astype(dtype)
    tensors, apply_fn, params = random_model(folder, name)
    logits, features = jax.jit(apply_fn.features)(params, jnp.asarray(images))
    assert logits.dtype == features.dtype == dtype
    head = np.asarray(features).mean((1, 2)) @ np.asarray(apply_fn.head(params))
    assert np.allclose(head + tensors["linear.bias"], logits, rtol=1e-4, atol=1e-4)
    return np.asarray(logits), np.asarray(features), *forward(tensors, images)


# Sizes of which XLA compiles float64 convolutions fast; others take half a minute.
@pytest.mark.parametrize("name", ["resnet20",
                                  pytest.param("resnet56", marks=pytest.mark.slow)])
def test_logits_and_features_equal_numpy_in_float64(tmp_path, name):
    with jax.enable_x64(True):
        logits, features, *expected = features_and_oracle(tmp_path, name, (16, 16), "float64")
    # Up to 56 layers of rounding, relative to the largest value of each array.
    assert np.abs(logits - expected[0]).max() < 1e-13 * np.abs(expected[0]).max()
    assert features.shape == expected[1].shape
    assert np.abs(features - expected[1]).max() < 1e-13 * np.abs(expected[1]).max()


@pytest.mark.parametrize("name", [  # they differ in depth alone
    pytest.param(name, marks=pytest.mark.slow) if name != "resnet20" else name for name in ARCHITECTURES])
def test_odd_sizes_are_close_to_numpy_in_float32(tmp_path, name):
    logits, features, *expected = features_and_oracle(tmp_path, name, (9, 14), "float32")
    assert np.abs(logits - expected[0]).max() < 3e-6 * np.abs(expected[0]).max()
    assert features.shape == expected[1].shape
    assert np.abs(features - expected[1]).max() < 3e-6 * np.abs(expected[1]).max()


@pytest.mark.slow
def test_gradient_is_the_slope_of_the_numpy_model(tmp_path):
    random = np.random.default_rng(2)
    images, direction = random.uniform(-1, 1, (2, 2, 16, 16, 3))
    with jax.enable_x64(True):
        tensors, apply_fn, params = random_model(tmp_path, "resnet20")
        gradient = jax.grad(lambda x: apply_fn(params, x)[:, 1].sum())(jnp.asarray(images))
    # So small a step that no ReLU changes sign on the way, else the slope would be a mixture.
    step = 1e-7
    ahead, behind = (forward(tensors, images + s * direction)[0][:, 1].sum() for s in (step, -step))
    assert np.vdot(gradient, direction) == pytest.approx((ahead - behind) / (2 * step), rel=1e-5)


@pytest.mark.slow
def test_an_image_does_not_see_its_batch(tmp_path):
    _, apply_fn, params = random_model(tmp_path, "resnet20")
    images = np.random.default_rng(3).uniform(-1, 1, (5, 16, 16, 3)).astype(np.float32)
    together = np.asarray(apply_fn(params, images))
    alone = jnp.concatenate([apply_fn(params, images[i : i + 1]) for i in range(5)])
    mapped = jax.vmap(lambda x: apply_fn(params, x[None])[0])(images)
    assert np.allclose(together, alone, atol=1e-4) and np.allclose(together, mapped, atol=1e-4)


def test_evaluation_convolves_as_training_does():
    """Flax does it in training; with stride 2 and an even size the padding shows."""
    conv, norm = convolution(3, 4, 3, 2, nnx.Rngs(0)), batch_norm(4, nnx.Rngs(0))
    norm.eval()
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3), jnp.float32)
    np.testing.assert_allclose(convolution_and_norm(conv, norm, x), norm(conv(x)), atol=1e-5)


def test_shipped_digits_weights_give_the_golden_logits():
    golden = np.load(HERE / "digits_logits.npz", allow_pickle=False)
    dataset = data.load("digits", limit=8)
    assert dataset.ids == tuple(golden["ids"])
    with jax.enable_x64(True):
        apply_fn, params = models.load("resnet20", weights="digits")
        logits, features = jax.jit(apply_fn.features)(params, jnp.asarray(dataset.images, jnp.float64))
        # 1/16 steps are exact in float32, so the images are the very same numbers.
        assert np.abs(logits - golden["logits"]).max() < 1e-11
        assert np.abs(features.mean((1, 2)) - golden["pooled"]).max() < 1e-11


def test_shipped_digits_weights_classify_the_test_split():
    apply_fn, params = models.load("resnet20", weights="digits")
    dataset = data.load("digits")
    predicted = np.asarray(jax.jit(apply_fn)(params, dataset.images)).argmax(-1)
    assert (predicted == dataset.labels).mean() >= 0.985


@pytest.mark.parametrize(
    ("weights", "normalize", "correct"),
    [
        # Counted with an independent PyTorch module on the same 400 images.
        ("resnet20_gse_authors", (0.5, 0.5), 358),
        pytest.param("resnet20_imagenet_norm", ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), 365,
                     marks=pytest.mark.slow),
    ],
)
def test_public_cifar_weights_reach_their_accuracy(shared, weights, normalize, correct):
    folder = shared / "data/cifar10"
    apply_fn, params = models.load(
        "resnet20", weights=folder / f"{weights}.safetensors", normalize=normalize
    )
    dataset = data.load("npz:test_0000_0399.npz", data_dir=str(folder))
    predicted = np.asarray(jax.jit(apply_fn)(params, dataset.images)).argmax(-1)
    assert abs(int((predicted == dataset.labels).sum()) - correct) <= 1  # A tie may round away.
