"""What the compiler options of an attack on an NVIDIA GPU bring to the model alone.

    python benchmarks/layout.py [--models resnet20 mobilenet resnet50 resnet18 wide_resnet28_10] [--precision highest]

Jitted value-and-gradient by the image, as XLA compiles it and with the options of `gse_jax/attacks/cuda.py`. The
ResNet-20 and the MobileNet are real, the others have random weights, on which the time does not depend. On a CPU
the options change nothing.
"""

import jax
import jax.numpy as jnp
import numpy as np

import imagenet_panels
import results_file
from gse_jax.attacks.precision import PRECISIONS
from gse_jax.models import Classifier
from gse_jax.models.classifier import expected_params
from gse_jax.models.imagenet_resnet import ImageNetResNet, ImageNetResNetConfig
from gse_jax.models.wide_resnet import WideResNet, WideResNetConfig
from throughput import Bare

INNER = (64, 128, 256, 512)
# Module and configuration, pixels, images in a batch.
RANDOM = {
    "resnet18": (ImageNetResNet, ImageNetResNetConfig(18, 64, INNER, INNER, 1000, 3), 224, 64),
    "resnet50": (ImageNetResNet, ImageNetResNetConfig(50, 64, INNER, (256, 512, 1024, 2048), 1000, 3), 224, 32),
    "wide_resnet28_10": (WideResNet, WideResNetConfig(28, 16, (160, 320, 640), 10, 3), 32, 64),
}
NAMES = ("resnet20", "mobilenet", *RANDOM)


def case(name):
    """(params, apply_fn, images, batch)."""
    if name == "resnet20":
        params, apply_fn, x, *_ = results_file.network_and_images(64)
        return params, apply_fn, x, 1024
    if name == "mobilenet":
        params, apply_fn, x, *_ = imagenet_panels.real(32)
        return params, apply_fn, x, 32
    module, config, side, batch = RANDOM[name]
    generator = np.random.default_rng(0)
    params = jax.tree.map(lambda a: jnp.asarray(0.05 * generator.standard_normal(a.shape, np.float32) ** 2),
                          expected_params(module, config))
    images = generator.random((8, side, side, 3), np.float32)
    return params, Classifier(module, config, (0.5,) * 3, (0.5,) * 3), images, batch


def main():
    """Measure and print."""
    arguments = results_file.parser(__doc__.splitlines()[0])
    arguments.add_argument("--models", nargs="+", choices=NAMES, default=NAMES)
    arguments.add_argument("--precision", choices=PRECISIONS, default="highest")
    args = arguments.parse_args()
    rows = []
    for name in ["resnet20"] if args.smoke else args.models:
        params, apply_fn, images, batch = case(name)
        batch = 2 if args.smoke else batch
        plain, tuned = (Bare(params, apply_fn, images, args.precision, (batch,), tuned) for tuned in (False, True))
        times = np.asarray([(plain(), tuned()) for _ in range(3)]) * 1e6
        rows.append({"model": name, "precision": args.precision, "pixels": images.shape[1], "batch": batch,
                     "plain_us": float(np.median(times[:, 0])), "tuned_us": float(np.median(times[:, 1])),
                     "ratio": float(np.median(times[:, 1] / times[:, 0]))})
        results_file.show(rows[-1])
    results_file.write("layout" if args.precision == "highest" else f"layout_{args.precision}", args, rows)


if __name__ == "__main__":
    main()
