"""Ready mappings of known layers."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import keras
import numpy as np

from ada2ms.core.state import (
    OWN,
    Axes,
    Cut,
    Layer,
    LayerNames,
    Mappings,
    Role,
    einsum_product,
    gates,
    number_layers,
)

Array = Any
Params = dict[str, tuple[Role, tuple[int, ...] | Cut | None]]
_ROLES: dict[str, Role] = {
    "kernel": "kernel",
    "bias": "bias",
    "embeddings": "table",
    "reverse_embeddings": "reverse_kernel",
    "gamma": "scale",
    "scale": "scale",
    "beta": "bias",
}
_STATISTICS = {"moving_mean": "mean", "moving_variance": "var"}
_KINDS = {
    "dense": ("Dense",),
    "conv": ("Conv1D", "Conv2D", "Conv3D", "DepthwiseConv1D", "DepthwiseConv2D"),
    "conv_transpose": ("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"),
    "embedding": ("Embedding",),
    "norm": ("LayerNormalization", "RMSNormalization", "GroupNormalization", "BatchNormalization"),
    "prelu": ("PReLU",),
    "attention": ("MultiHeadAttention", "GroupQueryAttention"),
    "lstm": ("LSTMCell",),
    "gru": ("GRUCell",),
    "rnn": ("SimpleRNNCell",),
}
_CLASSES = {
    kind: tuple(getattr(keras.layers, name) for name in names if hasattr(keras.layers, name))
    for kind, names in _KINDS.items()
}


class _Place(NamedTuple):
    """A layer where it stands in a model."""

    layer: keras.Layer
    variables: list[Any]  # its own
    path: str
    backwards: bool  # as a recurrent layer goes


def plain_layers(model: keras.Model, *, names: LayerNames = None, axes: Axes = None) -> Mappings:
    """`names` and `axes` for a model of known layers, which the same model in another framework maps to the same state.

    Layers are numbered in the order of `model.layers`: `0.conv.kernel`, `0.conv.bias`, `1.norm.scale`,
    `2.dense.kernel`, `3.embedding.table`, `4.attention.query.kernel`, `5.lstm.i.kernel`. `ada2ms.core.state.layers` has
    all of them, with their shapes. So the models must have the same layers in the same order; what a Dense reads from a
    flattened image must be in the same order, too, which no mapping can see.

    Args:
        model: of Dense, EinsumDense, Conv, DepthwiseConv (each channel once), ConvTranspose, Embedding,
            normalisations, PReLU, MultiHeadAttention, GroupQueryAttention, LSTM, GRU, SimpleRNN and their cells, also
            within layers of your own and with `enable_lora`; frozen ones have numbers, too.
        names: names in the state for parameters of layers that are not known, as for `export_state`; or for others.
            With "auto", layers are called by their paths in the model instead of by numbers, and weights of your own
            layers by their names. A path is of attributes, and in Sequential and functional models of layers' names.
        axes: layouts of these, where they differ, as there.

    Raises:
        StateError: naming every other layer that has weights without a name in `names`.
        TypeError: for what is no layer.
    """
    if not isinstance(model, keras.Layer):
        raise TypeError(f"Invalid model: {type(model).__name__} (must be a keras.Model or keras.Layer)")
    layers = []
    for place in _places(model, set(), "", False):
        kind, params = _described(place)
        # Neither running statistics nor seeds
        own = [v.path for v in place.variables if v.trainable or v.path in params]
        if own:
            roles = {path: role for path, (role, _) in params.items()}
            moved = {path: order for path, (_, order) in params.items() if order is not None}
            called = f"{place.layer.name!r}, {type(place.layer).__name__}"
            statistics = {
                v.path: _STATISTICS[v.name] for v in place.variables if kind == "norm" and v.name in _STATISTICS
            }
            layers.append(Layer(called, "", own, kind, roles, moved, place.path, statistics))
    return number_layers(layers, names, axes)


def _places(layer: keras.Layer, seen: set[int], path: str, backwards: bool) -> Iterator[_Place]:
    """A layer and those within it, each with its own variables; a shared one belongs to the first that has it."""
    inner = [] if isinstance(layer, _CLASSES["attention"]) else _inner(layer)
    below = {id(v) for _, each in inner for v in each.variables}
    own = [v for v in layer.variables if id(v) not in below | seen]
    seen.update(map(id, own))
    yield _Place(layer, own, path, backwards)
    for name, each in inner:
        yield from _places(each, seen, ".".join(filter(None, [path, name])), getattr(each, "go_backwards", backwards))


def _inner(layer: keras.Layer) -> list[tuple[str, keras.Layer]]:
    """The layers directly within a layer, with their names in it."""
    if isinstance(layer, keras.Model):
        inner = layer.layers
    else:
        inner = list(layer._flatten_layers(include_self=False, recursive=False))
    if isinstance(layer, keras.Sequential) or hasattr(layer, "operations"):
        return [(each.name, each) for each in inner]
    attributes: dict[int, str] = {}
    own = vars(layer)  # on torch, Keras' layers are modules, which have their layers in another place
    for name, value in {**own, **own.get("_modules", {})}.items():
        every = {name: value}
        if isinstance(value, (list, tuple)):
            every = {f"{name}.{i}": x for i, x in enumerate(value)}
        elif isinstance(value, dict):
            every = {f"{name}.{key}": x for key, x in value.items()}
        for key, x in every.items():
            if isinstance(x, keras.Layer) and not name.startswith("_"):
                attributes.setdefault(id(x), key)
    # As torch's layers, in which there are no cells, and which number their directions
    attributes |= {id(getattr(layer, name, None)): other for name, other in _RECURRENT_PATHS.items()}
    return [(attributes.get(id(each), each.name), each) for each in inner]


_RECURRENT_PATHS = {"cell": "", "forward_layer": "0", "backward_layer": "1"}


def _described(place: _Place) -> tuple[str | None, Params]:
    """A layer's kind, and by the path of each variable its role and layout."""
    layer, variables = place.layer, {v.name: v for v in place.variables}
    if isinstance(layer, keras.layers.EinsumDense):
        return _einsum(layer, variables)
    if getattr(layer, "depth_multiplier", 1) != 1:  # no transposition, but another shape elsewhere
        return None, {}
    kind = next((kind for kind, classes in _CLASSES.items() if isinstance(layer, classes)), None)
    if kind == "attention":
        return kind, _attention(place.variables)
    if kind in ("lstm", "gru", "rnn"):
        before = "_reset_before" if kind == "gru" and not layer.reset_after else ""
        return f"{kind}{before}" + "_backwards" * place.backwards, _recurrent(kind, variables)
    if kind == "prelu":
        return kind, {v.path: ("slope", _squeezed) for name, v in variables.items() if name == "alpha"}
    if kind is None:
        foreign = not type(layer).__module__.startswith("keras.")
        return OWN if foreign else None, {}
    roles = {**_ROLES, **_lora(layer)}
    known: Params = {v.path: (roles[name], None) for name, v in variables.items() if name in roles}
    if hasattr(layer, "depth_multiplier"):  # has (height, width, channels, 1) of (..., 1, channels)
        n = len(variables["kernel"].shape)
        known[variables["kernel"].path] = "kernel", (*range(n - 2), n - 1, n - 2)
    return kind, known


