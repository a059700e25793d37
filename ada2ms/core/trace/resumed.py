"""A run that was stopped and went on from a checkpoint, in a second trace: both as one."""

from dataclasses import replace
from typing import Final

import numpy as np

from ada2ms.core.trace.file import TraceError
from ada2ms.core.trace.model import Trace
from ada2ms.core.trace.pair import ROUNDINGS
from ada2ms.core.trace.sketch import Array, distance, precision, resolution

RESUMED: Final = "resumed"  # in what is known of a run: at which steps it went on from a checkpoint


def resumed(run: Trace, rest: Trace) -> Trace:
    """A run as it went on: up to the checkpoint that the rest begins with, and then the rest.

    The checkpoint may be of before the run's end, since runs are stopped at any time. It is found by the values of the
    rest's first step; where they are none of the run's, the rest is held to follow its end.

    Args:
        run: until it was stopped.
        rest: from the checkpoint on.

    Raises:
        TraceError: they have other parameters.
    """
    if [(p.name, p.shape) for p in run.parameters] != [(p.name, p.shape) for p in rest.parameters]:
        raise TraceError(f"{str(rest.path)!r} has other parameters than {str(run.path)!r}, which it is to go on from")
    place = _place(run, rest) if rest.steps else len(run.steps)
    steps = [*run.steps[:place], *(replace(step, number=place + i + 1) for i, step in enumerate(rest.steps))]
    about = {**run.about, RESUMED: [*run.about.get(RESUMED, []), place + 1]}
    return replace(run, about=about, steps=steps, complete=rest.complete)


def _place(run: Trace, rest: Trace) -> int:
    """How many steps were done when the checkpoint was made; values of the start are those of a model not restored."""
    if not run.steps:
        return 0
    last = run.steps[-1].sketches
    states = [*(step.sketches["value"] for step in run.steps[1:]), last["value"] + last["update"]]
    first = rest.steps[0].sketches["value"]
    digits = np.array([precision(p.dtype) + resolution(p.dtype) for p in run.parameters])
    off = [_off(first, state, digits) for state in states]
    best = int(np.argmin(off))
    return best + 1 if off[best] <= ROUNDINGS else len(run.steps)


def _off(a: Array, b: Array, digits: Array) -> float:
    """The largest difference of a parameter's values, in units of what rounding explains."""
    d, norms = distance(a, b), np.maximum(a[:, 0], digits.min())
    return float(np.nan_to_num(np.max(d / (digits * norms), initial=0.0), nan=np.inf))
