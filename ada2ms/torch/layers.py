"""Ready mappings of known layers."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from ada2ms.core.state import OWN, Axes, Cut, Layer, LayerNames, Mappings, Role, gates, number_layers

Array = Any
_NORMS = tuple(
    getattr(nn, name)
    for name in ("LayerNorm", "RMSNorm", "GroupNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm")
)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED_CONVS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_RECURRENT = {"lstm": (nn.LSTM, nn.LSTMCell), "gru": (nn.GRU, nn.GRUCell), "rnn": (nn.RNN, nn.RNNCell)}


class _Kind(NamedTuple):
    """What some parameters of a module are: its kind, and the role and layout of each."""

    kind: str | None
    params: Mapping[str, tuple[Role, tuple[int, ...] | Cut | None]]


def plain_layers(model: nn.Module, *, names: LayerNames = None, axes: Axes = None) -> Mappings:
    """`names` and `axes` for a model of known layers, which the same model in another framework maps to the same state.

    Layers are numbered in the order in which modules are registered (within a TransformerEncoderLayer or DecoderLayer,
    in which data reach them): `0.conv.kernel`, `0.conv.bias`, `1.norm.scale`,
    `2.dense.kernel`, `3.embedding.table`, `4.attention.query.kernel`, `5.lstm.i.kernel`. `ada2ms.core.state.layers` has
    all of them, with their shapes. So the models must have the same layers in the same order; what a Linear reads from
    a flattened image must be in the same order, too, which no mapping can see.

    Each layer and direction of a recurrent module has a number. Of two biases that are trained no other framework makes
    one; see the table in the docs. Where one is frozen and zero, the other is the only one.

    Args:
        model: of Linear, Conv, ConvTranspose, Embedding, normalisations, PReLU, MultiheadAttention, Transformer's
            layers, LSTM, GRU, RNN and their cells; frozen ones have numbers, too.
        names: names in the state for parameters of layers that are not known, as for `export_state`; or for others.
            With "auto", layers are called by their paths in the model instead of by numbers, and parameters of your
            own modules by theirs.
        axes: layouts of these, where they differ, as there.

    Raises:
        StateError: naming every other layer that has parameters without a name in `names`.
        TypeError: for what is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Invalid model: {type(model).__name__} (must be a torch.nn.Module)")
    layers: list[Layer] = []
    seen: set[nn.Parameter] = set()  # a tied one belongs to the first that has it
    for path, module in _modules(model, "", set()):
        whole = isinstance(module, nn.MultiheadAttention)  # which has its projections in a module of its own
        own = {name: p for name, p in module.named_parameters(recurse=whole) if p not in seen}
        seen.update(module.parameters(recurse=whole))
        if not own:
            continue
        called, prefix = f"{path!r}, {type(module).__name__}", f"{path}." if path else ""
        foreign = not type(module).__module__.startswith("torch.")
        kinds = list(_kinds(module)) or [_Kind(OWN if foreign else None, {})]
        known = {name for kind in kinds for name in kind.params}
        for i, (kind, params) in enumerate(kinds):
            members = [name for name in own if name in params or (i == 0 and name not in known)]
            roles = {name: role for name, (role, _) in params.items()}
            moved = {name: order for name, (_, order) in params.items() if order is not None}
            if members:
                place = f"{path}.{i}" if len(kinds) > 1 else path
                layers.append(Layer(called, prefix, members, kind, roles, moved, place, _statistics(module, prefix)))
    return number_layers(layers, names, axes)


