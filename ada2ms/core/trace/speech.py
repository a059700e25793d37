"""Which dialect each parameter of a run speaks, and whether two runs speak alike.

Parameters may have rules of their own: groups with another learning rate or decay, masks, optimizers that are divided
among them. What one dialect explains is told from the rest, and of the rest each is asked alone.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

from ada2ms.core.dialects import DEFAULTS, OWN_HYPER, Dialect, claimed
from ada2ms.core.trace.explain import RATE, Fit, decaying, explain_run, fit
from ada2ms.core.trace.model import Trace
from ada2ms.core.trace.near import near
from ada2ms.core.trace.pair import relative
from ada2ms.core.trace.series import Series, series

_FEW = 2  # dialects, such as one with and one without decay, that are believed before one for all is searched
_ENOUGH = 6  # tensors that are searched together for one dialect, and of which none is explained until none is asked


@dataclass
class Voice:
    """Parameters that one dialect explains, or of which none does.

    Attributes:
        fit: of the dialect.
        run: what is recorded of them.
    """

    fit: Fit
    run: list[Series]

    @property
    def names(self) -> list[str]:
        """Of the parameters."""
        return [s.parameter.name for s in self.run]

    @property
    def rates(self) -> list[float]:
        """The learning rate of each step: as recorded, or as the updates show where it was not, or not rightly."""
        found = []
        for i, c in enumerate(self.fit.factors):
            lr = self.run[0].hyper[i].get("lr")
            found.append(c if lr is None else c * lr if self.fit.free else lr)
        return found

    def rule(self) -> Dialect:
        """The dialect with all its hyperparameters, whoever told them; but those that are scheduled."""
        dialect, told = self.fit.dialect, self.run[0].hyper
        changed = {
            name: told[0].get(name, DEFAULTS[name])
            for name in OWN_HYPER[dialect.family]
            if all(now.get(name) == told[0].get(name) for now in told)
        }
        return replace(dialect, changed=tuple(sorted({**changed, **dict(dialect.changed)}.items())))

    def groups(self) -> "list[Voice]":
        """One for each group of hyperparameters that was recorded, which the rule is to have."""
        numbers = dict.fromkeys(s.parameter.group for s in self.run)
        return [self.only([s.parameter.name for s in self.run if s.parameter.group == n]) for n in numbers]

    def only(self, names: Collection[str]) -> "Voice":
        """Of some of its parameters."""
        run = [s for s in self.run if s.parameter.name in names]
        return self if len(run) == len(self.run) else Voice(fit(self.fit.dialect, run, free=self.fit.free), run)

    def is_as(self, other: "Voice") -> bool:
        """Whether other parameters go by the same rule, at the same rates."""
        same = self.fit.fits == other.fit.fits and self.rule() == other.rule() and self.fit.free == other.fit.free
        return same and same_rates(self.rates, other.rates, max(self.fit.noise, other.fit.noise))

    def with_(self, other: "Voice") -> "Voice":
        """Together with other parameters that go by the same rule."""
        run = [*self.run, *other.run]
        dialect = self.fit.dialect if self.fit.dialect == other.fit.dialect else self.rule()
        return Voice(fit(dialect, run, free=self.fit.free), run)


@dataclass
class Speech:
    """All of a run.

    Attributes:
        voices: of different parameters; the one of most entries first, and what nothing explains last.
        steps: how many are recorded.
    """

    voices: list[Voice]
    steps: int

    @property
    def fits(self) -> bool:
        """Whether everything is explained."""
        return all(voice.fit.fits for voice in self.voices)

    @property
    def places(self) -> dict[str, int]:
        """The place of each parameter's voice."""
        return {name: k for k, voice in enumerate(self.voices) for name in voice.names}

    def of(self, name: str) -> Voice:
        """The voice of a parameter."""
        return next(voice for voice in self.voices if name in voice.names)


