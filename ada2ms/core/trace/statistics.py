"""The stage of statistics: running means and variances, and whatever else moves and is no parameter.

They follow from the values, the data and the forward pass of their step, and nothing in training follows from them: so
where they part all else may go on alike, and is compared on. By

    new = m * old + (1 - m) * batch

what moves in two runs over the same batches shows the m of each, whatever the batches held.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np

from ada2ms.core.trace.model import STATISTICS, Step, Trace
from ada2ms.core.trace.numbers import least
from ada2ms.core.trace.pair import Pair
from ada2ms.core.trace.sketch import Array, precision, resolution
from ada2ms.core.trace.verdict import Verdict, some

_FITTED: Final = 64  # steps by which momentum is found
_EXPLAINED: Final = 0.03  # of a difference, what a cause may leave: batches differ by rounding, too
_MOST_BIASED: Final = 2.01  # times the biased variance is the unbiased one of 2 samples
_STILL: Final = resolution("float32")  # of its norm, what a statistic seems to move by where it does not
_LAYERS: Final = (".norm.mean", ".norm.var")  # ends of names by `plain_layers`
_LOOK: Final = {  # for each kind of cause
    "initial statistics": ["whether statistics were restored with the weights: export_state has them as extras"],
    "missing": ["track_running_stats, and whether the layer normalises by the batch in evaluation, too"],
    "frozen": ["evaluation mode, track_running_stats, and new statistics that are not carried to the next step"],
    "momentum": ["momentum: in torch the share of the new (0.1), in Keras and flax that of the old (0.9)"],
    "factor": ["whether a batch's variance is divided by n or by n - 1"],
    "other statistics": [
        "over what means are taken (axes, devices), and momentum, if it changes (torch's None: a mean of all)",
        "forward passes besides those of training, such as an evaluation in training mode",
    ],
}


class _Likeness(NamedTuple):
    """Batches of A as multiples of those of B, if both runs keep the same share of the old.

    Attributes:
        factor: of all.
        left: at each step, of the statistic in A, if each has a factor of its own.
        even: whether it is the same in all.
    """

    factor: float
    left: Array
    even: bool


class Statistics:
    """What two runs have of statistics: before the first step, and after the forward pass of each that was told.

    Attributes:
        pair: the statistics as if they were values of parameters.
        numbers: of the steps that `pair` has; 0 is before the first.
        notes: what differs and does not matter, or could not be compared.
    """

    def __init__(self, a: Trace, b: Trace) -> None:
        self.traces, self.notes = (a, b), []  # type: tuple[Trace, Trace], list[str]
        numbers = [i + 1 for i, each in enumerate(zip(a.steps, b.steps, strict=False)) if all(map(_is_told, each))]
        self.numbers, self._passed = [0, *numbers], np.diff([-1, 0, *numbers])  # steps until each from the one before
        self.pair = pair = Pair(_as_values(a, numbers), _as_values(b, numbers))
        steps = range(len(pair.steps))
        self._rows = np.array([pair.sketches("value", t) for t in steps])  # by step, run and statistic
        found = [pair.apart("value", t) for t in steps]
        self._apart, self._scale = (np.array([x[k] for x in found]) for k in (0, 1))
        norms = self._scale.copy()
        for k, p in enumerate(pair.a.parameters[i] for i in pair.ia):  # a mean may be near 0, where its terms are not
            for twin in self._layer(k):
                if pair.a.parameters[pair.ia[twin]].shape == p.shape and _is_var(p.name) != _is_var(pair.names[twin]):
                    root, other = math.sqrt(p.size), norms[:, twin]
                    more = other**2 / root if _is_var(p.name) else np.sqrt(norms[:, k] ** 2 + root * other)
                    self._scale[:, k] = norms[:, k] + more if _is_var(p.name) else more

    def _layer(self, k: int) -> list[int]:
        """The other statistics of a statistic's layer."""
        return [i for i, x in enumerate(self.pair.names) if i != k and _split(x)[0] == _split(self.pair.names[k])[0]]

    def verdict(self, allowed: Callable[[int], float], until: int) -> Verdict | None:
        """Where statistics part, and why.

        Args:
            allowed: how far apart, relatively, rounding puts them at a step, counted from 0.
            until: the last step whose forward passes are alike, counted from 1.
        """
        known = [who for who, trace in zip("AB", self.traces, strict=True) if trace.statistics is not None]
        if len(known) < 2:
            moving = any(trace.statistics for trace in self.traces)
            self.notes += [f"running statistics were recorded in {known[0]} alone: not compared"] if moving else []
            return None
        if self.numbers == [0] and self.pair.names and any(map(_moving, self.traces)):
            self.notes.append("running statistics were told in no step of both: not compared")
        return self._start() or self._missing() or self._moved(allowed, until)

    def _start(self) -> Verdict | None:
        pair = self.pair
        each = ([precision(t.parameters[k].dtype) for k in ks] for t, ks in ((pair.a, pair.ia), (pair.b, pair.ib)))
        narrow = np.maximum(*map(np.array, each))
        names = [pair.names[k] for k in np.flatnonzero(self._apart[:1] > (2 * narrow + _STILL) * self._scale[:1])]
        cause = f"{len(names)} of {len(pair.names)} statistics start from other values: {some(names)}"
        return _parted("initial statistics", 1, {cause: names}, "start") if names else None

    def _missing(self) -> Verdict | None:
        """Statistics that one run has and moves, and the other has not."""
        for k, trace in enumerate(self.traces):
            other = self.traces[1 - k]
            here, there = ([name for name in _moving(each) if name not in self.pair.names] for each in (trace, other))
            layers = {_split(name)[0] for name in other.index}
            if here and not there and all(x.endswith(_LAYERS) and _split(x)[0] in layers for x in here):
                return _parted("missing", 1, {f"{'BA'[k]} has no running statistics {some(here)}": here})
            self.notes += [f"statistics that only {'AB'[k]} has are not compared: {some(here)}"] if here else []
        return None

    def _moved(self, allowed: Callable[[int], float], until: int) -> Verdict | None:
        until = sum(number <= until for number in self.numbers) - 1
        rounding = [allowed(number - 1) for number in self.numbers[1 : until + 1]]
        bounds = np.array(rounding)[:, None] * self._scale[1 : until + 1]
        bad = (self._apart[1 : until + 1] > bounds) | ~np.isfinite(self._apart[1 : until + 1])
        for k in map(int, np.flatnonzero(bad.any(0))):
            bad[:, k] &= not self._is_unbiased(k, until, bounds[:, k])
        if not bad.any():
            return None
        t = 1 + int(np.argmax(bad.any(1)))
        kinds, causes = [], {}  # type: list[str], dict[str, list[str]]
        for k in map(int, np.flatnonzero(bad[t - 1])):
            kind, cause = self._cause(k, t, until, bounds[:, k])
            kinds.append(kind)
            causes.setdefault(cause, []).append(self.pair.names[k])
        said = {cause.format(some(names)): names for cause, names in causes.items()}
        found = _parted(min(kinds, key=list(_LOOK).index), self.numbers[t], said)
        with np.errstate(invalid="ignore", divide="ignore"):
            shares = np.where(bad[t - 1], self._apart[t] / self._scale[t], 0.0)
        worst, share = int(np.argmax(shares)), float(np.max(shares))
        found.evidence.append(f"{self.pair.names[worst]} parts by {share:.1e}; rounding explains {rounding[t - 1]:.1e}")
        return found

    def still(self, number: int) -> Verdict | None:
        """What moves in a step in one run alone, whether or not the forward passes are alike."""
        if number not in self.numbers or not self.pair.steps:
            return None
        found, t = {}, self.numbers.index(number)  # type: dict[str, list[str]], int
        for who, pattern in (("A", [True, False]), ("B", [False, True])):
            names = [name for k, name in enumerate(self.pair.names) if self._stays(k, t) == pattern]
            found |= {f"{some(names)} do not move in {who}": names} if names else {}
        return _parted("frozen", number, found) if found else None

    def _stays(self, k: int, t: int) -> list[bool]:
        with np.errstate(invalid="ignore"):
            moved = np.abs(self._rows[t, :, k] - self._rows[t - 1, :, k]).max(-1)
        return [bool(x) for x in moved <= _STILL * self._rows[t, :, k, 0]]

    def _cause(self, k: int, t: int, until: int, bounds: Array) -> tuple[str, str]:
        """Why a statistic parts at a step: a kind, and a sentence with {} for names."""
        stays, finite = self._stays(k, t), [bool(x) for x in np.isfinite(self._rows[t, :, k, 0])]
        if finite[0] != finite[1]:
            return "other statistics", "{} are not finite in " + "AB"[finite[0]]
        if stays[0] != stays[1]:
            return "frozen", "{} do not move in " + "AB"[stays[1]]
        for _, keeps, ratio in sorted(fit for i in (k, *self._layer(k)) for fit in self._momenta(i, t, until)):
            x, y = self._batches(k, keeps, range(t, until + 1 if keeps[0] < 1 else t + 1))
            a, b = (f"{1 - float(f'{1 - m:.2g}'):g}" for m in keeps)
            if np.linalg.norm(x - _factors(x, y) * y) <= _EXPLAINED * np.linalg.norm(x) and (a != b or keeps[0] == 1):
                kept = "{} keep " + f"{a} of the old at each step in A and {b} in B"
                return "momentum", kept if keeps[0] < 1 else "{} move " + f"{ratio:.3g} times as far in B as in A"
        like = self._likeness(k, until)
        if _is_var(self.pair.names[k]) and like.even and np.all(like.left <= bounds):
            return "factor", "{} are those of batches " + f"{1 / like.factor:.4g} times as large in B as in A"
        return "other statistics", "{} differ, and the forward passes do not"

    def _momenta(self, k: int, t: int, until: int) -> Iterator[tuple[float, tuple[float, float], float]]:
        """Which share of the old each run keeps, from batches that are alike, or alike but for a factor.

        Yields:
            What is left; the shares of the old, ones where a single step does not show them; and how many times as far
            B moves as A.
        """
        steps = np.arange(t, min(until, t + _FITTED) + 1)
        steps = steps[self._passed[steps] == 1]  # since of several batches each run keeps other shares
        (a, b), (to_a, to_b) = (self._rows[at, :, k, 1:].swapaxes(0, 1).reshape(2, -1) for at in (steps - 1, steps))
        if t not in steps or not np.isfinite([a, b, to_a, to_b]).all():
            return
        matrix = np.stack([to_b, b, a], 1)
        (c, of_b, of_a), *_ = np.linalg.lstsq(matrix, to_a, rcond=None)
        left, most = np.linalg.norm(to_a - matrix @ [c, of_b, of_a]), _EXPLAINED * np.linalg.norm(to_a - to_b)
        keeps = (float(of_a), float(-of_b / c))
        if left <= most and all(-_EXPLAINED < m < 1 for m in keeps):
            yield float(left), keeps, math.nan
        x, y = self._batches(k, (1.0, 1.0), range(t, t + 1))
        factor = _factors(y, x)
        if np.linalg.norm(y - factor * x) <= _EXPLAINED * np.linalg.norm(y - x):
            yield math.inf, (1.0, 1.0), float(factor[0, 0])

    def _batches(self, k: int, keeps: tuple[float, float], steps: range) -> Array:
        """In A and in B, what comes to the old at each step: (2, steps, SUMS)."""
        rows = self._rows[steps.start - 1 : steps.stop, :, k, 1:].swapaxes(0, 1)
        kept = np.power(np.array(keeps)[:, None], self._passed[steps.start : steps.stop])
        return np.asarray(rows[:, 1:] - kept[:, :, None] * rows[:, :-1])

    def _likeness(self, k: int, until: int) -> _Likeness:
        def left(x: float, last: int = min(until, _FITTED)) -> Array:
            a, b = self._batches(k, (1 - math.exp(x),) * 2, range(1, last + 1))
            return np.asarray(np.sqrt(np.mean(np.square(a - _factors(a, b) * b), axis=1)))

        best = least(lambda x: float(np.linalg.norm(left(x))), math.log(1e-4), 0.0)
        a, b = self._batches(k, (1 - math.exp(best),) * 2, range(1, until + 1))
        factor = float(_factors(a.reshape(1, -1), b.reshape(1, -1))[0, 0])
        even = bool(np.ptp(_factors(a, b)) <= _EXPLAINED * abs(factor))
        return _Likeness(factor, left(best, until), even)

    def _is_unbiased(self, k: int, until: int, bounds: Array) -> bool:
        """Whether torch's variances are the unbiased ones of those that another framework keeps."""
        kinds = [trace.about.get("framework") == "torch" for trace in self.traces]
        if kinds[0] == kinds[1] or not _is_var(self.pair.names[k]):
            return False
        like = self._likeness(k, until)
        factor = like.factor if kinds[0] else 1 / like.factor
        if not (1 < factor < _MOST_BIASED and bool(np.all(like.left <= bounds))):
            return False
        n, who = factor / (factor - 1), "BA"[kinds[1]]
        end = "flax and Keras keep a batch's biased variance, torch n/(n-1) of it, which no port changes"
        if not any(end in note for note in self.notes):
            name = self.pair.names[k]
            self.notes.append(f"running variances of {who} are (n-1)/n of the other's, n {n:.4g} of {name}: {end}")
        return True


