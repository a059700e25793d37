"""States to and from a framework: names, layouts and types, checked as a whole before anything changes.

Also what the transfer of every framework says in the same words: which optimizers have a state, and what does not fit.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from ada2ms.core.hyperparameters import Scope
from ada2ms.core.state.compensation import fitted_value
from ada2ms.core.state.errors import StateError
from ada2ms.core.state.extras import Extra, Extras, fitted_extras
from ada2ms.core.state.layers import reasons
from ada2ms.core.state.layout import Axes, Layout, Name, Names, arranged, called, cut, layouts
from ada2ms.core.state.model import Array, Entry, State


@dataclass(frozen=True)
class Target:
    """A parameter of a framework that an entry may go to: its shape, and the types (by name) of what it keeps."""

    shape: tuple[int, ...]
    dtypes: Mapping[str, str]  # of each of SLOTS, and of "compensation" where the target keeps one
    group: int = 0


@dataclass(frozen=True)
class Verification:
    """Whether the optimizer here makes the steps that a receipt holds as they were made.

    Attributes:
        verdict: "proven", "lost", or "cannot be verified".
        why: what shows it; for people.
    """

    verdict: Literal["proven", "lost", "cannot be verified"]
    why: str

    def __str__(self) -> str:
        return f"{self.verdict}: {self.why}"


@dataclass
class Report:
    """What went where: for each parameter its name in the framework, its name in the state, its shape and its axes.

    Of `extras`, which are no parameters of the optimizer, there are the two names alone. `verification` is what
    `verify=` has found; None without it.
    """

    rows: list[tuple[str, str, tuple[int, ...], tuple[int, ...] | None]]
    notes: list[str] = field(default_factory=list)
    extras: list[tuple[str, str]] = field(default_factory=list)
    verification: Verification | None = None

    def __setstate__(self, fields: dict[str, Any]) -> None:
        self.__dict__.update({"extras": [], "verification": None, **fields})  # pickles of before there were these

    def __str__(self) -> str:
        columns = [row[0] for row in self.rows], [row[1] for row in self.rows]
        widths = [max(map(len, column), default=0) for column in columns]
        lines = [
            f"{name:{widths[0]}}  <-  {origin:{widths[1]}}  {shape}" + (f"  axes {axes}" if axes else "")
            for name, origin, shape, axes in self.rows
        ]
        lines += [f"{name}  <-  {origin}  (extra)" for name, origin in self.extras]
        lines += self.notes
        return "\n".join(lines if self.verification is None else [*lines, str(self.verification)])


@dataclass
class Fitted:
    """A state as it fits an optimizer: entries by the framework's names, in its layout, and (s, k) of each group."""

    entries: dict[str, Entry]
    groups: list[tuple[float | None, int]]
    skipped: int
    report: Report
    extras: dict[str, Array] = field(default_factory=dict)


def to_portable(
    entries: Mapping[str, Entry], names: Names, axes: Axes, others: Collection[str] = ()
) -> tuple[dict[str, Entry], dict[str, Name]]:
    """Entries of a framework by the state's names and in its layout; and the state's name, or names, of each.

    Args:
        entries: by the framework's names.
        names: the state's name of each of the framework's names, several for one that is cut; those left out are the
            same in both.
        axes: for a framework's name, how the state's array is transposed to have the framework's layout, or how the
            framework's is cut; see `Layout`.
        others: parameters of the model that are not in the optimizer: names and axes for them are ignored.

    Raises:
        StateError: names or axes are of parameters that do not exist, or do not fit.
    """
    found, problems = layouts({name: entry.exp_avg.shape for name, entry in entries.items()}, names, axes, others)
    if problems:
        raise StateError("The state cannot be exported", problems)
    moved: dict[str, Entry] = {}
    renamed: dict[str, Name] = {}
    for name, entry in entries.items():
        try:
            parts = cut(entry, found[name])
        except ValueError as error:
            problems.append(f"{name!r}: {error}")
            continue
        moved.update(parts)
        renamed[name] = next(iter(parts)) if len(parts) == 1 else tuple(parts)
    if problems:
        raise StateError("The state cannot be exported", problems)
    return moved, renamed


def from_portable(
    state: State,
    targets: Mapping[str, Target],
    *,
    names: Names,
    axes: Axes,
    scope: Scope | None,
    values: bool,
    cast: bool,
    groups: int = 1,
    others: Collection[str] = (),
    extras: Extras = None,
    beside: Mapping[str, Extra] | None = None,
) -> Fitted:
    """A state as it fits the parameters of a framework.

    Args:
        state: of any source.
        targets: by the framework's names.
        names: the state's name of each of the framework's names, several for one that is cut; those left out are the
            same in both.
        axes: for a framework's name, how the state's array is transposed to have the framework's layout, or how the
            framework's is cut; see `Layout`.
        scope: the optimizer's; None for an optimizer without a global second moment, such as AdamW.
        values: whether the parameters' values are wanted, and not only the optimizer's state.
        cast: whether values may be rounded to the framework's types.
        groups: the number of the framework's parameter groups.
        others: parameters of the model that are not in the optimizer: names and axes for them are ignored.
        extras: the state's name of each array that the optimizer has no moments of.
        beside: these, by the framework's names.

    Raises:
        StateError: listing every entry that is missing, superfluous, or of a wrong shape or type.
    """
    found, problems = layouts({name: target.shape for name, target in targets.items()}, names, axes, others)
    if problems:
        raise StateError("The state does not fit", problems)
    why = reasons([part for layout in found.values() for part in layout.names], state.parameters)
    state, problems = arranged(state, found)
    problems += why
    if scope is not None:
        state = state.with_global(scope)
    entries: dict[str, Entry] = {}
    rows, notes = [], list(state.notes)
    for name, entry in state.parameters.items():
        what = called(name, found[name])
        entries[name], unfit = _fitted(entry, targets[name], what, values, cast)
        problems += unfit
        notes += _left_behind(entry, targets[name], what, values)
        rows.append(_row(name, found[name]))
    members = [{name for name, target in targets.items() if target.group == i} for i in range(groups)]
    numbers, unfit = _global_moments(state, members)
    problems += unfit
    beside = beside or {}
    arrays, origins, unfit, left = fitted_extras(state, beside if values else {}, extras, axes)
    problems += unfit
    problems += [
        f"type: the extra {name!r} is {beside[name].dtype}, which does not hold its {x.dtype} values "
        "(cast=True rounds them)"
        for name, x in arrays.items()
        if not cast and not holds(beside[name].dtype, x)
    ]
    if problems:
        raise StateError("The state does not fit", problems)
    report = Report(rows, [*notes, *left], list(origins.items()))
    return Fitted(entries, numbers, state.skipped, report, arrays)


