"""Ask a model for logits and gradients in batches of one shape, for the pre-flight checks.

Two programs are compiled whatever the number of images: logits of an affine map of the images, so
that other normalisations cost no compilation, and the input gradient of the margin.
"""

import jax
import jax.numpy as jnp
import numpy as np

from gse_jax.attacks.precision import full_precision
from gse_jax.devices import is_out_of_memory
from gse_jax.evaluation.fingerprint import program_digest
from gse_jax.ops import logit_gap

_SMALL_SIDE = 64  # pixels; larger images come in smaller batches and fewer of them are probed
_MIN_BATCH = 4  # rows; below that, batch statistics have nothing to mix


class ModelProbe:
    """Evaluate `apply_fn` on NumPy images, always in full batches.

    Attributes:
        batch: rows of every forward pass.
        gradient_batch: rows of every gradient pass; another number, so that comparing the two
            shows a model whose answer depends on the size of the batch.
        many: images that are enough to compare accuracies.
        few: images that are enough for gradients.
    """

    def __init__(self, params, apply_fn, x):
        """Compile nothing yet.

        Args:
            params: the model's parameters.
            apply_fn: (params, x) -> logits.
            x: [N, H, W, C] NumPy, N >= 1; only its shape and dtype are used.
        """
        apply_fn = full_precision(apply_fn)
        small = max(x.shape[1:3]) <= _SMALL_SIDE
        self.batch = max(min(len(x), 128 if small else 16), _MIN_BATCH)
        self.gradient_batch = max(self.batch // 4, 2)
        self.many, self.few = (512, 64) if small else (64, 16)
        self._params, self._apply_fn = params, apply_fn
        self._shape, self._dtype = x.shape[1:], x.dtype
        self._tried, self._error = False, None
        self._identity = (np.ones(x.shape[3], x.dtype), np.zeros(x.shape[3], x.dtype))
        self._logits = jax.jit(
            lambda p, x, scale, shift: apply_fn(p, x * scale[None, None, None]
                                                + shift[None, None, None]))
        self._gradients = jax.jit(
            lambda p, x, y: jax.grad(lambda x: _margins(apply_fn(p, x), y), has_aux=True)(x))

    def logits(self, x, affine=None):
        """Return the logits of `x`, or of `x * scale + shift`.

        Args:
            x: [M, H, W, C] NumPy, M >= 1.
            affine: (scale [C], shift [C]) or None.

        Returns:
            [M, K] NumPy float64.
        """
        affine = self._identity if affine is None else tuple(
            np.asarray(a, x.dtype) for a in affine)
        return self._in_batches("batch", lambda x: self._logits(self._params, x, *affine), x)

    def gradients(self, x, y):
        """Return input gradients of `logit of y - largest other logit`, and the logits beside it.

        Unlike the loss of the attacks it is not cut at 0, so a misclassified image has a gradient.

        Args:
            x: [M, H, W, C] NumPy, M >= 1.
            y: [M] int.

        Returns:
            (gradients [M, H, W, C], logits [M, K]), NumPy.
        """
        return self._in_batches("gradient_batch",
                                lambda x, y: self._gradients(self._params, x, y),
                                x, np.asarray(y, np.int32))

    def gradient_error(self):
        """Try whether the model can be differentiated, without computing anything.

        Returns:
            None, or the first line of the exception.
        """
        if not self._tried:
            shape = (self.gradient_batch, *self._shape)
            try:
                jax.eval_shape(self._gradients, self._params,
                               jax.ShapeDtypeStruct(shape, self._dtype),
                               jax.ShapeDtypeStruct(shape[:1], np.int32))
            except Exception as error:  # noqa: BLE001  # The user's model may raise anything.
                reason = str(error).strip().split("\n")[0][:200].rstrip(".")
                self._error = f"{type(error).__name__}: {reason}"
            self._tried = True
        return self._error

    def logits_of_new_trace(self, x):
        """Return the logits from a second tracing of `apply_fn`, or None if that is the same.

        Randomness of Python or NumPy inside `apply_fn` is drawn while tracing and then frozen:
        repeating the compiled call does not show it, tracing again does.

        Args:
            x: [M, H, W, C] NumPy, M >= 1.

        Returns:
            [M, K] NumPy float64, or None where both traces are the same program.
        """
        first, second = (program_digest(self._params, self._apply_fn, x.shape[1:], x.dtype) for _ in range(2))
        if first == second:
            return None
        again = jax.jit(lambda p, x: self._apply_fn(p, x))
        return self._in_batches("batch", lambda x: again(self._params, x), x)

    def _in_batches(self, name, fn, *arrays):
        """Call `fn` on full batches, the last one filled up with its own rows; join the rows.

        Where memory runs out, the batch of that name halves for good.
        """
        outputs, start = [], 0
        while start < len(arrays[0]):
            batch = getattr(self, name)
            rows = [a[start:start + batch] for a in arrays]
            count = len(rows[0])
            try:
                filled = fn(*(r[np.arange(batch) % count] for r in rows))
                filled = jax.tree.map(lambda o: np.asarray(o, np.float64), filled)
            except jax.errors.JaxRuntimeError as error:
                if not is_out_of_memory(error) or batch == 1:
                    raise
                setattr(self, name, batch // 2)
                continue
            outputs.append(jax.tree.map(lambda o, count=count: o[:count], filled))
            start += count
        return jax.tree.map(lambda *parts: np.concatenate(parts), *outputs)


def evenly_chosen(count, limit):
    """Return up to `limit` positions, spread over all images: files are often sorted by class.

    Args:
        count: number of images.
        limit: most positions to return.

    Returns:
        [min(count, limit)] int, ascending.
    """
    if count <= limit:
        return np.arange(count)
    return np.linspace(0, count - 1, limit).round().astype(int)


def _margins(logits, y):
    return jnp.sum(jax.vmap(logit_gap)(logits, y)), logits
