"""The time of a step of the Keras optimizer against keras.optimizers.AdamW, interleaved in one run.

    KERAS_BACKEND=tensorflow python benchmarks/keras_step.py [--xla] [--rounds 15]

Prints, for 100 small variables (64x64) and for 4 large ones (1024x1024), the median over rounds of milliseconds a step,
and the median over rounds of the ratio to AdamW in the same round.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import numpy as np

from ada2ms.core import Linear
from ada2ms.tf import Ada2MS

OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "AdamW": lambda: keras.optimizers.AdamW(1e-3, weight_decay=1e-2),
    "adaptivity 0": lambda: Ada2MS(1e-3, adaptivity=0.0),
    "adaptivity 0.5": lambda: Ada2MS(1e-3, adaptivity=0.5),
    "adaptivity 1": lambda: Ada2MS(1e-3, adaptivity=1.0),
    "adaptivity 0.3": lambda: Ada2MS(1e-3, adaptivity=0.3),
    "scheduled": lambda: Ada2MS(1e-3, adaptivity=Linear(1.0, 0.0, steps=10_000)),
    "0.5, skip": lambda: Ada2MS(1e-3, adaptivity=0.5, nonfinite="skip"),
    "0.5, scope tensor": lambda: Ada2MS(1e-3, adaptivity=0.5, scope="tensor"),
}
SHAPES = {"100 small": [(64, 64)] * 100, "4 large": [(1024, 1024)] * 4}


def stepper(optimizer: Any, shapes: list[tuple[int, ...]], xla: bool) -> Callable[[], None]:
    """A function that makes one step and waits for it."""
    rng = np.random.default_rng(0)
    variables = [keras.Variable(rng.normal(size=shape).astype("float32")) for shape in shapes]
    gradients = [keras.ops.convert_to_tensor(rng.normal(size=shape).astype("float32")) for shape in shapes]
    optimizer.build(variables)
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        apply = tf.function(lambda gradients: optimizer.apply(gradients, variables), jit_compile=xla)

        def step() -> None:
            apply(gradients)
            variables[-1].numpy()

    elif backend == "jax":
        import jax

        # Arguments in the order of results, as Keras' trainer has them: JAX gives the first result the first buffer
        # of its shape, and would copy every moment if that were a variable's.
        @partial(jax.jit, donate_argnums=(0, 1))
        def update(values: Any, state: Any, gradients: Any) -> Any:
            return optimizer.stateless_apply(state, gradients, values)

        state = [[v.value for v in variables], [v.value for v in optimizer.variables]]

        def step() -> None:
            state[:] = update(*state, gradients)
            jax.block_until_ready(state)

    else:
        import torch

        def step() -> None:
            with torch.no_grad():
                optimizer.apply(gradients, variables)
            if gradients[0].is_cuda:
                torch.cuda.synchronize()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--xla", action="store_true", help="TensorFlow: compile with XLA")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    for title, shapes in SHAPES.items():
        steppers = {name: stepper(make(), shapes, options.xla) for name, make in OPTIMIZERS.items()}
        times: dict[str, list[float]] = {name: [] for name in steppers}
        for r in range(options.rounds + 2):
            for name, step in steppers.items():
                start = time.perf_counter()
                for _ in range(3):
                    step()
                if r >= 2:  # compiled, and warm
                    times[name].append((time.perf_counter() - start) / 3 * 1e3)
        print(f"{keras.backend.backend()}{' XLA' if options.xla else ''}, {title}")
        for name, found in times.items():
            ratio = statistics.median(t / base for t, base in zip(found, times["AdamW"], strict=True))
            print(f"  {name:20} {statistics.median(found):8.2f} ms  {ratio:5.2f}x", flush=True)


if __name__ == "__main__":
    main()
