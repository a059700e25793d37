"""Ada2MS with flax.nnx: `python examples/jax_nnx.py` trains a network on handwritten digits in some seconds."""

import argparse

import optax
from flax import nnx

from ada2ms.core import Linear
from ada2ms.demo.digits import load
from ada2ms.jax import ada2ms


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(64, 64, rngs=rngs)
        self.out = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images):
        return self.out(nnx.silu(self.hidden(images.reshape(len(images), -1))))


@nnx.jit
def train(model, optimizer, images, labels):
    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps

    data = load()
    model = Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, ada2ms(2e-3, adaptivity=Linear(1.0, 0.5, steps)), wrt=nnx.Param)
    for step, (images, labels) in enumerate(data.batches(steps, seed=0)):
        loss = train(model, optimizer, images, labels)
        if step % 100 == 0:
            print(f"step {step}: loss {loss:.3f}")
    accuracy = (model(data.test_images).argmax(-1) == data.test_labels).mean()
    print(f"test accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
