"""Ending early without losing anything: signals, and a device that has stopped answering."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

# EX_TEMPFAIL of sysexits.h, "temporary failure, the user is invited to retry": what SLURM's
# --requeue scripts, Kubernetes pod failure policies and shells can tell from a real error.
EXIT_RESUMABLE = 75


class Preempted(SystemExit):
    """The run was asked to stop, has stored what it had, and can be resumed.

    Uncaught it ends the process with code `EXIT_RESUMABLE`.
    """

    def __init__(self, reason: str):
        """Say why.

        Args:
            reason: e.g. "SIGTERM".
        """
        super().__init__(EXIT_RESUMABLE)
        self.reason = reason

    def __str__(self):
        return (f"stopped by {self.reason}; everything finished is stored, "
                "the same command goes on from there")


@contextlib.contextmanager
def resumable():
    """While nothing is at work that has to be stored, SIGTERM ends the process at once with `EXIT_RESUMABLE`.

    Raises:
        Preempted: then. Outside the main thread, where Python allows no handlers, never.
    """
    def stop(number, frame):
        raise Preempted(signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


class StopSignals:
    """Turns SIGTERM and the first Ctrl-C into a request to stop; a context manager.

    A second Ctrl-C interrupts at once. Outside the main thread, where Python allows no handlers,
    it does nothing.
    """

    def __init__(self):
        """Install nothing yet."""
        self.requested: str | None = None
        self._before: dict[int, object] = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            # None: a handler that was not installed from Python; it cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _request(self, number, frame):
        del frame  # Unused.
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name
        with contextlib.suppress(OSError):  # no terminal any more; `print` is not for signal handlers
            os.write(2, f"gse_jax: {self.requested}: stopping after this stretch of work\n".encode())


class Watchdog:
    """Ends the process with `EXIT_RESUMABLE` when nothing moves for too long; a context manager.

    A call into a hung device never returns, so only another thread can act, and only by ending
    the process: what was flushed is stored.
    """

    def __init__(self, seconds: float | None, on_stall: Callable[[], None]):
        """Prepare.

        Args:
            seconds: without `beat` for so long the process ends; None never.
            on_stall: called before, from the watchdog's thread; must not touch the device.
        """
        self._seconds, self._on_stall = seconds, on_stall
        self._idle = 0.0
        self._stop = threading.Event()

    def __enter__(self):
        self.beat()
        if self._seconds is not None:
            threading.Thread(target=self._watch, name="gse-jax watchdog", daemon=True).start()
        return self

    def __exit__(self, *_):
        self._stop.set()

    def beat(self) -> None:
        """Tell that something has moved."""
        self._idle = 0.0

    def _watch(self):
        tick, last = min(1.0, self._seconds / 4), time.monotonic()
        while not self._stop.wait(tick):
            # A process that was suspended has not hung: the clock went on, this loop did not.
            passed, last = min(time.monotonic() - last, 2 * tick), time.monotonic()
            self._idle += passed
            if self._idle > self._seconds:
                try:
                    self._on_stall()
                    print(f"gse_jax: nothing has moved for {self._seconds:g} s, the device seems "
                          f"to hang; ending with the resumable code {EXIT_RESUMABLE}",
                          file=sys.stderr, flush=True)
                finally:
                    os._exit(EXIT_RESUMABLE)
