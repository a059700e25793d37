"""What `plain_layers` knows of equinox: its layers are attributes of modules, in the order of their fields."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from ada2ms.core.state import OWN, Cut, Layer, Role, gates

Array = Any
Params = dict[str, tuple[Role, tuple[int, ...] | Cut | None]]
_NORMS = ("LayerNorm", "RMSNorm", "GroupNorm", "BatchNorm")


def layers_of(model: Any) -> Iterator[Layer]:
    """The layers of an `equinox.Module`, whose parameters are `equinox.filter(model, equinox.is_array)`."""
    import equinox

    for attributes, module in _modules(model, "", equinox):
        own = _arrays(module, equinox)
        if own:
            kind, known = _described(module, own, equinox)
            prefix = f"{attributes}/" if attributes else ""
            roles = {name: role for name, (role, _) in known.items()}
            moved = {name: order for name, (_, order) in known.items() if order is not None}
            path = attributes.replace("layers/", "").replace("/", ".")
            called = f"{attributes!r}, {type(module).__name__}"
            yield Layer(called, prefix, own, kind, roles, moved, path)


def _modules(module: Any, attributes: str, equinox: Any) -> Iterator[tuple[str, Any]]:
    yield attributes, module
    if isinstance(module, equinox.nn.MultiheadAttention):
        return
    for field in fields(module):
        value = getattr(module, field.name, None)
        inner = {field.name: value}
        if isinstance(value, (list, tuple)):
            inner = {f"{field.name}/{i}": x for i, x in enumerate(value)}
        elif isinstance(value, dict):
            inner = {f"{field.name}/{key}": x for key, x in value.items()}
        for key, each in inner.items():
            if isinstance(each, equinox.Module):
                yield from _modules(each, f"{attributes}/{key}" if attributes else key, equinox)


def _arrays(module: Any, equinox: Any) -> list[str]:
    """A module's own arrays by their paths in it; of an attention, those of its projections."""
    named = {field.name: getattr(module, field.name, None) for field in fields(module)}
    own = [name for name, value in named.items() if equinox.is_array(value)]
    if isinstance(module, equinox.nn.MultiheadAttention):
        inner = {name: x for name, x in named.items() if isinstance(x, equinox.nn.Linear)}
        own += [f"{name}/{key}" for name, x in inner.items() for key in _arrays(x, equinox)]
    return own


def _described(module: Any, own: list[str], equinox: Any) -> tuple[str | None, Params]:
    """A module's kind, and the role and layout of each of its arrays."""
    nn = equinox.nn
    if isinstance(module, nn.Linear):
        return "dense", {"weight": ("kernel", (1, 0)), "bias": ("bias", None)}
    if isinstance(module, nn.Conv):
        n = module.weight.ndim
        return "conv", {"weight": ("kernel", (n - 1, n - 2, *range(n - 2))), "bias": ("bias", _flat)}
    if isinstance(module, nn.Embedding):
        return "embedding", {"weight": ("table", None)}
    if isinstance(module, tuple(getattr(nn, name) for name in _NORMS)):
        return "norm", {"weight": ("scale", None), "bias": ("bias", None)}
    if isinstance(module, nn.PReLU):
        return "prelu", {"negative_slope": ("slope", _squeezed)}
    if isinstance(module, nn.MultiheadAttention):
        return "attention", _attention(module.num_heads)
    if isinstance(module, nn.LSTMCell):
        return "lstm", _recurrent("lstm", {"bias": gates("lstm", "bias")})
    if isinstance(module, nn.GRUCell):  # has two biases in the gate that the reset gate is for, and one in others
        bias = ("r.bias", "z.bias", "n.input_bias"), gates("gru", "bias")[1]
        return "gru", _recurrent("gru", {"bias": bias, "bias_n": ("n.recurrent_bias", None)})
    return (None if type(module).__module__.startswith("equinox.") else OWN), {}


def _attention(heads: int) -> Params:
    def kernel(w: Array) -> list[Array]:
        return [w.T.reshape(w.shape[1], heads, -1)]

    def bias(b: Array) -> list[Array]:
        return [b.reshape(heads, -1)]

    params: Params = {}
    for name in ("query", "key", "value"):
        params |= {f"{name}_proj/weight": (f"{name}.kernel", kernel), f"{name}_proj/bias": (f"{name}.bias", bias)}
    params["output_proj/weight"] = "out.kernel", lambda w: [w.T.reshape(heads, -1, w.shape[0])]
    params["output_proj/bias"] = "out.bias", None
    return params


def _recurrent(kind: str, biases: Params) -> Params:
    """Gates one under the other, (gates * units, inputs), as in torch."""

    def turned(role: str) -> tuple[tuple[str, ...], Cut]:
        names, cut = gates(kind, role, axis=0)
        return names, lambda array: [x.T for x in cut(array)]

    return {"weight_ih": turned("kernel"), "weight_hh": turned("recurrent_kernel"), **biases}


def _flat(array: Array) -> list[Array]:
    return [array.ravel()]


def _squeezed(array: Array) -> list[Array]:
    return [array.squeeze()]