def optimizer_problems(optimizer: str, *, known: bool, amsgrad: bool) -> list[str]:
    """Why there is no state of an optimizer: empty if there is.

    Args:
        optimizer: what it is called.
        known: whether it is Ada2MS, AdamW or Adam.
        amsgrad: whether it keeps the largest second moments.
    """
    if not known:
        return [f"{optimizer} has another state (must be Ada2MS, AdamW or Adam)"]
    return ["amsgrad: its largest second moments are no part of this state"] if amsgrad else []


def without_moments(paths: Iterable[str], *, imported: bool) -> list[str]:
    """Notes of parameters whose values a hand-off leaves out, since a state holds what has moments."""
    what = "stays as it was here" if imported else "is not in this state"
    return [f"the value of {path!r} {what}: the optimizer has no moments of it" for path in paths]


def only_count(entries: Iterable[Entry], optimizer: str) -> int:
    """The count of updates of an optimizer that has one for all parameters, as Adam in Keras and Optax; 0 of no entry.

    Raises:
        StateError: the entries' counts differ.
    """
    counts = {entry.step for entry in entries}
    if len(counts) > 1:
        reason = f"{optimizer} has one count of updates; the state's parameters have {sorted(counts)}"
        raise StateError("The state does not fit", [reason])
    return max(counts, default=0)


def _row(name: str, layout: Layout) -> tuple[str, str, tuple[int, ...], tuple[int, ...] | None]:
    return name, " + ".join(layout.names), layout.shape, layout.axes if isinstance(layout.axes, tuple) else None


def _fitted(entry: Entry, target: Target, called: str, values: bool, cast: bool) -> tuple[Entry, list[str]]:
    """An entry without what is not wanted, and what of it is missing or does not fit the target's types."""
    problems = []
    if values and entry.param is None:
        problems.append(f"missing: the value of {called} (values=False imports the optimizer's state alone)")
    entry, exact = fitted_value(entry if values else replace(entry, param=None), target.dtypes)
    if not exact and not cast:
        problems.append(
            f"type: param of {called} is {target.dtypes['param']}, which does not hold its values, not even with its "
            "compensation (cast=True rounds them)"
        )
    for slot, array in entry.slots().items():
        if not cast and not holds(target.dtypes[slot], array):
            problems.append(
                f"type: {slot} of {called} is {target.dtypes[slot]}, which does not hold its {array.dtype} values "
                "(cast=True rounds them)"
            )
    return entry, problems


def _left_behind(entry: Entry, target: Target, called: str, values: bool) -> list[str]:
    """A note of a compensation that goes nowhere: neither to the target's, nor with the value."""
    if values or entry.compensation is None or "compensation" in target.dtypes or not np.any(entry.compensation):
        return []
    return [f"the compensation of {called} stays behind: it belongs to the value, which is not imported"]


def _global_moments(state: State, groups: list[set[str]]) -> tuple[list[tuple[float | None, int]], list[str]]:
    """(s, k) for each of a framework's groups, given the names of its parameters; and what is wrong."""
    numbers, problems = [], []
    everything = _pairs(state, set(state.parameters)) or _pairs(state, None)
    for members in groups:
        pairs = everything if len(groups) == 1 else _pairs(state, members)
        if len(pairs) > 1:
            problems.append(
                f"groups: {len(pairs)} global second moments in the state, {sorted(pairs, key=str)}, for one"
            )
        if not pairs and len(everything) == 1:  # a group without parameters, as yet
            pairs = everything
        numbers.append(min(pairs, key=str) if pairs else (0.0, 0))
    return numbers, problems


def _pairs(state: State, members: set[str] | None) -> set[tuple[float | None, int]]:
    """The different (s, k) of the state's groups that have any of these parameters; of all groups for None."""
    chosen = [group for group in state.groups if members is None or members & set(group.params)]
    return {(group.global_exp_avg_sq, group.global_step) for group in chosen}


def holds(dtype: str, array: Array) -> bool:
    """Whether a type, by its name, holds all values of an array exactly. (NumPy has no bfloat16.)"""
    if dtype == "bfloat16":
        narrow = array.astype(np.float32)
        bits = np.where(np.isnan(narrow), np.float32(0), narrow).view(np.uint32)
        return bool(np.array_equal(narrow, array, equal_nan=True) and not np.any(bits & 0xFFFF))
    if np.dtype(dtype).kind != "c" and array.dtype.kind == "c":
        return False
    with np.errstate(over="ignore"):
        return np.dtype(dtype) == array.dtype or np.array_equal(array.astype(dtype), array, equal_nan=True)
