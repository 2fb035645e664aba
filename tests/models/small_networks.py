"""Small networks with random weights, in PyTorch's layout and names."""

import numpy as np

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
