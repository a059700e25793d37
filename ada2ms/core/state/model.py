"""The optimizer's state in no framework's terms.

Slots have the names of `ada2ms.core.spec`. Averages are of the parameter's shape and at least float32; a parameter of
16 bits travels as float32, which holds it exactly, and so does its compensation. A state without `s`, such as AdamW's,
gets one where it goes; see `State.with_global`.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ada2ms.core.coefficients import bias_correction
from ada2ms.core.hyperparameters import (
    DEFAULT_COMPENSATED,
    DEFAULT_MAX_NORM,
    DEFAULT_NONFINITE,
    DEFAULT_SCOPE,
    DEFAULTS,
    Nonfinite,
    Scope,
    check,
)
from ada2ms.core.schedules import AdaptivitySchedule
from ada2ms.core.state import file
from ada2ms.core.state.errors import StateError
from ada2ms.core.state.receipt import Receipt, Step, unlike

Array = NDArray[Any]
SLOTS = ("param", "exp_avg", "exp_avg_sq")  # of every parameter


@dataclass
class Entry:
    """One parameter.

    Attributes:
        exp_avg, exp_avg_sq: first and elementwise second moment.
        step: its count of updates.
        global_exp_avg_sq: its own s, in scope "tensor"; else None.
        param: its value, if that travels too.
        compensation: of a parameter of 16 bits, what rounding has taken from its value; None if none is kept.
    """

    exp_avg: Array
    exp_avg_sq: Array
    step: int
    global_exp_avg_sq: float | None = None
    param: Array | None = None
    compensation: Array | None = None

    def __setstate__(self, fields: dict[str, Any]) -> None:
        self.__dict__.update({"compensation": None, **fields})  # pickles of before there were compensations

    def slots(self) -> dict[str, Array]:
        """The arrays by their names, those of `SLOTS` and the compensation; without what is not there."""
        return {name: array for name in (*SLOTS, "compensation") if (array := getattr(self, name)) is not None}


@dataclass
class Group:
    """Parameters that share hyperparameters; a framework without groups has one.

    Attributes:
        params: names, in the optimizer's order.
        hyper: those fields of `Hyperparameters` that the framework could tell: numbers, and for adaptivity a schedule
            of `ada2ms.core` as well; and `lr_scale`, if the framework has the learning rate as a factor of another.
        global_exp_avg_sq: s; None in scope "tensor", and where there is none yet.
        global_step: k.
    """

    params: list[str]
    hyper: dict[str, Any] = field(default_factory=dict)
    global_exp_avg_sq: float | None = None
    global_step: int = 0


@dataclass
class State:
    """The whole of an optimizer's state.

    Attributes:
        parameters: by name, in order.
        groups: every parameter is in one of them.
        scope, nonfinite: as in every backend.
        skipped: steps that `nonfinite="skip"` has skipped.
        source: where it comes from, such as "torch 2.13.0: Ada2MS"; for people.
        notes: what the optimizer kept besides and this state does not hold, such as accumulated gradients; one sentence
            each, for people. They are saved with the state, and are in the report of whoever imports it.
        max_norm, compensated: as in every backend.
        extras: arrays by name that are no part of the optimizer's state and travel with it.
        receipt: steps that led here, for `import_state(..., verify=...)`.

    Raises:
        StateError: listing everything that is not valid.
    """

    parameters: dict[str, Entry]
    groups: list[Group]
    scope: Scope = DEFAULT_SCOPE
    nonfinite: Nonfinite = DEFAULT_NONFINITE
    skipped: int = 0
    source: str = ""
    notes: list[str] = field(default_factory=list)
    max_norm: float | None = DEFAULT_MAX_NORM
    compensated: bool = DEFAULT_COMPENSATED
    extras: dict[str, Array] = field(default_factory=dict)
    receipt: Receipt | None = None

    def __post_init__(self) -> None:
        problems = [f"{name!r}: {x}" for name, entry in self.parameters.items() for x in _entry_problems(entry)]
        grouped = [name for group in self.groups for name in group.params]
        for name in dict.fromkeys([*self.parameters, *grouped]):
            if name not in self.parameters or grouped.count(name) != 1:
                problems.append(f"{name!r} is in {grouped.count(name)} groups (must be a parameter, and in one group)")
        for i, group in enumerate(self.groups):
            problems += [f"group {i}: {x}" for x in _group_problems(group)]
        for choice in ("scope", "nonfinite", "max_norm", "compensated"):
            problems += _raised(check, choice, getattr(self, choice))
        problems += [
            f"extra {name!r}: {x}" for name, array in self.extras.items() for x in _extra_problems(name, array)
        ]
        if not _is_count(self.skipped):
            problems.append(f"Invalid skipped: {self.skipped!r} (must be an integer, at least 0)")
        if self.receipt is not None:
            problems += [f"receipt: {x}" for x in unlike(self.receipt.start, self)]
        if problems:
            raise StateError("Not a valid state", problems)

    def __setstate__(self, fields: dict[str, Any]) -> None:
        added: dict[str, Any] = {
            "notes": [],
            "max_norm": DEFAULT_MAX_NORM,
            "compensated": DEFAULT_COMPENSATED,
            "extras": {},
            "receipt": None,
        }
        self.__dict__.update({**added, **fields})  # pickles of before there were these

    @property
    def has_global(self) -> bool:
        """Whether the global second moment is complete; a state of AdamW has none."""
        return None not in self._global_moments()

    def with_global(self, scope: Scope) -> "State":
        """The state with a global second moment for `scope`: its own, or the warm start where it has none.

        The warm start is s = mean(v), over all entries that have been updated (with scope "tensor", over each tensor's
        own), and k is the highest count of any tensor. A group without s beside others that have one takes s and k of a
        group with the same b2, or else s_hat and k of another.

        Raises:
            StateError: the state has one for the other scope.
        """
        moments = self._global_moments()
        if self.scope != scope and (self.has_global or any(s is not None for s in moments)):
            raise StateError("The state does not fit", [f"its scope is {self.scope!r}, the optimizer's {scope!r}"])
        if self.has_global:
            return self
        k = max((entry.step for entry in self.parameters.values()), default=0)
        if scope == "tensor":
            parameters = {
                name: entry if entry.global_exp_avg_sq is not None else replace(entry, global_exp_avg_sq=_mean([entry]))
                for name, entry in self.parameters.items()
            }
            groups = [replace(group, global_step=max(group.global_step, k)) for group in self.groups]
            return replace(self, parameters=parameters, groups=groups, scope=scope)
        start = _mean(self.parameters.values()), k
        groups = []
        for group in self.groups:
            s, number = _shared(group, self.groups) or start
            groups.append(replace(group, global_exp_avg_sq=s, global_step=number))
        return replace(self, groups=groups, scope=scope)

    def _global_moments(self) -> list[float | None]:
        """Each s: of every parameter in scope "tensor", else of every group."""
        holders = self.parameters.values() if self.scope == "tensor" else self.groups
        return [holder.global_exp_avg_sq for holder in holders]

    def hyper(self) -> dict[str, Any]:
        """The hyperparameters that all groups share, by the rule's names.

        Raises:
            StateError: groups differ.
        """
        if any(group.hyper != self.groups[0].hyper for group in self.groups):
            problems = [f"group {i}: {group.hyper}" for i, group in enumerate(self.groups)]
            raise StateError("The groups have hyperparameters of their own", problems)
        return dict(self.groups[0].hyper) if self.groups else {}

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, whole or not at all.

        Raises:
            ImportError: safetensors is not installed.
        """
        file.save(_plain(self), Path(path))

    @classmethod
    def load(cls, path: str | Path) -> "State":
        """Reads a file that `save` wrote, of this or any earlier version.

        Raises:
            FileNotFoundError: there is none.
            StateError: it is damaged, or not such a file.
            ImportError: safetensors is not installed.
        """
        return _from_plain(file.load(Path(path)))


