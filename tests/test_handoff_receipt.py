"""`import_state(..., verify=k)`: recorded steps are made by the optimizer that goes on, and come out where they did."""

import copy
import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handoff_models import in_mid_run
from handoff_rows import ROWS
from handoff_support import PAIRS
from receipt_support import Run

from ada2ms.core import Group, Receipt, State
from ada2ms.core.state import Verification

ROW = ROWS["transformer encoder layer"]  # of packed projections in torch, with kernels of three axes elsewhere
OPTIONS: dict[str, Any] = {"adaptivity": 0.5, "weight_decay": 0.25}


@cache
def run(framework: str) -> Run:
    return Run(framework, ROW, **OPTIONS)


@cache
def recorded(framework: str) -> State:
    """In mid-run, with three steps."""
    using = run(framework)
    using.import_state(in_mid_run(using.export_state()))
    return using.record(3)


def seldom(pair: Any) -> Any:
    """What JAX would compile for another backend of Keras again is for `make slow`."""
    again = {"jax", "keras"} <= {*pair.values} and os.environ["KERAS_BACKEND"] != "tensorflow"
    return pytest.param(*pair.values, id=pair.id, marks=[*pair.marks, *[pytest.mark.slow] * again])


@pytest.mark.parametrize(("first", "second"), [seldom(pair) for pair in PAIRS])
def test_every_pair_proves_the_steps_of_the_other(first: str, second: str, tmp_path: Path) -> None:
    state = recorded(first)
    state.save(tmp_path / "run.safetensors")
    state = State.load(tmp_path / "run.safetensors")
    other = run(second)
    before = other.export_state()
    report = other.import_state(state, verify=3)
    assert report.verification is not None
    assert report.verification.verdict == "proven", report.verification
    assert str(report).endswith(str(report.verification))
    after = other.export_state()
    for name, entry in state.parameters.items():
        for slot, array in entry.slots().items():
            assert np.array_equal(after.parameters[name].slots()[slot], array), name
    other.import_state(before)


# What can be lost. The smaller model is of one Linear, and a slope.

SMALL = ROWS["PReLU"]
BASE: dict[str, Any] = {"adaptivity": 0.5, "weight_decay": 0.25}


def small(framework: str, **options: Any) -> Run:
    return Run(framework, SMALL, **{**BASE, **options})


@cache
def of_torch() -> State:
    using = small("torch")
    using.import_state(in_mid_run(using.export_state()))
    return using.record(3)


def verdict(using: Run, state: State, verify: int = 3, **options: Any) -> Verification:
    found = using.import_state(state, verify=verify, **options).verification
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"eps": 1e-6}, "the value of '0.dense.kernel' differs .* eps is 1e-06 here, 1e-08 in the state"),
        ({"weight_decay": 0.24}, "the value of .* weight_decay is 0.24 here, 0.25 in the state"),
        ({"adaptivity": 0.51}, "the value of .* adaptivity is 0.51 here, 0.5 in the state"),
        ({"adaptivity": lambda count: 0.5 + (count > 6) / 8}, "the value of '0.dense.kernel' differs"),
        ({"lr": 2.0**-8}, "the value of .* lr is 0.00390625 here, 0.0078125 in the state"),
        ({"betas": (0.9, 0.9991)}, "the second moment of .* b2 is 0.9991 here, 0.999 in the state"),
        ({"betas": (0.8, 0.999)}, "the first moment of .* b1 is 0.8 here, 0.9 in the state"),
        ({"max_norm": 1.0}, "the first moment of .* max_norm is 1.0 here, None in the state"),
        ({"maximize": True}, None),
    ],
    ids=["eps", "decay", "adaptivity", "schedule", "lr", "b2", "b1", "max_norm", "maximize"],
)
def test_hyperparameters_that_are_others_here(options: dict[str, Any], what: str | None) -> None:
    found = verdict(small("torch", **options), of_torch())
    if what is None:
        assert found.verdict == "proven"  # the recorded gradients are those of what is minimized
    else:
        assert found.verdict == "lost"
        assert re.match(what, found.why), found


@pytest.mark.parametrize(
    ("framework", "options"),
    [
        pytest.param("jax", {"eps": 1e-6}, id="jax"),
        pytest.param("keras", {"epsilon": 1e-6}, id="keras", marks=pytest.mark.keras),
    ],
)
def test_other_frameworks_see_it_too(framework: str, options: dict[str, Any]) -> None:
    assert verdict(small(framework, **options), of_torch()).verdict == "lost"


def first_moment(state: State) -> str:
    state.parameters["0.dense.bias"].exp_avg[...] = 0
    return "the first moment of '0.dense.bias'"


def second_moment(state: State) -> str:
    state.parameters["0.dense.kernel"].exp_avg_sq[2, 3] *= 1.0 + 1e-6
    return "the second moment of '0.dense.kernel'"


def global_moment(state: State) -> str:
    assert state.groups[0].global_exp_avg_sq is not None
    state.groups[0].global_exp_avg_sq *= 1.0 + 1e-9
    return "the global second moment of '0.dense.kernel'"


def count_of_steps(state: State) -> str:
    state.groups[0].global_step += 1
    return "the count of steps is 8 here, 9 in the state"


def count_of_a_tensor(state: State) -> str:
    state.parameters["1.prelu.slope"].step = 3
    return "the count of '1.prelu.slope' is 8 here, 3 in the state"


def value(state: State) -> str:
    param = state.parameters["0.dense.kernel"].param
    assert param is not None
    param[1, 1] += 1e-9
    return "the value of '0.dense.kernel'"


def skipped_steps(state: State) -> str:
    state.skipped = 1
    return "0 steps are skipped here, 1 in the state"