def speech(trace: Trace, like: Speech | None = None) -> Speech | None:
    """What explains a run: one dialect, or as few as there are groups. None without a record.

    Args:
        trace: of the run.
        like: another run's, whose rules are tried before others, and then those that differ from them in one thing.
    """
    run = series(trace)
    if not run:
        return None
    own = claimed(str(trace.about.get("optimizer", "")), run[0].hyper[0])
    known = [voice for voice in like.voices if voice.fit.fits] if like else []
    rules = [voice.rule() for voice in known]
    firsts = list(dict.fromkeys([*[voice.fit.dialect for voice in known], *rules, own]))
    for dialect in firsts:
        if (found := fit(dialect, run)).fits:
            found = found if dialect in rules else decaying(found, run)
            return Speech([Voice(found, run)], found.steps)
    if voices := _near(run, known):
        return Speech(voices, voices[0].fit.steps)
    voices = _each(run, firsts, own)
    dialects = list(dict.fromkeys(voice.fit.dialect for voice in voices if voice.fit.fits))
    for dialect in dialects:
        if (found := fit(dialect, run)).fits:  # it may show in some tensors alone, as epsilon does
            return Speech([Voice(found, run)], found.steps)
    if all(voice.fit.fits for voice in voices) and 0 < len(dialects) <= _FEW:
        return Speech(voices, voices[0].fit.steps)
    few = sorted(run, key=lambda s: -s.parameter.size)[:_ENOUGH]
    whole = explain_run(few, own)
    whole = whole if len(few) == len(run) else fit(whole.dialect, run, free=whole.free)
    if whole.fits or not any(voice.fit.fits for voice in voices):
        voices = [Voice(whole, run)]
    return Speech(voices, whole.steps)


def _near(run: list[Series], others: list[Voice]) -> list[Voice]:
    """What explains each part of a run for which another run has a voice, near to that; empty if not all is near."""
    there = {s.parameter.name: s for s in run}
    voices: list[Voice] = []
    heard = 0
    for other in (group for voice in others for group in voice.groups()):
        if part := [there[name] for name in other.names if name in there]:
            found = near(other.rule(), part)
            if found is None:
                return []
            voices.append(Voice(found, part))
            heard += len(part)
    return voices if heard == len(run) else []


def _each(run: list[Series], firsts: list[Dialect], own: Dialect) -> list[Voice]:
    """Each tensor alone, by dialects that others speak before all others; then those together that speak alike.

    Empty if nothing explains the largest few.
    """
    heard = [(dialect, False) for dialect in firsts]
    alone: list[Voice] = []
    for s in sorted(run, key=lambda s: -s.parameter.size):
        found = next((f for dialect, free in heard if (f := fit(dialect, [s], free=free)).fits), None)
        if found is None:
            found = explain_run([s], own)
            if found.fits:
                heard.append((found.dialect, found.free))
        alone.append(Voice(found, [s]))
        if len(alone) == _ENOUGH and not any(voice.fit.fits for voice in alone):
            return []  # an optimizer that the catalogue does not have
    joined: list[list[Voice]] = []
    for voice in alone:
        place = next((each for each in joined if _together(each[0], voice)), None)
        if place is None:
            joined.append([voice])
        else:
            place.append(voice)
    voices = []
    for each in joined:
        members = [s for s in run if any(s is voice.run[0] for voice in each)]
        first = each[0].fit
        voices.append(Voice(fit(first.dialect, members, free=first.free), members))
    return sorted(voices, key=lambda v: (not v.fit.fits, -sum(s.parameter.size for s in v.run)))


def _together(one: Voice, other: Voice) -> bool:
    """Whether two tensors are of one voice: they go by one dialect, at one factor."""
    a, b = one.fit, other.fit
    if not (a.fits and b.fits):
        return a.fits == b.fits
    told = "lr" in one.run[0].hyper[0] and "lr" in other.run[0].hyper[0]
    same = a.dialect == b.dialect and a.free == b.free
    return same and ((told and not a.free) or same_rates(a.factors, b.factors, max(a.noise, b.noise)))


def same_rates(a: list[float], b: list[float], noise: float) -> bool:
    """Whether rates, or factors, are equal as exactly as updates show them."""
    return all(relative(x, y) < max(RATE, noise) for x, y in zip(a, b, strict=False))


def alike(a: Voice, b: Voice) -> bool:
    """Whether the rule of one explains the updates of the other, at the same learning rates."""
    for here, there in ((a, b), (b, a)):
        free = "lr" not in there.run[0].hyper[0] or there.fit.free
        found = Voice(fit(here.rule(), there.run, free=free), there.run)
        if found.fit.fits and same_rates(here.rates, found.rates, max(here.fit.noise, found.fit.noise)):
            return True
    return False


def odd_rate(a: Voice, b: Voice) -> int | None:
    """The first step, counted from 0, at which the learning rates that updates show differ; None if none does."""
    noise = max(RATE, a.fit.noise, b.fit.noise)
    pairs = zip(a.rates, b.rates, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if relative(x, y) > noise and math.isfinite(x + y)), None)
