"""`import_state(..., verify=k)` where nothing can be verified, and errors; the file of a receipt."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_handoff_receipt import Run, of_torch, scheduled, small, verdict

from ada2ms.cli import main
from ada2ms.core import Receipt, State, StateError
from ada2ms.torch import Ada2MS, export_gradients, export_state, import_state


def without_a_receipt(state: State) -> str:
    state.receipt = None
    return "the state has no receipt: no steps are recorded"


def with_fewer_steps(state: State) -> str:
    assert state.receipt is not None
    del state.receipt.steps[1:]
    return "the receipt holds 1 of the 3 steps that are wanted"


def of_adamw(state: State) -> str:
    state.groups[0].global_exp_avg_sq = None
    return "the state is of an optimizer without a global second moment"


def without_values(state: State) -> str:
    for entry in state.parameters.values():
        entry.param = None
    return "the state has no values"


def not_finite(state: State) -> str:
    state.parameters["0.dense.bias"].exp_avg[0] = np.nan
    return "'0.dense.bias' is not finite everywhere"


REASONS = (without_a_receipt, with_fewer_steps, of_adamw, without_values, not_finite)


@pytest.mark.parametrize("change", REASONS, ids=lambda change: change.__name__)
def test_what_cannot_be_verified(change: Callable[[State], str]) -> None:
    state = copy.deepcopy(of_torch())
    why = change(state)
    found = verdict(small("torch"), state, values=change is not without_values)
    assert found.verdict == "cannot be verified"
    assert found.why.startswith(why), found


def test_moves_below_rounding_tell_nothing() -> None:
    using = small("torch", lr=1e-20, weight_decay=0.0)
    state = using.record(2)
    found = verdict(small("torch", lr=1e-20, weight_decay=0.0, adaptivity=1.0), state, 2)
    assert str(found) == ("cannot be verified: in 2 steps the parameters moved hardly more than rounding may move them")


def test_optimizers_of_another_kind() -> None:
    using = small("torch")
    adamw = torch.optim.AdamW(using.model.parameters(), lr=0.1)
    found = import_state(using.model, adamw, of_torch(), verify=1, **mapping(using)).verification
    assert str(found) == "cannot be verified: AdamW makes other steps than Ada2MS"


def mapping(using: Run) -> dict[str, Any]:
    from ada2ms.torch import plain_layers

    return dict(plain_layers(using.model))


def test_optax_needs_the_optimizer() -> None:
    import optax

    using = small("jax")
    assert str(verdict(using, of_torch(), optimizer=None)) == (
        "cannot be verified: the steps need the optimizer that opt_state is of: optimizer=ada2ms(...)"
    )
    assert str(verdict(using, of_torch(), optimizer=optax.sgd(0.1))) == (
        "cannot be verified: optimizer= is another one than opt_state is of"
    )
    assert verdict(using, scheduled("clipped")).why.startswith("learning rates are recorded, which Optax takes only by")


@pytest.mark.keras
def test_keras_with_a_schedule_or_accumulation() -> None:
    import keras

    decay = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)
    found = verdict(small("keras", lr=decay, global_clipnorm=1.0), scheduled("clipped"))
    assert str(found) == (
        "cannot be verified: learning rates are recorded, and the optimizer has a schedule of its own here"
    )
    found = verdict(small("keras", gradient_accumulation_steps=2), of_torch())
    assert str(found) == "cannot be verified: the optimizer accumulates gradients of 2 steps"


@pytest.mark.parametrize("framework", ["torch", "jax", pytest.param("keras", marks=pytest.mark.keras)])
def test_nothing_changes_where_an_error_is_raised(framework: str) -> None:
    """Not even with an error of the user's own function, in the middle of the steps."""
    using = small(framework)
    before = using.export_state()

    def fails(model: Any, step: Any) -> Any:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        using.import_state(of_torch(), verify=3, gradients=fails)
    with pytest.raises(ValueError, match=re.escape("Invalid verify: -1 (must be an integer, at least 0)")):
        using.import_state(of_torch(), verify=-1)
    with pytest.raises(TypeError, match=re.escape("Invalid verify: True (must be an integer, at least 0)")):
        using.import_state(of_torch(), verify=True)
    after = using.export_state()
    for name, entry in before.parameters.items():
        assert entry.step == after.parameters[name].step == 0
        for slot, array in entry.slots().items():
            assert np.array_equal(array, after.parameters[name].slots()[slot])


