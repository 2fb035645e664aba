"""How exactly an accelerator multiplies inside the loop, and the check that follows a coarse loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from gse_jax.attacks.algorithm import Outcome
from gse_jax.devices import is_out_of_memory, platform
from gse_jax.ops import is_adversarial
from gse_jax.types import Status

# What users call them -> what JAX does.
PRECISIONS = {"highest": "highest", "tf32": "tensorfloat32", "bf16": "bfloat16"}

# Images at a time: at most so many, of at most so many pixels together.
_BATCHES = {"cpu": (64, 64**3)}
_BATCH_OF_ACCELERATORS = 1024, 2**20  # as many as its lanes by default, which hold gradients too


def check_precision(precision) -> None:
    """Refuse an unknown precision.

    Args:
        precision: as in `gse_jax.attack`.

    Raises:
        ValueError: in one line.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")


def multiplying(precision):
    """Return a context in which matrix products and convolutions are traced with a precision."""
    return jax.default_matmul_precision(PRECISIONS[precision])


def full_precision(apply_fn):
    """Make a model multiply in float32 on every device, as attacks do by default.

    JAX's default on GPUs since the A100 is TF32. The adversarial images of a minimal attack lie so
    close to the decision boundary that 3 % of those found in TF32 are none in float32 (10,000 tiled
    CIFAR-10 images, ResNet-20).

    Args:
        apply_fn: (params, x) -> logits.

    Returns:
        A function of the same signature; the model's own calls may still ask for less. Of a model that
        squeezes a batch of one it returns [1, classes] all the same.
    """
    def exact(params, x):
        with multiplying("highest"):
            logits = apply_fn(params, x)
            return logits.reshape(len(x), logits.shape[-1])

    return exact


def as_returned(logits):
    """Round logits to their own format, as a model that is called by itself returns them.

    Inside a larger program XLA keeps the digits that bfloat16 has no room for. An attack that sees them
    stops just past the decision boundary, where the model's own logits tie.

    Args:
        logits: of any shape.

    Returns:
        The same shape and dtype.
    """
    kind = jnp.finfo(logits.dtype)
    return jax.lax.reduce_precision(logits, kind.nexp, kind.nmant) if kind.bits < 32 else logits


def narrowed(logits, dtype):
    """Take digits from logits that have more than the images, such as a float64 model's, without making ties.

    Args:
        logits: [..., K].
        dtype: of the images.

    Returns:
        The same shape, in `dtype` where that is the narrower one; then shifted, so that the largest is 0.
    """
    if jnp.finfo(logits.dtype).bits <= jnp.finfo(dtype).bits:
        return logits
    return (logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True))).astype(dtype)


def confirmed(params, apply_fn, outcome: Outcome, x, y, targets, starts=None, lanes=None) -> Outcome:
    """Look at the adversarial images again in full precision, and take back what does not hold.

    Args:
        params: the model's parameters.
        apply_fn: (params, x) -> logits.
        outcome: leading axis N; of a loop in lower precision.
        x: [N, H, W, C] clean images; NumPy, or traced, as all of these.
        y: [N] true labels.
        targets: [N] classes aimed at, or None.
        starts: [N, H, W, C] what the attack began with, if it was given adversarial images.
        lanes: images at a time at most; None for a number that suits their size.

    Returns:
        Outcome in which an image that no longer is adversarial counts as not found, or as found as it was
        given where that holds; `forward_evals` has this pass added.
    """
    # What is in host memory stays there; an accelerator might not hold all of it.
    array = np if isinstance(outcome.success, np.ndarray) else jnp
    wanted = array.asarray(y if targets is None else targets).astype(np.int32)
    # Not kept where the function is for this call only, see `program.hashable`.
    build = _holds.__wrapped__ if hasattr(apply_fn, "built") else _holds
    if array is np:
        params = jax.device_put(params)  # once, not with every batch
    holds = functools.partial(build(apply_fn, targets is not None), params)
    most, pixels = _BATCHES.get(platform(), _BATCH_OF_ACCELERATORS)
    batch = int(np.clip(pixels // (x.shape[1] * x.shape[2]), 1, min(lanes or most, most)))
    # A clean image that only the coarser loop misclassified is lost too.
    lost = outcome.success & ~_held(holds, outcome.adversarials, wanted, batch, array)
    if starts is not None and (array is jnp or lost.any()):
        kept = lost & _held(holds, starts, wanted, batch, array)
        lost = lost & ~kept
        outcome = outcome._replace(
            adversarials=array.where(kept[:, None, None, None], starts, outcome.adversarials),
            status=array.where(kept, np.int32(Status.FOUND), outcome.status))
    return outcome._replace(
        adversarials=array.where(lost[:, None, None, None], x, outcome.adversarials),
        success=outcome.success & ~lost,
        status=array.where(lost, np.int32(Status.NOT_FOUND), outcome.status),
        tradeoff=array.where(lost, outcome.tradeoff.dtype.type(0), outcome.tradeoff),
        forward_evals=outcome.forward_evals + 1)


def _held(holds, images, wanted, batch, array):
    """[N] whether the images are adversarial, `batch` of them at a time, fewer where memory runs out."""
    count = images.shape[0]
    # Whole batches, filled up with the last image: one program for any number.
    places = np.minimum(np.arange(-(-count // batch) * batch), count - 1).reshape(-1, batch)
    if array is jnp:
        return jax.lax.map(lambda part: holds(images[part], wanted[part]), places).reshape(-1)[:count]
    try:
        return np.concatenate([np.asarray(holds(images[part], wanted[part])) for part in places])[:count]
    except jax.errors.JaxRuntimeError as error:
        if batch == 1 or not is_out_of_memory(error):
            raise
        return _held(holds, images, wanted, batch // 2, array)


@functools.lru_cache(maxsize=8)
def _holds(apply_fn, targeted):
    def holds(params, images, wanted):
        logits = as_returned(full_precision(apply_fn)(params, images))
        return jax.vmap(functools.partial(is_adversarial, targeted=targeted))(logits, wanted)

    return jax.jit(holds)