def _einsum(layer: keras.layers.EinsumDense, variables: dict[str, Any]) -> tuple[str | None, Params]:
    product = einsum_product(layer.equation)
    if product is None:
        return None, {}
    layouts: Params = {"kernel": ("kernel", product.kernel), "bias": ("bias", product.bias)}
    if len(product.order) == 2:
        layouts |= {name: (role, product.kernel) for name, role in _lora(layer).items()}
    return product.kind, {v.path: layouts[name] for name, v in variables.items() if name in layouts}


def _lora(layer: keras.Layer) -> dict[str, Role]:
    """Roles of its pair; of one whose product is scaled, which no other framework does, roles of their own."""
    scale = getattr(layer, "lora_alpha", None) or 1
    scaled = "" if scale == (getattr(layer, "lora_rank", None) or 1) else "_scaled"
    of = "embeddings" if isinstance(layer, keras.layers.Embedding) else "kernel"
    return {f"lora_{of}_{x}": f"lora_{x}{scaled}" for x in "ab"}


def _attention(variables: list[Any]) -> Params:
    """Kernels are those of the state, but for outputs of several axes."""
    known: Params = {}
    for v in variables:
        projection, name = v.path.split("/")[-2:]
        if name not in ("kernel", "bias"):
            continue
        if projection in ("query", "key", "value", "gate"):
            known[v.path] = f"{projection}.{name}", None
        elif projection == "attention_output":
            flat = _flat_outputs if name == "kernel" else _flat
            known[v.path] = f"out.{name}", flat
    return known


def _recurrent(kind: str, variables: dict[str, Any]) -> Params:
    order = {"lstm": "ifgo", "gru": "zrn", "rnn": ""}[kind]
    known: Params = {
        v.path: gates(kind, name, order) for name, v in variables.items() if name in ("kernel", "recurrent_kernel")
    }
    bias = variables.get("bias")
    if bias is not None:
        known[bias.path] = gates(kind, "bias", order)
        if len(bias.shape) == 2:  # of the inputs, and of the recurrent product
            pair = [gates(kind, f"{name}_bias", order) for name in ("input", "recurrent")]
            known[bias.path] = pair[0][0] + pair[1][0], lambda b: [x for i in (0, 1) for x in pair[i][1](b[i])]
    return known


def _squeezed(array: Array) -> list[Array]:
    return [array.squeeze()]


def _flat(array: Array) -> list[Array]:
    return [array.ravel()]


def _flat_outputs(array: Array) -> list[Array]:
    return [array.reshape(*array.shape[:2], int(np.prod(array.shape[2:])))]