@pytest.mark.parametrize(("dtype", "compensated"), [("bfloat16", False), ("bfloat16", True), ("float32", False)])
@pytest.mark.parametrize("adaptivity", [0.5, 0.6])
def test_narrow_types(dtype: str, compensated: bool, adaptivity: float) -> None:
    """In bfloat16 alone rounding hides most moves, but a large one is seen; a compensation shows smaller ones."""

    def make(adaptivity: float) -> tuple[dict[str, torch.Tensor], Ada2MS]:
        params = {"w": torch.linspace(1, 2, 12).to(getattr(torch, dtype)).requires_grad_()}
        return params, Ada2MS(list(params.values()), lr=0.01, adaptivity=adaptivity, compensated=compensated)

    params, optimizer = make(0.5)
    receipt = Receipt(export_state(params, optimizer))
    for i in range(3):
        params["w"].grad = torch.linspace(-1, 1 + i, 12).to(params["w"].dtype)
        receipt.add(export_gradients(params, optimizer))
        optimizer.step()
    found = import_state(*make(adaptivity), export_state(params, optimizer, receipt=receipt), verify=3).verification
    assert found is not None
    blind = dtype == "bfloat16" and not compensated
    assert found.verdict == ("cannot be verified" if blind else "proven" if adaptivity == 0.5 else "lost"), found


# Receipts


def test_a_receipt_refuses_what_is_no_step_of_its_state() -> None:
    start = small("torch").export_state()
    receipt = Receipt(start)
    for gradients, options, problem in (
        ({"2.dense.kernel": np.zeros(3)}, {}, "'2.dense.kernel' is no parameter of the receipt's state"),
        ({"0.dense.bias": np.zeros(3)}, {}, "'0.dense.bias': the gradient has (3,), the receipt's state (8,)"),
        ({}, {"lr": -1.0}, "Invalid learning rate: -1.0 (lr must be a number in [0, inf))"),
        ({}, {"batch": "abc"}, "Invalid batch: str (must be bytes)"),
    ):
        with pytest.raises(StateError, match=re.escape(problem)):
            receipt.add(gradients, **options)
    assert receipt.steps == []
    with pytest.raises(StateError, match=re.escape("'a.weight' has no value")):
        Receipt(export_state(model := small("torch").model, Ada2MS(model.parameters()), values=False))


def test_a_receipt_of_another_model_is_refused() -> None:
    using = small("torch")
    other = export_state(params := {"w": torch.zeros(2, requires_grad=True)}, Ada2MS(list(params.values())))
    with pytest.raises(StateError, match=re.escape("receipt: 'w' is (2,) in its start, and not there here")):
        using.export_state(Receipt(other))


def test_later_steps_are_not_in_an_exported_state() -> None:
    using = small("torch")
    receipt = Receipt(using.export_state())
    state = using.export_state(receipt)
    receipt.add({})
    assert state.receipt is not None
    assert (len(state.receipt.steps), len(receipt.steps)) == (0, 1)


def test_a_file_holds_the_steps(tmp_path: Path, capsys: Any) -> None:
    state = scheduled("clipped")
    state.save(file := tmp_path / "run.safetensors")
    loaded = State.load(file)
    assert loaded.receipt is not None
    assert state.receipt is not None
    for step, other in zip(state.receipt.steps, loaded.receipt.steps, strict=True):
        assert (step.batch, step.lr, step.gradients.keys()) == (other.batch, other.lr, other.gradients.keys())
        assert all(np.array_equal(g, other.gradients[name]) for name, g in step.gradients.items())
    assert vars(loaded.receipt.start)["groups"] == state.receipt.start.groups
    assert main(["state", "show", str(file)]) == 0
    shown = capsys.readouterr().out
    assert f"receipt     3 steps, from {state.receipt.start.source}" in shown
    assert "  step 2    gradients of 1 parameters, lr 0.0009765625, batch not given" in shown
    state = copy.deepcopy(state)
    state.receipt = None
    state.save(other_file := tmp_path / "other.safetensors")
    assert main(["state", "diff", str(file), str(other_file)]) == 1
    assert capsys.readouterr().out == "recorded steps: 3 and 0\n"
    assert b"receipt" not in other_file.read_bytes()


def test_complex_parameters_travel_with_their_gradients(tmp_path: Path) -> None:
    params = {"w": torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex128, requires_grad=True)}
    optimizer = Ada2MS(list(params.values()), lr=0.1)
    receipt = Receipt(export_state(params, optimizer))
    params["w"].grad = torch.tensor([1j, 2 + 1j], dtype=torch.complex128)
    receipt.add(export_gradients(params, optimizer), batch=b"data")
    optimizer.step()
    export_state(params, optimizer, receipt=receipt).save(tmp_path / "run.safetensors")
    state = State.load(tmp_path / "run.safetensors")
    assert state.receipt is not None
    assert state.receipt.steps[0].batch == "3a6eb0790f39ac87c94f3856b2dd2c5d110e6811602261a9a923d3bb23adc8b7"
    again = {"w": torch.zeros(2, dtype=torch.complex128, requires_grad=True)}
    found = import_state(again, Ada2MS(list(again.values()), lr=0.1), state, verify=1).verification
    assert found is not None
    assert found.verdict == "proven", found
