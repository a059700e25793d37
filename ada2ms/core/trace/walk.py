"""Where two runs part: the first step, and in it the first stage, that differs by more than rounding explains.

Each step is walked in the order in which one thing follows from another: data, values, loss and gradients,
hyperparameters, updates. Each is judged by what it follows from: values of a later step are the values and updates of
the one before, and whether an update is right is asked of the gradient that its optimizer got.
"""

import math
from collections.abc import Callable

import numpy as np

from ada2ms.core.trace import causes, data, places, settings, starts
from ada2ms.core.trace.explain import spoken
from ada2ms.core.trace.model import TENSORS, Trace
from ada2ms.core.trace.pair import GROWTH, REPEAT, ROUNDINGS, Pair, drift, grain, relative, whole
from ada2ms.core.trace.resumed import RESUMED
from ada2ms.core.trace.sketch import Array, distance, precision
from ada2ms.core.trace.statistics import Statistics
from ada2ms.core.trace.updates import Updates
from ada2ms.core.trace.verdict import STAGES, Verdict, joined, some

_NOT_TOLD = {"decoupled_weight_decay"}  # shows by the updates, and in words
_FORWARD = {"everything", "some gradients", "precision", "not finite"}  # kinds that other forward passes leave
_CHAOS = 0.3  # a difference that rounding reaches by growth alone, and that traces alone do not explain

Progress = Callable[[int, int], None]


