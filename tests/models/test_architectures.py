"""ImageNet ResNets, WideResNet, VGG-19 and ViT: published sizes, names, features; `test_torch_goldens.py` has the numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from tests.models import small_networks

from gse_jax import models
from gse_jax.metrics import grad_cam
from gse_jax.models import imagenet_resnet, vgg, vision_transformer, weights_file, wide_resnet
from gse_jax.models.classifier import expected_params


def random():
    return np.random.default_rng(7)


# Widths as small as each design allows.
NETWORKS = {
    "resnet18": small_networks.resnet_tensors(
        random(), (2, 2, 2, 2), bottleneck=False, stem=4, inner=(4, 5, 6, 7), outer=(4, 5, 6, 7), num_classes=5),
    "resnet50": small_networks.resnet_tensors(
        random(), (3, 4, 6, 3), bottleneck=True, stem=4, inner=(2, 3, 4, 5), outer=(6, 8, 10, 12), num_classes=3),
    "wide_resnet28_10": small_networks.wide_resnet_tensors(
        random(), blocks=4, stem=3, widths=(4, 6, 8), num_classes=5),
    "vgg19": small_networks.vgg_tensors(random(), widths=(3, 4, 5, 6, 7), side=2, hidden=9, num_classes=4),
    "vit_b_16": small_networks.vit_tensors(random(), width=128, hidden=24, depth=3, grid=2, num_classes=5),
}


def load(name, tensors, folder, normalize="none"):
    save_file(tensors, folder / f"{name}.safetensors")
    return models.load(name, weights=folder / f"{name}.safetensors", normalize=normalize)


# Parameters (statistics not counted) as published, and tensors without num_batches_tracked.
PUBLISHED = {
    "resnet18": (imagenet_resnet.ImageNetResNet, imagenet_resnet.ImageNetResNetConfig(
        18, 64, (64, 128, 256, 512), (64, 128, 256, 512), 1000, 3), 11_689_512, 102),
    "resnet50": (imagenet_resnet.ImageNetResNet, imagenet_resnet.ImageNetResNetConfig(
        50, 64, (64, 128, 256, 512), (256, 512, 1024, 2048), 1000, 3), 25_557_032, 267),
    "wide_resnet28_10": (wide_resnet.WideResNet, wide_resnet.WideResNetConfig(
        28, 16, (160, 320, 640), 10, 3), 36_479_194, 130),
    "vgg19": (vgg.VGG, vgg.VGGConfig(
        (64,) * 2 + (128,) * 2 + (256,) * 4 + (512,) * 8, 7, (4096, 4096), 1000, 3),
        143_667_240, 38),
    "vit_b_16": (vision_transformer.VisionTransformer, vision_transformer.VisionTransformerConfig(
        16, 14, 768, 3072, 12, 1000, 3), 86_567_656, 152),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if "50" in name else []) for name in PUBLISHED])
def test_full_size_has_the_published_parameters(name):
    module, config, num_parameters, num_tensors = PUBLISHED[name]
    shapes = jax.tree.leaves_with_path(expected_params(module, config))
    learned = [leaf.size for path, leaf in shapes if path[-1].key not in ("mean", "var")]
    assert sum(learned) == num_parameters and len(shapes) == num_tensors
    apply_fn = models.Classifier(module, config, (0.0,) * 3, (1.0,) * 3)
    side = 32 if name.startswith("wide") else 224
    images = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    logits, features = jax.eval_shape(apply_fn.features, expected_params(module, config), images)
    assert logits.shape == (2, config.num_classes)
    assert features.shape[1:3] == {"vgg19": (14, 14), "vit_b_16": (14, 14),
                                   "wide_resnet28_10": (8, 8)}.get(name, (7, 7))


def torchvision_vit(tensors):
    """timm's names -> torchvision's, spelled out for one block and repeated."""
    top = {"cls_token": "class_token", "pos_embed": "encoder.pos_embedding",
           "patch_embed.proj": "conv_proj", "norm": "encoder.ln", "head": "heads.head"}
    block = {"norm1": "ln_1", "norm2": "ln_2", "attn.proj": "self_attention.out_proj",
             "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.3"}
    renamed = {}
    for name, array in tensors.items():
        layer, _, leaf = name.rpartition(".")
        if not layer:
            renamed[top[leaf]] = array
        elif layer in top:
            renamed[f"{top[layer]}.{leaf}"] = array
        else:
            _, number, inner = layer.split(".", 2)
            start = f"encoder.layers.encoder_layer_{number}."
            renamed[start + (f"self_attention.in_proj_{leaf}" if inner == "attn.qkv"
                             else f"{block[inner]}.{leaf}")] = array
    return renamed


def timm_vgg(tensors):
    """torchvision's names -> timm's, whose first two dense layers are convolutions."""
    layers = {"classifier.0": "pre_logits.fc1", "classifier.3": "pre_logits.fc2",
              "classifier.6": "head.fc"}
    renamed = {}
    for name, array in tensors.items():
        layer, _, leaf = name.rpartition(".")
        if layer == "classifier.0" and leaf == "weight":
            array = array.reshape(len(array), -1, 2, 2)
        if layer == "classifier.3" and leaf == "weight":
            array = array[:, :, None, None]
        renamed[f"{layers.get(layer, layer)}.{leaf}"] = array
    return renamed


def old_torchvision_vit(tensors):
    return {n.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): a
            for n, a in torchvision_vit(tensors).items()}


@pytest.mark.parametrize(("name", "other"), [("vit_b_16", torchvision_vit), ("vgg19", timm_vgg),
                                             ("vit_b_16", old_torchvision_vit)])
def test_other_libraries_names_give_the_same_model(tmp_path, name, other):
    tensors = NETWORKS[name]
    apply_fn, params = load(name, tensors, tmp_path)
    other_fn, other_params = load(name, other(tensors), tmp_path)
    assert other_fn == apply_fn
    assert jax.tree.all(jax.tree.map(np.array_equal, params, other_params))


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if "50" in name else []) for name in NETWORKS])
def test_saved_parameters_load_again(tmp_path, name):
    apply_fn, params = load(name, NETWORKS[name], tmp_path)
    models.save(tmp_path / "again", params)
    again, again_params = models.load(name, weights=tmp_path / "again", normalize="none")
    assert again == apply_fn
    assert jax.tree.all(jax.tree.map(np.array_equal, params, again_params))


@pytest.mark.parametrize("name", ["resnet20", *NETWORKS])
@pytest.mark.parametrize("file", NETWORKS)
def test_weights_of_another_architecture_are_refused_in_one_line(tmp_path, name, file):
    if name == file:
        return
    with pytest.raises(ValueError, match="weights: ") as caught:
        load(name, NETWORKS[file], tmp_path)
    message = str(caught.value)
    assert f"{name}.safetensors" in message and "\n" not in message and len(message) < 500


def test_a_tensor_too_many_or_of_another_shape_is_refused(tmp_path):
    tensors = NETWORKS["resnet18"]
    with pytest.raises(ValueError, match=r"has unknown layer1.0.se.weight$"):
        load("resnet18", {**tensors, "layer1.0.se.weight": tensors["fc.weight"]}, tmp_path)
    with pytest.raises(ValueError, match=r"linear.bias \(3,\) instead of \(5,\)"):
        load("resnet18", {**tensors, "fc.bias": tensors["fc.bias"][:3]}, tmp_path)
    vit = NETWORKS["vit_b_16"]
    with pytest.raises(ValueError, match="has 4 positions, 128 features"):
        load("vit_b_16", {**vit, "pos_embed": vit["pos_embed"][:, :4]}, tmp_path)
    small_patches = {**vit, "patch_embed.proj.weight": vit["patch_embed.proj.weight"][:, :, :8, :8]}
    with pytest.raises(ValueError, match="patches of 8 pixels; expected .* and 16$"):
        load("vit_b_16", small_patches, tmp_path)


def test_vit_refuses_images_of_another_size(tmp_path):
    apply_fn, params = load("vit_b_16", NETWORKS["vit_b_16"], tmp_path)
    with pytest.raises(ValueError, match="x: images are 48x32, .* positions for 32x32"):
        jax.eval_shape(apply_fn, params, jnp.zeros((1, 48, 32, 3), jnp.float32))


def test_normalisation_presets(tmp_path):
    tensors = NETWORKS["resnet18"]
    for name, pair in {"half": (0.5, 0.5), "none": (0.0, 1.0),
                       "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}.items():
        assert load("resnet18", tensors, tmp_path, name)[0] == load("resnet18", tensors, tmp_path,
                                                                    pair)[0]
    with pytest.raises(ValueError, match="normalize: got 'cifar', expected half, imagenet, none"):
        load("resnet18", tensors, tmp_path, "cifar")


@pytest.mark.parametrize("name", ["vgg19", "vit_b_16"])
def test_activation_maps_without_a_pooled_head(tmp_path, name):
    """These have no CAM kernel; Grad-CAM finds the map that they return."""
    tensors = NETWORKS[name]
    apply_fn, params = load(name, tensors, tmp_path)
    assert not hasattr(apply_fn, "head")
    images = jnp.asarray(np.random.default_rng(1).uniform(size=(1, 32, 32, 3)), jnp.float32)
    label = np.array([1], np.int32)
    maps = jax.jit(lambda x: grad_cam(params, apply_fn.features, x, label))(images)
    assert maps.shape == (1, 2, 2) and np.isfinite(maps).all()


def test_pooled_heads_are_linear_in_the_feature_map(tmp_path):
    for name in ("resnet50", "wide_resnet28_10"):
        apply_fn, params = load(name, NETWORKS[name], tmp_path)
        logits, features = jax.eval_shape(apply_fn.features, params,
                                          jnp.zeros((1, 32, 32, 3), jnp.float32))
        assert apply_fn.head(params).shape == (features.shape[-1], logits.shape[-1])


def test_every_tensor_of_a_file_is_used(tmp_path):
    """Names of the state dicts, counters and the unused stage aside, come back from the module."""
    for name, tensors in NETWORKS.items():
        _, params = load(name, tensors, tmp_path)
        used = {n for n in tensors if "num_batches" not in n and not n.startswith("sub_")}
        assert len(weights_file.to_tensors(params)) == len(used)
