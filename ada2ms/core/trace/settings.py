"""The stage of hyperparameters: in what those that were recorded differ, of which parameters, and how they go on."""

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ada2ms.core.trace.model import Step
from ada2ms.core.trace.pair import Pair, relative
from ada2ms.core.trace.verdict import Verdict, some

Course = NDArray[np.float64]  # of a hyperparameter, at every step
# By name, value in A, value in B, and the groups in A and B: the parameters of which it is so.
Differing = dict[tuple[str, float, float, tuple[int, int]], list[str]]

_OFTEN = 4  # times that a schedule may move in a step of another
_WARMUP = 3  # steps of a rise by which a warmup is known
_MOST = 4  # sentences on one hyperparameter
# Of the largest in a run: 16 roundings of float32, in which frameworks compute schedules; the last steps of a cosine
# have no digit right.
SAME: Final = 1e-6


class Told:
    """Whether hyperparameters that were told are equal, but for the rounding of schedules."""

    def __init__(self, pair: Pair) -> None:
        self.sides: tuple[list[Step], list[Step]] = [x for x, _ in pair.steps], [y for _, y in pair.steps]
        self.largest: dict[tuple[str, tuple[int, int]], float] = {}

    def equal(self, name: str, groups: tuple[int, int], x: float, y: float) -> bool:
        """Of groups of A and of B, x and y."""
        if x == y:
            return True
        if (name, groups) not in self.largest:
            every = [_track(side, name, group) for side, group in zip(self.sides, groups, strict=True)]
            self.largest[name, groups] = float(np.nanmax(np.abs(every), initial=0.0))
        return abs(x - y) <= SAME * self.largest[name, groups]


def hyperparameters(pair: Pair, i: int, differing: Differing) -> Verdict:
    """Other hyperparameters at a step: what they are in A and in B, and of which parameters."""
    pieces, kinds, look = [], [], []
    for name in dict.fromkeys(key[0] for key in differing):
        each = {key: names for key, names in differing.items() if key[0] == name}
        kind, words = _said(pair, i, name, each)
        pieces.append(words)
        kinds.append(kind)
    if any(kind.endswith("shifted") for kind in kinds):
        look.append("whether the schedule counts from 0 or 1, and whether it moves before or after the step")
    if any(kind.endswith("unit") for kind in kinds):
        look.append(
            "whether the schedule moves once in a step or once in an epoch, and for which its lengths are meant"
        )
    moving = [key for key in differing if any(np.ptp(x[np.isfinite(x)]) > 0 for x in _tracks(pair, key[0], key[3]))]
    if moving and not look:
        look.append("the schedule: how long it warms up and from what, how many steps it has in all, and where it ends")
    every = sorted({name for names in differing.values() for name in names})
    if len(every) < len(pair.names):
        look.append("masks and groups: which parameters decay, or have a learning rate of their own")
    look.append("the arguments of the optimizers, and the defaults of those that are not given")
    return Verdict("parted", "; ".join(pieces), "hyperparameters", i + 1, kinds[0], look=look, parameters=every)


def _said(pair: Pair, i: int, name: str, each: Differing) -> tuple[str, str]:
    """What differs of one hyperparameter, in one or two words and in a sentence."""
    every = [parameter for names in each.values() for parameter in names]
    whose = "" if len(every) == len(pair.names) else f" of {some(every)}"
    courses = {_course(pair, name, key[3]) for key in each}
    if len(courses) == 1:
        kind, words = courses.pop()
        if words:
            return kind, words.format(name=f"{name}{whose}")
    values: dict[tuple[float, float], list[str]] = {}
    for (_, here, there, _), names in each.items():
        values.setdefault((here, there), []).extend(names)
    ratios = {there / here if here else None for here, there in values}
    ratio = next(iter(ratios))
    if len(values) > 1 and ratio is not None and all(r is not None and relative(r, ratio) <= SAME for r in ratios):
        return name, f"{name}{whose} is {ratio:.6g} times as large in B as in A, in every group"
    sentences = [
        f"{name}{'' if len(names) == len(pair.names) else f' of {some(names)}'} is {here:.6g} in A and {there:.6g} in B"
        for (here, there), names in values.items()
    ]
    more = len(sentences) - _MOST
    rest = [f"and {more} more groups differ in {name}"] if more > 0 else []
    return name, "; ".join(sentences[:_MOST] + rest)


