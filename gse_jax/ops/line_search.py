"""Minimise a function of one variable in an interval, one evaluation at a time.

References:
    Brent, Algorithms for Minimization without Derivatives, 1973, chapter 5.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_GOLDEN = 0.381966011250105  # (3 - sqrt(5)) / 2
_RELATIVE, _ABSOLUTE = 3e-4, 1e-6  # no two trials are closer than this


class LineSearch(NamedTuple):
    """A search in progress: `trial` is where the function is to be evaluated next.

    Attributes:
        left: [] lower end of the interval that holds a minimum.
        right: [] upper end.
        best: [] the best point so far; undefined before the first evaluation.
        second: [] the second best.
        third: [] what `second` was before.
        best_loss: [] value at `best`.
        second_loss: [] value at `second`.
        third_loss: [] value at `third`.
        trial: [] the point that is evaluated next.
        last: [] the step that leads to it.
        before: [] the step before that.
        count: [] int32 evaluations so far.
    """

    left: jax.Array  # [] float
    right: jax.Array  # [] float
    best: jax.Array  # [] float
    second: jax.Array  # [] float
    third: jax.Array  # [] float
    best_loss: jax.Array  # [] float
    second_loss: jax.Array  # [] float
    third_loss: jax.Array  # [] float
    trial: jax.Array  # [] float
    last: jax.Array  # [] float
    before: jax.Array  # [] float
    count: jax.Array  # [] i32


def start_line_search(guess, right=1.0) -> LineSearch:
    """Begin a search in [0, right].

    Args:
        guess: [] float inside (0, right), the first point to evaluate.
        right: [] float, upper end.

    Returns:
        LineSearch.
    """
    zero = jnp.zeros_like(guess)
    return LineSearch(zero, zero + right, guess, guess, guess, zero, zero, zero, guess, zero, zero,
                      jnp.zeros((), jnp.int32))


def advance_line_search(search: LineSearch, loss) -> LineSearch:
    """Enter the value at `search.trial` and choose the next point.

    Args:
        search: the search.
        loss: [] value of the function at `search.trial`.

    Returns:
        LineSearch; its `best` is the best point evaluated.
    """
    search = _entered(search, loss)
    left, right, best = search.left, search.right, search.best
    least = _RELATIVE * jnp.abs(best) + _ABSOLUTE

    # The vertex of the parabola through the three points, as a step p / q from the best one.
    r = (best - search.second) * (search.best_loss - search.third_loss)
    q = (best - search.third) * (search.best_loss - search.second_loss)
    p = (best - search.third) * q - (best - search.second) * r
    q = 2.0 * (q - r)
    p, q = jnp.where(q > 0.0, -p, p), jnp.abs(q)
    # It is trusted inside the interval, while steps become shorter; else a golden section is made.
    # Through two points there is no parabola: p and q are rounding, and fused arithmetic leaves some.
    fits = (best != search.second) & (best != search.third) & (search.second != search.third)
    fits &= (jnp.abs(search.before) > least) & (jnp.abs(p) < jnp.abs(0.5 * q * search.before))
    fits &= (p > q * (left - best)) & (p < q * (right - best))
    to_vertex = p / jnp.where(fits, q, 1.0)
    larger_part = jnp.where(best < 0.5 * (left + right), right - best, left - best)
    at_border = (best + to_vertex - left < 2.0 * least) | (right - best - to_vertex < 2.0 * least)
    to_vertex = jnp.where(at_border, jnp.sign(larger_part) * least, to_vertex)

    step = jnp.where(fits, to_vertex, _GOLDEN * larger_part)
    step = jnp.where(jnp.abs(step) >= least, step, jnp.where(step > 0.0, least, -least))
    return search._replace(
        trial=jnp.clip(best + step, left, right), last=step,
        before=jnp.where(fits, search.last, larger_part))


def _entered(search: LineSearch, loss) -> LineSearch:
    """Enter a value: shrink the interval, and keep the best three points."""
    trial, first = search.trial, search.count == 0
    leads = loss <= search.best_loss
    beyond = trial >= search.best
    # A better point makes the old best one an end of the interval, a worse one becomes an end.
    left = jnp.where(leads & beyond, search.best, jnp.where(~leads & ~beyond, trial, search.left))
    right = jnp.where(leads & ~beyond, search.best, jnp.where(~leads & beyond, trial, search.right))
    runner_up = ~leads & ((loss <= search.second_loss) | (search.second == search.best))
    last = ~leads & ~runner_up & ((loss <= search.third_loss) | (search.third == search.best)
                                  | (search.third == search.second))

    def ranked(new, best, second, third):
        chosen = (jnp.where(leads, new, best),
                  jnp.where(leads, best, jnp.where(runner_up, new, second)),
                  jnp.where(leads | runner_up, second, jnp.where(last, new, third)))
        return [jnp.where(first, new, value) for value in chosen]

    best, second, third = ranked(trial, search.best, search.second, search.third)
    losses = ranked(loss, search.best_loss, search.second_loss, search.third_loss)
    return search._replace(
        left=jnp.where(first, search.left, left), right=jnp.where(first, search.right, right),
        best=best, second=second, third=third, best_loss=losses[0], second_loss=losses[1],
        third_loss=losses[2], count=search.count + 1)
