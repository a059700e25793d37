"""Anyone's port of the rule against the golden vectors: NumPy arrays in and out."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np

from ada2ms.conformance.bounds import Deviation, bound_in_epsilons, deviations
from ada2ms.conformance.known import variants
from ada2ms.core import golden
from ada2ms.core.cases import (
    Array,
    NotStated,
    Snapshot,
    choices,
    dtypes,
    has_one_group,
    hyperparameters,
    initial,
    precisions,
    recorded,
)
from ada2ms.core.hyperparameters import DEFAULT_COMPENSATED, DEFAULT_MAX_NORM, DEFAULT_NONFINITE

# What a case need not ask for: left out of the arguments where it is the default.
_OPTIONAL: Final = {
    "nonfinite": DEFAULT_NONFINITE,
    "max_norm": DEFAULT_MAX_NORM,
    "compensated": DEFAULT_COMPENSATED,
}


class Optimizer(Protocol):
    """What is checked: an optimizer over parameters that it was made with.

    One that keeps what 16 bits lose (`compensated`) also has an attribute `compensation`: a list of arrays as `params`,
    None for a wider parameter.
    """

    @property
    def params(self) -> Sequence[Array]:
        """The current values, in the order given, as NumPy arrays or what `np.asarray` takes."""

    def step(self, gradients: Sequence[Array | None], /) -> None:
        """One update, given an array for each parameter, or None where it has no gradient in this step."""


_SHOWN: Final = 10  # cases that a report tells of

Make = Callable[..., Optimizer]


@dataclass
class Report:
    """What came of a check.

    Attributes:
        dtype: the precision whose bounds were applied.
        checked: the ids of the cases that were run.
        wrong: for each case that is off, its first deviation; or what it raised.
        unchecked: by case, why it could not be run: what `make` has no argument for.
        worst: the largest deviation that is within its bound.
    """

    dtype: str
    checked: list[str] = field(default_factory=list)
    wrong: dict[str, Deviation] = field(default_factory=dict)
    unchecked: dict[str, str] = field(default_factory=dict)
    worst: Deviation | None = None

    @property
    def ok(self) -> bool:
        """Whether something was checked, and nothing was off. What was not checked is in `unchecked`."""
        return bool(self.checked) and not self.wrong

    @property
    def complete(self) -> bool:
        """Whether every case was checked."""
        return not self.unchecked

    def __str__(self) -> str:
        right = len(self.checked) - len(self.wrong)
        lines = [f"{right} of {len(self.checked)} cases are right in {self.dtype}"]
        if self.worst is not None:
            unit = "epsilons" if self.dtype == "float64" else "epsilons a step"
            bound = bound_in_epsilons(self.dtype)
            lines[0] += f"; the worst update is off by {self.worst.epsilons:.2g} {unit} of {bound:.4g}"
        shown = list(self.wrong.items())[:_SHOWN]
        lines += [line for case, found in shown for line in _told(case, found)]
        lines += [f"off: {len(self.wrong) - _SHOWN} cases more, in `wrong`"] if len(self.wrong) > _SHOWN else []
        reasons: dict[str, list[str]] = {}
        for case, reason in self.unchecked.items():
            reasons.setdefault(reason, []).append(case)
        lines += [f"not checked: {len(ids)} cases, such as {ids[0]}: {reason}" for reason, ids in reasons.items()]
        return "\n".join(lines)


def _told(case: str, found: Deviation) -> list[str]:
    """What is off, what the case is, and which mistakes it is there to tell."""
    comment = next(x.comment for x in golden.load() if x.id == case)
    mistakes = "; ".join(variants()["named"].get(case, []))
    return [f"off: {found}", f"     ({comment})", *([f"     (it is there to tell: {mistakes})"] if mistakes else [])]


def check(make: Make, *, dtype: str = "float64", cases: Iterable[golden.Case] | None = None) -> Report:
    """Runs an implementation of the rule over the golden vectors.

    Args:
        make: `make(params, **hyper)` returns an `Optimizer`. `params` are arrays of `dtype`, which it may keep and
            change; `hyper` has lr, b1, b2, eps, weight_decay, adaptivity and scope, by the rule's names, always. `lr`
            and `adaptivity` are numbers, or functions of the count of completed updates where they change (adaptivity
            is then a schedule of `ada2ms.core`). Only cases that need them also give max_norm, nonfinite, compensated
            (with dtypes, "bfloat16", "float16" or None for each parameter; the arrays are float32), and groups (for
            each group a dict of the indices of its parameters, "params", and its hyperparameters). A case is left out,
            and the report says so, if `make` has no argument for what it needs, or raises NotImplementedError.
        dtype: "float64" or "float32", in which the implementation computes: the bounds depend on it.
        cases: some of the golden cases; by default all.

    Returns:
        What was checked, what is off and what was not checked.

    Raises:
        ValueError: the dtype is another one, or the vectors are damaged.
    """
    if dtype not in ("float64", "float32"):
        raise ValueError(f"Invalid dtype: {dtype!r} (dtype must be 'float64' or 'float32')")
    report = Report(dtype)
    for case in golden.load() if cases is None else cases:
        try:
            if dtype not in precisions(case):
                raise NotStated(f"it has parameters of 16 bits, which are computed in float32, and this is {dtype}")
            optimizer = _made(make, case, dtype)
        except (NotStated, NotImplementedError) as reason:
            report.unchecked[case.id] = str(reason) or type(reason).__name__
            continue
        report.checked.append(case.id)
        _judge(report, case, replay(optimizer, case, dtype))
    return report


def arguments(case: golden.Case) -> dict[str, Any]:
    """What a case asks of an implementation, as `check` gives it to `make`."""
    asked = {name: value for name, value in choices(case).items() if value != _OPTIONAL.get(name)}
    first = case.groups[0]
    found = {"lr": _rate(first.lr), **hyperparameters(first), **asked}
    if any(kind for group in case.groups for kind in group.dtypes):
        found["dtypes"] = [kind for group in case.groups for kind in group.dtypes]
    if not has_one_group(case):
        ends = [sum(len(group.params) for group in case.groups[: i + 1]) for i in range(len(case.groups))]
        found["groups"] = [
            {"params": list(range(end - len(g.params), end)), "lr": _rate(g.lr), **hyperparameters(g)}
            for g, end in zip(case.groups, ends, strict=True)
        ]
    return found


def _rate(lr: tuple[float, ...]) -> float | Callable[[int], float]:
    """A number, or a function of the count of completed updates."""
    return lr[0] if len(set(lr)) == 1 else lambda count: lr[min(int(count), len(lr) - 1)]


def _made(make: Make, case: golden.Case, dtype: str) -> Optimizer:
    asked = arguments(case)
    params = [p.astype(kind) for p, kind in zip(initial(case), _kept_in(case, dtype), strict=True)]
    try:
        inspect.signature(make).bind(params, **asked)
    except TypeError as error:
        raise NotStated(f"make does not take what it needs ({error})") from None
    except ValueError:  # built-in functions need not tell their arguments
        pass
    return make(params, **asked)


def _kept_in(case: golden.Case, dtype: str) -> list[str]:
    """The dtype of each array: NumPy has no bfloat16, so that values of 16 bits come in float32."""
    return ["float32" if kind in ("bfloat16", "float16") else kind for kind in dtypes(case, dtype)]


def replay(optimizer: Optimizer, case: golden.Case, dtype: str) -> Iterator[Snapshot | None]:
    """Steps an optimizer by a case's gradients; a snapshot without state after each recorded step."""
    for i, gradients in enumerate(case.gradients, start=1):
        kinds = _kept_in(case, dtype)
        optimizer.step([None if g is None else g.astype(kind) for g, kind in zip(gradients, kinds, strict=True)])
        if i in recorded(case):
            params = [np.array(p, np.float64) for p in optimizer.params]
            rest = getattr(optimizer, "compensation", None) if case.compensated else None
            kept = [None if x is None else np.array(x, np.float64) for x in rest or []]
            yield Snapshot(params, [], [], [], [], [], 0, kept)
        else:
            yield None


def _judge(report: Report, case: golden.Case, run: Iterator[Snapshot | None]) -> None:
    """Adds what is wrong with a run, or how far it is off, to a report."""
    try:
        for found in deviations(case, run, report.dtype):
            if not found.ok:
                report.wrong[case.id] = found
                return
            if report.worst is None or found.epsilons > report.worst.epsilons:
                report.worst = found
    except Exception as error:  # of the implementation, whatever it is: the other cases are run too
        reason = f"raised {type(error).__name__}: {error}".partition("\n")[0]
        report.wrong[case.id] = Deviation(case.id, 0, "the optimizer", reason=reason)
