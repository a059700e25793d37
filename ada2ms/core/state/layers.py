"""Names for the parameters of plain layers, the same in every framework: the position, kind and role of each."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypedDict

from ada2ms.core.state.errors import StateError
from ada2ms.core.state.fit import Axes


class Mappings(TypedDict):
    """How a model's parameters are called, and laid out, in a state: arguments of `export_state` and `import_state`."""

    names: dict[str, str]
    axes: dict[str, tuple[int, ...]]


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

    Parameters in `names` have the names given there; a layer that has no others is not numbered.
    """
    given = dict(names or {})
    mappings: Mappings = {"names": given.copy(), "axes": {name: tuple(order) for name, order in (axes or {}).items()}}
    problems, number = [], 0
    for layer in layers:
        params = [name for name in layer.params if layer.prefix + name not in given]
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
