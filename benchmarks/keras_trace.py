"""What recording costs in Keras: a step of keras.optimizers.AdamW with a Recorder and without, interleaved in one run.

    KERAS_BACKEND=tensorflow python benchmarks/keras_trace.py [--rounds 9] [--cpu-time] [--smoke]

Both run eagerly, as a Recorder needs them to, over variables of the shapes of gpu.py's transformer. The median over
rounds of milliseconds a step, and of what recording adds, in steps of AdamW.
"""

import datetime
import statistics
import tempfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
from gpu import SMALL, Shapes, transformer
from trace_options import parsed

from ada2ms.tf import Recorder


def model_of(shapes: Shapes) -> Any:
    """A layer with weights of these shapes, which is never called."""
    layer = keras.layers.Layer()
    for i, shape in enumerate(shapes):
        layer.add_weight(shape=shape, initializer="ones", name=f"w{i}")
    return keras.Sequential([layer])


def main() -> None:
    options, clock = parsed(__doc__, {})
    shapes = next(iter(SMALL.values())) if options.smoke else transformer(512, 6, 16384)
    rng = np.random.default_rng(0)
    gradients = [keras.ops.convert_to_tensor(rng.normal(size=shape).astype(np.float32)) for shape in shapes]
    times: dict[str, list[float]] = {"plain": [], "recorded": []}
    with tempfile.TemporaryDirectory() as folder:
        models = {name: model_of(shapes) for name in times}
        optimizers = {name: keras.optimizers.AdamW() for name in times}
        with Recorder(Path(folder, "run"), models["recorded"], optimizers["recorded"], full=0):
            for r in range(1 + (1 if options.smoke else options.rounds)):
                for name, optimizer in optimizers.items():
                    start = clock()
                    optimizer.apply(gradients, models[name].trainable_variables)
                    keras.ops.convert_to_numpy(models[name].trainable_variables[-1].value)  # waits for the device
                    if r:
                        times[name].append(clock() - start)
    plain, traced = times.values()
    added = statistics.median(t / p - 1 for t, p in zip(traced, plain, strict=True))
    print(
        f"{datetime.date.today()}, keras {keras.__version__} on {keras.backend.backend()}: AdamW "
        f"{1e3 * statistics.median(plain):.1f} ms, recorded {1e3 * statistics.median(traced):.1f} ms: "
        f"{added:.2f} steps more"
    )


if __name__ == "__main__":
    main()
