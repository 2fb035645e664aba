"""What one call of the attack's loop consists of: the model, the update of the images, the schedule.

    python benchmarks/profile_step.py [--lanes 64 1024]

Traces a stretch of GSE on CIFAR-10 images with JAX's profiler and adds up the time of the device's
kernels by the parts that the loop names: `model` (forward and backward pass), `update` (prox,
trade-off map, search) and `schedule` (finished images out, waiting ones in). `gaps` is the time in
which the device does nothing: it waits for the host, also for the tracing itself. Kernels of recorded
graphs cannot be told apart, so XLA's command buffers are off. For an accelerator; a CPU's trace does
not tell its kernels' parts.
"""

import collections
import os
import re
import tempfile
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="

import jax  # noqa: E402
import numpy as np  # noqa: E402
import results_file  # noqa: E402

import gse_jax  # noqa: E402
from gse_jax.attacks import program, runner  # noqa: E402

PARTS = ("model", "update", "schedule")
TRACED = 3  # which stretch of work


class Done(Exception):
    """Ends an attack whose trace is complete."""


class Trace:
    """A progress function that traces one stretch of work.

    An attack tells of a stretch when the devices are at work on the next one, so that the evaluations are
    those of the stretch before; all are of equal length until the queue is empty.
    """

    def __init__(self, folder):
        """Trace into `folder`."""
        self.folder, self.stretches, self.calls = folder, 0, 0

    def __call__(self, progress):
        self.stretches += 1
        if self.stretches >= TRACED:
            results_file.wait_for_devices()
        if self.stretches == TRACED:
            jax.profiler.start_trace(self.folder)
            self.before = progress.lane_evals
        elif self.stretches > TRACED:
            jax.profiler.stop_trace()
            self.lane_evals = progress.lane_evals - self.before
            raise Done


def part_of(op_name):
    """The part of the loop that an instruction belongs to, by the names in its `op_name`."""
    found = [part for part in PARTS if re.search(rf"/{part}[/)]|\({part}\)", op_name)]
    return found[0] if found else "other"


def kernels(folder):
    """(name of the instruction, start, nanoseconds) of every kernel in a trace."""
    (file,) = Path(folder).rglob("*.xplane.pb")
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        if "/device:" in plane.name:
            for line in plane.lines:
                if "Stream" in line.name:
                    for event in line.events:
                        name = next((value for key, value in event.stats if key == "hlo_op"), event.name)
                        yield name, event.start_ns, event.duration_ns


def measure(case, lanes):
    """One row; None where the trace names no kernels."""
    params, apply_fn, x, y, bounds, name = case
    texts = []

    def on_mesh(*arguments, **options):
        run = program.on_mesh(*arguments, **options)

        def compiled(*values):
            if not texts:
                texts.append(run.lower(*values).compile().as_text())
            return run(*values)

        return compiled

    runner.on_mesh = on_mesh
    count = 3 * lanes
    with tempfile.TemporaryDirectory() as folder:
        trace = Trace(folder)
        try:
            gse_jax.attack(params, apply_fn, np.resize(x, (count, *x.shape[1:])),
                           np.resize(y, count), bounds=bounds, lanes=lanes, progress=trace)
        except Done:
            pass
        events = list(kernels(folder))
    names = dict(re.findall(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name=\"([^\"]*)\"", texts[0], re.M))
    total = collections.Counter()
    for instruction, _, length in events:
        total[part_of(names.get(instruction, ""))] += length
    if not total:
        return None
    span = max(start + length for _, start, length in events) - min(e[1] for e in events)
    total["gaps"] = span - sum(total.values())
    calls = trace.lane_evals / lanes
    row = {"model": name, "lanes": lanes, "ms_per_call": span / calls / 1e6}
    return row | {f"{part}_ms": total[part] / calls / 1e6 for part in (*PARTS, "other", "gaps")}


def main():
    """Measure and print."""
    arguments = results_file.parser(__doc__.splitlines()[0])
    arguments.add_argument("--lanes", type=int, nargs="+", default=[64, 1024])
    args = arguments.parse_args()
    results_file.use_one_accelerator()
    case, rows = results_file.network_and_images(400), []
    for lanes in [2] if args.smoke else args.lanes:
        row = measure(case, lanes)
        if row is None:
            print("The trace names no kernels: this needs an accelerator, and nothing is measured.")
            return
        rows.append(row)
        results_file.show(row)
    results_file.write("profile_step", args, rows)


if __name__ == "__main__":
    main()
