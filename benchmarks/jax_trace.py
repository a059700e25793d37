"""What recording costs in JAX: a step of optax.adamw with a Recorder and without, interleaved in one run.

    python benchmarks/jax_trace.py [--rounds 9] [--cpu-time] [--smoke]

Both are jitted with donated buffers, over a tree of the shapes of gpu.py's transformer of 27 million parameters. The
median over rounds of milliseconds a step and of what recording adds, in steps of adamw: the whole of it by sketches
alone (`full=0`) and with three steps of entries before, of which a question to the host for each step remains; and the
part of it that the three sketches take, without what takes them to the host. On a GPU a round is 20 steps.
"""

import datetime
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from gpu import SMALL, transformer
from trace_options import parsed

from ada2ms.core.trace import Parameter
from ada2ms.jax import Recorder, recorded, sketches, sketches_cpu


def stepper(name: str, optimizer: Any, gradients: dict[str, Any], clock: Callable[[], float]) -> Callable[[], Any]:
    """A jitted step over parameters and a state of its own; prints what it takes to compile."""

    @jax.jit
    def start() -> Any:
        params = {name: jnp.ones_like(g) for name, g in gradients.items()}
        return params, optimizer.init(params)

    def step(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    held = [start()]
    begin = clock()
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*held[0], gradients).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes / 1e6
    print(f"{name:40} {clock() - begin:8.2f} s to trace and compile, {memory:.0f} MB of memory beside the arguments")

    def run() -> Any:
        held[0] = compiled(*held[0], gradients)
        return held[0]

    return run


def three_sketches(gradients: dict[str, Any]) -> Callable[[], Any]:
    """Three sketches of each array."""
    known = [Parameter(name, name, g.shape, g.dtype.name) for name, g in gradients.items()]

    @jax.jit
    def three(x: Any, y: Any, z: Any) -> Any:
        sums = sketches_cpu.sums if sketches_cpu.is_available((x, y, z)) else sketches.sums
        return [sums(tree, known) for tree in (x, y, z)]

    trees = [{name: g + i for name, g in gradients.items()} for i in range(3)]
    return lambda: three(*trees)


def main() -> None:
    options, clock = parsed(__doc__, {})
    shapes = next(iter(SMALL.values())) if options.smoke else transformer(512, 6, 16384)
    on_gpu = jax.default_backend() == "gpu"
    rounds, repeat = (1, 1) if options.smoke else (options.rounds, 20 if on_gpu else 1)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    gradients = {
        f"p{i}": jax.random.normal(key, shape) for i, (key, shape) in enumerate(zip(keys, shapes, strict=True))
    }
    print(f"{datetime.date.today()}, jax {jax.__version__}, {jax.devices()[0].device_kind}")
    with tempfile.TemporaryDirectory() as folder:
        recorders = [Recorder(Path(folder, f"run{full}"), gradients, full=full) for full in (0, 3)]
        steps = {"adamw": stepper("adamw", optax.adamw(1e-3), gradients, clock), "sketches": three_sketches(gradients)}
        for recorder, name in zip(recorders, ("recorded", "recorded, with entries of three steps"), strict=True):
            steps[name] = stepper(name, recorded(optax.adamw(1e-3), recorder), gradients, clock)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for r in range(4 + rounds):  # entries of three steps are among the warm-up
            for name, step in steps.items():
                begin = clock()
                for _ in range(repeat):
                    done = step()
                jax.block_until_ready(done)
                jax.effects_barrier()
                if r >= 4:
                    times[name].append((clock() - begin) / repeat)
        for recorder in recorders:
            recorder.close()
    for name, found in times.items():
        base = 0 if name == "sketches" else 1
        added = statistics.median(t / p - base for t, p in zip(found, times["adamw"], strict=True))
        print(f"{name:40} {1e3 * statistics.median(found):8.2f} ms: {added:.2f} steps more")


if __name__ == "__main__":
    main()
