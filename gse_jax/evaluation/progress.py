"""How far a run is: a live bar on a terminal, plain lines otherwise.

`with display() as show: evaluate(plan, run_dir, on_progress=show)`; the same `show` takes the
`gse_jax.attacks.Progress` of a single `attack` call.
"""

import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TextIO


class RunProgress(NamedTuple):
    """Numbers of a run so far.

    Attributes:
        done: (case, sample) pairs that have a result, those of earlier runs included.
        total: pairs in all, of this writer's part.
        attacked: pairs whose attack has ended since this process began.
        found: of those, for how many an adversarial was found.
        lane_evals: gradient evaluations made by this process.
        resumed: pairs that earlier runs had done.
    """

    done: int
    total: int
    attacked: int
    found: int
    lane_evals: int
    resumed: int

    @property
    def success_rate(self) -> float | None:
        """Found / attacked so far, None before the first."""
        return self.found / self.attacked if self.attacked else None


class Rates(NamedTuple):
    """Speeds since the first look.

    Attributes:
        evals_per_second: gradient evaluations; None before there is any.
        seconds_left: estimate; None before anything was done.
    """

    evals_per_second: float | None
    seconds_left: float | None


def say(line: str) -> None:
    """Print a line on stderr; where nobody reads that any more, go on in silence.

    Args:
        line: without its end.
    """
    try:
        print(line, file=sys.stderr, flush=True)
    except BrokenPipeError:  # the `tee` behind it is gone; what is still in the buffer would fail at the end
        sys.stderr = open(os.devnull, "w")
    except OSError:  # e.g. a full disk: this line is lost
        pass


class Meter:
    """Turns counts into speeds and a time left."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        """Start the clock.

        Args:
            clock: seconds.
        """
        self._clock, self._start = clock, clock()

    def rates(self, progress: Any) -> Rates:
        """Return the speeds at this moment.

        Args:
            progress: `RunProgress`, `gse_jax.attacks.Progress` or anything with `done`, `total`
                and `lane_evals`.

        Returns:
            Rates.
        """
        seconds = self._clock() - self._start
        # What earlier runs had done was not done in these seconds.
        now = progress.done - getattr(progress, "resumed", 0)
        if seconds <= 0:
            return Rates(None, None)
        left = seconds * (progress.total - progress.done) / now if now else None
        return Rates(progress.lane_evals / seconds or None, left)


def describe(progress: Any, rates: Rates) -> str:
    """Return one line.

    Args:
        progress: as in `Meter.rates`.
        rates: its result.

    Returns:
        E.g. "120/400 images, success rate 98.3 %, 1234 evaluations/s, 1 min 20 s left".
    """
    parts = [f"{progress.done}/{progress.total} images", *_details(progress, rates)]
    return ", ".join(parts)


def _details(progress, rates):
    attacked = getattr(progress, "attacked", progress.done)
    if attacked:
        since = " since the resume" if getattr(progress, "resumed", 0) else ""
        yield f"success rate{since} {100 * progress.found / attacked:.1f} %"
    if rates.evals_per_second is not None:
        yield f"{rates.evals_per_second:.0f} evaluations/s"
    if progress.done < progress.total and rates.seconds_left is not None:
        yield f"{_duration(rates.seconds_left)} left"


def _duration(seconds: float) -> str:
    seconds = round(seconds)
    hours, minutes = seconds // 3600, seconds % 3600 // 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds % 60} s" if minutes else f"{seconds} s"


class display:  # in small letters as the context managers of `contextlib`
    """Shows progress: `with display() as show: ...(on_progress=show)`."""

    def __init__(self, stream: TextIO | None = None, *, interval: float = 10.0):
        """Choose the form.

        Args:
            stream: where to; None for stderr. A terminal gets a live bar, anything else plain lines.
            interval: seconds between plain lines at least.
        """
        self._stream = stream or sys.stderr
        self._to_stderr = stream is None
        self._interval = interval
        self._bar: Any = None
        self._last_line = -float("inf")
        self._shown = ""

    def __enter__(self):
        self._meter = Meter()
        if self._stream.isatty():
            self._bar = _rich_bar(self._stream)
            self._bar.start()
            self._task = self._bar.add_task("", total=None, details="")
        return self

    def __exit__(self, *_):
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, progress: Any) -> None:
        """Show `progress`, if it is time.

        Args:
            progress: as in `Meter.rates`.
        """
        rates = self._meter.rates(progress)
        if self._bar is not None:
            self._bar.update(self._task, completed=progress.done, total=progress.total,
                             details=", ".join(_details(progress, rates)))
            return
        now = time.monotonic()
        line = describe(progress, rates)
        if line != self._shown and (progress.done == progress.total
                                    or now - self._last_line >= self._interval):
            if self._to_stderr:
                say(line)
            else:
                print(line, file=self._stream, flush=True)
            self._last_line, self._shown = now, line


def _rich_bar(stream):
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn
    from rich.progress import Progress as RichProgress
    from rich.progress import TextColumn

    return RichProgress(MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[details]}"),
                        console=Console(file=stream))
