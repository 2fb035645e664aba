"""The public calls: `attack` for arrays, `refine` for what an attack found, `attack_stream`."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gse_jax.attacks import validation
from gse_jax.attacks.algorithm import Method, Sample
from gse_jax.attacks.precision import check_precision, confirmed
from gse_jax.attacks.program import Program, hashable, in_graph
from gse_jax.attacks.registry import find_method
from gse_jax.attacks.runner import (
    Progress,
    Stretch,
    as_key,
    default_lanes_per_device,
    run,
    stream,
)
from gse_jax.attacks.segmentation import segments_of
from gse_jax.devices import is_out_of_memory, platform
from gse_jax.types import ApplyFn, AttackResult, Bounds

LARGEST_CIFAR_SIDE = 64  # pixels; larger images take the ImageNet preset


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
    precision: str = "highest",
    progress: Callable[[Progress], None] | None = None,
) -> AttackResult:
    """Attack a batch of images.

    Args:
        params: any pytree of arrays; passed to `apply_fn`.
        apply_fn: (params, x [N, H, W, C]) -> logits [N, K], in evaluation mode, each row depending
            on its own image only. Pass the same function object in later calls: a new lambda
            compiles anew, and so does one that holds a Flax NNX module, in every call. Weights belong in
            `params`: what the function itself holds is read once.
        x: [N, H, W, C] float32 or float64, C in {1, 3}, H and W >= 8, values inside `bounds`.
            N may be 0.
        y: [N] int, true labels.
        targets: [N] int, classes to aim at, different from `y`; None for an untargeted attack.
        method: name of the attack: gse, gse_refined, pgd, sigma_zero, pgd0, sparse_rs, sparse_pgd, saif, fwnucl,
            strattack, gsmd, homotopy or sapf.
        settings: static configuration; None for the preset. See `gse_jax.preset`.
        hyperparams: pytree of floats; None for the preset. Changing it never compiles anew, and it
            may be `vmap`-ped over.
        bounds: (lowest, highest) pixel value of `x` and of the result. The same image in another
            range gets the same relative perturbation.
        key: None, an int, or a `jax.random.key`; attacks without randomness ignore it.
        lanes: number of images worked on at a time, over all devices (rounded up to a multiple of their
            number; a CPU takes fewer for few images). Changes speed, not results (up to the model's own rounding).
        precision: how accelerators multiply inside the loop, "highest" (float32), "tf32" or "bf16";
            where the model's own calls say nothing else. After a coarser loop the adversarial
            images are classified once more in float32, and what does not hold is not found. Whoever
            classifies them again on an accelerator: under `jax.default_matmul_precision("highest")`.
        progress: called with a `Progress` after each bounded stretch of work, while the next is worked on;
            ignored under the caller's `jit` or `vmap`.

    Returns:
        AttackResult. Without explicit configuration the preset follows the image size (up to 64
        pixels "cifar10", else "imagenet") and the direction; `result.preset` says which. Results
        that do not fit into an accelerator's memory stay NumPy arrays, with a warning.

    Runs on all local devices (on JAX's default device, where one is set) and returns to the host now and
    then. Under the caller's `jit`, `vmap` or `shard_map(..., check_vma=False)` it is one compiled loop on
    whatever device the caller's program runs.

    Raises:
        TypeError: for a wrong dtype or type of an argument.
        ValueError: for a wrong shape, range or name; in one line, before anything compiles.

    References:
        arXiv 2311.17434 for method "gse".
    """
    call = _Call(params, apply_fn, x, y, targets, bounds, lanes, precision)
    setup = call.set_up(find_method(method), settings, hyperparams, key)
    return call.run(setup, None, progress, method)


def attack_chosen(params, apply_fn: ApplyFn, x, y, chosen, *, targets=None, method: str = "gse", settings=None,
                  hyperparams=None, bounds: Bounds = (0.0, 1.0), key=None, lanes: int | None = None,
                  progress: Callable[[Progress], None] | None = None) -> AttackResult:
    """Attack some images of a batch with the random numbers that `attack` on the whole batch gives them.

    Args:
        params, apply_fn, x, y, targets, method, settings, hyperparams, bounds, key, lanes, progress: as in
            `attack`; arrays.
        chosen: [M] int32, which images; ascending.

    Returns:
        AttackResult of M images.

    Raises:
        TypeError: as `attack`.
        ValueError: as `attack`.
    """
    call = _Call(params, apply_fn, x[chosen], y[chosen], None if targets is None else targets[chosen],
                 bounds, lanes, "highest")
    setup = call.set_up(find_method(method), settings, hyperparams, key)
    return call.run(setup, None, progress, method, chosen)


def refine(
    params,
    apply_fn: ApplyFn,
    x,
    adversarials,
    y,
    *,
    targets=None,
    objective: str = "patches",
    max_l2: float | None = None,
    max_linf: float | None = None,
    max_evals: int = 200,
    bounds: Bounds = (0.0, 1.0),
    lanes: int | None = None,
    precision: str = "highest",
    progress: Callable[[Progress], None] | None = None,
) -> AttackResult:
    """Make the adversarial images of any attack sparser while they stay adversarial.

    Args:
        params, apply_fn, bounds, lanes, precision, progress: as in `attack`.
        x: [N, H, W, C] clean images, as in `attack`.
        adversarials: [N, H, W, C] what an attack made of them, e.g. `result.adversarials`; same
            dtype as `x`, inside `bounds`.
        y: [N] int, true labels.
        targets: [N] int, the classes the attack aimed at; None for an untargeted attack.
        objective: what shrinks first: "patches" (d_{2,0} with 8 x 8 patches), "pixels", "clusters"
            or "l2". The result is never worse than the given image in it, unless that exceeds a cap and
            is first pulled inside, with any pixels; the other numbers decide between equals.
        max_l2: largest l2 norm of `adversarials - x` in the result, in the units of `bounds`; None
            for none. An image given with a larger one is pulled inside, if that succeeds.
        max_linf: largest change of a channel of a pixel, likewise.
        max_evals: gradient evaluations per image.

    Returns:
        AttackResult. Images that were given unchanged or are not adversarial come back clean, with
        the status of `attack`; so does an image that could not be pulled inside the caps. The model
        is not asked about the clean images: leave out those that it misclassifies anyway.

    Raises:
        TypeError: for a wrong dtype or type of an argument.
        ValueError: for a wrong shape, range or name; in one line, before anything compiles.

    References:
        gse_jax's own method; derived in `docs/refinement.md`. It is deterministic.
    """
    from gse_jax.attacks.refinement import REFINE, RefineHyperparams, RefineSettings  # when needed

    if isinstance(adversarials, AttackResult):
        raise TypeError("adversarials must be images [N, H, W, C], got an AttackResult; pass "
                        "result.adversarials")
    call = _Call(params, apply_fn, x, y, targets, bounds, lanes, precision)
    adversarials = validation.as_array("adversarials", adversarials)
    validation.check_adversarials(adversarials, call.x, call.bounds)
    unit = 0.5 * (call.bounds[1] - call.bounds[0])  # the hyperparameters are for range width 2
    caps = {name: cap for name, cap in (("max_l2", max_l2), ("max_linf", max_linf)) if cap is not None}
    validation.check_caps(caps)
    caps = {name: cap / unit for name, cap in caps.items()}
    setup = call.set_up(REFINE, RefineSettings(objective=objective, max_evals=max_evals),
                        RefineHyperparams(**caps), None)
    setup = setup._replace(preset=f"refine {objective}")
    return call.run(setup, adversarials, progress, "refine")


def attack_stream(params, apply_fn: ApplyFn, batches: Iterable[Sample], *, image_shape,
                  dtype=np.float32, targeted: bool = False, method: str = "gse", settings=None,
                  hyperparams=None, bounds: Bounds = (0.0, 1.0), key=None,
                  lanes: int | None = None, precision: str = "highest",
                  num_images: int | None = None) -> Iterator[Stretch]:
    """Attack batches as they come: any number of images, in memory that does not grow with it.

    Args:
        params, apply_fn, method, settings, hyperparams, bounds, key, lanes: as in `attack`.
        batches: Samples of arrays with a leading axis of any length: `x` [M, H, W, C], `y` [M],
            `target` [M] (-1 where untargeted), `sample_id` [M] int32 >= 0 and unique over all
            batches. Pulled when lanes fall free, which stay full across the borders of batches.
        image_shape: (H, W, C) of every image.
        dtype: float32 or float64.
        targeted: whether to aim at `target`.
        precision: as in `attack`; after a coarser loop the check in float32 is the caller's.
        num_images: how many images will come, if known; few images take fewer lanes.

    Yields:
        Stretch: `sample_ids` [M] and `outcome` (the fields of AttackResult, NumPy) of the images
        that were finished, in the order of finishing; M may be 0. Every image comes exactly once,
        with the same outcome as from `attack` with the same lanes; with others up to the model's own rounding.

    Raises:
        TypeError: as `attack`; for a bad batch when it is pulled.
        ValueError: as `attack`; for a bad batch when it is pulled.
    """
    bounds = validation.check_bounds(bounds)
    validation.check_count("lanes", lanes, 1)
    validation.check_count("num_images", num_images, 0)
    check_precision(precision)
    if not isinstance(targeted, (bool, np.bool_)):
        raise TypeError(f"targeted must be True or False, got {type(targeted).__name__}; targets come in the batches")
    image_shape, params = tuple(image_shape), _on_this_process(params)
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    validation.check_images(np.zeros((0, *image_shape), dtype), bounds)
    setup = _set_up(params, apply_fn, find_method(method), settings, hyperparams, bounds, key,
                    targeted, image_shape, dtype, precision)

    def checked():
        for batch in batches:
            sample = Sample(*(np.asarray(a) for a in batch))
            # A copy: several batches wait in the queues, and a loader may fill one buffer again and again.
            sample = sample._replace(x=np.array(validation.as_array("x", sample.x)))
            validation.check_images(sample.x, bounds)
            if sample.x.shape[1:] != image_shape or sample.x.dtype != dtype:
                raise ValueError(f"a batch has images {list(sample.x.shape[1:])} "
                                 f"{sample.x.dtype}, expected {list(image_shape)} "
                                 f"{np.dtype(dtype)}; resize or convert them first")
            targets = sample.target if targeted else None
            _check_label_shapes(sample.y, targets, sample.x.shape[0])
            _check_label_values(sample.y, targets, setup.num_classes)
            validation.check_labels("target", sample.target, sample.x.shape[0])
            validation.check_sample_ids(sample.sample_id, sample.x.shape[0])
            yield Sample(sample.x, sample.y.astype(np.int32), sample.target.astype(np.int32),
                         sample.sample_id.astype(np.int32), setup.segment(sample.x))

    return stream(setup.program, params, setup.hyperparams, setup.key, checked(),
                  image_shape=image_shape, lanes=lanes,
                  num_images=None if num_images is None else int(num_images))


def default_domain(image_shape) -> str:
    """Return the domain whose preset images of this size get by default.

    Args:
        image_shape: (H, W, C).

    Returns:
        "cifar10" up to 64 pixels, else "imagenet".
    """
    return "cifar10" if max(image_shape[:2]) <= LARGEST_CIFAR_SIDE else "imagenet"


class _Setup(NamedTuple):
    """What the arguments of a call come to."""

    program: Program
    hyperparams: Any
    key: jax.Array
    num_classes: int
    staged: bool  # the model closes over tracers of the caller
    preset: str
    segment: Callable[[Any], Any]  # images [N, H, W, C] -> their superpixels


class _Call:
    """The checked arguments that `attack` and `refine` have in common."""

    def __init__(self, params, apply_fn, x, y, targets, bounds, lanes, precision):
        self.bounds = validation.check_bounds(bounds)
        validation.check_count("lanes", lanes, 1)
        check_precision(precision)
        self.params, self.apply_fn = _on_this_process(params), apply_fn
        self.x, self.y = validation.as_array("x", x), validation.as_array("y", y)
        self.targets = None if targets is None else validation.as_array("targets", targets)
        self.lanes, self.precision = lanes, precision
        validation.check_images(self.x, self.bounds)
        _check_label_shapes(self.y, self.targets, self.x.shape[0])

    def set_up(self, row: Method, settings, hyperparams, key) -> _Setup:
        setup = _set_up(self.params, self.apply_fn, row, settings, hyperparams, self.bounds, key,
                        self.targets is not None, self.x.shape[1:], self.x.dtype, self.precision)
        _check_label_values(self.y, self.targets, setup.num_classes)
        return setup

    def run(self, setup: _Setup, starts, progress, method, chosen=None) -> AttackResult:
        if progress is not None and not callable(progress):
            raise TypeError(f"progress must be a function that takes a Progress, or None, got {progress!r}")
        x, y, targets, count = self.x, self.y, self.targets, self.x.shape[0]
        traced = setup.staged or validation.is_traced(self.params, x, y, targets, starts,
                                                      setup.hyperparams, setup.key)
        array = jnp.asarray if traced else np.asarray
        goal = np.full(count, -1) if targets is None else targets
        places = np.arange(count) if chosen is None else chosen
        samples = Sample(array(x), array(y).astype(np.int32), array(goal).astype(np.int32),
                         places.astype(np.int32), setup.segment(x),
                         None if starts is None else array(starts))
        params = self.params
        arguments = (params, setup.hyperparams, setup.key, samples)
        if count == 0:
            outcome = _empty_outcome(setup, samples)
        elif traced:
            _check_shard_map(arguments)
            params, _, _, samples = arguments = validation.unsplit(arguments)
            width = self.lanes or default_lanes_per_device(platform(), *x.shape[1:3])
            outcome = validation.without_explicit_axes(in_graph(setup.program, min(width, count)))(*arguments)
        else:
            outcome = run(setup.program, *arguments, self.lanes, progress)
        if self.precision != "highest" and count:
            if starts is not None:
                from gse_jax.attacks.refinement import within_caps  # when needed

                starts = within_caps(samples.start, samples.x, setup.hyperparams, self.bounds)
            outcome = confirmed(params, setup.program.apply_fn, outcome, samples.x, samples.y,
                                None if targets is None else samples.target, starts, self.lanes)
        outcome = jax.tree.map(jnp.asarray, outcome) if traced else _on_device(outcome)
        return AttackResult(*outcome, method=method, preset=setup.preset)


def _set_up(params, apply_fn, row, settings, hyperparams, bounds, key, targeted, image_shape,
            dtype, precision) -> _Setup:
    domain = default_domain(image_shape)
    default_settings, default_hyperparams = row.preset(domain, targeted)
    name = f"{domain} {'targeted' if targeted else 'untargeted'}"
    if settings is not None or hyperparams is not None:
        name = "custom"
    settings = default_settings if settings is None else settings
    hyperparams = default_hyperparams if hyperparams is None else hyperparams
    row.check(settings, hyperparams, image_shape)
    fields = getattr(settings, "__match_args__", ())  # of a dataclass or a NamedTuple
    lists = [name for name in fields if isinstance(getattr(settings, name), list)]
    if lists:
        raise TypeError(f"settings.{lists[0]} must be a tuple, got a list")
    num_classes, staged = validation.check_model(params, apply_fn, image_shape, dtype)
    program = Program(hashable(apply_fn), row.bind, settings, targeted, bounds,
                      rewrite_convolutions=platform() == "cpu", precision=precision)
    hyperparams = jax.tree.map(lambda h: jnp.asarray(h, dtype), hyperparams)
    return _Setup(program, hyperparams, as_key(key), num_classes, staged, name,
                  lambda x: segments_of(row, settings, x, bounds))


def _on_this_process(params):
    """Return parameters that this process can use alone: each attacks its own images."""
    def local(leaf):
        if (not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer)
                or leaf.is_fully_addressable):
            return leaf
        if not leaf.is_fully_replicated:
            raise ValueError("params are sharded over several processes, but each process attacks its own "
                             "images; pass a replicated copy")
        return leaf.addressable_data(0)

    return jax.tree.map(local, params)


def _check_shard_map(arguments):
    """Refuse a `shard_map` that follows which values vary; the engine's conditionals do not say."""
    types = [jax.typeof(leaf) for leaf in jax.tree.leaves(arguments)]
    # The first is what JAX before 0.10 called it.
    if any(getattr(one, "vma", None) or getattr(getattr(one, "manual_axis_type", None), "varying", None)
           for one in types):
        raise ValueError("inside shard_map an attack needs jax.shard_map(..., check_vma=False)")


def _on_device(outcome):
    """Return JAX arrays, or the NumPy arrays that came where the device has no room for them."""
    try:
        return jax.block_until_ready(jax.device_put(outcome))
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        # Hours of work must not be lost now.
        warnings.warn("the results do not fit into the device's memory and are returned as NumPy "
                      "arrays; attack_stream takes any number of images", stacklevel=4)
        return outcome


def _check_label_shapes(y, targets, count):
    validation.check_labels("y", y, count)
    if targets is not None:
        validation.check_labels("targets", targets, count)


def _check_label_values(y, targets, num_classes):
    validation.check_label_values("y", y, num_classes)
    if targets is not None:
        validation.check_label_values("targets", targets, num_classes)
        validation.check_targets_differ(y, targets)


def _empty_outcome(setup, samples):
    algorithm = setup.program.algorithm(setup.hyperparams, setup.key)
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), samples)
    shapes = jax.eval_shape(lambda s: algorithm.finish(algorithm.init(s)), one)
    return jax.tree.map(lambda a: np.zeros((0, *a.shape), a.dtype), shapes)
