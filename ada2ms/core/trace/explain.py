"""Which dialect a run speaks: the update of each recorded step, against what each dialect would have done."""

import math
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from ada2ms.core.dialects import DEFAULTS, FAMILIES, KNOWN, OWN_HYPER, Dialect, claimed, replay, said, variants
from ada2ms.core.trace.model import Trace
from ada2ms.core.trace.numbers import decays, searched
from ada2ms.core.trace.pair import ROUNDINGS
from ada2ms.core.trace.series import Series, series
from ada2ms.core.trace.sketch import precision

RATE: Final = 1e-5  # relatively, by what learning rates that updates show may differ, if rounding allows that much
_SHARE: Final = 0.2  # of what is left, that a decay has to explain; by chance it is one share in their number
_LEAST: Final = 64  # of which this is asked; fewer have such a share by chance


@dataclass
class Fit:
    """How well a dialect explains a run.

    Attributes:
        dialect: which.
        excess: the largest deviation of an update, in units of what rounding explains.
        deviation: the largest deviation of an update, relative to its norm.
        factor: by what the updates are to be multiplied to fit best, at the learning rate that was recorded; the
            learning rate itself where none was.
        factors: of each step.
        steps: how many there are to compare.
        off: of parameters that it does not explain, by how much; and at which step first, counted from 0.
        free: whether the fit is that of these factors, and not of the learning rates that were recorded.
        noise: how exactly factors can be told, relatively.
    """

    dialect: Dialect
    excess: float
    deviation: float
    factor: float
    factors: list[float]
    steps: int
    free: bool = False
    off: dict[str, float] = field(default_factory=dict)
    first: int = 0
    noise: float = 0.0

    @property
    def fits(self) -> bool:
        """Whether rounding explains what is left."""
        return self.excess <= 1.0


def fit(dialect: Dialect, run: list[Series], *, free: bool = False) -> Fit:
    """How well a dialect explains a run.

    Args:
        dialect: which.
        run: of `series`, not empty.
        free: whether each step's learning rate may be another than the recorded one.
    """
    steps = len(run[0].values)
    directions = [replay(dialect, s.values, s.gradients, s.hyper, s.means[dialect.scope]) for s in run]
    excess = deviation = noise = 0.0
    factors: list[float] = []
    off: dict[str, float] = {}
    first = steps
    for i in range(steps):
        told = [s.hyper[i].get("lr") for s in run]
        known = all(lr is not None for lr in told)
        rates = [1.0 if lr is None else lr for lr in told]
        pairs = [(s.updates[i] - d[i][1], lr * d[i][0]) for s, d, lr in zip(run, directions, rates, strict=True)]
        tolerances = [_tolerance(s, i) for s in run]
        weights = [t**-2 if t > 0 else 0.0 for t in tolerances]  # what rounding leaves of small updates says little
        squares = sum(w * float(p @ p) for w, (_, p) in zip(weights, pairs, strict=True))
        c = sum(w * float(u @ p) for w, (u, p) in zip(weights, pairs, strict=True)) / squares if squares > 0 else 1.0
        factors.append(c)
        slack = _correction(dialect, run[0], i)
        used = c if free or not known else float(np.clip(c, 1 - slack, 1 + slack))
        noise = max(noise, _noise(run, i) + slack)
        for s, (u, p), tolerance in zip(run, pairs, tolerances, strict=True):
            left, norm = float(np.linalg.norm(u - used * p)), float(np.linalg.norm(s.updates[i]))
            if not math.isfinite(left):
                return Fit(dialect, math.inf, math.inf, c, factors, steps, free, {s.parameter.name: math.inf}, i)
            if left > 0:
                here = left / tolerance if tolerance else math.inf
                excess, deviation = max(excess, here), max(deviation, left / norm if norm else math.inf)
                if here > 1:
                    off[s.parameter.name] = max(off.get(s.parameter.name, 0.0), here)
                    first = min(first, i)
    return Fit(dialect, excess, deviation, float(np.median(factors)), factors, steps, free, off, first, noise)


def _tolerance(series: Series, i: int) -> float:
    """What rounding explains of a tensor's update in step i: by its own digits, and by those of the values."""
    own = precision(series.parameter.dtype)
    moments = max(own, 2.0**-24 if series.parameter.dtype != "float64" else 0.0)
    norms = [float(np.linalg.norm(each[i])) for each in (series.values, series.updates)]
    return ROUNDINGS * (own * norms[0] + 8 * moments * norms[1])


def _correction(dialect: Dialect, series: Series, i: int) -> float:
    """By what factor the bias correction of a framework that computes it in float32 may be off, in step i."""
    if not series.narrow or dialect.family == "sgd":
        return 0.0
    t = i + 1
    h = {**DEFAULTS, **series.hyper[i], **dict(dialect.changed)}
    return sum(
        power * (t + 2) * 2.0**-25 / max(1 - b**t, 2.0**-24) for b, power in ((h["b1"], 1.0), (h["b2"], 0.5)) if b < 1
    )


