"""The apply_fn object: normalisation, dtypes, hashing, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.models.numpy_resnet import random_tensors
from safetensors.numpy import save_file

from gse_jax import models

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
IMAGES = np.random.default_rng(0).uniform(size=(2, 8, 8, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Two files of one architecture, different numbers."""
    folder = tmp_path_factory.mktemp("weights")
    shape = dict(blocks=3, widths=(2, 4, 6), num_classes=4, num_channels=3)
    for seed in (0, 1):
        save_file(random_tensors(np.random.default_rng(seed), **shape), folder / f"{seed}")
    return folder / "0", folder / "1"


def load(path, normalize=None):
    return models.load("resnet20", weights=path, normalize=normalize)


@pytest.mark.parametrize("normalize", [
    (0.5, 0.5), IMAGENET, *(pytest.param(pair, marks=pytest.mark.slow) for pair in ((0.1, 2.0), (0.5, IMAGENET[1])))])
def test_normalisation_happens_inside(weights, normalize):
    apply_fn, params = load(weights[0], normalize)
    identity, _ = load(weights[0], (0.0, 1.0))
    mean, std = (np.asarray(v, np.float32) for v in normalize)
    outside = (IMAGES - mean) / std
    identity, logits = jax.jit(identity), jax.jit(apply_fn)(params, IMAGES)
    assert np.allclose(logits, identity(params, outside), atol=1e-5)
    assert not np.allclose(logits, identity(params, IMAGES), atol=1e-2)


def test_default_normalisation_maps_the_unit_interval_to_minus_one_to_one(weights):
    assert load(weights[0])[0] == load(weights[0], (0.5, 0.5))[0]


def test_equal_loads_share_one_compilation(weights):
    traces = []

    def logits(apply_fn, params, x):
        traces.append(apply_fn)
        return apply_fn(params, x)

    compiled = jax.jit(logits, static_argnums=0)
    (first, first_params), (second, second_params) = load(weights[0]), load(weights[1], (0.5,) * 2)
    assert first == second and hash(first) == hash(second)
    assert not np.allclose(compiled(first, first_params, IMAGES),
                           compiled(second, second_params, IMAGES))
    assert len(traces) == 1
    other, params = load(weights[0], IMAGENET)
    assert other != first and compiled(other, params, IMAGES).shape == (2, 4) and len(traces) == 2


def test_per_channel_and_scalar_normalisation_are_equal(weights):
    assert load(weights[0], (0.5, [0.5, 0.5, 0.5]))[0] == load(weights[0], (0.5, 0.5))[0]


def test_params_are_a_plain_nested_dict_of_jax_arrays(weights):
    _, params = load(weights[0])
    assert type(params) is dict and type(params["layer1"][0]["conv1"]) is dict
    leaves = jax.tree.leaves(params)
    assert len(leaves) == 97
    assert all(isinstance(leaf, jax.Array) and leaf.dtype == jnp.float32 for leaf in leaves)


@pytest.mark.parametrize(
    ("images", "weights_dtype", "expected"),
    [
        ("float32", "float32", "float32"),
        ("float64", "float32", "float64"),
        ("float64", "float64", "float64"),
        ("float32", "float64", "float64"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("float16", "float32", "float32"),
    ],
)
def test_dtype_is_the_wider_one(weights, images, weights_dtype, expected):
    with jax.enable_x64(True):
        apply_fn, params = load(weights[0])
        params = jax.tree.map(lambda leaf: leaf.astype(weights_dtype), params)
        logits = jax.eval_shape(apply_fn, params, jnp.asarray(IMAGES, images))
        assert (logits.shape, logits.dtype) == ((2, 4), expected)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (IMAGES.transpose(0, 3, 1, 2), ValueError, r"looks like NCHW"),
        (IMAGES[0], ValueError, r"got shape \(8, 8, 3\), expected \[N, H, W, 3\]"),
        (IMAGES[..., :1], ValueError, r"expected \[N, H, W, 3\]"),
        ((IMAGES * 255).astype(np.uint8), TypeError, r"got dtype uint8, expected floating"),
    ],
)
def test_bad_images_are_refused(weights, bad, error, message):
    apply_fn, params = load(weights[0])
    with pytest.raises(error, match=message):
        apply_fn(params, bad)


def test_params_of_another_model_are_refused(weights):
    apply_fn, params = load(weights[0])
    without = {key: value for key, value in params.items() if key != "layer3"}
    with pytest.raises(ValueError, match="params: got another tree"):
        apply_fn(without, IMAGES)


@pytest.mark.parametrize(
    ("normalize", "error"),
    [
        (0.5, TypeError),
        ((0.5,), TypeError),
        (("a", "b"), TypeError),
        (((0.5, 0.5), 0.5), ValueError),
        ((0.5, 0.0), ValueError),
        ((0.5, -1.0), ValueError),
        ((float("nan"), 1.0), ValueError),
    ],
)
def test_bad_normalisation_is_refused(weights, normalize, error):
    with pytest.raises(error, match=r"normalize: got .*expected"):
        load(weights[0], normalize)
