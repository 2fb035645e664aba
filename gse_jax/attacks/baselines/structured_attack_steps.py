"""The single steps of StrAttack: ADMM iteration, and the support of retraining.

All in the units of images of range width 2.

References:
    Xu et al., Structured adversarial attack, arXiv 1808.01664, eq. (7) to (15) and section 4;
    github KaidiXu/StrAttack, l2_LADMMST_attack_v3.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gse_jax.ops import group_soft_threshold

_DROPPED = 0.03  # share of the support's entries that retraining drops
_RETRAIN_L2 = 0.01  # factor on gamma in retraining


class Blocks(NamedTuple):
    """Variables of the ADMM.

    Attributes:
        z: [H, W, C] common variable.
        y: [H, W, C] point to test: the group-sparse copy, in retraining the one on the support.
        dual_delta: [H, W, C] scaled dual of delta = z; in retraining of y = z.
        dual_y: [H, W, C] scaled dual of y = z.
        dual_w: [H, W, C] scaled dual of w = z.
    """

    z: jax.Array  # [H, W, C] float
    y: jax.Array  # [H, W, C] float
    dual_delta: jax.Array  # [H, W, C] float
    dual_y: jax.Array  # [H, W, C] float
    dual_w: jax.Array  # [H, W, C] float


def admm_step(now: Blocks, gradient, step, lower, upper, params, cell_size: int) -> Blocks:
    """Do one ADMM iteration.

    Args:
        now: the variables.
        gradient: [H, W, C] of c f at z.
        step: [] int32 iterations done in this run.
        lower: [H, W, C] smallest admissible perturbation.
        upper: [H, W, C] largest admissible perturbation.
        params: StrAttackHyperparams.
        cell_size: int, side of the groups.

    Returns:
        Blocks; its `y` is the group-sparse copy at the old z.

    References:
        arXiv 1808.01664, proposition 1 and eq. (15).
    """
    z, rho = now.z, params.rho
    delta = rho / (rho + 2.0 * params.gamma) * (z - now.dual_delta)
    w = jnp.clip(z - now.dual_w, lower, upper)
    y = group_soft_threshold(z - now.dual_y, params.tau / rho, cell_size)
    inertia = params.alpha * jnp.sqrt((step + 1).astype(z.dtype))
    copies = delta + now.dual_delta + w + now.dual_w + y + now.dual_y
    new = (inertia * z + rho * copies - gradient) / (inertia + 3.0 * rho)
    return Blocks(new, y, now.dual_delta + delta - new, now.dual_y + y - new, now.dual_w + w - new)


def start_retraining(best, support, lower, upper, params) -> Blocks:
    """Return the variables at the start of a run of the retraining.

    Args:
        best: [H, W, C] best perturbation so far.
        support: [H, W, C] bool.
        lower: [H, W, C] smallest admissible perturbation.
        upper: [H, W, C] largest admissible perturbation.
        params: StrAttackHyperparams.

    Returns:
        Blocks.
    """
    zero = jnp.zeros_like(best)
    y = _on_support(best, support, lower, upper, params)
    return Blocks(best, y, zero, zero, zero)


def retraining_step(now: Blocks, gradient, support, lower, upper, params) -> Blocks:
    """Do one iteration of the retraining: margin and l2 norm, on the support alone.

    Args:
        now: the variables.
        gradient: [H, W, C] of c f at `now.y`.
        support: [H, W, C] bool.
        lower: [H, W, C] smallest admissible perturbation.
        upper: [H, W, C] largest admissible perturbation.
        params: StrAttackHyperparams.

    Returns:
        Blocks.
    """
    kept = jnp.where(support, gradient, 0.0)
    # The weights of the published code; they do not add up to one, which shrinks z.
    z = (params.alpha * now.z + params.rho * (now.y + now.dual_delta) - kept) / (
        params.alpha + 2.0 * params.rho)
    dual = now.dual_delta + now.y - z
    return now._replace(z=z, y=_on_support(z - dual, support, lower, upper, params),
                        dual_delta=dual)


def _on_support(w, support, lower, upper, params):
    shrink = params.rho / (params.rho + _RETRAIN_L2 * params.gamma)
    return jnp.where(support, jnp.clip(w * shrink, lower, upper), 0.0)


def trimmed_support(y):
    """Return the non-zero entries of a perturbation without the smallest 3 %.

    Args:
        y: [H, W, C].

    Returns:
        [H, W, C] bool.
    """
    size = jnp.abs(y).reshape(-1)
    most = int(_DROPPED * size.size) + 1
    count = jnp.sum(size > 0.0, dtype=jnp.int32)
    dropped = jnp.floor(_DROPPED * (count - 1).astype(y.dtype)).astype(jnp.int32)
    # The (dropped + 1)-th smallest non-zero entry is the percentile's lower neighbour.
    smallest, _ = lax.top_k(-jnp.where(size > 0.0, size, jnp.inf), most)
    edge = -smallest[jnp.clip(dropped, 0, most - 1)]
    return jnp.abs(y) > jnp.where(count > 0, edge, 0.0)
