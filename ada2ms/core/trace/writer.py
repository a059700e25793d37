"""Writes a trace while a run goes on: what all recorders share."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from ada2ms.core.trace.file import Appender
from ada2ms.core.trace.model import STATISTICS, TENSORS, Observed, Parameter, Step, fingerprint
from ada2ms.core.trace.outputs import Output, numbered
from ada2ms.core.trace.sketch import WIDTH, Array

DEFAULT_FULL: Final = 3
DEFAULT_ENTRIES: Final = 65536
DEFAULT_FLUSH: Final = 20


class Writer:
    """Collects steps and writes them, so many at a time.

    Args:
        path: of the file; a trace that is there is replaced. None: nothing is written.
        full: of how many steps to keep entries of the tensors, beside their sketches.
        entries: how many entries of a tensor to keep in these; larger tensors are sampled evenly.
        flush: after how many steps to write; a run that is killed loses at most these.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
        FileExistsError: there is another kind of file in the place.
    """

    def __init__(
        self,
        path: str | Path | None,
        *,
        full: int = DEFAULT_FULL,
        entries: int = DEFAULT_ENTRIES,
        flush: int = DEFAULT_FLUSH,
    ) -> None:
        for name, value, smallest in (("full", full, 0), ("entries", entries, 1), ("flush", flush, 1)):
            if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
                raise ValueError(f"Invalid {name}: {value!r} ({name} must be a whole number, at least {smallest})")
        self.full, self.entries, self._every = full, entries, flush
        self._file: Appender | None = None if path is None else Appender(Path(path))
        self._waiting: list[tuple[Step, list[Callable[[], float]], Callable[[Step], None] | None]] = []
        self._batches: list[list[list[float]]] = []
        self._losses: list[Callable[[], float]] = []
        self._outputs: list[Output] = []
        self.count = 0
        self._begun = False
        self._statistics: int | None = None  # how many there are, if they are recorded

    def begin(
        self,
        about: dict[str, Any],
        parameters: Sequence[Parameter],
        statistics: Sequence[Parameter] | None = None,
        start: Observed | None = None,
    ) -> None:
        """Writes what the trace is of; once, before the first step.

        Args:
            about: the run.
            parameters: of its optimizer.
            statistics: what else moves; None if it is not recorded.
            start: what these are before the first forward pass.
        """
        content = {**about, "full": self.full, "entries": self.entries, "parameters": [p.data() for p in parameters]}
        tensors: dict[str, Array] = {}
        if statistics is not None and start is not None:
            content[STATISTICS], self._statistics = [p.data() for p in statistics], len(statistics)
            tensors = {STATISTICS: start[0], **{f"full/0/{STATISTICS}/{name}": x for name, x in start[1].items()}}
        if self._file is not None:
            self._file.append(content, tensors)
        self._begun = True

    def batch(self, arrays: Sequence[Any]) -> None:
        """Notes a batch of the step that comes."""
        self._batches.append([fingerprint(array) for array in arrays])

    def loss(self, read: Callable[[], float], *, late: bool = False) -> None:
        """Notes a loss of the step that comes; `read` is called when it is written, and does not hold up the device.

        Args:
            read: gives the loss.
            late: whether it may come after its step: then it is the last step's if that has fewer losses than batches.
        """
        if late and self._waiting and not self._losses:
            step, losses, _ = self._waiting[-1]
            if len(losses) < max(1, len(step.batches)):
                losses.append(read)
                step.losses = len(losses)
                return
        self._losses.append(read)

    def statistics(self, observe: Callable[[], Observed]) -> None:
        """Notes the statistics that the last step has left, if it waits to be written; the first time that it is told.

        Args:
            observe: gives their sketches and entries.
        """
        step = self._waiting[-1][0] if self._waiting else None
        if step is not None and STATISTICS not in step.sketches:
            step.sketches[STATISTICS], entries = observe()
            if step.number <= self.full:
                step.full[STATISTICS] = entries

    @property
    def is_full(self) -> bool:
        """Whether the step that comes is one of the first, of which entries and outputs are kept."""
        return self.count < self.full

    def output(self, output: Output) -> None:
        """Notes an output of the forward pass of the step that comes; another one of the same name gets a number."""
        if self.is_full:
            self._outputs.append(replace(output, name=numbered(output.name, self._outputs)))

    @property
    def has_loss(self) -> bool:
        """Whether a loss of the step that comes is noted."""
        return bool(self._losses)

    def add(self, step: Step, fill: Callable[[Step], None] | None = None) -> None:
        """Adds a step, with the batches, losses and outputs noted since the last.

        Args:
            step: of whichever number; it is given its own.
            fill: called when the step is written, to put in what was on a device until then.
        """
        self.count += 1
        step.number, step.batches, step.losses = self.count, self._batches, len(self._losses)
        step.outputs += self._outputs
        self._waiting.append((step, self._losses, fill))
        self._batches, self._losses, self._outputs = [], [], []

    @property
    def is_due(self) -> bool:
        """Whether so many steps wait that they are to be written."""
        return len(self._waiting) >= self._every

    def take(self) -> list[Step]:
        """The steps that wait, with everything that was on a device."""
        steps = []
        for step, losses, fill in self._waiting:
            if losses:
                step.loss = sum(read() for read in losses) / len(losses)
            if fill is not None:
                fill(step)
            steps.append(step)
        self._waiting = []
        return steps

    def flush(self, *, complete: bool = False) -> None:
        """Writes the steps that wait."""
        self.write(self.take(), complete=complete)

    def write(self, steps: Sequence[Step], *, complete: bool = False) -> None:
        """Writes these steps, and whether the run has ended."""
        if self._file is None or not self._begun or not (steps or complete):
            return
        tensors: dict[str, Array] = {}
        contents = []
        for step in steps:
            content = dict(vars(step))
            for what, arrays in content.pop("full").items():
                for name, array in arrays.items():
                    tensors[f"full/{step.number}/{what}/{name}"] = array
            content["outputs"] = [each.data() for each in step.outputs]
            del content["sketches"], content["missing"]
            contents.append(content)
        if steps:
            for what in TENSORS:
                tensors[what] = np.stack([step.sketches[what] for step in steps])
            tensors["missing"] = np.stack([step.missing for step in steps]).astype(bool)
            if self._statistics is not None:
                unknown = np.full((self._statistics, WIDTH), np.nan)
                tensors[STATISTICS] = np.stack([step.sketches.get(STATISTICS, unknown) for step in steps])
        self._file.append({"steps": contents, "complete": complete}, tensors)

    def close(self) -> None:
        """Writes what waits, and that the run has ended."""
        if self._file is not None:
            self.flush(complete=True)
            self._file.close()
            self._file = None
