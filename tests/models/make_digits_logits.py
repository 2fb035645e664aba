"""Make digits_logits.npz: what the shipped weights answer, computed without JAX, in float64.

Run from the project's root: python -m tests.models.make_digits_logits
Made with numpy 2.4.6 and safetensors 0.8.0 from digits_resnet20.safetensors of sha256 ec370df4....
"""

from pathlib import Path

import numpy as np
from tests.models.numpy_resnet import forward
from safetensors.numpy import load_file

from gse_jax import data

WEIGHTS = Path(data.__file__).parents[1] / "models/weights/digits_resnet20.safetensors"

if __name__ == "__main__":
    dataset = data.load("digits", limit=8)
    logits, features = forward(load_file(WEIGHTS), (dataset.images - 0.5) / 0.5)
    np.savez(Path(__file__).parent / "digits_logits.npz", ids=np.array(dataset.ids),
             logits=logits, pooled=features.mean((1, 2)))
