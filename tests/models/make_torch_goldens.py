"""Write torch_goldens.npz: what the original PyTorch modules answer, in float64.

    pip install torchvision timm safetensors && pip install --no-deps robustbench
    python -m tests.models.make_torch_goldens

Logits and input gradients of torchvision's, timm's and RobustBench's modules, and of the CIFAR
ResNet-20 written here, for weights and images that seeded_tensors.py makes again in the test. The
small cases have the networks' depth and widths but few classes and, in VGG-19, narrow dense layers
and, in ViT-B/16, 3 blocks; the full ones are the published networks at 224x224.

The gradient jumps where a ReLU's input is zero or two pixels tie for a maximum, and rounding to
float32 decides on which side a network with millions of units falls. Of 8 draws of a small case's
images the one is kept that is the farthest from any jump.

Made with torch 2.15.0, torchvision 0.29.2, timm 1.0.9, robustbench 1.1.1, numpy 2.4.6.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import timm
import torch
import torchvision
from safetensors.numpy import load, save
from timm.layers import ClassifierHead
from timm.models.vgg import ConvMlp
from torch import nn
from torch.nn import functional
from tests.models import seeded_tensors

CLASSES, DRAWS = 10, 8
NORMALIZATIONS = {"imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
                  "half": ((0.5,) * 3, (0.5,) * 3), "none": ((0.0,) * 3, (1.0,) * 3)}


class CifarBlock(nn.Module):
    """Two convolutions, and a shortcut that skips pixels and pads channels with zeros."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.stride, self.extra = stride, (outputs - inputs) // 2

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        skipped = x[:, :, :: self.stride, :: self.stride]
        return self.relu(y + functional.pad(skipped, (0, 0, 0, 0, self.extra, self.extra)))


class CifarResNet20(nn.Module):
    """arXiv:1512.03385, section 4.2, shortcut option A; names of the public checkpoints."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        for stage, (inputs, outputs) in enumerate(((16, 16), (16, 32), (32, 64)), 1):
            first = CifarBlock(inputs, outputs, 1 if stage == 1 else 2)
            others = [CifarBlock(outputs, outputs, 1) for _ in range(2)]
            setattr(self, f"layer{stage}", nn.Sequential(first, *others))
        self.linear = nn.Linear(64, CLASSES)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def robustbench_wide_resnet():
    # By its file: the package itself imports what is not on PyPI.
    package = importlib.util.find_spec("robustbench").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location(
        "wide_resnet", Path(package, "model_zoo", "architectures", "wide_resnet.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.WideResNet(28, CLASSES, 10)


def torchvision_vgg19():
    model = torchvision.models.vgg19()
    model.classifier[0] = nn.Linear(512 * 49, 64)
    model.classifier[3] = nn.Linear(64, 64)
    model.classifier[6] = nn.Linear(64, CLASSES)
    return model


def timm_vgg19():
    model = timm.create_model("vgg19")
    model.pre_logits = ConvMlp(512, 64, 7, act_layer=nn.ReLU, conv_layer=nn.Conv2d)
    model.head = ClassifierHead(64, CLASSES)
    return model


def torchvision_vit():
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=16, num_layers=3, num_heads=12, hidden_dim=768, mlp_dim=3072,
        num_classes=CLASSES)


def timm_vit():
    return timm.create_model("vit_base_patch16_224", img_size=32, depth=3, num_classes=CLASSES)


# "model library size": its module, images [N, H, W, C], what the model does to them first.
CASES = {
    "resnet20 own small": (CifarResNet20, (2, 16, 24, 3), "half"),
    "resnet18 torchvision small": (
        lambda: torchvision.models.resnet18(num_classes=CLASSES), (2, 33, 40, 3), "imagenet"),
    "resnet50 torchvision small": (
        lambda: torchvision.models.resnet50(num_classes=CLASSES), (2, 33, 40, 3), "imagenet"),
    "wide_resnet28_10 robustbench small": (robustbench_wide_resnet, (1, 32, 32, 3), "none"),
    "vgg19 torchvision small": (torchvision_vgg19, (2, 32, 64, 3), "imagenet"),
    "vgg19 timm small": (timm_vgg19, (2, 32, 64, 3), "imagenet"),
    "vit_b_16 torchvision small": (torchvision_vit, (2, 32, 32, 3), "imagenet"),
    "vit_b_16 timm small": (timm_vit, (2, 32, 32, 3), "imagenet"),
    **{f"{name} torchvision full": (getattr(torchvision.models, name), (1, 224, 224, 3), "imagenet")
       for name in ("resnet18", "resnet50", "vgg19", "vit_b_16")},
    **{f"{name} timm full": (lambda other=other: timm.create_model(other), (1, 224, 224, 3), "half")
       for name, other in (("vgg19", "vgg19"), ("vit_b_16", "vit_base_patch16_224"))},
}


def margin(module, x):
    """Smallest distance from a jump of the gradient, relative to the layer's root mean square."""
    distances = [np.inf]

    def at_relu(_, inputs):
        distances.append((inputs[0].abs().min() / inputs[0].square().mean().sqrt()).item())

    def at_pooling(pool, inputs):
        maps = inputs[0].flatten(0, 1)[:, None]
        windows = functional.unfold(maps, pool.kernel_size, padding=pool.padding,
                                    stride=pool.stride)
        first, second = windows.topk(2, 1).values.unbind(1)
        gaps = (first - second)[first > 0]  # where all are zero, nothing passes back
        distances.append((gaps.min() / maps.square().mean().sqrt()).item())

    hooks = [m.register_forward_pre_hook(hook) for m in module.modules()
             for kind, hook in ((nn.ReLU, at_relu), (nn.MaxPool2d, at_pooling))
             if isinstance(m, kind)]
    with torch.no_grad():
        module(x)
    for hook in hooks:
        hook.remove()
    return min(distances)