def _noise(run: list[Series], i: int) -> float:
    """How exactly a factor of all updates can be told: what rounding values to their type leaves has no direction."""
    rounded = sum((precision(s.parameter.dtype) * float(np.linalg.norm(s.values[i]))) ** 2 for s in run)
    moved = sum(float(np.sum(np.square(s.updates[i]))) for s in run)
    entries = sum(s.updates[i].size for s in run)
    return ROUNDINGS * math.sqrt(rounded / moved / max(entries, 1)) if moved else math.inf


def explain(trace: Trace, *, prefer: Dialect | None = None) -> Fit | None:
    """The simplest dialect that explains a run; the one that comes nearest if none does; None without a record.

    First the one that the optimizer is said to speak, then with another weight decay, then those that differ from it in
    one thing, and whether a factor of the learning rate is the matter, then the optimizers of other families, any decay
    rates and epsilons, and at last those that differ in two things.

    Args:
        trace: of the run.
        prefer: a dialect to try first, if the optimizer's own is not to be.
    """
    run = series(trace)
    return explain_run(run, prefer or claimed(str(trace.about.get("optimizer", "")), run[0].hyper[0])) if run else None


def explain_run(run: list[Series], first: Dialect) -> Fit:
    """As `explain`, of what is recorded of some tensors; `first` is the dialect to try first."""
    return _steadier(_explained(run, first), run)


def _explained(run: list[Series], first: Dialect) -> Fit:
    hyper = run[0].hyper[0]
    found = fit(first, run)
    if found.fits:
        return decaying(found, run)
    tried = [found]
    for dialect in decays(first, run):
        tried.append(fit(dialect, run))
        if tried[-1].fits:
            return tried[-1]
    other = "sgd" if first.family == "adam" else "adam"
    families = [first, Dialect(family=other, decay=first.decay)]
    for free in (False, True):
        for start in families:
            for dialect in [start, *variants(start, hyper)]:
                tried.append(fit(dialect, run, free=free))
                if tried[-1].fits and not (free and _wild(tried[-1])):
                    return tried[-1]
    for dialect in dict.fromkeys(known for known in KNOWN.values() if known.family not in (first.family, other)):
        tried.append(fit(dialect, run))
        if tried[-1].fits:
            return tried[-1]
    for dialect in searched(first, run, lambda dialect: fit(dialect, run).deviation):
        tried.append(fit(dialect, run))
        if tried[-1].fits:
            return tried[-1]
    near = sorted(tried, key=lambda f: f.excess)[:6]
    for before in near:
        for dialect in variants(before.dialect, hyper):
            tried.append(fit(dialect, run))
            if tried[-1].fits:
                return tried[-1]
    return min(tried, key=lambda f: f.excess)


def decaying(found: Fit, run: list[Series]) -> Fit:
    """A fit, or one with the weight decay that nobody told and that shows, though rounding might explain as much."""
    unasked = "weight_decay" in run[0].hyper[0] or sum(s.values[0].size for s in run) < _LEAST
    small = [] if unasked else decays(found.dialect, run, _SHARE)
    return next((each for dialect in small if (each := fit(dialect, run)).fits), found)


def _steadier(found: Fit, run: list[Series]) -> Fit:
    """A fit; of RAdam, whose first steps are those of SGD but for a factor of each, that of SGD at one rate."""
    d, rate = found.dialect, found.factor
    if d.second != "rectified" or float(np.ptp(found.factors)) <= max(RATE, found.noise) * abs(rate):
        return found
    momentum = dict(d.changed).get("b1", run[0].hyper[0].get("b1", DEFAULTS["b1"]))
    changed = *(pair for pair in d.changed if pair[0] == "weight_decay"), ("momentum", momentum)
    # What decays at a rate that grows as momentum does is decay in the gradient.
    others = [Dialect("sgd", decay=decay, nesterov=d.nesterov, changed=changed) for decay in (d.decay, "coupled")]
    return next((each for dialect in others if (each := fit(dialect, run)).fits), found)


def _wild(found: Fit) -> bool:
    """Whether factors are of no common sense: each step another, or none at all."""
    return not all(c > 0 for c in found.factors)


def spoken(found: Fit) -> str:
    """A dialect in words."""
    d = found.dialect
    words = [FAMILIES[d.family]]
    if d.family in ("adam", "rmsprop"):
        words.append(f"epsilon {said('eps', d.eps)}")
    words.append(
        {
            "decoupled": "decoupled weight decay",
            "after": "weight decay after the update",
            "coupled": "weight decay in the gradient",
            "unscaled": "weight decay not times lr",
        }[d.decay]
    )
    if d.bias != "both" and d.family != "sgd":
        words.append(
            {
                "none": "no bias correction",
                "first": "bias correction of the first moment only",
                "second": "bias correction of the second moment only",
            }[d.bias]
        )
    words += ["Nesterov"] * bool(d.nesterov) + [f"count {d.late:+d}"] * bool(d.late) + ["uphill"] * (d.sign < 0)
    words += [f"moments in {d.state}"] * (d.state != "float32")
    words += [f"{name} {value:g}" for name, value in d.changed if name in OWN_HYPER[d.family]]
    return ", ".join(words)
