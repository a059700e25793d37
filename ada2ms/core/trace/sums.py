"""Gradients of one run as sums and pieces of what is known: names for causes that leave such gradients.

Sketches are linear. If a run's gradients are those of the other plus a multiple of the values, so are their sketches;
and each of some hundred sums of a model is an equation for two or three unknown factors.
"""

import math
from collections.abc import Mapping
from typing import Final

import numpy as np

from ada2ms.core.trace.pair import Pair
from ada2ms.core.trace.sketch import Array
from ada2ms.core.trace.verdict import Verdict, some

_MOST: Final = 0.999  # the share of a difference that is held to be all of it
_FREE: Final = 8  # entries within a bound, by which a factor is told
_EXACT: Final = 1e-4  # how near to each other norms are that are clipped to one bound; torch adds 1e-6 to each


def mixture(pair: Pair, i: int, bad: Array, near: float, stage: str) -> Verdict | None:
    """Gradients that are those of the other run, plus multiples of values or of the gradients of the step before."""
    for here, there in ((0, 1), (1, 0)):
        terms = {"": pair.sketches("gradient", i)[here], "values": pair.sketches("value", i)[here]}
        if i:
            terms["before"] = pair.sketches("gradient", i - 1)[there]
        for chosen in (["", "values"], ["", "before"], ["before"]):
            if all(name in terms for name in chosen):
                found = _solved([terms[name][bad] for name in chosen], pair.sketches("gradient", i)[there][bad], near)
                if found is not None:
                    return _said(pair, i, bad, near, stage, "AB"[there], dict(zip(chosen, found, strict=True)))
    return None


def _solved(terms: list[Array], whole: Array, near: float) -> list[float] | None:
    """The factors of terms in a sum of them, if that is what it is and no term is nothing beside it."""
    columns = [term[:, 1:].reshape(-1) for term in terms]
    y = whole[:, 1:].reshape(-1)
    norm = float(np.linalg.norm(y))
    if (
        len(y) < 8 * len(columns)
        or not norm > 0
        or not all(math.isfinite(float(np.linalg.norm(x))) for x in (y, *columns))
    ):
        return None
    x = np.stack(columns, 1)
    factors, *_ = np.linalg.lstsq(x, y, rcond=None)
    left = float(np.linalg.norm(y - x @ factors)) / norm
    shares = [abs(float(c)) * float(np.linalg.norm(column)) / norm for c, column in zip(factors, columns, strict=True)]
    if left > near or min(shares) < max(10 * left, near):
        return None
    return [float(c) for c in factors]


def _said(pair: Pair, i: int, bad: Array, near: float, stage: str, who: str, factors: Mapping[str, float]) -> Verdict:
    names = [pair.names[k] for k in np.flatnonzero(bad)]
    whose = "" if len(names) == len(pair.names) else f" of {some(names)}"
    other = "A" if who == "B" else "B"
    first = factors.get("", 0.0)
    pieces = []
    if first:
        pieces.append(f"those of {other}" if abs(first - 1) <= near else f"{first:.6g} times those of {other}")
    if c := factors.get("values", 0.0):
        pieces.append(f"{c:.4g} times the values")
        kind, look = "penalty", ["a penalty on the squares of weights in the loss, or decay that is added to gradients"]
        why = " (a penalty on squares, or weight decay in the gradient)"
    else:
        c = factors["before"]
        of = f"{who}'s own gradients of the step before"
        pieces.append(of if abs(c - 1) <= near else f"{c:.4g} times {of}")
        kind, look = "gradient of before", ["whether gradients are set to zero in every step (zero_grad)"]
        why = " (not set to zero)" if first and abs(c - 1) <= near else ""
    cause = f"the gradients{whose} of {who} are {' plus '.join(pieces)}{why}"
    return Verdict("parted", cause, stage, i + 1, kind, look=look, parameters=names)