def answer(case, module, shape, normalize):
    """The golden arrays of one case."""
    shapes = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    # Through the very format that the test writes and gse_jax reads.
    tensors = load(save(seeded_tensors.tensors(shapes)))
    module.load_state_dict({n: torch.from_numpy(a) for n, a in tensors.items()}, strict=True)
    module = module.double().eval()
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in NORMALIZATIONS[normalize])

    def images(draw):
        return torch.from_numpy(seeded_tensors.images(case, draw, shape)).double()

    def normalized(images):
        return ((images - mean) / std).permute(0, 3, 1, 2)

    full = case.endswith("full")
    draws = 1 if full else DRAWS
    margins = [0 if full else margin(module, normalized(images(draw))) for draw in range(draws)]
    draw = int(np.argmax(margins))
    chosen = images(draw).requires_grad_()
    logits = module(normalized(chosen))
    (logits * torch.from_numpy(seeded_tensors.cotangent(logits.shape))).sum().backward()
    gradient = chosen.grad.numpy()
    stride = 16 if full else 1  # every 16th pixel of the large gradients
    print(case, f"logits {logits.std():.3g}, gradient {gradient.std():.3g}, draw {draw} of margins",
          *(f"{m:.1e}" for m in margins), flush=True)
    return {"shapes": json.dumps(shapes), "images": np.array(shape), "draw": draw,
            "normalize": normalize, "logits": logits.detach().numpy().astype(np.float32),
            "gradient": gradient[:, ::stride, ::stride].astype(np.float32),
            "gradient_norm": np.sqrt(np.square(gradient).sum((1, 2, 3)))}


if __name__ == "__main__":
    goldens = {f"{case}/{part}": value for case, (make, shape, normalize) in CASES.items()
               for part, value in answer(case, make(), shape, normalize).items()}
    np.savez_compressed(Path(__file__).parent / "torch_goldens.npz", **goldens)