def _modules(module: nn.Module, path: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """A module and those in it, each once, as they are registered; those of Transformer's layers as data reach them."""
    if module in seen:
        return
    seen.add(module)
    yield path, module
    inner = dict(module.named_children())
    if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        blocks = [("self_attn",), ("multihead_attn",), ("linear1", "linear2")]
        blocks = [block for block in blocks if block[0] in inner]
        for i, block in enumerate(blocks, start=1):
            norm = f"norm{i}"
            for name in (norm, *block) if module.norm_first else (*block, norm):
                inner[name] = inner.pop(name)
    for name, each in inner.items():
        yield from _modules(each, f"{path}.{name}" if path else name, seen)


def _kinds(module: nn.Module) -> Iterator[_Kind]:
    """The kind of a module; of a recurrent one, of each layer and direction."""
    if isinstance(module, (nn.Linear, *_CONVS, *_TRANSPOSED_CONVS)):
        kind = "dense" if isinstance(module, nn.Linear) else "conv"
        n = module.weight.ndim
        # (outputs, inputs, height, width) of (height, width, inputs, outputs); both the other way if transposed
        kernel = ("kernel", (n - 1, n - 2, *range(n - 2)))
        kind = "conv_transpose" if isinstance(module, _TRANSPOSED_CONVS) else kind
        yield _Kind(kind, {"weight": kernel, "bias": ("bias", None)})
    elif isinstance(module, nn.Embedding):
        yield _Kind("embedding", {"weight": ("table", None)})
    elif isinstance(module, _NORMS):
        yield _Kind("norm", {"weight": ("scale", None), "bias": ("bias", None)})
    elif isinstance(module, nn.PReLU):
        yield _Kind("prelu", {"weight": ("slope", _squeezed)})
    elif isinstance(module, nn.MultiheadAttention):
        yield _attention(module)
    elif isinstance(module, nn.RNNBase):
        directions = ("", "_reverse") if module.bidirectional else ("",)
        for suffix in (f"_l{i}{direction}" for i in range(module.num_layers) for direction in directions):
            yield _recurrent(module, suffix)
    elif isinstance(module, nn.RNNCellBase):
        yield _recurrent(module, "")


def _attention(module: nn.MultiheadAttention) -> _Kind:
    """Packed projections of (3 * heads * features, inputs), or one by one; each of (inputs, heads, features)."""
    heads, features = module.num_heads, module.head_dim

    def kernel(w: Array) -> Array:
        return w.T.reshape(-1, heads, features)

    def bias(b: Array) -> Array:
        return b.reshape(heads, features)

    packed = ("query", "key", "value")
    return _Kind(
        "attention",
        {
            "in_proj_weight": (tuple(f"{x}.kernel" for x in packed), lambda w: [kernel(x) for x in np.split(w, 3)]),
            "in_proj_bias": (tuple(f"{x}.bias" for x in packed), lambda b: [bias(x) for x in np.split(b, 3)]),
            **{f"{x[0]}_proj_weight": (f"{x}.kernel", lambda w: [kernel(w)]) for x in packed},
            **{f"bias_{x[0]}": (f"{x}.appended", lambda b: [bias(b)]) for x in ("key", "value")},
            "out_proj.weight": ("out.kernel", lambda w: [w.T.reshape(heads, features, -1)]),
            "out_proj.bias": ("out.bias", None),
        },
    )


def _recurrent(module: nn.Module, suffix: str) -> _Kind:
    """Gates one under the other, (gates * units, inputs); each of (inputs, units)."""
    kind = next(kind for kind, classes in _RECURRENT.items() if isinstance(module, classes))
    input_bias, recurrent_bias = (getattr(module, f"{name}{suffix}", None) for name in ("bias_ih", "bias_hh"))
    # A bias that stays zero adds nothing: the other is the layer's only one.
    input_name = "bias" if _stays_zero(recurrent_bias) else "input_bias"
    alone = _stays_zero(input_bias) and input_name != "bias" and kind != "gru"  # which resets the recurrent one as well
    recurrent_name = "bias" if alone else "recurrent_bias"
    roles = {
        "weight_ih": "kernel",
        "weight_hh": "recurrent_kernel",
        "bias_ih": input_name,
        "bias_hh": recurrent_name,
    }
    params: dict[str, Any] = {}
    for name, role in roles.items():
        parts, cut = gates(kind, role, axis=0)
        params[f"{name}{suffix}"] = parts, partial(_transposed_parts, cut=cut)
    params[f"weight_hr{suffix}"] = "projection_kernel", (1, 0)  # of an LSTM with proj_size
    return _Kind(f"{kind}_backwards" if suffix.endswith("_reverse") else kind, params)


def _transposed_parts(array: Array, cut: Cut) -> list[Array]:
    return [x.T for x in cut(array)]


def _statistics(module: nn.Module, prefix: str) -> dict[str, str]:
    """Running mean and variance, and their count where the next mean depends on it."""
    if not isinstance(module, _BATCH_NORMS) or not module.track_running_stats:
        return {}
    counted = {"num_batches_tracked": "batches"} if module.momentum is None else {}
    return {prefix + name: role for name, role in {"running_mean": "mean", "running_var": "var", **counted}.items()}


def _stays_zero(bias: nn.Parameter | None) -> bool:
    return bias is not None and not bias.requires_grad and not bias.any()


def _squeezed(array: Array) -> list[Array]:
    return [array.squeeze()]
