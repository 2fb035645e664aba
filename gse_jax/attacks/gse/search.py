"""GSE's outer loop: section search over the initial trade-off. Scalars of one image.

References:
    arXiv 2311.17434, appendix (section search for lambda).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gse_jax.ops import survives_half_quasinorm


class Search(NamedTuple):
    """Where the search stands.

    Attributes:
        run: [] int32 number of runs begun before the current one.
        tradeoff: [] initial trade-off of the current run.
        lower: [] largest trade-off of a run that succeeded, 0 if none.
        upper: [] smallest trade-off of a run that failed, inf if none.
        found: [] bool, any run succeeded.
    """

    run: jax.Array  # [] i32
    tradeoff: jax.Array  # [] float
    lower: jax.Array  # [] float
    upper: jax.Array  # [] float
    found: jax.Array  # [] bool


def start_search(tradeoff) -> Search:
    """Return the search before its first run.

    Args:
        tradeoff: [] first initial trade-off.

    Returns:
        Search.
    """
    return Search(jnp.zeros((), jnp.int32), tradeoff, jnp.zeros_like(tradeoff),
                  jnp.full_like(tradeoff, jnp.inf), jnp.zeros((), bool))


def run_ended(search: Search, succeeded) -> Search:
    """Choose the next run's trade-off from how the current run ended.

    Args:
        search: the search during the run.
        succeeded: [] bool.

    Returns:
        The search at the next run.
    """
    now = search.tradeoff
    upper = jnp.where(succeeded, search.upper, now)
    lower = jnp.where(succeeded, now, search.lower)
    # The published constants: doubling until the first failure; 0.9 and 0.1 below.
    after_success = jnp.where(jnp.isinf(search.upper), 2.0 * now, 0.5 * (search.upper + now))
    tradeoff = jnp.where(succeeded, after_success, _after_failure(search.lower, now))
    return Search(search.run + 1, tradeoff, lower, upper, search.found | succeeded)


def _after_failure(lower, tradeoff):
    return 0.9 * lower + 0.1 * tradeoff


def step_size_of(search: Search, settings, hyperparams):
    """Return the step size of the current run: boosted in the last runs of a hopeless image.

    Args:
        search: the search during the run.
        settings: GSESettings.
        hyperparams: GSEHyperparams.

    Returns:
        [] step size.
    """
    boosted = ~search.found & (search.run >= settings.num_runs - settings.num_boosted_runs)
    return jnp.where(boosted, hyperparams.step_size * hyperparams.boost, hyperparams.step_size)


def is_boosted(tradeoff, first, settings):
    """Tell from its initial trade-off whether a successful run took larger steps.

    A boosted run begins where all runs before it failed, so at `first * 0.1^r` with r at least
    `num_runs - num_boosted_runs`; every other successful run begins higher, or between such powers.

    Args:
        tradeoff: [...] initial trade-off of a run that succeeded.
        first: [...] initial trade-off of the search.
        settings: GSESettings.

    Returns:
        [...] bool.
    """
    if settings.num_boosted_runs == 0:
        return jnp.zeros(tradeoff.shape, bool)
    failures = max(0, settings.num_runs - settings.num_boosted_runs)
    low = tradeoff <= first * (0.1**failures * 1.001)  # the allowance is for rounding
    if settings.num_boosted_runs <= 2:
        return low
    # After a success of a boosted run others begin above it, and below where the first of them began.
    begins = [first * 0.1**run for run in range(failures, settings.num_runs)]
    near = functools.reduce(jnp.logical_or, [jnp.abs(tradeoff - begin) <= 1e-3 * begin for begin in begins])
    return low & (near | (tradeoff < begins[-1]))


def skip_dead_runs(search: Search, largest_gradient, settings, hyperparams) -> Search:
    """Let every run fail at once whose perturbation can never leave zero.

    If the first prox step is zero everywhere, the trade-off grows by 1/q at every pixel, the
    gradient stays what it was, and so does the zero: the whole run is known from the clean
    gradient. In the published code such runs are 46 % of all gradient evaluations.

    Args:
        search: the search at the beginning of a run.
        largest_gradient: [] max |gradient| of the margin at the clean image.
        settings: GSESettings.
        hyperparams: GSEHyperparams.

    Returns:
        The search at the first run that moves, or with `run == num_runs`.

    Differs from the reference:
        The published code spends all iterations on such a run; the result is the same to the bit.
    """
    # With q >= 1 the trade-off does not grow, and without phase 1 there is no prox.
    can_die = (hyperparams.q < 1.0) & (settings.phase1_steps > 0)

    # All runs that can follow at once, one more than there may be, each as if those before it failed.
    # As ten rounds over the whole search, unrolled, this was a fourth of the time to compile GSE; as a
    # loop inside the attack's, 5 % of a call of 1,024 CIFAR-10 images on an H100.
    ahead = jnp.arange(settings.num_runs + 1, dtype=search.run.dtype)
    tradeoffs = jnp.full(ahead.shape, search.tradeoff)
    for k in range(settings.num_runs):
        tradeoffs = jnp.where(ahead > k, _after_failure(search.lower, tradeoffs), tradeoffs)
    runs = search.run + ahead
    size = step_size_of(search._replace(run=runs), settings, hyperparams)
    moves = survives_half_quasinorm(size * largest_gradient, tradeoffs * size)
    next_run = jnp.argmin(can_die & ~moves & (runs < settings.num_runs))  # the last is never dead
    return search._replace(
        run=runs[next_run], tradeoff=tradeoffs[next_run],
        upper=jnp.where(next_run > 0, tradeoffs[jnp.maximum(next_run - 1, 0)], search.upper))
