"""What travels with a state and is no part of it: arrays that an optimizer has no moments of, such as statistics."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ada2ms.core.state.errors import StateError
from ada2ms.core.state.layout import Axes, Layout, called, layouts
from ada2ms.core.state.model import Array, State

Extras = Mapping[str, str] | None


class Extra(NamedTuple):
    """An array of a framework that one of a state's extras may go to."""

    shape: tuple[int, ...]
    dtype: str


def portable_extras(values: Mapping[str, Array], extras: Extras, axes: Axes) -> dict[str, Array]:
    """Arrays of a framework by the state's names and in its layout.

    Args:
        values: by the framework's names; of those alone that are in `extras`, others stay behind.
        extras: the state's name of each of the framework's names.
        axes: as for `to_portable`.

    Raises:
        StateError: axes do not fit.
    """
    found, problems = _layouts({name: array.shape for name, array in values.items()}, extras, axes)
    if problems:
        raise StateError("The state cannot be exported", problems)
    moved: dict[str, Array] = {}
    for name, layout in found.items():
        parts = layout.apart({"": values[name]})
        moved |= {part: arrays[""] for part, arrays in zip(layout.names, parts, strict=True)}
    return {name: np.array(array) for name, array in moved.items()}


def fitted_extras(
    state: State, targets: Mapping[str, Extra], extras: Extras, axes: Axes
) -> tuple[dict[str, Array], dict[str, str], list[str], list[str]]:
    """What of a state's extras goes to a framework's arrays.

    Returns:
        Arrays by the framework's names; the state's name of each; what is of another shape; and notes of what goes
        nowhere, and of what nothing comes to.
    """
    found, problems = _layouts({name: target.shape for name, target in targets.items()}, extras, axes)
    arrays, origins, notes = {}, {}, []
    for name, layout in found.items():
        if not set(layout.names) <= set(state.extras):
            notes.append(f"{name!r} stays as it was here: the state has no extra {' + '.join(layout.names)!r}")
            continue
        parts = [state.extras[part] for part in layout.names]
        if [part.shape for part in parts] != layout.shapes():
            shapes = ", ".join(str(part.shape) for part in parts)
            problems.append(f"shape: the extra {called(name, layout)} has {layout.shape}; in the state {shapes}")
            continue
        arrays[name] = layout.together([{"": part} for part in parts])[""]
        origins[name] = " + ".join(layout.names)
    taken = {part for layout in found.values() for part in layout.names}
    notes += [
        f"the extra {name!r} goes nowhere: nothing here is called so" for name in state.extras if name not in taken
    ]
    return arrays, origins, problems, notes


def _layouts(shapes: Mapping[str, tuple[int, ...]], extras: Extras, axes: Axes) -> tuple[dict[str, Layout], list[str]]:
    known = {name: origin for name, origin in (extras or {}).items() if name in shapes}
    own = {name: order for name, order in (axes or {}).items() if name in known}
    return layouts({name: shapes[name] for name in known}, known, own)
