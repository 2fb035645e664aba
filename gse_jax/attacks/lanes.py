"""The lane scheduler: a fixed number of lanes drains a queue of images. Knows no attack.

Images need between 1 and 2,000 evaluations; a fixed batch would wait for its slowest image. Here
each iteration makes one model call for all lanes; a lane whose image is finished writes its outcome
to preallocated storage and takes the next image of the queue before the next call. Nothing in the
shapes depends on the data, so one compiled program serves any number of images.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gse_jax.attacks.algorithm import NO_SAMPLE, Algorithm, Evaluation, Outcome, Sample, select_rows
from gse_jax.attacks.errors import in_one_line
from gse_jax.attacks.loops import while_loop
from gse_jax.attacks.precision import as_returned, narrowed

# Gradients of a hinged attack are taken for this part of the lanes at a time. In StrAttack's runs on
# CIFAR-10 images 13 % of the lanes need one.
_PART = 4


class LanesState(NamedTuple):
    """What is being worked on.

    Attributes:
        attack: pytree, every leaf with leading axis L; the attack's state in each lane.
        sample_id: [L] int32; which sample a lane works on, NO_SAMPLE where it is idle.
    """

    attack: Any  # [L, ...]
    sample_id: jax.Array  # [L] i32


class Queue(NamedTuple):
    """What waits.

    Attributes:
        samples: Sample with leading axis Q.
        begin: [1] int32; first sample not yet taken. (One element, not a scalar, so that the
            queues of several devices concatenate.)
        end: [1] int32; one past the last sample; places from there on are padding.
    """

    samples: Sample  # [Q, ...]
    begin: jax.Array  # [1] i32
    end: jax.Array  # [1] i32


class Parked(NamedTuple):
    """Images half-way that wait for a lane, after those of the queue.

    Attributes:
        lanes: LanesState with leading axis P.
        begin: [1] int32; first one not yet taken.
        end: [1] int32; one past the last.
    """

    lanes: LanesState  # [P, ...]
    begin: jax.Array  # [1] i32
    end: jax.Array  # [1] i32


class Finished(NamedTuple):
    """What is done.

    Attributes:
        outcome: Outcome with leading axis F.
        sample_id: [F] int32; NO_SAMPLE in places not yet written.
        count: [1] int32; number of places written.
    """

    outcome: Outcome  # [F, ...]
    sample_id: jax.Array  # [F] i32
    count: jax.Array  # [1] i32


class _Carry(NamedTuple):
    lanes: LanesState
    taken: list[jax.Array]  # `begin` of the queue and of what is parked
    finished: Finished
    iteration: jax.Array  # [] i32


def idle_lanes(algorithm: Algorithm, sample: Sample, num_lanes: int) -> LanesState:
    """Return lanes without work; only shapes and dtypes of `sample` matter.

    Args:
        algorithm: the attack.
        sample: one sample, or shapes of one.
        num_lanes: L.

    Returns:
        L idle lanes, as NumPy arrays of zeros.
    """
    state = jax.eval_shape(algorithm.init, sample)
    zeros = jax.tree.map(lambda a: np.zeros((num_lanes, *a.shape), a.dtype), state)
    return LanesState(zeros, np.full((num_lanes,), NO_SAMPLE, np.int32))


def first_lanes(algorithm: Algorithm, queue: Queue, num_lanes: int) -> tuple[LanesState, Queue]:
    """Put the first images of a queue into lanes.

    Args:
        algorithm: the attack.
        queue: what waits.
        num_lanes: L.

    Returns:
        (L lanes, idle from where the queue ends on; the rest of the queue).
    """
    rank = jnp.arange(num_lanes, dtype=jnp.int32)
    sample = _at(queue.samples, queue.begin + rank)
    begin = jnp.minimum(queue.begin + num_lanes, queue.end)
    lanes = LanesState(jax.vmap(algorithm.init)(sample),
                       jnp.where(queue.begin + rank < queue.end, sample.sample_id, NO_SAMPLE))
    return lanes, queue._replace(begin=begin)


def _empty_finished(algorithm: Algorithm, lanes: LanesState, capacity: int) -> Finished:
    shapes = jax.eval_shape(jax.vmap(algorithm.finish), lanes.attack)
    outcome = jax.tree.map(lambda a: jnp.zeros((capacity, *a.shape[1:]), a.dtype), shapes)
    return Finished(outcome, jnp.full((capacity,), NO_SAMPLE, jnp.int32), jnp.zeros(1, jnp.int32))


def evaluate(algorithm: Algorithm, logits_fn, states, saved=None):
    """Call the model once, forward and backward, at the points all lanes ask for.

    Args:
        algorithm: the attack.
        logits_fn: [L, H, W, C] -> [L, K].
        states: the attack's states, leading axis L.
        saved: list of arrays or None, to take the backward pass alone: what an earlier call at the
            same points returned. None in the list is made anew; None for all makes a forward pass.

    Returns:
        (Evaluation with leading axis L, list of arrays that the backward pass needs).
    """
    points = jax.vmap(algorithm.query)(states)

    def rows_of_logits(points):
        logits = narrowed(as_returned(logits_fn(points)), points.dtype)
        return logits.reshape(len(points), logits.shape[-1])  # a model may squeeze a batch of one

    if algorithm.gradient_free:
        logits = rows_of_logits(points).astype(points.dtype)
        return Evaluation(logits, jax.vmap(algorithm.loss)(states, logits), jnp.zeros_like(points)), []

    differentiating = ("apply_fn cannot be differentiated", "put the model in evaluation mode, or use an attack "
                       "without gradients (sparse_rs)")
    with in_one_line(*differentiating):
        logits, pullback = jax.vjp(rows_of_logits, points)

    # The derivative of the loss by the logits is taken image by image; a NaN in one row cannot
    # reach another through a sum over the batch.
    def loss_of(logits, state):
        return algorithm.loss(state, logits.astype(points.dtype))

    loss, by_logits = jax.vmap(jax.value_and_grad(loss_of))(logits, states)
    # What is replaced here is dead code, and so is the forward pass once nothing needs it.
    arrays, tree = jax.tree.flatten((by_logits, pullback))
    if saved is not None and len(saved) == len(arrays):
        arrays = [new if old is None else old for new, old in zip(arrays, saved)]
    by_logits, pullback = jax.tree.unflatten(tree, arrays)
    with in_one_line(*differentiating):
        (gradient,) = pullback(by_logits)
    if algorithm.direction is not None:
        gradient = jax.vmap(algorithm.direction)(gradient)
    return Evaluation(logits.astype(points.dtype), loss, gradient), arrays


def _gradients_where(needed, evaluate_fn, states, saved):
    """Gradients of some lanes, a few of them per call; zeros for the others.

    Args:
        needed: [L] bool.
        evaluate_fn: as in `drain`.
        states: the attack's states, leading axis L.
        saved: what `evaluate_fn` returned beside the evaluation of `states`.

    Returns:
        [L, H, W, C].
    """
    num_lanes = needed.shape[0]
    few = min(num_lanes, max(2, num_lanes // _PART))  # two: models may treat a batch of one specially
    # An axis belongs to the lanes if it grows by one with them.
    more = jax.tree.map(lambda a: jax.ShapeDtypeStruct((num_lanes + 1, *a.shape[1:]), a.dtype), states)
    evaluation, grown = jax.eval_shape(evaluate_fn, more)

    def taken(array, like, lanes):
        """The lanes' part of one saved array; None where no axis tells which that is."""
        pairs = enumerate(zip(array.shape, like.shape))
        changed = [(axis, pair) for axis, pair in pairs if pair[0] != pair[1]]
        # Integers may be positions in the batch, `h[jnp.arange(len(h)), i]`, which are others in a smaller one.
        if [pair for _, pair in changed] != [(num_lanes, num_lanes + 1)] or jnp.issubdtype(array.dtype, jnp.integer):
            return None
        return jnp.take(array, lanes, changed[0][0], mode="clip")

    def take(carry):
        needed, gradients = carry
        (lanes,) = jnp.nonzero(needed, size=few, fill_value=num_lanes)  # beyond the end: dropped
        known = [taken(array, like, lanes) for array, like in zip(saved, grown)]
        evaluation, _ = evaluate_fn(jax.tree.map(lambda a: a.at[lanes].get(mode="clip"), states),
                                    known if len(saved) == len(grown) else None)
        return (needed.at[lanes].set(False, mode="drop"),
                gradients.at[lanes].set(evaluation.gradient, mode="drop"))

    zeros = jnp.zeros((num_lanes, *evaluation.gradient.shape[1:]), evaluation.gradient.dtype)
    return while_loop(lambda carry: jnp.any(carry[0]), take, (needed, zeros))[1]