def _is_told(step: Step) -> bool:
    return STATISTICS in step.sketches


def _as_values(trace: Trace, numbers: list[int]) -> Trace:
    """The statistics of a trace at these steps as the values of a trace of their own."""
    found, steps = trace.statistics or [], []
    for step in [] if trace.start is None else [trace.start, *[trace.steps[number - 1] for number in numbers]]:
        entries = {"value": step.full[STATISTICS]} if STATISTICS in step.full else {}
        steps.append(Step(step.number, {"value": step.sketches[STATISTICS]}, np.zeros(len(found), bool), full=entries))
    return Trace(trace.path, trace.about, found, steps, trace.complete)


def _moving(trace: Trace) -> list[str]:
    """The names of statistics that move."""
    rows = [step.sketches[STATISTICS] for step in trace.steps if _is_told(step)]
    moves = [any(np.abs(y - x).max() > _STILL * y[0] for x, y in pairwise(each)) for each in zip(*rows, strict=True)]
    return [p.name for p, each in zip(trace.statistics or [], moves, strict=False) if each]


def _split(name: str) -> tuple[str, str]:
    """A layer, and what a statistic is called in it."""
    layer, _, last = name.replace("/", ".").rpartition(".")
    return layer, last


def _is_var(name: str) -> bool:
    return "var" in _split(name)[1]


def _factors(x: Array, y: Array) -> Array:
    """By which each row of y is nearest to that of x: (rows, 1)."""
    return np.asarray((x * y).sum(1, keepdims=True) / np.maximum((y * y).sum(1, keepdims=True), 1e-300))


def _parted(kind: str, step: int, causes: Mapping[str, list[str]], stage: str = "statistics") -> Verdict:
    names = [name for each in causes.values() for name in each]
    return Verdict("parted", "; ".join(causes), stage, step, kind, look=list(_LOOK[kind]), parameters=names)
