"""The binary search over the weight of a loss that several of the compared attacks share.

References:
    Carlini, Wagner, arXiv 1608.04644, section V-B (the search over c).
"""

import jax.numpy as jnp


def next_weight(c, lower, upper, succeeded, growth):
    """Choose the weight of the next run.

    Args:
        c: [] of the run that ended.
        lower: [] largest c that failed, 0 if none.
        upper: [] smallest c that succeeded, inf if none.
        succeeded: [] bool.
        growth: factor on c after a failure while no run has succeeded.

    Returns:
        (c, lower, upper).
    """
    upper = jnp.where(succeeded, jnp.minimum(upper, c), upper)
    lower = jnp.where(succeeded, lower, jnp.maximum(lower, c))
    return jnp.where(jnp.isinf(upper), growth * c, 0.5 * (lower + upper)), lower, upper
