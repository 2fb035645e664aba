"""The public call: `gse_jax.attack`."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from gse_jax.attacks import validation
from gse_jax.attacks.algorithm import Sample
from gse_jax.attacks.program import Program, in_graph
from gse_jax.attacks.registry import find_method
from gse_jax.attacks.runner import Progress, as_key, default_lanes_per_device, run
from gse_jax.types import ApplyFn, AttackResult, Bounds

LARGEST_CIFAR_SIDE = 64  # pixels; larger images take the ImageNet preset


@dataclasses.dataclass(frozen=True, eq=False)
class _ByIdentity:
    """Makes a callable hashable that is not, e.g. a module holding arrays."""

    fn: ApplyFn

    def __call__(self, params, x):
        return self.fn(params, x)


def _hashable(apply_fn):
    try:
        hash(apply_fn)
    except TypeError:
        return _ByIdentity(apply_fn)
    return apply_fn


def _configure(method, settings, hyperparams, image_shape, targeted):
    """Fill in the preset; return (settings, hyperparams, its name)."""
    domain = "cifar10" if max(image_shape[:2]) <= LARGEST_CIFAR_SIDE else "imagenet"
    default_settings, default_hyperparams = method.preset(domain, targeted)
    name = f"{domain} {'targeted' if targeted else 'untargeted'}"
    if settings is None and hyperparams is None:
        return default_settings, default_hyperparams, name
    settings = default_settings if settings is None else settings
    hyperparams = default_hyperparams if hyperparams is None else hyperparams
    return settings, hyperparams, "custom"


def attack(
    params,
    apply_fn: ApplyFn,
    x,
    y,
    *,
    targets=None,
    method: str = "gse",
    settings=None,
    hyperparams=None,
    bounds: Bounds = (0.0, 1.0),
    key=None,
    lanes: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> AttackResult:
    """Attack a batch of images.

    Args:
        params: any pytree of arrays; passed to `apply_fn`.
        apply_fn: (params, x [N, H, W, C]) -> logits [N, K], in evaluation mode, each row depending
            on its own image only. Pass the same function object in later calls: a new lambda
            compiles anew.
        x: [N, H, W, C] float32 or float64, C in {1, 3}, H and W >= 8, values inside `bounds`.
            N may be 0.
        y: [N] int, true labels.
        targets: [N] int, classes to aim at, different from `y`; None for an untargeted attack.
        method: name of the attack.
        settings: static configuration; None for the preset. See `gse_jax.preset`.
        hyperparams: pytree of floats; None for the preset. Changing it never compiles anew, and it
            may be `vmap`-ped over.
        bounds: (lowest, highest) pixel value of `x` and of the result. The same image in another
            range gets the same relative perturbation.
        key: None, an int, or a `jax.random.key`; attacks without randomness ignore it.
        lanes: number of images worked on at a time, over all devices. Changes speed, not results
            (up to the model's own rounding).
        progress: called with a `Progress` between bounded stretches of work; ignored under the
            caller's `jit` or `vmap`.

    Returns:
        AttackResult. Without explicit configuration the preset follows the image size (up to 64
        pixels "cifar10", else "imagenet") and the direction; `result.preset` says which.

    Runs on all local devices and returns to the host now and then. Under the caller's `jit`,
    `vmap` or `shard_map` it is one compiled loop on whatever device the caller's program runs.

    Raises:
        TypeError: for a wrong dtype or type of an argument.
        ValueError: for a wrong shape, range or name; in one line, before anything compiles.

    References:
        arXiv 2311.17434 for method "gse".
    """
    row = find_method(method)
    bounds = validation.check_bounds(bounds)
    validation.check_lanes(lanes)
    key = as_key(key)
    x, y = _as_array("x", x), _as_array("y", y)
    targeted = targets is not None
    validation.check_images(x, bounds)
    validation.check_labels("y", y, x.shape[0])
    if targeted:
        targets = _as_array("targets", targets)
        validation.check_labels("targets", targets, x.shape[0])
    settings, hyperparams, name = _configure(row, settings, hyperparams, x.shape[1:], targeted)
    row.check(settings, hyperparams, x.shape[1:])
    num_classes = validation.check_model(params, apply_fn, x)
    validation.check_label_values("y", y, num_classes)
    if targeted:
        validation.check_label_values("targets", targets, num_classes)
        validation.check_targets_differ(y, targets)

    count = x.shape[0]
    program = Program(_hashable(apply_fn), row.bind, settings, targeted, bounds,
                      rewrite_convolutions=jax.default_backend() == "cpu")
    hyperparams = jax.tree.map(lambda h: jnp.asarray(h, x.dtype), hyperparams)
    traced = validation.is_traced(params, x, y, targets, hyperparams, key)
    array = jnp.asarray if traced else np.asarray
    goal = targets if targeted else np.full(count, -1)
    samples = Sample(array(x), array(y).astype(np.int32), array(goal).astype(np.int32),
                     np.arange(count, dtype=np.int32))
    if count == 0:
        outcome = _empty_outcome(program, hyperparams, key, samples)
    elif traced:
        platform = jax.default_backend()
        width = lanes or default_lanes_per_device(platform, *x.shape[1:3])
        outcome = in_graph(program, min(width, count))(params, hyperparams, key, samples)
    else:
        outcome = run(program, params, hyperparams, key, samples, lanes, progress)
    outcome = jax.tree.map(jnp.asarray, outcome)
    return AttackResult(*outcome, method=method, preset=name)


def _as_array(name, value):
    """Return an array without copying one; lists are accepted."""
    if hasattr(value, "ndim") and hasattr(value, "dtype"):
        return value
    try:
        return np.asarray(value, np.float32) if name == "x" else np.asarray(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be an array, got {type(value).__name__}") from None


def _empty_outcome(program, hyperparams, key, samples):
    algorithm = program.algorithm(hyperparams, key)
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), samples)
    shapes = jax.eval_shape(lambda s: algorithm.finish(algorithm.init(s)), one)
    return jax.tree.map(lambda a: np.zeros((0, *a.shape), a.dtype), shapes)
