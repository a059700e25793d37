"""The stage of data: whether batches are the same, and if not, in what they differ."""

import math
from collections.abc import Sequence
from typing import Final, Literal

import numpy as np

from ada2ms.core.trace.model import Step
from ada2ms.core.trace.sketch import SUMS, sketch
from ada2ms.core.trace.verdict import Verdict

Print = Sequence[float]
Likeness = Literal["equal", "coded", "rounded", "layout", "order", "scaled", "other"]
_NARROW: Final = 2.0**-8  # of bfloat16
LAYOUT: Final = "batches hold the same samples, each in another layout (such as channels last)"
_SAME: Final = ("equal", "rounded", "layout", "order")
_SOLVED: Final = 4 * SUMS  # numbers of which as many sums tell two unknown ones
_CLOSE: Final = 1e-4  # fingerprints of float32 data, of whichever preprocessing


def compare(steps: Sequence[tuple[Step, Step]], i: int, notes: list[str]) -> Verdict | None:
    """What parts the batches of a step, if anything; what differs and does not matter is noted."""
    a, b = (flat(step) for step in steps[i])
    if not a or not b:
        return None
    if len(steps[i][0].batches) != len(steps[i][1].batches):
        return _counts(steps, i, notes)
    if len(a) != len(b):
        few, many = sorted((a, b), key=len)
        places = [next((k for k, y in enumerate(many) if alike(x, y) in _SAME), None) for x in few]
        weights = len(many) == 3 and places == [0, 1] and many[2][0] == many[2][1]
        if None in places or len(set(places)) < len(places) or weights:
            look = ["what is given to batch()", "in `fit` of Keras the third array has weights of samples or classes"]
            return _verdict(i, "arrays", f"A was told {len(a)} arrays and B {len(b)}", look)
        sentence = f"A was told {len(a)} arrays of a batch and B {len(b)}: those of both are the same"
        notes += [sentence] if sentence not in notes else []
        return None
    kinds = [alike(x, y) for x, y in zip(a, b, strict=True)]
    if all(kind == "equal" for kind in kinds):
        return None
    if "coded" in kinds:
        sentence = "labels are numbers of classes in one run and one-hot in the other: they are not compared"
        notes += [sentence] if sentence not in notes else []
        kinds = ["equal" if kind == "coded" else kind for kind in kinds]
    if "other" not in kinds and "scaled" not in kinds:
        if (
            "order" in kinds
            and len(a) > 1
            and any(kind in ("equal", "rounded", "layout") and x[1] > 1 for kind, x in zip(kinds, a, strict=True))
        ):
            odd = [k + 1 for k, kind in enumerate(kinds) if kind == "order"]
            return _verdict(
                i,
                "pairing",
                f"array {odd[0]} of the batch is in another order, the others are not",
                ["whether inputs and labels are shuffled together"],
            )
        _note(notes, kinds)
        return None
    return _elsewhere(steps, i, a, b, kinds)


def flat(step: Step) -> list[Print]:
    """The arrays of all batches of a step."""
    return [x for batch in step.batches for x in batch]


def alike(x: Print, y: Print) -> Likeness:
    """What two arrays have in common."""
    known = not (math.isnan(x[4]) or math.isnan(y[4]))
    size, samples = x[0] == y[0], x[1] == y[1]
    scale = math.sqrt(max(x[3], y[3], 0.0))
    content = size and _near(x[3], y[3], x[3]) and _near(x[2], y[2], scale * math.sqrt(max(x[0], 1)))
    if content:
        if not known or not samples:
            return "order" if known else "equal"
        by_sample = [4 + k for k in range(2 * SUMS)]
        whole = [5 + 2 * SUMS + k for k in range(SUMS)]
        if all(_near(x[k], y[k], scale) for k in whole):
            return "equal"
        per_sum = scale * math.sqrt(max(x[0], 1))
        same = all(_near(x[k], y[k], per_sum if k < 4 + SUMS else x[3]) for k in by_sample)
        if not same:
            return "order"
        return "layout" if _apart(x, y) >= _NARROW * scale else "rounded"
    if size != samples and known and any(_is_one_hot(p) and p[1] == q[0] for p, q in ((x, y), (y, x))):
        return "coded"
    if size and samples and known and _apart(x, y) < _NARROW * scale:
        return "rounded"
    ratio = math.sqrt(y[3] / x[3]) if size and x[3] > 0 and y[3] > 0 else 0.0
    whole = [5 + 2 * SUMS + k for k in range(SUMS)]
    if ratio and known and all(_near(x[k] * ratio, y[k], scale) for k in whole):
        return "scaled"
    if ratio and known and samples and _is_scaled_by_sample(x, y, ratio):
        return "scaled"
    return "other"


