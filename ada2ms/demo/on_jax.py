"""The network in JAX, trained through Optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ada2ms.core import State
from ada2ms.demo.digits import Array
from ada2ms.jax import export_state, import_state


def network(weights: list[jax.Array], images: jax.Array) -> jax.Array:
    """The logits: convolutions, then dense layers."""
    x = images
    for i, (kernel, bias) in enumerate(zip(weights[::2], weights[1::2], strict=True)):
        if kernel.ndim == 4:
            x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            x = jax.nn.silu(x + bias)
            batch, height, width, channels = x.shape
            x = x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))
        else:
            x = x.reshape(x.shape[0], -1) @ kernel + bias
            if 2 * i + 2 < len(weights):
                x = jax.nn.silu(x)
    return x


class JaxTrainer:
    """A `Trainer`, on JAX's default device."""

    def __init__(self, weights: list[Array], optimizer: optax.GradientTransformation) -> None:
        self.weights = [jnp.asarray(w) for w in weights]
        self.state = optimizer.init(self.weights)

        def loss(weights: list[jax.Array], images: jax.Array, labels: jax.Array) -> jax.Array:
            logits = network(weights, images)
            losses: jax.Array = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean()

        @jax.jit
        def train(
            weights: list[jax.Array], state: optax.OptState, images: jax.Array, labels: jax.Array
        ) -> tuple[list[jax.Array], optax.OptState, jax.Array, list[jax.Array]]:
            value, gradients = jax.value_and_grad(loss)(weights, images, labels)
            updates, state = optimizer.update(gradients, state, weights)
            return optax.apply_updates(weights, updates), state, value, gradients

        self._train = train

    def step(self, images: Array, labels: Array) -> tuple[float, list[Array]]:
        self.weights, self.state, loss, gradients = self._train(self.weights, self.state, images, labels)
        return float(loss), [np.array(g) for g in gradients]

    def parameters(self) -> list[Array]:
        return [np.array(w) for w in self.weights]

    def predict(self, images: Array) -> Array:
        logits: Array = np.asarray(network(self.weights, jnp.asarray(images)))
        likeliest: Array = logits.argmax(-1)
        return likeliest

    def export_state(self) -> State:
        return export_state(self.weights, self.state, names=self._names())

    def import_state(self, state: State) -> None:
        self.weights, self.state, _ = import_state(self.weights, self.state, state, names=self._names())

    def _names(self) -> dict[str, str]:
        """As `plain_layers` would call them: the weights are a list, whose leaves have their indices for paths."""
        kinds = ["conv" if kernel.ndim == 4 else "dense" for kernel in self.weights[::2]]
        names = [f"{i}.{kind}.{role}" for i, kind in enumerate(kinds) for role in ("kernel", "bias")]
        return {str(i): name for i, name in enumerate(names)}
