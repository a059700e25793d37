"""Hyperparameters that nobody told, as updates show them: any number, and not only those that people usually take."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final

import numpy as np

from ada2ms.core.dialects import DEFAULTS, OWN_HYPER, Dialect, replay
from ada2ms.core.trace.series import Series

_DIGITS: Final = range(1, 6)  # significant ones, of a number that is proposed
_SEARCHED: Final = {  # the range of eps, and of what is missing to 1 of the others
    "b2": (1e-6, 0.5),
    "b1": (1e-4, 1.0),
    "momentum": (1e-4, 1.0),
    "eps": (1e-14, 0.1),
}
_STEPS: Final = 40  # of a search; each makes the range smaller by the golden section


def decays(dialect: Dialect, run: list[Series], share: float = 0.0) -> Iterator[Dialect]:
    """The dialect with the weight decay that fits best, of few digits first: what it adds is linear in it.

    Args:
        dialect: another decay of which may be meant.
        run: some tensors.
        share: of what is left without decay, in squares, that has to be decay's in every step.
    """
    if dialect.decay not in ("decoupled", "unscaled") or "weight_decay" not in OWN_HYPER[dialect.family]:
        return
    plain = replace(dialect, changed=_with(dialect, "weight_decay", 0.0))
    by_rate = dialect.decay == "decoupled"
    directions = [replay(plain, s.values, s.gradients, s.hyper, s.means[plain.scope]) for s in run]
    found = []
    for i in range(len(run[0].values)):
        told = [s.hyper[i].get("lr") for s in run]
        rates = [1.0 if lr is None else lr for lr in told]
        u = np.concatenate([s.updates[i] for s in run])
        x = np.concatenate([(lr if by_rate else 1.0) * s.values[i] for s, lr in zip(run, rates, strict=True)])
        d = np.concatenate([lr * each[i][0] for each, lr in zip(directions, rates, strict=True)])
        if not np.isfinite([u @ u, d @ d, x @ x]).all() or not x @ x > 0:
            return
        if None in told or share:
            (c, e), *_ = np.linalg.lstsq(np.stack([d, x], 1), u, rcond=None)
            left = u - c * d
            if e * e * (x @ x) < share * (left @ left):
                return
            found.append(-e / (c if by_rate else 1.0) if c > 0 else math.nan)
        else:
            found.append(-((u - d) @ x) / (x @ x))
    if np.isfinite(found).all() and (number := float(np.median(found))) > 0:
        yield from _rounded(dialect, "weight_decay", number)


def searched(dialect: Dialect, run: list[Series], off: Callable[[Dialect], float]) -> Iterator[Dialect]:
    """The dialect with one decay rate, or epsilon, for which it is least off; of few digits first.

    A weight decay that was not told is found with it.
    """
    told = "weight_decay" in run[0].hyper[0]
    for name, (low, high) in _SEARCHED.items():
        if name not in OWN_HYPER[dialect.family]:
            continue
        way: Callable[[float], float] = (lambda x: x) if name == "eps" else (lambda x: 1 - x)

        def changed(x: float, name: str = name, way: Callable[[float], float] = way) -> list[Dialect]:
            one = replace(dialect, changed=_with(dialect, name, way(x)))
            return ([] if told else list(decays(one, run))) or [one]

        def miss(x: float, changed: Callable[[float], list[Dialect]] = changed) -> float:
            return off(changed(math.exp(x))[-1])

        best = math.exp(least(miss, math.log(low), math.log(high)))
        yield from (each for x in _numbers(best) for each in changed(x))


def least(miss: Callable[[float], float], low: float, high: float) -> float:
    """Where a function of one valley is least, by golden sections; first among ten places."""
    places = np.linspace(low, high, 10)
    k = int(np.argmin([miss(float(x)) for x in places]))
    low, high = float(places[max(k - 1, 0)]), float(places[min(k + 1, 9)])
    section = (math.sqrt(5) - 1) / 2
    a, b = high - section * (high - low), low + section * (high - low)
    at_a, at_b = miss(a), miss(b)
    for _ in range(_STEPS):
        if at_a < at_b:
            high, b, at_b = b, a, at_a
            a = high - section * (high - low)
            at_a = miss(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + section * (high - low)
            at_b = miss(b)
    return (low + high) / 2


def _rounded(dialect: Dialect, name: str, number: float) -> Iterator[Dialect]:
    for x in _numbers(number):
        yield replace(dialect, changed=_with(dialect, name, x))


def _numbers(number: float) -> list[float]:
    return list(dict.fromkeys(float(f"{number:.{digits}g}") for digits in _DIGITS))


def _with(dialect: Dialect, name: str, value: float) -> tuple[tuple[str, float], ...]:
    assert name in DEFAULTS
    return (*(pair for pair in dialect.changed if pair[0] != name), (name, value))
