"""The models in flax.nnx."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.nnx.nn.attention import dot_product_attention_weights

from ada2ms.core import State
from ada2ms.jax import ada2ms, arguments, export_state, import_state, plain_layers
from models.data import LETTERS, NAMES, TIME

Array = Any


def layer_norm(width: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)


def attend(query: Array, key: Array, value: Array, *, mask: Array | None = None, **_: Any) -> jax.Array:
    """Attention in the type of the arrays; that of JAX takes the softmax in float32."""
    weights = dot_product_attention_weights(query, key, mask=mask)
    return jnp.einsum("...hqk,...khd->...qhd", weights, value)


class Block(nnx.Module):
    """A transformer's, which normalises before attention and before two dense layers."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs) -> None:
        self.norm1 = layer_norm(width, rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, attention_fn=attend, rngs=rngs)
        self.norm2 = layer_norm(width, rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norm2(x)), approximate=False))


class ViT(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, width: int = 16, heads: int = 4) -> None:
        self.patches = nnx.Conv(1, width, (2, 2), 2, rngs=rngs)
        self.class_token = nnx.Param(jnp.zeros((1, 1, width)))
        self.positions = nnx.Param(jnp.zeros((1, 17, width)))
        self.blocks = nnx.List(Block(width, heads, rngs) for _ in range(2))
        self.norm = layer_norm(width, rngs)
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.patches(images)
        x = x.reshape(len(x), 16, -1)
        token = jnp.broadcast_to(self.class_token[...], (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([token, x], 1) + self.positions[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


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


@nnx.jit
def train(model: Any, optimizer: nnx.Optimizer, x: Array, y: Array) -> None:
    def loss(model: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    optimizer.update(model, nnx.grad(loss)(model))


@nnx.jit
def forward(model: Any, x: Array) -> jax.Array:
    return model(x)


class Trainer:
    """A model and the optimizer that continues a state."""

    def __init__(self, kind: str, dtype: str, state: State) -> None:
        def make() -> Any:
            model = MODELS[kind](nnx.Rngs(0))
            self.mappings = plain_layers(model, names=NAMES[kind])  # here, since flax sorts attributes later
            return model

        # Its values come from a state: none is drawn, for which JAX would compile for seconds.
        self.model = nnx.eval_shape(make)
        nnx.update(self.model, jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), nnx.state(self.model)))
        self.options = arguments(state, self.mappings["names"])
        self.optimizer = nnx.Optimizer(self.model, ada2ms(**self.options), wrt=nnx.Param)

    def step(self, x: Array, y: Array) -> None:
        self.model.train()
        train(self.model, self.optimizer, x, y)

    def predict(self, x: Array) -> Array:
        """The logits."""
        self.model.eval()
        return np.asarray(forward(self.model, x))

    def export_state(self) -> State:
        values = nnx.state(self.model, (nnx.Param, nnx.BatchStat))
        return export_state(values, self.optimizer.opt_state, **self.mappings, options=self.options)

    def import_state(self, state: State) -> Any:
        values = nnx.state(self.model, (nnx.Param, nnx.BatchStat))
        opt_state = self.optimizer.opt_state
        values, self.optimizer.opt_state, report = import_state(values, opt_state, state, **self.mappings)
        nnx.update(self.model, values)
        return report
