"""Ready mappings of known layers."""

import sys
from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

from ada2ms._extras import require
from ada2ms.core.state import (
    OWN,
    Axes,
    Cut,
    Layer,
    LayerNames,
    Mappings,
    Role,
    StateError,
    einsum_product,
    gates,
    number_layers,
)
from ada2ms.jax.layers_equinox import layers_of

Array = Any
Params = dict[str, tuple[Role, tuple[int, ...] | Cut | None]]
_PLAIN: dict[str, tuple[tuple[str, ...], Params]] = {
    "dense": (("Linear",), {"kernel": ("kernel", None), "bias": ("bias", None)}),
    "conv": (("Conv",), {"kernel": ("kernel", None), "bias": ("bias", None)}),
    "conv_transpose": (("ConvTranspose",), {"kernel": ("kernel", None), "bias": ("bias", None)}),
    "embedding": (("Embed",), {"embedding": ("table", None)}),
    "norm": (
        ("LayerNorm", "RMSNorm", "GroupNorm", "BatchNorm"),
        {"scale": ("scale", None), "bias": ("bias", None)},
    ),
    "prelu": (("PReLU",), {"negative_slope": ("slope", None)}),
}
_ATTENTION: Params = {
    **{f"{x}/{y}": (f"{x}.{y}", None) for x in ("query", "key", "value", "out") for y in ("kernel", "bias")},
    **{f"{x}_ln/scale": (f"{x}_norm.scale", None) for x in ("query", "key")},
}
_LORA: Params = {x: (x, None) for x in ("lora_a", "lora_b")}
_CELLS = {"LSTMCell": "lstm", "OptimizedLSTMCell": "lstm", "GRUCell": "gru", "SimpleCell": "rnn"}


class _Place(NamedTuple):
    """A module where it stands in a model."""

    module: Any
    attributes: str  # those that lead to it
    path: str
    backwards: bool  # as a recurrent layer goes


def plain_layers(model: Any, *, names: LayerNames = None, axes: Axes = None) -> Mappings:
    """`names` and `axes` for a model of known layers, of flax.nnx or equinox.

    Their parameters are `nnx.state(model, nnx.Param)`, or `equinox.filter(model, equinox.is_array)`.

    The same model in another framework maps to the same state. Layers are numbered in the order in which attributes
    were set: `0.conv.kernel`, `0.conv.bias`, `1.norm.scale`, `2.dense.kernel`, `3.embedding.table`,
    `4.attention.query.kernel`, `5.lstm.i.kernel`. `ada2ms.core.state.layers` has all of them, with their shapes. So the
    models must have the same layers in the same order; what a Linear reads from a flattened image must be in the same
    order, too, which no mapping can see.

    Args:
        model: of Linear, LinearGeneral, Einsum, Conv, ConvTranspose (with `transpose_kernel=True`: other frameworks
            have no kernel that is turned round), Embed, normalisations, PReLU, MultiHeadAttention, LoRA, LoRALinear,
            and recurrent cells, in `RNN` and `Bidirectional` or by themselves; of equinox Linear, Conv, Embedding,
            normalisations, PReLU, MultiheadAttention, LSTMCell and GRUCell.
        names: names in the state for parameters of layers that are not known, as for `export_state`; or for others.
            With "auto", layers are called by their paths in the model instead of by numbers, and parameters of your
            own modules by theirs.
        axes: layouts of these, where they differ, as there.

    Raises:
        StateError: naming every other layer that has parameters without a name in `names`; or the modules whose
            attributes are no longer in the order in which they were set: flax sorts them whenever a model goes through
            `nnx.jit`, `nnx.grad`, `nnx.merge` or `nnx.clone`. Call this before, and keep the result.
        ImportError: flax is not installed.
        TypeError: for what is no module, such as parameters by themselves, whose own names serve.
    """
    equinox = sys.modules.get("equinox")
    if equinox is not None and isinstance(model, equinox.Module):
        return number_layers(layers_of(model), names, axes)
    return number_layers(_layers_of_nnx(model, numbered=names != "auto"), names, axes)


