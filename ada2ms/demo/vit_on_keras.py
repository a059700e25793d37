"""The Vision Transformer in Keras, on whichever backend it runs."""

from typing import Any

import keras
from keras import layers, ops

from ada2ms.core import State
from ada2ms.core.state import Mappings, Report
from ada2ms.demo.digits import Array
from ada2ms.tf import Ada2MS, arguments, export_state, import_state, plain_layers


def layer_norm() -> layers.Layer:
    """With the epsilon that torch has by default."""
    return layers.LayerNormalization(epsilon=1e-5)


def gelu(x: Any) -> Any:
    """In the type of the arrays; that of TensorFlow has the root of 2 in float32."""
    return 0.5 * x * (1 + ops.erf(x / 2**0.5))


class Block(layers.Layer):  # type: ignore[misc]
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


class ViT(keras.Model):  # type: ignore[misc]
    """Logits, (batch, 10), of images, (batch, 8, 8, 1)."""

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


class ModelTrainer:
    """A built model that maps arrays to logits, trained on the cross-entropy; `options` are those of Ada2MS."""

    def __init__(self, model: keras.Model, mappings: Mappings, **options: Any) -> None:
        self.model, self.mappings = model, mappings
        self.optimizer = Ada2MS(**options)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        eager = keras.backend.backend() != "jax"  # for a few steps, faster than to compile
        model.compile(self.optimizer, loss, run_eagerly=eager, jit_compile=not eager)
        self.optimizer.build(model.trainable_variables)

    def step(self, x: Array, y: Array) -> None:
        self.model.train_on_batch(x, y)

    def predict(self, x: Array) -> Array:
        """The logits."""
        logits: Array = ops.convert_to_numpy(self.model(x, training=False))
        return logits

    def export_state(self) -> State:
        return export_state(self.model, self.optimizer, **self.mappings)

    def import_state(self, state: State) -> Report:
        return import_state(self.model, self.optimizer, state, **self.mappings)


def trainer(state: State) -> ModelTrainer:
    """Of a ViT, in float32, with the optimizer that `state` has been exported from; not yet with its values."""
    model = ViT()
    model(ops.zeros((1, 8, 8, 1)))  # which builds it
    mappings = plain_layers(model, names="auto")
    return ModelTrainer(model, mappings, **arguments(state, mappings["names"]))
