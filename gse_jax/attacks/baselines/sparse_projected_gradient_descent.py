r"""Sparse-PGD: a dense perturbation p times a binary mask m, both by ascent. A pixel budget.

p takes sign steps inside the box; the mask keeps the k largest of sigmoid(m), m takes normalised
gradient steps. The structured version masks blocks: rows, columns, or patches of any pattern.
Lengths are in the units of images of range width 1.

| symbol | name here |
|---|---|
| p | `w` |
| m-tilde | `scores` (one per pixel or block) |

References:
    Zhong, Huang, Liu, Towards efficient training and evaluation of robust models against l0 bounded
    adversarial perturbations, ICML 2024, arXiv 2405.05075; v4 for structured perturbations; github
    CityU-MLO/sPGD, autoattack/spgd.py and mask.py.

Differs from the reference:
    The mask is drawn anew after `patience` unchanged iterations of the image itself, not of its
    batch. A targeted attack succeeds at the target, not at any wrong class, and climbs its lead over the largest of
    the others (there over the label, which up to any wrong class is the same). Budgets of the
    structured version are in pixels: as many blocks as surely fit. The starting point can succeed already (there
    it is used for its gradient only, and each of the updates is tested).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gse_jax.attacks import configuration
from gse_jax.attacks.algorithm import Algorithm, Method, Sample
from gse_jax.attacks.baselines.record import (
    Record,
    is_over,
    is_success,
    key_of,
    note,
    outcome_of,
    start_record,
)
from gse_jax.ops import (
    average_blocks,
    cross_entropy,
    expand_blocks,
    grid_shape,
    largest_pixels,
    logit_gap,
)

# Lead of the true class below which the logit difference takes over; vanishing gradients of the
# mask and the floor of their length. All three of the reference.
_LOW_CONFIDENCE, _VANISHED, _FLOOR = 0.5, 2e-10, 1e-10


@dataclasses.dataclass(frozen=True)
class SparsePGDSettings:
    """Static configuration of Sparse-PGD.

    Attributes:
        num_pixels: pixels that may differ, >= 1.
        max_steps: ascent steps, >= 1.
        unprojected: let pixels outside the mask move too; else only those inside do.
        patience: iterations without success and with the same mask before it is drawn anew, >= 1.
        structure: "pixel", "row", "column" or "patch".
        pattern: rows of 0 and 1, what one block of "patch" covers; a 3 x 3 square by default.
        stride: pixels between neighbouring blocks of "patch", >= 1.
    """

    num_pixels: int = 10
    max_steps: int = 30
    unprojected: bool = True
    patience: int = 3
    structure: str = "pixel"
    pattern: tuple[tuple[int, ...], ...] = ((1, 1, 1), (1, 1, 1), (1, 1, 1))
    stride: int = 1


class SparsePGDHyperparams(NamedTuple):
    """Traced configuration of Sparse-PGD, in images of range width 1.

    Attributes:
        radius: largest change of a value.
        step_size: of the sign steps, as a fraction of `radius`.
        mask_step_size: length of the mask's steps per square root of its size.
    """

    radius: float = 1.0  # [] float
    step_size: float = 0.25  # [] float
    mask_step_size: float = 0.25  # [] float


class SparsePGDState(NamedTuple):
    """State of one image.

    Fixed:
        sample: the image and its labels.
    Changing:
        w: [H, W, C] dense perturbation, in units of range width 1.
        scores: [rows, columns] one score per block; the largest are in the mask.
        unchanged: [] int32 iterations since the mask last changed or was drawn.
        step: [] int32 steps done.
    Bookkeeping:
        record: best image, status and counts.
    """

    sample: Sample  # one image
    w: jax.Array  # [H, W, C] float
    scores: jax.Array  # [rows, columns] float
    unchanged: jax.Array  # [] i32
    step: jax.Array  # [] i32
    record: Record


# Not in the GSE paper: 300 steps, and 20 pixels (CIFAR-10) or 200 (ImageNet), are our choice.
PRESETS = {
    "original": (SparsePGDSettings(), SparsePGDHyperparams()),
    "cifar10": (SparsePGDSettings(num_pixels=20, max_steps=300), SparsePGDHyperparams()),
    "imagenet": (SparsePGDSettings(num_pixels=200, max_steps=300), SparsePGDHyperparams()),
}


def block_of(settings, image_shape):
    """Return what one block covers and how far blocks are apart.

    Args:
        settings: SparsePGDSettings.
        image_shape: (H, W, C).

    Returns:
        (pattern [h, w] of 0 and 1, stride).
    """
    if settings.structure == "row":
        return np.ones((1, image_shape[1]), bool), 1
    if settings.structure == "column":
        return np.ones((image_shape[0], 1), bool), 1
    if settings.structure == "patch":
        return np.asarray(settings.pattern, bool), settings.stride
    return np.ones((1, 1), bool), 1


def check(settings, hyperparams, image_shape) -> None:
    """Refuse a configuration that cannot run; see `Method.check`."""
    configuration.check_types("sparse_pgd", settings, hyperparams, SparsePGDSettings,
                              SparsePGDHyperparams)
    configuration.check_choice(settings, "structure", ("pixel", "row", "column", "patch"))
    configuration.check_num_pixels(settings, image_shape)
    configuration.check_whole_numbers(settings, {"max_steps": 1, "patience": 1, "stride": 1})
    configuration.check_numbers(hyperparams)
    rows = settings.pattern
    if (not all(isinstance(row, tuple) for row in rows) or len(set(map(len, rows))) != 1
            or {value for row in rows for value in row} not in ({0, 1}, {1})):
        raise ValueError(f"settings.pattern={rows} must be rows of 0 and 1, of one length and with a 1")
    pattern, stride = block_of(settings, image_shape)
    if min(grid_shape(image_shape[:2], pattern, stride)) < 1:
        raise ValueError(f"settings.pattern of {pattern.shape[0]}x{pattern.shape[1]} pixels does "
                         f"not fit into {image_shape[0]}x{image_shape[1]} pixels")
    if settings.num_pixels < pattern.sum():
        raise ValueError(f"settings.num_pixels={settings.num_pixels} must be at least "
                         f"{pattern.sum()}, the pixels of one {settings.structure}")


def kept_blocks(scores, settings, image_shape):
    """Mark the blocks with the largest scores, as many as surely fit into the budget.

    Args:
        scores: [rows, columns].
        settings: SparsePGDSettings.
        image_shape: (H, W, C).

    Returns:
        [rows, columns] bool.
    """
    pattern, _ = block_of(settings, image_shape)
    return largest_pixels(scores, min(settings.num_pixels // int(pattern.sum()), scores.size))


def spread(values, settings, image_shape):
    """Put a number in [0, 1] per block down on its pixels.

    Args:
        values: [rows, columns].
        settings: SparsePGDSettings.
        image_shape: (H, W, C).

    Returns:
        [H, W, 1].
    """
    pattern, stride = block_of(settings, image_shape)
    return expand_blocks(values, image_shape[:2], pattern, stride)[..., None]


def gain_of(gradient, w, settings):
    """Return what the loss gains, to first order, if a block comes in: a mean over its pixels.

    Args:
        gradient: [H, W, C].
        w: [H, W, C] dense perturbation.
        settings: SparsePGDSettings.

    Returns:
        [rows, columns].
    """
    pattern, stride = block_of(settings, w.shape)
    return average_blocks(jnp.sum(gradient * w, axis=-1), pattern, stride)


def climbing_loss(logits, sample: Sample, targeted):
    """Return what Sparse-PGD maximises: the cross entropy, near the boundary the logit difference.

    Args:
        logits: [K].
        sample: one image.
        targeted: direction.

    Returns:
        [].
    """
    near = logit_gap(logits, sample.y) < _LOW_CONFIDENCE
    if not targeted:
        return jnp.where(near, -logit_gap(logits, sample.y), cross_entropy(logits, sample.y))
    # Of whichever class leads: beyond the first boundary that need not be the label's.
    return jnp.where(near, logit_gap(logits, sample.target), -cross_entropy(logits, sample.target))


def bind(settings, hyperparams, *, targeted, bounds, key) -> Algorithm:
    """Return Sparse-PGD with its configuration bound; see `Bind`."""
    low, high = bounds
    width = high - low

    def draw_scores(sample: Sample, step):
        pattern, stride = block_of(settings, sample.x.shape)
        shape = grid_shape(sample.x.shape[:2], pattern, stride)
        return jax.random.normal(key_of(key, sample, 1, step), shape, sample.x.dtype)

    def inside(sample: Sample, w):
        w = jnp.clip(w, -hyperparams.radius, hyperparams.radius)
        return jnp.clip(w, (low - sample.x) / width, (high - sample.x) / width)

    def init(sample: Sample) -> SparsePGDState:
        zero, x = jnp.zeros((), jnp.int32), sample.x
        start = jax.random.uniform(key_of(key, sample, 0), x.shape, x.dtype, -1.0, 1.0)
        return SparsePGDState(sample, inside(sample, start * hyperparams.radius), draw_scores(sample, zero), zero, zero,
                              start_record(sample))

    def point(state: SparsePGDState):
        x = state.sample.x
        kept = kept_blocks(state.scores, settings, x.shape).astype(x.dtype)
        mask = spread(kept, settings, x.shape) > 0.0
        mask &= state.record.forward_evals > 0
        return jnp.where(mask, jnp.clip(x + width * state.w, low, high), x)

    def loss(state: SparsePGDState, logits):
        return climbing_loss(logits, state.sample, targeted)

    def step(state: SparsePGDState, evaluation) -> SparsePGDState:
        x = state.sample.x
        clean = state.record.forward_evals == 0
        success = is_success(state.record, state.sample, evaluation, point(state), targeted)
        over = success | (~clean & (state.step >= settings.max_steps))
        gradient = evaluation.gradient * width
        soft = jax.nn.sigmoid(state.scores)
        kept = kept_blocks(state.scores, settings, x.shape)
        reach = spread(soft if settings.unprojected else kept.astype(x.dtype), settings, x.shape)
        moved = inside(state.sample, state.w
                       + hyperparams.step_size * hyperparams.radius * jnp.sign(gradient * reach))

        gain = gain_of(gradient, state.w, settings) * soft * (1.0 - soft)
        length = jnp.sqrt(jnp.sum(gain * gain))
        rate = jnp.where(length < _VANISHED, 0.0, gain.size**0.5 * hyperparams.mask_step_size)
        scores = state.scores + rate * gain / (length + _FLOOR)

        same = jnp.all(kept_blocks(scores, settings, x.shape) == kept)
        # A mask that did not change is given up; the perturbation then waits.
        stuck = state.unchanged >= settings.patience
        stay = clean | stuck  # after the clean image, the starting point itself is looked at
        fresh = draw_scores(state.sample, state.step + 1)
        return SparsePGDState(
            sample=state.sample,
            w=jnp.where(stay, state.w, moved),
            scores=jnp.where(clean, state.scores, jnp.where(stuck, fresh, scores)),
            # The iteration that draws a mask counts as the first without a change.
            unchanged=jnp.where(stuck & ~clean, 1, jnp.where(same & ~clean, state.unchanged + 1, 0)),
            step=jnp.where(clean, 0, state.step + 1),
            record=note(state.record, state.sample, evaluation, point(state),
                        jnp.zeros((), x.dtype), over, targeted=targeted),
        )

    return Algorithm(init, point, loss, step, is_over, outcome_of)


SPARSE_PGD = Method(bind=bind, preset=configuration.chooser("sparse_pgd", PRESETS), check=check)
