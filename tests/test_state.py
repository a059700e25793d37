"""The state that frameworks hand to each other, its file, and `ada2ms state`."""

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handoff_support import FRAMEWORKS, marked

from ada2ms import core
from ada2ms.cli import main
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

pytest.importorskip("safetensors", reason="safetensors is not installed")
FIXTURE = Path(__file__).with_name("data") / "state-format-1.safetensors"


def entry(shape: tuple[int, ...], dtype: str = "float32", step: int = 3, seed: int = 0, **own: Any) -> Entry:
    rng = np.random.default_rng(seed)

    def array() -> Any:
        real = rng.standard_normal(shape)
        x = real + 1j * rng.standard_normal(shape) if "complex" in dtype else real
        return np.asarray(x, dtype)

    square = array()
    square = np.asarray(np.abs(square.real) + 1j * np.abs(square.imag) if "complex" in dtype else np.abs(square), dtype)
    return Entry(array(), square, step, param=array(), **own)


def written() -> State:
    """What the file in data/ was made of, by the version that wrote the first format."""
    parameters = {
        "dense.kernel": entry((3, 2), step=7, seed=1),
        "dense.bias": entry((2,), "float64", step=5, seed=2),
        "scale": entry((), step=0, seed=3),
        "nothing": entry((0, 4), step=7, seed=4),
        "wave": entry((2, 2), "complex64", step=7, seed=5),
    }
    parameters["scale"].param = None
    hyper = {"lr": 0.1, "b1": 0.9, "b2": 0.99, "eps": 1e-8, "weight_decay": 0.0, "adaptivity": core.Linear(1, 0, 50)}
    groups = [
        Group(["dense.kernel", "nothing", "wave"], hyper, 0.1 + 0.2, 7),
        Group(["dense.bias", "scale"], {"lr": 0.01, "b2": 0.999}, float("nan"), 6),
    ]
    return State(parameters, groups, nonfinite="skip", skipped=2, source="by hand")


def per_tensor() -> State:
    parameters = {"a": entry((2,), global_exp_avg_sq=0.1), "b": entry((3,), seed=1, global_exp_avg_sq=1e-300)}
    return State(parameters, [Group(["a", "b"], {}, None, 3)], scope="tensor")


def assert_equal(left: State, right: State) -> None:
    assert list(left.parameters) == list(right.parameters)
    for name, a in left.parameters.items():
        b = right.parameters[name]
        assert (a.step, a.global_exp_avg_sq) == (b.step, b.global_exp_avg_sq)
        assert a.slots().keys() == b.slots().keys()
        for x, y in zip(a.slots().values(), b.slots().values(), strict=True):
            assert (x.dtype, x.shape) == (y.dtype, y.shape)
            assert x.tobytes() == y.tobytes()
    for field in ("scope", "nonfinite", "skipped", "source", "notes"):
        assert getattr(left, field) == getattr(right, field)
    assert str(left.groups) == str(right.groups)  # as text, in which a NaN equals itself; floats show every digit


# The file.


@pytest.mark.parametrize("make", [written, per_tensor])
def test_what_is_saved_is_loaded(make: Any, tmp_path: Path) -> None:
    make().save(tmp_path / "a.safetensors")
    assert_equal(State.load(tmp_path / "a.safetensors"), make())
    assert os.listdir(tmp_path) == ["a.safetensors"]


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


def test_a_file_of_the_first_format_is_read() -> None:
    """Never write this file again: later versions must read what this one wrote."""
    assert_equal(State.load(FIXTURE), written())


def test_arrays_that_are_not_contiguous_are_saved_as_they_are(tmp_path: Path) -> None:
    state = State({"a": entry((3, 4))}, [Group(["a"], {}, 0.5, 3)])
    state.parameters["a"].exp_avg = np.asfortranarray(state.parameters["a"].exp_avg)
    state.parameters["a"].param = np.arange(24, dtype=np.float32).reshape(4, 6)[:, ::2].T
    state.save(tmp_path / "a.safetensors")
    assert_equal(State.load(tmp_path / "a.safetensors"), state)


