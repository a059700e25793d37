"""Ada2MS with flax' TrainState: `python examples/jax_train_state.py` trains a network on handwritten digits.

Biases do not decay, and rates may be changed between steps. A run that goes on from the bytes that flax makes of the
state half-way ends with the same numbers.
"""

import argparse

import jax
import jax.numpy as jnp
import optax
from flax import linen, serialization
from flax.training.train_state import TrainState

from ada2ms.demo.digits import load
from ada2ms.jax import ada2ms


class Network(linen.Module):
    @linen.compact
    def __call__(self, images):
        x = linen.silu(linen.Dense(64)(images.reshape(len(images), -1)))
        return linen.Dense(10)(x)


@jax.jit
def train(state, images, labels):
    def loss(params):
        logits = state.apply_fn(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    value, gradients = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=gradients), value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps

    data = load()
    network = Network()
    params = network.init(jax.random.key(0), data.train_images[:1])
    kernels = jax.tree.map(lambda p: p.ndim > 1, params)
    optimizer = optax.inject_hyperparams(ada2ms, static_args=("mask",))(2e-3, weight_decay=0.1, mask=lambda _: kernels)
    batches = list(data.batches(steps, seed=0))

    def go_on(state, batches):
        for images, labels in batches:
            state, loss = train(state, images, labels)
        print(f"step {state.step}: loss {loss:.3f}, learning rate {state.opt_state.hyperparams['learning_rate']:.4f}")
        return state

    new = TrainState.create(apply_fn=network.apply, params=params, tx=optimizer)
    half = go_on(new, batches[: steps // 2])
    half.opt_state.hyperparams["learning_rate"] = jnp.float32(5e-4)
    resumed = serialization.from_bytes(new, serialization.to_bytes(half))
    state, resumed = go_on(half, batches[steps // 2 :]), go_on(resumed, batches[steps // 2 :])
    pairs = zip(jax.tree.leaves(state.params), jax.tree.leaves(resumed.params), strict=True)
    print(f"resumed half-way, largest difference {max(float(jnp.max(jnp.abs(p - q))) for p, q in pairs)}")
    accuracy = (network.apply(state.params, data.test_images).argmax(-1) == data.test_labels).mean()
    print(f"test accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