def _at(states, place):
    return jax.tree.map(lambda a: jnp.take(a, place, 0, mode="clip"), states)


def _in_step(algorithm: Algorithm, lanes, state, at_work):
    """Whether all lanes at work ask for the same kind of evaluation as an image in this state."""
    if algorithm.wants_gradient is None or algorithm.hinged:
        return True
    wants = algorithm.wants_gradient(state)
    return jnp.all(~at_work | (jax.vmap(algorithm.wants_gradient)(lanes.attack) == wants))


def _waiting(algorithm: Algorithm, lanes, taken, queue, parked, at_work):
    """How many images may be loaded now, [1] int32: from the queue, and parked ones."""
    def of(begin, end, state):
        return jnp.where(_in_step(algorithm, lanes, state, at_work), end - begin, 0)

    fresh = of(taken[0], queue.end, algorithm.init(_at(queue.samples, 0)))
    if parked is None:
        return fresh, jnp.zeros(1, jnp.int32)
    return fresh, of(taken[1], parked.end, _at(parked.lanes.attack, taken[1][0]))


def _exchange(algorithm: Algorithm, lanes, taken, finished, queue, parked):
    """Store what is finished and give idle lanes the next images."""
    capacity = finished.sample_id.shape[0]
    occupied = lanes.sample_id != NO_SAMPLE
    over = occupied & jax.vmap(algorithm.done)(lanes.attack)
    idle = ~occupied | over
    row = finished.count + jnp.cumsum(over, dtype=jnp.int32) - 1
    row = jnp.where(over, row, capacity)  # out of range: dropped
    outcome = jax.vmap(algorithm.finish)(lanes.attack)
    finished = Finished(
        jax.tree.map(lambda store, new: store.at[row].set(new, mode="drop"),
                     finished.outcome, outcome),
        finished.sample_id.at[row].set(lanes.sample_id, mode="drop"),
        finished.count + jnp.sum(over, dtype=jnp.int32),
    )
    fresh, halfway = _waiting(algorithm, lanes, taken, queue, parked, occupied & ~over)
    rank = jnp.cumsum(idle, dtype=jnp.int32) - 1
    sample = _at(queue.samples, taken[0] + rank)
    # An idle lane without an image to load holds some image's initial state, so that what it
    # computes in vain stays finite.
    next_lanes = LanesState(jax.vmap(algorithm.init)(sample),
                            jnp.where(rank < fresh, sample.sample_id, NO_SAMPLE))
    if parked is not None:
        resumed = (rank >= fresh) & (rank < fresh + halfway)
        next_lanes = select_rows(resumed, _at(parked.lanes, taken[1] + rank - fresh), next_lanes)
    lanes = select_rows(idle, next_lanes, lanes)
    count = jnp.sum(idle, dtype=jnp.int32)
    begin = [taken[0] + jnp.minimum(count, fresh), *taken[1:]]
    if parked is not None:
        begin[1] += jnp.clip(count - fresh, 0, halfway)
    return lanes, begin, finished


