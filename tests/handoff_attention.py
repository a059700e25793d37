"""Attention and Transformer's layers, the same in every framework that has them."""

from typing import Any

from handoff_making import HEADS, WIDTH, keras_model, new, nnx_model, torch_model

# Attention; the keys and values of the second are of 4 features


def torch_attention(**options: Any) -> Any:
    from torch import nn

    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)
    return torch_model(lambda self, x: self.attention(x, x, x)[0], attention=attention)


def torch_cross_attention() -> Any:
    from torch import nn

    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, bias=False, kdim=4, vdim=4)
    return torch_model(lambda self, x: self.attention(x, x[..., :4], x[..., 4:])[0], attention=attention)


def keras_attention() -> Any:
    import keras

    return keras_model(lambda x: keras.layers.MultiHeadAttention(HEADS, WIDTH // HEADS)(x, x))


def keras_cross_attention() -> Any:
    import keras

    layer = keras.layers.MultiHeadAttention(HEADS, WIDTH // HEADS, use_bias=False)
    return keras_model(lambda x: layer(x, key=x[..., :4], value=x[..., 4:]))


def nnx_attention(**options: Any) -> Any:
    from flax import nnx

    # Without dropout, JAX takes the softmax in float32, whatever the type of the arrays is.
    exact = {"dropout_rate": 0.5, "deterministic": True}
    return nnx.MultiHeadAttention(
        options.pop("heads", HEADS), WIDTH, decode=False, **new("kernel_init"), **exact, **options
    )


def nnx_cross_attention() -> Any:
    attention = nnx_attention(in_kv_features=4, use_bias=False)
    return nnx_model(lambda self, x: self.attention(x, x[..., :4], x[..., 4:]), attention=attention)


def keras_grouped_attention() -> Any:
    import keras

    return keras_model(lambda x: keras.layers.GroupQueryAttention(4, 4, 2)(x, x))


def nnx_grouped_attention() -> Any:
    return nnx_attention(heads=4, num_kv_heads=2, qkv_features=16)


# Transformer's layers: the first normalises afterwards, the second before


def torch_encoder_layer() -> Any:
    from torch import nn

    return nn.TransformerEncoderLayer(WIDTH, HEADS, 6, dropout=0.0, batch_first=True)


def torch_decoder_layer() -> Any:
    from torch import nn

    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 6, dropout=0.0, batch_first=True, norm_first=True)
    return torch_model(lambda self, x: self.layer(x, x.flip(1)), layer=layer)


def keras_encoder_layer() -> Any:
    import keras

    layers = keras.layers

    def call(x: Any) -> Any:
        x = layers.LayerNormalization(epsilon=1e-5)(x + layers.MultiHeadAttention(HEADS, WIDTH // HEADS)(x, x))
        y = layers.Dense(WIDTH)(layers.Dense(6, activation="relu")(x))
        return layers.LayerNormalization(epsilon=1e-5)(x + y)

    return keras_model(call)


def keras_decoder_layer() -> Any:
    import keras

    layers = keras.layers

    def call(x: Any) -> Any:
        memory = keras.ops.flip(x, 1)
        y = layers.LayerNormalization(epsilon=1e-5)(x)
        x = x + layers.MultiHeadAttention(HEADS, WIDTH // HEADS)(y, y)
        y = layers.LayerNormalization(epsilon=1e-5)(x)
        x = x + layers.MultiHeadAttention(HEADS, WIDTH // HEADS)(y, memory)
        y = layers.LayerNormalization(epsilon=1e-5)(x)
        return x + layers.Dense(WIDTH)(layers.Dense(6, activation="relu")(y))

    return keras_model(call)


def nnx_encoder_layer() -> Any:
    from flax import nnx

    def call(self: Any, x: Any) -> Any:
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.linear2(nnx.relu(self.linear1(x))))

    return nnx_model(
        call,
        attention=nnx_attention(),
        norm1=nnx.LayerNorm(WIDTH, epsilon=1e-5, **new()),
        linear1=nnx.Linear(WIDTH, 6, **new("kernel_init")),
        linear2=nnx.Linear(6, WIDTH, **new("kernel_init")),
        norm2=nnx.LayerNorm(WIDTH, epsilon=1e-5, **new()),
    )


def nnx_decoder_layer() -> Any:
    from flax import nnx

    def call(self: Any, x: Any) -> Any:
        memory = x[:, ::-1]
        x = x + self.own(self.norm1(x))
        x = x + self.cross(self.norm2(x), memory)
        return x + self.linear2(nnx.relu(self.linear1(self.norm3(x))))

    def norm() -> Any:
        return nnx.LayerNorm(WIDTH, epsilon=1e-5, **new())

    return nnx_model(
        call,
        norm1=norm(),
        own=nnx_attention(),
        norm2=norm(),
        cross=nnx_attention(),
        norm3=norm(),
        linear1=nnx.Linear(WIDTH, 6, **new("kernel_init")),
        linear2=nnx.Linear(6, WIDTH, **new("kernel_init")),
    )
