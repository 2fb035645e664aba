"""A CIFAR ResNet in NumPy float64 and PyTorch's layout: the independent oracle of these tests."""

import numpy as np


def random_tensors(random, *, blocks, widths, num_classes, num_channels):
    """Return a PyTorch-layout state dict with lively random weights, float32."""
    tensors = {}

    def convolution(conv, norm, out, inputs):
        scale = np.sqrt(2 / (9 * inputs))
        tensors[f"{conv}.weight"] = random.normal(0, scale, (out, inputs, 3, 3))
        tensors[f"{norm}.weight"] = random.uniform(0.5, 1.5, out)
        tensors[f"{norm}.bias"] = random.normal(0, 0.3, out)
        tensors[f"{norm}.running_mean"] = random.normal(0, 0.3, out)
        tensors[f"{norm}.running_var"] = random.uniform(0.3, 2.0, out)

    convolution("conv1", "bn1", widths[0], num_channels)
    inputs = widths[0]
    for stage, width in enumerate(widths, 1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            convolution(f"{name}.conv1", f"{name}.bn1", width, inputs)
            convolution(f"{name}.conv2", f"{name}.bn2", width, width)
            inputs = width
    tensors["linear.weight"] = random.normal(0, 0.5, (num_classes, inputs))
    tensors["linear.bias"] = random.normal(0, 0.5, num_classes)
    return {name: array.astype(np.float32) for name, array in tensors.items()}


def forward(tensors, images):
    """Map normalised images [N, H, W, C] to (logits, last feature map [N, h, w, C])."""
    t = {name: np.asarray(array, np.float64) for name, array in tensors.items()}

    def convolution(x, name, stride):
        """Cross-correlate by summing the nine shifted images, one kernel tap each."""
        kernel = t[f"{name}.weight"]
        height, width = x.shape[2:]
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        return sum(
            np.einsum("nihw,oi->nohw", padded[:, :, i : i + height, j : j + width],
                      kernel[:, :, i, j], optimize=True)
            for i in range(3)
            for j in range(3)
        )[:, :, ::stride, ::stride]

    def norm(x, name):
        weight, bias, mean, var = (
            t[f"{name}.{part}"][:, None, None]
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / np.sqrt(var + 1e-5) * weight + bias

    x = np.maximum(norm(convolution(images.transpose(0, 3, 1, 2), "conv1", 1), "bn1"), 0)
    for stage in (1, 2, 3):
        block = 0
        while (name := f"layer{stage}.{block}") + ".conv1.weight" in t:
            stride = 2 if stage > 1 and block == 0 else 1
            y = np.maximum(norm(convolution(x, f"{name}.conv1", stride), f"{name}.bn1"), 0)
            y = norm(convolution(y, f"{name}.conv2", 1), f"{name}.bn2")
            shortcut = np.zeros_like(y)
            front = (y.shape[1] - x.shape[1]) // 2
            shortcut[:, front : front + x.shape[1]] = x[:, :, ::stride, ::stride]
            x = np.maximum(y + shortcut, 0)
            block += 1
    return x.mean((2, 3)) @ t["linear.weight"].T + t["linear.bias"], x.transpose(0, 2, 3, 1)
