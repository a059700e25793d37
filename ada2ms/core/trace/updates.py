"""The stage of updates: whether each run's follow from its gradients by the same rule.

Where entries are recorded, by the catalogue of dialects, of each parameter; else by how far apart sketches are.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ada2ms.core.dialects import OWN_HYPER, Dialect
from ada2ms.core.trace import causes
from ada2ms.core.trace.explain import Fit, fit, spoken
from ada2ms.core.trace.near import nearest
from ada2ms.core.trace.pair import ROUNDINGS, Pair, factor, relative
from ada2ms.core.trace.resumed import RESUMED
from ada2ms.core.trace.sketch import SUMS, precision
from ada2ms.core.trace.speech import Speech, Voice, alike, odd_rate, same_rates, speech
from ada2ms.core.trace.verdict import Verdict, joined, some

_LOOK = ["the arguments of the optimizers", "docs of the optimizers: in what their rules differ"]
_LOST = "whether the optimizer's state was lost: after a restart, or by making the optimizer anew"
_MASKS = "masks and groups: which parameters decay, or have a learning rate of their own"
_KERAS = (
    "Keras' own optimizers have no other place for epsilon; ada2ms.tf.Ada2MS at adaptivity 1 is AdamW as torch has it"
)
_ALIKE = 1e-4  # relatively, learning rates that are told as one
_DECAY = 0.02  # relatively, by what an Adam's first step may not be lr in each entry, for decay and small gradients
_MOST = 3  # learning rates that are told one by one

_Odd = tuple[Voice, Voice]  # of the same parameters in A and in B, which differ


class Updates:
    """The stage of updates, step by step.

    Attributes:
        pair: the traces.
        a, b: what each speaks; None without a record.
        both: whether they speak alike.
        covered: by how many steps that is known.
    """

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.a: Speech | None = None
        self.b: Speech | None = None
        self.both = False
        self.covered = 0
        self.odd: list[_Odd] = []

    def explain(self) -> None:
        """Finds what each run speaks."""
        self.a = speech(self.pair.a)
        self.b = speech(self.pair.b, self.a)
        if self.a and self.b and self.b.fits and not self.a.fits:
            self.a = speech(self.pair.a, self.b)
        if self.a is None or self.b is None:
            return
        self.covered = min(self.a.steps, self.b.steps)
        groups = [{p.name: p.group for p in t.parameters} for t in (self.pair.a, self.pair.b)]
        places = self.a.places, self.b.places
        shared: dict[tuple[int, int, int, int], list[str]] = {}
        for name in self.pair.names:
            key = places[0][name], places[1][name], groups[0][name], groups[1][name]
            shared.setdefault(key, []).append(name)
        for (i, j, _, _), names in shared.items():
            x, y = self.a.voices[i].only(names), self.b.voices[j].only(names)
            if not (x.fit.fits and y.fit.fits and alike(x, y)):
                self._differ(x, y)
        self.both = not self.odd and self.covered > 0

    def _differ(self, x: Voice, y: Voice) -> None:
        """Notes that parameters differ, together with those that differ in the same."""
        if x.fit.fits and y.fit.fits:
            y = Voice(nearest(y.fit, y.run, x.rule()), y.run)
        for k, (other_x, other_y) in enumerate(self.odd):
            if all(mine.is_as(theirs) for mine, theirs in ((other_x, x), (other_y, y))):
                self.odd[k] = other_x.with_(x), other_y.with_(y)
                return
        self.odd.append((x, y))

    def check(self, i: int, allowed: Callable[[int], float]) -> Verdict | None:
        """What parts the updates of a step, if anything.

        Args:
            i: the step, counted from 0.
            allowed: how far updates may be apart in a step, relatively, by how far gradients and updates were before.
        """
        if self.both and i < self.covered:
            return None
        return joined(self._unlike(self.odd, i)) or self._apart(i, allowed(i))

    def beyond(self, what_was_told: bool) -> list[Verdict]:
        """In what the rules differ in any step that is known.

        Args:
            what_was_told: whether to leave out what hyperparameters that were told explain.
        """
        odd = [(x, y) for x, y in self.odd if not (what_was_told and _is_told(x, y))]
        return [verdict for i in range(self.covered) for verdict in self._unlike(odd, i)]

    def agree_on(self, name: str, parameter: str) -> bool:
        """Whether the updates of a parameter show that a hyperparameter is equal, whatever was told of it."""
        if self.a is None or self.b is None or any(parameter in x.names for x, _ in self.odd):
            return False
        shown = [v for v in (self.a.of(parameter), self.b.of(parameter)) if v.fit.fits]
        changed = any(name in dict(v.fit.dialect.changed) or (name == "lr" and v.fit.free) for v in shown)
        values = [dict(v.rule().changed).get(name) for v in shown]
        return len(shown) == 2 and changed and (name == "lr" or values[0] == values[1])

    def _unlike(self, odd: list[_Odd], i: int) -> list[Verdict]:
        """In what rules differ, if it shows in this step; of parameters that differ in the same together."""
        if i >= self.covered:
            return []
        rates: dict[tuple[float, float], list[_Odd]] = {}
        rules: dict[str, list[_Odd]] = {}
        strange: dict[str, list[tuple[_Odd, Fit]]] = {}
        for x, y in odd:
            if x.fit.fits and y.fit.fits:
                if x.rule() != y.rule():
                    if i == 0:
                        rules.setdefault("; ".join(_differences(x, y)), []).append((x, y))
                elif odd_rate(x, y) == i:
                    seen = x.rates[i], y.rates[i]
                    near = next((k for k in rates if all(map(_near, k, seen))), seen)
                    rates.setdefault(near, []).append((x, y))
            elif x.fit.fits or y.fit.fits:
                known, other, side = (x, y, "B") if x.fit.fits else (y, x, "A")
                off = fit(known.rule(), other.run, free=known.fit.free)
                if not off.fits and i == off.first:
                    strange.setdefault(side, []).append(((x, y), off))
        found = [self._strange(side, each, i) for side, each in strange.items()]
        found += [self._dialects(said, each) for said, each in rules.items()]
        return found + ([self._rates(rates, i)] if rates else [])

    def _whose(self, names: list[str]) -> str:
        return "" if len(names) == len(self.pair.names) else f" of {some(names)}"

    def _rates(self, rates: dict[tuple[float, float], list[_Odd]], i: int) -> Verdict:
        """Other learning rates than those that were told, or where none were."""
        each = {pair: [name for x, _ in odd for name in x.names] for pair, odd in rates.items()}
        names = [name for group in each.values() for name in group]
        whose = self._whose(names)
        sentences = [
            f"the learning rate that updates{self._whose(group)} show is {here:.6g} in A and {there:.6g} in B"
            for (here, there), group in each.items()
        ]
        look = ["the schedule as the optimizer sees it, and wrappers that scale updates"]
        ratios = [there / here if here else math.inf for here, there in each]
        noise = max(max(x.fit.noise, y.fit.noise) for odd in rates.values() for x, y in odd)
        if len(each) > 1 and not whose and same_rates(ratios, ratios[:1] * len(ratios), noise):
            cause = (
                f"the learning rate that updates show is {ratios[0]:.6g} times as large in B as in A, in every group"
            )
            return Verdict("parted", cause, "update", i + 1, "lr", sentences, look=look, parameters=names)
        if len(each) > _MOST:
            sides = [sorted(side) for side in zip(*each, strict=True)]
            a, b = (f"{x[0]:.6g}" if x[0] == x[-1] else f"{x[0]:.6g} to {x[-1]:.6g}" for x in sides)
            cause = f"the learning rate that updates{whose} show is {a} in A and {b} in B, tensor by tensor"
            look += [_MASKS] * bool(whose)
            return Verdict("parted", cause, "update", i + 1, "lr", sentences, look=look, parameters=names)
        look += [_MASKS] * bool(whose)
        return Verdict("parted", "; ".join(sentences), "update", i + 1, "lr", look=look, parameters=names)

    def _strange(self, side: str, each: list[tuple[_Odd, Fit]], i: int) -> Verdict:
        """Updates of one run that no rule of the catalogue explains, where those of the other run are explained."""
        names = [name for (x, _), off in each for name in x.names if name in off.off]
        other = "B" if side == "A" else "A"
        evidence = []
        for (x, y), off in each:
            known = y if side == "A" else x
            evidence.append(
                f"{other}'s updates{self._whose(x.names)} are those of {spoken(known.fit)}, to "
                f"{known.fit.deviation:.1e}; {side}'s are up to {off.deviation:.1e} off it, and none of the catalogue's"
            )
        cause = f"the updates of {some(names)} in {side} do not follow from their gradients as {other}'s do"
        some_of = len(names) < len(self.pair.names)
        look = [*[_MASKS] * some_of, "the optimizer, what it keeps from before, and what wraps it"]
        if i and self._lost(i) == side:
            cause, look = f"the update of {side} is that of an optimizer's first step: {some(names)}", [_LOST]
        if any("lr" not in (x if side == "A" else y).run[0].hyper[0] for (x, y), _ in each):
            look.append(f"hyper= of {side}'s recorder: told the learning rate, by its schedule, more can be found out")
        kind = "some updates" if some_of else "other updates"
        return Verdict("parted", cause, "update", i + 1, kind, evidence, look=look, parameters=names)

    def _dialects(self, said: str, odd: list[_Odd]) -> Verdict:
        """Rules of the catalogue that differ."""
        names = [name for x, _ in odd for name in x.names]
        some_of = len(names) < len(self.pair.names)
        cause = (
            f"{some(names)} go by another rule in B: {said}"
            if some_of
            else f"the optimizers compute other things: {said}"
        )
        evidence = []
        for x, y in odd:
            for side, v in (("A", x), ("B", y)):
                rule = f"those of {spoken(v.fit)}, to {v.fit.deviation:.1e}"
                evidence.append(f"{side}'s updates{self._whose(x.names)} are {rule}")
            other = fit(x.rule(), y.run)
            if not math.isclose(other.deviation, y.fit.deviation):
                evidence.append(
                    f"B's differ from what A's rule makes of the same gradients by up to {other.deviation:.1e}"
                )
        one, two = (voice.fit.dialect for voice in odd[0])
        kinds = [name for name in vars(one) if getattr(one, name) != getattr(two, name)]
        kind = "some updates" if some_of else kinds[0] if kinds else "changed"
        frameworks = {trace.about.get("framework") for trace in (self.pair.a, self.pair.b)}
        keras = "keras" in frameworks and len(frameworks) > 1 and "eps" in kinds
        look = [*[_MASKS] * some_of, *_LOOK, *[_KERAS] * keras]
        return Verdict("parted", cause, "update", 1, kind, evidence, look=look, parameters=names)

    def _apart(self, i: int, allowed: float) -> Verdict | None:
        """By how far the updates are apart, where no catalogue tells."""
        pair = self.pair
        d, norm, whole = pair.apart("update", i)
        if not math.isfinite(whole):
            return None
        x, y = pair.sketches("update", i)
        values = np.maximum(*(v[:, 0] for v in pair.sketches("value", i)))
        grain = max(precision(p.dtype) for p in pair.a.parameters) * math.sqrt(float(np.nansum(np.square(values))))
        size = math.sqrt(float(np.sum(np.square(norm))))
        allowed = max(ROUNDINGS * grain / size if size else 0.0, allowed)
        if whole <= allowed:
            return None
        c, left = factor(x, y)
        names = [pair.names[k] for k in np.flatnonzero(d > allowed * norm)]
        evidence = [*causes.sizes(pair, "update", i, d > allowed * norm), f"rounding explains {allowed:.1e}"]
        is_factor = left < 0.3 * abs(c - 1) and c > 0  # most of what is apart is along A's own update
        is_recount = is_factor and self._is_recount(i, c)
        if not is_recount and (lost := self._lost(i)):
            cause = f"the update of {lost} is that of an optimizer's first step: {some(names)}"
            look = [_LOST]
            return Verdict("parted", cause, "update", i + 1, "other updates", evidence, look=look, parameters=names)
        if is_factor:
            cause = f"from the same gradients the updates of B are {c:.4g} times those of A"
            look = ["the learning rate as the optimizer sees it", "wrappers that scale updates", *self._told()]
            if is_recount:
                cause += ": what moments leave that are kept where the count of steps begins again at 1"
                look = ["the count of steps in the optimizer's state, after a restart"]
            return Verdict("parted", cause, "update", i + 1, "factor", evidence, look=look, parameters=names)
        cause = f"from the same gradients B makes other updates: {some(names)}"
        look = ["the optimizer and what it keeps: its state after a restart, what wraps it", *self._told()]
        return Verdict("parted", cause, "update", i + 1, "other updates", evidence, look=look, parameters=names)

    def _stride(self, i: int, side: int) -> tuple[float, float]:
        """The root mean square of a run's update in units of lr: 1 in Adam's first step; NaN if it is not Adam's.

        And three times its standard error. Where a recorder has only the sketches of values, the square of an update's
        norm is the mean of 8 squares, and its standard error sqrt(2 / 8) of it; of all entries there is none.
        """
        trace, index = ((self.pair.a, self.pair.ia), (self.pair.b, self.pair.ib))[side]
        step = self.pair.steps[i][side]
        moved = whole = error = 0.0
        for k in index:
            p = trace.parameters[k]
            hyper = step.hyper[min(p.group, len(step.hyper) - 1)] if step.hyper else {}
            if "b2" not in hyper or "lr" not in hyper or hyper.get("adaptivity", 1.0) != 1.0:
                return math.nan, 0.0
            if not step.missing[k]:
                entries = step.full.get("update", {}).get(p.name)
                exact = entries is not None and entries.size == p.size
                norm = np.linalg.norm(entries) if entries is not None and exact else step.sketches["update"][k, 0]
                moved += float(norm) ** 2
                whole += hyper["lr"] ** 2 * p.size
                error += 0.0 if exact else (hyper["lr"] ** 2 * p.size) ** 2 * 2 / SUMS
        if not whole > 0:
            return math.nan, 0.0
        return math.sqrt(moved / whole), max(_DECAY, 3 * math.sqrt(error) / whole / 2)

    def _lost(self, i: int) -> str:
        """Which run alone makes an optimizer's first step, though it is none; empty if it is not that."""
        started = [bool(t.about.get("started")) for t in (self.pair.a, self.pair.b)]
        if i == 0 and started[0] != started[1]:
            return "AB"[started.index(False)]
        strides = [self._stride(i, side) for side in (0, 1)]
        first = [abs(x - 1) < error for x, error in strides]
        goes_on = [i + 1 in t.about.get(RESUMED, []) for t in (self.pair.a, self.pair.b)]
        if goes_on[0] != goes_on[1] and strides[side := goes_on.index(True)][1] <= _DECAY:
            return "AB"[side] * first[side]
        if (i == 0 and not all(started)) or first[0] == first[1]:
            return ""
        side = first.index(True)
        return "AB"[side] if strides[side] > strides[1 - side] else ""

    def _is_recount(self, i: int, c: float) -> bool:
        """Whether a factor is that of moments that are kept where the count of steps has begun again at 1."""
        told = self.pair.steps[i][0].hyper[0] if self.pair.steps[i][0].hyper else {}
        b1, b2 = told.get("b1", 1.0), told.get("b2", 1.0)
        if not (0 <= b1 < 1 and 0 < b2 < 1):
            return False
        goes_on = any(t.about.get("started") for t in (self.pair.a, self.pair.b))
        t = math.inf if goes_on else i + 1
        ratio = (1 - b1**t) / (1 - b1) * math.sqrt((1 - b2) / (1 - b2**t))
        return min(abs(r / ratio - 1) for r in (c, 1 / c)) < (0.02 if goes_on else 0.005)

    def _told(self) -> list[str]:
        found = []
        for side, each in zip("AB", (self.a, self.b), strict=True):
            for voice in each.voices if each is not None else ():
                if not voice.fit.fits:
                    f: Fit = voice.fit
                    nearest = f"nearest: {spoken(f)}, {f.deviation:.1e} off"
                    found.append(f"{side}'s updates{self._whose(voice.names)} are none of the catalogue's ({nearest})")
        return found


