"""Make torch_checkpoint.pth with the real torch.save; the tests themselves need no torch.

Run from the project's root, where torch is installed: python -m tests.models.make_torch_checkpoint
Made with torch 2.13.0+cpu. The values follow from arange, so that the tests can write them down.
"""

from collections import OrderedDict
from pathlib import Path

import torch

if __name__ == "__main__":
    numbers = torch.arange(24, dtype=torch.float32)
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.BatchNorm2d(2))
    with torch.no_grad():
        for value in network.state_dict().values():
            value.copy_(torch.arange(value.numel()).reshape(value.shape))
    state = OrderedDict(network.state_dict())
    state.update({
        "transposed": numbers.reshape(4, 6).T,
        "part": numbers[5:11:2],
        "parameter": torch.nn.Parameter(numbers.reshape(2, 3, 4)),
        "half": numbers[:4].half(),
        "bfloat": (numbers[:4] / 3).bfloat16(),
        "double": numbers[:2].double(),
        "flags": torch.tensor([True, False]),
        "bytes": torch.arange(3, dtype=torch.uint8),
        "scalar": torch.tensor(-3),
        "empty": torch.zeros(0, 3),
    })
    checkpoint = {"epoch": 300, "best": 0.875, "name": "résnet", "done": True, "none": None,
                  "history": [1, [2, 70000], (3, -1, 2**40), ()], "state_dict": state}
    torch.save(checkpoint, Path(__file__).parent / "torch_checkpoint.pth")
