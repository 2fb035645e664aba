"""What the caller's model raises, told in one line."""

import contextlib


@contextlib.contextmanager
def in_one_line(what: str, fix: str = ""):
    """Raise any error inside as a `ValueError` of one line; a context manager.

    Args:
        what: what failed, before the error's type and first line.
        fix: what to do about it, after them.

    Raises:
        ValueError: for any error inside, which is its cause.
    """
    try:
        yield
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:200].rstrip(".")
        raise ValueError(f"{what}: {type(error).__name__}: {reason}{fix and f'; {fix}'}") from error
