"""The optimizer's state in no framework's terms: how it moves from one framework to another in mid-run.

A backend's `export_state` makes a `State`, and its `import_state` takes one; `State.save` and `State.load` keep it in a
file. Slots have the names of `ada2ms.core.spec`. Averages are of the parameter's shape and at least float32; a
parameter of 16 bits travels as float32, which holds it exactly. A state without `s`, as AdamW's, is given it where it
goes: s = mean(v), of as many steps as any of its tensors has had.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

from ada2ms.core.hyperparameters import DEFAULT_NONFINITE, DEFAULT_SCOPE, DEFAULTS, Nonfinite, Scope, check
from ada2ms.core.schedules import AdaptivitySchedule

Array = NDArray[Any]
Names = Mapping[str, str] | Callable[[str], str] | None
Axes = Mapping[str, Sequence[int]] | None
SLOTS = ("param", "exp_avg", "exp_avg_sq")


class StateError(ValueError):
    """A state that is not valid, or does not fit where it should go; the message lists every reason."""

    def __init__(self, what: str, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n  - ".join([f"{what}:", *self.problems]))


class Mappings(TypedDict):
    """How a model's parameters are called, and laid out, in a state: arguments of `export_state` and `import_state`."""

    names: dict[str, str]
    axes: dict[str, tuple[int, ...]]


@dataclass
class Entry:
    """One parameter.

    Attributes:
        exp_avg, exp_avg_sq: first and elementwise second moment.
        step: its count of updates.
        global_exp_avg_sq: its own s, in scope "tensor"; else None.
        param: its value, if that travels too.
    """

    exp_avg: Array
    exp_avg_sq: Array
    step: int
    global_exp_avg_sq: float | None = None
    param: Array | None = None

    def slots(self) -> dict[str, Array]:
        """The arrays by their names in `SLOTS`, the parameter's only if it is there."""
        return {name: array for name in SLOTS if (array := getattr(self, name)) is not None}


