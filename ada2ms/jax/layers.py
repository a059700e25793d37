"""Ready mappings of plain layers."""

from collections.abc import Iterator, Mapping
from typing import Any

from ada2ms._extras import require
from ada2ms.core.state import Axes, Layer, Mappings, number_layers

_KINDS = {
    "dense": (("Linear",), {"kernel": "kernel", "bias": "bias"}),
    "conv": (("Conv",), {"kernel": "kernel", "bias": "bias"}),
    "conv_transpose": (("ConvTranspose",), {"kernel": "kernel", "bias": "bias"}),
    "embedding": (("Embed",), {"embedding": "table"}),
    "norm": (("LayerNorm", "RMSNorm", "GroupNorm", "BatchNorm"), {"scale": "scale", "bias": "bias"}),
}


def plain_layers(model: Any, *, names: Mapping[str, str] | None = None, axes: Axes = None) -> Mappings:
    """`names` and `axes` for a flax.nnx model of plain layers, whose parameters are `nnx.state(model, nnx.Param)`.

    The same model in another framework maps to the same state. Layers are numbered in the order in which attributes
    were set: `0.conv.kernel`, `0.conv.bias`, `1.norm.scale`, `2.dense.kernel`, `3.embedding.table`. Kernels are
    (height, width, inputs, outputs) and (inputs, outputs), as in flax. So the models must have the same layers in the
    same order; what a Linear reads from a flattened image must be in the same order, too, which no mapping can see.

    Args:
        model: of Linear, Conv, ConvTranspose (with `transpose_kernel=True`: other frameworks have no kernel that is
            turned round), Embed and normalisations.
        names: names in the state for parameters of layers that are not plain, as for `export_state`; or for others.
        axes: layouts of these, where they differ, as there.

    Raises:
        StateError: naming every other layer that has parameters without a name in `names`.
        ImportError: flax is not installed.
    """
    require("flax", "jax")
    from flax import nnx

    # Of a shared parameter's paths, `nnx.state` has only the one that comes first alphabetically.
    paths = {id(x): "/".join(map(str, path)) for path, x in nnx.iter_graph(model) if isinstance(x, nnx.Param)}
    layers = []
    seen: set[int] = set()
    for path, module in _modules(model, "", nnx, set()):
        params = {name: value for name, value in vars(module).items() if isinstance(value, nnx.Param)}
        own = {name: paths[id(x)] for name, x in params.items() if x[...] is not None and id(x) not in seen}
        seen.update(map(id, params.values()))  # a shared parameter belongs to the first layer that has it
        if own:
            kind, roles = next(
                (
                    (kind, roles)
                    for kind, (names, roles) in _KINDS.items()
                    if isinstance(module, tuple(getattr(nnx, name) for name in names))
                ),
                (None, {}),
            )
            if kind == "conv_transpose" and not module.transpose_kernel:
                kind = None
            called, prefix = f"{path!r}, {type(module).__name__}", f"{path}/" if path else ""
            if all(name == prefix + own_name for own_name, name in own.items()):
                layers.append(Layer(called, prefix, list(own), kind, roles))
            else:
                roles = {name: roles[own_name] for own_name, name in own.items() if own_name in roles}
                layers.append(Layer(called, "", list(own.values()), kind, roles))
    return number_layers(layers, names, axes)


def _modules(module: Any, path: str, nnx: Any, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """A module and those in it, each once, in the order in which they were set; flax itself walks them by name."""
    if id(module) in seen:
        return
    seen.add(id(module))
    yield path, module
    for name, value in vars(module).items():
        inner = {name: value}
        if isinstance(value, (list, tuple, nnx.List)):
            inner = {f"{name}/{i}": x for i, x in enumerate(value)}
        elif isinstance(value, (dict, nnx.Dict)) and not name.startswith("_"):
            inner = {f"{name}/{key}": x for key, x in dict(value.items()).items()}
        for key, each in inner.items():
            if isinstance(each, nnx.Module) and not isinstance(each, (nnx.List, nnx.Dict)):
                yield from _modules(each, f"{path}/{key}" if path else key, nnx, seen)
