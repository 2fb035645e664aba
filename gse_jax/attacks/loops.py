"""The drivers of the engine: one loop body, three ways to repeat it.

All three compute the same carry. `while_loop` is what attacks run under; `checkpointed_scan` has a
reverse-mode derivative and memory O(sqrt(max_steps)); `python_loop` is the plain oracle of the
tests and can be stepped through in a debugger.
"""

import math

import jax
from jax import lax


def while_loop(keep_going, body, carry):
    """Repeat `body` while `keep_going`, compiled; no reverse-mode derivative.

    Args:
        keep_going: carry -> [] bool.
        body: carry -> carry, same structure, shapes and dtypes.
        carry: pytree of arrays.

    Returns:
        The first carry for which `keep_going` is False.
    """
    return lax.while_loop(keep_going, body, carry)


def checkpointed_scan(max_steps):
    """Make a driver that is reverse-mode differentiable.

    Args:
        max_steps: int >= 1; static bound on the number of iterations. Iterations after
            `keep_going` turned False leave the carry unchanged; if it never does, the driver
            stops after `max_steps` rounded up to a product of two near-equal factors.

    Returns:
        A function with the signature of `while_loop`. The body is recomputed in the reverse pass:
        carries are stored for every segment of about sqrt(max_steps) iterations and, within the
        segment that is being differentiated, for every iteration.
    """
    inner = max(1, math.isqrt(max_steps))
    outer = -(-max_steps // inner)

    def driver(keep_going, body, carry):
        def one(carry, _):
            # cond, not where: the branch not taken must not put NaN into the derivative.
            return lax.cond(keep_going(carry), body, lambda c: c, carry), None

        @jax.checkpoint
        def segment(carry, _):
            return lax.scan(jax.checkpoint(one), carry, None, length=inner)[0], None

        return lax.scan(segment, carry, None, length=outer)[0]

    return driver


def python_loop(keep_going, body, carry):
    """Repeat `body` in Python; for tests and debugging, not under `jit`.

    Args:
        keep_going: carry -> [] bool, concrete.
        body: carry -> carry.
        carry: pytree of arrays.

    Returns:
        The first carry for which `keep_going` is False.
    """
    while bool(keep_going(carry)):
        carry = body(carry)
    return carry
