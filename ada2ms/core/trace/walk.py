"""Where two runs part: the first step, and in it the first stage, that differs by more than rounding explains.

Each step is walked in the order in which one thing follows from another: data, values, loss and gradients,
hyperparameters, updates. Each is judged by what it follows from: values of a later step are the values and updates of
the one before, and whether an update is right is asked of the gradient that its optimizer got.
"""

import math
from collections.abc import Callable

import numpy as np

from ada2ms.core.trace import causes, data
from ada2ms.core.trace.explain import Fit, explain, explain_some, fit, series, spoken
from ada2ms.core.trace.model import Trace
from ada2ms.core.trace.pair import GROWTH, REPEAT, Pair, drift, factor, grain, relative
from ada2ms.core.trace.sketch import Array, distance, precision
from ada2ms.core.trace.verdict import Verdict, some

_FLOOR = 4.0  # roundings of the model's whole gradient that one parameter's may differ by, however small it is
_NOT_TOLD = {"decoupled_weight_decay"}  # shows by the updates, and in words
_CHAOS = 0.3  # a difference that rounding reaches by growth alone, and that traces alone do not explain

Progress = Callable[[int, int], None]


class _Walk:
    """One comparison as it goes on."""

    def __init__(self, pair: Pair, repeat: Pair | None) -> None:
        self.pair, self.notes = pair, []  # type: tuple[Pair, list[str]]
        self.course = drift(pair)
        # A repeat that agrees to the last bit says nothing of how rounding grows.
        told = drift(repeat) if repeat is not None and repeat.steps else None
        self.repeat = told if told and max(map(max, (told["gradient"], told["value"]))) > 0 else None
        self.silent_repeat = repeat is not None and self.repeat is None
        self.updates = _Updates(pair)

    def unit(self, i: int) -> float:
        """The yardstick, without and with what sketches lose and do not know."""
        stick = self.pair.yardstick
        return stick.rounding if self.pair.is_exact(i) else 2 * stick.relative

    def allowed(self, what: str, i: int) -> float:
        """How far apart, relatively, rounding may have put the runs by this step."""
        if self.repeat is not None:
            until = [x for kind in (what, "gradient") for x in self.repeat[kind][: i + 1]]
            return max(self.unit(i), REPEAT * max(until))
        before = [x for kind in ("value", "gradient", "loss") for x in self.course[kind][:i]]
        before += [self.course["value"][i]]
        before = [x for x in before if math.isfinite(x)]
        return max(self.unit(i), GROWTH * max(before, default=0.0))

    def step(self, i: int) -> Verdict | None:
        """The first stage of a step that parts, if any."""
        pair = self.pair
        found = data.compare(pair.steps, i, self.notes) or self._values(i) or self._forward(i) or self._hyper(i)
        return found or self.updates.check(i, self)

    def _values(self, i: int) -> Verdict | None:
        pair = self.pair
        x, y = pair.sketches("value", i)
        if np.isnan(x).all() or np.isnan(y).all():
            return None
        if i == 0:
            d, norm, _ = pair.apart("value", 0)
            narrow = max(
                (precision(t.parameters[k].dtype) for t, each in ((pair.a, pair.ia), (pair.b, pair.ib)) for k in each),
                default=0.0,
            )
            bad = d > (2 * narrow + pair.yardstick.sketch) * norm
            if bad.any():
                verdict = causes.start(pair, d, norm, bad)
                verdict.evidence += causes.sizes(pair, "value", 0, bad)
                return verdict
            return None
        changed = [self._changed(i, side) for side in (0, 1)]
        if changed[0].any() == changed[1].any():
            return None
        return causes.between(pair, i, changed)

    def _changed(self, i: int, side: int) -> Array:
        """Which values are not those before the last step and its update."""
        pair = self.pair
        now, before = pair.sketches("value", i)[side], pair.sketches("value", i - 1)[side]
        update = pair.sketches("update", i - 1)[side]
        if np.isnan(update).all():
            return np.zeros(len(now), bool)
        trace, index = ((pair.a, pair.ia), (pair.b, pair.ib))[side]
        narrow = np.array([precision(trace.parameters[k].dtype) for k in index])
        d = distance(now, before + update)
        return d > (4 * narrow + 4 * pair.yardstick.sketch) * np.maximum(now[:, 0], before[:, 0])

    def _forward(self, i: int) -> Verdict | None:
        pair = self.pair
        x, y = pair.steps[i]
        allowed = self.allowed("gradient", i)
        d, norm, whole = pair.apart("gradient", i)
        model = math.sqrt(float(np.sum(np.square(norm))))
        gone_a, gone_b = pair.missing(i)
        floor = _FLOOR * (pair.yardstick.arithmetic + (0 if pair.is_exact(i) else pair.yardstick.sketch / 8)) * model
        bad = (d > allowed * norm + floor) | ~np.isfinite(d) & (x.skipped == y.skipped)
        if i and not whole > allowed:  # single parameters may wander where the model does not
            before = np.max([self._share(j) for j in range(i)], axis=0)
            bad &= d > GROWTH * before * norm + floor
        bad |= gone_a != gone_b
        loss = relative(x.loss, y.loss)
        loss_differs = loss > max(self.allowed("loss", i), _FLOOR * max(grain(x.loss), grain(y.loss)))
        if not (loss_differs or bad.any()):
            return None
        verdict = causes.loss_and_gradient(pair, i, bad, allowed, loss_differs)
        if x.loss is not None and y.loss is not None:
            verdict.evidence.append(f"loss {x.loss:.8g} in A and {y.loss:.8g} in B, {loss:.1e} apart")
        if bad.any():
            verdict.evidence += causes.sizes(pair, "gradient", i, bad)
        verdict.evidence.append(f"rounding explains {allowed:.1e}")
        return verdict

    def _share(self, i: int) -> Array:
        d, norm, _ = self.pair.apart("gradient", i)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.nan_to_num(np.where(norm > 0, d / norm, 0.0), nan=0.0, posinf=0.0)

    def _hyper(self, i: int) -> Verdict | None:
        pair = self.pair
        x, y = pair.steps[i]
        if not x.hyper or not y.hyper:
            return None
        found: dict[str, tuple[float, float]] = {}
        of: dict[str, list[str]] = {}
        for p, q in zip(pair.ia, pair.ib, strict=True):
            here = x.hyper[min(pair.a.parameters[p].group, len(x.hyper) - 1)]
            there = y.hyper[min(pair.b.parameters[q].group, len(y.hyper) - 1)]
            for name in here:
                if name in there and name not in _NOT_TOLD and relative(here[name], there[name]) > 1e-6:
                    found.setdefault(name, (here[name], there[name]))
                    of.setdefault(name, []).append(pair.a.parameters[p].name)
        return causes.hyperparameters(pair, i, found, of) if found else None


