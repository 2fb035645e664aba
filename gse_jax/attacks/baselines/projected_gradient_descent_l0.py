r"""PGD0: gradient ascent projected onto "at most k pixels differ, inside the box". A pixel budget.

Steps along the l1-normalised gradient of the cross entropy are so long that the projection decides
which pixels stay. With `sigma_map=True` pixels may only move as far as their surroundings vary, so
that the change is hard to see. Lengths are in the units of images of range width 1.

References:
    Croce, Hein, Sparse and imperceivable adversarial attacks, ICCV 2019, arXiv 1909.05040,
    section 4; github fra31/sparse-imperceivable-attacks, pgd_attacks.py.

Differs from the reference:
    An image stops at its first success, and the point after the last step is tested too. Of pixels
    with equal scores exactly `num_pixels` stay (the published threshold keeps all). The noise of
    1e-12 that breaks ties is left out. "original" makes all 100 of its steps (there 99). Also defined
    for targets. Unlike the port in the GSE paper's code, the projection weighs violations of the box (not slack), and
    every iterate is tested.
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
from gse_jax.ops import cross_entropy, project_sparse_box, project_sparse_sigma, sigma_map


@dataclasses.dataclass(frozen=True)
class PGD0Settings:
    """Static configuration of PGD0.

    Attributes:
        num_pixels: pixels that may differ, >= 1.
        max_steps: ascent steps of one restart, >= 1.
        num_restarts: random starts that are tried until one succeeds, >= 1.
        sigma_map: bound every pixel's change by how much its surroundings vary.
    """

    num_pixels: int = 90
    max_steps: int = 100
    num_restarts: int = 5
    sigma_map: bool = False


class PGD0Hyperparams(NamedTuple):
    """Traced configuration of PGD0, in images of range width 1.

    Attributes:
        step_size: l1 length of a step.
        kappa: factor on the sigma map; used with `settings.sigma_map` only.
    """

    step_size: float = 120000.0 / 255.0  # [] float
    kappa: float = 0.8  # [] float


class PGD0State(NamedTuple):
    """State of one image.

    Fixed:
        sample: the image and its labels.
    Changing:
        image: [H, W, C] image that is evaluated next, rescaled to [0, 1].
        step: [] int32 steps done in this restart.
        restart: [] int32 restarts begun before this one.
    Bookkeeping:
        record: best image, status and counts.
    """

    sample: Sample  # one image
    image: jax.Array  # [H, W, C] float
    step: jax.Array  # [] i32
    restart: jax.Array  # [] i32
    record: Record


# The comparison takes the original's step on images of range width 2, which is half of it here.
_COMPARED = PGD0Hyperparams(step_size=60000.0 / 255.0)
PRESETS = {
    # The repository's run_attack_pt.py; it attacks with budgets of 5 pixels.
    "original": (PGD0Settings(num_pixels=5), PGD0Hyperparams()),
    "cifar10": (PGD0Settings(num_pixels=90, max_steps=200), _COMPARED),
    "imagenet": (PGD0Settings(num_pixels=6600, max_steps=200), _COMPARED),
}


def check(settings, hyperparams, image_shape) -> None:
    """Refuse a configuration that cannot run; see `Method.check`."""
    configuration.check_types("pgd0", settings, hyperparams, PGD0Settings, PGD0Hyperparams)
    configuration.check_num_pixels(settings, image_shape)
    configuration.check_whole_numbers(settings, {"max_steps": 1, "num_restarts": 1})
    configuration.check_numbers(hyperparams)


def bind(settings, hyperparams, *, targeted, bounds, key) -> Algorithm:
    """Return PGD0 with its configuration bound; see `Bind`."""
    low, high = bounds
    width = high - low

    def unit(sample: Sample):
        return jnp.clip((sample.x - low) / width, 0.0, 1.0)

    def project(sample: Sample, image):
        clean = unit(sample)
        if settings.sigma_map:
            return project_sparse_sigma(image, clean, sigma_map(clean), settings.num_pixels, hyperparams.kappa)
        return clean + project_sparse_box(image - clean, settings.num_pixels, -clean, 1.0 - clean)

    def start(sample: Sample, restart):
        draw = jax.random.uniform(key_of(key, sample, restart), sample.x.shape, sample.x.dtype)
        if not settings.sigma_map:
            return draw
        clean, kappa = unit(sample), hyperparams.kappa
        if sample.x.shape[-1] == 1:  # uniform in what one channel may reach, as published
            reach = kappa * sigma_map(clean)
            low_end, high_end = jnp.maximum(-reach, -clean), jnp.minimum(reach, 1.0 - clean)
            return clean + low_end + draw * (high_end - low_end)
        return jnp.clip(clean + kappa * (2.0 * draw - 1.0), 0.0, 1.0)

    def init(sample: Sample) -> PGD0State:
        zero = jnp.zeros((), jnp.int32)
        return PGD0State(sample, unit(sample), zero, zero, start_record(sample))

    def point(state: PGD0State):
        # Pixels that were not chosen keep the caller's value, not its rescaled image.
        moved = jnp.any(state.image != unit(state.sample), axis=-1, keepdims=True)
        return jnp.where(moved, jnp.clip(low + width * state.image, low, high), state.sample.x)

    def loss(state: PGD0State, logits):
        ce = cross_entropy(logits, wanted_label(state.sample, targeted))
        return -ce if targeted else ce

    def step(state: PGD0State, evaluation) -> PGD0State:
        success = is_success(state.record, state.sample, evaluation, point(state), targeted)
        clean = state.record.forward_evals == 0
        exhausted = ~clean & (state.step == settings.max_steps)
        restart = state.restart + exhausted.astype(jnp.int32)
        over = success | (exhausted & (restart >= settings.num_restarts))
        gradient = width * evaluation.gradient
        # 1e-10: the floor of the reference's normalisation, for images of range width 1.
        total = jnp.sum(jnp.abs(gradient)) + 1e-10
        moved = state.image + (hyperparams.step_size / total) * gradient
        begin = clean | exhausted
        return PGD0State(
            sample=state.sample,
            image=project(state.sample, jnp.where(begin, start(state.sample, restart), moved)),
            step=jnp.where(begin, 0, state.step + 1),
            restart=restart,
            record=note(state.record, state.sample, evaluation, point(state), jnp.zeros((), state.image.dtype),
                        over, targeted=targeted),
        )

    return Algorithm(init, point, loss, step, is_over, outcome_of)


PGD0 = Method(bind=bind, preset=configuration.chooser("pgd0", PRESETS), check=check)