@dataclass
class Group:
    """Parameters that share hyperparameters; a framework without groups has one.

    Attributes:
        params: names, in the optimizer's order.
        hyper: those fields of `Hyperparameters` that the framework could tell: numbers, and for adaptivity a schedule
            of `ada2ms.core` as well.
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

    def __post_init__(self) -> None:
        problems = [f"{name!r}: {x}" for name, entry in self.parameters.items() for x in _entry_problems(entry)]
        grouped = [name for group in self.groups for name in group.params]
        for name in dict.fromkeys([*self.parameters, *grouped]):
            if name not in self.parameters or grouped.count(name) != 1:
                problems.append(f"{name!r} is in {grouped.count(name)} groups (must be a parameter, and in one group)")
        for i, group in enumerate(self.groups):
            problems += [f"group {i}: {x}" for x in _group_problems(group)]
        for choice in ("scope", "nonfinite"):
            problems += _raised(check, choice, getattr(self, choice))
        if not _is_count(self.skipped):
            problems.append(f"Invalid skipped: {self.skipped!r} (must be an integer, at least 0)")
        if problems:
            raise StateError("Not a valid state", problems)

    @property
    def has_global(self) -> bool:
        """Whether there is a global second moment, as there is not in a state of AdamW."""
        if self.scope == "tensor":
            return all(entry.global_exp_avg_sq is not None for entry in self.parameters.values())
        return all(group.global_exp_avg_sq is not None for group in self.groups)

    def with_global(self, scope: Scope) -> "State":
        """The state with a global second moment for `scope`: its own, or s = mean(v) where it has none.

        Raises:
            StateError: the state has one for the other scope.
        """
        if self.has_global:
            if self.scope != scope:
                raise StateError("The state does not fit", [f"its scope is {self.scope!r}, the optimizer's {scope!r}"])
            return self
        v = {name: entry.exp_avg_sq.astype(np.float64) for name, entry in self.parameters.items() if entry.step}
        if scope == "tensor":
            own = {name: float(x.mean()) if x.size else 0.0 for name, x in v.items()}
            parameters = {
                name: replace(entry, global_exp_avg_sq=own.get(name, 0.0)) for name, entry in self.parameters.items()
            }
            return replace(self, parameters=parameters, scope=scope)
        s = sum(float(x.sum()) for x in v.values()) / max(sum(x.size for x in v.values()), 1)
        k = max((entry.step for entry in self.parameters.values()), default=0)
        groups = [replace(group, global_exp_avg_sq=s, global_step=k) for group in self.groups]
        return replace(self, groups=groups, scope=scope)

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
        from ada2ms.core import state_file

        state_file.save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> "State":
        """Reads a file that `save` wrote, of this or any earlier version.

        Raises:
            FileNotFoundError: there is none.
            StateError: it is damaged, or not such a file.
            ImportError: safetensors is not installed.
        """
        from ada2ms.core import state_file

        return state_file.load(Path(path))


@dataclass(frozen=True)
class Target:
    """A parameter of a framework that an entry may go to: its shape, and the types (by name) of what it keeps."""

    shape: tuple[int, ...]
    dtypes: Mapping[str, str]  # of each of SLOTS
    group: int = 0


@dataclass
class Report:
    """What went where: for each parameter its name in the framework, its name in the state, its shape and its axes."""

    rows: list[tuple[str, str, tuple[int, ...], tuple[int, ...] | None]]
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        wide = max((len(row[0]) for row in self.rows), default=0), max((len(row[1]) for row in self.rows), default=0)
        lines = [
            f"{name:{wide[0]}}  <-  {origin:{wide[1]}}  {shape}" + (f"  axes {axes}" if axes else "")
            for name, origin, shape, axes in self.rows
        ]
        return "\n".join([*lines, *self.notes])


@dataclass
class Fitted:
    """A state as it fits an optimizer: entries by the framework's names, in its layout, and (s, k) of each group."""

    entries: dict[str, Entry]
    groups: list[tuple[float | None, int]]
    skipped: int
    report: Report