def _plain(state: State) -> dict[str, Any]:
    """As dictionaries and lists, for files."""
    data: dict[str, Any] = dict(vars(state))
    data["parameters"] = {name: vars(entry) for name, entry in state.parameters.items()}
    data["groups"] = list(map(vars, state.groups))
    if state.receipt is not None:
        data["receipt"] = {"start": _plain(state.receipt.start), "steps": list(map(vars, state.receipt.steps))}
    return data


def _from_plain(data: dict[str, Any]) -> State:
    data["parameters"] = {name: Entry(**entry) for name, entry in data["parameters"].items()}
    data["groups"] = [Group(**group) for group in data["groups"]]
    if (receipt := data.get("receipt")) is not None:
        data["receipt"] = Receipt(_from_plain(receipt["start"]), [Step(**step) for step in receipt["steps"]])
    return State(**data)


def _shared(group: Group, groups: Iterable[Group]) -> tuple[float, int] | None:
    """(s, k) of a group: its own, those of one with the same b2, or as for the s_hat of another; None of no group."""
    b2 = group.hyper.get("b2")
    found: tuple[float, int] | None = None
    for other in (group, *groups):
        s, k, other_b2 = other.global_exp_avg_sq, other.global_step, other.hyper.get("b2")
        if s is None:
            continue
        if other is group or other_b2 == b2:
            return s, k
        if found is None and b2 is not None and other_b2 is not None and k:
            found = s / bias_correction(other_b2, k) * bias_correction(b2, k), k
    return found


