"""How the arrays of a framework lie in those of a state: under other names, with other axes, several of them in one.

An array here may be one of the state's as it is, one of them transposed, or several of them: the packed projections of
an attention, the gates of a recurrent layer. Its layout is then a function that cuts it, by indexing, transposing and
reshaping alone. It is applied to an array of positions, which shows that it loses nothing, and gives the way back.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from ada2ms.core.state.model import Array, Entry, Group, State

Name: TypeAlias = str | Sequence[str]
Names = Mapping[str, Name] | Callable[[str], Name] | None
Cut = Callable[[Array], Sequence[Array]]
Axes = Mapping[str, Sequence[int] | Cut] | None


_ONE_MOMENT = "and with scope='tensor' each tensor has one global second moment, which cannot be cut or joined"


class Layout(NamedTuple):
    """Of one array of a framework.

    Attributes:
        names: of the arrays of the state that it consists of.
        shape: here.
        axes: how the state's array is transposed to have this shape, or a function from an array here to those of the
            state; None if both are the same.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    axes: tuple[int, ...] | Cut | None = None

    def fault(self) -> str:
        """Why it is no layout; empty if it is one."""
        if not callable(self.axes) and len(self.names) != 1:
            return f"consists of {list(self.names)} in the state: its axes must be a function that cuts it"
        if not callable(self.axes):
            is_order = self.axes is None or sorted(self.axes) == list(range(len(self.shape)))
            return "" if is_order else f"{self.axes!r} is no order of its {len(self.shape)} axes"
        try:
            parts = self._positions()
        except (ValueError, TypeError, IndexError) as error:
            return f"the function cannot cut an array of {self.shape} ({error})"
        if len(parts) != len(self.names):
            return f"the function cuts it into {len(parts)} arrays (must be {len(self.names)}: {list(self.names)})"
        if not _is_permutation(parts, prod(self.shape)):
            return "the function does not give every entry once (must only index, transpose and reshape)"
        return ""

    def shapes(self) -> list[tuple[int, ...]]:
        """Of the arrays in the state."""
        if callable(self.axes):
            return [part.shape for part in self._positions()]
        return [tuple(self.shape[i] for i in np.argsort(self.axes or range(len(self.shape))))]

    def apart(self, arrays: Mapping[str, Array]) -> list[dict[str, Array]]:
        """The state's arrays of each of these here, such as a parameter and its moments."""
        if callable(self.axes):
            positions = self._positions()
            return [{slot: np.asarray(x.ravel()[part]) for slot, x in arrays.items()} for part in positions]
        order = self.axes
        return [{slot: x if order is None else x.transpose(np.argsort(order)) for slot, x in arrays.items()}]

    def together(self, parts: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
        """The arrays here of those of the state."""
        order, first = self.axes, parts[0]
        if not callable(order):
            return {slot: x if order is None else x.transpose(order) for slot, x in first.items()}
        positions = self._positions()
        found = {}
        for slot in first:
            array = np.empty(prod(self.shape), np.result_type(*(part[slot] for part in parts)))
            for position, part in zip(positions, parts, strict=True):
                array[position] = part[slot]
            found[slot] = array.reshape(self.shape)
        return found

    def _positions(self) -> list[Array]:
        assert callable(self.axes)
        return [np.asarray(x) for x in self.axes(np.arange(prod(self.shape)).reshape(self.shape))]


def _is_permutation(parts: Sequence[Array], size: int) -> bool:
    """Whether arrays of positions have each position below `size` once."""
    seen = np.zeros(size, bool)
    for part in parts:
        if part.dtype != np.intp or (part.size and not (part.min() >= 0 and part.max() < size)):
            return False
        seen[part] = True
    return sum(part.size for part in parts) == size and bool(seen.all())


def layouts(
    shapes: Mapping[str, tuple[int, ...]], names: Names, axes: Axes, others: Collection[str] = ()
) -> tuple[dict[str, Layout], list[str]]:
    """The layout of each array of a framework, and what is wrong with names and axes."""
    problems = []
    if callable(names):
        renamed = {name: names(name) for name in shapes}
    else:
        known = {*shapes, *others}
        problems += [f"names: there is no parameter {name!r} here" for name in names or {} if name not in known]
        renamed = {name: (names or {}).get(name, name) for name in shapes}
    found = {}
    for name, shape in shapes.items():
        order = (axes or {}).get(name)
        called = renamed[name]
        parts = (called,) if isinstance(called, str) else tuple(called)
        found[name] = Layout(parts, shape, order if order is None or callable(order) else tuple(order))
    by_name: dict[str, list[str]] = {}
    for name, layout in found.items():
        for part in layout.names:
            by_name.setdefault(part, []).append(name)
    problems += [f"names: {same} are all called {part!r}" for part, same in by_name.items() if len(same) > 1]
    problems += [
        f"axes: there is no parameter {name!r} here" for name in axes or {} if name not in shapes and name not in others
    ]
    problems += [f"axes: {name!r}: {fault}" for name, layout in found.items() if (fault := layout.fault())]
    return found, problems


def cut(entry: Entry, layout: Layout) -> dict[str, Entry]:
    """The state's entries, by name, of one here.

    A tensor with a global second moment of its own stays one tensor: it is not cut, but its parts are put in an order
    that is the same everywhere.

    Raises:
        ValueError: such parts have different shapes.
    """
    if len(layout.names) == 1 or entry.global_exp_avg_sq is None:
        parts = layout.apart(entry.slots())
        return {name: _with(entry, slots) for name, slots in zip(layout.names, parts, strict=True)}
    if len(set(layout.shapes())) > 1:
        raise ValueError(
            f"its parts {list(layout.names)} have different shapes, and with scope='tensor' are one tensor"
        )
    ordered = [
        part for _, part in sorted(zip(layout.names, layout.apart(entry.slots()), strict=True), key=lambda x: x[0])
    ]
    stacked = {slot: np.stack([part[slot] for part in ordered]) for slot in entry.slots()}
    return {joined_name(layout.names): _with(entry, stacked)}


def arranged(state: State, found: Mapping[str, Layout]) -> tuple[State, list[str]]:
    """The state with a framework's names and arrays, and what of it is missing, superfluous or of another shape."""
    group_of = {name: i for i, group in enumerate(state.groups) for name in group.params}
    entries: dict[str, Entry] = {}
    params: list[list[str]] = [[] for _ in state.groups]
    problems, used = [], set()
    for name, layout in found.items():
        parts = _parts(state, layout)
        used.update(parts)
        if problem := _misfit(state, name, layout, parts):
            problems.append(problem)
            continue
        own = sorted({group_of[part] for part in parts})
        if any(_shared(state.groups[i]) != _shared(state.groups[own[0]]) for i in own):
            problems.append(f"groups: {called(name, layout)} consists of parts whose groups differ")
        entries[name] = _joined([state.parameters[part] for part in parts], layout)
        params[own[0]].append(name)
    superfluous = [name for name in state.parameters if name not in used]
    groups = [replace(group, params=own) for group, own in zip(state.groups, params, strict=True)]
    problems = [f"superfluous: {name!r} is no parameter here" for name in superfluous] + problems
    return replace(state, parameters=entries, groups=groups, receipt=None), problems


def called(name: str, layout: Layout) -> str:
    """A parameter by its name here, and in the state where that is another."""
    origin = " + ".join(layout.names)
    return f"{name!r}" if name == origin else f"{name!r} (in the state {origin!r})"


def in_state(renamed: Mapping[str, Name], names: Iterable[str]) -> list[str]:
    """All that parameters here are called in the state, in order."""
    every = [renamed[name] for name in names]
    return [part for x in every for part in ([x] if isinstance(x, str) else x)]


def names_here(names: Mapping[str, Name]) -> dict[str, str]:
    """What a framework calls each parameter of a state, or that of which it is a part."""
    found: dict[str, str] = {}
    for name, origin in names.items():
        parts = [origin] if isinstance(origin, str) else origin
        found |= dict.fromkeys([*parts, joined_name(parts)], name)
    return found


def joined_name(names: Iterable[str]) -> str:
    """In a state of scope "tensor", of a tensor of which other frameworks may have the parts."""
    return "+".join(sorted(names))


def _parts(state: State, layout: Layout) -> list[str]:
    """What of the state a layout takes: its parts, or the one tensor that has them all."""
    joined = joined_name(layout.names)
    if len(layout.names) > 1 and joined in state.parameters:
        return [joined]
    return [name for name in layout.names if name in state.parameters]


def _misfit(state: State, name: str, layout: Layout, parts: list[str]) -> str:
    """Why a layout's parts cannot be joined; empty if they can."""
    missing = [part for part in layout.names if part not in parts] if parts != [joined_name(layout.names)] else []
    what = called(name, layout)
    if missing:
        whole = next((name for name in state.parameters if "+" in name and missing[0] in name.split("+")), None)
        if whole is not None:
            return f"scope: {what} is but a part of the tensor {whole!r}, {_ONE_MOMENT}"
        absent = "" if len(layout.names) == 1 else f", of which the state has no {missing}"
        return f"missing: {what}{absent}"
    entries = [state.parameters[part] for part in parts]
    shapes = layout.shapes()
    if len(shapes) > 1 and len(parts) == 1:
        shapes = [(len(shapes), *shapes[0])]
    for part, entry, shape in zip(parts, entries, shapes, strict=True):
        here = entry.exp_avg.shape
        if here == shape:
            continue
        if isinstance(layout.axes, tuple) and len(here) == len(shape):
            there = f", with axes {layout.axes} {tuple(here[i] for i in layout.axes)}"
            return f"shape: {what} has {layout.shape}; in the state {here}{there}"
        if callable(layout.axes):
            return f"shape: {what} has {layout.shape}, of which {shape} for {part!r}; in the state {here}"
        return f"shape: {what} has {layout.shape}; in the state {here}"
    if len(parts) > 1 and state.scope == "tensor":
        return f"scope: {what} consists of several tensors, {_ONE_MOMENT}"
    if len({entry.step for entry in entries}) > 1:
        return f"counts: {what} consists of parts with different counts of updates: {[x.step for x in entries]}"
    if len({frozenset(entry.slots()) for entry in entries}) > 1:
        return f"missing: {what}: only some of its parts have a value, or a compensation"
    return ""


def _joined(entries: list[Entry], layout: Layout) -> Entry:
    """The entry here of those of the state, of one of which the parts are stacked in the order of their names."""
    parts = [entry.slots() for entry in entries]
    if len(layout.names) > 1 and len(entries) == 1:
        places = np.argsort(np.argsort(layout.names))
        parts = [{slot: x[i] for slot, x in parts[0].items()} for i in places]
    return _with(entries[0], layout.together(parts))


def _with(entry: Entry, slots: dict[str, Array]) -> Entry:
    changed: dict[str, Any] = slots
    return replace(entry, **changed)


def _shared(group: Group) -> tuple[Any, ...]:
    return group.hyper, group.global_exp_avg_sq, group.global_step
