"""Show where a model looks: class activation maps and Grad-CAM.

`cam` is for networks whose head is global average pooling and one linear layer (ResNets); then
the map's mean, plus the bias, *is* the logit. `grad_cam` is for every other head, and needs no
change to the model: only that it returns the feature map beside its logits.

Differs from the reference:
    The published code scales the maps of a batch by the batch's extremes, so an image's map
    depends on its neighbours, and divides by zero for a constant map. `normalise_map` works per
    image and gives zeros for a constant one.

References:
    Zhou et al., "Learning Deep Features for Discriminative Localization", arXiv 1512.04150;
    Selvaraju et al., "Grad-CAM", arXiv 1610.02391; arXiv 2311.17434.
"""

import jax
import jax.numpy as jnp

from gse_jax.metrics.intermediates import with_feature_offset
from gse_jax.metrics.saliency import require_labels


def cam(features, head, y=None):
    """Compute the class activation map of a network that ends in pooling and a linear layer.

    Args:
        features: last feature map before the pooling, [N, h, w, K].
        head: kernel of the linear layer, [K, classes] (Flax layout; a PyTorch weight is its
            transpose). The bias moves every pixel alike and is left out, as in the paper.
        y: class to explain, int [N], or None for all classes.

    Returns:
        [N, h, w], or [N, h, w, classes] for `y = None`; signed. Its mean over (h, w) is the
        logit without the bias.

    Raises:
        TypeError: if y is not integer.
        ValueError: if shapes do not fit, or a concrete label is out of range.

    References:
        arXiv 1512.04150, Eq. (2).
    """
    features, head = jnp.asarray(features), jnp.asarray(head)
    if features.ndim != 4 or head.ndim != 2 or features.shape[-1] != head.shape[0]:
        raise ValueError(
            "features must be [N, h, w, K] and head [K, classes]; "
            f"got {features.shape} and {head.shape}"
        )
    if y is None:
        return jnp.einsum("nhwk,kc->nhwc", features, head, precision="highest")
    y = require_labels("y", y, features.shape[0], head.shape[1])
    return jnp.einsum("nhwk,kn->nhw", features, head[:, y], precision="highest")


def grad_cam(params, apply_fn, x, y):
    """Compute the Grad-CAM map of a model that returns its feature map beside the logits.

    The channels are weighted by the mean gradient of the class's logit over the positions, and
    only positive evidence is kept. The gradient is taken with respect to the returned feature map
    itself: the model's program is traced and an offset is added where that map is made, so a
    Flax model needs no `perturb` and no second "head only" function. For example

        def apply_fn(variables, x):  # Linen; NNX and plain JAX functions work alike
            logits, state = model.apply(variables, x, capture_intermediates=True)
            return logits, state["intermediates"]["stage3"]["__call__"][0]

    Args:
        params: parameters of the model, any pytree.
        apply_fn: (params, x) -> (logits [N, classes], features [N, ..., K]), channels last. The
            features must be the very value that the model goes on with, not a copy of another
            dtype or shape.
        x: images, [N, H, W, C] floating.
        y: class to explain, int [N].

    Returns:
        [N, ...]: the features' shape without the channels, >= 0; [N, h, w] for a convolutional
        network. For a vision transformer, [N, tokens]: drop the class token and reshape.

    Raises:
        TypeError: if y is not integer.
        ValueError: if labels do not fit, or the logits do not depend on the returned features.

    References:
        arXiv 1610.02391, Eqs. (1) and (2).
    """
    x = jnp.asarray(x)
    with jax.default_matmul_precision("highest"):  # as attacks see the model; it counts where the program is traced
        offset_apply, shape = with_feature_offset(apply_fn, params, x)
        zero = jnp.zeros(shape.shape, shape.dtype)
        logits, pull_back, features = jax.vjp(
            lambda offset: offset_apply(params, x, offset), zero, has_aux=True
        )
    y = require_labels("y", y, x.shape[0], logits.shape[-1])
    (gradient,) = pull_back(jax.nn.one_hot(y, logits.shape[-1], dtype=logits.dtype))
    positions = tuple(range(1, gradient.ndim - 1))
    weights = jnp.mean(gradient, axis=positions, keepdims=True)
    return jax.nn.relu(jnp.sum(weights * features, axis=-1))


@jax.jit
def normalise_map(maps):
    """Scale each image's map to [0, 1], with zeros for a constant map.

    Args:
        maps: [N, h, w], finite.

    Returns:
        [N, h, w]; minimum 0 and maximum 1 per image unless the map is constant.

    Raises:
        ValueError: if maps is not [N, h, w].

    References:
        arXiv 2311.17434 (figures).
    """
    maps = jnp.asarray(maps)
    if maps.ndim != 3:
        raise ValueError(f"maps must be [N, h, w], got {maps.shape}")
    maps = maps - jnp.min(maps, axis=(1, 2), keepdims=True)
    largest = jnp.max(maps, axis=(1, 2), keepdims=True)
    return maps / jnp.where(largest > 0, largest, 1)


def resize_map(maps, height, width):
    """Enlarge feature-sized maps to the image's size, bilinearly.

    Args:
        maps: [N, h, w] floating.
        height: rows of the images, static.
        width: columns of the images, static.

    Returns:
        [N, height, width], values within the range of the map.

    Raises:
        ValueError: if maps is not [N, h, w].

    References:
        arXiv 1512.04150 (up-sampling to the size of the image).
    """
    maps = jnp.asarray(maps)
    if maps.ndim != 3:
        raise ValueError(f"maps must be [N, h, w], got {maps.shape}")
    return jax.image.resize(maps, (maps.shape[0], height, width), "linear")
