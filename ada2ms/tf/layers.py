"""Ready mappings of plain layers."""

from collections.abc import Iterator, Mapping
from typing import Any

import keras

from ada2ms.core.state import Axes, Layer, Mappings, number_layers

_ROLES = {
    "kernel": "kernel",
    "bias": "bias",
    "embeddings": "table",
    "gamma": "scale",
    "scale": "scale",
    "beta": "bias",
}
_KINDS = {
    "dense": ("Dense", "EinsumDense"),
    "conv": ("Conv1D", "Conv2D", "Conv3D", "DepthwiseConv1D", "DepthwiseConv2D"),
    "conv_transpose": ("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"),
    "embedding": ("Embedding",),
    "norm": ("LayerNormalization", "RMSNormalization", "GroupNormalization", "BatchNormalization"),
}


def plain_layers(model: keras.Model, *, names: Mapping[str, str] | None = None, axes: Axes = None) -> Mappings:
    """`names` and `axes` for a model of plain layers, which the same model in another framework maps to the same state.

    Layers are numbered in the order of `model.layers`: `0.conv.kernel`, `0.conv.bias`, `1.norm.scale`,
    `2.dense.kernel`, `3.embedding.table`. Kernels are (height, width, inputs, outputs) and (inputs, outputs), as in
    Keras. So the models must have the same layers in the same order; what a Dense reads from a flattened image must
    be in the same order, too, which no mapping can see.

    Args:
        model: of Dense, Conv, DepthwiseConv (each channel once), ConvTranspose, Embedding and normalisations, also
            within layers of your own; frozen ones have numbers, too.
        names: names in the state for parameters of layers that are not plain, as for `export_state`; or for others.
        axes: layouts of these, where they differ, as there.

    Raises:
        StateError: naming every other layer that has weights without a name in `names`.
    """
    layers = []
    for layer, variables in _layers(model, set()):
        # Neither running statistics nor seeds
        own = [v.path for v in variables if v.trainable or v.name in _ROLES]
        if own:
            roles = {v.path: _ROLES[v.name] for v in variables if v.name in _ROLES}
            each = getattr(layer, "depth_multiplier", None)  # has (height, width, channels, 1) of (..., 1, channels)
            kernels = {v.path: len(v.shape) for v in variables if each and v.name == "kernel"}
            moved = {path: (*range(n - 2), n - 1, n - 2) for path, n in kernels.items()}
            layers.append(Layer(f"{layer.name!r}, {type(layer).__name__}", "", own, _kind(layer), roles, moved))
    return number_layers(layers, names, axes)


def _layers(layer: keras.Layer, seen: set[int]) -> Iterator[tuple[keras.Layer, list[Any]]]:
    """A layer and those within it, each with its own variables; a shared one belongs to the first that has it."""
    model = isinstance(layer, keras.Model)
    inner = layer.layers if model else list(layer._flatten_layers(include_self=False, recursive=False))
    below = {id(v) for each in inner for v in each.variables}
    own = [v for v in layer.variables if id(v) not in below | seen]
    seen.update(map(id, own))
    yield layer, own
    for each in inner:
        yield from _layers(each, seen)


def _kind(layer: keras.Layer) -> str | None:
    if isinstance(layer, keras.layers.EinsumDense) and not _is_dense(layer.equation):
        return None
    if getattr(layer, "depth_multiplier", 1) != 1:  # no transposition, but another shape elsewhere
        return None
    for kind, names in _KINDS.items():
        if isinstance(layer, tuple(getattr(keras.layers, name) for name in names if hasattr(keras.layers, name))):
            return kind
    return None


def _is_dense(equation: str) -> bool:
    """Whether an einsum is a product with a kernel of (inputs, outputs)."""
    operands, result = equation.replace(" ", "").split("->")
    kernel = operands.split(",")[1]
    return len(kernel) == 2 and kernel[0] not in result and kernel[1] in result
