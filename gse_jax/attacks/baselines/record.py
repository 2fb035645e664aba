"""What every compared attack keeps about an image: the best success, the status, the counts.

One place decides what a success is: finite logits with the wanted prediction, at an image other
than the clean one. The first evaluation of every attack is of the clean image.

References:
    arXiv 2311.17434, section 5 (the comparison these attacks are run for).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gse_jax.attacks.algorithm import RUNNING, Evaluation, Outcome, Sample, fools, wanted_label
from gse_jax.ops import is_adversarial
from gse_jax.types import Status


class Record(NamedTuple):
    """The part of a state that all compared attacks have in common.

    Attributes:
        best: [H, W, C] best adversarial image; the clean image before any success.
        score: [] what the attack minimises, of `best`; infinite before any success.
        status: [] int32 a `Status`, or RUNNING.
        gradient_evals: [] int32 gradients taken.
        forward_evals: [] int32 model calls, those for gradients included; 0 until the clean image
            was evaluated.
    """

    best: jax.Array  # [H, W, C] float
    score: jax.Array  # [] float
    status: jax.Array  # [] i32
    gradient_evals: jax.Array  # [] i32
    forward_evals: jax.Array  # [] i32


def start_record(sample: Sample) -> Record:
    """Return the record before any evaluation.

    Args:
        sample: one image.

    Returns:
        Record.
    """
    zero = jnp.zeros((), jnp.int32)
    return Record(sample.x, jnp.full((), jnp.inf, sample.x.dtype),
                  jnp.asarray(RUNNING, jnp.int32), zero, zero)


def is_success(record: Record, sample: Sample, evaluation: Evaluation, point, targeted: bool):
    """Tell whether the evaluated point is an adversarial image made by the attack.

    Args:
        record: the record before this evaluation.
        sample: one image.
        evaluation: of the point.
        point: [H, W, C] the evaluated image.
        targeted: direction.

    Returns:
        [] bool; False for the clean image, also where it is evaluated again and rounding turns its prediction.
    """
    adversarial = is_adversarial(evaluation.logits, wanted_label(sample, targeted), targeted=targeted)
    return adversarial & (record.forward_evals > 0) & jnp.any(point != sample.x)


def note(record: Record, sample: Sample, evaluation: Evaluation, point, score, over, *,
         targeted: bool, took_gradient=True) -> Record:
    """Enter one evaluation into the record.

    Args:
        record: the record before it.
        sample: one image.
        evaluation: what the model said about `point`.
        point: [H, W, C] the evaluated image.
        score: [] finite; what the attack minimises, of `point`.
        over: [] bool; the attack has no further plans after this evaluation.
        targeted: direction.
        took_gradient: bool or [] bool; whether the attack asked for the gradient.

    Returns:
        Record. Its status is no longer RUNNING when the attack is over, the clean image was
        already misclassified, or the model gave something that is not finite.
    """
    clean = record.forward_evals == 0
    adversarial = is_adversarial(evaluation.logits, wanted_label(sample, targeted),
                                 targeted=targeted)
    running = record.status == RUNNING
    better = running & is_success(record, sample, evaluation, point, targeted) & (score < record.score)
    found = better | jnp.isfinite(record.score)
    finite = jnp.isfinite(evaluation.loss) & jnp.all(jnp.isfinite(evaluation.gradient))
    finite &= jnp.all(jnp.isfinite(evaluation.logits))
    finite |= clean & adversarial  # then the gradient is not used

    verdict = jnp.where(over, jnp.where(found, Status.FOUND, Status.NOT_FOUND), RUNNING)
    verdict = jnp.where(clean & adversarial, Status.ALREADY_MISCLASSIFIED, verdict)
    # A success is true whatever the model says elsewhere.
    verdict = jnp.where(finite, verdict, jnp.where(found, Status.FOUND, Status.NON_FINITE))
    verdict = jnp.where(running, verdict, record.status)  # once over, always over
    return Record(
        best=jnp.where(better, point, record.best),
        score=jnp.where(better, score, record.score),
        status=verdict.astype(jnp.int32),
        gradient_evals=record.gradient_evals + jnp.asarray(took_gradient, jnp.int32),
        forward_evals=record.forward_evals + 1,
    )


def is_over(state):
    """Tell whether the image is finished; `Algorithm.done` of all compared attacks.

    Args:
        state: with a `record`.

    Returns:
        [] bool.
    """
    return state.record.status != RUNNING


def outcome_of(state, tradeoff=None) -> Outcome:
    """Return the per-image result; `Algorithm.finish`.

    Args:
        state: with the `record` of a finished image.
        tradeoff: [] weight that gave the best image; None where the attack has none.

    Returns:
        Outcome.
    """
    record = state.record
    tradeoff = jnp.zeros_like(record.score) if tradeoff is None else tradeoff
    return Outcome(record.best, fools(record.status), record.status, record.gradient_evals,
                   record.forward_evals, tradeoff)


def key_of(key, sample: Sample, *counters):
    """Return the random key of one image at one place of the attack.

    It depends on the image's position in the caller's batch only, not on lanes or devices.

    Args:
        key: the caller's key.
        sample: one image.
        *counters: [] int32, e.g. restart and step.

    Returns:
        A typed key.
    """
    key = jax.random.fold_in(key, sample.sample_id)
    for counter in counters:
        key = jax.random.fold_in(key, counter)
    return key