def drain(algorithm: Algorithm, evaluate_fn, lanes: LanesState, queue: Queue,
          parked: Parked | None = None, *, capacity: int, max_iterations=None, loop=while_loop):
    """Work until nothing waits and every lane is idle, `max_iterations` are done, or outcomes might not fit.

    Args:
        algorithm: the attack.
        evaluate_fn: (states, saved=None) -> (Evaluation, saved), see `evaluate`.
        lanes: L lanes, half-way through an image, see `first_lanes`; idle ones take the next after the
            first model call (a second exchange, before it, would be a sixth of what there is to compile).
        queue: what waits; padding places must hold valid images.
        parked: images half-way that wait; None for none.
        capacity: F >= L, places for outcomes. With fewer than images at hand it stops before one could
            find no place.
        max_iterations: [] int32 model calls at most; None for no bound.
        loop: a driver of `loops.py`.

    Returns:
        (lanes, queue, parked, finished, model_calls [1] int32); calling again with the first three
        goes on exactly where this call stopped.
    """

    def exchange(lanes, taken, finished):
        occupied = lanes.sample_id != NO_SAMPLE
        over = occupied & jax.vmap(algorithm.done)(lanes.attack)
        waiting = sum(_waiting(algorithm, lanes, taken, queue, parked, occupied & ~over))[0] > 0
        needed = jnp.any(over) | (jnp.any(~occupied) & waiting)
        # Most iterations finish nothing; the stores and loads are then skipped altogether.
        return lax.cond(needed, lambda *a: _exchange(algorithm, *a, queue, parked), lambda *a: a,
                        lanes, taken, finished)

    def keep_going(carry):
        at_work = jnp.sum(carry.lanes.sample_id != NO_SAMPLE, dtype=jnp.int32)
        more = (at_work > 0) | jnp.any(carry.taken[0] < queue.end)
        if parked is not None:
            more |= jnp.any(carry.taken[1] < parked.end)
        # All that is at work may be done after the next call, and what finds no place would be lost.
        more &= carry.finished.count[0] + at_work <= capacity
        return more if max_iterations is None else more & (carry.iteration < max_iterations)

    def forward_fn(states):
        # The backward pass of which nothing is used is dead code; the compiler removes it.
        evaluation, saved = evaluate_fn(states)
        return evaluation._replace(gradient=jnp.zeros_like(evaluation.gradient)), saved

    def evaluated(lanes):
        if algorithm.wants_gradient is None:
            return evaluate_fn(lanes.attack)[0]
        wants = jax.vmap(algorithm.wants_gradient)(lanes.attack)
        wants &= lanes.sample_id != NO_SAMPLE
        if not algorithm.hinged:
            evaluation = lax.cond(jnp.any(wants), lambda s: evaluate_fn(s)[0],
                                  lambda s: forward_fn(s)[0], lanes.attack)
            # Who asked for none gets none, whatever the neighbours ask for.
            none = jnp.zeros_like(evaluation.gradient)
            return evaluation._replace(gradient=select_rows(wants, evaluation.gradient, none))
        evaluation, saved = forward_fn(lanes.attack)
        needed = wants & jnp.any(saved[0] != 0.0, axis=-1)  # the slope by the logits; NaN included
        return evaluation._replace(
            gradient=_gradients_where(needed, evaluate_fn, lanes.attack, saved))

    def body(carry):
        # The names are what `benchmarks/profile_step.py` and other profilers tell the parts by.
        with jax.named_scope("model"):
            evaluation = evaluated(carry.lanes)
        with jax.named_scope("update"):
            stepped = jax.vmap(algorithm.step)(carry.lanes.attack, evaluation)
        lanes = LanesState(stepped, carry.lanes.sample_id)
        with jax.named_scope("schedule"):
            exchanged = exchange(lanes, carry.taken, carry.finished)
        return _Carry(*exchanged, carry.iteration + 1)

    taken = [queue.begin] if parked is None else [queue.begin, parked.begin]
    finished = _empty_finished(algorithm, lanes, capacity)
    carry = loop(keep_going, body, _Carry(lanes, taken, finished, jnp.zeros((), jnp.int32)))
    queue = queue._replace(begin=carry.taken[0])
    parked = None if parked is None else parked._replace(begin=carry.taken[1])
    return carry.lanes, queue, parked, carry.finished, carry.iteration[None]
