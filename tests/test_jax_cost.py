"""What a compiled step of the Optax transformation reads, writes and allocates, against optax.adamw.

The time is for benchmarks/jax_step.py to tell; these numbers are the compiler's own, and the same on every machine.
"""

import importlib.util
import re
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax_support import squares_are_summed_at_once

from ada2ms.core import Group, Linear
from ada2ms.jax import ada2ms
from support import slow

pytestmark = squares_are_summed_at_once

LEAVES = [jnp.ones((256, 1024)), jnp.ones((256, 256))]
ENTRIES = sum(x.size for x in LEAVES)
SMALL = 0.01  # of a tree of leaves: scalars, a count for each leaf, and what a reduction keeps for its threads
CLIP = optax.clip_by_global_norm(1.0)


def compiled(optimizer: Any, leaves: list[jax.Array] = LEAVES) -> Any:
    """The step of the benchmark."""
    path = Path(__file__).parents[1] / "benchmarks" / "jax_step.py"
    spec = importlib.util.spec_from_file_location("jax_step", path)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    return benchmark.compiled(optimizer, leaves)


def cost(optimizer: Any) -> tuple[float, float]:
    """Bytes accessed, and bytes of temporaries, for each parameter."""
    step = compiled(optimizer)
    return step.cost_analysis()["bytes accessed"] / ENTRIES, step.memory_analysis().temp_size_in_bytes / ENTRIES


@pytest.mark.parametrize("adaptivity", [0.0, 0.5, 1.0, 0.7, Linear(1.0, 0.0, 9)])
def test_one_more_read_of_the_gradient_and_no_temporary(adaptivity: Any) -> None:
    read, temporary = cost(ada2ms(adaptivity=adaptivity))
    adamw, _ = cost(optax.adamw(1e-3))
    assert 36 <= read <= adamw + 4 * (1 + SMALL)
    assert temporary <= 4 * SMALL


@pytest.mark.parametrize("adaptivity", [0.0, 0.5, 1.0, 0.7])
def test_after_a_clip_no_more_than_adamw(adaptivity: float) -> None:
    """Which reads clipped and unclipped gradients both, where the sum of squares here reads the clipped ones alone."""
    read, temporary = cost(optax.chain(CLIP, ada2ms(adaptivity=adaptivity)))
    adamw, its_temporary = cost(optax.chain(CLIP, optax.adamw(1e-3)))
    assert read <= adamw
    assert temporary <= its_temporary + 4 * SMALL


@pytest.mark.parametrize("adaptivity", [0.5, *slow(0.0, 1.0, 0.7)])
def test_max_norm_costs_nothing(adaptivity: float) -> None:
    """No pass over the gradients and no array of their size; Optax' own clip before it takes 12 bytes, and holds 4."""
    plain, clipping = (cost(ada2ms(adaptivity=adaptivity, max_norm=max_norm)) for max_norm in (None, 1.0))
    assert clipping[0] <= plain[0] + SMALL
    assert clipping[1] <= 4 * SMALL
    read, temporary = cost(optax.chain(CLIP, ada2ms(adaptivity=adaptivity)))
    assert read >= clipping[0] + 12 - SMALL
    assert temporary >= 4


def test_what_a_compensation_costs() -> None:
    """Where a loop has one output, as on a CPU: two loops read the update and the 16 bits, and copies of what is
    donated. On a GPU it is one loop, of 28 bytes in place of 24."""
    halves = [x.astype(jnp.bfloat16) for x in LEAVES]
    step = compiled(ada2ms(compensated=True), halves)
    plain = compiled(ada2ms(), halves)
    more = step.cost_analysis()["bytes accessed"] - plain.cost_analysis()["bytes accessed"]
    assert 4 <= more / ENTRIES <= 28 + SMALL
    assert step.memory_analysis().temp_size_in_bytes / ENTRIES <= 8 + SMALL


LEAVES_ALONE = [{"adaptivity": 0.7}, {"nonfinite": "skip", "max_norm": 1.0}, *slow({}, {"scope": "tensor"})]