def _mean(entries: Iterable[Entry]) -> float:
    """mean(v) over the entries of tensors that have been updated; 0 over none."""
    v = [_reals(entry.exp_avg_sq).astype(np.float64) for entry in entries if entry.step]
    return sum(float(x.sum()) for x in v) / max(sum(x.size for x in v), 1)


def _reals(array: Array) -> Array:
    """Complex numbers as pairs of reals along a new leading axis."""
    return np.stack([array.real, array.imag]) if np.iscomplexobj(array) else array


def _entry_problems(entry: Entry) -> list[str]:
    problems = []
    shape = np.shape(entry.exp_avg)
    for name, array in entry.slots().items():
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fc" or array.dtype.itemsize < 4:
            kind = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
            problems.append(f"Invalid {name}: {kind} (must be an array of at least float32)")
        elif array.shape != shape:
            problems.append(f"Invalid {name}: shape {array.shape} (must be that of exp_avg, {shape})")
        elif name == "exp_avg_sq" and np.any(_reals(array) < 0):
            problems.append(f"Invalid {name}: an entry is {_reals(array).min()} (must be at least 0)")
    if not _is_count(entry.step):
        problems.append(f"Invalid step: {entry.step!r} (must be an integer, at least 0)")
    if entry.global_exp_avg_sq is not None and not _is_moment(entry.global_exp_avg_sq):
        problems.append(f"Invalid global_exp_avg_sq: {entry.global_exp_avg_sq!r} (must be a number, at least 0)")
    return problems


def _extra_problems(name: Any, array: Any) -> list[str]:
    if not isinstance(name, str):
        return ["its name must be a string"]
    if isinstance(array, np.ndarray) and array.dtype.kind in "biufc" and array.dtype.name not in file.TOO_WIDE:
        return []
    return [f"{array.dtype if isinstance(array, np.ndarray) else type(array).__name__} (must be an array of numbers)"]


def _group_problems(group: Group) -> list[str]:
    problems = []
    for name, value in group.hyper.items():
        if name not in (*vars(DEFAULTS), "lr_scale"):
            problems.append(f"Invalid hyperparameter: {name!r} (must be one of {tuple(vars(DEFAULTS))})")
        elif not isinstance(value, AdaptivitySchedule):
            problems += _raised(check, name, value, schedule=False)
        elif name != "adaptivity":
            problems.append(f"Invalid {name}: {value!r} (must be a number)")
    if group.global_exp_avg_sq is not None and not _is_moment(group.global_exp_avg_sq):
        problems.append(f"Invalid global_exp_avg_sq: {group.global_exp_avg_sq!r} (must be a number, at least 0)")
    if not _is_count(group.global_step):
        problems.append(f"Invalid global_step: {group.global_step!r} (must be an integer, at least 0)")
    return problems


def _raised(function: Callable[..., None], *args: Any, **options: Any) -> list[str]:
    try:
        function(*args, **options)
    except (TypeError, ValueError) as error:
        return [str(error)]
    return []


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_moment(value: Any) -> bool:
    return isinstance(value, float) and (value >= 0 or math.isnan(value))  # NaN: nonfinite="propagate" keeps it
