"""Names for the parameters of known layers, the same in every framework: the position, kind and role of each.

A framework maps its layers to these; so each layer is described once in a framework, and not once for every other.
Shapes in the state:

    dense            kernel (inputs, outputs), bias (outputs,); lora_a (inputs, rank), lora_b (rank, outputs)
    einsum           kernel (shared axes, inputs, outputs), bias: a dense kernel for each place of an axis
    conv             kernel (height, width, inputs, outputs), bias; and so conv_transpose
    embedding        table (words, features)
    norm             scale, bias; and, as extras, the running mean and var of a BatchNorm
    prelu            slope, without axes of size 1
    attention        query.kernel, key.kernel, value.kernel (inputs, heads, features of a head), query.bias (heads,
                     features of a head) and so on; out.kernel (heads, features of a head, outputs), out.bias
    lstm, gru, rnn   of each gate (lstm: i, f, g, o; gru: r, z, n; rnn has one, without a name) kernel (inputs, units),
                     recurrent_kernel (units, units), and bias, or input_bias and recurrent_bias (units,)

Of a recurrent layer that goes backwards the kind is `lstm_backwards` and so on; of a GRU that resets before the product
with its recurrent kernel, `gru_reset_before`.
"""

from collections.abc import Collection, Iterable, Mapping
from math import prod
from typing import Final, Literal, NamedTuple, TypedDict

import numpy as np

from ada2ms.core.state.errors import StateError
from ada2ms.core.state.layout import Axes, Cut
from ada2ms.core.state.model import Array

GATES: Final = {"lstm": ("i.", "f.", "g.", "o."), "gru": ("r.", "z.", "n."), "rnn": ("",)}
OWN: Final = "own"  # the kind of a user's layer, whose parameters have meaning by their names alone

Role = str | tuple[str, ...]
LayerNames = Mapping[str, Role] | Literal["auto"] | None


class Mappings(TypedDict):
    """How a model's parameters are called, and laid out, in a state: arguments of `export_state` and `import_state`."""

    names: dict[str, Role]
    axes: dict[str, tuple[int, ...] | Cut]
    extras: dict[str, str]


class Layer(NamedTuple):
    """A layer with parameters of its own.

    Attributes:
        called: what an error calls it.
        prefix: what its parameters' names begin with.
        params: the rest of their names.
        kind: one of the above; OWN or None if it is not known.
        roles: of each parameter, such as "kernel"; several of one that consists of several of the state's arrays.
        axes: how an array of the state is transposed to have the framework's layout, or how that is cut; see `Layout`.
        statistics: what it keeps besides its parameters, by their whole names: the role of each, such as "mean".
        path: where in the model it is, by the names of attributes with dots between them.
    """

    called: str
    prefix: str
    params: list[str]
    kind: str | None
    roles: Mapping[str, Role]
    axes: Mapping[str, tuple[int, ...] | Cut] = {}
    path: str = ""
    statistics: Mapping[str, str] = {}


def number_layers(layers: Iterable[Layer], names: LayerNames, axes: Axes) -> Mappings:
    """Names of a model's parameters by the positions, kinds and roles of its layers, such as `2.dense.kernel`.

    Parameters in `names` have the names given there; a layer that has no others is not numbered. With `names="auto"`,
    layers have their paths for numbers, `encoder.0.dense.kernel`, and a user's own layers their parameters' names.

    Raises:
        StateError: naming every layer that is not known.
    """
    by_path = names == "auto"
    given = {} if names is None or isinstance(names, str) else dict(names)
    mappings: Mappings = {
        "names": given.copy(),
        "axes": {name: order if callable(order) else tuple(order) for name, order in (axes or {}).items()},
        "extras": {},
    }
    problems, number = [], 0
    for layer in layers:
        params = [name for name in layer.params if layer.prefix + name not in given]
        own = by_path and layer.kind == OWN
        strange = [name for name in params if not own and name not in layer.roles]
        if strange:
            problems.append(f"{layer.called}, which has {', '.join(strange)}")
            continue
        place = ".".join(filter(None, [layer.path if by_path else str(number), None if own else layer.kind]))
        for name in params:
            role = name.rpartition("/")[2] if own else layer.roles[name]
            parts = tuple(f"{place}.{part}" if place else part for part in ((role,) if isinstance(role, str) else role))
            mappings["names"][layer.prefix + name] = parts[0] if len(parts) == 1 else parts
            if name in layer.axes:
                mappings["axes"].setdefault(layer.prefix + name, layer.axes[name])
        mappings["extras"] |= {name: f"{place}.{role}" for name, role in layer.statistics.items() if params}
        number += bool(params)
    if problems:
        raise StateError("These layers are not plain; give names= and, where layouts differ, axes= for them", problems)
    return mappings