def test_every_damage_is_found(tmp_path: Path) -> None:
    whole = FIXTURE.read_bytes()
    file = tmp_path / "damaged.safetensors"
    for length in range(0, len(whole), 29):
        file.write_bytes(whole[:length])
        with pytest.raises(StateError, match="not a whole safetensors file"):
            State.load(file)
    for at in range(0, len(whole), 3):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(StateError, match="Cannot read"):
            State.load(file)


def test_other_files_are_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    file = tmp_path / "other.safetensors"
    save_file({"weight": np.zeros(2)}, file)
    with pytest.raises(StateError, match="not a state of Ada2MS"):
        State.load(file)
    save_file({"weight": np.zeros(2)}, file, {"format": "ada2ms-state", "format_version": "2"})
    with pytest.raises(StateError, match="its format version is '2'; readable: 1"):
        State.load(file)
    with pytest.raises(FileNotFoundError, match="no file"):
        State.load(tmp_path / "none.safetensors")


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.safetensors"
    written().save(file)

    def fail(*_: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        per_tensor().save(file)
    assert_equal(State.load(file), written())
    assert os.listdir(tmp_path) == ["a.safetensors"]


# Validity.


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


def fit(state: State, targets: dict[str, Target], **options: Any) -> Any:
    given = {"names": None, "axes": None, "scope": "model", "values": True, "cast": False, **options}
    return from_portable(state, targets, **given)


def target(shape: tuple[int, ...], dtype: str = "float32", **own: str) -> Target:
    return Target(shape, {slot: own.get(slot, dtype) for slot in ("param", "exp_avg", "exp_avg_sq")})


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


def test_a_state_of_adamw_is_given_the_mean_of_v() -> None:
    state = State(
        {"a": entry((2,), step=3), "b": entry((3, 2), step=5), "c": entry((4,), step=0)}, [Group(["a", "b", "c"])]
    )
    assert not state.has_global
    v = [state.parameters[name].exp_avg_sq.astype(np.float64) for name in "ab"]
    model = state.with_global("model")
    assert model.groups[0].global_exp_avg_sq == pytest.approx(np.concatenate([x.ravel() for x in v]).mean(), rel=1e-15)
    assert model.groups[0].global_step == 5
    own = [entry.global_exp_avg_sq for entry in state.with_global("tensor").parameters.values()]
    assert own == [pytest.approx(v[0].mean(), rel=1e-15), pytest.approx(v[1].mean(), rel=1e-15), 0.0]
    assert fit(state, {n: target(e.exp_avg.shape) for n, e in state.parameters.items()}, scope=None).entries


def test_a_warm_start_has_a_count_in_either_scope() -> None:
    """Schedules are given k, also where no bias correction needs it: updates done elsewhere count."""
    state = State({"a": entry((2,), step=3), "b": entry((3,), step=5)}, [Group(["a"]), Group(["b"])])
    for scope in ("model", "tensor"):
        assert [group.global_step for group in state.with_global(scope).groups] == [5, 5]  # type: ignore[arg-type]
    targets = {name: target(e.exp_avg.shape) for name, e in state.parameters.items()}
    fitted = fit(state, targets, scope="tensor")
    assert fitted.groups == [(None, 5)]
    assert None not in [e.global_exp_avg_sq for e in fitted.entries.values()]


@pytest.mark.parametrize("framework", [marked(name) for name in FRAMEWORKS])
def test_adamw_goes_on_with_its_count_in_scope_tensor(framework: str) -> None:
    """Which a schedule of the adaptivity is given; each tensor's s is mean(v)."""
    seen: list[int] = []

    def adaptivity(count: Any) -> Any:
        seen.append(count if isinstance(count, int) else int(float(np.asarray(count))))
        return 0.5 + 0 * (count / 1)

    state = State({"a": entry((2,), step=7), "b": entry((3,), step=7, seed=1)}, [Group(["a", "b"])])
    optimizing = Optimizing(framework, state, adaptivity)
    optimizing.step()
    assert optimizing.exported.groups[0].global_step == 7
    for name, e in optimizing.exported.parameters.items():
        assert e.global_exp_avg_sq == pytest.approx(state.parameters[name].exp_avg_sq.astype(float).mean(), rel=1e-6)
    assert seen[-1] == 7


class Optimizing:
    """Ada2MS in scope "tensor", of a framework, that goes on from a state."""

    def __init__(self, framework: str, state: State, adaptivity: Any) -> None:
        options: dict[str, Any] = {"scope": "tensor", "adaptivity": adaptivity}
        arrays = {name: e.param for name, e in state.parameters.items()}
        if framework == "torch":
            import torch

            from ada2ms.torch import Ada2MS, export_state, import_state

            params: Any = {name: torch.tensor(x, requires_grad=True) for name, x in arrays.items()}
            optimizer: Any = Ada2MS(list(params.values()), **options)
            import_state(params, optimizer, state)
            self.exported = export_state(params, optimizer)
            for p in params.values():
                p.grad = torch.ones_like(p)
            self.step = optimizer.step
        elif framework == "jax":
            import jax.numpy as jnp

            from ada2ms.jax import ada2ms, export_state, import_state

            params = {name: jnp.asarray(x) for name, x in arrays.items()}
            optimizer = ada2ms(**options)
            params, opt_state, _ = import_state(params, optimizer.init(params), state)
            self.exported = export_state(params, opt_state)
            self.step = lambda: optimizer.update(params, opt_state, params)
        else:
            import keras

            from ada2ms.tf import Ada2MS as KerasAda2MS
            from ada2ms.tf import export_state, import_state

            params = [keras.Variable(x, name=name) for name, x in arrays.items()]
            optimizer = KerasAda2MS(**options)
            import_state(params, optimizer, state)
            self.exported = export_state(params, optimizer)
            self.step = lambda: optimizer.apply([keras.ops.ones_like(v.value) for v in params], params)


def test_a_warm_start_counts_complex_tensors_as_pairs_of_reals() -> None:
    e = entry((2, 2), "complex64", step=3)
    state = State({"a": e}, [Group(["a"])])
    mean = float(np.concatenate([e.exp_avg_sq.real, e.exp_avg_sq.imag]).astype(np.float64).mean())
    assert state.with_global("model").groups[0].global_exp_avg_sq == pytest.approx(mean, rel=1e-15)
    own = state.with_global("tensor").parameters["a"].global_exp_avg_sq
    assert own == pytest.approx(mean, rel=1e-15)


def test_a_part_without_a_global_moment_is_given_its_like() -> None:
    """Of a group with the same b2, if there is one; each tensor's own mean in scope "tensor"; what is known stays."""
    parameters = {name: entry((2,), seed=i) for i, name in enumerate("abcd")}
    groups = [
        Group(["a"], {"b2": 0.99}, 0.25, 9),
        Group(["b"], {"b2": 0.99}),
        Group(["c"], {"b2": 0.9}),
        Group(["d"], {"b2": 0.5}, 0.5, 8),
    ]
    found = State(parameters, groups).with_global("model").groups
    v = np.concatenate([e.exp_avg_sq for e in parameters.values()]).astype(np.float64)
    assert [(g.global_exp_avg_sq, g.global_step) for g in found] == [
        (0.25, 9),
        (0.25, 9),
        (pytest.approx(v.mean(), rel=1e-15), 3),
        (0.5, 8),
    ]
    with pytest.raises(StateError, match="its scope is 'model', the optimizer's 'tensor'"):
        State(parameters, groups).with_global("tensor")
    parameters["a"].global_exp_avg_sq = 0.125
    found_own = State(parameters, [Group(list("abcd"), {}, None, 9)], scope="tensor").with_global("tensor")
    own = [e.global_exp_avg_sq for e in found_own.parameters.values()]
    assert own == [0.125, *(pytest.approx(parameters[n].exp_avg_sq.astype(float).mean()) for n in "bcd")]
    assert found_own.groups[0].global_step == 9


def test_a_group_that_has_no_parameters_takes_the_models_global_moment() -> None:
    state = State({"a": entry((2,))}, [Group(["a"], {}, 0.5, 3)])
    targets = {"a": replace(target((2,)), group=1)}
    assert fit(state, targets, groups=3).groups == [(0.5, 3)] * 3
    state = State({"a": entry((2,))}, [Group(["a"], {}, 0.5, 3), Group([], {}, 0.0, 0)])
    assert fit(state, {"a": target((2,))}).groups == [(0.5, 3)], "a group without parameters has no say"


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


# The commands.


def test_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["state", "show", str(FIXTURE)]) == 0
    shown = capsys.readouterr().out
    for part in ("by hand", "skip, 2 steps skipped", "Linear(start=1.0", "dense.kernel  (3, 2)", "step 7", "k 6"):
        assert part in shown