def outward(
    entries: Mapping[str, Entry], names: Names, axes: Axes, others: Collection[str] = ()
) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries of a framework by the state's names and in its layout; and the state's name of each.

    `others` are parameters of the model that are not in the optimizer: names and axes for them are passed over.

    Raises:
        StateError: names or axes are of parameters that do not exist, or do not fit.
    """
    renamed, problems = _rename(list(entries), names, others)
    problems += _axes_problems({name: entry.exp_avg.shape for name, entry in entries.items()}, axes, others)
    if problems:
        raise StateError("The state cannot be exported", problems)
    moved = {renamed[name]: _transposed(entry, _inverse(axes, name)) for name, entry in entries.items()}
    return moved, renamed


def inward(
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
) -> Fitted:
    """A state as it fits the parameters of a framework.

    Args:
        state: of any source.
        targets: by the framework's names.
        names: the state's name of each of the framework's names; those left out are the same in both.
        axes: for a framework's name, how the state's array is transposed to have the framework's layout.
        scope: the optimizer's; None for an optimizer without a global second moment, such as AdamW.
        values: whether the parameters' values are wanted, and not only the optimizer's state.
        cast: whether values may be rounded to the framework's types.
        groups: the number of the framework's parameter groups.
        others: parameters of the model that are not in the optimizer: names and axes for them are passed over.

    Raises:
        StateError: listing every entry that is missing, superfluous, or of a wrong shape or type.
    """
    renamed, problems = _rename(list(targets), names, others)
    problems += _axes_problems({name: target.shape for name, target in targets.items()}, axes, others)
    if problems:
        raise StateError("The state does not fit", problems)
    if scope is not None:
        state = state.with_global(scope)
    wanted = set(renamed.values())
    problems += [f"superfluous: {name!r} is no parameter here" for name in state.parameters if name not in wanted]
    entries: dict[str, Entry] = {}
    rows = []
    for name, target in targets.items():
        origin = renamed[name]
        called = f"{name!r}" if name == origin else f"{name!r} (in the state {origin!r})"
        if origin not in state.parameters:
            problems.append(f"missing: {called}")
            continue
        entry = state.parameters[origin]
        order = tuple(axes[name]) if axes and name in axes else None
        if entry.exp_avg.ndim != len(target.shape) or _shape(entry, order) != target.shape:
            problems.append(
                f"shape: {called} has {target.shape}; in the state {entry.exp_avg.shape}"
                + (f", with axes {order} {_shape(entry, order)}" if order and _fits(entry, order) else "")
            )
            continue
        if values and entry.param is None:
            problems.append(f"missing: the value of {called} (values=False imports the optimizer's state alone)")
        entry = _transposed(entry if values else replace(entry, param=None), order)
        for slot, array in entry.slots().items():
            if not cast and not _holds(target.dtypes[slot], array):
                problems.append(
                    f"type: {slot} of {called} is {target.dtypes[slot]}, which does not hold its {array.dtype} "
                    "values (cast=True rounds them)"
                )
        entries[name] = entry
        rows.append((name, origin, target.shape, order))
    numbers = []
    for i in range(groups):
        members = {renamed[name] for name, target in targets.items() if target.group == i}
        pairs = {(g.global_exp_avg_sq, g.global_step) for g in state.groups if groups == 1 or members & set(g.params)}
        if len(pairs) > 1:
            problems.append(
                f"groups: {len(pairs)} global second moments in the state, {sorted(pairs, key=str)}, for one"
            )
        numbers.append(min(pairs, key=str) if pairs else (0.0, 0))
    if problems:
        raise StateError("The state does not fit", problems)
    return Fitted(entries, numbers, state.skipped, Report(rows, list(state.notes)))


def plain_hyperparameters(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the rule's hyperparameters that are plain data: numbers, and schedules of `ada2ms.core`."""
    kept: dict[str, Any] = {}
    for name in vars(DEFAULTS):
        value = values.get(name)
        if isinstance(value, AdaptivitySchedule):
            kept[name] = value
        elif value is not None and not callable(value):
            kept[name] = float(value)
    return kept


class Layer(NamedTuple):
    """A layer with parameters of its own.

    Attributes:
        called: what an error calls it.
        prefix: what its parameters' names begin with.
        params: the rest of their names.
        kind: "dense", "conv", "conv_transpose", "embedding" or "norm"; None if it is not plain.
        roles: of each parameter, such as "kernel".
        axes: how an array of the state is transposed to have the framework's layout.
    """

    called: str
    prefix: str
    params: list[str]
    kind: str | None
    roles: Mapping[str, str]
    axes: Mapping[str, tuple[int, ...]] = {}


def number_layers(layers: Iterable[Layer], names: Mapping[str, str] | None, axes: Axes) -> Mappings:
    """Names of a model's parameters by the positions, kinds and roles of its layers, such as `2.dense.kernel`.

    Those in `names` are called as they are there; a layer without others has no number.
    """
    by_hand = dict(names or {})
    mappings: Mappings = {"names": by_hand.copy(), "axes": {name: tuple(order) for name, order in (axes or {}).items()}}
    problems, number = [], 0
    for layer in layers:
        params = [name for name in layer.params if layer.prefix + name not in by_hand]
        strange = [name for name in params if layer.kind is None or name not in layer.roles]
        if strange:
            problems.append(f"{layer.called}, which has {', '.join(strange)}")
            continue
        for name in params:
            mappings["names"][layer.prefix + name] = f"{number}.{layer.kind}.{layer.roles[name]}"
            if name in layer.axes:
                mappings["axes"].setdefault(layer.prefix + name, layer.axes[name])
        number += bool(params)
    if problems:
        raise StateError("These layers are not plain; give names= and, where layouts differ, axes= for them", problems)
    return mappings