def _layers_of_nnx(model: Any, *, numbered: bool) -> list[Layer]:
    require("flax", "jax")
    from flax import nnx

    if not hasattr(model, "__dict__"):
        called = type(model).__name__
        raise TypeError(f"Invalid model: {called} (must be a flax.nnx or equinox module; parameters alone need none)")
    # Of a shared parameter's paths, `nnx.state` has only the one that comes first; flax 0.12.0 walks the others, too.
    paths: dict[int, str] = {}
    for path, x in nnx.iter_graph(model):
        if isinstance(x, nnx.Param):
            paths.setdefault(id(x), "/".join(map(str, path)))
    layers = []
    seen: set[int] = set()
    places = list(_places(_Place(model, "", "", _goes_backwards(None, "", model, nnx)), nnx, set()))
    if numbered:
        _require_order(places, nnx)
    for place in places:
        params = _params(place.module, nnx)
        own = {name: paths[id(x)] for name, x in params.items() if x[...] is not None and id(x) not in seen}
        seen.update(map(id, params.values()))  # a shared parameter belongs to the first layer that has it
        if own:
            kind, known = _described(place, own, nnx)
            called = f"{place.attributes!r}, {type(place.module).__name__}"
            prefix = f"{place.attributes}/" if place.attributes else ""
            if any(path != prefix + name for name, path in own.items()):
                known = {path: known[name] for name, path in own.items() if name in known}
                own, prefix = {path: path for path in own.values()}, ""
            roles = {name: role for name, (role, _) in known.items()}
            moved = {name: order for name, (_, order) in known.items() if order is not None}
            named = vars(place.module).items() if isinstance(place.module, nnx.BatchNorm) else ()
            statistics = {_joined("/", place.attributes, key): key for key, x in named if isinstance(x, nnx.BatchStat)}
            layers.append(Layer(called, prefix, list(own), kind, roles, moved, place.path, statistics))
    return layers


def _places(place: _Place, nnx: Any, seen: set[int]) -> Iterator[_Place]:
    """A module and those in it, each once, in the order in which they were set; flax itself walks them by name."""
    module, attributes, path, _ = place
    if id(module) in seen:
        return
    seen.add(id(module))
    yield place
    if _is_whole(module, nnx):
        return
    for name, inner in _inner(module, nnx).items():
        for key, each in inner.items():
            backwards = _goes_backwards(place, name, each, nnx)
            below = _below(module, key, nnx)
            yield from _places(
                _Place(each, _joined("/", attributes, key), _joined(".", path, below), backwards), nnx, seen
            )


def _inner(module: Any, nnx: Any) -> dict[str, dict[str, Any]]:
    """The modules directly in a module, by their paths in it, for each attribute that has some."""
    found = {}
    for name, value in vars(module).items():
        inner = {name: value}
        if isinstance(value, (list, tuple, nnx.List)):
            inner = {f"{name}/{i}": x for i, x in enumerate(value)}
        elif isinstance(value, (dict, nnx.Dict)) and not name.startswith("_"):
            inner = {f"{name}/{key}": x for key, x in dict(value.items()).items()}
        modules = {
            key: x for key, x in inner.items() if isinstance(x, nnx.Module) and not isinstance(x, (nnx.List, nnx.Dict))
        }
        if modules:
            found[name] = modules
    return found


def _require_order(places: list[_Place], nnx: Any) -> None:
    unknown = [(place, order) for place in places if (order := _without_order(place, nnx))]
    if unknown:
        raise StateError(
            "Layers are numbered in the order in which attributes were set, and nnx.jit, nnx.grad, nnx.merge and "
            "nnx.clone sort them (call plain_layers before, where the model is made, and keep what it returns; or with "
            'a new model of the same layers; or give names="auto")',
            [f"{place.attributes!r}, {type(place.module).__name__}: {', '.join(order)}" for place, order in unknown],
        )


def _without_order(place: _Place, nnx: Any) -> list[str]:
    """The attributes of a module that have parameters, if their order may be flax' own: that of the alphabet."""
    ordered = []
    for name, inner in _inner(place.module, nnx).items():
        held = [key for key, x in inner.items() if any(isinstance(y, nnx.Param) for _, y in nnx.iter_graph(x))]
        numbered = isinstance(getattr(place.module, name), (list, tuple, nnx.List))
        ordered += [name] * bool(held) if numbered else held
    if len(ordered) < 2 or ordered != sorted(ordered):
        return []
    return ordered if any(_is_sorted(x, nnx) for _, x in nnx.iter_graph(place.module)) else []


def _is_sorted(module: Any, nnx: Any) -> bool:
    """Whether the attributes of one of flax' own layers, which sets none of them in such an order, are sorted."""
    if not isinstance(module, nnx.Module) or not type(module).__module__.startswith("flax.nnx.nn."):
        return False
    every = {name: x for name, x in vars(module).items() if not name.startswith("_")}
    options = [name for name, x in every.items() if not isinstance(x, (nnx.Module, nnx.Variable))]
    if len(options) < 2:  # as PReLU has in flax 0.12.0, after its parameter, as the alphabet has it
        return False
    by_tree_map = options == sorted(options) and not isinstance(module, nnx.PReLU)  # whose options always are
    return by_tree_map or list(every) == sorted(every)


def _below(module: Any, key: str, nnx: Any) -> str:
    """A module's path in another, as torch would have it: Sequential is a list there, and nothing has cells."""
    if isinstance(module, nnx.Sequential):
        return key.removeprefix("layers/")
    if isinstance(module, (nnx.RNN, nnx.Bidirectional)):
        return {"cell": "", "forward_rnn": "0", "backward_rnn": "1"}.get(key, key)
    return key.replace("/", ".")