def a_gradient(state: State) -> str:
    assert state.receipt is not None
    state.receipt.steps[1].gradients["0.dense.bias"][0] += 1e-3
    return "the first moment of '0.dense.bias'"


def a_missing_gradient(state: State) -> str:
    assert state.receipt is not None
    del state.receipt.steps[2].gradients["0.dense.bias"]
    return "the count of '0.dense.bias' is 7 here, 8 in the state"


def a_step(state: State) -> str:
    assert state.receipt is not None
    state.receipt.steps.append(state.receipt.steps[0])
    return "the count of '0.dense.kernel' is 9 here, 8 in the state"


LOSSES = (
    first_moment,
    second_moment,
    global_moment,
    count_of_steps,
    count_of_a_tensor,
    value,
    skipped_steps,
    a_gradient,
    a_missing_gradient,
    a_step,
)


@pytest.mark.parametrize("lose", LOSSES, ids=lambda lose: lose.__name__)
def test_what_is_lost_on_the_way(lose: Callable[[State], str]) -> None:
    state = copy.deepcopy(of_torch())
    what = lose(state)
    using = small("torch")
    found = verdict(using, state)
    assert found.verdict == "lost"
    assert found.why.startswith(what), found
    name = "0.dense.kernel"
    imported = using.export_state().parameters[name].param
    assert np.array_equal(imported, state.parameters[name].param)  # which is imported, whatever the report says


# Where arrays are in the model


GATES = ROWS["LSTM, without biases"]


def other_order() -> dict[str, Any]:
    """Gates of input and forgetting exchanged, in all arrays, as they are in no framework."""
    from ada2ms.torch import plain_layers

    layers = dict(plain_layers(GATES.build["torch"]()))
    swap = {"i": "f", "f": "i"}
    names = {
        name: [re.sub(r"\.([if])\.", lambda x: f".{swap[x[1]]}.", part) for part in parts]
        for name, parts in layers["names"].items()
    }
    assert names != layers["names"]
    return {**layers, "names": names}


def test_an_order_of_gates_shows_in_gradients() -> None:
    using = Run("torch", GATES, **BASE)
    using.import_state(in_mid_run(using.export_state()))
    state = using.record_model(2, GATES.data)
    assert verdict(using, state, 2, loss=GATES.data) == Verification(
        "proven", "the optimizer here makes the 2 recorded steps as they were made, up to 0.0e+00 of the move"
    )
    other = Run("torch", GATES, layers=other_order(), **BASE)
    found = verdict(other, state, 2, loss=GATES.data)
    assert found.verdict == "lost"
    assert re.match("the gradient of 'inner.weight_ih_l0' of the model here differs in step 1 by", found.why), found
    found = verdict(other, state, 2)
    assert found.verdict == "proven"
    assert found.why.endswith("(that arrays are where the model reads them shows only with gradients=)")


@pytest.mark.parametrize("framework", ["jax", pytest.param("keras", marks=pytest.mark.keras)])
def test_gradients_of_other_frameworks_models(framework: str) -> None:
    if framework == "keras" and os.environ["KERAS_BACKEND"] != "tensorflow":
        pytest.skip("the gradients of this test are TensorFlow's")
    first = Run("torch", SMALL, **BASE)
    first.import_state(in_mid_run(first.export_state()))
    state = first.record_model(2, SMALL.data)
    using = small(framework)
    assert verdict(using, state, loss=SMALL.data, verify=2).verdict == "proven"
    found = verdict(using, state, loss=lambda seed: SMALL.data(seed + 1), verify=2)
    assert found.verdict == "lost"
    assert re.match("the gradient of .* differs in step 1 by .*: another batch or model", found.why), found


# All that an optimizer may have


@cache
def scheduled(kind: str) -> State:
    """With a rate that is scheduled outside; of a kind also a tensor's own s, skipped steps, clipping or groups."""
    using = small("torch", **KINDS[kind])
    using.import_state(in_mid_run(using.export_state()))
    receipt = Receipt(using.export_state())
    for i, factor in enumerate((0.5, 0.25, 0.125)):
        for group in using.optimizer.param_groups:
            group["lr"] *= factor
        gradients = {name: np.full(shape, np.inf if i == 1 else i + 1.0) for name, shape in using.shapes().items()}
        if kind != "tensor" and i == 1:
            gradients = {"a.weight": np.ones(using.shapes()["a.weight"])}  # the others have none
        receipt.add(using.step(gradients), lr=using.optimizer.param_groups[0]["lr"])  # of what no group matches
    return using.export_state(receipt)


KINDS: dict[str, dict[str, Any]] = {
    "tensor": {"scope": "tensor", "nonfinite": "skip"},
    "clipped": {"max_norm": 1.0},
    "groups": {"groups": [Group("bias", lr_scale=0.5, weight_decay=0.0)]},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("framework", ["torch", "jax", pytest.param("keras", marks=pytest.mark.keras)])
def test_rates_groups_clipping_and_skipped_steps(framework: str, kind: str) -> None:
    if framework == "jax" and kind == "tensor":
        pytest.skip("a program more to compile, for what the other frameworks show")
    state = scheduled(kind)
    assert state.skipped == (1 if kind == "tensor" else 0)
    options = dict(KINDS[kind])
    if framework == "keras" and kind == "clipped":
        options = {"global_clipnorm": options["max_norm"]}
    using = small(framework, **options, **({"injected": True} if framework == "jax" else {}))
    assert verdict(using, state).verdict == "proven"


def test_a_rate_that_was_not_recorded_is_lost() -> None:
    state = copy.deepcopy(scheduled("clipped"))
    assert state.receipt is not None
    state.receipt.steps[0].lr = None
    found = verdict(small("torch", max_norm=1.0), state)
    assert found.verdict == "lost"
    assert found.why.startswith("the value of '0.dense.kernel'"), found