def _is_scaled_by_sample(x: Print, y: Print, ratio: float) -> bool:
    """Whether every sample is multiplied by one number, in whatever layout."""
    norm = math.sqrt(y[3] * max(y[0], 1))
    sums = all(_near(x[4 + k] * ratio, y[4 + k], norm) for k in range(SUMS))
    return sums and all(_near(x[4 + SUMS + k] * ratio**2, y[4 + SUMS + k], y[3]) for k in range(SUMS))


def _apart(x: Print, y: Print) -> float:
    """By the sketches, how far apart two arrays are."""
    return math.sqrt(sum((x[k] - y[k]) ** 2 for k in range(5 + 2 * SUMS, 5 + 3 * SUMS)) / SUMS)


def _affine(x: Print, y: Print) -> tuple[float, float] | None:
    """The factor and the number that make one array of the other, also sample by sample; None if none do."""
    if x[0] != y[0] or x[1] != y[1] or any(map(math.isnan, (x[4], y[4]))):
        return None
    size, samples = int(x[0]), int(x[1])
    for first, count, each in ((5 + 2 * SUMS, size, 1.0), (4, samples, size / max(samples, 1))):
        if count < _SOLVED:
            continue
        ones = each * sketch(np.ones(count))[1:]
        known, wanted = (np.array(print_[first : first + SUMS]) for print_ in (x, y))
        (slope, shift), *_ = np.linalg.lstsq(np.stack([known, ones], 1), wanted, rcond=None)
        left = float(np.linalg.norm(wanted - slope * known - shift * ones))
        scale = math.sqrt(max(y[3], 1e-30) * SUMS * each)
        if left <= _CLOSE * scale and slope and abs(shift) > _CLOSE:
            return float(slope), float(shift)
    return None


def _is_one_hot(x: Print) -> bool:
    """Whether each sample has one entry of 1 and else zeros: its sum and its sum of squares are 1."""
    ones = [*sketch(np.ones(int(x[1])))[1:]]
    return (
        x[0] > x[1] > 0
        and x[2] == x[3] == x[1]
        and all(_near(x[4 + k], ones[k % SUMS], math.sqrt(x[1])) for k in range(2 * SUMS))
    )


def _near(x: float, y: float, scale: float) -> bool:
    return abs(x - y) <= _CLOSE * abs(scale) or x == y


def _note(notes: list[str], kinds: Sequence[Likeness]) -> None:
    words = {
        "rounded": "batches are rounded to 16 bits in one run, or differ by as much",
        "layout": LAYOUT,
        "order": "batches hold the same samples in another order",
    }
    for kind, sentence in words.items():
        if kind in kinds and sentence not in notes:
            notes.append(sentence)


def _counts(steps: Sequence[tuple[Step, Step]], i: int, notes: list[str]) -> Verdict | None:
    """A step of one took more batches than that of the other."""
    x, y = steps[i]
    totals = [[sum(each[0][k] for each in s.batches if each) for k in (0, 2, 3)] for s in (x, y)]
    n, m = len(x.batches), len(y.batches)
    if all(_near(p, q, max(abs(p), math.sqrt(max(totals[0][2], 0)))) for p, q in zip(*totals, strict=True)):
        sentence = f"A takes {n} batches in a step where B takes {m}, with the same samples in all"
        if sentence not in notes:
            notes.append(sentence)
        return None
    more, fewer = ("A", "B") if n > m else ("B", "A")
    near = [len(p.batches) == len(q.batches) for p, q in (*steps[:i], *steps[i + 1 : i + 4])]
    if near and all(near[:i]) and any(near[i:] or near):
        cause = f"{more} took {max(n, m)} batches in this step and {fewer} {min(n, m)}: a step of {more} was left out"
        look = ["the loss scale: a GradScaler leaves out steps whose gradients are not finite"]
        return _verdict(i, "skipped step", cause, look)
    cause = f"A accumulates {n} batches in a step and B {m}, which are not the same samples"
    return _verdict(i, "accumulation", cause, ["gradient accumulation, and the batch size with it"])


