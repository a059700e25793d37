"""Ready mappings of plain layers."""

from collections.abc import Iterator

import keras

from ada2ms.core.state import Layer, Mappings, number_layers

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
    "conv": ("Conv1D", "Conv2D", "Conv3D"),
    "embedding": ("Embedding",),
    "norm": ("LayerNormalization", "RMSNormalization", "GroupNormalization", "BatchNormalization"),
}


def plain_layers(model: keras.Model) -> Mappings:
    """`names` and `axes` for a model of plain layers, which the same model in another framework maps to the same state.

    Layers are numbered in the order of `model.layers`: `0.conv.kernel`, `0.conv.bias`, `1.norm.scale`,
    `2.dense.kernel`, `3.embedding.table`. Kernels are (height, width, inputs, outputs) and (inputs, outputs), as in
    Keras. So the models must have the same layers in the same order; what a Dense reads from a flattened image must
    be in the same order, too, which no mapping can see.

    Raises:
        StateError: naming every layer with weights that is not plain: neither Dense, Conv, Embedding nor a
            normalisation. Write `names` and `axes` by hand for those.
    """
    layers = []
    for layer in _leaves(model):
        variables = layer.trainable_variables
        own = [v.path for v in variables]
        if own:
            roles = {v.path: _ROLES[v.name] for v in variables if v.name in _ROLES}
            layers.append(Layer(f"{layer.name!r}, {type(layer).__name__}", "", own, _kind(layer), roles))
    return number_layers(layers)


def _leaves(layer: keras.Layer) -> Iterator[keras.Layer]:
    inner = getattr(layer, "layers", None)
    if inner:
        for each in inner:
            yield from _leaves(each)
    else:
        yield layer


def _kind(layer: keras.Layer) -> str | None:
    if isinstance(layer, keras.layers.EinsumDense) and not _is_dense(layer.equation):
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