def _track(steps: Sequence[Step], name: str, group: int) -> Course:
    """A hyperparameter of a group at every step; NaN where it was not told."""
    return np.array([s.hyper[min(group, len(s.hyper) - 1)].get(name, np.nan) if s.hyper else np.nan for s in steps])


def _tracks(pair: Pair, name: str, groups: tuple[int, int]) -> tuple[Course, ...]:
    """In A and in B."""
    sides = zip(*pair.steps, strict=True)
    return tuple(_track(side, name, group) for side, group in zip(sides, groups, strict=True))


def _near(x: Course, y: Course) -> NDArray[np.bool_]:
    return np.asarray(np.abs(x - y) <= SAME * np.max(np.abs([x, y])))


def _close(x: Course, y: Course) -> bool:
    return bool(_near(x, y).all())


def _course(pair: Pair, name: str, groups: tuple[int, int]) -> tuple[str, str]:
    """How a hyperparameter goes in one run and in the other: a kind, and a sentence that begins with "{name}"."""
    x, y = _tracks(pair, name, groups)
    n = len(x)
    if n > 2 and np.ptp(x) > 0:
        for k in (1, -1, 2, -2):
            one, two = (x[k:], y[:-k]) if k > 0 else (x[:k], y[-k:])
            if len(one) > 1 and _close(one, two) and np.ptp(one) > 0:
                ahead = "A" if k < 0 else "B"
                steps = f"{abs(k)} step{'s' if abs(k) > 1 else ''}"
                return f"{name} shifted", "{name}" + f" of {ahead} is {steps} ahead (off by {abs(k)})"
            m = int(np.argmin(np.append(_near(one, two), False)))
            if m >= _WARMUP and np.all(np.diff(one[:m]) > 0):
                ahead = "A" if k < 0 else "B"
                words = f" of {ahead} is {abs(k)} step{'s' if abs(k) > 1 else ''} ahead for {m + abs(k)} steps"
                return f"{name} shifted", "{name}" + f"{words} (a warmup from another number?)"
    if words := _unit(x, y):
        return f"{name} unit", words
    most = int(np.argmax(np.abs(x)))
    ratio = float(y[most] / x[most]) if x[most] else math.nan
    if np.ptp(x) > 0 and _close(ratio * x, y):
        return f"{name} factor", "{name}" + f" of B is {ratio:.6g} times that of A at every step"
    return name, ""


def _takes(slow: Course, fast: Course, every: int) -> bool:
    """Whether one moves smoothly, and the other is where that one is so many times later."""
    ahead = slow[::every]
    many = len(ahead) >= _OFTEN and len(np.unique(slow)) > len(slow) // 2
    return bool(many and np.ptp(ahead) > 0 and _close(ahead, fast[: len(ahead)]))


def _unit(x: Course, y: Course) -> str:
    """Whether one run's values are the other's, each for several steps; empty if not."""
    for fast, slow, who in ((x, y, "AB"), (y, x, "BA")):
        if np.ptp(slow) == 0 and len(np.unique(fast)) > 2 and _near(fast, slow).any():
            words = f" of {who[1]} stays at {slow[0]:.6g} where that of {who[0]} moves"
            return "{name}" + words + " (a schedule that is missing, or moves per epoch?)"
        for every in range(2, len(slow)):
            places = np.arange(len(slow)) // every
            if np.ptp(fast) == 0 or np.ptp(fast[: places[-1] + 1]) == 0 or not places[-1]:
                break
            if every <= _OFTEN and _takes(slow, fast, every):
                words = f" of {who[0]} moves {every} times where that of {who[1]} moves once"
                return "{name}" + words + " (stepped twice in a step, or half as many steps in all?)"
            if _close(fast[places], slow):
                words = f" of {who[1]} takes {every} steps for what it does in one of {who[0]}"
                return "{name}" + words + " (per epoch and per step?)"
    return ""
