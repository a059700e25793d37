"""Small models, each of one kind of layer, in every framework that has it: `ROWS`, those of the table in the docs."""

from collections.abc import Callable
from typing import Any

import handoff_attention
from handoff_making import TIME, WIDTH, WORDS, Row, floats, keras_model, new, nnx_model, torch_model, vectors, words
from handoff_recurrent import recurrent_rows

Array = Any


# Tied embeddings


def torch_tied() -> Any:
    from torch import nn

    model = torch_model(
        lambda self, x: self.head(self.mix(self.table(x))),
        table=nn.Embedding(WORDS, WIDTH),
        mix=nn.Linear(WIDTH, WIDTH),
        head=nn.Linear(WIDTH, WORDS, bias=False),
    )
    model.head.weight = model.table.weight
    return model


def keras_tied() -> Any:
    import keras

    table, mix = keras.layers.ReversibleEmbedding(WORDS, WIDTH), keras.layers.Dense(WIDTH)
    return keras_model(lambda x: table(mix(table(x)), reverse=True), (TIME,), "int32")


def nnx_tied() -> Any:
    from flax import nnx

    return nnx_model(
        lambda self, x: self.table.attend(self.mix(self.table(x))),
        table=nnx.Embed(WORDS, WIDTH, **new("embedding_init")),
        mix=nnx.Linear(WIDTH, WIDTH, **new("kernel_init")),
    )


# Products with kernels of several axes


def torch_products() -> Any:
    from torch import nn

    return torch_model(lambda self, x: self.b(self.a(x).tanh()), a=nn.Linear(WIDTH, 6), b=nn.Linear(6, WIDTH))


def keras_products() -> Any:
    import keras

    dense = keras.layers.EinsumDense
    first = dense("btw,hwd->bthd", (TIME, 2, 3), bias_axes="hd", activation="tanh")
    second = dense("bthd,hdw->btw", (TIME, WIDTH), bias_axes="w")
    return keras_model(lambda x: second(first(x)))


def nnx_products() -> Any:
    from flax import nnx

    return nnx_model(
        lambda self, x: self.b(nnx.tanh(self.a(x))),
        a=nnx.LinearGeneral(WIDTH, (2, 3), **new("kernel_init")),
        b=nnx.Einsum("...hd,whd->...w", (WIDTH, 2, 3), (WIDTH,), **new("kernel_init")),
    )


def keras_kernels_of_an_axis() -> Any:
    import keras

    return keras_model(keras.layers.EinsumDense("btw,two->bto", (TIME, WIDTH), bias_axes="to"))


def nnx_kernels_of_an_axis() -> Any:
    from flax import nnx

    return nnx.Einsum("btw,otw->bto", (WIDTH, TIME, WIDTH), (TIME, WIDTH), **new("kernel_init"))


# One slope for all


def torch_prelu() -> Any:
    from torch import nn

    return torch_model(lambda self, x: self.b(self.a(x)), a=nn.Linear(WIDTH, WIDTH), b=nn.PReLU())


def keras_prelu() -> Any:
    import keras

    layers = keras.layers
    return keras_model(lambda x: layers.PReLU(shared_axes=[1, 2])(layers.Dense(WIDTH)(x)))


def nnx_prelu() -> Any:
    from flax import nnx

    return nnx_model(
        lambda self, x: self.b(self.a(x)),
        a=nnx.Linear(WIDTH, WIDTH, **new("kernel_init")),
        b=nnx.PReLU(param_dtype=floats()),
    )


# LoRA: Keras has its pair in float32, whatever the layer has, and freezes the kernel; torch has none, and does it so


def torch_lora() -> Any:
    import torch
    from torch import nn

    base = nn.Linear(WIDTH, WIDTH, bias=False)
    base.weight.requires_grad_(False)
    base.weight.copy_(torch.eye(WIDTH))
    return torch_model(
        lambda self, x: self.base(x) + self.lora_B(self.lora_A(x)),
        base=base,
        lora_A=nn.Linear(WIDTH, 2, bias=False),
        lora_B=nn.Linear(2, WIDTH, bias=False),
    )


def keras_lora() -> Any:
    import keras

    dense = keras.layers.Dense(WIDTH, use_bias=False, kernel_initializer="identity")
    model = keras_model(dense)
    dense.enable_lora(2)
    return model


def nnx_linear(kind: str, **options: Any) -> Any:
    import jax.numpy as jnp
    from flax import nnx

    def identity(key: Any, shape: Any, dtype: Any) -> Any:
        return jnp.eye(*shape, dtype=dtype)

    linear = getattr(nnx, kind)
    return linear(WIDTH, WIDTH, use_bias=False, kernel_init=identity, rngs=nnx.Rngs(0), **options)


def nnx_lora() -> Any:
    return nnx_linear("LoRALinear", lora_rank=2)


def nnx_lora_around() -> Any:
    from flax import nnx

    return nnx.LoRA(WIDTH, 2, WIDTH, base_module=nnx_linear("Linear"), rngs=nnx.Rngs(0))


def _row(kind: str, data: Callable[[int], tuple[Array, Array]] = vectors, *frameworks: str) -> Row:
    every = frameworks or ("torch", "keras", "jax")
    prefixes = {"torch": "torch", "keras": "keras", "jax": "nnx"}
    models = {**vars(handoff_attention), **globals()}
    return Row({name: models[f"{prefixes[name]}_{kind}"] for name in every}, data)


_LORA: dict[str, Any] = {
    "dtype": "float32",
    "trained": "LoRAParam",
    "given": {
        "torch": {
            "names": {f"lora_{x}.weight": f"0.dense.lora_{x.lower()}" for x in "AB"},
            "axes": {f"lora_{x}.weight": (1, 0) for x in "AB"},
        }
    },
}
ROWS: dict[str, Row] = {
    "attention": _row("attention"),
    "attention, keys of other width, no biases": _row("cross_attention"),
    "grouped-query attention": _row("grouped_attention", vectors, "keras", "jax"),
    "transformer encoder layer": _row("encoder_layer"),
    "transformer decoder layer": _row("decoder_layer"),
    "tied embedding": _row("tied", words),
    "dense, several axes": _row("products"),
    "einsum with a kernel for each place": _row("kernels_of_an_axis", vectors, "keras", "jax"),
    "PReLU": _row("prelu"),
    "LoRA": Row({"torch": torch_lora, "keras": keras_lora, "jax": nnx_lora}, vectors, **_LORA),
    "LoRA around a layer": Row({"keras": keras_lora, "jax": nnx_lora_around}, vectors, **_LORA),
    **recurrent_rows(),
}
