"""States with what the rule's second version has added: values in two numbers of 16 bits, groups by name, extras."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from state_support import FIXTURE_2, assert_equal, entry, fit, target, written_2

from ada2ms import core
from ada2ms.cli import main
from ada2ms.core import Hyperparameters, State, StateError
from ada2ms.core.groups import assign
from ada2ms.core.hyperparameters import from_arguments
from ada2ms.core.spec import BFLOAT16, rounded, widen
from ada2ms.core.state import Entry, Group, arguments, named_groups, to_portable

TYPES = {"bfloat16": BFLOAT16, "float16": np.dtype(np.float16)}


def test_every_fault_is_listed_at_once() -> None:
    good = entry((2,))
    parameters = {
        "narrow": replace(good, compensation=np.zeros(2, np.float16)),
        "shape": replace(good, compensation=np.zeros(3, np.float32)),
    }
    extras: dict[Any, Any] = {"list": [1.0], "text": np.array(["a"]), "object": np.array([None]), 3: np.zeros(1)}
    with pytest.raises(StateError) as caught:
        State(parameters, [Group(["narrow", "shape"], {"lr_scale": -1.0})], max_norm=0.0, compensated=2, extras=extras)  # type: ignore[arg-type]
    for part in (
        "'narrow': Invalid compensation: float16 (must be an array of at least float32)",
        "'shape': Invalid compensation: shape (3,) (must be that of exp_avg, (2,))",
        "group 0: Invalid lr_scale: -1.0",
        "Invalid max_norm: 0.0 (max_norm must be a number in (0, inf] or None)",
        "Invalid compensated: 2",
        "extra 'list': list (must be an array of numbers)",
        "extra 'text': <U1",
        "extra 'object': object",
        "extra 3: its name must be a string",
    ):
        assert sum(part in problem for problem in caught.value.problems) == 1, part
    assert len(caught.value.problems) == 9


def test_a_pickle_of_the_version_before_can_be_saved(tmp_path: Path) -> None:
    state = pickle.loads(Path(__file__).with_name("data").joinpath("core-0.1.0.pickle").read_bytes())["state"]
    assert (state.max_norm, state.compensated, state.extras) == (None, False, {})
    state.save(tmp_path / "a.safetensors")
    assert_equal(State.load(tmp_path / "a.safetensors"), state)
    assert_equal(pickle.loads(pickle.dumps(written_2())), written_2())


# Values of 16 bits.


def trained(dtype: str) -> tuple[State, Any]:
    """A state of the rule with a compensation, and its parameters in float64."""
    rng = np.random.default_rng(3)
    optimizer = core.Ada2MS([rounded(rng.normal(size=(3, 4)), TYPES[dtype])], lr=1e-3, compensated=True)
    for _ in range(5):
        optimizer.step([rng.normal(size=(3, 4))])
    (group,) = optimizer.groups
    assert group.compensation[0] is not None
    param, rest = (widen(x).astype(np.float32) for x in (group.params[0], group.compensation[0]))
    assert np.all(rest != 0)
    made = Entry(group.exp_avg[0], group.exp_avg_sq[0], 5, param=param, compensation=rest)
    groups = [Group(["w"], {}, group.global_exp_avg_sq[0], 5)]
    return State({"w": made}, groups, compensated=True), param.astype(np.float64) + rest


def held(dtype: str, kept: bool = True) -> Any:
    """A parameter of 16 bits, with a compensation or without, as a target."""
    return {"w": target((3, 4), param=dtype, **({"compensation": dtype} if kept else {}))}


@pytest.mark.parametrize("dtype", TYPES)
def test_into_the_same_type(dtype: str) -> None:
    state, _ = trained(dtype)
    for param in (state.parameters["w"].param, state.parameters["w"].compensation):
        assert param is not None
        param[0] = -0.0
    for options in ({}, {"cast": True}, {"values": False}):
        found = fit(state, held(dtype), **options).entries["w"]
        assert found.compensation.tobytes() == state.parameters["w"].compensation.tobytes()  # type: ignore[union-attr]
        if options.get("values", True):
            assert found.param.tobytes() == state.parameters["w"].param.tobytes()  # type: ignore[union-attr]


@pytest.mark.parametrize(("dtype", "unit"), [("bfloat16", 2.0**-7), ("float16", 2.0**-10)])
def test_what_is_left_may_be_half_a_unit(dtype: str, unit: float) -> None:
    """As it is after a step that rounded what was left: the model keeps its value, although an even one is as near."""
    numbers = [(1 + unit, unit / 2), (1 + unit, -unit / 2), (1, unit / 2), (np.inf, 0), (-1 - unit, -unit / 2)]
    param, rest = np.array([*numbers, (1, unit)], np.float32).T.copy()
    state = State({"w": replace(entry((6,)), param=param, compensation=rest)}, [Group(["w"], {})], compensated=True)
    found = fit(state, {"w": target((6,), param=dtype, compensation=dtype)}).entries["w"]
    np.testing.assert_array_equal(found.param, [*param[:-1], 1 + unit])  # the last is nearer than what was there
    np.testing.assert_array_equal(found.compensation, [*rest[:-1], 0])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("wide", ["float32", "float64"])
def test_into_a_wider_type_goes_the_sum(dtype: str, wide: str) -> None:
    state, value = trained(dtype)
    found = fit(state, {"w": target((3, 4), param=wide)}).entries["w"]
    np.testing.assert_array_equal(found.param, value)
    assert (found.param.dtype, found.compensation) == (np.float32, None)
    apart = replace(state.parameters["w"], compensation=np.full((3, 4), 2.0**-40, np.float32))
    far = State({"w": apart}, state.groups)
    with pytest.raises(StateError, match="param of 'w' is float32, which does not hold its float64 values"):
        fit(far, {"w": target((3, 4))})
    assert fit(far, {"w": target((3, 4))}, cast=True).entries["w"].param.dtype == np.float64


@pytest.mark.parametrize("dtype", TYPES)
def test_into_16_bits_without_a_compensation_only_by_rounding(dtype: str) -> None:
    state, value = trained(dtype)
    with pytest.raises(StateError, match=f"type: param of 'w' is {dtype}, which does not hold its float32 values"):
        fit(state, held(dtype, kept=False))
    found = fit(state, held(dtype, kept=False), cast=True).entries["w"]
    np.testing.assert_array_equal(found.param, value)  # which the framework rounds
    assert found.compensation is None
    zeros = replace(state.parameters["w"], compensation=np.zeros((3, 4), np.float32))
    exact = fit(State({"w": zeros}, state.groups), held(dtype, kept=False)).entries["w"]
    np.testing.assert_array_equal(exact.param, zeros.param)


def test_into_the_other_type_of_16_bits() -> None:
    """Two float16 hold what two bfloat16 do, in their range; the other way it is rounded, to 16 bits."""
    state, value = trained("bfloat16")
    found = fit(state, held("float16")).entries["w"]
    np.testing.assert_array_equal(found.param, widen(rounded(value, TYPES["float16"])))
    np.testing.assert_array_equal(found.param.astype(np.float64) + found.compensation, value)
    assert np.any(found.param != state.parameters["w"].param)
    state, value = trained("float16")
    with pytest.raises(StateError, match="param of 'w' is bfloat16, which does not hold its values, not even with its"):
        fit(state, held("bfloat16"))
    found = fit(state, held("bfloat16"), cast=True).entries["w"]
    np.testing.assert_array_equal(found.param, widen(rounded(value, BFLOAT16)))
    np.testing.assert_array_equal(found.compensation, widen(rounded(value - found.param, BFLOAT16)))
    np.testing.assert_allclose(found.param + found.compensation, value, rtol=2.0**-16)
    assert state.parameters["w"].param is not None
    state.parameters["w"].param[0, 0] = 1e5
    state.parameters["w"].compensation[0, 0] = 0  # type: ignore[index]
    with pytest.raises(StateError, match="param of 'w' is float16, which does not hold its values, not even with its"):
        fit(state, held("float16"))
    assert fit(state, held("float16"), cast=True).entries["w"].param[0, 0] == np.inf


@pytest.mark.parametrize("dtype", TYPES)
def test_a_state_without_compensation_into_a_compensated_optimizer(dtype: str) -> None:
    """It becomes what is left of the value; where two numbers do not hold that, only by rounding."""
    bits = 16 if dtype == "bfloat16" else 22
    holds = np.array([1 + 2.0**-9, -3, 1 + 2.0 ** (1 - bits), np.inf])
    too_long = np.array([1 + 2.0**-12 + 2.0**-24, *holds[1:]])
    for values, options in ((holds, {}), (too_long, {"cast": True})):
        made = Entry(np.zeros(4), np.zeros(4), 1, param=values)
        state = State({"w": made}, [Group(["w"], {}, 0.5, 1)])
        where = {"w": target((4,), "float64", param=dtype, compensation=dtype)}
        found = fit(state, where, **options).entries["w"]
        np.testing.assert_array_equal(found.param, widen(rounded(values, TYPES[dtype])))
        np.testing.assert_array_equal(found.compensation[3], 0)
        np.testing.assert_allclose(found.param + found.compensation, values, rtol=2.0**-bits)
    with pytest.raises(StateError, match="not even with its compensation"):
        fit(state, where)
    np.testing.assert_array_equal(fit(state, where, values=False).entries["w"].compensation, 0)


def test_a_compensation_that_goes_nowhere_is_in_the_notes() -> None:
    state, _ = trained("bfloat16")
    fitted = fit(state, {"w": target((3, 4))}, values=False)
    assert fitted.entries["w"].compensation is None
    assert fitted.report.notes == [
        "the compensation of 'w' stays behind: it belongs to the value, which is not imported"
    ]
    assert fit(state, held("bfloat16"), values=False).report.notes == []


def test_a_compensation_has_the_values_layout() -> None:
    state, _ = trained("float16")
    options: dict[str, Any] = {"names": {"k": "w"}, "axes": {"k": (1, 0)}}
    where = {"k": target((4, 3), param="float16", compensation="float16")}
    found = fit(state, where, **options).entries
    assert state.parameters["w"].compensation is not None
    np.testing.assert_array_equal(found["k"].compensation, state.parameters["w"].compensation.T)
    back, _ = to_portable(found, **options)
    np.testing.assert_array_equal(back["w"].compensation, state.parameters["w"].compensation)


# Groups by name.

BASE = {"lr": 0.5, "b1": 0.75, "b2": 0.5, "eps": 0.125, "weight_decay": 0.25, "adaptivity": core.Linear(1, 0, 9)}
OWN = {"lr": 0.0625, "b1": 0.5, "b2": 0.75, "eps": 0.25, "weight_decay": 0.0, "adaptivity": 1.0}
PARAMS = {"w": 2, "b": 1, "v": 2, "c": 1, "x.y": 2}


def grouped(*groups: tuple[list[str], dict[str, Any]], **options: Any) -> State:
    entries = {name: entry((2,) * ndim) for name, ndim in PARAMS.items()}
    return State(entries, [Group(names, hyper, 0.5, 3) for names, hyper in groups], **options)


@pytest.mark.parametrize("framework", ["torch", "keras", "optax"])
@pytest.mark.parametrize(
    "groups",
    [
        [(["w", "v", "x.y"], BASE), (["b", "c"], {**BASE, "weight_decay": 0.0})],
        [(["b", "c"], OWN), (["w", "v", "x.y"], BASE)],
        [(["w"], {**BASE, "lr": 0.25}), (["b", "x.y"], BASE), (["v"], OWN), (["c"], {**BASE, "lr": 0.25})],
        [(["w"], {**BASE, "lr": 0.0}), (["b", "x.y", "v", "c"], BASE), ([], OWN)],
    ],
)
@pytest.mark.parametrize("names", [None, {"kernel": "w", "bias": "b", "frozen": "z"}])
def test_arguments_make_the_groups(framework: Any, groups: Any, names: Any) -> None:
    """Every parameter has its own hyperparameters again, found by its name in the framework."""
    found = arguments(grouped(*groups), framework, names)
    made = found.pop("groups")
    base = from_arguments(found, framework)
    called = {origin: name for name, origin in (names or {}).items()}
    here = [called.get(name, name) for name in PARAMS]
    expected = {called.get(name, name): hyper for own, hyper in groups for name in own}
    for name, index in zip(here, assign(made, here, list(PARAMS.values())), strict=True):
        hyper = Hyperparameters(**{name: base[name] for name in BASE})
        assert hyper if index is None else made[index].of(hyper) == Hyperparameters(**expected[name])
    most = max((hyper for _, hyper in groups), key=lambda x: sum(len(own) for own, hyper in groups if hyper == x))
    assert {name: base[name] for name in BASE} == most


def test_groups_that_do_not_differ_are_none() -> None:
    """Whatever the names are: nothing has to be said."""
    state = grouped((["w", "b"], BASE), (["v", "c", "x.y"], dict(BASE)), max_norm=2.0, compensated=True)
    found = arguments(state, "keras", str.upper)
    assert (found["global_clipnorm"], found["compensated"], found["learning_rate"]) == (2.0, True, 0.5)
    assert "groups" not in found
    plain = arguments(grouped((list(PARAMS), BASE)), "torch")
    assert not {"max_norm", "compensated", "groups"} & set(plain)
    assert arguments(State({}, []), "torch") == {"scope": "model", "nonfinite": "propagate"}


def test_a_recorded_factor_of_the_learning_rate_is_kept() -> None:
    """Where the rate itself is a schedule, which no state holds, or is 0 at the time."""
    unknown = {name: value for name, value in BASE.items() if name != "lr"}
    for common in (unknown, {**BASE, "lr": 0.0}):
        state = grouped((["w", "v", "x.y"], common), (["b", "c"], {**common, "lr_scale": 0.125}))
        hyper, (group,) = named_groups(state)
        assert group.to_dict() == {"match": r"\A(?:b|c)\Z", "lr_scale": 0.125}
        assert "lr_scale" not in hyper
    most = grouped((["w", "v", "x.y"], {**unknown, "lr_scale": 0.5}), (["b", "c"], unknown))
    assert named_groups(most)[1][0].lr_scale == 2.0


def test_groups_that_cannot_be_said() -> None:
    state = grouped((["w", "v", "x.y"], BASE), (["b", "c"], OWN))
    with pytest.raises(StateError, match=r"hyperparameters of their own.*\n.*names is a function, which does not tell"):
        arguments(state, "torch", str.lower)
    partly = {name: value for name, value in OWN.items() if name not in ("adaptivity", "lr")}
    with pytest.raises(StateError, match=r"group 1: .*; of another group adaptivity, lr is known, too"):
        arguments(grouped((["w", "v", "x.y"], BASE), (["b", "c"], partly)), "torch")
    with pytest.raises(StateError, match=r"a learning rate of 0.5 is no multiple of 0.0, that of most parameters"):
        arguments(grouped((["w", "v", "x.y"], {**BASE, "lr": 0.0}), (["b", "c"], BASE)), "torch")


# The command line.


def test_show_and_diff(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    assert main(["state", "show", str(FIXTURE_2)]) == 0
    shown = capsys.readouterr().out
    for part in ("max_norm    0.1", "compensated", "|compensation| 4.4", "lr_scale 0.5", "extra norm.count  ()  int64"):
        assert part in shown, part
    state = written_2()
    state.max_norm, state.compensated = None, False
    state.parameters["half"].compensation = None
    state.extras["norm.mean"][0] = 0.75
    state.extras["seen"][0] = False
    state.extras["phase"] = state.extras["phase"][0]
    state.extras["more"] = state.extras.pop("none")
    state.save(tmp_path / "b.safetensors")
    assert main(["state", "diff", str(FIXTURE_2), str(tmp_path / "b.safetensors")]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "half: compensation in the first only",
        "extra norm.mean differs by 2.500e-01, 3.3e-01 of the largest",
        "extra seen differs by 1.000e+00, inf of the largest",
        "extra none in the first only",
        "extra phase of shape (1, 2) and (2,)",
        "extra more in the second only",
        "max_norm: 0.1 and None",
        "compensated: True and False",
    ]
