"""Two traces side by side: the parameters that they share, how far apart each step is, and how far rounding goes."""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from ada2ms.core.trace.model import TENSORS, Step, Trace
from ada2ms.core.trace.sketch import Array, distance, precision, resolution

# For one: of each term of a sum's root length, of each layer, and wherever their number is not known.
ROUNDINGS: Final = 4.0
_DIFFERENT: Final = 16  # entries by which numbers of 16 bits are told
GROWTH: Final = 20.0  # by how much rounding may grow from one step to the next
RESIDUE: Final = 1e-4  # of the largest gradient's norm, below which a gradient may be nothing but rounding
REPEAT: Final = 10.0  # how many times a repeat's differences a port's may be


@dataclass
class Yardstick:
    """How far apart rounding alone puts two runs at the first step, relative to a tensor's norm.

    Attributes:
        arithmetic: half an ulp of the coarsest arithmetic in either run.
        name: of that arithmetic.
        terms: the longest sums that are seen from the shapes.
        layers: how many of them follow each other.
        sketch: the resolution of the sketches.
    """

    arithmetic: float
    name: str
    terms: int
    layers: int
    sketch: float

    @property
    def rounding(self) -> float:
        """Of the arithmetic, without the sketches."""
        return self.arithmetic * ROUNDINGS * (math.sqrt(self.terms) + self.layers)

    @property
    def relative(self) -> float:
        """The whole of it."""
        return self.rounding + self.sketch

    def __str__(self) -> str:
        return (
            f"{self.rounding:.1e} for sums of {self.terms} terms through {self.layers} layers in {self.name} (half an "
            f"ulp is {self.arithmetic:.1e}); where only sketches are recorded, their resolution of {self.sketch:.1e} "
            "is added, and a factor of 2 is allowed"
        )


