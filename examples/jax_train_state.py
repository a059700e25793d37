"""Ada2MS with flax' TrainState: `python examples/jax_train_state.py` trains a network on handwritten digits.

Biases do not decay, and rates may be changed between steps.
"""

import argparse

import jax
import jax.numpy as jnp
import optax
from flax import linen
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
    state = TrainState.create(apply_fn=network.apply, params=params, tx=optimizer)
    for step, (images, labels) in enumerate(data.batches(steps, seed=0)):
        if step == steps // 2:
            state.opt_state.hyperparams["learning_rate"] = jnp.float32(5e-4)
        state, loss = train(state, images, labels)
        if step % 100 == 0:
            print(f"step {step}: loss {loss:.3f}")
    accuracy = (network.apply(state.params, data.test_images).argmax(-1) == data.test_labels).mean()
    print(f"test accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
