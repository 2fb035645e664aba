"""What an attack is to the engine: a state machine for one image.

An attack writes its mathematics for **one** image as `init, query, loss, step, done, finish`. The
engine (`lanes.py`) maps it over lanes, calls the model once per iteration for all of them, and
knows nothing else about it. Adding an attack is one file with a `Method` and one registry line.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from gse_jax.types import Status

RUNNING = -1  # status of an image that is being worked on


class Sample(NamedTuple):
    """One image to attack. In a queue every field has a leading axis.

    Attributes:
        x: [H, W, C] clean image in the caller's bounds.
        y: [] int32 true label.
        target: [] int32 target class; -1 in an untargeted attack.
        sample_id: [] int32 position in the caller's batch; `NO_SAMPLE` marks an empty place.
        segments: [H, W] int32 superpixel of every pixel, numbered from 0 and below H * W; None for
            methods without superpixels. The engine fills it.
        start: [H, W, C] adversarial image to begin with, for `refine`; else None.
    """

    x: jax.Array  # [H, W, C] float
    y: jax.Array  # [] i32
    target: jax.Array  # [] i32
    sample_id: jax.Array  # [] i32
    # None, not arrays without elements: with those JAX 0.11 dies while it compiles for two devices.
    segments: jax.Array | None = None  # [H, W] i32
    start: jax.Array | None = None  # [H, W, C] float


NO_SAMPLE = -1


class Evaluation(NamedTuple):
    """What the model said about the point an attack asked for.

    Attributes:
        logits: [K].
        loss: [] the attack's own loss of these logits.
        gradient: [H, W, C] gradient of the loss at the point, or what `Algorithm.direction` makes of
            it; zeros if no lane asked for one.
    """

    logits: jax.Array  # [K] float
    loss: jax.Array  # [] float
    gradient: jax.Array  # [H, W, C] float


class Outcome(NamedTuple):
    """The per-image part of an `AttackResult`, same names and meanings."""

    adversarials: jax.Array  # [H, W, C] float
    success: jax.Array  # [] bool
    status: jax.Array  # [] i32
    gradient_evals: jax.Array  # [] i32
    forward_evals: jax.Array  # [] i32
    tradeoff: jax.Array  # [] float


class Algorithm(NamedTuple):
    """An attack with its configuration bound; every function is for one image and pure.

    Attributes:
        init: sample -> state. No model call.
        query: state -> point [H, W, C] in the caller's bounds at which the model is evaluated next.
        loss: (state, logits) -> [] whose gradient at the point `step` receives.
        step: (state, evaluation) -> state. Keeps tree, shapes and dtypes.
        done: state -> [] bool. Once True it stays True.
        finish: state -> outcome.
        wants_gradient: state -> [] bool, whether the next evaluation needs the gradient; None if
            every one does. A call in which no lane does is a forward pass only. So that lanes ask
            together, new images are loaded only into calls where all lanes at work ask for what a
            new image asks for.
        hinged: over large regions the loss is constant, so that it has no slope by the logits. Calls are
            then forward passes, followed by the gradient for those lanes alone whose loss has one: worth it for
            attacks that spend most evaluations beyond the boundary.
        gradient_free: no evaluation needs a gradient: the model is never differentiated, and need not be
            differentiable.
        direction: gradient [H, W, C] -> [H, W, C], what `step` receives in its place; for work on the
            gradient that would be in vain in forward passes. Not finite where the gradient is not.
        progress: state -> [], more for images nearer to their end; None where nothing tells. In the
            tail the others are worked first. No result depends on it.
    """

    init: Callable[[Sample], Any]
    query: Callable[[Any], jax.Array]
    loss: Callable[[Any, jax.Array], jax.Array]
    step: Callable[[Any, Evaluation], Any]
    done: Callable[[Any], jax.Array]
    finish: Callable[[Any], Outcome]
    wants_gradient: Callable[[Any], jax.Array] | None = None
    hinged: bool = False
    gradient_free: bool = False
    direction: Callable[[jax.Array], jax.Array] | None = None
    progress: Callable[[Any], jax.Array] | None = None


class Bind(Protocol):
    """Signature of `Method.bind`."""

    def __call__(self, settings: Any, hyperparams: Any, *, targeted: bool,
                 bounds: tuple[float, float], key: jax.Array | None) -> Algorithm:
        """Return the attack with its configuration bound; called inside the trace.

        Args:
            settings: static configuration.
            hyperparams: arrays [] of the images' dtype, possibly traced.
            targeted: direction of the attack.
            bounds: (lowest, highest) pixel value.
            key: typed random key.
        """


class Method(NamedTuple):
    """One row of the registry.

    Attributes:
        bind: see `Bind`.
        preset: (domain, targeted) -> (settings, hyperparams); raises ValueError for a domain that
            it does not know.
        check: (settings, hyperparams, image_shape) -> None; raises ValueError in one line for a
            configuration that cannot run on images of that shape.
        segment: (settings, images) -> [N, H, W] int32 superpixels of NumPy images [N, H, W, C] in
            [0, 1], or None where these settings need none; runs on the host, before the loop. None
            for methods that never do.
    """

    bind: Bind
    preset: Callable[[str, bool], tuple[Any, Any]]
    check: Callable[[Any, Any, tuple[int, int, int]], None]
    segment: Callable[[Any, np.ndarray], np.ndarray | None] | None = None


def wanted_label(sample: Sample, targeted: bool):
    """Return the class the attack speaks of: the target, or the true label to get away from.

    Args:
        sample: one image, or several.
        targeted: direction.

    Returns:
        [] int32.
    """
    return sample.target if targeted else sample.y


def fools(status):
    """Tell by the status of an image whether what is returned fools the model; as `AttackResult.success`."""
    return (status == Status.FOUND) | (status == Status.ALREADY_MISCLASSIFIED)


def select(condition, new, old):
    """Choose between two states, leaf by leaf.

    Args:
        condition: [] bool.
        new: pytree of arrays, taken where True.
        old: the same, taken where False.

    Returns:
        The same pytree. Leaves that are one object in both are passed on: half of what is compiled
        would else be choices between equals.
    """
    return jax.tree.map(lambda a, b: b if a is b else jnp.where(condition, a, b), new, old)


def select_rows(condition, new, old):
    """Choose between two batches of states, image by image.

    Args:
        condition: [L] bool.
        new: pytree of arrays [L, ...], rows taken where True.
        old: the same, taken where False.

    Returns:
        The same pytree.
    """
    return jax.tree.map(
        lambda a, b: jnp.where(condition.reshape(condition.shape + (1,) * (a.ndim - 1)), a, b), new, old)
