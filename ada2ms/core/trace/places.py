"""Where in the forward pass two runs part: the first output that differs, among those that both have recorded.

What is compared is what happens in the order of A: what a module is given, where that is known, and what it gives.
Rounding grows as it goes through the layers, but not from one to the next by much; so the first is named that is much
farther apart than all before it, and than rounding of its own type.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ada2ms.core.trace import data
from ada2ms.core.trace.outputs import MODEL, Activation, Output, apart
from ada2ms.core.trace.pair import GROWTH, ROUNDINGS, Pair, Yardstick
from ada2ms.core.trace.sketch import precision
from ada2ms.core.trace.verdict import Verdict, some

_MUCH = 1e-3  # of a difference, to which nothing that is computed from it falls
_MANY = 50  # steps of which nobody is asked to keep entries
_NARROW = 2.0**-12  # half an ulp of types that are wider than 16 bits is less
_UNLOCATED = {"everything", "some gradients", "precision", "not finite", "factors"}  # kinds that name no place


@dataclass
class _Seen:
    """What both runs have of something that happens in the forward pass.

    Attributes:
        of: the outputs of A and of B in which it is.
        is_input: whether it is what the module is given, and not what it gives.
        arrays: of A and B.
        apart: relatively; None if they have other sizes.
    """

    of: tuple[Output, Output]
    is_input: bool
    arrays: tuple[Activation, Activation]
    apart: float | None

    @property
    def name(self) -> str:
        return self.of[0].name

    def floor(self, arithmetic: float) -> float:
        """What rounding explains in the arithmetic, or the finer type of both: of 16 bits, to which sums are rounded at
        their end, a few roundings; of wider ones, in which they are summed, more."""
        finer = max(arithmetic, min(precision(x.dtype) for x in self.arrays))
        return (ROUNDINGS if finer > _NARROW else GROWTH) * finer


def place(pair: Pair, i: int, verdict: Verdict, drift: float) -> None:
    """Adds to a verdict on a forward pass, or on gradients, which output is the first that differs.

    Args:
        pair: the traces.
        i: the step.
        verdict: on losses or gradients.
        drift: how far apart values are by this step, relatively.
    """
    x, y = pair.steps[i]
    if not (x.outputs and y.outputs):
        if verdict.kind in _UNLOCATED and i < _MANY:
            verdict.look.append(_asked(pair, i))
        return
    there = {each.name: each for each in y.outputs}
    common = [(each, there[each.name]) for each in x.outputs if each.name in there]
    if not common:
        names = f"A's first is {x.outputs[0].name!r}, B's {y.outputs[0].name!r}"
        verdict.notes.append(f"outputs of the runs have no name in common, and are not compared: {names} (names=)")
        return
    seen = list(_seen(pair, i, common))
    if all(each.apart is None for each in seen if not each.is_input):
        shapes = " and ".join(str(output.arrays[0].shape) for output in common[0] if output.arrays)
        verdict.notes.append(f"outputs have other sizes, that of {common[0][0].name} {shapes}, and are not compared")
        return
    k = _first(seen, pair.yardstick, drift)
    if k is None:
        _agreeing(seen, verdict)
    else:
        _differing(pair, i, seen, k, verdict)


def _asked(pair: Pair, i: int) -> str:
    """What to record, so that there is something to say."""
    full = [trace.about.get("full") for trace in (pair.a, pair.b)]
    kept = "" if all(isinstance(n, int) and i < n for n in full) else f", with full={i + 1}"
    who = [who for who, step in zip("AB", pair.steps[i], strict=True) if not step.outputs]
    return (
        f"record {'both' if len(who) == 2 else who[0]} with outputs=True (torch, Keras) or recorder.output(name, x)"
        f"{kept}: the first output that differs names the place"
    )


def _seen(pair: Pair, i: int, common: list[tuple[Output, Output]]) -> Iterator[_Seen]:
    """What both have, in the order of A: what each module is given, and what it gives.

    Of what is given masks do not count, which elsewhere may be true where these are false.
    """
    same_layout = pair.a.about.get("framework") == pair.b.about.get("framework")
    batches = [data.flat(step) for step in pair.steps[i]]
    same_order = not any(data.alike(x, y) == "order" for x, y in zip(*batches, strict=False))
    for outputs in common:
        for is_input in (True, False):
            for k, arrays in enumerate(zip(*((o.inputs if is_input else o.arrays) for o in outputs), strict=False)):
                if not all(each.is_floating or (is_input and "int" in each.dtype) for each in arrays):
                    continue
                found = apart(*arrays, same_layout=same_layout, same_order=same_order)
                if found is not None or not (is_input or k or outputs[0].name == MODEL):
                    yield _Seen(outputs, is_input, arrays, found)


def _first(seen: list[_Seen], stick: Yardstick, drift: float) -> int | None:
    """The first that differs; of another size only if nothing after it agrees.

    What the longest sums might leave is in doubt: it is named if nothing after it differs by much more.

    Args:
        seen: by the order of A.
        stick: what rounding explains.
        drift: how far apart values are, from which it begins.
    """
    most, sized, doubtful = drift, None, None
    for k, each in enumerate(seen):
        if each.apart is None:
            sized = k if sized is None else sized
            continue
        if each.apart <= max(each.floor(stick.arithmetic), GROWTH * most):
            sized = None
        elif each.apart > stick.rounding:
            return k if sized is None else sized
        elif doubtful is None:
            doubtful = k
        most = max(most, each.apart)
    return sized if doubtful is None else doubtful


def _agreeing(seen: list[_Seen], verdict: Verdict) -> None:
    names = list(dict.fromkeys(each.name for each in seen))
    most = max(each.apart for each in seen if each.apart is not None)
    verdict.agrees.append(f"in step {verdict.step}: the outputs of {some(names, 2)}, to {most:.1e}")
    last = next((name for name in reversed(names) if name != MODEL), names[-1])
    if verdict.kind == "everything" and verdict.stage == "forward":
        whole = MODEL in names
        verdict.cause += "; all outputs agree" + ("" if whole else f", the last is that of {last}")
        verdict.look.insert(0, "the loss itself, which is computed from " + ("them" if whole else f"that of {last}"))


def _differing(pair: Pair, i: int, seen: list[_Seen], k: int, verdict: Verdict) -> None:
    """Says which is the first that differs, and whether it is the module or what lies before it."""
    first, before = seen[k], seen[:k]
    names = list(dict.fromkeys(each.name for each in before if not each.is_input))
    given = [each for each in before if each.is_input and each.of == first.of]
    alone = _only_one_has(pair, i, names[-1] if names else "", first.name)
    if first.is_input:
        cause = f"what {first.name} is given is the first to differ ({_by(first)})"
        cause += f", and the output of {names[-1]}, before it, agrees" if names else ""
        where = [f"what lies between {names[-1]} and {first.name}" if names else f"what comes before {first.name}"]
    else:
        cause = f"the output of {first.name} is the first to differ ({_by(first)})"
        cause += ", what it is given agrees" if given else f"; that of {names[-1]}, before it, agrees" if names else ""
        own = f"{first.name} itself: its arguments, mode and type"
        if names and all(each.composed for each in first.of):
            own = f"what {first.name} computes besides its modules, after {names[-1]}"
        between = f"{first.name}, and what lies between {names[-1]} and it" if names else f"{first.name} and its input"
        where = [own if given else between]
    where += [f"the modules that one run alone has recorded there: {some(alone)}"] if alone else []
    if verdict.kind == "precision" and names and pair.seen[0] == pair.seen[1]:
        # By its size and want of direction it might be fewer bits; but these would show in the outputs before it.
        verdict.evidence.insert(0, verdict.cause)
        verdict.kind = "everything"
        verdict.cause = ("loss and " if verdict.stage == "forward" else "") + "all gradients differ"
    verdict.cause += f": {cause}"
    verdict.place = first.name
    if verdict.kind in _UNLOCATED:
        verdict.stage = "forward"  # whatever showed it, it is there
    verdict.look[:0] = where
    if names:
        most = max((each.apart for each in before if each.apart is not None), default=0.0)
        verdict.agrees.append(f"in step {i + 1}: the outputs of {some(names[::-1], 2)}, to {most:.1e}")
    verdict.evidence += _seen_after(first, seen[k:], pair.yardstick.arithmetic)


def _seen_after(first: _Seen, after: list[_Seen], arithmetic: float) -> list[str]:
    """What the outputs from the first that differs on show."""
    found = []
    modes = [each.training for each in first.of]
    if None not in modes and modes[0] != modes[1]:
        found.append(f"{first.name} is in training mode in {'AB'[bool(modes[1])]} alone")
    apart_ = [(each, each.apart) for each in after if each.apart is not None]
    if sizes := [f"{each.name} {size:.1e}" for each, size in apart_ if not each.is_input]:
        found.append(f"outputs differ from there on: {some(sizes)}")
    much = math.inf if first.apart is None else _MUCH * first.apart
    if again := [each.name for each, size in apart_ if not each.is_input and size <= min(each.floor(arithmetic), much)]:
        what = "another branch, or what is recorded by this name is not the same in both"
        found.append(f"after {first.name} those of {some(list(dict.fromkeys(again)), 2)} agree: {what}")
    return found


def _by(seen: _Seen) -> str:
    """By how much, and in which types, if these differ."""
    x, y = seen.arrays
    size = f"of shape {x.shape} in A and {y.shape} in B" if seen.apart is None else f"by {seen.apart:.1e}"
    size = "not finite in one run alone" if seen.apart is not None and math.isinf(seen.apart) else size
    return size if x.dtype == y.dtype else f"{size}; {x.dtype} in A and {y.dtype} in B"


def _only_one_has(pair: Pair, i: int, after: str, until: str) -> list[str]:
    """What one run alone has recorded between two outputs that both have."""
    found = []
    shared = {each.name for each in pair.steps[i][0].outputs} & {each.name for each in pair.steps[i][1].outputs}
    for who, step in zip("AB", pair.steps[i], strict=True):
        names = [each.name for each in step.outputs]
        begin = names.index(after) + 1 if after in names else 0
        inside = names[begin : names.index(until)]
        found += [f"{name} in {who}" for name in inside if name not in shared]
    return found
