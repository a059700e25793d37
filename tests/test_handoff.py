"""From framework to framework in mid-run: the trajectory that one framework alone would have given."""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handoff_support import FRAMEWORKS, LR, PAIRS, marked

from ada2ms import core
from ada2ms.cli import main
from ada2ms.core import State, StateError
from ada2ms.core.state import Entry, Group
from ada2ms.demo import digits
from ada2ms.demo.run import deviation, mutual_bound
from support import settings

Array = Any
SEGMENT = 5  # steps in each framework
OPTIONS: dict[str, dict[str, Any]] = {
    "half-way": {"adaptivity": 0.5},
    "transition, tensor": {"adaptivity": core.Cosine(1.0, 0.0, 12), "scope": "tensor", "nonfinite": "skip"},
}


# The transition has all the state that there is, and float64 the narrower bounds; the rest is for `make slow`.
KINDS = pytest.mark.parametrize(
    ("dtype", "options"),
    [
        pytest.param(dtype, options, id=f"{dtype}, {options}", marks=[pytest.mark.slow] if seldom else [])
        for dtype, options, seldom in (
            ("float64", "half-way", os.environ["KERAS_BACKEND"] != "tensorflow"),
            ("float32", "half-way", True),
            ("float64", "transition, tensor", False),
        )
    ],
)


@contextmanager
def precision(dtype: str) -> Iterator[None]:
    with ExitStack() as stack:
        for framework in FRAMEWORKS:
            stack.enter_context(settings(framework, dtype, "cpu"))
        yield


@cache
def trainer(framework: str, dtype: str, options: str) -> Any:
    """One for all tests, since it takes a second to compile: whatever it has been used for, a state replaces it all."""
    weights = digits.initial_weights(digits.CONVNET, seed=1, dtype=dtype)
    if framework == "torch":
        from ada2ms.demo.on_torch import TorchTrainer
        from ada2ms.torch import Ada2MS

        return TorchTrainer(weights, lambda params: Ada2MS(params, lr=LR, **OPTIONS[options]))
    if framework == "jax":
        from ada2ms.demo.on_jax import JaxTrainer
        from ada2ms.jax import ada2ms

        return JaxTrainer(weights, ada2ms(LR, **OPTIONS[options]))
    from ada2ms.demo.on_keras import KerasTrainer
    from ada2ms.tf import Ada2MS as KerasAda2MS

    return KerasTrainer(weights, KerasAda2MS(LR, **OPTIONS[options]))


def beginning(dtype: str, options: str) -> State:
    """No step done yet."""
    weights = digits.initial_weights(digits.CONVNET, seed=0, dtype=dtype)
    scope = OPTIONS[options].get("scope", "model")
    own = 0.0 if scope == "tensor" else None
    names = [f"{i}.{kind}.{role}" for i, kind in enumerate(("conv", "conv", "dense")) for role in ("kernel", "bias")]
    entries = {
        name: Entry(np.zeros_like(w), np.zeros_like(w), 0, own, w) for name, w in zip(names, weights, strict=True)
    }
    return State(entries, [Group(names, {}, None if own is not None else 0.0, 0)], scope=scope)


def run(segments: tuple[str, ...], dtype: str, options: str, file: Path | None = None) -> list[list[Array]]:
    """The parameters after each step, `SEGMENT` in each framework, handed over through a file if one is given."""
    state, found = beginning(dtype, options), []
    batches = digits.load(dtype).batches(SEGMENT * len(segments), seed=0)
    with precision(dtype):
        for framework in segments:
            using = trainer(framework, dtype, options)
            using.import_state(state)
            for _ in range(SEGMENT):
                using.step(*next(batches))
                found.append(using.parameters())
            state = using.export_state()
            if file is not None:
                state.save(file)
                state = State.load(file)
    return found


@cache
def alone(framework: str, segments: int, dtype: str, options: str) -> list[list[Array]]:
    """Without interruption: one segment of all the steps."""
    using = trainer(framework, dtype, options)
    with precision(dtype):
        using.import_state(beginning(dtype, options))
        found = []
        for images, labels in digits.load(dtype).batches(SEGMENT * segments, seed=0):
            using.step(images, labels)
            found.append(using.parameters())
    return found


def assert_same_trajectory(found: list[list[Array]], expected: list[list[Array]], dtype: str) -> None:
    """As far as the closed-loop tests and the demo let frameworks part that each train alone: float64, 1e-13."""
    for step, (a, b) in enumerate(zip(found, expected, strict=True), start=1):
        assert deviation(a, b) < (1e-13 if dtype == "float64" else mutual_bound(step)), f"step {step}"


@KINDS
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_every_pair(first: str, second: str, dtype: str, options: str) -> None:
    found = run((first, second), dtype, options)
    assert_same_trajectory(found, alone(first, 2, dtype, options), dtype)
    assert_same_trajectory(found, alone(second, 2, dtype, options), dtype)


@pytest.mark.keras
@KINDS
def test_the_chain(dtype: str, options: str, tmp_path: Path) -> None:
    found = run(("torch", "jax", "keras", "torch"), dtype, options, tmp_path / "handoff.safetensors")
    assert_same_trajectory(found, alone("torch", 4, dtype, options), dtype)


@KINDS
@pytest.mark.parametrize("framework", [marked(name) for name in FRAMEWORKS])
def test_resuming_where_it_was_changes_nothing(framework: str, dtype: str, options: str, tmp_path: Path) -> None:
    found = run((framework, framework), dtype, options, tmp_path / "handoff.safetensors")
    for a, b in zip(found, alone(framework, 2, dtype, options), strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("framework", [marked(name) for name in FRAMEWORKS])
def test_a_state_that_does_not_fit_changes_nothing(framework: str) -> None:
    using = trainer(framework, "float32", "half-way")
    with precision("float32"):
        before = using.export_state()
        state = beginning("float32", "half-way")
        state.parameters["9.dense.bias"] = state.parameters.pop("2.dense.bias")
        state.parameters["0.conv.bias"] = state.parameters["2.dense.kernel"]
        state.parameters["0.conv.kernel"].exp_avg = np.full((3, 3, 1, 8), 0.1)
        with pytest.raises(StateError) as caught:
            using.import_state(state)
        for part in ("missing: ", "superfluous: '9.dense.bias'", "shape: ", "type: exp_avg of "):
            assert sum(part in problem for problem in caught.value.problems) == 1
        after = using.export_state()
        other = beginning("float32", "transition, tensor")
        with pytest.raises(StateError, match="its scope is 'tensor', the optimizer's 'model'"):
            using.import_state(other)
    for name, entry in before.parameters.items():
        for slot, array in entry.slots().items():
            assert np.array_equal(getattr(after.parameters[name], slot), array)
    assert before.groups == after.groups


@pytest.mark.slow
def test_the_demo_hands_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--steps", "9", "--out", str(tmp_path), "--frameworks", "torch", "jax", "--handoff", "--json"]
    assert main(["demo", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [f["framework"] for f in found["frameworks"]] == ["torch", "jax", "torch->jax->torch"]
    assert len(found["frameworks"][2]["losses"]) == 9
    assert found["parted"] == []
    transformer = found["transformer"]
    assert transformer["parted"] == []
    assert [s["framework"] for s in transformer["segments"]] == ["torch", "jax", "torch"]
    assert [(s["first"], s["last"]) for s in transformer["segments"]] == [(1, 5), (6, 10), (11, 15)]
    stayed, *others = [s["deviations"] for s in transformer["segments"]]
    assert stayed == [0.0] * 5  # no hand-over yet
    assert all(0 < value <= transformer["bound"] for deviations in others for value in deviations)