def test_diff(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "b.safetensors"
    state = written()
    state.save(file)
    assert main(["state", "diff", str(FIXTURE), str(file)]) == 0
    assert capsys.readouterr().out == "equal\n"
    state.parameters["dense.kernel"].exp_avg[0, 0] += 1
    state.parameters["dense.bias"].step += 1
    state.groups[0].hyper["lr"] = 0.2
    del state.parameters["wave"]
    state.groups[0].params.remove("wave")
    state.save(file)
    assert main(["state", "diff", str(FIXTURE), str(file)]) == 1
    shown = capsys.readouterr().out
    assert "dense.kernel: exp_avg differs by 1.000e+00" in shown
    assert "dense.bias: step: 5 and 6" in shown
    assert "wave: in the first only" in shown
    assert "'lr': 0.2" in shown
    assert len(shown.splitlines()) == 5


def test_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a checkpoint of torch's AdamW to a state and back, into an optimizer again: nothing is lost."""
    import torch

    from ada2ms.torch import Ada2MS, export_state

    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.1)
    for _ in range(3):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    saved, neutral, back = tmp_path / "a.pt", tmp_path / "a.safetensors", tmp_path / "b.pth"
    torch.save({"optimizer": optimizer.state_dict(), "model": model.state_dict()}, saved)
    assert main(["state", "convert", str(saved), str(neutral)]) == 0
    assert_equal(replace(State.load(neutral), source=""), replace(export_state(model, optimizer), source=""))
    assert main(["state", "convert", str(neutral), str(back)]) == 0
    assert main(["state", "diff", str(saved), str(back)]) == 0
    loaded = torch.load(back, weights_only=True)
    for kind in (torch.optim.AdamW, Ada2MS):
        other = kind(model.named_parameters(), lr=0.5)
        other.load_state_dict(loaded["optimizer"])
        assert other.param_groups[0]["lr"] == 0.1
        for p in model.parameters():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                assert torch.equal(other.state[p][key], optimizer.state[p][key])

    # Ada2MS, with its own s; and an optimizer that was given no names
    ours = Ada2MS(model.parameters(), lr=0.1, adaptivity=core.Cosine(1, 0, 9))
    model(torch.ones(1, 3)).sum().backward()
    ours.step()
    torch.save(ours.state_dict(), saved)
    capsys.readouterr()
    assert main(["state", "convert", str(saved), str(neutral)]) == 2
    assert "does not name its parameters" in capsys.readouterr().err
    names = tmp_path / "names.json"
    names.write_text(json.dumps(["weight", "bias"]))
    assert main(["state", "convert", str(saved), str(neutral), "--names", str(names)]) == 0
    state = State.load(neutral)
    assert state.groups[0].global_exp_avg_sq == float(ours.param_groups[0]["global_exp_avg_sq"])
    assert state.groups[0].hyper["adaptivity"] == core.Cosine(1, 0, 9)
    assert main(["state", "convert", str(neutral), str(back)]) == 0
    again = Ada2MS(model.parameters())
    again.load_state_dict(torch.load(back, weights_only=True)["optimizer"])
    assert again.param_groups[0]["adaptivity"] == core.Cosine(1, 0, 9)
    assert again.param_groups[0]["global_exp_avg_sq"] == ours.param_groups[0]["global_exp_avg_sq"]


