"""The time of a step of the Optax transformation against optax.adamw, interleaved in one run.

    python benchmarks/jax_step.py [--rounds 40] [--parameters 20] [--small | --different] [--clip] [--eager]

Both are jitted with donated buffers, over a tree of the sizes of a small transformer, with --small over 200 leaves of
64x64, or with --different over 150 small leaves of different shapes. Prints the median over rounds of milliseconds a
step and of the ratio to adamw in the same round, what the compiler says of the step (bytes accessed for each parameter,
and the size of temporaries) and the seconds it took to trace and compile it. With --clip, optax.clip_by_global_norm
stands before both. With --eager nothing is jitted, and the tree has 20 leaves of 32x32; the seconds are those of the
first step.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ada2ms.core import Linear
from ada2ms.jax import ada2ms

OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "optax.adamw": lambda: optax.adamw(1e-3, weight_decay=1e-2),
    "adaptivity 0": lambda: ada2ms(1e-3, adaptivity=0.0),
    "adaptivity 0.5": lambda: ada2ms(1e-3, adaptivity=0.5),
    "adaptivity 1": lambda: ada2ms(1e-3, adaptivity=1.0),
    "adaptivity 0.7": lambda: ada2ms(1e-3, adaptivity=0.7),
    "scheduled": lambda: ada2ms(1e-3, adaptivity=Linear(1.0, 0.0, 10_000)),
    "0.5, skip": lambda: ada2ms(1e-3, adaptivity=0.5, nonfinite="skip"),
    "0.5, scope tensor": lambda: ada2ms(1e-3, adaptivity=0.5, scope="tensor"),
    "0.5, max_norm": lambda: ada2ms(1e-3, adaptivity=0.5, max_norm=1.0),
    "0.5 after a clip": lambda: optax.chain(optax.clip_by_global_norm(1.0), ada2ms(1e-3, adaptivity=0.5)),
}


def shapes(millions: float) -> list[tuple[int, ...]]:
    """Of the leaves of a transformer: embeddings, and layers of four large leaves and four small ones."""
    width = 512
    layer = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width), *[(width,)] * 4]
    embeddings = [(4096, width)]
    count = round((millions * 1e6 - sum(map(np.prod, embeddings))) / sum(map(np.prod, layer)))
    return [*embeddings, *layer * max(count, 1)]


def leaf_shapes(options: argparse.Namespace) -> list[tuple[int, ...]]:
    """Of the tree that is asked for."""
    if options.eager:
        return [(32, 32)] * 20
    if options.small:
        return [(64, 64)] * 200
    return [(8, 8 + i) for i in range(150)] if options.different else shapes(options.parameters)


def step_of(optimizer: Any, params: Any, state: Any, gradients: Any) -> Any:
    """Parameters and state after one step."""
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state


def compiled(optimizer: Any, leaves: list[jax.Array]) -> Any:
    """The jitted step, of donated parameters and state."""
    step = functools.partial(step_of, optimizer)
    return jax.jit(step, donate_argnums=(0, 1)).lower(leaves, optimizer.init(leaves), leaves).compile()


def costs(step: Any, total: int) -> str:
    """What the compiler says of a step."""
    bytes_accessed = step.cost_analysis()["bytes accessed"]
    temporary = step.memory_analysis().temp_size_in_bytes
    return f"{bytes_accessed / total:6.2f} bytes a parameter, {temporary / 1024:8.1f} KiB temporary, "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--parameters", type=float, default=20.0, help="millions of them")
    parser.add_argument("--small", action="store_true", help="many small leaves in place of some large ones")
    parser.add_argument("--different", action="store_true", help="many small leaves of different shapes")
    parser.add_argument("--eager", action="store_true", help="no jit")
    parser.add_argument("--clip", action="store_true", help="optax.clip_by_global_norm(1.0) before both")
    options = parser.parse_args()

    total = int(sum(map(np.prod, sizes := leaf_shapes(options))))
    rng = np.random.default_rng(0)
    gradients = [jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in sizes]
    print(f"jax {jax.__version__}, optax {optax.__version__}, {jax.default_backend()}, {len(sizes)} leaves, ", end="")
    print(f"{total / 1e6:.1f} M parameters{', clip_by_global_norm before both' if options.clip else ''}")

    steps, carries, seconds = {}, {}, {}
    for name, make in OPTIMIZERS.items():
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), make()) if options.clip else make()
        params = jax.tree.map(lambda g: g.copy(), gradients)
        carries[name] = (params, optimizer.init(params))
        start = time.perf_counter()
        if options.eager:
            steps[name] = functools.partial(step_of, optimizer)
            carries[name] = jax.block_until_ready(steps[name](*carries[name], gradients))
        else:
            steps[name] = compiled(optimizer, gradients)
        seconds[name] = time.perf_counter() - start
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            carries[name] = jax.block_until_ready(step(*carries[name], gradients))
            times[name].append((time.perf_counter() - start) * 1e3)
    for name, found in times.items():
        rounds = list(zip(found, times["optax.adamw"], strict=True))[1:]  # the first is to warm up
        print(
            f"  {name:17} {statistics.median(t for t, _ in rounds):7.1f} ms"
            f"  {statistics.median(t / base for t, base in rounds):5.2f}x"
            f"  {'' if options.eager else costs(steps[name], total)}compiled in {seconds[name]:4.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
