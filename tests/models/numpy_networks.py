"""Four architectures in NumPy float64 and PyTorch's layout and names: independent oracles."""

import numpy as np
from scipy.special import erf

VGG_PLAN = (2, 2, 4, 4, 4)


class _Tensors(dict):
    """A state dict that grows, with lively random weights."""

    def __init__(self, random):
        super().__init__()
        self._random = random

    def kernel(self, name, *shape, bias=False):
        scale = np.sqrt(2 / np.prod(shape[1:]))
        self[f"{name}.weight"] = self._random.normal(0, scale, shape)
        if bias:
            self[f"{name}.bias"] = self._random.normal(0, 0.1, shape[0])

    def norm(self, name, features):
        self.layer_norm(name, features)
        self[f"{name}.running_mean"] = self._random.normal(0, 0.3, features)
        self[f"{name}.running_var"] = self._random.uniform(0.3, 2.0, features)
        self[f"{name}.num_batches_tracked"] = np.array(7)

    def layer_norm(self, name, features):
        self[f"{name}.weight"] = self._random.uniform(0.5, 1.5, features)
        self[f"{name}.bias"] = self._random.normal(0, 0.3, features)

    def table(self, name, *shape):
        self[name] = self._random.normal(0, 0.5, shape)

    def float32(self):
        return {n: a if a.ndim == 0 else a.astype(np.float32) for n, a in self.items()}


def resnet_tensors(random, blocks, *, bottleneck, stem, inner, outer, num_classes):
    """torchvision's names of an ImageNet ResNet."""
    t = _Tensors(random)
    t.kernel("conv1", stem, 3, 7, 7)
    t.norm("bn1", stem)
    inputs = stem
    for stage, (count, i, o) in enumerate(zip(blocks, inner, outer), 1):
        for block in range(count):
            name = f"layer{stage}.{block}"
            shapes = ([(i, inputs, 1, 1), (i, i, 3, 3), (o, i, 1, 1)] if bottleneck
                      else [(o, inputs, 3, 3), (o, o, 3, 3)])
            for k, shape in enumerate(shapes, 1):
                t.kernel(f"{name}.conv{k}", *shape)
                t.norm(f"{name}.bn{k}", shape[0])
            if block == 0 and (stage > 1 or inputs != o):
                t.kernel(f"{name}.downsample.0", o, inputs, 1, 1)
                t.norm(f"{name}.downsample.1", o)
            inputs = o
    t.kernel("fc", num_classes, inputs, bias=True)
    return t.float32()


def wide_resnet_tensors(random, *, blocks, stem, widths, num_classes):
    """RobustBench's names, with the stage that its modules build and never call."""
    t = _Tensors(random)
    t.kernel("conv1", stem, 3, 3, 3)
    inputs = stem
    for stage, width in zip(("block1", "sub_block1", "block2", "block3"),
                            (widths[0], *widths)):
        first = stem if stage == "sub_block1" else inputs
        for block in range(blocks):
            name = f"{stage}.layer.{block}"
            t.norm(f"{name}.bn1", first)
            t.kernel(f"{name}.conv1", width, first, 3, 3)
            t.norm(f"{name}.bn2", width)
            t.kernel(f"{name}.conv2", width, width, 3, 3)
            if first != width:
                t.kernel(f"{name}.convShortcut", width, first, 1, 1)
            first = width
        inputs = width
    t.norm("bn1", inputs)
    t.kernel("fc", num_classes, inputs, bias=True)
    return t.float32()


def vgg_tensors(random, *, widths, side, hidden, num_classes):
    """torchvision's names of a VGG-19."""
    t = _Tensors(random)
    inputs, position = 3, 0
    for count, width in zip(VGG_PLAN, widths):
        for _ in range(count):
            t.kernel(f"features.{position}", width, inputs, 3, 3, bias=True)
            inputs, position = width, position + 2  # a ReLU follows
        position += 1  # max pooling
    sizes = (inputs * side**2, hidden, hidden, num_classes)
    for i, (a, b) in enumerate(zip(sizes, sizes[1:])):
        t.kernel(f"classifier.{3 * i}", b, a, bias=True)
    return t.float32()


def vit_tensors(random, *, width, hidden, depth, grid, num_classes):
    """timm's names of a ViT with patches of 16."""
    t = _Tensors(random)
    t.table("cls_token", 1, 1, width)
    t.table("pos_embed", 1, 1 + grid**2, width)
    t.kernel("patch_embed.proj", width, 3, 16, 16, bias=True)
    for b in range(depth):
        t.layer_norm(f"blocks.{b}.norm1", width)
        t.kernel(f"blocks.{b}.attn.qkv", 3 * width, width, bias=True)
        t.kernel(f"blocks.{b}.attn.proj", width, width, bias=True)
        t.layer_norm(f"blocks.{b}.norm2", width)
        t.kernel(f"blocks.{b}.mlp.fc1", hidden, width, bias=True)
        t.kernel(f"blocks.{b}.mlp.fc2", width, hidden, bias=True)
    t.layer_norm("norm", width)
    t.kernel("head", num_classes, width, bias=True)
    return t.float32()


def _conv(t, x, name, stride=1):
    """Cross-correlate NCHW by summing shifted images, one kernel tap each."""
    kernel = t[f"{name}.weight"]
    side, (height, width) = kernel.shape[-1], x.shape[2:]
    half = side // 2
    x = np.pad(x, ((0, 0), (0, 0), (half, half), (half, half)))
    y = sum(np.einsum("nihw,oi->nohw", x[:, :, i : i + height, j : j + width], kernel[:, :, i, j],
                      optimize=True) for i in range(side) for j in range(side))
    y = y[:, :, ::stride, ::stride]
    return y + t[f"{name}.bias"][:, None, None] if f"{name}.bias" in t else y


