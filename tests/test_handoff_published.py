"""Published architectures in mid-run from framework to framework: ViT, GPT, LSTM and ResNet go on as if they stayed."""

import importlib
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handoff_models import EXACT, precision
from handoff_support import FRAMEWORKS, LR, marked
from models.data import NAMES, batches

from ada2ms.core import NO_DECAY, State

Array = Any
STEPS = 3  # before the hand-over, and after it
MODULES = {"torch": "models.on_torch", "jax": "models.on_nnx", "keras": "models.on_keras"}
# Of numbers of about 1, of which a step moves some by 2^-7; in float32 every framework sums in an order of its own.
# At an adaptivity near 1 an entry whose gradient is nothing but rounding, as a key's bias, moves as far as any other.
BOUNDS = {"float64": 1e-9, "float32": 1e-5}
OPTIONS: dict[str, dict[str, Any]] = {"gpt": {"groups": [NO_DECAY]}}


@cache
def beginning(kind: str, dtype: str) -> State:
    """No step done yet, of the weights that torch begins with."""
    from models.on_torch import Trainer

    return Trainer(kind, dtype, lr=LR, weight_decay=0.1, adaptivity=0.5, **OPTIONS.get(kind, {})).export_state()


@cache
def trainer(kind: str, framework: str, dtype: str) -> Any:
    """One for all tests; whatever it has been used for, a state replaces it all. Made by the arguments of a state."""
    return importlib.import_module(MODULES[framework]).Trainer(kind, dtype, beginning(kind, dtype))


def trained(kind: str, framework: str, dtype: str, state: State, steps: range) -> list[State]:
    """The states after each of these steps."""
    using, found = trainer(kind, framework, dtype), []
    using.import_state(state)
    for x, y in batches(kind, dtype, steps):
        using.step(x, y)
        found.append(using.export_state())
    return found


@cache
def stayed(kind: str, framework: str, dtype: str) -> list[State]:
    """The run without interruption, from the beginning on."""
    return trained(kind, framework, dtype, beginning(kind, dtype), range(2 * STEPS))


def deviation(found: State, expected: State) -> float:
    """The largest difference of any number: of a parameter, a moment or a global second moment."""
    assert found.parameters.keys() == expected.parameters.keys()
    pairs = [(x.global_exp_avg_sq, y.global_exp_avg_sq) for x, y in zip(found.groups, expected.groups, strict=True)]
    for name, entry in expected.parameters.items():
        other = found.parameters[name]
        assert other.step == entry.step
        assert other.slots().keys() == entry.slots().keys()
        pairs += [(other.slots()[slot], array) for slot, array in entry.slots().items()]
    return max(float(np.max(np.abs(x - y))) for x, y in pairs)


def values(state: State) -> list[Array]:
    return [entry.param for _, entry in sorted(state.parameters.items())]


def handed_over(kind: str, first: str, second: str, dtype: str, file: Path) -> list[float]:
    """How far a run that goes on in the second framework is from the one that stays in the first: its logits when it
    takes over, and its state after each step.
    """
    with precision(dtype):
        stay = stayed(kind, first, dtype)
        stay[STEPS - 1].save(file)
        state = State.load(file)
        images, _ = next(batches(kind, dtype, range(99, 100)))
        logits = []
        for framework in first, second:
            report = trainer(kind, framework, dtype).import_state(state)
            assert {name for row in report.rows for name in row[1].split(" + ")} == set(state.parameters)
            assert {name for _, name in report.extras} == set(state.extras)
            logits.append(trainer(kind, framework, dtype).predict(images))
        found = trained(kind, second, dtype, state, range(STEPS, 2 * STEPS))
    assert np.ptp(logits[0]) > 0.1
    moved = [np.max(np.abs(x - y)) for x, y in zip(values(stay[-1]), values(stay[STEPS - 1]), strict=True)]
    assert max(moved) > LR
    apart = [deviation(a, b) for a, b in zip(found, stay[STEPS:], strict=True)]
    return [float(np.max(np.abs(logits[0] - logits[1]))), *apart]


# One pair of a transformer, without Keras, is for `make test`: two minutes of compilation are in the others.
CASES = [
    pytest.param(
        kind,
        *pair,
        dtype,
        id=f"{kind}: {'-'.join(pair)}, {dtype}",
        marks=[
            *([pytest.mark.keras] if "keras" in pair else []),
            *([] if (kind, pair, dtype) == ("gpt", ("torch", "jax"), "float64") else [pytest.mark.slow]),
        ],
    )
    for dtype in BOUNDS
    for kind in NAMES
    for pair in permutations(FRAMEWORKS, 2)
]


@pytest.mark.parametrize(("kind", "first", "second", "dtype"), CASES)
def test_every_pair(kind: str, first: str, second: str, dtype: str, tmp_path: Path) -> None:
    found = handed_over(kind, first, second, dtype, tmp_path / "run.safetensors")
    assert max(found) < BOUNDS[dtype if EXACT or "keras" not in (first, second) else "float32"], found


@pytest.mark.slow
@pytest.mark.parametrize("framework", [marked(name) for name in FRAMEWORKS])
@pytest.mark.parametrize("kind", NAMES)
def test_the_same_framework_goes_on_without_any_difference(kind: str, framework: str, tmp_path: Path) -> None:
    assert handed_over(kind, framework, framework, "float64", tmp_path / "run.safetensors") == [0] * (STEPS + 1)
