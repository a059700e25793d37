"""Which dialect explains a run: those that differ in one thing from what explains most so far, again and again."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from ada2ms.conformance.identification.fit import Fit, Mode, fit, free_hyper, refine
from ada2ms.conformance.identification.run import Run
from ada2ms.core.dialects import DEFAULTS, OTHERS, OWN, OWN_HYPER, Dialect, Hyper, values_of

_WIDTH: Final = 3  # how many of the best go on
_DEPTH: Final = 4  # in how many things the answer may differ from where the search began
_LATER: Final = ("missing", "rounding", "state")  # what other experiments show

# Where the search begins beside what is told, and hyperparameters that are not as those of Adam there.
_STARTS: Final[tuple[tuple[Dialect, Hyper], ...]] = (
    (Dialect(), {}),
    (Dialect(family="sgd"), {"momentum": 0.9}),
    (Dialect(family="sgd"), {"momentum": 0.0}),
    (Dialect(family="ada2ms"), {"adaptivity": 0.5}),  # the middle of its range, whatever the default
    (Dialect(family="rmsprop", bias="none"), {"b2": 0.99}),
    (Dialect(family="rmsprop", bias="none", eps="inside"), {"b2": 0.9}),
    (Dialect(family="rmsprop", bias="none"), {"b2": 0.99, "momentum": 0.9}),
    (Dialect(family="rmsprop", bias="none", eps="inside"), {"b2": 0.9, "momentum": 0.9}),
    (Dialect(family="adagrad"), {}),
    (Dialect(family="adagrad", eps="inside"), {"initial": 0.1}),
    (Dialect(family="adadelta", eps="inside"), {"b2": 0.9, "eps": 1e-6}),
    (Dialect(family="adamax"), {}),
    (Dialect(family="lion"), {"b2": 0.99}),
)


def search(run: Run, first: Dialect, told: Hyper, tensors: Sequence[int] = (0,)) -> Fit:
    """The dialect, with its hyperparameters, that explains most of a run; the first that explains all of it.

    Args:
        run: of the main experiment.
        first: where to begin.
        told: hyperparameters that the optimizer tells.
        tensors: which are looked at.
    """
    found, near = _search(run, [first], told, tensors, "constant")
    if found.fits or found.nearly:
        return found
    free, _ = _search(run, [first, *near], told, tensors, "free", depth=2)
    return free if free.fits or free.nearly or free.digits < 0.5 * found.digits else found


def _search(
    run: Run, first: list[Dialect], told: Hyper, tensors: Sequence[int], mode: Mode, depth: int = _DEPTH
) -> tuple[Fit, list[Dialect]]:
    """The best, and the dialects of those that come near."""
    pool = _Pool(run, mode, tensors)
    begin = [pool.tried(dialect, told) for dialect in first][:1]
    for start, needed in _STARTS:
        for decay in ("decoupled", "coupled"):
            if not pool.done and (decay == "decoupled" or told.get("weight_decay")):
                pool.tried(replace(start, decay=decay), {**needed, **told})
    for found in pool.beam():
        if not pool.done:
            pool.refined(found)
    for _ in range(depth):
        before, nearly = pool.standing, pool.best.nearly
        for found in [pool.best] if nearly else [*pool.beam(), *begin]:
            for dialect, hyper in neighbours(found.dialect, found.hyper):
                if pool.done:
                    return rounded(pool.best, run, mode, tensors), []
                if mode == "constant" or dialect.update != "trust":  # a factor of its own in each step is as good
                    pool.tried(dialect, hyper)
        for found in pool.beam():
            if not pool.done:
                pool.refined(found)
        if nearly or pool.standing == before:
            break
    return rounded(pool.best, run, mode, tensors), [f.dialect for f in pool.beam()]


class _Pool:
    """What has been tried: as it was told, and with refined hyperparameters."""

    def __init__(self, run: Run, mode: Mode, tensors: Sequence[int]) -> None:
        self._run, self._mode, self._tensors = run, mode, tensors
        self._seen: dict[object, Fit] = {}
        self._refined: set[int] = set()
        self.fits: list[Fit] = []

    def tried(self, dialect: Dialect, hyper: Hyper) -> Fit:
        key = (dialect, tuple(sorted(hyper.items())))
        if key not in self._seen:
            self._seen[key] = fit(dialect, hyper, self._run, self._mode, self._tensors)
            self.fits.append(self._seen[key])
        return self._seen[key]

    def refined(self, found: Fit) -> None:
        if id(found) not in self._refined:
            self._refined.add(id(found))
            self.fits.append(refine(found, self._run, self._mode, self._tensors))

    @property
    def best(self) -> Fit:
        return min(self.fits, key=lambda f: f.digits)

    @property
    def standing(self) -> tuple[float, float]:
        return self.best.digits, min(f.rough for f in self.fits)

    @property
    def done(self) -> bool:
        return any(f.fits for f in self.fits[-1:])

    def beam(self) -> list[Fit]:
        """Those that explain most entries exactly, and those that explain all of them best on average."""
        chosen = _best(self.fits, "digits")[:2] + _best(self.fits, "rough")[:_WIDTH]
        return list({id(f): f for f in chosen}.values())


def _best(fits: list[Fit], measure: str) -> list[Fit]:
    """The best, of each dialect one, and of each family at most two."""
    chosen: list[Fit] = []
    for found in sorted(fits, key=lambda f: float(getattr(f, measure))):
        alike = [f for f in chosen if f.dialect.family == found.dialect.family]
        if len(alike) < 2 and all(f.dialect != found.dialect for f in alike):
            chosen.append(found)
    return chosen


def neighbours(dialect: Dialect, hyper: Hyper) -> Iterator[tuple[Dialect, Hyper]]:
    """Those that differ in one thing, with what it takes to mean something."""
    for name in OWN[dialect.family]:
        if name in _LATER:
            continue
        for value in values_of(dialect.family, name):
            if value == getattr(dialect, name) or (name == "decay" and value in ("after", "unscaled")):
                continue
            other = replace(dialect, **{name: value})
            yield from ((other, {**hyper, **extra}) for extra in _needed(other, name, hyper))
    numbers = dict.fromkeys([*OWN_HYPER[dialect.family], *free_hyper(dialect, hyper)])
    for name in numbers:
        if name == "weight_decay" and dialect.decay != "coupled":
            continue
        now = hyper.get(name, DEFAULTS[name])
        for number in OTHERS[name]:
            if not np.isclose(number, now, rtol=1e-6, atol=0):
                yield dialect, {**hyper, name: number}


def _needed(dialect: Dialect, changed: str, hyper: Hyper) -> Iterator[Hyper]:
    """Hyperparameters without which a feature means nothing."""
    if changed == "clip" and dialect.clip != "none" and "max_norm" not in hyper:
        yield from ({"max_norm": number} for number in OTHERS["max_norm"])
    elif changed == "decay" and dialect.decay == "coupled" and not hyper.get("weight_decay"):
        yield from ({"weight_decay": number} for number in OTHERS["weight_decay"] if number)
    elif dialect.second == "yogi" and "initial" not in hyper:
        yield {"initial": 1e-6}
    else:
        yield {}


def rounded(found: Fit, run: Run, mode: Mode, tensors: Sequence[int]) -> Fit:
    """With round numbers, where these explain no less: all of them together, then one by one."""
    if not (found.fits or found.nearly):
        return found
    names = free_hyper(found.dialect, found.hyper)
    for chosen in (names, *([name] for name in names)):
        for digits in range(1, 7):
            short = {name: _short(name, found.hyper.get(name, DEFAULTS[name]), digits) for name in chosen}
            simpler = fit(found.dialect, {**found.hyper, **short}, run, mode, tensors)
            if simpler.digits <= found.digits + 1e-9:
                found = simpler
                break
    return found


def _short(name: str, value: float, digits: int) -> float:
    """A number of few digits, if there is one near; else the number itself."""
    short = 1 - float(f"{1 - value:.{digits}g}") if name in ("b1", "b2") else float(f"{value:.{digits}g}")
    short = float(f"{short:.10g}")
    return short if abs(short - value) <= 1e-3 * abs(value) else value
