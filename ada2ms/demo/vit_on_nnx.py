"""The Vision Transformer in flax.nnx."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.nnx.nn.attention import dot_product_attention_weights

from ada2ms.core import State
from ada2ms.core.state import Mappings, Report
from ada2ms.demo.digits import Array
from ada2ms.jax import ada2ms, arguments, export_state, import_state, plain_layers


def layer_norm(width: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """With the epsilon that torch has by default."""
    return nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)


def attend(query: jax.Array, key: jax.Array, value: jax.Array, *, mask: jax.Array | None = None, **_: Any) -> jax.Array:
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
    """Logits, (batch, 10), of images, (batch, 8, 8, 1)."""

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


def zeros(make: Callable[[], Any], dtype: str) -> Any:
    """The model that `make` makes, but with zeros. Random values would take JAX seconds to compile."""
    model = nnx.eval_shape(make)
    nnx.update(model, jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), nnx.state(model)))
    return model


@nnx.jit
def _train(model: Any, optimizer: nnx.Optimizer[Any], x: Array, y: Array) -> None:
    def loss(model: Any) -> jax.Array:
        losses: jax.Array = optax.softmax_cross_entropy_with_integer_labels(model(x), y)
        return losses.mean()

    optimizer.update(model, nnx.grad(loss)(model))


@nnx.jit
def _forward(model: Any, x: Array) -> Any:
    return model(x)


class ModelTrainer:
    """A model that maps arrays to logits, trained on the cross-entropy; `options` are those of `ada2ms`."""

    def __init__(self, model: Any, mappings: Mappings, **options: Any) -> None:
        self.model, self.mappings, self.options = model, mappings, options
        self.optimizer = nnx.Optimizer(model, ada2ms(**options), wrt=nnx.Param)

    def step(self, x: Array, y: Array) -> None:
        self.model.train()
        _train(self.model, self.optimizer, x, y)

    def predict(self, x: Array) -> Array:
        """The logits."""
        self.model.eval()
        return np.asarray(_forward(self.model, x))

    def export_state(self) -> State:
        values = nnx.state(self.model, (nnx.Param, nnx.BatchStat))
        return export_state(values, self.optimizer.opt_state, **self.mappings, options=self.options)

    def import_state(self, state: State) -> Report:
        values = nnx.state(self.model, (nnx.Param, nnx.BatchStat))
        opt_state = self.optimizer.opt_state
        values, self.optimizer.opt_state, report = import_state(values, opt_state, state, **self.mappings)
        nnx.update(self.model, values)
        return report


def trainer(state: State) -> ModelTrainer:
    """Of a ViT, in float32, with the optimizer that `state` has been exported from; not yet with its values."""
    model = zeros(lambda: ViT(nnx.Rngs(0)), "float32")
    mappings = plain_layers(model, names="auto")
    return ModelTrainer(model, mappings, **arguments(state, mappings["names"]))