def _elsewhere(
    steps: Sequence[tuple[Step, Step]], i: int, a: list[Print], b: list[Print], kinds: list[Likeness]
) -> Verdict:
    if "scaled" in kinds:
        k = kinds.index("scaled")
        ratio = math.sqrt(b[k][3] / a[k][3])
        cause = f"array {k + 1} of the batch is multiplied by {ratio:.6g} in B"
        return _verdict(i, "scaled", cause, ["how inputs are normalised (such as by 255)"])
    for k, kind in enumerate(kinds):
        if kind == "other" and (line := _affine(a[k], b[k])):
            slope, shift = line
            sum_ = f"{slope:.6g} times that of A {'+' if shift > 0 else '-'} {abs(shift):.6g}"
            cause = f"array {k + 1} of the batch is {sum_} in B"
            return _verdict(i, "scaled", cause, ["how inputs are normalised: mean, deviation and range"])
    if a[0][1] != b[0][1]:
        cause = f"batches have {a[0][1]:g} samples in A and {b[0][1]:g} in B"
        return _verdict(i, "batch size", cause, ["the batch size, and whether a last short batch is dropped"])
    first = kinds.index("other")
    if first and kinds[0] != "other":
        cause = f"array {first + 1} of the batch differs, those before it do not"
        return _verdict(i, "other arrays", cause, ["how labels, or weights, are made"])

    def shifted(n: int) -> bool:
        places = [j for j in range(i, len(steps)) if 0 <= j + n < len(steps)]
        return len(places) > 1 and all(_same(steps[j][0], steps[j + n][1]) for j in places[:8])

    for n in (k for m in range(1, len(steps)) for k in (m, -m)):
        if shifted(n):
            cause = f"B has the batches of A {abs(n)} step{'s' if abs(n) > 1 else ''} {'later' if n > 0 else 'earlier'}"
            look = ["a batch that is taken before the loop", "the position in the data after a restart"]
            if not all(flat(step) for step in steps[0]):
                look.insert(0, "whether batch() is called before the step in both: one has no batch at step 1")
            return _verdict(i, "shifted", cause, look)
    found = sum(any(_same(x, y) for _, y in steps) for x, _ in steps[i:])
    if found > 0.5 * (len(steps) - i):
        cause = f"B has the batches of A in another order ({found} of {len(steps) - i} are found at other steps)"
        return _verdict(i, "order", cause, ["the seed and the generator by which batches are shuffled"])
    for side, who in enumerate("AB"):
        earlier = [s[side] for s in steps[:i]]
        again = next((j for j, step in enumerate(earlier) if _same(steps[i][side], step)), None)
        other = any(_same(steps[i][1 - side], s[1 - side]) for s in steps[:i])
        if again is not None and not other:
            cause = f"the batch of {who} is that of its step {again + 1} again, that of {'BA'[side]} is a new one"
            look = ["whether each epoch is shuffled anew, and with which seed"]
            return _verdict(i, "repeated", cause, look)
    totals = [[sum(flat(s)[0][k] for s in side[i:]) for k in (0, 2, 3)] for side in zip(*steps, strict=True)]
    if len(steps) - i > 1 and all(
        _near(p, q, max(abs(p), math.sqrt(abs(totals[0][2])))) for p, q in zip(*totals, strict=True)
    ):
        cause = "the batches are other ones, but of the same samples in all"
        return _verdict(i, "order", cause, ["the seed and the generator by which samples are shuffled"])
    return _verdict(
        i, "other data", "the batches hold other numbers", ["the data set, its split and its preprocessing"]
    )


def _same(x: Step, y: Step) -> bool:
    a, b = flat(x), flat(y)
    return len(a) == len(b) > 0 and all(
        alike(p, q) in ("equal", "rounded", "layout") for p, q in zip(a, b, strict=True)
    )


def _verdict(i: int, kind: str, cause: str, look: list[str]) -> Verdict:
    return Verdict("parted", cause, "data", i + 1, kind, look=look)
