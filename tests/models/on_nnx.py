"""The models in flax.nnx."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ada2ms.core import State
from ada2ms.demo.vit_on_nnx import Block, ModelTrainer, ViT, layer_norm, zeros
from ada2ms.jax import arguments, plain_layers
from models.data import LETTERS, NAMES, TIME


class GPT(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, width: int = 16, heads: int = 4) -> None:
        self.letters = nnx.Embed(len(LETTERS), width, param_dtype=float, rngs=rngs)
        self.positions = nnx.Embed(TIME, width, param_dtype=float, rngs=rngs)
        self.blocks = nnx.List(Block(width, heads, rngs) for _ in range(2))
        self.norm = layer_norm(width, rngs)

    def __call__(self, letters: jax.Array) -> jax.Array:
        x = self.letters(letters) + self.positions(jnp.arange(letters.shape[1]))
        for block in self.blocks:
            x = block(x, nnx.make_causal_mask(letters))
        return self.letters.attend(self.norm(x))


class LSTM(nnx.Module):
    """Reads an image row by row."""

    def __init__(self, rngs: nnx.Rngs, units: int = 16) -> None:
        self.lstm = nnx.RNN(nnx.OptimizedLSTMCell(8, units, rngs=rngs))
        self.head = nnx.Linear(units, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = images[..., 0]
        start = jnp.zeros((len(x), self.lstm.cell.hidden_features), x.dtype)
        return self.head(self.lstm(x, initial_carry=(start, start))[:, -1])


def conv(inputs: int, outputs: int, side: int, rngs: nnx.Rngs, stride: int = 1) -> nnx.Conv:
    padding = side // 2  # on all sides; with "SAME", a stride of 2 would have none before and one row after
    return nnx.Conv(inputs, outputs, (side, side), stride, padding=padding, use_bias=False, rngs=rngs)


def batch_norm(channels: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    return nnx.BatchNorm(channels, momentum=0.9, epsilon=1e-5, rngs=rngs)


class Residual(nnx.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, rngs: nnx.Rngs) -> None:
        self.conv1, self.norm1 = conv(inputs, outputs, 3, rngs, stride), batch_norm(outputs, rngs)
        self.conv2, self.norm2 = conv(outputs, outputs, 3, rngs), batch_norm(outputs, rngs)
        self.shortcut = conv(inputs, outputs, 1, rngs, stride)
        self.shortcut_norm = batch_norm(outputs, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.norm1(self.conv1(x)))
        return nnx.relu(self.norm2(self.conv2(y)) + self.shortcut_norm(self.shortcut(x)))


class ResNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem, self.norm = conv(1, 8, 3, rngs), batch_norm(8, rngs)
        self.blocks = nnx.List([Residual(8, 8, 1, rngs), Residual(8, 16, 2, rngs)])
        self.head = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.stem(images)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


MODELS = {"vit": ViT, "gpt": GPT, "lstm": LSTM, "resnet": ResNet}


class Trainer(ModelTrainer):
    """With the optimizer that continues a state."""

    def __init__(self, kind: str, dtype: str, state: State) -> None:
        mappings: Any = {}

        def make() -> Any:
            model = MODELS[kind](nnx.Rngs(0))
            mappings.update(plain_layers(model, names=NAMES[kind]))  # here, since flax sorts attributes later
            return model

        super().__init__(zeros(make, dtype), mappings, **arguments(state, mappings["names"]))
