"""The state that frameworks hand to each other: when it is valid, and when it fits."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from state_support import FIXTURE, assert_equal, entry, fit, target, written

from ada2ms import core
from ada2ms.core import State, StateError
from ada2ms.core.hyperparameters import from_arguments
from ada2ms.core.state import (
    Entry,
    Group,
    Target,
    arguments,
    from_portable,
    only_count,
    optimizer_problems,
    to_portable,
)


def test_every_fault_is_listed_at_once() -> None:
    good = entry((2,))
    parameters = {
        "half": replace(good, exp_avg=good.exp_avg.astype(np.float16)),
        "shape": replace(good, param=np.zeros(3, np.float32)),
        "sign": replace(good, exp_avg_sq=np.array([1, -1], np.float32)),
        "step": replace(good, step=-1),
        "own": replace(good, global_exp_avg_sq=-1.0),
        "alone": good,
    }
    groups = [
        Group(["half", "shape", "sign", "step", "own", "own", "ghost"], {"lr": -1.0}, -1.0, 1),
        Group([], {"adaptivity": 2.0, "rate": 1.0, "lr": core.Constant(0.1)}, None, 1.5),  # type: ignore[arg-type]
    ]
    with pytest.raises(StateError) as caught:
        State(parameters, groups, scope="layer", nonfinite="skip", skipped=-1)  # type: ignore[arg-type]
    for part in (
        "'half': Invalid exp_avg: float16",
        "'shape': Invalid param: shape (3,) (must be that of exp_avg, (2,))",
        "'sign': Invalid exp_avg_sq: an entry is -1.0",
        "'step': Invalid step: -1",
        "'own': Invalid global_exp_avg_sq: -1.0",
        "'alone' is in 0 groups",
        "'own' is in 2 groups",
        "'ghost' is in 1 groups",
        "group 0: Invalid learning rate: -1.0",
        "group 0: Invalid global_exp_avg_sq: -1.0",
        "group 1: Invalid adaptivity: 2.0",
        "group 1: Invalid hyperparameter: 'rate'",
        "group 1: Invalid lr: Constant(value=0.1)",
        "group 1: Invalid global_step: 1.5",
        "Invalid scope: 'layer'",
        "Invalid skipped: -1",
    ):
        assert sum(part in problem for problem in caught.value.problems) == 1, part
    assert len(caught.value.problems) == 16


def test_every_misfit_is_listed_at_once() -> None:
    names = ["kernel", "wrong", "wide", "extra", "none"]
    parameters = {
        name: entry((2, 3), "float64" if name == "wide" else "float32", seed=i) for i, name in enumerate(names)
    }
    parameters["none"].param = None
    state = State(parameters, [Group(names[:3], {}, 0.5, 3), Group(names[3:], {}, 0.25, 3)])
    targets = {
        "dense/kernel": target((3, 2)),
        "wrong": target((3, 2)),
        "wide": target((2, 3)),
        "none": target((2, 3)),
        "new": target((1,)),
    }
    with pytest.raises(StateError) as caught:
        fit(state, targets, names={"dense/kernel": "kernel"}, axes={"dense/kernel": (1, 0)})
    for part in (
        "superfluous: 'extra'",
        "shape: 'wrong' has (3, 2); in the state (2, 3)",
        "type: param of 'wide' is float32, which does not hold its float64 values",
        "type: exp_avg of 'wide'",
        "type: exp_avg_sq of 'wide'",
        "missing: the value of 'none'",
        "missing: 'new'",
        "groups: 2 global second moments",
    ):
        assert sum(part in problem for problem in caught.value.problems) == 1, part
    assert len(caught.value.problems) == 8
    with pytest.raises(StateError, match="there is no parameter 'ghost' here") as caught:
        fit(state, targets, names={"ghost": "a", "new": "none"}, axes={"ghost": (0,), "wide": (0, 0)})
    assert len(caught.value.problems) == 4
    with pytest.raises(StateError, match="its scope is 'model', the optimizer's 'tensor'"):
        fit(state, targets, scope="tensor")


def test_names_and_axes_go_both_ways() -> None:
    here = {"fc.weight": entry((4, 3)), "fc.bias": entry((4,))}
    options: dict[str, Any] = {"names": {"fc.weight": "kernel", "fc.bias": "bias"}, "axes": {"fc.weight": (1, 0)}}
    there, called = to_portable(here, **options)
    assert called == options["names"]
    assert there["kernel"].exp_avg.shape == (3, 4)
    state = State(there, [Group(["kernel", "bias"], {}, 0.5, 3)])
    fitted = fit(state, {name: target(x.exp_avg.shape) for name, x in here.items()}, **options)
    for name, x in here.items():
        for slot, array in x.slots().items():
            assert np.array_equal(getattr(fitted.entries[name], slot), array)
    assert "fc.weight  <-  kernel  (4, 3)  axes (1, 0)" in str(fitted.report)
    by_function = fit(state, {"KERNEL": target((3, 4)), "BIAS": target((4,))}, names=str.lower)
    assert np.array_equal(by_function.entries["KERNEL"].exp_avg, there["kernel"].exp_avg)


@pytest.mark.parametrize(
    ("value", "dtype", "held"),
    [
        (1 + 2**-7, "bfloat16", True),
        (1 + 2**-8, "bfloat16", False),
        (1 + 2**-10, "float16", True),
        (1 + 2**-11, "float16", False),
        (1e5, "float16", False),
        (1 + 2**-23, "float32", True),
        (1 + 2**-24, "float32", False),
        (np.nan, "bfloat16", True),
        (np.inf, "float16", True),
    ],
)
def test_a_type_must_hold_the_values(value: float, dtype: str, held: bool) -> None:
    """At the last digit that fits, and at the first that does not."""
    x = np.array([value])
    state = State({"a": Entry(x, np.ones(1), 1, param=x)}, [Group(["a"], {}, 0.5, 1)])
    if held:
        assert fit(state, {"a": target((1,), dtype)}).entries
    else:
        with pytest.raises(StateError, match=f"is {dtype}, which does not hold"):
            fit(state, {"a": target((1,), dtype)})
    assert fit(state, {"a": target((1,), dtype)}, cast=True).entries


def test_notes_travel_to_the_report(tmp_path: Path) -> None:
    """Of what a state does not hold; a file without notes is what it was before there were any."""
    notes = ["1 of 4 gradients was accumulated; it is not in the state", "\u03b2"]
    state = replace(written(), notes=notes)
    state.save(tmp_path / "a.safetensors")
    found = State.load(tmp_path / "a.safetensors")
    assert_equal(found, state)
    assert found.notes == notes
    assert State.load(FIXTURE).notes == []
    dtypes = {name: {slot: str(x.dtype) for slot, x in e.slots().items()} for name, e in state.parameters.items()}
    targets = {name: Target(e.exp_avg.shape, dtypes[name]) for name, e in state.parameters.items()}
    state.groups = [replace(state.groups[0], params=list(targets))]
    fitted = from_portable(state, targets, names=None, axes=None, scope="model", values=False, cast=False)
    assert fitted.report.notes == notes
    assert str(fitted.report).splitlines()[-2:] == notes
    fitted.report.notes.append("another")
    assert state.notes == notes


# What the transfer of all frameworks has in common.


@pytest.mark.parametrize(
    ("framework", "expected"),
    [
        ("torch", {"lr": 0.1, "betas": (0.5, 0.75), "eps": 1e-3}),
        ("keras", {"learning_rate": 0.1, "beta_1": 0.5, "beta_2": 0.75, "epsilon": 1e-3}),
        ("optax", {"learning_rate": 0.1, "b1": 0.5, "b2": 0.75, "eps": 1e-3}),
    ],
)
def test_arguments_have_the_frameworks_names(framework: Any, expected: dict[str, Any]) -> None:
    hyper = {"lr": 0.1, "b1": 0.5, "b2": 0.75, "eps": 1e-3}
    state = State({}, [Group([], hyper, 0.0)], nonfinite="skip")
    assert arguments(state, framework) == {**expected, "scope": "model", "nonfinite": "skip"}
    assert from_arguments({**expected, "foreach": None}, framework) == hyper
    del hyper["b1"]
    found = arguments(state, framework)
    assert "betas" not in found
    assert ("b2" in found, "beta_2" in found) == (framework == "optax", framework == "keras")


def test_optimizers_without_such_a_state_are_told_apart() -> None:
    assert optimizer_problems("Adam", known=True, amsgrad=False) == []
    assert "SGD has another state (must be" in optimizer_problems("SGD", known=False, amsgrad=True)[0]
    assert "amsgrad" in optimizer_problems("Adam", known=True, amsgrad=True)[0]
    assert only_count([entry((2,), step=4), entry((3,), step=4)], "Adam") == 4
    assert only_count([], "Adam") == 0
    with pytest.raises(StateError, match=r"Adam has one count of updates; the state's parameters have \[3, 4\]"):
        only_count([entry((2,), step=4), entry((3,), step=3)], "Adam")


def test_what_is_public_goes_between_processes() -> None:
    """By the public name of its class, so that pickles outlive the files of the package."""
    for value in (written(), entry((2,)), Group(["a"]), StateError("It does not fit", ["a", "b"])):
        data = pickle.dumps(value)
        assert b"ada2ms.core.state" in data
        assert b"ada2ms.core.state." not in data
        back = pickle.loads(data)
        assert type(back) is type(value)
        assert str(back) == str(value)


def test_a_pickle_of_the_version_before_loads() -> None:
    """It was written when the state was one module; it has no notes, which came later."""
    loaded = pickle.loads(Path(__file__).with_name("data").joinpath("core-0.1.0.pickle").read_bytes())
    state = loaded["state"]
    assert (type(state), state.notes) == (State, [])
    assert state.parameters["w"].step == 3
    np.testing.assert_array_equal(state.parameters["w"].exp_avg_sq, [[0, 1], [4, 9]])
    assert state.groups == [Group(["w"], {"lr": 0.1, "adaptivity": core.Linear(1, 0, 9)}, 0.5, 3)]
    assert (state.nonfinite, state.skipped, state.source) == ("skip", 1, "by hand")
    schedules = [core.Constant(0.3), core.Linear(1, 0, 9), core.Cosine(1, 0, 9), core.Exponential(1, 0, 9.5)]
    assert loaded["schedules"] == schedules
    assert loaded["hyper"] == core.Hyperparameters(lr=0.1, adaptivity=0.5)  # which was the default
