"""Ada2MS with equinox: `python examples/jax_equinox.py` trains a network on handwritten digits in some seconds."""

import argparse

import equinox as eqx
import jax
import optax

from ada2ms.core import NO_DECAY
from ada2ms.demo.digits import load
from ada2ms.jax import ada2ms


def loss(model, images, labels):
    logits = jax.vmap(model)(images.reshape(len(images), -1))
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps

    data = load()
    model = eqx.nn.MLP(64, 10, width_size=64, depth=1, activation=jax.nn.silu, key=jax.random.key(0))
    optimizer = ada2ms(2e-3, max_norm=1.0, groups=[NO_DECAY])
    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit(donate="all-except-first")
    def train(batch, model, state):
        value, gradients = eqx.filter_value_and_grad(loss)(model, *batch)
        updates, state = optimizer.update(gradients, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, value

    for step, batch in enumerate(data.batches(steps, seed=0)):
        model, state, value = train(batch, model, state)
        if step % 100 == 0:
            print(f"step {step}: loss {value:.3f}")
    logits = jax.vmap(model)(data.test_images.reshape(len(data.test_images), -1))
    print(f"test accuracy {(logits.argmax(-1) == data.test_labels).mean():.3f}")


if __name__ == "__main__":
    main()
