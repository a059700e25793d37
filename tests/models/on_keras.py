"""The models in Keras, on whichever backend it runs."""

from typing import Any

import keras
from keras import layers, ops

from ada2ms.core import State
from ada2ms.demo.vit_on_keras import Block, ModelTrainer, ViT, layer_norm
from ada2ms.tf import arguments, plain_layers
from models.data import LETTERS, NAMES, TIME


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


class Trainer(ModelTrainer):
    """With the optimizer that continues a state."""

    def __init__(self, kind: str, dtype: str, state: State) -> None:
        keras.utils.set_random_seed(0)
        model = MODELS[kind]()
        model(ops.zeros((1, TIME), "int32") if kind == "gpt" else ops.zeros((1, 8, 8, 1)))  # which builds it
        mappings = plain_layers(model, names=NAMES[kind])
        super().__init__(model, mappings, **arguments(state, mappings["names"]))
