"""PGD: sign or normalised gradient ascent on the cross entropy inside a ball. The dense baseline.

All lengths are in the units of images of range width 1.

References:
    Madry, Makelov, Schmidt, Tsipras, Vladu, Towards deep learning models resistant to adversarial
    attacks, arXiv 1706.06083, section 2.1; github MadryLab/cifar10_challenge (radius 8/255, step
    2/255, 10 steps; the preset takes the 20 of the paper's evaluation); MadryLab/robustness (l2 steps
    along the normalised gradient).

Differs from the reference:
    An image stops at its first success, and the point after the last step is tested too.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gse_jax.attacks import configuration
from gse_jax.attacks.algorithm import Algorithm, Method, Sample, wanted_label
from gse_jax.attacks.baselines.record import (
    Record,
    is_over,
    is_success,
    key_of,
    note,
    outcome_of,
    start_record,
)
from gse_jax.ops import cross_entropy, project_l2_ball


@dataclasses.dataclass(frozen=True)
class PGDSettings:
    """Static configuration of PGD.

    Attributes:
        norm: "linf" or "l2", the ball.
        max_steps: ascent steps of one restart, >= 1.
        num_restarts: random starts that are tried until one succeeds, >= 1.
        random_start: begin at a uniform point of the ball; otherwise at the clean image.
    """

    norm: str = "linf"
    max_steps: int = 20
    num_restarts: int = 1
    random_start: bool = True


class PGDHyperparams(NamedTuple):
    """Traced configuration of PGD, in images of range width 1.

    Attributes:
        radius: of the ball.
        step_size: length of a step, per value (linf) or of the whole step (l2).
    """

    radius: float = 8.0 / 255.0  # [] float
    step_size: float = 2.0 / 255.0  # [] float


class PGDState(NamedTuple):
    """State of one image.

    Fixed:
        sample: the image and its labels.
    Changing:
        w: [H, W, C] perturbation that is evaluated next, in units of range width 1.
        step: [] int32 steps done in this restart.
        restart: [] int32 restarts begun before this one.
    Bookkeeping:
        record: best image, status and counts.
    """

    sample: Sample  # one image
    w: jax.Array  # [H, W, C] float
    step: jax.Array  # [] i32
    restart: jax.Array  # [] i32
    record: Record


# PGD is not in the GSE paper's table; its comparison code's successor (github jsve96/GSMD,
# attackParams.json) takes 200 steps and a radius of 0.05 in images of range width 2. The step is
# not stated there; a tenth of the radius is ours.
_COMPARED = (PGDSettings(max_steps=200), PGDHyperparams(0.025, 0.0025))
PRESETS = {"original": (PGDSettings(), PGDHyperparams()), "cifar10": _COMPARED, "imagenet": _COMPARED}


def check(settings, hyperparams, image_shape) -> None:
    """Refuse a configuration that cannot run; see `Method.check`."""
    del image_shape  # Unused.
    configuration.check_types("pgd", settings, hyperparams, PGDSettings, PGDHyperparams)
    configuration.check_choice(settings, "norm", ("linf", "l2"))
    configuration.check_whole_numbers(settings, {"max_steps": 1, "num_restarts": 1})
    configuration.check_numbers(hyperparams)
    if settings.num_restarts > 1 and not settings.random_start:
        raise ValueError(f"settings.num_restarts={settings.num_restarts} needs random_start=True: "
                         "without it all restarts are the same")


def ascend(w, gradient, norm, radius, step_size):
    """Take one step up the gradient and project onto the ball.

    Args:
        w: [H, W, C] perturbation.
        gradient: [H, W, C].
        norm: "linf" or "l2".
        radius: [].
        step_size: [].

    Returns:
        [H, W, C]; `w` itself where the gradient is zero.
    """
    if norm == "linf":
        return jnp.clip(w + step_size * jnp.sign(gradient), -radius, radius)
    # Scaled by the largest entry first: squares of a gradient of 1e-30 would vanish in float32.
    largest = jnp.max(jnp.abs(gradient))
    scaled = gradient / jnp.where(largest > 0.0, largest, 1.0)
    length = jnp.sqrt(jnp.sum(scaled * scaled))
    return project_l2_ball(w + scaled * (step_size / jnp.where(length > 0.0, length, 1.0)), radius)


def random_point(key, shape, dtype, norm, radius):
    """Draw a uniform point of the ball.

    Args:
        key: typed key.
        shape: (H, W, C).
        dtype: of the result.
        norm: "linf" or "l2".
        radius: [].

    Returns:
        [H, W, C].
    """
    if norm == "linf":
        return radius * jax.random.uniform(key, shape, dtype, -1.0, 1.0)
    key_direction, key_length = jax.random.split(key)
    direction = jax.random.normal(key_direction, shape, dtype)
    length = jax.random.uniform(key_length, (), dtype) ** (1.0 / direction.size)
    return direction * (radius * length / jnp.sqrt(jnp.sum(direction * direction)))


def bind(settings, hyperparams, *, targeted, bounds, key) -> Algorithm:
    """Return PGD with its configuration bound; see `Bind`."""
    low, high = bounds
    width = high - low

    def inside(w, sample: Sample):
        """Clip to perturbations whose image lies in the bounds, as the references do in each step."""
        return jnp.clip(w, (low - sample.x) / width, (high - sample.x) / width)

    def start(sample: Sample, restart):
        if not settings.random_start:
            return jnp.zeros_like(sample.x)
        drawn = random_point(key_of(key, sample, restart), sample.x.shape, sample.x.dtype,
                             settings.norm, hyperparams.radius)
        return inside(drawn, sample)

    def init(sample: Sample) -> PGDState:
        zero = jnp.zeros((), jnp.int32)
        return PGDState(sample, jnp.zeros_like(sample.x), zero, zero, start_record(sample))

    def point(state: PGDState):
        return jnp.clip(state.sample.x + width * state.w, low, high)

    def loss(state: PGDState, logits):
        ce = cross_entropy(logits, wanted_label(state.sample, targeted))
        return -ce if targeted else ce

    def step(state: PGDState, evaluation) -> PGDState:
        success = is_success(state.record, state.sample, evaluation, point(state), targeted)
        clean = state.record.forward_evals == 0
        exhausted = ~clean & (state.step == settings.max_steps)
        # Without a random start the clean image is the first iterate; its gradient serves.
        begin = exhausted | clean if settings.random_start else exhausted
        restart = state.restart + exhausted.astype(jnp.int32)
        over = success | (exhausted & (restart >= settings.num_restarts))
        moved = inside(ascend(state.w, evaluation.gradient, settings.norm, hyperparams.radius,
                              hyperparams.step_size), state.sample)
        fresh = start(state.sample, restart)
        return PGDState(
            sample=state.sample,
            w=jnp.where(begin, fresh, moved),
            step=jnp.where(begin, 0, state.step + 1),
            restart=restart,
            record=note(state.record, state.sample, evaluation, point(state), jnp.zeros((), state.w.dtype),
                        over, targeted=targeted),
        )

    return Algorithm(init, point, loss, step, is_over, outcome_of)


PGD = Method(bind=bind, preset=configuration.chooser("pgd", PRESETS), check=check)
