"""Train the digits classifier that ships with the package.

    python -m gse_jax.models.train --out FILE [--model resnet20] [--epochs 10] [--seed 0]

Trains on `digits:train` (1437 images) with AdamW on a one-cycle schedule and random shifts, prints
one line per epoch, and writes the weights of the last epoch: the test images choose nothing. A
Python loop over a jitted step, because XLA:CPU runs convolutions slowly inside its own loops.

The shipped `weights/digits_resnet20.safetensors` (1.09 MB) was made by

    python -m gse_jax.models.train --out FILE --model resnet20 --epochs 10 --seed 0

in 85 s on two CPU cores (jax 0.10.2, flax 0.12.8, optax 0.2.8, numpy 2.4.6): test accuracy 0.9889
(356 of 360), sha256 ec370df4d831b98a064aa43fe780bf20953ad209f683c8cbeb91152f2c98b401, the same in
two runs.

References:
  Loshchilov and Hutter, arXiv:1711.05101 (AdamW); Smith and Topin, arXiv:1708.07120 (one-cycle).
"""

import argparse
import functools
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gse_jax import data
from gse_jax.models import registry, resnet, weights_file
from gse_jax.models.classifier import Classifier, normalization

BATCH_SIZE = 64
PEAK_LEARNING_RATE = 5e-3
WEIGHT_DECAY = 1e-4
# Up to one pixel of the 8x8 original, which is four of the enlarged image.
MAX_SHIFT = 4
WIDTHS = (16, 32, 64)
MODELS = ("resnet20", "resnet32", "resnet44", "resnet56")