def _goes_backwards(place: _Place | None, name: str, each: Any, nnx: Any) -> bool:
    if place is not None and isinstance(place.module, nnx.Bidirectional):  # which says so when it calls them
        return name == "backward_rnn"
    return bool(each.reverse) if isinstance(each, nnx.RNN) else place is not None and place.backwards


def _is_whole(module: Any, nnx: Any) -> bool:
    """Whether a module's parameters are those of the modules in it."""
    if isinstance(module, nnx.LoRA):
        return module.base_module is None or isinstance(module.base_module, nnx.Linear)
    return isinstance(module, (nnx.MultiHeadAttention, nnx.LoRALinear, nnx.RNNCellBase))


def _params(module: Any, nnx: Any) -> dict[str, Any]:
    """The parameters of a module by their paths in it."""
    if _is_whole(module, nnx):
        # In the order in which they were set, which `iter_graph` does not keep
        inner = [(name, x) for name, x in vars(module).items() if isinstance(x, nnx.Module)]
        below = {f"{name}/{key}": x for name, each in inner for key, x in _params(each, nnx).items()}
    else:
        below = {}
    return {name: x for name, x in vars(module).items() if isinstance(x, nnx.Param)} | below


def _described(place: _Place, own: dict[str, str], nnx: Any) -> tuple[str | None, Params]:
    """A module's kind, and the role and layout of each of its parameters."""
    module = place.module
    if isinstance(module, nnx.MultiHeadAttention):
        return "attention", _ATTENTION
    if isinstance(module, nnx.LoRA):
        base = {f"base_module/{name}": known for name, known in _PLAIN["dense"][1].items()}
        return "dense", {**_LORA, **base}
    if isinstance(module, nnx.LoRALinear):
        return "dense", {**_PLAIN["dense"][1], **{f"lora/{name}": known for name, known in _LORA.items()}}
    if isinstance(module, nnx.RNNCellBase):
        return _recurrent(place, own, nnx)
    if isinstance(module, nnx.LinearGeneral):
        return _linear_general(module)
    if isinstance(module, nnx.Einsum):
        product = einsum_product(module.einsum_str or "")
        params: Params = (
            {} if product is None else {"kernel": ("kernel", product.kernel), "bias": ("bias", product.bias)}
        )
        return (None if product is None else product.kind), params
    if isinstance(module, nnx.ConvTranspose) and not module.transpose_kernel:
        return None, {}
    for kind, (classes, params) in _PLAIN.items():
        if isinstance(module, tuple(getattr(nnx, name) for name in classes)):
            return kind, params
    return (None if type(module).__module__.startswith("flax.") else OWN), {}


def _linear_general(module: Any) -> tuple[str | None, Params]:
    """Kernels of (batch axes, inputs, outputs), each of several axes, the inputs' in the order of `axis`."""
    axes, batch = _tuple(module.axis), len(module.batch_axis)
    if list(axes) != sorted(axes) or len({axis < 0 for axis in axes}) > 1:
        return None, {}
    inputs = len(axes)

    def kernel(array: Array) -> list[Array]:
        sizes = array.shape
        return [array.reshape(*sizes[:batch], prod(sizes[batch : batch + inputs]), prod(sizes[batch + inputs :]))]

    def bias(array: Array) -> list[Array]:
        return [array if batch else array.ravel()]

    return ("einsum" if batch else "dense"), {"kernel": ("kernel", kernel), "bias": ("bias", bias)}


def _recurrent(place: _Place, own: dict[str, str], nnx: Any) -> tuple[str | None, Params]:
    """Cells with an array for each gate, or one for all of them."""
    module = place.module
    name = next((name for name in _CELLS if isinstance(module, getattr(nnx, name))), None)
    if name is None:
        return (None if type(module).__module__.startswith("flax.") else OWN), {}
    kind = _CELLS[name]
    full = kind + "_residual" * bool(getattr(module, "residual", False)) + "_backwards" * place.backwards
    params: Params = {}
    for key in own:
        linear, _, what = key.partition("/")
        if what not in ("kernel", "bias"):
            continue
        recurrent = linear in ("dense_h", "hi", "hf", "hg", "ho")
        role = f"recurrent_{what}" if recurrent and what == "kernel" else what
        if linear in ("dense_i", "dense_h"):
            params[key] = gates(kind, role)
        elif linear in ("ii", "if_", "ig", "io", "hi", "hf", "hg", "ho"):
            params[key] = f"{linear[1]}.{role}", None
    return full, params


def _joined(separator: str, *parts: str) -> str:
    return separator.join(filter(None, parts))


def _tuple(x: Any) -> tuple[int, ...]:
    return (x,) if isinstance(x, int) else tuple(x)
