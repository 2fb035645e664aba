r"""sigma-zero: Adam on a smooth l0 norm, and a threshold that adapts to success. No budget.

Minimises `max(0, Z_y - max Z_i) + mean_j w_j^2 / (w_j^2 + sigma)` along normalised gradients; after
each step entries below the threshold t become zero, and t grows while the image is adversarial and
shrinks while it is not. Lengths are in the units of images of range width 1.

References:
    Cina, Villani, Pintor, Schoenherr, Biggio, Pelillo, sigma-zero: gradient-based optimization of
    l0-norm adversarial examples, arXiv 2402.01879, algorithm 1; github sigma0-advx/sigma-zero.

Differs from the reference:
    Also defined for targets, with the margin of the target. The point after the last step is tested
    too, which costs one evaluation. The threshold is one number per image, as in effect there.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gse_jax.attacks import configuration
from gse_jax.attacks.algorithm import Algorithm, Method, Sample, wanted_label
from gse_jax.attacks.baselines.record import Record, is_over, note, outcome_of, start_record
from gse_jax.ops import is_adversarial, margin_loss, smooth_l0_gradient

# Adam's decay rates and offset, Kingma and Ba, arXiv 1412.6980, section 2.
_DECAY1, _DECAY2, _OFFSET = 0.9, 0.999, 1e-8


@dataclasses.dataclass(frozen=True)
class SigmaZeroSettings:
    """Static configuration of sigma-zero.

    Attributes:
        max_steps: Adam steps, >= 1.
    """

    max_steps: int = 100


class SigmaZeroHyperparams(NamedTuple):
    """Traced configuration of sigma-zero, in images of range width 1.

    Attributes:
        learning_rate: of the first step; falls along a cosine to a tenth of it.
        sigma: smoothness of the l0 norm; entries well below its square root do not count.
        threshold: first value below which entries become zero, in [0, 1].
        threshold_rate: change of the threshold per step, as a fraction of the learning rate.
    """

    learning_rate: float = 1.0  # [] float
    sigma: float = 1e-3  # [] float
    threshold: float = 0.3  # [] float
    threshold_rate: float = 0.01  # [] float


class SigmaZeroState(NamedTuple):
    """State of one image.

    Fixed:
        sample: the image and its labels.
    Changing:
        w: [H, W, C] perturbation that is evaluated next, in units of range width 1.
        mean: [H, W, C] Adam's average of gradients.
        square: [H, W, C] Adam's average of squared gradients.
        threshold: [] entries of `w` below it are zero.
        step: [] int32 steps done.
    Bookkeeping:
        record: best image by the number of non-zero entries, status and counts.
    """

    sample: Sample  # one image
    w: jax.Array  # [H, W, C] float
    mean: jax.Array  # [H, W, C] float
    square: jax.Array  # [H, W, C] float
    threshold: jax.Array  # [] float
    step: jax.Array  # [] i32
    record: Record


# The GSE paper does not compare with sigma-zero; the published 1000-step setting is the stronger.
PRESETS = {domain: (SigmaZeroSettings(steps), SigmaZeroHyperparams())
           for domain, steps in (("original", 100), ("cifar10", 1000), ("imagenet", 1000))}


def check(settings, hyperparams, image_shape) -> None:
    """Refuse a configuration that cannot run; see `Method.check`."""
    del image_shape  # Unused.
    configuration.check_types("sigma_zero", settings, hyperparams, SigmaZeroSettings,
                              SigmaZeroHyperparams)
    configuration.check_whole_numbers(settings, {"max_steps": 1})
    configuration.check_numbers(hyperparams, may_be_zero=("threshold", "threshold_rate"),
                                at_most_one=("threshold",))


def learning_rate_at(step, max_steps, first):
    """Return the cosine schedule from `first` to a tenth of it.

    Args:
        step: [] number of steps done.
        max_steps: int.
        first: [] learning rate of step 0.

    Returns:
        [].
    """
    fraction = step.astype(first.dtype) / max_steps
    return first * (0.1 + 0.45 * (1.0 + jnp.cos(math.pi * fraction)))


def bind(settings, hyperparams, *, targeted, bounds, key=None) -> Algorithm:
    """Return sigma-zero with its configuration bound; see `Bind`. It is deterministic."""
    del key  # Unused.
    low, high = bounds
    width = high - low

    def init(sample: Sample) -> SigmaZeroState:
        zero = jnp.zeros_like(sample.x)
        return SigmaZeroState(sample, zero, zero, zero, hyperparams.threshold, jnp.zeros((), jnp.int32),
                              start_record(sample))

    def point(state: SigmaZeroState):
        return jnp.clip(state.sample.x + width * state.w, low, high)

    def loss(state: SigmaZeroState, logits):
        return margin_loss(logits, wanted_label(state.sample, targeted), targeted=targeted)

    def step(state: SigmaZeroState, evaluation) -> SigmaZeroState:
        x, w = state.sample.x, state.w
        record = note(state.record, state.sample, evaluation, point(state),
                      jnp.sum(w != 0.0, dtype=x.dtype), state.step == settings.max_steps,
                      targeted=targeted)

        gradient = evaluation.gradient * width + smooth_l0_gradient(w, hyperparams.sigma)
        # 1e-12: the floor of the reference's normalisation.
        gradient = gradient / jnp.maximum(jnp.max(jnp.abs(gradient)), 1e-12)
        count = (state.step + 1).astype(x.dtype)
        mean = _DECAY1 * state.mean + (1.0 - _DECAY1) * gradient
        square = _DECAY2 * state.square + (1.0 - _DECAY2) * gradient**2
        rate = learning_rate_at(state.step, settings.max_steps, hyperparams.learning_rate)
        direction = (mean / (1.0 - _DECAY1**count)) / (
            jnp.sqrt(square / (1.0 - _DECAY2**count)) + _OFFSET)
        moved = jnp.clip(w - rate * direction, (low - x) / width, (high - x) / width)

        adversarial = is_adversarial(evaluation.logits, wanted_label(state.sample, targeted),
                                     targeted=targeted)
        change = hyperparams.threshold_rate * learning_rate_at(state.step + 1, settings.max_steps,
                                                               hyperparams.learning_rate)
        threshold = jnp.clip(state.threshold + jnp.where(adversarial, change, -change), 0.0, 1.0)
        return SigmaZeroState(state.sample, jnp.where(jnp.abs(moved) < threshold, 0.0, moved), mean,
                              square, threshold, state.step + 1, record)

    return Algorithm(init, point, loss, step, is_over, outcome_of)


SIGMA_ZERO = Method(bind=bind, preset=configuration.chooser("sigma_zero", PRESETS), check=check)
