"""The state machine of the homotopy attack: which point is looked at next, and why.

References:
    Li, Lin, Accelerated proximal gradient methods for nonconvex programming, NeurIPS 2015 (nmAPG).
    Zhu, Chen, Wang, arXiv 2106.06027, algorithms 1 to 3; github VITA-Group/SparseADV_Homotopy,
    demo_attack.py (all constants).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gse_jax.attacks.algorithm import select
from gse_jax.attacks.baselines.homotopy_steps import (
    FIRST_STEP,
    Limits,
    Looked,
    accelerated,
    first_tradeoff,
    longest_step,
    objective,
    prox_step,
    remembered,
    spectral_length,
    tuned,
)

# What the model is asked about: the extrapolated y, the step z from y, the step v from x, a point
# of the tuning, a level of the final cut.
LOOK, FROM_Y, FROM_X, TUNE, CUT, OVER = range(6)

_SHRINK = 0.8  # rho of the line search
_DECREASE = 0.3  # delta, share of |step|^2 by which the objective must fall
_TRIES_FROM_Y, _TRIES_FROM_X = 60, 10  # the code takes 1,000 and 10; 0.8^60 is 1.5e-6
_STILL = 1e-3  # change of the loss below which it stands still
_ROUNDING = 1e-5  # share of the objective that the model's rounding may move it by
_NUM_CUTS = 16  # halvings of the level: to the last of 65,536 parts
_MOST_CHANGED = 0.95  # share of all values; an attack that changed more has failed


class Search(NamedTuple):
    """Where the search of one image stands.

    Attributes:
        phase: [] int32, what `trial` is.
        trial: [H, W, C] perturbation to look at next.
        x: iterate.
        y: extrapolated point.
        y_before: the extrapolated point before.
        z: last step from y.
        length: [] alpha of the step that is being tried.
        tries: [] int32 lengths tried before it.
        inertia: [] t_k.
        average: [] c_k, average of past objectives.
        weight: [] q_k of that average.
        step: [] int32 iterations of this round.
        last_loss: [] f of the iterate before.
        stood_still: [] int32 iterations beyond `max_steps` in which f stood still.
        tradeoff: [] lambda of this round.
        round: [] int32 rounds begun.
        most: [] int32 groups that may be non-zero in this round.
        tuning_left: [] int32 steps of the tuning still to do.
        level_low: [] level of the cut that does not fool the model.
        level_high: [] lowest level that does.
        cuts: [] int32 levels tried.
    """

    phase: jax.Array  # [] i32
    trial: jax.Array  # [H, W, C] float
    x: Looked
    y: Looked
    y_before: Looked
    z: Looked
    length: jax.Array  # [] float
    tries: jax.Array  # [] i32
    inertia: jax.Array  # [] float
    average: jax.Array  # [] float
    weight: jax.Array  # [] float
    step: jax.Array  # [] i32
    last_loss: jax.Array  # [] float
    stood_still: jax.Array  # [] i32
    tradeoff: jax.Array  # [] float
    round: jax.Array  # [] i32
    most: jax.Array  # [] i32
    tuning_left: jax.Array  # [] i32
    level_low: jax.Array  # [] float
    level_high: jax.Array  # [] float
    cuts: jax.Array  # [] i32


def start_search(image, num_new: int) -> Search:
    """Return the search before the clean image was looked at.

    Args:
        image: [H, W, C].
        num_new: groups that the first round may change.

    Returns:
        Search in phase LOOK at 0.
    """
    zero, scalar = jnp.zeros_like(image), jnp.zeros((), image.dtype)
    count = jnp.zeros((), jnp.int32)
    nowhere = Looked(zero, scalar, zero, scalar, jnp.zeros((), bool))
    return Search(jnp.asarray(LOOK, jnp.int32), zero, nowhere, nowhere, nowhere, nowhere, scalar,
                  count, scalar + 1.0, scalar, scalar + 1.0, count, scalar, count, scalar, count,
                  jnp.asarray(num_new, jnp.int32), count, scalar, scalar, count)


def advance(now: Search, got: Looked, clean, lower, upper, segments, entries, settings,
            params) -> Search:
    """Take in what the model said about the trial, and choose the next one.

    Args:
        now: the search.
        got: the trial, looked at.
        clean: [] bool, the trial is the clean image, looked at for the first time.
        lower: [H, W, C] smallest values, <= 0.
        upper: [H, W, C] largest values, >= 0.
        segments: [H, W] int32 superpixels, None for entries.
        entries: [] of the largest group.
        settings: HomotopySettings.
        params: HomotopyHyperparams of arrays [].

    Returns:
        Search; in phase OVER when there is nothing left to try.
    """
    limits = Limits(lower, upper, now.most)
    longest = longest_step(now.tradeoff, params.radius, entries)
    first = now._replace(x=got, tradeoff=params.first_factor * first_tradeoff(
        got.gradient, limits, segments) / params.decrease)
    from_y, below_average = after_step_from_y(now, got, longest)
    from_x, best = after_step_from_x(now, got)
    cases = [
        select(clean, begin_round(first, now.most, params), after_look(now, got, longest)),
        from_y,
        from_x,
        after_tuning(now, got, limits, params),
        after_cut(now, got),
    ]
    after = now
    for phase, case in enumerate(cases):
        after = select(now.phase == phase, case, after)
    accepted = ((now.phase == FROM_Y) & below_average) | (
        (now.phase == FROM_X) & (after.tries == now.tries))
    after = select(accepted, next_iteration(after, select(now.phase == FROM_Y, got, best),
                                             longest, limits, settings, params), after)
    # Whatever the case, there is one prox to take at most.
    limits = Limits(lower, upper, after.most)
    steps = (after.phase == FROM_Y) | (after.phase == FROM_X)
    origin = select(after.phase == FROM_X, after.x, after.y)
    proximal = prox_step(origin, after.length, after.tradeoff, limits, segments)
    return after._replace(trial=jnp.where(steps, proximal, after.trial))


def after_look(now: Search, got: Looked, longest) -> Search:
    """Begin the line search from y.

    Args:
        now: the search.
        got: y, looked at.
        longest: [] bound on step lengths.

    Returns:
        Search.
    """
    return _from_y(now, got, spectral_length(got, now.y_before, longest))


def after_step_from_y(now: Search, got: Looked, longest) -> tuple[Search, jax.Array]:
    """Take the step from y, or a shorter one, or turn to steps from x.

    Args:
        now: the search.
        got: z, looked at.
        longest: [] bound on step lengths.

    Returns:
        (Search, whether z is the new iterate).
    """
    fall = _DECREASE * jnp.sum((got.w - now.y.w) ** 2)
    value = objective(got, now.tradeoff)
    # Without it a step that goes nowhere is shortened to the last, one model call each time.
    value -= _ROUNDING * jnp.abs(value)
    below_average = value <= now.average - fall
    fine = below_average | (value <= objective(now.y, now.tradeoff) - fall)
    shorter = ~fine & (now.tries + 1 < _TRIES_FROM_Y)
    again = now._replace(length=_SHRINK * now.length, tries=now.tries + 1)
    with_z = now._replace(z=got)
    turned = with_z._replace(
        phase=jnp.asarray(FROM_X, jnp.int32), tries=jnp.zeros((), jnp.int32),
        length=jnp.where(now.step == 0, FIRST_STEP, spectral_length(now.x, now.y_before, longest)))
    return select(shorter, again, select(below_average, with_z, turned)), below_average


def after_step_from_x(now: Search, got: Looked) -> tuple[Search, Looked]:
    """Take the better of the steps from x and from y, or try a shorter one.

    Args:
        now: the search.
        got: v, looked at.

    Returns:
        (Search with one more try if v is refused, else the same; the new iterate in that case).
    """
    bound = now.average - _DECREASE * jnp.sum((got.w - now.x.w) ** 2)
    value = objective(got, now.tradeoff)
    fine = (value <= bound) | (jnp.abs(value - bound) < _STILL)
    shorter = ~fine & (now.tries + 1 < _TRIES_FROM_X)
    again = now._replace(length=_SHRINK * now.length, tries=now.tries + 1)
    best = select(objective(now.z, now.tradeoff) <= value, now.z, got)
    worse = ~fine & (objective(best, now.tradeoff) > objective(now.x, now.tradeoff))
    return select(shorter, again, now), select(worse, now.x, best)


def next_iteration(now: Search, x: Looked, longest, limits: Limits, settings, params) -> Search:
    """Make a point the iterate; go on, end the round, or begin the final cut.

    Args:
        now: the search.
        x: the new iterate.
        longest: [] bound on step lengths.
        limits: Limits.
        settings: HomotopySettings.
        params: HomotopyHyperparams of arrays [].

    Returns:
        Search.
    """
    step = now.step + 1
    still = (step >= settings.max_steps) & (jnp.abs(x.loss - now.last_loss) < _STILL)
    stood_still = now.stood_still + still.astype(jnp.int32)
    # From the same y again the same step follows.
    fixed = (now.step > 0) & jnp.all((x.w == now.x.w) & (now.y.w == x.w) & (
        now.y_before.w == x.w))
    ended = (stood_still > 1) | (step >= 2 * settings.max_steps) | fixed
    average, weight = remembered(now.average, now.weight, objective(x, now.tradeoff))
    inertia = 0.5 * (jnp.sqrt(4.0 * now.inertia * now.inertia + 1.0) + 1.0)
    y = accelerated(x.w, now.x.w, now.z.w, inertia, now.inertia, limits)
    moved = now._replace(
        x=x, y_before=now.y, inertia=inertia, average=average, weight=weight, step=step,
        last_loss=x.loss, stood_still=stood_still)
    # x is known already.
    same = jnp.all(y == x.w)
    going = select(same, _from_y(moved, x, spectral_length(x, moved.y_before, longest)),
                    moved._replace(phase=jnp.asarray(LOOK, jnp.int32), trial=y))
    going = select(ended, end_round(moved, limits, settings, params), going)
    return select(x.fools, begin_cut(moved), going)


def end_round(now: Search, limits: Limits, settings, params) -> Search:
    """Tune the support where it is not saturated, else begin the next round.

    Args:
        now: the search, at the end of a round without success.
        limits: Limits.
        settings: HomotopySettings.
        params: HomotopyHyperparams of arrays [].

    Returns:
        Search.
    """
    size = jnp.abs(now.x.w)
    changed = jnp.sum(size > 0.0, dtype=jnp.int32)
    loose = jnp.sum(size) <= params.saturation * params.radius * changed.astype(size.dtype)
    new = jnp.where(loose, settings.num_new_loose, settings.num_new)
    level = jnp.minimum(changed // settings.tuning_every, settings.tuning_levels - 1)
    # Without a support there is nothing to tune.
    steps = jnp.where(loose & (changed > 0), settings.tuning_steps * (1 + level), 0)
    most = now.x.groups.astype(jnp.int32) + new
    tuning = now._replace(
        phase=jnp.asarray(TUNE, jnp.int32), most=most, tuning_left=steps,
        trial=tuned(now.x, limits, params.loss_step, params.norm_step))
    hopeless = (changed > int(_MOST_CHANGED * size.size)) | (now.round >= settings.max_rounds)
    after = select(steps > 0, tuning, begin_round(now, most, params))
    return select(hopeless, now._replace(phase=jnp.asarray(OVER, jnp.int32)), after)


def after_tuning(now: Search, got: Looked, limits: Limits, params) -> Search:
    """Do the next step of the tuning, or begin the next round or the final cut.

    Args:
        now: the search.
        got: the tuned iterate, looked at.
        limits: Limits.
        params: HomotopyHyperparams of arrays [].

    Returns:
        Search.
    """
    moved = now._replace(x=got, tuning_left=now.tuning_left - 1,
                         trial=tuned(got, limits, params.loss_step, params.norm_step))
    after = select(moved.tuning_left > 0, moved, begin_round(moved, now.most, params))
    return select(got.fools, begin_cut(moved), after)


def begin_round(now: Search, most, params) -> Search:
    """Return the search at the start of a round with a smaller lambda.

    Args:
        now: the search.
        most: [] int32 groups that may be non-zero.
        params: HomotopyHyperparams of arrays [].

    Returns:
        Search in phase FROM_Y, y being the iterate.
    """
    x, one = now.x, jnp.ones_like(now.weight)
    count = jnp.zeros((), jnp.int32)
    tradeoff = params.decrease * now.tradeoff
    return _from_y(now._replace(
        y_before=x, z=x, inertia=one, average=objective(x, tradeoff), weight=one, step=count,
        last_loss=0.0 * one, stood_still=count, tradeoff=tradeoff, round=now.round + 1,
        most=most), x, FIRST_STEP * one)


def begin_cut(now: Search) -> Search:
    """Return the search at the start of the final cut of the iterate.

    Args:
        now: the search; its iterate fools the model.

    Returns:
        Search in phase CUT.
    """
    highest = jnp.max(jnp.abs(now.x.w))
    return _at_level(now._replace(phase=jnp.asarray(CUT, jnp.int32), level_low=0.0 * highest,
                                  level_high=highest, cuts=jnp.zeros((), jnp.int32)))


def after_cut(now: Search, got: Looked) -> Search:
    """Halve the interval of the level.

    Args:
        now: the search.
        got: the iterate cut down to the middle level, looked at.

    Returns:
        Search.
    """
    middle = 0.5 * (now.level_low + now.level_high)
    after = _at_level(now._replace(level_low=jnp.where(got.fools, now.level_low, middle),
                                   level_high=jnp.where(got.fools, middle, now.level_high),
                                   cuts=now.cuts + 1))
    return after._replace(phase=jnp.where(after.cuts >= _NUM_CUTS, OVER, CUT).astype(jnp.int32))


def _at_level(now):
    level = 0.5 * (now.level_low + now.level_high)
    return now._replace(trial=jnp.clip(now.x.w, -level, level))


def _from_y(now, y, length):
    return now._replace(phase=jnp.asarray(FROM_Y, jnp.int32), y=y, length=length,
                        tries=jnp.zeros((), jnp.int32))
