"""Networks in bfloat16, with and without `compensated`, beside the same network in float32: do they follow it?

    python benchmarks/sixteen_bits.py [--frameworks jax torch keras] [--steps 1000] [--out docs/sixteen_bits.png]

A dense network on handwritten digits, with a learning rate and a decay so small that most updates are less than half of
a weight's last digit in bfloat16. The measure is how far the weights are from those of the network in float32, relative
to the way that these have gone since the start: 1 means that they stand still. For Keras set KERAS_BACKEND.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ada2ms.demo import digits

Array = NDArray[Any]
# The losses of all steps; and the weights after each, in float32, one row a step.
Run = tuple[Array, Array]

RATE, DECAY = 2.0**-14, 0.1
KINDS = {  # the type of the weights, and whether they are compensated
    "float32": ("float32", False),
    "bfloat16": ("bfloat16", False),
    "bfloat16, compensated": ("bfloat16", True),
}


def start() -> list[Array]:
    """Kernels and biases, which bfloat16 holds."""
    return [
        (w.view(np.uint32) & 0xFFFF0000).view(np.float32) for w in digits.initial_weights(digits.MLP, seed=0)
    ]  # cut off, not rounded: any numbers will do


def batches(steps: int) -> list[tuple[Array, Array]]:
    """Images of 256 values from 0 to 1, which bfloat16 holds, and labels."""
    return [(x.reshape(len(x), -1), y) for x, y in digits.load().batches(steps, seed=0)]


def on_jax(dtype: str, compensated: bool, steps: int) -> Run:
    import jax
    import jax.numpy as jnp
    import optax

    from ada2ms.demo.on_jax import network
    from ada2ms.jax import ada2ms

    optimizer = ada2ms(RATE, weight_decay=DECAY, compensated=compensated)

    def loss(weights: Any, images: Any, labels: Any) -> Any:
        logits = network(weights, images.astype(dtype)).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(carry: Any, batch: Any) -> Any:
        weights, state = carry
        value, gradients = jax.value_and_grad(loss)(weights, *batch)
        updates, state = optimizer.update(gradients, state, weights)
        weights = optax.apply_updates(weights, updates)
        flat = jnp.concatenate([w.ravel() for w in weights]).astype(jnp.float32)
        return (weights, state), (value, flat)

    weights = [jnp.asarray(w, dtype) for w in start()]
    images, labels = (jnp.stack(x) for x in zip(*batches(steps), strict=True))
    _, found = jax.jit(jax.lax.scan, static_argnums=0)(step, (weights, optimizer.init(weights)), (images, labels))
    return np.asarray(found[0]), np.asarray(found[1])


def on_torch(dtype: str, compensated: bool, steps: int) -> Run:
    import torch
    from torch.nn import functional

    from ada2ms.torch import Ada2MS

    weights = [torch.tensor(w, dtype=getattr(torch, dtype), requires_grad=True) for w in start()]
    optimizer = Ada2MS(weights, lr=RATE, weight_decay=DECAY, compensated=compensated)
    kernel, bias, out, out_bias = weights
    losses, values = [], []
    for images, labels in batches(steps):
        optimizer.zero_grad()
        hidden = functional.silu(torch.tensor(images, dtype=kernel.dtype) @ kernel + bias)
        loss = functional.cross_entropy((hidden @ out + out_bias).float(), torch.tensor(labels).long())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        values.append(torch.cat([w.detach().ravel() for w in weights]).float().numpy())
    return np.array(losses), np.array(values)


def on_keras(dtype: str, compensated: bool, steps: int) -> Run:
    import keras

    from ada2ms.tf import Ada2MS

    layer = {"dtype": dtype, "kernel_initializer": "zeros"}
    model = keras.Sequential(
        [
            keras.Input((64,), dtype=dtype),
            keras.layers.Dense(32, activation="silu", **layer),
            keras.layers.Dense(10, **layer),
        ]
    )
    model.set_weights(start())
    model.compile(
        Ada2MS(RATE, weight_decay=DECAY, compensated=compensated),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True, dtype="float32"),
    )
    losses, values = [], []
    for images, labels in batches(steps):
        losses.append(float(model.train_on_batch(images, labels)))
        model.reset_metrics()
        flat = [np.asarray(keras.ops.convert_to_numpy(v), np.float32).ravel() for v in model.trainable_variables]
        values.append(np.concatenate(flat))
    return np.array(losses), np.array(values)


FRAMEWORKS: dict[str, Callable[[str, bool, int], Run]] = {"jax": on_jax, "torch": on_torch, "keras": on_keras}


def measured(framework: str, steps: int) -> dict[str, tuple[Array, Array]]:
    """For each kind of weights the losses, and how far they are from those in float32: 1 is as far as the start."""
    runs = {kind: FRAMEWORKS[framework](*options, steps) for kind, options in KINDS.items()}
    twin, origin = runs["float32"][1], np.concatenate([w.ravel() for w in start()])
    way = np.linalg.norm(twin - origin, axis=1)
    return {kind: (losses, np.linalg.norm(values - twin, axis=1) / way) for kind, (losses, values) in runs.items()}


def draw(found: dict[str, dict[str, tuple[Array, Array]]], file: Path) -> None:
    """A row of two panels for each framework: the loss, and the distance."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(
        len(found), 2, figsize=(12, 3.2 * len(found) + 0.8), sharex=True, squeeze=False, layout="constrained"
    )
    for (framework, runs), (left, right) in zip(found.items(), rows, strict=True):
        for i, (kind, (losses, distances)) in enumerate(runs.items()):
            style = {"label": kind, "color": f"C{i}", "linewidth": (5.0, 1.6, 1.6)[i]}
            width = max(1, len(losses) // 25)  # of the mean that takes out the differences between batches
            means = np.convolve(losses, np.ones(width) / width, "valid")
            left.plot(np.arange(len(means)) + width, means, **style)
            if kind != "float32":
                right.plot(np.arange(len(losses)) + 1, distances, **style)
        left.set(title=f"{framework}: training loss, mean of {width} steps")
        right.set(title=f"{framework}: distance from the weights in float32", yscale="log")
        right.set_ylabel("relative to the way these went")
        for axes in (left, right):
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")
    for axes in rows[-1]:
        axes.set_xlabel("step")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frameworks", nargs="+", choices=FRAMEWORKS, default=list(FRAMEWORKS))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "sixteen_bits.png")
    options = parser.parse_args()
    found = {}
    for framework in options.frameworks:
        found[framework] = measured(framework, options.steps)
        for kind, (losses, distances) in found[framework].items():
            loss = losses[-100:].mean()
            print(f"{framework:6} {kind:22} loss {loss:.3f}  distance {distances[-1]:.4f}", flush=True)
    draw(found, options.out)
    print(f"saved {options.out}")


if __name__ == "__main__":
    main()