def _rename(own: list[str], names: Names, others: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """The state's name of each of a framework's names, and what is wrong with the mapping."""
    problems = []
    if callable(names):
        renamed = {name: names(name) for name in own}
    else:
        known = {*own, *others}
        problems += [f"names: there is no parameter {name!r} here" for name in names or {} if name not in known]
        renamed = {name: (names or {}).get(name, name) for name in own}
    by_name: dict[str, list[str]] = {}
    for name, other in renamed.items():
        by_name.setdefault(other, []).append(name)
    problems += [f"names: {same} are all called {other!r}" for other, same in by_name.items() if len(same) > 1]
    return renamed, problems


def _axes_problems(shapes: Mapping[str, tuple[int, ...]], axes: Axes, others: Collection[str]) -> list[str]:
    return [
        f"axes: there is no parameter {name!r} here"
        if name not in shapes
        else f"axes: {tuple(order)!r} of {name!r} is no order of its {len(shapes[name])} axes"
        for name, order in (axes or {}).items()
        if (name not in shapes and name not in others)
        or (name in shapes and sorted(order) != list(range(len(shapes[name]))))
    ]


def _inverse(axes: Axes, name: str) -> tuple[int, ...] | None:
    return tuple(int(i) for i in np.argsort(axes[name])) if axes and name in axes else None


def _transposed(entry: Entry, order: tuple[int, ...] | None) -> Entry:
    if order is None:
        return entry
    moved: dict[str, Any] = {name: array.transpose(order) for name, array in entry.slots().items()}
    return replace(entry, **moved)


def _fits(entry: Entry, order: tuple[int, ...]) -> bool:
    return len(order) == entry.exp_avg.ndim


def _shape(entry: Entry, order: tuple[int, ...] | None) -> tuple[int, ...]:
    shape = entry.exp_avg.shape
    return shape if order is None or not _fits(entry, order) else tuple(shape[i] for i in order)


def _holds(dtype: str, array: Array) -> bool:
    """Whether a type, by its name, holds all values of an array exactly. (NumPy has no bfloat16.)"""
    if dtype == "bfloat16":
        narrow = array.astype(np.float32)
        bits = np.where(np.isnan(narrow), np.float32(0), narrow).view(np.uint32)
        return bool(np.array_equal(narrow, array, equal_nan=True) and not np.any(bits & 0xFFFF))
    if np.dtype(dtype).kind != "c" and array.dtype.kind == "c":
        return False
    with np.errstate(over="ignore"):
        return np.dtype(dtype) == array.dtype or np.array_equal(array.astype(dtype), array, equal_nan=True)


def _entry_problems(entry: Entry) -> list[str]:
    problems = []
    shape = np.shape(entry.exp_avg)
    for name, array in entry.slots().items():
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fc" or array.dtype.itemsize < 4:
            kind = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
            problems.append(f"Invalid {name}: {kind} (must be an array of at least float32)")
        elif array.shape != shape:
            problems.append(f"Invalid {name}: shape {array.shape} (must be that of exp_avg, {shape})")
        elif name == "exp_avg_sq" and np.any(array.view(array.real.dtype) < 0):
            problems.append(f"Invalid {name}: an entry is {array.view(array.real.dtype).min()} (must be at least 0)")
    if not _is_count(entry.step):
        problems.append(f"Invalid step: {entry.step!r} (must be an integer, at least 0)")
    if entry.global_exp_avg_sq is not None and not _is_moment(entry.global_exp_avg_sq):
        problems.append(f"Invalid global_exp_avg_sq: {entry.global_exp_avg_sq!r} (must be a number, at least 0)")
    return problems


def _group_problems(group: Group) -> list[str]:
    problems = []
    for name, value in group.hyper.items():
        if name not in vars(DEFAULTS):
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