def _near(x: float, y: float) -> bool:
    return relative(x, y) < _ALIKE


def _differences(x: Voice, y: Voice) -> list[str]:
    """In what two rules differ, in words."""
    told = x.run[0].hyper[0], y.run[0].hyper[0]
    if x.fit.dialect.family != y.fit.dialect.family:  # of which nothing else is the same thing
        return Dialect(family=x.fit.dialect.family).differences(Dialect(family=y.fit.dialect.family))
    return x.fit.dialect.differences(y.fit.dialect, *told) or x.rule().differences(y.rule())


def _is_told(x: Voice, y: Voice) -> bool:
    """Whether hyperparameters that were told may explain all that differs: A's rule with B's explains B's updates."""
    told = [v.run[0].hyper[0] for v in (x, y)]
    odd = {name for name in {*told[0]} & {*told[1]} if told[0][name] != told[1][name]}
    known = {name for name in odd if name in OWN_HYPER[x.fit.dialect.family]}
    if odd - known - {"lr"}:
        return True  # what the catalogue does not know of
    if not x.fit.fits or "lr" not in told[1]:
        return False
    rule = x.rule()
    theirs = {**dict(rule.changed), **{name: told[1][name] for name in known}}
    return fit(replace(rule, changed=tuple(sorted(theirs.items()))), y.run).fits