def clipped(pair: Pair, i: int, bad: Array, common: Mapping[str, float], stage: str, allowed: float) -> Verdict | None:
    """Gradients that are clipped tensor by tensor, by norm or by value."""
    names = [pair.names[k] for k in np.flatnonzero(bad)]
    norms = [s[bad, 0] for s in pair.sketches("gradient", i)]
    for side, (here, there) in enumerate(((norms[0], norms[1]), (norms[1], norms[0]))):
        who, other = "AB"[side], "BA"[side]
        each = len(common) == len(names) > 1 and bool(np.all(here < there))
        if each and np.ptp(here) < _EXACT * here[0]:
            norm = f"to the norm {here[0]:.4g} each"
            cause = f"the gradients of {some(names)} are clipped {norm} in {who}, not in {other}"
            look = ["clipping of each tensor (clipnorm) where the other clips the whole model, or not at all"]
            return Verdict("parted", cause, stage, i + 1, "clipping of each", look=look, parameters=names)
        scale = _scale(pair, i, bad, side)
        bounds = [_bound(pair, i, k, side, allowed, scale) for k in map(int, np.flatnonzero(bad))]
        if all(b is not None for b in bounds) and np.ptp(np.array(bounds, float)) <= _EXACT * float(bounds[0] or 0):
            cause = f"the gradients of {who} are clipped to {bounds[0]:.4g} entry by entry, those of {other} not"
            look = ["clipping by value (clipvalue, clip_grad_value_) where the other clips by norm, or not at all"]
            return Verdict("parted", cause, stage, i + 1, "clipping by value", look=look, parameters=names)
    return None


def _scale(pair: Pair, i: int, bad: Array, side: int) -> float:
    """By what the other run's gradients are smaller where no bound is seen: such as what it clips by the norm."""
    entries = [x for k, x in enumerate(pair.entries("gradient", i)) if bad[k] and x is not None]
    if not entries:
        return 1.0
    here, there = (np.concatenate([x[s] for x in entries]) for s in (side, 1 - side))
    free = (np.abs(here) < np.abs(here).max(initial=0.0) / 2) & (there != 0)
    return float(np.median(here[free] / there[free])) if np.count_nonzero(free) >= _FREE else 1.0


def _bound(pair: Pair, i: int, k: int, side: int, allowed: float, scale: float) -> float | None:
    """The bound to which a run's gradient is clipped, entry by entry; None if it is not."""
    entries = pair.entries("gradient", i)[k]
    if entries is None:
        return None
    here, there = entries[side], entries[1 - side]
    most = float(np.abs(here).max(initial=0.0))
    wanted = np.clip(scale * there, -most, most)
    error = float(np.linalg.norm(here - wanted))
    return most if most > 0 and error <= allowed * float(np.linalg.norm(wanted)) else None


def tied(pair: Pair, i: int, bad: Array, near: float, stage: str) -> Verdict | None:
    """A gradient that is the sum of two in the other run: of one parameter that is used twice, where there are two."""
    traces, steps = (pair.a, pair.b), pair.steps[i]
    for k in np.flatnonzero(bad):
        name = pair.names[k]
        x, y = (step.full.get("gradient", {}).get(name) for step in steps)
        if x is None or y is None or x.shape != y.shape:
            continue
        for side in (0, 1):
            delta = (y - x) if side == 0 else (x - y)  # what this side lacks
            for p in traces[side].parameters:
                extra = steps[side].full.get("gradient", {}).get(p.name)
                if p.name in pair.names or extra is None or extra.size != delta.size:
                    continue
                for turned in (extra, extra.T):
                    same = turned.shape == delta.shape
                    if same and np.linalg.norm(turned - delta) <= near * max(np.linalg.norm(x), np.linalg.norm(y)):
                        who, other = "AB"[1 - side], "AB"[side]
                        cause = f"the gradient of {name} in {who} is the sum of those of {name} and {p.name} in {other}"
                        look = [f"whether {name} and {p.name} share their weights: they do in {who}, not in {other}"]
                        return Verdict("parted", cause, stage, i + 1, "tied", look=look, parameters=[name, p.name])
    return None


def place(pair: Pair, i: int, k: int) -> str:
    """Where in a tensor a difference is, if it is in a few places along an axis; empty if not."""
    name = pair.names[k]
    x, y = (step.full.get("gradient", {}).get(name) for step in pair.steps[i])
    if x is None or y is None or x.shape != y.shape or x.size < 2:
        return ""
    energy = np.square(y.astype(np.float64) - x)
    for axis in range(x.ndim):
        along = energy.sum(tuple(a for a in range(x.ndim) if a != axis))
        order = np.argsort(-along)
        few = max(1, len(along) // 4)
        if len(along) >= 4 and along.sum() > 0 and along[order[:few]].sum() > _MOST * along.sum():
            needed = int(np.searchsorted(np.cumsum(along[order]), _MOST * along.sum())) + 1
            indices = some([str(j) for j in sorted(order[:needed])])
            return f"in {name} the difference is at {indices} along axis {axis} alone"
    return ""
