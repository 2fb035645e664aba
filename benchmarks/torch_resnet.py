"""The CIFAR ResNet as a PyTorch module, from the same tensors that gse_jax.models.load reads."""

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    """Two convolutions and a shortcut that drops every other pixel and pads channels."""

    def __init__(self, inputs, width):
        """Make the layers."""
        super().__init__()
        self.stride = 1 if inputs == width else 2
        self.conv1 = nn.Conv2d(inputs, width, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.front = (width - inputs) // 2

    def forward(self, x):
        """Return the block's feature map."""
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, ::self.stride, ::self.stride]
        shortcut = functional.pad(shortcut, (0, 0, 0, 0, self.front, self.front))
        return torch.relu(y + shortcut)


class ResNet(nn.Module):
    """ResNet-20 for 32 x 32 images."""

    def __init__(self, blocks=3, widths=(16, 32, 64), num_classes=10):
        """Make the layers."""
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        inputs = widths[0]
        for stage, width in enumerate(widths, 1):
            layer = nn.Sequential(*(Block(inputs if i == 0 else width, width)
                                    for i in range(blocks)))
            setattr(self, f"layer{stage}", layer)
            inputs = width
        self.linear = nn.Linear(inputs, num_classes)

    def forward(self, x):
        """Map [N, 3, 32, 32] to logits."""
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def load(tensors):
    """Return the module in evaluation mode, with these weights (a PyTorch state dict)."""
    model = ResNet()
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and all("num_batches" in name for name in missing), (missing, unexpected)
    return model.eval().requires_grad_(False)