def test_checkpoints_of_torch_that_are_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said in a sentence each; and decay that is part of Adam's gradient is not taken for the rule's."""
    import torch

    def converted(content: Any) -> tuple[int, str]:
        torch.save(content, tmp_path / "a.pt")
        status = main(["state", "convert", str(tmp_path / "a.pt"), str(tmp_path / "a.safetensors")])
        return status, capsys.readouterr().err

    def trained(kind: Any, **options: Any) -> Any:
        optimizer = kind(model.named_parameters(), **options)
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        return optimizer.state_dict()

    model = torch.nn.Linear(3, 2)
    for content, message in (
        ([1], "its keys are []"),
        ({"optimizer": {"state": {}, "param_groups": [{}]}}, "without betas"),
        ({"optimizer": {"state": [], "param_groups": 3}}, "without betas"),
        ({"optimizer": trained(torch.optim.SGD, momentum=0.9), "model": model.state_dict()}, "without betas"),
        (trained(torch.optim.AdamW, amsgrad=True), "'bias' has ['exp_avg', 'exp_avg_sq', 'max_exp_avg_sq', 'step']"),
        (trained(torch.optim.Adamax), "'bias' has ['exp_avg', 'exp_inf', 'step']"),
        (torch.optim.AdamW(model.named_parameters()).state_dict(), "nothing is known of 'bias'"),
        ({"optimizer_states": [trained(torch.optim.AdamW)] * 2}, "no state dict of one optimizer"),
    ):
        assert converted(content)[0] == 2
        assert message in converted(content)[1]
        assert not (tmp_path / "a.safetensors").exists()
    lightning = {"optimizer_states": [trained(torch.optim.AdamW, weight_decay=0.1)], "state_dict": model.state_dict()}
    assert converted(lightning) == (0, "")
    state = State.load(tmp_path / "a.safetensors")
    assert state.groups[0].hyper["weight_decay"] == 0.1
    assert np.array_equal(state.parameters["weight"].param, model.weight.detach().numpy())
    adam = trained(torch.optim.Adam, weight_decay=0.1)
    if "decoupled_weight_decay" in adam["param_groups"][0]:  # since torch 2.7
        assert converted(adam) == (0, "")
        assert "weight_decay" not in State.load(tmp_path / "a.safetensors").groups[0].hyper


def test_a_checkpoint_of_torch_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: 1 / 0)
    (tmp_path / "a.pt").write_text("old")
    with pytest.raises(ZeroDivisionError):
        main(["state", "convert", str(FIXTURE), str(tmp_path / "a.pt")])
    assert (tmp_path / "a.pt").read_text() == "old"
    assert os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.keras
def test_convert_from_keras(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What `model.save` wrote is what `export_state` would have given, to a state or to torch."""
    import keras

    from ada2ms.tf import Ada2MS, export_state, plain_layers

    saved, neutral, torch_file = (str(tmp_path / f"a.{suffix}") for suffix in ("keras", "safetensors", "pt"))
    x, y = np.ones((4, 3), np.float32), np.ones((4, 2), np.float32)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.LayerNormalization()])
    model.save(saved)
    assert main(["state", "convert", saved, neutral]) == 2
    assert "it has no optimizer" in capsys.readouterr().err
    for optimizer in (Ada2MS(2.0**-7, adaptivity=core.Linear(1, 0, 9)), keras.optimizers.AdamW(2.0**-7)):
        model.compile(optimizer=optimizer, loss="mse")
        model.fit(x, y, epochs=2, verbose=0)
        model.save(saved)
        assert main(["state", "convert", saved, neutral]) == 0
        assert_equal(State.load(neutral), export_state(model, optimizer, **plain_layers(model)))
        assert main(["state", "convert", saved, torch_file]) == 0
        assert main(["state", "diff", saved, torch_file]) == 0
    Path(saved).write_text("not a checkpoint")
    assert main(["state", "show", saved]) == 2
    assert "keras.saving.load_model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "none.safetensors"], "There is no file"),
        (["show", "a.txt"], "suffix must be"),
        (["show", "bad.pt"], "torch.load(weights_only=True)"),
        (["show", "other.pt"], "its keys are ['weight']"),
        (["show", "sgd.pt", "--names", "names.json"], "not JSON"),
        (["convert", "a.safetensors", "b.safetensors"], "from state to state"),
        (["convert", "a.safetensors", "b.keras"], "from state to keras"),
        (["convert", "none.keras", "b.pt"], "There is no file 'none.keras'"),
        (["diff", "a.safetensors", "none.pt"], "none.pt"),
    ],
)
def test_commands_that_cannot_be_done(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    written().save("a.safetensors")
    Path("bad.pt").write_bytes(b"not a checkpoint")
    Path("names.json").write_text("[")
    torch.save({"weight": torch.zeros(2)}, "other.pt")
    torch.save({"state": {}, "param_groups": []}, "sgd.pt")
    before = {file: Path(file).read_bytes() for file in os.listdir()}
    assert main(["state", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert {file: Path(file).read_bytes() for file in os.listdir()} == before