class Pair:
    """Two traces, by the parameters that they share.

    Attributes:
        a, b: the traces.
        names: of shared parameters.
        ia, ib: their places in each.
        steps: pairs of steps, as far as both go.
        seen: the 16-bit type whose numbers the first gradients of a matrix hold in each, though kept in a wider one.
        held: of which matrices these are, in each.
        yardstick: what rounding explains at the first step.
    """

    def __init__(self, a: Trace, b: Trace, arithmetic: str | None = None) -> None:
        self.a, self.b = a, b
        there = b.index
        self.names = [p.name for p in a.parameters if p.name in there and b.parameters[there[p.name]].shape == p.shape]
        self.ia = np.array([a.index[name] for name in self.names], int)
        self.ib = np.array([there[name] for name in self.names], int)
        self.steps: list[tuple[Step, Step]] = list(zip(a.steps, b.steps, strict=False))
        found = [_arithmetic(t, self.names) for t in (a, b)]
        self.seen, self.held = [kind for kind, _ in found], [names for _, names in found]
        self.yardstick = self._yardstick(arithmetic)

    def _yardstick(self, arithmetic: str | None) -> Yardstick:
        found = [t.parameters[i] for t, each in ((self.a, self.ia), (self.b, self.ib)) for i in each]
        types = [p.dtype for p in found] or ["float32"]
        seen = [s for s in self.seen if s]
        if len(seen) == 2:  # what one run alone computes in is a difference, and no yardstick
            types.append(min(seen, key=precision))
        coarsest = arithmetic or max(types, key=precision)
        matrices = [p for p in self.a.parameters if len(p.shape) > 1]
        terms = max((max(p.shape, default=1) for p in self.a.parameters), default=1)
        sketch = max((resolution(p.dtype) for p in found), default=0.0)
        return Yardstick(precision(coarsest), coarsest, terms, max(len(matrices), 1), sketch)

    @property
    def same_values(self) -> float:
        """How far apart, relatively, the same values are before the first step: by rounding to either's type."""
        found = [t.parameters[i] for t, each in ((self.a, self.ia), (self.b, self.ib)) for i in each]
        return 2 * max((precision(p.dtype) for p in found), default=0.0) + self.yardstick.sketch

    def sketches(self, what: str, i: int) -> tuple[Array, Array]:
        """Of the shared parameters at a step: in a, and in b."""
        x, y = self.steps[i]
        return x.sketches[what][self.ia], y.sketches[what][self.ib]

    def missing(self, i: int) -> tuple[Array, Array]:
        """Which of the shared parameters have no gradient at a step."""
        x, y = self.steps[i]
        return x.missing[self.ia], y.missing[self.ib]

    def broken(self, i: int) -> tuple[Array, Array]:
        """Which of the shared parameters have a gradient at a step that is not finite."""
        each = zip(self.sketches("gradient", i), self.missing(i), strict=True)
        x, y = (~np.isfinite(rows[:, 0]) & ~gone for rows, gone in each)
        return x, y

    def is_lost(self, i: int) -> bool:
        """Whether both runs have gradients at a step, and none that is finite."""
        return all(mask.any() and mask[~gone].all() for mask, gone in zip(self.broken(i), self.missing(i), strict=True))

    def apart(self, what: str, i: int) -> tuple[Array, Array, float]:
        """How far apart a step is: of each parameter |x - y|, the larger norm, and relatively of the whole model.

        By all entries where they are recorded, else by the sketches. A gradient that is missing is one of zeros, and
        what is not finite in both runs is not apart.
        """
        x, y = self.sketches(what, i)
        lost = ~np.isfinite(x[:, 0]) & ~np.isfinite(y[:, 0])
        x, y = (np.where(lost[:, None], 0.0, s) for s in (x, y))
        if what == "gradient":
            x, y = (np.where(m[:, None], 0.0, s) for m, s in zip(self.missing(i), (x, y), strict=True))
        d, norm = distance(x, y), np.maximum(x[:, 0], y[:, 0])
        for k, pair in enumerate(self.entries(what, i)):
            if pair is not None and not lost[k]:
                d[k], norm[k] = np.linalg.norm(pair[0] - pair[1]), max(map(float, map(np.linalg.norm, pair)))
        whole = math.sqrt(float(np.sum(np.square(norm))))
        total = math.sqrt(float(np.sum(np.square(d))))
        return d, norm, total / whole if whole > 0 and math.isfinite(total) else (0.0 if total == 0 else math.inf)

    def entries(self, what: str, i: int) -> list[tuple[Array, Array] | None]:
        """All entries of each shared parameter at a step, where both runs have them."""
        found: list[tuple[Array, Array] | None] = []
        if not all(step.full for step in self.steps[i]):
            return [None] * len(self.names)
        for name, k in zip(self.names, self.ia, strict=True):
            x, y = (step.full.get(what, {}).get(name) for step in self.steps[i])
            if x is None or y is None or not x.size == y.size == self.a.parameters[k].size:
                found.append(None)
            else:
                found.append((x.reshape(-1).astype(np.float64), y.reshape(-1).astype(np.float64)))
        return found

    def is_exact(self, i: int) -> bool:
        """Whether all entries of all gradients of a step are recorded, so that no sketch has a say."""
        return all(
            pair is not None or a or b for pair, a, b in zip(self.entries("gradient", i), *self.missing(i), strict=True)
        )

    def coherence(self, i: int) -> float:
        """How much of the gradients' differences lies along the gradients, in units of what chance would have there.

        Rounding has no direction: about 1. What is computed otherwise has one. 0 where no entries are recorded.
        """
        found = []
        for pair in self.entries("gradient", i):
            if pair is not None and pair[0].size >= 8:
                delta, along = pair[1] - pair[0], pair[0]
                scale = float(np.linalg.norm(delta) * np.linalg.norm(along))
                if scale > 0:
                    found.append((float(delta @ along) / scale) ** 2 * along.size)
        return math.sqrt(sum(found) / len(found)) if found else 0.0

    def shape_problems(self) -> list[str]:
        """Parameters that one has and the other has not, or in another shape."""
        found = []
        here, there = {p.name: p for p in self.a.parameters}, {p.name: p for p in self.b.parameters}
        for name in [*here, *(n for n in there if n not in here)]:
            if name not in there or name not in here:
                found.append(f"{name!r} is only in {'A' if name in here else 'B'}")
            elif here[name].shape != there[name].shape:
                found.append(f"{name!r} has {here[name].shape} in A and {there[name].shape} in B")
        return found

    def types(self) -> dict[tuple[str, str], list[str]]:
        """The parameters that have another type in B, by their types in A and in B."""
        found: dict[tuple[str, str], list[str]] = {}
        for name, p, q in zip(self.names, self.ia, self.ib, strict=True):
            types = self.a.parameters[p].dtype, self.b.parameters[q].dtype
            if types[0] != types[1]:
                found.setdefault(types, []).append(name)
        return found

    def mapping(self) -> dict[str, str]:
        """For parameters that only B has: what A may call them, by equal shapes (in any order) and equal norms."""
        if not self.steps:
            return {}
        x, y = self.steps[0]
        found: dict[str, str] = {}
        for j, q in enumerate(self.b.parameters):
            fits = [
                p.name
                for i, p in enumerate(self.a.parameters)
                if sorted(p.shape) == sorted(q.shape)
                and relative(x.sketches["value"][i][0], y.sketches["value"][j][0]) <= self.same_values
            ]
            if len(fits) == 1 and fits[0] != q.name:
                found[q.own] = fits[0]
        return found