class _Updates:
    """The stage of updates: by the catalogue where entries are recorded, else by sketches."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.fits: tuple[Fit | None, Fit | None] | None = None
        self.both = False  # whether one dialect explains both
        self.covered = 0  # by how many steps

    def check(self, i: int, walk: _Walk) -> Verdict | None:
        pair = self.pair
        if i == 0:
            self._explain()
        if self.both and i < self.covered:
            return None
        if i < self.covered and (found := self._unlike(i)):
            return found
        d, norm, whole = pair.apart("update", i)
        if not math.isfinite(whole):
            return None
        x, y = pair.sketches("update", i)
        values = np.maximum(*(v[:, 0] for v in pair.sketches("value", i)))
        grain = max(precision(p.dtype) for p in pair.a.parameters) * math.sqrt(float(np.nansum(np.square(values))))
        size = math.sqrt(float(np.sum(np.square(norm))))
        rounding = 4 * grain / size if size else 0.0
        before = [u for u in walk.course["update"][:i] if math.isfinite(u)]
        # An entry whose gradient is nothing but rounding may go the other way with an adaptive optimizer.
        allowed = max(rounding, 4 * math.sqrt(walk.allowed("gradient", i)), GROWTH * max(before, default=0.0))
        if walk.repeat is not None:
            allowed = max(rounding, 4 * math.sqrt(walk.unit(i)), REPEAT * max(walk.repeat["update"][: i + 1]))
        if whole <= allowed:
            return None
        c, left = factor(x, y)
        names = [pair.names[k] for k in np.flatnonzero(d > allowed * norm)]
        evidence = [*causes.sizes(pair, "update", i, d > allowed * norm), f"rounding explains {allowed:.1e}"]
        if left < 0.3 * abs(c - 1) and c > 0:
            cause = f"from the same gradients the updates of B are {c:.4g} times those of A"
            look = ["the learning rate as the optimizer sees it", "wrappers that scale updates", *self._told()]
            return Verdict("parted", cause, "update", i + 1, "factor", evidence, look=look, parameters=names)
        cause = f"from the same gradients B makes other updates: {some(names)}"
        look = ["the optimizer and what it keeps: its state after a restart, what wraps it", *self._told()]
        return Verdict("parted", cause, "update", i + 1, "other updates", evidence, look=look, parameters=names)

    def _explain(self) -> None:
        pair = self.pair
        a = explain(pair.a)
        b = explain(pair.b, prefer=a.dialect if a is not None and a.fits else None)
        self.fits = a, b
        if a is None or b is None:
            return
        self.covered = min(a.steps, b.steps)
        self.both = a.fits and b.fits and a.dialect == b.dialect and self._same_rates(a, b)
        if a.fits and b.fits and a.dialect != b.dialect:  # what explains B may explain A as well
            again = fit(b.dialect, series(pair.a), free=a.free)
            self.both = again.fits and self._same_rates(again, b)

    def _same_rates(self, a: Fit, b: Fit) -> bool:
        rates = (_rates(f, t) for f, t in ((a, self.pair.a), (b, self.pair.b)))
        return all(relative(x, y) < 1e-4 for x, y in zip(*rates, strict=False))

    def _unlike(self, i: int) -> Verdict | None:
        """By the catalogue: in what the rules of both differ, if it shows in this step."""
        a, b = self.fits or (None, None)
        if a is None or b is None or not (a.fits or b.fits):
            return None
        if a.fits and b.fits:
            if a.dialect != b.dialect:
                return self._dialects(a, b) if i == 0 else None
            rates = [_rates(f, t) for f, t in ((a, self.pair.a), (b, self.pair.b))]
            if relative(rates[0][i], rates[1][i]) < 1e-4:
                return None
            cause = f"the learning rate that updates show is {rates[0][i]:.6g} in A and {rates[1][i]:.6g} in B"
            look = ["the schedule as the optimizer sees it, and wrappers that scale updates"]
            return Verdict("parted", cause, "update", i + 1, "lr", look=look)
        known, side, trace = (a, "B", self.pair.b) if a.fits else (b, "A", self.pair.a)
        odd = fit(known.dialect, series(trace), free=known.free)
        if odd.fits or i != odd.first:
            return None
        names = [p.name for p in trace.parameters if p.name in odd.off]
        evidence = [
            f"the other's updates are those of {spoken(known)}, to {known.deviation:.1e}; {side}'s are up to "
            f"{odd.deviation:.1e} off it, and none of the catalogue's"
        ]
        cause = f"the updates of {some(names)} in {side} do not follow from their gradients as the other's do"
        some_of = len(names) < len(trace.parameters)
        if some_of and (rest := explain_some(trace, names, known.dialect)) is not None:
            told = trace.steps[0].hyper[0] if trace.steps[0].hyper else {}
            differences = known.dialect.differences(rest.dialect, told, told)
            cause = f"{some(names)} go by another rule in {side}: {'; '.join(differences)}"
        look = ["masks and groups: which parameters decay, or have a learning rate of their own"] if some_of else []
        look.append("the optimizer, what it keeps from before, and what wraps it")
        kind = "some updates" if some_of else "other updates"
        return Verdict("parted", cause, "update", i + 1, kind, evidence, look=look, parameters=names)

    def _dialects(self, a: Fit, b: Fit) -> Verdict:
        own = explain(self.pair.b)  # in the words of B's own dialect, unless A's explains it as well
        b = own if own is not None and own.fits else b
        told = [s.hyper[0] if s.hyper else {} for s in self.pair.steps[0]]
        differences = a.dialect.differences(b.dialect, *told)
        kinds = [name for name in vars(a.dialect) if getattr(a.dialect, name) != getattr(b.dialect, name)]
        cause = "the optimizers compute other things: " + "; ".join(differences)
        evidence = [
            f"{side}'s updates are those of {spoken(f)}, to {f.deviation:.1e}" for side, f in (("A", a), ("B", b))
        ]
        other = fit(a.dialect, series(self.pair.b))
        if not math.isclose(other.deviation, b.deviation):
            evidence.append(f"B's differ from what A's rule makes of the same gradients by up to {other.deviation:.1e}")
        look = ["the arguments of the optimizers", "docs of the optimizers: in what their rules differ"]
        return Verdict("parted", cause, "update", 1, kinds[0] if kinds else "dialect", evidence, look=look)

    def _told(self) -> list[str]:
        found = []
        for side, f in zip("AB", self.fits or (None, None), strict=True):
            if f is not None and not f.fits:
                found.append(
                    f"{side}'s updates are none of the catalogue's (nearest: {spoken(f)}, {f.deviation:.1e} off)"
                )
        return found


def _rates(found: Fit, trace: Trace) -> list[float]:
    """The learning rate that updates show in each step: the recorded one, if they agree with it."""
    told = [step.hyper[0].get("lr") if step.hyper else None for step in trace.steps]
    return [c if lr is None else c * lr if found.free else lr for c, lr in zip(found.factors, told, strict=False)]


def diff(
    a: Trace, b: Trace, repeat: Trace | None = None, *, arithmetic: str | None = None, progress: Progress | None = None
) -> Verdict:
    """Where two runs part, and why; or that only rounding is between them.

    Args:
        a: the run to compare with.
        b: the other one.
        repeat: a second run of A, with another number of threads or otherwise other rounding: how far rounding goes.
        arithmetic: the type in which the models compute, if not that of their parameters, such as "bfloat16".
        progress: told of steps done and of all.
    """
    pair = Pair(a, b, arithmetic)
    problems = pair.shape_problems()
    if not pair.names:
        return _unlike(pair, problems)
    if not pair.steps:
        return Verdict(
            "cannot tell", f"there are no steps in {'A' if not a.steps else 'B'}", look=["let it run longer"]
        )
    walk = _Walk(pair, None if repeat is None else Pair(a, repeat, arithmetic))
    for i in range(len(pair.steps)):
        if verdict := walk.step(i):
            return _finished(walk, verdict, problems, i)
        if progress is not None:
            progress(i + 1, len(pair.steps))
    return _finished(walk, _rounding(walk), problems, len(pair.steps))


def _unlike(pair: Pair, problems: list[str]) -> Verdict:
    verdict = Verdict("cannot tell", "the traces share no parameter by name and shape", evidence=problems[:8])
    verdict.look.append("names= and axes= of the recorders: plain_layers(model) has them for plain layers")
    if mapping := pair.mapping():
        verdict.look.append(f"by their norms, these would fit B: names={mapping!r}")
    return verdict


def _finished(walk: _Walk, verdict: Verdict, problems: list[str], i: int) -> Verdict:
    """With what agrees before it, and what was noted on the way."""
    pair, x = walk.pair, walk.course
    if verdict.outcome == "parted":
        if verdict.step > 1:
            verdict.agrees.append(
                f"steps 1 to {verdict.step - 1}: gradients to {max(x['gradient'][:i], default=0):.1e}, values to "
                f"{max(x['value'][:i], default=0):.1e}"
            )
        stages = {"start": 1, "value": 1, "forward": 2, "gradient": 3, "hyperparameters": 4, "update": 5}
        reached = stages.get(verdict.stage, 0)
        told = all(data.flat(s) for s in pair.steps[i])
        names = [
            "the batch" * told,
            "values before",
            "the loss" * (pair.steps[i][0].loss is not None),
            "gradients",
            "hyperparameters, as far as they were told",
        ][:reached]
        if any(names):
            verdict.agrees.append(f"in step {verdict.step}: {', '.join(name for name in names if name)}")
    if problems and verdict.outcome == "parted" and verdict.stage in ("forward", "gradient"):
        verdict.look.append("parameters that only one run has")
    verdict.notes += walk.notes
    if problems:
        verdict.notes.append(f"not compared: {'; '.join(problems[:6])}")
    if not all(data.flat(s) for s in pair.steps[0]):
        verdict.notes.append("batches were not told in both: that the data are the same is not checked")
    lengths = len(pair.a.steps), len(pair.b.steps)
    if lengths[0] != lengths[1]:
        verdict.notes.append(f"A has {lengths[0]} steps and B {lengths[1]}: the first {min(lengths)} were compared")
    if walk.silent_repeat:
        verdict.notes.append("the repeat is equal to A in every bit, and says nothing of rounding")
    return verdict


def _rounding(walk: _Walk) -> Verdict:
    """No stage has parted: what that rests on."""
    pair, x, n = walk.pair, walk.course, len(walk.pair.steps)
    first, last, most = x["gradient"][0], x["gradient"][-1], max(x["gradient"])
    evidence = [
        f"gradients differ by {first:.1e} at step 1 and {last:.1e} at step {n} (at most {most:.1e})",
        f"rounding explains {pair.yardstick}",
    ]
    if walk.repeat is not None:
        evidence.append(
            f"a repeat of A differs by {max(walk.repeat['gradient']):.1e}; allowed are {REPEAT:g} times that"
        )
    else:
        evidence.append(f"from step to step no difference has grown more than {GROWTH:g} times")
    a, _ = walk.updates.fits or (None, None)
    if walk.updates.both and a is not None:
        evidence.append(f"the updates of both, in {walk.updates.covered} steps, are those of {spoken(a)}")
    if walk.repeat is None and most > _CHAOS:
        cause = f"gradients come {most:.1e} apart by step {n}, by growth from rounding or from something as small"
        look = ["--repeat: a second recording of A with other rounding (threads, or one ulp more) says how far it goes"]
        return Verdict("cannot tell", cause, evidence=evidence, look=look)
    cause = f"in {n} steps nothing differs by more than the precision of the arithmetic explains"
    return Verdict("only rounding", cause, evidence=evidence)