class _Walk:
    """One comparison as it goes on."""

    def __init__(self, pair: Pair, repeat: Pair | None, arithmetic: str | None) -> None:
        self.arithmetic = arithmetic  # as the user says, who then means it
        self.pair, self.notes = pair, []  # type: tuple[Pair, list[str]]
        self.course: dict[str, list[float]] = {what: [] for what in (*TENSORS, "loss")}
        self.most = {what: [0.0] for what in self.course}  # the largest of the finite values before each step
        self.share = np.zeros(len(pair.names))  # of each gradient, the largest relative difference so far
        # A repeat that agrees to the last bit says nothing of how rounding grows.
        told = drift(repeat) if repeat is not None and repeat.steps else None
        self.repeat = told if told and max(map(max, (told["gradient"], told["value"]))) > 0 else None
        self.silent_repeat = repeat is not None and self.repeat is None
        self.told = settings.Told(pair)
        here, there = ([t.parameters[k] for k in each] for t, each in ((pair.a, pair.ia), (pair.b, pair.ib)))
        self.narrow = [np.array([precision(p.dtype) for p in side]) for side in (here, there)]
        self.groups: dict[tuple[int, int], list[str]] = {}  # parameters, by their groups in A and in B
        for p, q in zip(here, there, strict=True):
            self.groups.setdefault((p.group, q.group), []).append(p.name)
        self.updates = Updates(pair)
        self.updates.explain()

    def unit(self, i: int) -> float:
        """The yardstick, without and with what sketches lose and do not know."""
        stick = self.pair.yardstick
        return stick.rounding if self.pair.is_exact(i) else 2 * stick.relative

    def allowed(self, what: str, i: int) -> float:
        """How far apart, relatively, rounding may have put the runs by this step."""
        if self.repeat is not None:
            until = [x for kind in (what, "gradient") for x in self.repeat[kind][: i + 1]]
            return max(self.unit(i), REPEAT * max(until))
        before = [self.most[kind][i] for kind in ("value", "gradient", "loss")] + [self.most["value"][i + 1]]
        return max(self.unit(i), GROWTH * max(before))

    def step(self, i: int) -> Verdict | None:
        """The first stage of a step that parts, if any; of every step in its turn."""
        pair = self.pair
        for what, x in whole(pair, i).items():
            self.course[what].append(x)
            self.most[what].append(max(self.most[what][-1], x if math.isfinite(x) else 0.0))
        found = data.compare(pair.steps, i, self.notes) or self._values(i) or self._forward(i) or self._hyper(i)
        return found or self.updates.check(i, self.allowed_update)

    def allowed_update(self, i: int) -> float:
        """As `allowed`, for updates: an entry whose gradient is nothing but rounding may go the other way.

        Where gradients differ by a share u, so many entries are no larger than what they differ by, and their updates
        differ by 2 units: 2 * sqrt(u) of the update's norm; twice that is allowed.
        """
        if self.repeat is not None:
            return max(4 * math.sqrt(self.unit(i)), REPEAT * max(self.repeat["update"][: i + 1]))
        return max(4 * math.sqrt(self.allowed("gradient", i)), GROWTH * self.most["update"][i])

    def _values(self, i: int) -> Verdict | None:
        pair = self.pair
        x, y = pair.sketches("value", i)
        if np.isnan(x).all() or np.isnan(y).all():
            return None
        if i == 0:
            d, norm, _ = pair.apart("value", 0)
            bad = d > pair.same_values * norm
            if bad.any():
                verdict = starts.start(pair, d, norm, bad)
                verdict.evidence += causes.sizes(pair, "value", 0, bad)
                return verdict
            return None if self.arithmetic else starts.types(pair)
        changed = [self._changed(i, side) for side in (0, 1)]
        if changed[0].any() and changed[1].any():  # the same change in both is none, another one is
            d, norm, _ = pair.apart("value", i)
            apart = d > (self.allowed("value", i - 1) + pair.yardstick.sketch) * norm
            changed = [each & apart for each in changed]
        return causes.between(pair, i, changed) if changed[0].any() or changed[1].any() else None

    def _changed(self, i: int, side: int) -> Array:
        """Which values are not those before the last step and its update."""
        pair = self.pair
        now, before = pair.sketches("value", i)[side], pair.sketches("value", i - 1)[side]
        update = pair.sketches("update", i - 1)[side]
        if np.isnan(update).all():
            return np.zeros(len(now), bool)
        narrow = self.narrow[side]
        d = distance(now, before + update)
        return d > ROUNDINGS * (narrow + pair.yardstick.sketch) * np.maximum(now[:, 0], before[:, 0])

    def _forward(self, i: int) -> Verdict | None:
        pair = self.pair
        x, y = pair.steps[i]
        allowed = self.allowed("gradient", i)
        d, norm, whole = pair.apart("gradient", i)
        odd = ~np.isfinite(d)
        model = math.sqrt(float(np.sum(np.square(norm[~odd]))))
        gone_a, gone_b = pair.missing(i)
        # However small a gradient is, it may differ by some roundings of the model's.
        sketch = 0.0 if pair.is_exact(i) else pair.yardstick.sketch
        floor = (ROUNDINGS * pair.yardstick.arithmetic + sketch) * model
        bad = d > allowed * norm + floor
        if i and not whole > allowed:  # single parameters may wander where the model does not
            bad &= d > GROWTH * self.share * norm + floor
        bad |= (gone_a != gone_b) | odd
        loss = relative(x.loss, y.loss)
        loss_differs = loss > max(self.allowed("loss", i), ROUNDINGS * max(grain(x.loss), grain(y.loss)))
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.nan_to_num(np.where(norm > 0, d / norm, 0.0), nan=0.0, posinf=0.0)
        self.share = np.maximum(self.share, share)
        if not (loss_differs or bad.any()):
            return None
        verdict = joined(causes.loss_and_gradient(pair, i, bad, allowed, loss_differs))
        assert verdict is not None
        if x.loss is not None and y.loss is not None:
            verdict.evidence.append(f"loss {x.loss:.8g} in A and {y.loss:.8g} in B, {loss:.1e} apart")
        if bad.any():
            verdict.evidence += causes.sizes(pair, "gradient", i, bad)
        verdict.evidence.append(f"rounding explains {allowed:.1e}")
        places.place(pair, i, verdict, self.most["value"][i + 1])
        return verdict

    def besides(self, verdict: Verdict, i: int) -> list[str]:
        """What is seen in the same step and does not follow from where the runs part.

        Values before the first step do not follow from data, hyperparameters that were told and missing gradients not
        from what gradients are, and each run's updates are judged by the gradients that it got itself.
        """
        later = STAGES[STAGES.index(verdict.stage) + 1 :]
        found = []
        if i == 0 and "start" in later and (start := self._values(0)):
            found.append(start)
        gone = self.pair.missing(i)
        if "forward" in later and (gone[0] != gone[1]).any():
            found.append(causes.missing(self.pair, i, *gone))
        told = self._hyper(i) if "hyperparameters" in later else None
        found += [told] if told else []
        if "update" in later:
            found += self.updates.beyond(what_was_told=bool(told or verdict.stage == "hyperparameters"))
        return list(dict.fromkeys(f"in the stage {each.stage!r}: {each.cause}" for each in found)) + self._later(
            verdict, {verdict.stage, *(each.stage for each in found)}
        )

    def _later(self, verdict: Verdict, told: set[str]) -> list[str]:
        """What is first seen in later steps and follows from nothing that is computed: data, values that one run alone
        changes besides its optimizer, and hyperparameters that were told."""
        found = []
        looks: dict[str, Callable[[int], Verdict | None]] = {
            "data": lambda i: data.compare(self.pair.steps, i, []),
            "value": self._one_sided,
            "hyperparameters": self._hyper,
        }
        for stage, look in looks.items():
            if stage not in told:
                each = next((v for i in range(verdict.step, len(self.pair.steps)) if (v := look(i))), None)
                found += [f"at step {each.step}, in the stage {stage!r}: {each.cause}"] if each else []
        return found

    def _one_sided(self, i: int) -> Verdict | None:
        changed = [self._changed(i, side) for side in (0, 1)]
        return causes.between(self.pair, i, changed) if changed[0].any() != changed[1].any() else None

    def _hyper(self, i: int) -> Verdict | None:
        pair = self.pair
        x, y = pair.steps[i]
        if not x.hyper or not y.hyper:
            return None
        found: settings.Differing = {}
        for groups, names in self.groups.items():
            here, there = (
                step.hyper[min(group, len(step.hyper) - 1)] for step, group in zip((x, y), groups, strict=True)
            )
            for name in here:
                if name not in there or name in _NOT_TOLD or self.told.equal(name, groups, here[name], there[name]):
                    continue
                agree = [p for p in names if i < self.updates.covered and self.updates.agree_on(name, p)]
                note = f"{name} was told otherwise in A and in B, but their updates show the same"
                self.notes += [note] if agree and note not in self.notes else []
                if len(agree) < len(names):
                    found[name, here[name], there[name], groups] = [p for p in names if p not in agree]
        return settings.hyperparameters(pair, i, found) if found else None


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
        side, empty = ("A", a) if not a.steps else ("B", b)
        look = ["whether the optimizer takes its steps while the recorder is open, within `with`"]
        if empty.about.get("framework") == "jax":
            look.append("whether the optimizer that is stepped is the one that `recorded` returns")
        if not empty.complete:
            look.append("a run that goes on, or was killed: nothing is written before its first flush")
        return Verdict("cannot tell", f"there are no steps in {side}", look=look)
    walk = _Walk(pair, None if repeat is None else Pair(a, repeat, arithmetic), arithmetic)
    for i in range(len(pair.steps)):
        if verdict := walk.step(i):
            return _with_statistics(walk, _finished(walk, verdict, problems, i))
        if progress is not None:
            progress(i + 1, len(pair.steps))
    return _with_statistics(walk, _finished(walk, _rounding(walk), problems, len(pair.steps)))


