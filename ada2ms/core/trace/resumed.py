"""A run that was stopped and went on from a checkpoint, in a second trace: both as one."""

from dataclasses import replace
from typing import Final

import numpy as np

from ada2ms.core.trace.data import alike, flat
from ada2ms.core.trace.file import TraceError
from ada2ms.core.trace.model import Step, Trace
from ada2ms.core.trace.pair import ROUNDINGS
from ada2ms.core.trace.sketch import Array, distance, precision, resolution

RESUMED: Final = "resumed"  # in what is known of a run: at which steps it went on from a checkpoint


def resumed(run: Trace, rest: Trace) -> Trace:
    """A run as it went on: up to the checkpoint that the rest begins with, and then the rest.

    The checkpoint may be of before the run's end, since runs are stopped at any time. It is found by the values of the
    rest's first step, or its batch; where they are none of the run's, the rest is held to follow its end.

    Args:
        run: until it was stopped.
        rest: from the checkpoint on.

    Raises:
        TraceError: they have other parameters, or the run has no steps.
    """
    if [(p.name, p.shape) for p in run.parameters] != [(p.name, p.shape) for p in rest.parameters]:
        raise TraceError(f"{str(rest.path)!r} has other parameters than {str(run.path)!r}, which it is to go on from")
    if not rest.steps:
        return run
    if not run.steps:
        raise TraceError(f"{str(run.path)!r} has no steps, so that where {str(rest.path)!r} goes on is not known")
    place = _place(run, rest)
    steps = [*run.steps[:place], *(replace(step, number=place + i + 1) for i, step in enumerate(rest.steps))]
    about = {**run.about, RESUMED: [*(n for n in run.about.get(RESUMED, []) if n <= place), place + 1]}
    return replace(run, about=about, steps=steps, complete=rest.complete)


def _place(run: Trace, rest: Trace) -> int:
    """How many steps were done when the checkpoint was made.

    Values of as many parameters as possible are those of the rest's first step, since some may not have been restored.
    Where that holds after several steps, as without a learning rate, or after none, the batch that comes next tells.
    Values of the start are those of a model not restored.
    """
    last = run.steps[-1].sketches
    states = [*(step.sketches["value"] for step in run.steps[1:]), last["value"] + last["update"]]
    first = rest.steps[0].sketches["value"]
    digits = np.array([precision(p.dtype) + resolution(p.dtype) for p in run.parameters])
    off = np.array([_off(first, state, digits) for state in states])
    fitting = np.sum(off <= ROUNDINGS, axis=1)
    places: list[int] = (np.flatnonzero(fitting == fitting.max()) + 1).tolist()
    repeated = [step.number for step in run.steps if _is_same_batch(step, rest.steps[0])]
    following = [place for place in places if place + 1 in repeated]
    if fitting.max() > 0:
        return min(following or places, key=lambda place: (float(off[place - 1].max()), -place))
    return following[-1] if following and len(repeated) == 1 else len(run.steps)  # data come again, as in each epoch


def _off(a: Array, b: Array, digits: Array) -> Array:
    """The differences of all parameters' values, in units of what rounding explains."""
    d, norms = distance(a, b), np.maximum(a[:, 0], digits.min())
    return np.asarray(np.nan_to_num(d / (digits * norms), nan=np.inf))


def _is_same_batch(a: Step, b: Step) -> bool:
    """Whether two steps were told the same data, in any order of samples."""
    each = flat(a), flat(b)
    same = len(each[0]) == len(each[1]) > 0
    return same and all(alike(x, y) in ("equal", "order") for x, y in zip(*each, strict=True))
