"""Checks of what the caller passed, before anything compiles: one clear line each.

Shapes and dtypes are always checked. Values are checked where they are known, that is not under the
caller's own `jit` or `vmap`; there an impossible label makes the loss NaN and the image ends as
`Status.NON_FINITE` instead of being "fooled".
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np

from gse_jax.attacks.errors import in_one_line
from gse_jax.attacks.program import hashable

SMALLEST_SIDE = 8  # pixels: one patch of d_{2,0}


def is_traced(*trees) -> bool:
    """Tell whether any leaf is a tracer, or the caller is inside a `jit`.

    Args:
        *trees: pytrees.

    Returns:
        True where values cannot be looked at.
    """
    leaves = jax.tree.leaves(trees)
    # Under jit even an operation on a constant is staged: a model that closes over tracers shows. Outside,
    # this one compiles nothing.
    return any(isinstance(leaf, jax.core.Tracer) for leaf in (*leaves, jax.device_put(0.0)))


def check_bounds(bounds) -> tuple[float, float]:
    """Return `bounds` as two floats.

    Args:
        bounds: (lowest, highest) pixel value.

    Returns:
        (low, high).

    Raises:
        ValueError: unless low < high, both finite.
    """
    try:
        low, high = (float(b) for b in bounds)
    except (TypeError, ValueError):
        raise ValueError(f"bounds must be two numbers (low, high), got {bounds!r}; "
                         "e.g. bounds=(0., 1.)") from None
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise ValueError(f"bounds must be (low, high) with low < high, got ({low:g}, {high:g})")
    return low, high


def as_array(name, value):
    """Return an array without copying one; lists are accepted, and float64 where JAX has only float32.

    Args:
        name: of the argument; images by "x" and "adversarials".
        value: what came.

    Returns:
        NumPy or JAX array.

    Raises:
        TypeError: for anything else, arrays of other libraries included.
    """
    images = name in ("x", "adversarials")
    if hasattr(value, "ndim") and hasattr(value, "dtype"):
        try:
            np.dtype(value.dtype)
        except TypeError:
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            raise TypeError(f"{name} must be a NumPy or JAX array, got a {kind}; use numpy.asarray({name})") from None
        if images and isinstance(value, np.ndarray) and value.dtype == np.float64:
            return value.astype(jax.dtypes.canonicalize_dtype(value.dtype), copy=False)
        return value
    try:
        return np.asarray(value, np.float32) if images else np.asarray(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be an array, got {type(value).__name__}") from None


def rounded(bounds, dtype) -> tuple[float, float]:
    """Return bounds as images hold them.

    Args:
        bounds: (low, high).
        dtype: of the images.

    Returns:
        (low, high) rounded to `dtype`: an image of 2.2 in float32 lies above 2.2 in float64.
    """
    low, high = np.asarray(bounds, dtype)
    return float(low), float(high)


def check_images(x, bounds) -> None:
    """Refuse images that are not [N, H, W, C] floats inside `bounds`.

    Args:
        x: the images.
        bounds: (low, high).

    Raises:
        TypeError: for a dtype other than float32 or float64.
        ValueError: for a wrong shape, or values outside `bounds`.
    """
    if x.ndim != 4:
        raise ValueError(f"x must be images [N, H, W, C], got shape {list(x.shape)}; "
                         "add a batch axis with x[None] or a channel axis with x[..., None]")
    if x.shape[3] not in (1, 3):
        hint = "; this looks like NCHW: use x.transpose(0, 2, 3, 1)" if x.shape[1] in (1, 3) else ""
        raise ValueError(f"x must have 1 or 3 channels last (NHWC), got shape {list(x.shape)}"
                         f"{hint}")
    if min(x.shape[1:3]) < SMALLEST_SIDE:
        raise ValueError(f"x must be at least {SMALLEST_SIDE}x{SMALLEST_SIDE} pixels, "
                         f"got shape {list(x.shape)}; resize the images")
    if x.dtype not in (jnp.float32, jnp.float64):
        fix = ("use x.astype('float32')" if jnp.issubdtype(x.dtype, jnp.floating) else
               "for 8-bit images use x.astype('float32') / 255 with bounds=(0., 1.)")
        raise TypeError(f"x must be float32 or float64, got {x.dtype}; {fix}")
    if is_traced(x) or x.shape[0] == 0:
        return
    low, high = rounded(bounds, x.dtype)
    # Images in host memory stay there; an accelerator might not hold all of them.
    array = np if isinstance(x, np.ndarray) else jnp
    lowest, highest = float(array.min(x)), float(array.max(x))
    if not (np.isfinite(lowest) and np.isfinite(highest)):
        first = int(np.argmax(~np.isfinite(np.asarray(x)).all(axis=(1, 2, 3))))
        raise ValueError(f"x must be finite, image {first} holds NaN or infinite pixels; "
                         "remove or repair it")
    if (low, high) == (0.0, 255.0) and 0.0 < highest <= 1.0:
        warnings.warn(f"x has values up to {highest:.3g} only, inside bounds=(0, 255); images in [0, 1] take "
                      "bounds=(0., 1.)", stacklevel=4)
    if lowest < low or highest > high:
        rounding = max(low - lowest, highest - high) < 1e-5 * (high - low)
        bytes_ = (low, high) == (0.0, 1.0) and lowest >= 0.0 and 50.0 < highest <= 255.0
        fix = (f"that is rounding: use x.clip({low!r}, {high!r})" if rounding else
               "divide by 255, or pass bounds=(0, 255)" if bytes_ else
               "pass the bounds of your images, and keep mean/std normalisation inside apply_fn")
        raise ValueError(f"x must lie inside bounds=({low:g}, {high:g}), got values from "
                         f"{lowest:.9g} to {highest:.9g}; {fix}")


def check_adversarials(adversarials, x, bounds) -> None:
    """Refuse adversarial images that do not belong to the images.

    Args:
        adversarials: what came.
        x: [N, H, W, C] checked clean images.
        bounds: (low, high).

    Raises:
        TypeError: for another dtype than that of `x`.
        ValueError: for another shape, or values that are not finite and inside `bounds`.
    """
    if adversarials.shape != x.shape:
        raise ValueError(f"adversarials must have the shape of x, {list(x.shape)}, got "
                         f"{list(adversarials.shape)}")
    if adversarials.dtype != x.dtype:
        raise TypeError(f"adversarials must have the dtype of x, {x.dtype}, got "
                        f"{adversarials.dtype}; use adversarials.astype(x.dtype)")
    if is_traced(adversarials) or x.shape[0] == 0:
        return
    low, high = rounded(bounds, x.dtype)
    inside = np.asarray((adversarials >= low) & (adversarials <= high)).all(axis=(1, 2, 3))
    if not inside.all():
        raise ValueError(f"adversarials must be finite and inside bounds=({low:g}, {high:g}), image "
                         f"{int(np.argmin(inside))} is not; clip them first")


def check_labels(name, labels, num_images):
    """Refuse labels that are not [N] integers.

    Args:
        name: "y" or "targets".
        labels: the labels.
        num_images: N.

    Raises:
        TypeError: for a dtype that is not an integer.
        ValueError: for a wrong shape.
    """
    if labels.ndim == 2:
        fix = f"use {name}[:, 0]" if labels.shape[1] == 1 else f"for one-hot labels use {name}.argmax(-1)"
        raise ValueError(f"{name} must be class indices [N], got shape {list(labels.shape)}; {fix}")
    if labels.shape != (num_images,):
        raise ValueError(f"{name} must have one entry per image, got shape {list(labels.shape)} "
                         f"for {num_images} images")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"{name} must be integer class indices, got {labels.dtype}; "
                        f"use {name}.astype('int32')")


def check_model(params, apply_fn, image_shape, dtype) -> tuple[int, bool]:
    """Refuse a model that does not map [N, H, W, C] to [N, classes]; nothing is computed.

    Args:
        params: the model's parameters.
        apply_fn: (params, x) -> logits.
        image_shape: (H, W, C) of the images.
        dtype: of the images.

    Returns:
        (number of classes, whether `apply_fn` closes over tracers of the caller).

    Raises:
        TypeError: if `apply_fn` is not callable, or returns something other than one float array, or `params`
            holds something other than arrays.
        ValueError: if the result is not [N, classes] with at least two classes.
    """
    if not callable(apply_fn):
        raise TypeError(f"apply_fn must be a function (params, x) -> logits, got "
                        f"{type(apply_fn).__name__}; the order is attack(params, apply_fn, x, y)")
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not hasattr(leaf, "dtype") and not isinstance(leaf, (bool, int, float, complex)):
            raise TypeError(f"params must hold arrays only, got a {type(leaf).__name__} at "
                            f"params{jax.tree_util.keystr(path)}; for an Equinox module use "
                            "apply_fn, params = gse_jax.models.from_equinox(module)")
    batch = 3  # neither 1 nor 2: a model that mixes the batch axis shows
    probe = jax.ShapeDtypeStruct((batch, *image_shape), dtype)
    with in_one_line(f"apply_fn(params, x) failed for x of shape {list(probe.shape)} {probe.dtype}"):
        # JAX remembers what it traced by the function, so not for one that may hold another model by now.
        jaxpr, out = jax.make_jaxpr(hashable(apply_fn), return_shape=True)(params, probe)
    if not isinstance(out, jax.ShapeDtypeStruct):
        part = "['logits']" if isinstance(out, dict) else "[0]"
        raise TypeError(f"apply_fn must return logits [N, classes], got a {type(out).__name__}; return the logits "
                        f"alone, e.g. lambda p, x: model(p, x){part}; if updated statistics come with them, the "
                        "model is in training mode: attack it in evaluation mode")
    if len(out.shape) != 2 or out.shape[0] != batch or out.shape[1] < 2:
        raise ValueError(f"apply_fn must return logits [N, classes], got shape {list(out.shape)} "
                         f"for {batch} images")
    if not jnp.issubdtype(out.dtype, jnp.floating):
        raise TypeError(f"apply_fn must return float logits, got {out.dtype}; return the scores "
                        "before argmax")
    return out.shape[1], any(isinstance(const, jax.core.Tracer) for const in jaxpr.consts)


def unsplit(tree):
    """Return arrays whole on every device that a mesh of Explicit axes, JAX's default, splits.

    The engine takes rows of its queue one by one, which such arrays do not allow. (Those of eager calls
    come from host memory, and Auto axes are the compiler's affair.)

    Args:
        tree: pytree of arrays, possibly traced; others pass through.

    Returns:
        The same values.
    """
    def whole(leaf):
        sharding = getattr(jax.typeof(leaf), "sharding", None) if isinstance(leaf, jax.Array) else None
        if sharding is None or not any(sharding.spec):
            return leaf
        whole_on_each = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
        return jax.sharding.reshard(leaf, whole_on_each)

    return jax.tree.map(whole, tree)


def without_explicit_axes(fn):
    """Let the compiler place what the caller's Explicit axes split, also along an axis of a `vmap`.

    Args:
        fn: function of arrays.

    Returns:
        A function of the same signature.
    """
    mesh = jax.sharding.get_abstract_mesh()
    explicit = () if mesh.empty else mesh.explicit_axes
    if not explicit:
        return fn
    return jax.sharding.auto_axes(fn, axes=explicit, out_sharding=jax.sharding.PartitionSpec())


def check_caps(caps) -> None:
    """Refuse caps of norms that are no positive numbers.

    Args:
        caps: {name: number, possibly traced, in the caller's units}.

    Raises:
        TypeError: for what is not one number.
        ValueError: for a number that is not above 0.
    """
    for name, cap in caps.items():
        if isinstance(cap, jax.core.Tracer):
            continue
        if isinstance(cap, (str, bool)) or np.ndim(cap):
            raise TypeError(f"{name} must be a number in the units of bounds, got {cap!r}")
        if not float(cap) > 0.0:
            raise ValueError(f"{name}={float(cap):g} must be > 0")


def check_label_values(name, labels, num_classes) -> None:
    """Refuse class indices outside the model's range.

    Args:
        name: "y" or "targets".
        labels: [N] int.
        num_classes: K.

    Raises:
        ValueError: if any is outside [0, K).
    """
    if is_traced(labels) or labels.shape[0] == 0:
        return
    wrong = np.flatnonzero((np.asarray(labels) < 0) | (np.asarray(labels) >= num_classes))
    if wrong.size:
        raise ValueError(f"{name} must lie in [0, {num_classes - 1}] for a model with "
                         f"{num_classes} classes, got {int(labels[int(wrong[0])])} at image "
                         f"{int(wrong[0])}")


def check_targets_differ(y, targets) -> None:
    """Refuse a target that is the true label.

    Args:
        y: [N] true labels.
        targets: [N] targets.

    Raises:
        ValueError: if any target equals its label.
    """
    if is_traced(y, targets):
        return
    same = np.flatnonzero(np.asarray(y) == np.asarray(targets))
    if same.size:
        raise ValueError(f"targets must differ from y, image {int(same[0])} has both = "
                         f"{int(y[int(same[0])])}; e.g. targets=(y + 1) % num_classes")


def check_sample_ids(ids, num_images) -> None:
    """Refuse sample ids that are not [N] integers from 0 on.

    Args:
        ids: NumPy.
        num_images: N.

    Raises:
        TypeError: for a dtype that is not an integer.
        ValueError: for a wrong shape or a number outside int32; a negative one marks an idle lane.
    """
    check_labels("sample_id", ids, num_images)
    if num_images and not 0 <= int(ids.min()) <= int(ids.max()) <= np.iinfo(np.int32).max:
        raise ValueError(f"sample_id must lie in [0, {np.iinfo(np.int32).max}], got values from "
                         f"{int(ids.min())} to {int(ids.max())}; number the images, and leave padding out")


def check_count(name, count, smallest) -> None:
    """Refuse a number of images or lanes that is none.

    Args:
        name: "num_images" or "lanes".
        count: None or int.
        smallest: the least it may be.

    Raises:
        ValueError: otherwise.
    """
    if count is None:
        return
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < smallest:
        raise ValueError(f"{name} must be a whole number >= {smallest} or None, got {count!r}")


def check_problem(params, apply_fn, x, y, targets, bounds) -> int:
    """Refuse images, labels and a model that do not fit together.

    Args:
        params, apply_fn, x, y, targets, bounds: as in `gse_jax.attack`.

    Returns:
        Number of classes.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for a wrong shape or range.
    """
    labels = [("y", y)] + ([] if targets is None else [("targets", targets)])
    check_images(x, bounds)
    for name, values in labels:
        check_labels(name, values, x.shape[0])
    num_classes, _ = check_model(params, apply_fn, x.shape[1:], x.dtype)
    for name, values in labels:
        check_label_values(name, values, num_classes)
    if targets is not None:
        check_targets_differ(y, targets)
    return num_classes
