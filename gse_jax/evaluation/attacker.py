"""Samples in, outcomes out, for one attack of a plan: clean forward pass, lanes, out-of-memory.

Lanes are fed in chunks and stay full from one target to the next; memory holds a few chunks.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from gse_jax.attacks import Sample, attack_stream
from gse_jax.attacks.algorithm import Outcome
from gse_jax.attacks.runner import layout
from gse_jax.devices import is_out_of_memory
from gse_jax.evaluation.cases import Case, Group
from gse_jax.evaluation.forward import Forward
from gse_jax.evaluation.measuring import Attacked, Task, settled
from gse_jax.evaluation.sources import Read
from gse_jax.evaluation.store import Finished
from gse_jax.types import ApplyFn

# Rows per batch handed to the lanes; one number, so that its checks compile once.
_BATCH = 64


class Model(NamedTuple):
    """The model under attack and the images it takes.

    Attributes:
        params: its parameters.
        apply_fn: (params, x) -> logits.
        image_shape: (H, W, C).
        dtype: of the images.
        bounds: (low, high).
        num_classes: K.
    """

    params: Any
    apply_fn: ApplyFn
    image_shape: tuple[int, int, int]
    dtype: Any
    bounds: tuple[float, float]
    num_classes: int


class Advance(NamedTuple):
    """What one stretch of work brought.

    Attributes:
        settled: samples that needed no attack.
        attacked: samples whose attack is over.
        lane_evals: gradient evaluations made, those of idle lanes included.
    """

    settled: list[Finished]
    attacked: list[Attacked]
    lane_evals: int


def unusable(read: Read, case: Case | None, num_classes: int) -> str | None:
    """Tell why a sample cannot be attacked in a case.

    Args:
        read: the sample.
        case: the case; None for any.
        num_classes: K.

    Returns:
        The reason in words, or None.
    """
    if read.reason is not None:
        return read.reason
    if not 0 <= read.label < num_classes:
        return f"label {read.label} lies outside [0, {num_classes - 1}]"
    try:
        if case is not None:
            case.target(read.sample_id, read.label, num_classes)
    except ValueError as error:
        return str(error)
    return None


class Attacker:
    """Runs the cases of one group on all local devices."""

    def __init__(self, model: Model, group: Group, forward: Forward, *, num_samples: int, seed: int,
                 lanes: int | None,
                 on_out_of_memory: Callable[[int], None] = lambda lanes: None,
                 on_settled: Callable[[Advance], None] | None = None):
        """Prepare; nothing is computed.

        Args:
            model: the model.
            group: the attack and its cases.
            forward: classifies clean images.
            num_samples: N of the whole data source.
            seed: of the run.
            lanes: images worked on at a time; None for a default.
            on_out_of_memory: told the new number of lanes when there was no room for the old.
            on_settled: given samples that need no attack as soon as they are known, which may be
                long before the next one that does; None leaves them to the next Advance.

        Raises:
            ValueError: if N is too large to number all (target, sample) pairs.
        """
        self._model, self._group, self._forward = model, group, forward
        self._num_samples, self._seed = num_samples, seed
        self.lanes, self._on_out_of_memory = lanes, on_out_of_memory
        self._on_settled, self._reporting = on_settled, False
        if num_samples * (1 + max(case.offset for case in group.cases)) > np.iinfo(np.int32).max:
            raise ValueError(f"data: {num_samples} samples times the largest offset exceed int32; "
                             "split the data into several runs")
        self._settled: list[Finished] = []
        self._chunk: list[tuple[Read, Sequence[Case]]] = []
        self._waiting: deque[tuple[Task, Sample]] = deque()
        self._in_flight: dict[int, tuple[Task, Sample]] = {}

    def run(self, samples: Iterable[tuple[Read, Sequence[Case]]],
            count: int) -> Iterator[Advance]:
        """Attack samples.

        Args:
            samples: each with the cases in which it is still to be done; pulled as lanes fall free.
            count: number of (case, sample) pairs that will come.

        Yields:
            Advance; every pair comes exactly once, in no particular order.
        """
        samples = iter(samples)
        while True:
            try:
                for stretch in self._stream(self._batches(samples), count):
                    attacked = [self._take(int(number), i, stretch.outcome)
                                for i, number in enumerate(stretch.sample_ids)]
                    yield Advance(self._drain(), attacked, stretch.lane_evals)
                break
            except jax.errors.JaxRuntimeError as error:
                lanes = self._lanes_in_use(count)
                # Who is told of results may run out of memory too; fewer lanes would not help.
                if not is_out_of_memory(error) or lanes == 1 or self._reporting:
                    raise
            # What was under way starts anew in fewer lanes; its result does not depend on them.
            self.lanes = lanes // 2
            self._on_out_of_memory(self.lanes)
            self._waiting.extendleft(reversed(self._in_flight.values()))
            self._in_flight.clear()
        if self._settled:
            yield Advance(self._drain(), [], 0)

    def _stream(self, batches, count):
        model, group = self._model, self._group
        return attack_stream(
            model.params, model.apply_fn, batches, image_shape=model.image_shape,
            dtype=model.dtype, targeted=group.targeted, method=group.method,
            settings=group.settings, hyperparams=group.hyperparams, bounds=model.bounds,
            key=self._seed, lanes=self.lanes, num_images=count)

    def _lanes_in_use(self, count) -> int:
        devices, width = layout(count, self.lanes, self._model.image_shape)
        return min(width * len(devices), count)

    def _take(self, number, row, outcome) -> Attacked:
        task, _ = self._in_flight.pop(number)
        return Attacked(task, Outcome(*(field[row] for field in outcome)))

    def _drain(self) -> list[Finished]:
        settled, self._settled = self._settled, []
        return settled

    def _batches(self, samples) -> Iterator[Sample]:
        """Yield batches of one size, the last one smaller, and remember what they hold."""
        rows: list[Sample] = []
        while True:
            entry = self._next_task(samples)
            if entry is not None:
                self._in_flight[int(entry[1].sample_id)] = entry
                rows.append(entry[1])
            if rows and (entry is None or len(rows) == _BATCH):
                yield Sample(*(np.stack(column) for column in zip(*rows)))
                rows = []
            if entry is None:
                return

    def _next_task(self, samples) -> tuple[Task, Sample] | None:
        """Return what is to be attacked next, None at the end.

        No generator: it would be dead after an out-of-memory, and the rest of the samples lost.
        """
        while not self._waiting:
            self._chunk = self._chunk or list(itertools.islice(samples, self._forward.batch))
            if not self._chunk:
                return None
            self._waiting.extend(self._classified(self._chunk))
            self._chunk = []
            if self._on_settled is not None:  # also of nothing, so that who watches sees that work goes on
                self._reporting = True  # stays so if this raises
                self._on_settled(Advance(self._drain(), [], 0))
                self._reporting = False
        return self._waiting.popleft()

    def _classified(self, chunk) -> Iterator[tuple[Task, Sample]]:
        """Classify clean images; yield what is to be attacked, settle the rest."""
        usable = [read.x for read, _ in chunk if read.x is not None]
        if usable:
            predictions = self._forward(np.stack(usable))
            classes = iter(zip(predictions.classes.tolist(), predictions.confidences.tolist()))
        for read, cases in chunk:
            prediction, confidence = next(classes) if read.x is not None else (-1, float("nan"))
            for case in cases:
                task = Task(case, self._group.method, read, -1, prediction, confidence)
                task, refusal = self._with_target(task)
                if refusal is None and prediction == read.label:
                    number = read.position + self._num_samples * case.offset
                    yield task, Sample(*map(np.asarray, (read.x, read.label, task.target, number)))
                else:
                    self._settled.append(settled(task, *(refusal or ("already_misclassified",))))

    def _with_target(self, task: Task) -> tuple[Task, tuple[str, str] | None]:
        """Return the task with its target, and why it cannot be attacked, if so."""
        read, classes = task.sample, self._model.num_classes
        reason = unusable(read, task.case, classes)
        if reason is not None:
            return task, ("quarantined", reason)
        task = task._replace(target=task.case.target(read.sample_id, read.label, classes))
        if task.clean_prediction < 0:
            return task, ("non_finite", "the model gives NaN or infinite logits for the clean "
                                        "image")
        return task, None