def _with_statistics(walk: _Walk, verdict: Verdict) -> Verdict:
    """The verdict on statistics, if they part before all else, which does not follow from them; or both."""
    statistics, parted = Statistics(walk.pair.a, walk.pair.b), verdict.outcome == "parted"
    alike = verdict.stage not in ("data", "start", "value") and verdict.kind not in _FORWARD
    until = verdict.step - (not alike) if parted else len(walk.pair.steps)
    found = statistics.verdict(lambda i: walk.allowed("gradient", i), until)
    if found is None and parted and not alike and verdict.stage != "start":
        found = statistics.still(verdict.step)
    first, second = verdict, found
    if found is not None:
        _look_at_checkpoints(walk.pair, found)
    if found is not None and (not parted or _place(found) < _place(verdict)):
        first, second = found, verdict if parted else None
        first.notes += verdict.notes
        if not parted:
            rest = f"all else, in {len(walk.pair.steps)} steps"
            first.agrees += [rest] if verdict.outcome == "only rounding" else [f"{rest}, but that {verdict.cause}"]
    if second is not None:
        at = f"at step {second.step}, " if second.step != first.step else ""
        first.also += [f"{at}in the stage {second.stage!r}: {second.cause}", *second.also]
    first.notes += statistics.notes
    return first


def _place(verdict: Verdict) -> tuple[int, int]:
    return verdict.step, STAGES.index(verdict.stage)


def _unlike(pair: Pair, problems: list[str]) -> Verdict:
    verdict = Verdict("cannot tell", "the traces share no parameter by name and shape", evidence=problems)
    verdict.look.append("names= and axes= of the recorders: plain_layers(model) has them for plain layers")
    if mapping := pair.mapping():
        verdict.look.append(f"by their norms, these would fit B: names={mapping!r}")
    return verdict


