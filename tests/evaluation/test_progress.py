"""Progress: rates, lines for logs, a bar for terminals."""

import io
import subprocess
import sys

import pytest

from gse_jax.attacks import Progress
from gse_jax.evaluation.progress import Meter, RunProgress, describe, display


def at(seconds):
    times = iter([100.0, 100.0 + seconds])
    return Meter(lambda: next(times))


def test_rates_leave_out_what_earlier_runs_had_done():
    progress = RunProgress(done=60, total=100, attacked=18, found=9, lane_evals=5000, resumed=40)
    rates = at(10.0).rates(progress)
    assert rates == (500.0, 20.0)  # 20 pairs in 10 s, 40 to go.
    assert progress.success_rate == 0.5
    assert describe(progress, rates) == ("60/100 images, success rate since the resume 50.0 %, 500 evaluations/s, "
                                         "20 s left")


def test_nothing_is_claimed_before_anything_is_known():
    progress = RunProgress(40, 100, 0, 0, 0, 40)
    assert progress.success_rate is None
    assert describe(progress, at(10.0).rates(progress)) == "40/100 images"
    assert describe(progress, at(0.0).rates(progress)) == "40/100 images"


@pytest.mark.parametrize(("seconds", "text"), [(59, "59 s"), (60, "1 min 0 s"),
                                               (3599.6, "1 h 0 min"), (90061, "25 h 1 min")])
def test_time_left_is_for_people(seconds, text):
    progress = RunProgress(1, 2, 0, 0, 0, 0)
    assert describe(progress, at(seconds).rates(progress)).endswith(f", {text} left")


def test_a_log_gets_few_plain_lines_and_always_the_last():
    stream = io.StringIO()
    with display(stream, interval=1000.0) as show:
        for done in range(1, 51):
            show(Progress(done, 50, done, 10 * done, 20 * done))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2 and lines[0].startswith("1/50 images, success rate 100.0 %")
    assert lines[1].startswith("50/50 images") and "left" not in lines[1]
    assert "\x1b" not in stream.getvalue() and "\r" not in stream.getvalue()


def test_a_terminal_gets_a_bar():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with display(stream) as show:
        show(RunProgress(3, 8, 3, 2, 500, 0))
        show(RunProgress(8, 8, 8, 6, 900, 0))
    assert "8/8" in stream.getvalue() and "success rate 75.0 %" in stream.getvalue()


def test_a_reader_that_has_gone_ends_nothing():
    """`2>&1 | tee log`: Ctrl-C ends tee too."""
    script = ("import sys\nfrom gse_jax.attacks import Progress\nfrom gse_jax.evaluation.progress import display, say\n"
              "sys.stdin.readline()\n"
              "with display(interval=0.0) as show:\n    for done in range(1, 4):\n        show(Progress(done, 3, 0, 9, 9))\n"
              "say('the end')\nsys.exit(75)\n")
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stderr.close()
    process.stdin.write(b"go\n")
    process.stdin.close()
    assert process.wait(timeout=60) == 75