@pytest.mark.parametrize("options", LEAVES_ALONE)
def test_operands_grow_with_the_leaves_alone(options: dict[str, Any]) -> None:
    """And not with their square, as where every leaf's loop sums all leaves' sums to know whether it is to skip."""

    def operands(leaves: int) -> int:
        text = compiled(ada2ms(**options), [jnp.ones((32, 32))] * leaves).as_text()
        fusions = re.findall(r" fusion\(([^)]*)\)", text[text.index("ENTRY") :])
        assert len(fusions) > 3 * leaves
        return sum(fusion.count("%") for fusion in fusions)

    assert operands(16) < 2.2 * operands(8)


@pytest.mark.parametrize("options", LEAVES_ALONE)
def test_leaves_of_a_shape_share_their_loops(options: dict[str, Any]) -> None:
    """Which are compiled once then, though each leaf has a count of updates of its own."""

    def loops(leaves: int) -> int:
        text = compiled(ada2ms(**options), [jnp.ones((32, 32))] * leaves).as_text()
        text = re.sub(r", metadata={.*?}", "", re.sub(r"(%\w+)[.\d]*", r"\1", text))  # of names, what is not a number
        bodies = re.findall(r"^%fused_computation .*?{\n(.*?)^}", text, re.DOTALL | re.MULTILINE)
        assert len(bodies) > 3 * leaves
        return len({body for body in bodies if "f32[32,32]" in body and "reduce(" not in body})

    assert 3 <= loops(12) == loops(6) <= 6


# Updates that are not compiled by the user: notebooks, and loops that are written down as they come.


def test_an_eager_update_takes_less_than_three_times_that_of_adamw() -> None:
    """It took up to six times; it takes about two thirds. Interleaved, so that both find the same machine."""
    params = [jnp.full((32, 32), float(i)) for i in range(1, 21)]
    optimizers = {"ada2ms": ada2ms(1e-3), "adamw": optax.adamw(1e-3)}
    states = {name: optimizer.init(params) for name, optimizer in optimizers.items()}
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(12):
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            _, states[name] = jax.block_until_ready(optimizer.update(params, states[name], params))
            times[name].append(time.perf_counter() - start)
    rounds = list(zip(times["ada2ms"], times["adamw"], strict=True))[2:]  # the first ones compile
    assert statistics.median(ours / theirs for ours, theirs in rounds) < 3


def test_eager_updates_compile_once() -> None:
    """Neither another step, nor a schedule in Python numbers, nor other hyperparameters compile leaves anew."""
    compilations: list[str] = []

    def count(event: str, duration: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compilations.append(event)

    params = [jnp.full((7, i + 3), 1.0) for i in range(5)]

    def run(optimizer: Any, steps: int) -> int:
        state, found = optimizer.init(params), len(compilations)
        for _ in range(steps):
            _, state = optimizer.update(params, state, params)
        return len(compilations) - found

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        assert run(ada2ms(1e-3), 1) > 5
        assert run(ada2ms(1e-3), 3) == 0
        run(ada2ms(1e-3, adaptivity=0.3), 1)
        run(ada2ms(1e-3, adaptivity=0.5), 1)  # has a program of its own, without a power
        for i in range(1, 4):
            assert run(ada2ms(i * 1e-3, 0.8 - 0.1 * i, 0.99 - 0.1 * i, i * 1e-7, weight_decay=0.1 * i), 1) == 0
            assert run(ada2ms(1e-3, 0.8 - 0.1 * i, adaptivity=0.3 + 0.1 * i), 1) == 0
        groups = [[Group("[12]", lr_scale=0.1 * i, b2=0.9 - 0.1 * i, eps=1e-3 * i)] for i in range(1, 4)]
        run(ada2ms(1e-3, max_norm=1.0, groups=groups[0]), 1)
        for i in range(1, 3):
            assert run(ada2ms(1e-3, max_norm=0.1 * i, groups=groups[i]), 1) == 0
        scheduled = ada2ms(lambda k: 0.1 / (1 + int(k)), adaptivity=lambda k: 1 / (2 + int(k)))
        run(scheduled, 1)
        assert run(scheduled, 5) == 0
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