def _finished(walk: _Walk, verdict: Verdict, problems: list[str], i: int) -> Verdict:
    """With what agrees before it, and what was noted on the way."""
    pair, x = walk.pair, walk.course
    if verdict.outcome == "parted":
        verdict.also += walk.besides(verdict, i)
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
        _name_the_rest(pair, verdict)
    if verdict.kind in _FORWARD and data.LAYOUT in walk.notes:
        verdict.look.insert(0, "the order of numbers within samples (features, axes), which is another in B")
    verdict.notes += walk.notes
    if problems:
        verdict.notes.append(f"not compared: {some(problems, 6, '; ')}")
    if verdict.kind != "types":
        verdict.notes += [
            f"parameters are {here} in A and {there} in B ({some(names)}): what rounding to the coarser of both loses "
            "is held to be rounding"
            for (here, there), names in pair.types().items()
        ]
    if not all(data.flat(s) for s in pair.steps[0]):
        verdict.notes.append("batches were not told in both: that the data are the same is not checked")
    for who, t in (("A", pair.a), ("B", pair.b)):
        begins = t.about.get(RESUMED, [])
        verdict.notes += [f"{who} goes on from a checkpoint with step {step}" for step in begins]
    _look_at_checkpoints(pair, verdict)
    lengths = len(pair.a.steps), len(pair.b.steps)
    if lengths[0] != lengths[1]:
        verdict.notes.append(f"A has {lengths[0]} steps and B {lengths[1]}: the first {min(lengths)} were compared")
    if walk.silent_repeat:
        verdict.notes.append("the repeat is equal to A in every bit, and says nothing of rounding")
    return verdict


def _look_at_checkpoints(pair: Pair, verdict: Verdict) -> None:
    for who, t in (("A", pair.a), ("B", pair.b)):
        if verdict.step in t.about.get(RESUMED, []):
            look = f"what {who}'s checkpoint has and what is restored from it: it is where {who} goes on"
            verdict.look.insert(0, look)


def _name_the_rest(pair: Pair, verdict: Verdict) -> None:
    """Parameters of one run alone: if the first step agrees, what only one run trains is why the next do not."""
    for who, here, there in (("A", pair.a, pair.b), ("B", pair.b, pair.a)):
        names = [p.name for p in here.parameters if p.name not in there.index]
        if not names:
            continue
        if verdict.step > 1:
            verdict.cause += f"; {some(names)} {'is' if len(names) == 1 else 'are'} in {who}'s optimizer alone"
        other = "B" if who == "A" else "A"
        verdict.look.insert(0, f"{some(names)}: whether {other} has and trains them, perhaps by another name")


def _rounding(walk: _Walk) -> Verdict:
    """No stage has parted: what that rests on."""
    pair = walk.pair
    told = {i + 1: x for i, x in enumerate(walk.course["gradient"]) if not pair.is_lost(i)}
    n, lost = len(told), len(pair.steps) - len(told)
    if lost:
        walk.notes.append(f"in {lost} steps no gradient is finite, neither in A nor in B: of these nothing is compared")
    if not told:
        look = ["overflow, a division by 0, a logarithm of 0; the data, of which each run has the same"]
        return Verdict("cannot tell", "no gradient is finite, neither in A nor in B, in any step", look=look)
    last, most = max(told), max(told.values())
    evidence = [
        f"gradients differ by {told[min(told)]:.1e} at step {min(told)} and {told[last]:.1e} at step {last} (at most "
        f"{most:.1e})",
        f"rounding explains {pair.yardstick}",
    ]
    if walk.repeat is not None:
        evidence.append(
            f"a repeat of A differs by {max(walk.repeat['gradient']):.1e}; allowed are {REPEAT:g} times that"
        )
    else:
        evidence.append(f"from step to step no difference has grown more than {GROWTH:g} times")
    if walk.updates.both and walk.updates.a is not None:
        rules = some(list(dict.fromkeys(spoken(v.fit) for v in walk.updates.a.voices)), between="; of some parameters ")
        evidence.append(f"the updates of both, in {walk.updates.covered} steps, are those of {rules}")
    if walk.repeat is None and most > _CHAOS:
        cause = f"gradients come {most:.1e} apart by step {last}, by growth from rounding or from something as small"
        look = ["--repeat: a second recording of A with other rounding (threads, or one ulp more) says how far it goes"]
        return Verdict("cannot tell", cause, evidence=evidence, look=look)
    cause = f"in {n} steps nothing differs by more than the precision of the arithmetic explains"
    return Verdict("only rounding", cause, evidence=evidence)
