r"""FWnucl: Frank-Wolfe on the cross entropy inside the ball of the nuclear group norm.

A vertex changes one square patch by a rank-one pattern per channel, so few steps give few smooth
groups. Each step is a gradient and a golden section search along the way to the vertex. Lengths are
in the units of images of range width 2.

References:
    Kazemi, Kerdreux, Wang, Generating structured adversarial attacks using Frank-Wolfe method,
    arXiv 2102.07360.
    Kiefer, Sequential minimax search for a maximum, 1953 (golden section).

Differs from the reference:
    The iterates stay in the box of the image by clipping when they are evaluated, not only at the
    end, and of all points that the search looks at the adversarial one with the best cross entropy
    is the result. The patch of a vertex is the one with the largest sum over channels of the largest
    singular values, which minimises the linear function; the GSE paper's code takes the largest
    nuclear norm, which does not. The search evaluates one point per section (that code: two), for
    the same final interval.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gse_jax.attacks.algorithm import Algorithm, Method, Sample
from gse_jax.attacks.baselines import configuration
from gse_jax.attacks.baselines.record import (
    Record,
    is_over,
    is_success,
    note,
    outcome_of,
    start_record,
    wanted_label,
)
from gse_jax.ops import cross_entropy, nuclear_group_vertex

_GOLDEN = 0.5 * (math.sqrt(5.0) - 1.0)  # 0.618, the share of the interval that a section keeps


@dataclasses.dataclass(frozen=True)
class FWnuclSettings:
    """Static configuration of FWnucl.

    Attributes:
        max_steps: Frank-Wolfe steps, >= 1.
        num_sections: sections of the search for one step size, >= 1.
        patch_size: side of the patches, in pixels.
        stop_at_success: end at the first adversarial image, even inside a search. Takes a tenth of
            the evaluations, and an eighth of the pixels, but twice the l2 norm of all steps, whose
            adversarial image with the best cross entropy is the result otherwise.
    """

    max_steps: int = 200
    num_sections: int = 25
    patch_size: int = 4
    stop_at_success: bool = False


class FWnuclHyperparams(NamedTuple):
    """Traced configuration of FWnucl, in images of range width 2.

    Attributes:
        radius: of the ball.
    """

    radius: float = 5.0  # [] float


class FWnuclState(NamedTuple):
    """State of one image.

    Fixed:
        sample: the image and its labels.
    Changing:
        w: [H, W, C] perturbation of the current iterate, in units of range width 2.
        vertex: [H, W, C] where it moves to.
        left: [] lower end of the interval of step sizes.
        right: [] upper end.
        inner_loss: [] loss at the inner point that is already known.
        known_left: [] bool; the known inner point is the left one.
        section: [] int32 inner points evaluated; 0 while a gradient is due.
        step: [] int32 steps done.
    Bookkeeping:
        record: best image, status and counts.
    """

    sample: Sample  # one image
    w: jax.Array  # [H, W, C] float
    vertex: jax.Array  # [H, W, C] float
    left: jax.Array  # [] float
    right: jax.Array  # [] float
    inner_loss: jax.Array  # [] float
    known_left: jax.Array  # [] bool
    section: jax.Array  # [] i32
    step: jax.Array  # [] i32
    record: Record


# The authors' code was not found; "original" repeats the comparison's CIFAR-10 numbers.
PRESETS = {(domain, targeted): (FWnuclSettings(patch_size=size), FWnuclHyperparams())
           for domain, size in (("original", 4), ("cifar10", 4), ("imagenet", 32))
           for targeted in (False, True)}


def preset(domain: str, targeted: bool):
    """Return a published configuration; see `configuration.choose_preset`."""
    return configuration.choose_preset("fwnucl", PRESETS, domain, targeted)


def check(settings, hyperparams, image_shape) -> None:
    """Refuse a configuration that cannot run; see `Method.check`."""
    configuration.check_types("fwnucl", settings, hyperparams, FWnuclSettings, FWnuclHyperparams)
    configuration.check_at_least(settings, {"max_steps": 1, "num_sections": 1, "patch_size": 1})
    configuration.check_numbers(hyperparams)
    if settings.patch_size > min(image_shape[:2]):
        raise ValueError(f"settings.patch_size={settings.patch_size} does not fit into images of "
                         f"{image_shape[0]}x{image_shape[1]} pixels")


def next_inner_point(left, right, known_left):
    """Return the step size at which the search looks next.

    Args:
        left: [] lower end of the interval.
        right: [] upper end.
        known_left: [] bool; the left inner point is known, look at the right one.

    Returns:
        [] one of the two golden points of the interval.
    """
    length = _GOLDEN * (right - left)
    return jnp.where(known_left, left + length, right - length)


def cut_interval(left, right, left_loss, right_loss):
    """Drop the part of the interval beyond the worse of the two inner points.

    Args:
        left: [] lower end.
        right: [] upper end.
        left_loss: [] loss at the left inner point; smaller is better.
        right_loss: [] loss at the right inner point.

    Returns:
        (left, right, known_left, loss): the new interval; which of its inner points is known, and
        the loss there.
    """
    length = _GOLDEN * (right - left)
    go_left = left_loss < right_loss
    # What was the left inner point of [a, b] is the right one of [a, d], and the reverse.
    return (jnp.where(go_left, left, right - length), jnp.where(go_left, left + length, right),
            ~go_left, jnp.where(go_left, left_loss, right_loss))


def bind(settings, hyperparams, *, targeted, bounds, key=None) -> Algorithm:
    """Return FWnucl with its configuration bound; see `Bind`. It is deterministic."""
    del key  # Unused.
    low, high = bounds
    scale = 0.5 * (high - low)

    def init(sample: Sample) -> FWnuclState:
        w, zero = jnp.zeros_like(sample.x), jnp.zeros((), sample.x.dtype)
        count = jnp.zeros((), jnp.int32)
        return FWnuclState(sample, w, w, zero, zero, zero, jnp.zeros((), bool), count, count,
                           start_record(sample))

    def tried(state: FWnuclState):
        size = next_inner_point(state.left, state.right, state.known_left)
        size = jnp.where(state.section == 0, 0.0, size)
        return state.w + size * (state.vertex - state.w)

    def point(state: FWnuclState):
        return jnp.clip(state.sample.x + scale * tried(state), low, high)

    def loss(state: FWnuclState, logits):
        ce = cross_entropy(logits, wanted_label(state.sample, targeted))
        return ce if targeted else -ce

    def step(state: FWnuclState, evaluation) -> FWnuclState:
        dtype = state.w.dtype
        at_iterate = state.section == 0
        success = is_success(state.record, state.sample, evaluation, targeted)
        vertex = nuclear_group_vertex(evaluation.gradient * scale, settings.patch_size,
                                      jnp.asarray(hyperparams.radius, dtype))

        # The first inner point has no partner yet; from the second on the interval is cut.
        cut = state.section >= 2
        left_loss = jnp.where(state.known_left, state.inner_loss, evaluation.loss)
        right_loss = jnp.where(state.known_left, evaluation.loss, state.inner_loss)
        left, right, known, value = cut_interval(state.left, state.right, left_loss, right_loss)
        zero = jnp.zeros((), dtype)
        left = jnp.where(at_iterate, zero, jnp.where(cut, left, state.left))
        right = jnp.where(at_iterate, zero + 1.0, jnp.where(cut, right, state.right))
        known = jnp.where(at_iterate, False, jnp.where(cut, known, True))
        value = jnp.where(cut, value, evaluation.loss)

        found = state.section > settings.num_sections
        size = 0.5 * (left + right)
        count = state.step + found.astype(jnp.int32)
        over = at_iterate & (state.step >= settings.max_steps)
        over |= success & settings.stop_at_success
        return FWnuclState(
            sample=state.sample,
            w=jnp.where(found, state.w + size * (state.vertex - state.w), state.w),
            vertex=jnp.where(at_iterate, vertex, state.vertex),
            left=left, right=right, inner_loss=value, known_left=known,
            section=jnp.where(found, 0, state.section + 1),
            step=count,
            record=note(state.record, state.sample, evaluation, point(state),
                        zero if settings.stop_at_success else evaluation.loss, over,
                        targeted=targeted, took_gradient=at_iterate),
        )

    return Algorithm(init, point, loss, step, lambda state: is_over(state.record),
                     lambda state: outcome_of(state.record),
                     wants_gradient=lambda state: state.section == 0)


FWNUCL = Method(bind=bind, preset=preset, check=check)
