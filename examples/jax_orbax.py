"""Ada2MS saved and restored by orbax, on more devices than before: `python examples/jax_orbax.py`.

Trains half the way on one device, saves, restores parameters and state onto a mesh of 8 (virtual) devices, and goes on.
"""

import argparse
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from ada2ms.demo.digits import MLP, initial_weights, load
from ada2ms.demo.on_jax import network
from ada2ms.jax import ada2ms

jax.config.update("jax_num_cpu_devices", 8)
optimizer = ada2ms(2e-3)


def loss(weights, images, labels):
    return optax.softmax_cross_entropy_with_integer_labels(network(weights, images), labels).mean()


@jax.jit
def step(weights, state, images, labels):
    updates, state = optimizer.update(jax.grad(loss)(weights, images, labels), state, weights)
    return optax.apply_updates(weights, updates), state


def train(carry, batches):
    for batch in batches:
        # Virtual devices share the threads of one CPU: programs that overlap on them may wait for each other forever.
        carry = jax.block_until_ready(step(*carry, *batch))
    return carry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps

    data = load()
    batches = list(data.batches(steps, seed=0))
    weights = [jnp.asarray(w) for w in initial_weights(MLP, seed=0)]
    carry = train((weights, optimizer.init(weights)), batches[: steps // 2])

    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    # Kernels and their moments by their first axis, and all else whole on every device; restored into these shapes.
    split = NamedSharding(mesh, PartitionSpec("x")), NamedSharding(mesh, PartitionSpec())
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split[x.ndim < 2]), carry)
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(folder) / "state", carry)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(Path(folder) / "state", like)

    carry, restored = train(carry, batches[steps // 2 :]), train(restored, batches[steps // 2 :])
    difference = max(float(jnp.max(jnp.abs(x - jax.device_get(y)))) for x, y in zip(carry[0], restored[0], strict=True))
    print(f"restored onto {len(restored[0][0].sharding.device_set)} devices, largest difference {difference:.1e}")
    accuracy = (network(restored[0], data.test_images).argmax(-1) == data.test_labels).mean()
    print(f"test accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
