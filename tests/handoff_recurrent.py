"""Recurrent layers, the same in every framework that has them."""

from typing import Any

from handoff_making import WIDTH, Row, floats, forward, keras_model, last, new, torch_model

# Recurrent layers of 6 units; torch has but one bias if the other is frozen at zero


def torch_recurrent(kind: str, *, one_bias: bool = False, **options: Any) -> Any:
    import torch
    from torch import nn

    inner = getattr(nn, kind)(WIDTH, 6, batch_first=True, **options)
    for name, p in inner.named_parameters():
        if one_bias and name.startswith("bias_hh"):
            p.requires_grad_(False)
            torch.nn.init.zeros_(p)
    return torch_model(lambda self, x: self.inner(x)[0], inner=inner)


def keras_recurrent(kind: str, *, layers: int = 1, bidirectional: bool = False, units: int = 6, **options: Any) -> Any:
    import keras

    def call(x: Any) -> Any:
        for _ in range(layers):
            layer = getattr(keras.layers, kind)(units, return_sequences=True, **options)
            x = (keras.layers.Bidirectional(layer) if bidirectional else layer)(x)
        return x

    return keras_model(call)


def nnx_recurrent(kind: str, *, layers: int = 1, bidirectional: bool = False) -> Any:
    from flax import nnx

    def recurrent(width: int) -> Any:
        return nnx.RNN(
            getattr(nnx, kind)(width, 6, dtype=floats(), **new("kernel_init", "recurrent_kernel_init")),
            rngs=nnx.Rngs(0),
        )

    stack = [
        nnx.Bidirectional(recurrent(width), recurrent(width), rngs=nnx.Rngs(0)) if bidirectional else recurrent(width)
        for width in (WIDTH, 12)[:layers]
    ]
    return nnx.Sequential(*stack)


def recurrent_rows() -> dict[str, Row]:
    rows = {}
    for kind, keras_kind, cell in (("LSTM", "LSTM", "OptimizedLSTMCell"), ("RNN", "SimpleRNN", "SimpleCell")):
        rows[kind] = Row(
            {
                "torch": lambda kind=kind: torch_recurrent(kind, one_bias=True),
                "keras": lambda kind=keras_kind: keras_recurrent(kind),
                "jax": lambda cell=cell: nnx_recurrent(cell),
            },
            forward,
        )
    deep = {"bidirectional": True}
    rows["LSTM, 2 layers in both directions"] = Row(
        {
            "torch": lambda: torch_recurrent("LSTM", one_bias=True, num_layers=2, **deep),
            "keras": lambda: keras_recurrent("LSTM", layers=2, **deep),
            "jax": lambda: nnx_recurrent("LSTMCell", layers=2, **deep),
        },
        last,
    )
    rows["LSTM, without biases"] = Row(
        {
            "torch": lambda: torch_recurrent("LSTM", bias=False),
            "keras": lambda: keras_recurrent("LSTM", use_bias=False),
        },
        forward,
    )
    rows["GRU, two biases"] = Row(
        {"torch": lambda: torch_recurrent("GRU"), "keras": lambda: keras_recurrent("GRU")}, forward
    )
    rows["GRU, one bias"] = Row(
        {"torch": lambda: torch_recurrent("GRU", one_bias=True), "jax": lambda: nnx_recurrent("GRUCell")}, forward
    )
    return rows