def train(
    depth: int,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    epochs: int,
    seed: int,
    widths: tuple[int, int, int] = WIDTHS,
) -> Iterator[tuple[Classifier, dict[Any, Any], float]]:
    """Train a CIFAR ResNet and yield it after every epoch.

    The same seed, data and versions of jax and numpy on the same kind of machine give the same
    weights.

    Args:
      depth: `6n + 2`.
      images: `[N, H, W, C]` floats in [0, 1], N at least 64.
      labels: `[N]` integers from 0.
      epochs: Passes over the data, at least 1.
      seed: Decides the initial weights, the order and the shifts.
      widths: Channels of the three stages.

    Yields:
      `(apply_fn, params, mean training loss)` per epoch.

    Raises:
      ValueError: If `epochs` is below 1 or there are fewer images than one batch.
    """
    if epochs < 1 or len(images) < BATCH_SIZE:
        raise ValueError(f"epochs: got {epochs} over {len(images)} images, expected at least 1 "
                         f"over at least {BATCH_SIZE}")
    config = resnet.ResNetConfig(depth, widths, int(labels.max()) + 1, images.shape[-1])
    mean, std = normalization(registry.DEFAULT_NORMALIZATION, config.num_channels)
    center, spread = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    normalised = (images - center) / spread
    steps = epochs * (len(images) // BATCH_SIZE)
    initial, step = _compiled(config, steps)
    state = initial(jax.random.key(seed))
    apply_fn = Classifier(resnet.CifarResNet, config, mean, std)
    # What lies outside a shifted image is background, 0 in [0, 1].
    background = (np.float32(0) - center) / spread
    random = np.random.RandomState(seed)
    for _ in range(epochs):
        losses = []
        for chosen in _batches(random, len(images)):
            shifted = _shifted(random, normalised[chosen], background)
            *state, loss = step(*state, shifted, labels[chosen])
            losses.append(loss)
        merged = nnx.merge_state(*state[:2])
        yield apply_fn, nnx.to_pure_dict(merged), float(jnp.stack(losses).mean())


def accuracy(apply_fn: Classifier, params: Any, dataset: data.Dataset) -> float:
    """Return the share of correctly classified images, in one batch.

    Args:
      apply_fn: The classifier.
      params: Its parameters.
      dataset: Images `[N, H, W, C]` and labels.

    Returns:
      Between 0 and 1.
    """
    logits = jax.jit(apply_fn)(params, dataset.images)
    return float(np.mean(np.asarray(logits).argmax(-1) == dataset.labels))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line described in the module docstring.

    Args:
      arguments: Command-line arguments; None takes those of the process.

    Raises:
      SystemExit: With one line on stderr, if an argument is wrong.
    """
    parser = argparse.ArgumentParser(prog="python -m gse_jax.models.train")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--model", choices=MODELS, default="resnet20")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    # Found out now, not after minutes of training.
    if not options.out.parent.is_dir():
        parser.error(f"--out: folder {options.out.parent} does not exist; create it first")
    if options.epochs < 1:
        parser.error(f"--epochs: got {options.epochs}, expected at least 1")
    training, test = data.load("digits:train"), data.load("digits")
    start = time.monotonic()
    run = train(int(options.model.removeprefix("resnet")), training.images, training.labels,
                epochs=options.epochs, seed=options.seed)
    for epoch, (apply_fn, params, loss) in enumerate(run, 1):
        share, seconds = accuracy(apply_fn, params, test), time.monotonic() - start
        print(f"epoch {epoch}/{options.epochs}  loss {loss:.4f}  test accuracy {share:.4f}  "
              f"{seconds:.0f} s", flush=True)
    weights_file.save(options.out, params)
    digest = hashlib.sha256(options.out.read_bytes()).hexdigest()
    print(f"{options.out}  test accuracy {share:.4f}  sha256 {digest}")


@functools.cache  # Further seeds of one setting then compile nothing.
def _compiled(config: resnet.ResNetConfig, steps: int) -> tuple[Any, Any]:
    """Return jitted `initial(key) -> state` and `step(*state, images, labels) -> (*state, loss)`.

    The state is (weights, BatchNorm statistics, optimizer state).
    """
    import optax

    optimizer = optax.adamw(
        optax.cosine_onecycle_schedule(steps, PEAK_LEARNING_RATE), weight_decay=WEIGHT_DECAY
    )

    def build(key):
        model = resnet.CifarResNet(config, rngs=nnx.Rngs(key))
        model.train()
        return model

    graphdef = nnx.graphdef(nnx.eval_shape(lambda: build(jax.random.key(0))))

    @jax.jit  # Eager initialisation would compile every initializer by itself.
    def initial(key):
        weights, statistics = nnx.state(build(key), nnx.Param, nnx.BatchStat)
        return weights, statistics, optimizer.init(weights)

    def loss_fn(weights, statistics, images, labels):
        # A copy, because the statistics come from outside the trace and training updates them.
        model = nnx.merge(graphdef, weights, statistics, copy=True)
        logits, _ = model(images)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, nnx.state(model, nnx.BatchStat)

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(weights, statistics, optimizer_state, images, labels):
        (loss, statistics), gradient = jax.value_and_grad(loss_fn, has_aux=True)(
            weights, statistics, images, labels
        )
        # optax 0.2.8 mixes integer step counts with floats, which strict promotion forbids.
        with jax.numpy_dtype_promotion("standard"):
            updates, optimizer_state = optimizer.update(gradient, optimizer_state, weights)
        return optax.apply_updates(weights, updates), statistics, optimizer_state, loss

    return initial, step


def _batches(random: np.random.RandomState, size: int) -> Iterator[np.ndarray]:
    """Yield full batches in random order, without the rest of an epoch: one shape to compile."""
    order = random.permutation(size)
    for start in range(0, size - BATCH_SIZE + 1, BATCH_SIZE):
        yield order[start : start + BATCH_SIZE]


def _shifted(
    random: np.random.RandomState, images: np.ndarray, background: np.ndarray
) -> np.ndarray:
    """Move each image by up to `MAX_SHIFT` pixels in each direction."""
    _, height, width, _ = images.shape
    canvas = np.empty((len(images), height + 2 * MAX_SHIFT, width + 2 * MAX_SHIFT,
                       images.shape[-1]), np.float32)
    canvas[...] = background
    canvas[:, MAX_SHIFT : MAX_SHIFT + height, MAX_SHIFT : MAX_SHIFT + width] = images
    corners = random.randint(0, 2 * MAX_SHIFT + 1, (len(images), 2))
    return np.stack([
        image[row : row + height, column : column + width]
        for image, (row, column) in zip(canvas, corners, strict=True)
    ])


if __name__ == "__main__":
    main()
