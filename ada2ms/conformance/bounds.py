"""How far a run may be from a golden case, and why; and how far it is."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ada2ms.core import golden
from ada2ms.core.cases import Array, Snapshot, expected, initial

EPSILON: Final = {dtype: float(np.finfo(dtype).eps) for dtype in ("float32", "float64")}
FLOAT64: Final = 1e-12  # of the largest entry, however many steps
FLOAT32: Final = 8  # epsilons a step
# Of a type of 16 bits: the largest share of itself by which a number is rounded, and the smallest number above 0.
SIXTEEN_BITS: Final = {"bfloat16": (2.0**-8, 2.0**-133), "float16": (2.0**-11, 2.0**-24)}


@dataclass(frozen=True)
class Deviation:
    """How far one array, number or count of a run is from what a golden case expects.

    Attributes:
        case: the id of the case.
        step: after which it was compared, counted from 1.
        what: "update 0", "exp_avg 2", "s 0" and so on (the number is that of the parameter), or "step", "k", "skipped".
        error: the largest difference of an entry; infinity where no bound could hold it.
        bound: the largest that is allowed.
        epsilons: the error in epsilons of the precision, relative to the sizes that the bound refers to; with float32
            divided by the number of steps, as the bound is.
        reason: what is wrong where it is not the size of an error, such as a count, or shapes that differ.
    """

    case: str
    step: int
    what: str
    error: float = 0.0
    bound: float = 0.0
    epsilons: float = 0.0
    reason: str = ""

    @property
    def ok(self) -> bool:
        """Whether it is within the bound."""
        return not self.reason and self.error <= self.bound

    def __str__(self) -> str:
        where = f"{self.case}, step {self.step}: {self.what}"
        if self.reason:
            return f"{where} {self.reason}"
        return f"{where} is off by {self.error:.1e}; the bound is {self.bound:.1e}"


def bound_in_epsilons(dtype: str) -> float:
    """The bound in the unit of `Deviation.epsilons`."""
    return FLOAT64 / EPSILON[dtype] if dtype == "float64" else FLOAT32


def deviations(case: golden.Case, actual: Iterator[Snapshot | None], dtype: str) -> Iterator[Deviation]:
    """Compares counts, updates and state with the case's, at every recorded step, as the run goes on.

    Updates p_t - p_0 are compared, and not parameters, which would hide errors of the update. The bounds, relative to
    the largest entry of a tensor:

    - float64: 1e-12. That is 4500 epsilons: room for the roundings of 1000 steps, and for nothing else; every mutant in
      tests/test_golden.py is off by more.
    - float32: 8 epsilons a step. Each step rounds an average a few times and multiplies beta, itself rounded, in once
      more; the errors add up. A parameter is rounded in its own size, not in its update's, and a first moment in the
      gradients' size, however much they cancel: so those sizes count too.
    - 16 bits with a compensation: as float32, and 2*u*u of the parameter a step more, where u is 2^-8 for bfloat16 and
      2^-11 for float16: the parameter is rounded by at most u of itself, and the remainder by at most u of that, here
      and in what the case expects. (By half the smallest float16, if that is more.) The update is that of
      parameter + compensation, and the parameter is the number nearest to it: half of a unit in the last place away.

    Args:
        case: what is expected.
        actual: a snapshot after each step that the case records; after the others anything. A snapshot whose `exp_avg`
            is empty has no state that could be compared.
        dtype: "float64" or "float32", in which it was computed.
    """
    awaited = {at.step: expected(at) for at in case.expected}
    largest_gradients = [0.0] * len(initial(case))
    compared = 0
    for step, found in enumerate(actual, start=1):
        for i, g in enumerate(case.gradients[step - 1]):
            if g is not None and np.all(np.isfinite(g)):
                largest_gradients[i] = max(largest_gradients[i], float(np.max(np.abs(g), initial=0)))
        if step not in awaited:
            continue
        compared += 1
        if found is None:
            yield Deviation(case.id, step, "the run", reason="has no snapshot")
            continue
        yield from _at_step(_Place(case, step, dtype), found, awaited[step], largest_gradients)
    if compared != len(awaited):
        yield Deviation(case.id, len(case.gradients), "the run", reason=f"shows {compared} of {len(awaited)} records")


@dataclass(frozen=True)
class _Place:
    case: golden.Case
    step: int
    dtype: str

    def wrong(self, what: str, reason: str) -> Deviation:
        return Deviation(self.case.id, self.step, what, reason=reason)

    def compare(self, what: str, left: Any, right: Any, rounded: float = 0.0, allowed: float = 0.0) -> Deviation:
        """Args as `_at_step` computes them: `rounded` is a size that is rounded beside that of the values themselves,
        and `allowed` is what 16 bits add to the bound."""
        if np.shape(left) != np.shape(right):
            return self.wrong(what, f"has shape {np.shape(left)}, and not {np.shape(right)}")
        error, largest = largest_difference(left, right)
        unit = largest * EPSILON["float64"] if self.dtype == "float64" else (largest + rounded) * self.unit
        bound = FLOAT64 * largest if self.dtype == "float64" else FLOAT32 * unit
        beyond = max(error - allowed, 0.0)
        epsilons = beyond / unit if unit else (np.inf if beyond else 0.0)
        return Deviation(self.case.id, self.step, what, error, bound + allowed, epsilons)

    @property
    def unit(self) -> float:
        return self.step * EPSILON["float32"]


def _at_step(at: _Place, found: Snapshot, want: Snapshot, largest_gradients: list[float]) -> Iterator[Deviation]:
    with_state = bool(found.exp_avg)
    if with_state:
        for name in ("step", "k", "skipped"):
            if getattr(found, name) != getattr(want, name):
                yield at.wrong(name, f"is {getattr(found, name)}, and not {getattr(want, name)}")
        if len(found.s) != len(want.s):
            yield at.wrong("s", f"has {len(found.s)} numbers, and not {len(want.s)}")
        for i, (a, b) in enumerate(zip(found.s, want.s, strict=False)):
            yield at.compare(f"s {i}", np.array(a), np.array(b))
    if len(found.params) != len(want.params):
        yield at.wrong("params", f"are {len(found.params)}, and not {len(want.params)}")
        return
    kinds = [kind for group in at.case.groups for kind in group.dtypes]
    for i, (p, kind) in enumerate(zip(initial(at.case), kinds, strict=True)):
        if np.shape(found.params[i]) != p.shape:
            yield at.wrong(f"update {i}", f"has shape {np.shape(found.params[i])}, and not {p.shape}")
            continue
        size, allowed = float(np.max(np.abs(p), initial=0)), 0.0
        if kind and at.case.compensated:
            if reason := _not_nearest(found.params[i], remainder(found, i), kind):
                yield at.wrong(f"parameter {i}", reason)
            allowed = at.step * _sixteen_bits(found.params[i], kind)
        left, right = (x.params[i] - p + remainder(x, i) for x in (found, want))
        yield at.compare(f"update {i}", left, right, size, allowed)
        if with_state:
            yield at.compare(f"exp_avg {i}", found.exp_avg[i], want.exp_avg[i], largest_gradients[i])
            yield at.compare(f"exp_avg_sq {i}", found.exp_avg_sq[i], want.exp_avg_sq[i])


def remainder(at: Snapshot, i: int) -> Array:
    """The compensation of a parameter; zeros if it has none."""
    found = at.compensation[i] if at.compensation else None
    return np.zeros(np.shape(at.params[i])) if found is None else found


def _not_nearest(theta: Array, rest: Array, kind: str) -> str:
    """What is wrong unless a parameter is the nearest number to itself + compensation."""
    share, smallest = SIXTEEN_BITS[kind]
    finite = np.isfinite(theta)
    unit = np.maximum(2 * share * 2.0 ** np.floor(np.log2(np.maximum(np.abs(theta[finite]), smallest))), smallest)
    if not np.all(np.abs(rest[finite]) <= unit / 2):
        return f"is not the nearest number: {rest} are left of {theta}"
    return f"has a compensation of {rest} at {theta}" if np.any(rest[~finite] != 0) else ""


def _sixteen_bits(theta: Array, kind: str) -> float:
    """What a step may differ by from another: a compensation is at most half of a unit in the last place, and is itself
    rounded by at most a share of that."""
    share, smallest = SIXTEEN_BITS[kind]
    return float(max(2 * share**2 * np.max(np.abs(theta[np.isfinite(theta)]), initial=0), smallest))


def largest_difference(left: Any, right: Any) -> tuple[float, float]:
    """The largest difference between entries and the largest entry of `right`; zeros for empty arrays.

    A NaN is as far from a number as can be, and not at all from a NaN.
    """
    left, right = np.asarray(left, np.float64), np.asarray(right)
    numbers = ~np.isnan(right)
    if np.any(np.isnan(left) == numbers):
        return np.inf, 0.0
    numbers &= left != right  # of which infinities have no difference
    largest = float(np.max(np.abs(right), initial=0, where=np.isfinite(right)))
    return float(np.max(np.abs(left[numbers] - right[numbers]), initial=0)), largest
