"""Between the attack and the disk: collects what is finished and stores it every so often."""

import time

from gse_jax.evaluation.attacker import Advance
from gse_jax.evaluation.durable import StoreError
from gse_jax.evaluation.forward import Forward
from gse_jax.evaluation.measuring import measured
from gse_jax.evaluation.progress import RunProgress
from gse_jax.evaluation.store import Finished, Writer

_FLUSH_BYTES = 64 << 20  # of images; bounds the memory between two flushes


def flush_size(flush_samples: int, image_bytes: int) -> int:
    """Return after how many samples to flush.

    Args:
        flush_samples: at most so many.
        image_bytes: of one image.

    Returns:
        At least 1.
    """
    return max(1, min(flush_samples, _FLUSH_BYTES // (2 * image_bytes)))


class Recorder:
    """Buffers finished samples and writes them; a context manager that flushes at its end."""

    def __init__(self, writer: Writer, forward: Forward, bounds, *, samples: int, seconds: float,
                 total: int, resumed: int):
        """Prepare.

        Args:
            writer: where to.
            forward: for the fresh forward pass over what is about to be stored.
            bounds: (low, high).
            samples: flush after so many.
            seconds: and at least so often.
            total: pairs in this writer's part.
            resumed: of those, how many were done before.
        """
        self._writer, self._forward, self._bounds = writer, forward, bounds
        self._samples, self._seconds = samples, seconds
        self._attacked: list = []
        self._finished: list[Finished] = []
        self._last_flush = time.monotonic()
        self.progress = RunProgress(resumed, total, 0, 0, 0, resumed)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        # After a failed write another would fail as well, and hide the first message.
        if kind is None or not issubclass(kind, StoreError):
            self.flush()

    def add(self, advance: Advance) -> None:
        """Take what a stretch of work brought, and flush if it is time.

        Args:
            advance: from an `Attacker` on this machine.
        """
        self._attacked += advance.attacked
        found = sum(bool(one.outcome.success) for one in advance.attacked)
        self._count(len(advance.attacked), found, len(advance.settled), advance.lane_evals)
        self._take(advance.settled)

    def add_finished(self, finished: list[Finished], lane_evals: int) -> None:
        """Take records that another machine has made, and flush if it is time.

        Args:
            finished: with their images.
            lane_evals: gradient evaluations made for them.
        """
        attacked = [one for one in finished if one.adversarial is not None]
        found = sum(one.record["status"] == "found" for one in attacked)
        self._count(len(attacked), found, len(finished) - len(attacked), lane_evals)
        self._take(finished)

    def flush(self) -> None:
        """Judge what was attacked and store everything."""
        attacked, self._attacked = self._attacked, []
        finished, self._finished = self._finished, []
        finished += measured(attacked, self._forward, self._bounds)
        if finished:
            self._writer.write(finished)
        self._last_flush = time.monotonic()

    def _take(self, finished):
        self._finished += finished
        waiting = len(self._attacked) + len(self._finished)
        if waiting >= self._samples or time.monotonic() - self._last_flush >= self._seconds:
            self.flush()

    def _count(self, attacked, found, settled, lane_evals):
        now = self.progress
        self.progress = now._replace(done=now.done + attacked + settled,
                                     attacked=now.attacked + attacked, found=now.found + found,
                                     lane_evals=now.lane_evals + lane_evals)
