"""The models in Keras, on whichever backend it runs."""

from typing import Any

import keras
from keras import layers, ops

from ada2ms.core import State
from ada2ms.tf import Ada2MS, arguments, export_state, import_state, plain_layers
from models.data import LETTERS, NAMES, TIME

Array = Any


def layer_norm() -> layers.Layer:
    return layers.LayerNormalization(epsilon=1e-5)


def gelu(x: Any) -> Any:
    """In the type of the arrays; that of TensorFlow has the root of 2 in float32."""
    return 0.5 * x * (1 + ops.erf(x / 2**0.5))


class Block(layers.Layer):
    """A transformer's, which normalises before attention and before two dense layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = layer_norm()
        self.attention = layers.MultiHeadAttention(heads, width // heads)
        self.norm2 = layer_norm()
        self.up = layers.Dense(4 * width, activation=gelu)
        self.down = layers.Dense(width)

    def build(self, shape: Any) -> None:
        self.norm1.build(shape)
        self.attention.build(shape, shape)
        self.norm2.build(shape)
        self.up.build(shape)
        self.down.build(self.up.compute_output_shape(shape))

    def call(self, x: Any, causal: bool = False) -> Any:
        y = self.norm1(x)
        x = x + self.attention(y, y, use_causal_mask=causal)
        return x + self.down(self.up(self.norm2(x)))


class ViT(keras.Model):
    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.patches = layers.Conv2D(width, 2, strides=2)
        self.class_token = self.add_weight((1, 1, width), name="class_token")
        self.positions = self.add_weight((1, 17, width), name="positions")
        self.blocks = [Block(width, heads) for _ in range(2)]
        self.norm = layer_norm()
        self.head = layers.Dense(10)

    def call(self, images: Any) -> Any:
        x = self.patches(images)
        x = ops.reshape(x, (-1, 16, x.shape[-1]))
        token = ops.broadcast_to(self.class_token, (ops.shape(x)[0], 1, x.shape[-1]))
        x = ops.concatenate([token, x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class GPT(keras.Model):
    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.letters = layers.ReversibleEmbedding(len(LETTERS), width)
        self.positions = layers.Embedding(TIME, width)
        self.blocks = [Block(width, heads) for _ in range(2)]
        self.norm = layer_norm()

    def call(self, letters: Any) -> Any:
        x = self.letters(letters) + self.positions(ops.arange(letters.shape[1]))
        for block in self.blocks:
            x = block(x, causal=True)
        return self.letters(self.norm(x), reverse=True)


def lstm(units: int = 16) -> keras.Model:
    """Reads an image row by row."""
    rows = layers.Reshape((8, 8))
    return keras.Sequential([keras.Input((8, 8, 1)), rows, layers.LSTM(units), layers.Dense(10)])


def conv(channels: int, side: int, stride: int = 1) -> layers.Layer:
    """With as many rows of zeros on all sides; "same" would have none before and one after at a stride of 2."""
    inner = layers.Conv2D(channels, side, strides=stride, padding="valid", use_bias=False)
    return keras.Sequential([layers.ZeroPadding2D(side // 2), inner])


def batch_norm() -> layers.Layer:
    return layers.BatchNormalization(momentum=0.9, epsilon=1e-5)


class Residual(layers.Layer):
    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(channels, 3, stride), batch_norm()
        self.conv2, self.norm2 = conv(channels, 3), batch_norm()
        self.shortcut, self.shortcut_norm = conv(channels, 1, stride), batch_norm()

    def build(self, shape: Any) -> None:
        self.conv1.build(shape)
        self.shortcut.build(shape)
        shape = self.conv1.compute_output_shape(shape)
        self.conv2.build(shape)
        for norm in self.norm1, self.norm2, self.shortcut_norm:
            norm.build(shape)

    def call(self, x: Any, training: bool = False) -> Any:
        y = ops.relu(self.norm1(self.conv1(x), training=training))
        shortcut = self.shortcut_norm(self.shortcut(x), training=training)
        return ops.relu(self.norm2(self.conv2(y), training=training) + shortcut)


class ResNet(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = conv(8, 3), batch_norm()
        self.blocks = [Residual(8, 1), Residual(16, 2)]
        self.head = layers.Dense(10)

    def call(self, images: Any, training: bool = False) -> Any:  # without it, Keras does not say that it trains
        x = ops.relu(self.norm(self.stem(images), training=training))
        for block in self.blocks:
            x = block(x, training=training)
        return self.head(ops.mean(x, (1, 2)))


MODELS = {"vit": ViT, "gpt": GPT, "lstm": lstm, "resnet": ResNet}


class Trainer:
    """A model and the optimizer that continues a state."""

    def __init__(self, kind: str, dtype: str, state: State) -> None:
        keras.utils.set_random_seed(0)
        self.model = MODELS[kind]()
        self.model(ops.zeros((1, TIME), "int32") if kind == "gpt" else ops.zeros((1, 8, 8, 1)))  # which builds it
        self.mappings = plain_layers(self.model, names=NAMES[kind])
        self.optimizer = Ada2MS(**arguments(state, self.mappings["names"]))
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        eager = keras.backend.backend() != "jax"
        self.model.compile(self.optimizer, loss, run_eagerly=eager, jit_compile=not eager)
        self.optimizer.build(self.model.trainable_variables)

    def step(self, x: Array, y: Array) -> None:
        self.model.train_on_batch(x, y)

    def predict(self, x: Array) -> Array:
        """The logits."""
        return ops.convert_to_numpy(self.model(x, training=False))

    def export_state(self) -> State:
        return export_state(self.model, self.optimizer, **self.mappings)

    def import_state(self, state: State) -> Any:
        return import_state(self.model, self.optimizer, state, **self.mappings)
