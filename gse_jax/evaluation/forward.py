"""Forward passes outside the attack, in batches of one shape, so that one program is compiled."""

import functools
import sys
from typing import NamedTuple

import jax
import numpy as np

from gse_jax.attacks.precision import full_precision
from gse_jax.devices import is_out_of_memory
from gse_jax.types import ApplyFn

_PIXELS = 64 * 64 * 64  # Per batch: 64 images of 64 x 64 pixels.
_LARGEST_BATCH = 64


class Predictions(NamedTuple):
    """What the model says of N images, NumPy.

    Attributes:
        classes: [N] int64, argmax of the logits; -1 where they are not finite.
        confidences: [N] float64, probability of that class; NaN where the logits are not finite.
        num_classes: K.
    """

    classes: np.ndarray
    confidences: np.ndarray
    num_classes: int


class Forward:
    """Classifies images in padded batches of one size, which halves where memory runs out."""

    def __init__(self, params, apply_fn: ApplyFn, image_shape):
        """Compile nothing yet.

        Args:
            params: the model's parameters.
            apply_fn: (params, x) -> logits.
            image_shape: (H, W, C).
        """
        self._params = jax.device_put(params)  # once, not with every batch
        # Others may hold weights, which may have changed.
        self._logits = (_jitted if _is_ours(apply_fn) else _jitted.__wrapped__)(apply_fn)
        self.batch = int(np.clip(_PIXELS // (image_shape[0] * image_shape[1]), 1, _LARGEST_BATCH))

    def __call__(self, x) -> Predictions:
        """Classify images.

        Args:
            x: [N, H, W, C], N >= 1.

        Returns:
            Predictions.
        """
        parts, start = [], 0
        while start < len(x):
            batch = np.asarray(x[start:start + self.batch])
            # Padding repeats an image of the batch, so that it costs no surprises.
            padded = np.concatenate([batch, np.repeat(batch[:1], self.batch - len(batch), axis=0)])
            try:
                logits = np.asarray(self._logits(self._params, padded), np.float64)
            except jax.errors.JaxRuntimeError as error:
                if not is_out_of_memory(error) or self.batch == 1:
                    raise
                self.batch //= 2
                continue
            parts.append(logits[:len(batch)])
            start += len(batch)
        return _predictions(np.concatenate(parts))


def _is_ours(apply_fn):
    classifier = sys.modules.get("gse_jax.models.classifier")  # which loads flax
    return classifier is not None and isinstance(apply_fn, classifier.Classifier)


@functools.lru_cache(maxsize=32)
def _jitted(apply_fn):
    """Once per model of ours, not once per attack on it."""
    return jax.jit(full_precision(apply_fn))


def _predictions(logits) -> Predictions:
    finite = np.isfinite(logits).all(axis=1)
    safe = np.where(finite[:, None], logits, 0.0)
    powers = np.exp(safe - safe.max(axis=1, keepdims=True))
    confidences = powers.max(axis=1) / powers.sum(axis=1)
    # The argmax of a row of NaN is 0, which "fools" every other label.
    return Predictions(np.where(finite, safe.argmax(axis=1), -1),
                       np.where(finite, confidences, np.nan), logits.shape[1])