def _arithmetic(trace: Trace, names: list[str]) -> tuple[str, list[str]]:
    """The 16-bit type of which all entries of some matrix's first gradient are, and of which; empty if there is none.

    Products of matrices in 16 bits leave such gradients, whatever the parameters are kept in, and clipping one factor
    times them. So does a sum whose terms cancel, such as the gradient of a key's bias in attention, of a few units of
    the last place: what is that small beside the model's gradient says nothing.
    """
    gradients = trace.steps[0].full.get("gradient", {}) if trace.steps else {}
    norms = {name: float(np.linalg.norm(gradients[name])) for name in names if name in gradients}
    least = RESIDUE * max(norms.values(), default=0.0)
    found: dict[str, list[str]] = {}
    for name in names:
        x = gradients.get(name) if norms.get(name, 0.0) > least else None
        if x is None or x.ndim < 2 or x.size < 16 or x.dtype != np.float32 or np.count_nonzero(x) < 16:
            continue
        bits = np.ascontiguousarray(x).view(np.uint32)
        if not np.any(bits & 0xFFFF) or _is_scaled(x, 8):
            found.setdefault("bfloat16", []).append(name)
        elif (not np.any(bits & 0x1FFF) and np.abs(x).max() < 65536) or _is_scaled(x, 11):
            found.setdefault("float16", []).append(name)
    kind = max(found, key=lambda kind: len(found[kind]), default="")
    return kind, found.get(kind, [])


def _is_scaled(x: Array, digits: int) -> bool:
    """Whether all entries of a matrix are one factor times numbers of so many binary digits.

    Then the largest entry is one of 2^(digits - 1) such numbers times the factor, and each of these is tried. By chance
    another entry fits one of them, to two roundings of float32, in one of 1e4 cases. Few different entries may be
    counts, and those of a vector whole numbers that were its input.
    """
    every = np.abs(x[x != 0]).astype(np.float64)
    sizes = np.unique(every[:: max(len(every) // 512, 1)])
    if len(sizes) < _DIFFERENT or sum(n > 1 for n in x.shape) < 2 or not np.isfinite(every).all():
        return False
    factors = np.frexp(sizes[-1])[0] / np.arange(2 ** (digits - 1), 2**digits)
    for tried in (sizes[:: len(sizes) // _DIFFERENT], every):
        mantissas = np.frexp(np.frexp(tried)[0] / factors[:, None])[0] * 2**digits
        factors = factors[np.abs(mantissas - np.rint(mantissas)).max(1) <= 2.0 ** (digits - 21)]
    return len(factors) > 0


def grain(number: float | None) -> float:
    """Half an ulp of the narrowest type that holds a number, of bfloat16, float32 and float64."""
    if number is None or not math.isfinite(number):
        return 0.0
    narrow = np.float32(number)
    if float(narrow) != number:
        return 2.0**-53
    return 2.0**-24 if int(narrow.view(np.uint32)) & 0xFFFF else 2.0**-8


def factor(x: Array, y: Array) -> tuple[float, float]:
    """The c for which the sketches y are nearest to c*x, and what is left, relative to y."""
    zx, zy = x[..., 1:].reshape(-1), y[..., 1:].reshape(-1)
    square, whole = float(zx @ zx), float(np.linalg.norm(zy))
    if not (square > 0 and whole > 0 and math.isfinite(square + whole)):
        return 1.0, 0.0 if square == whole == 0 else math.inf
    c = float(zx @ zy) / square
    return c, float(np.linalg.norm(zy - c * zx)) / whole


def whole(pair: Pair, i: int) -> dict[str, float]:
    """For each kind of tensor, how far apart the whole model is at a step, relatively; and the losses."""
    x, y = pair.steps[i]
    return {**{what: pair.apart(what, i)[2] for what in TENSORS}, "loss": relative(x.loss, y.loss)}


def drift(pair: Pair) -> dict[str, list[float]]:
    """`whole` of each step."""
    each = [whole(pair, i) for i in range(len(pair.steps))]
    return {what: [found[what] for found in each] for what in (*TENSORS, "loss")}


def relative(x: float | None, y: float | None) -> float:
    """How far apart two numbers are, relatively; 0 where one is not known, or both are not finite."""
    if x is None or y is None or x == y or not (math.isfinite(x) or math.isfinite(y)):
        return 0.0
    if not (math.isfinite(x) and math.isfinite(y)):
        return math.inf
    return abs(x - y) / max(abs(x), abs(y))