def reasons(here: Collection[str], there: Collection[str]) -> list[str]:
    """Why names that are wanted here are not those of a state, where layers explain it."""
    missing, superfluous = sorted(set(here) - set(there)), sorted(set(there) - set(here))
    found = []
    for these, those, text in (
        (superfluous, missing, "two in the state, one here"),
        (missing, superfluous, "one in the state, two here"),
    ):
        layers = {name.rpartition(".")[0] for name in these if name.endswith("_bias")}
        if layer := next((name for name in those if name.endswith(".bias") and name[: -len(".bias")] in layers), None):
            found.append(f"biases: of {layer!r} {text}; {_TWO_BIASES}")
    kinds_here, kinds_there = _kinds(here), _kinds(there)
    different = [place for place in kinds_here if kinds_here[place] != kinds_there.get(place, kinds_here[place])]
    if different:
        place = min(different)
        found.append(
            f"layers: the first that differs is {place}: {kinds_there[place]!r} in the state, {kinds_here[place]!r} "
            "here (both models must have the same layers in the same order)"
        )
    return found


_TWO_BIASES: Final = (
    "where two that are added are both trained, each takes every step, so that the sum goes twice as far, and the "
    "entries count twice in the mean of g*g: no single bias does the same (freeze one at zero before plain_layers: "
    "requires_grad_(False) and zero_() on torch's bias_hh)"
)


def _kinds(names: Iterable[str]) -> dict[int, str]:
    """Of each numbered layer."""
    numbered = [name.split(".") for name in names]
    return {int(parts[0]): parts[1] for parts in numbered if parts[0].isdecimal() and len(parts) > 2}


class Product(NamedTuple):
    """An einsum of inputs and a kernel, as a matrix product.

    Attributes:
        kind: "dense", or "einsum" with a matrix for each place of an axis.
        order: of the kernel's axes: shared with inputs and outputs, summed over, and of the outputs alone.
        counts: how many there are of each of these three.
    """

    kind: str
    order: tuple[int, ...]
    counts: tuple[int, int, int]

    def kernel(self, array: Array) -> list[Array]:
        """A kernel as (shared axes, inputs, outputs)."""
        array, (shared, summed, _) = array.transpose(self.order), self.counts
        sizes = array.shape
        return [array.reshape(*sizes[:shared], prod(sizes[shared : shared + summed]), prod(sizes[shared + summed :]))]

    def bias(self, array: Array) -> list[Array]:
        """A bias as (outputs,), unless there are shared axes."""
        return [array.ravel() if self.kind == "dense" else array]


def einsum_product(equation: str) -> Product | None:
    """An einsum of inputs and a kernel as a product; None if it is not one."""
    operands, _, result = equation.replace(" ", "").replace("...", "").partition("->")
    inputs, _, kernel = operands.partition(",")
    shared = [x for x in result if x in kernel and x in inputs]
    summed = [x for x in inputs if x in kernel and x not in result]
    outputs = [x for x in result if x in kernel and x not in inputs]
    axes = [*shared, *summed, *outputs]
    if sorted(axes) != sorted(kernel) or len(set(inputs)) < len(inputs) or not summed:
        return None
    counts = len(shared), len(summed), len(outputs)
    return Product("einsum" if shared else "dense", tuple(kernel.index(x) for x in axes), counts)


def gates(kind: str, role: str, order: str = "", *, axis: int = -1) -> tuple[tuple[str, ...], Cut]:
    """The roles of an array that has all the gates of a recurrent layer along an axis, and how it is cut into them.

    Args:
        kind: of `GATES`.
        role: "kernel", "bias" and so on.
        order: of the gates in the array, such as "zrn"; the state's if left out.
        axis: along which they are.
    """
    names = tuple(f"{gate}." for gate in order) or GATES[kind]
    return tuple(name + role for name in names), lambda array: np.split(array, len(names), axis)