def _norm(t, x, name):
    weight, bias, mean, var = (t[f"{name}.{p}"][:, None, None]
                               for p in ("weight", "bias", "running_mean", "running_var"))
    return (x - mean) / np.sqrt(var + 1e-5) * weight + bias


def _pool(x, side, stride):
    """Max pooling with half of `side` as padding, rounded down to whole windows if even."""
    half = (side - 1) // 2
    height, width = (size // stride * stride if side == stride else size for size in x.shape[2:])
    x = np.pad(x[:, :, :height, :width], ((0, 0), (0, 0), (half, half), (half, half)),
               constant_values=-np.inf)
    return np.max([x[:, :, i : i + height : stride, j : j + width : stride]
                   for i in range(side) for j in range(side)], axis=0)


def _linear(t, x, name):
    return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]


def _prepared(tensors, images):
    t = {name: np.asarray(array, np.float64) for name, array in tensors.items()}
    return t, np.asarray(images, np.float64).transpose(0, 3, 1, 2)


def resnet(tensors, images):
    """Normalised images to logits."""
    t, x = _prepared(tensors, images)
    x = _pool(np.maximum(_norm(t, _conv(t, x, "conv1", 2), "bn1"), 0), 3, 2)
    for stage in (1, 2, 3, 4):
        block = 0
        while (name := f"layer{stage}.{block}") + ".conv1.weight" in t:
            stride = 2 if stage > 1 and block == 0 else 1
            last = 3 if f"{name}.conv3.weight" in t else 2
            y = x
            for k in range(1, last + 1):
                at = stride if k == last - 1 else 1  # the 3x3 of a bottleneck, else the first
                y = _norm(t, _conv(t, y, f"{name}.conv{k}", at), f"{name}.bn{k}")
                y = np.maximum(y, 0) if k < last else y
            if f"{name}.downsample.0.weight" in t:
                x = _norm(t, _conv(t, x, f"{name}.downsample.0", stride), f"{name}.downsample.1")
            x = np.maximum(x + y, 0)
            block += 1
    return _linear(t, x.mean((2, 3)), "fc")


def wide_resnet(tensors, images):
    """Normalised images to logits."""
    t, x = _prepared(tensors, images)
    x = _conv(t, x, "conv1")
    for stage in (1, 2, 3):
        block = 0
        while (name := f"block{stage}.layer.{block}") + ".conv1.weight" in t:
            stride = 2 if stage > 1 and block == 0 else 1
            active = np.maximum(_norm(t, x, f"{name}.bn1"), 0)
            y = np.maximum(_norm(t, _conv(t, active, f"{name}.conv1", stride), f"{name}.bn2"), 0)
            if f"{name}.convShortcut.weight" in t:
                x = _conv(t, active, f"{name}.convShortcut", stride)
            x = x + _conv(t, y, f"{name}.conv2")
            block += 1
    return _linear(t, np.maximum(_norm(t, x, "bn1"), 0).mean((2, 3)), "fc")


def vgg(tensors, images, side):
    """Normalised images to logits; the last map is averaged over windows that may overlap."""
    t, x = _prepared(tensors, images)
    position = 0
    for count in VGG_PLAN:
        for _ in range(count):
            x = np.maximum(_conv(t, x, f"features.{position}"), 0)
            position += 2
        x = _pool(x, 2, 2)
        position += 1
    rows, columns = ([range(i * n // side, -(-(i + 1) * n // side)) for i in range(side)]
                     for n in x.shape[2:])
    x = np.stack([np.stack([x[:, :, r][:, :, :, c].mean((2, 3)) for c in columns], -1)
                  for r in rows], -2)  # fmt: skip
    x = x.reshape(len(x), -1)
    x = np.maximum(_linear(t, x, "classifier.0"), 0)
    x = np.maximum(_linear(t, x, "classifier.3"), 0)
    return _linear(t, x, "classifier.6")


def vit(tensors, images):
    """Normalised images to logits."""
    t, x = _prepared(tensors, images)

    def layer_norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * t[f"{name}.weight"] + t[f"{name}.bias"]

    n, channels, height, width = x.shape
    patches = x.reshape(n, channels, height // 16, 16, width // 16, 16)
    x = np.einsum("nchiwj,ocij->nhwo", patches, t["patch_embed.proj.weight"])
    x = (x + t["patch_embed.proj.bias"]).reshape(n, -1, x.shape[-1])
    x = np.concatenate([np.repeat(t["cls_token"], n, 0), x], 1) + t["pos_embed"]
    block = 0
    while (name := f"blocks.{block}") + ".norm1.weight" in t:
        qkv = _linear(t, layer_norm(x, f"{name}.norm1"), f"{name}.attn.qkv")
        mixed = []
        for start in range(0, x.shape[-1], 64):  # head by head
            q, k, v = (qkv[..., part * x.shape[-1] + start :][..., :64] for part in range(3))
            scores = q @ k.transpose(0, 2, 1) / 8
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            mixed.append(scores / scores.sum(-1, keepdims=True) @ v)
        x = x + _linear(t, np.concatenate(mixed, -1), f"{name}.attn.proj")
        y = _linear(t, layer_norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")
        x = x + _linear(t, y * (1 + erf(y / np.sqrt(2))) / 2, f"{name}.mlp.fc2")
        block += 1
    return _linear(t, layer_norm(x, "norm")[:, 0], "head")
