"""`compensated` in torch: its slot saved, restored, copied, taken over, and what people change in mid-run."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from test_torch_compensated import DTYPES, PATHS, compensation, give_gradients, held, parameters
from torch import nn
from torch_support import random, saved_and_loaded

from ada2ms import core
from ada2ms.core.state import State, StateError
from ada2ms.torch import Ada2MS, arguments, export_state, import_state
from ada2ms.torch.checkpoint import read, write
from support import needs_compiler

GIVEN: dict[str, Any] = {"lr": 1e-4, "compensated": True}


def train(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        give_gradients(params, step)
        optimizer.step()


def assert_identical(params: list[nn.Parameter], optimizer: Ada2MS, others: list[nn.Parameter], other: Ada2MS) -> None:
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        assert list(optimizer.state[p]) == list(other.state[q])
        for key, x in optimizer.state[p].items():
            assert x.dtype == other.state[q][key].dtype
            assert torch.equal(x, other.state[q][key]), key


@DTYPES
@PATHS
def test_resuming_continues_bit_for_bit(options: dict[str, Any], dtype: torch.dtype) -> None:
    """The slot keeps its 16 bits and the moments their 32, through a file, by an optimizer that was not told of it."""
    params = parameters(dtype)
    optimizer = Ada2MS(params, **GIVEN, adaptivity=core.Linear(1, 0, 8), **options)
    train(params, optimizer, range(3))
    resumed = copy.deepcopy(params)
    other = Ada2MS(resumed)
    other.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert other.param_groups[0]["compensated"] is True
    for p in resumed:
        assert other.state[p]["exp_avg"].dtype == torch.float32
        assert ("compensation" in other.state[p]) == (p.dtype == dtype)
    train(params, optimizer, range(3, 6))
    train(resumed, other, range(3, 6))
    assert_identical(params, optimizer, resumed, other)
    assert other.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_continue_bit_for_bit(how: Any) -> None:
    params = parameters(torch.bfloat16)
    optimizer = Ada2MS(params, **GIVEN)
    train(params, optimizer, range(3))
    copied, other = how((params, optimizer))
    train(params, optimizer, range(3, 6))
    train(copied, other, range(3, 6))
    assert_identical(params, optimizer, copied, other)


@pytest.mark.parametrize("source", [torch.optim.AdamW, Ada2MS], ids=["AdamW", "Ada2MS"])
@DTYPES
def test_a_state_without_it_starts_at_zero(source: Any, dtype: torch.dtype) -> None:
    """Of AdamW, and of an Ada2MS that had none: the option is the optimizer's that loads, if either has it."""
    params = parameters(dtype)
    plain = source(params, lr=1e-4)
    train(params, plain, range(3))
    optimizer = Ada2MS(params, **GIVEN)
    optimizer.load_state_dict(saved_and_loaded(plain.state_dict()))
    assert optimizer.param_groups[0]["compensated"] is True
    for p in params:
        if p.dtype == dtype:
            assert not compensation(optimizer, p).any()
    # Then it is as if it had been turned on there, or begun with zeros.
    other_params = copy.deepcopy(params)
    other = Ada2MS(other_params, **GIVEN)
    state = copy.deepcopy(optimizer.state_dict())
    for x, p in zip(state["state"].values(), params, strict=True):
        if p.dtype == dtype:
            x["compensation"] = torch.zeros_like(p.detach())
    other.load_state_dict(state)
    for o, some in ((optimizer, params), (other, other_params)):
        train(some, o, range(3, 6))
    assert_identical(params, optimizer, other_params, other)
    assert compensation(optimizer, params[0]).any()


@DTYPES
def test_turned_on_and_off_in_mid_run(dtype: torch.dtype) -> None:
    """In the groups, as every option of torch: from zero when it is turned on, and nothing stays when it is off."""
    params, others = parameters(dtype), parameters(dtype)
    optimizer, reference = Ada2MS(params, lr=1e-4), Ada2MS(others, lr=1e-4)
    train(params, optimizer, range(2))
    train(others, reference, range(2))
    assert "compensated" not in optimizer.state_dict()["param_groups"][0]
    optimizer.param_groups[0]["compensated"] = True
    resumed = Ada2MS(others, **GIVEN)
    resumed.load_state_dict(reference.state_dict())
    train(params, optimizer, range(2, 5))
    train(others, resumed, range(2, 5))
    assert_identical(params, optimizer, others, resumed)
    optimizer.param_groups[0]["compensated"] = False
    train(params, optimizer, range(5, 6))
    assert not any("compensation" in optimizer.state[p] for p in params)
    optimizer.param_groups[0]["compensated"] = True
    before = params[0].detach().double()
    train(params, optimizer, range(6, 7))
    moved = held(optimizer, params[0]) - before
    assert moved.abs().max() < 2e-4  # of this step alone


def test_groups_have_one() -> None:
    """It is the optimizer's: an error names the group that disagrees, and nothing has changed."""
    p, q = (nn.Parameter(random((3,), i).bfloat16()) for i in range(2))
    with pytest.raises(ValueError, match=r"Invalid compensated: True \(must be the optimizer's, False\)"):
        Ada2MS([{"params": [p]}, {"params": [q], "compensated": True}])
    with pytest.raises(ValueError, match=r"Invalid compensated: 'yes' \(compensated must be one of \(False, True\)\)"):
        Ada2MS([p], compensated="yes")  # type: ignore[arg-type]
    optimizer = Ada2MS([p], **GIVEN)
    with pytest.raises(ValueError, match=r"Invalid compensated: False \(must be the optimizer's, True\)"):
        optimizer.add_param_group({"params": [q], "compensated": False})
    optimizer.add_param_group({"params": [q]})
    train([p, q], optimizer, range(2))
    assert compensation(optimizer, q).any()
    optimizer.param_groups[1]["compensated"] = False
    kept = p.detach().clone()
    with pytest.raises(ValueError, match=r"Invalid compensated: False of group 1 \(must be that of group 0, True"):
        train([p, q], optimizer, range(2, 3))
    assert torch.equal(p, kept)


def test_a_state_dict_has_it_only_while_it_is_on() -> None:
    """So that checkpoints of versions without it have the same keys."""
    params = parameters(torch.bfloat16)
    optimizer = Ada2MS(params)
    train(params, optimizer, range(1))
    saved = optimizer.state_dict()
    assert "compensated" not in saved["param_groups"][0]
    assert not any("compensation" in x for x in saved["state"].values())
    on = Ada2MS(params, compensated=1)  # type: ignore[arg-type]  # equal to True
    assert on.state_dict()["param_groups"][0]["compensated"] is True


@PATHS
def test_a_parameter_that_changes_its_dtype(options: dict[str, Any]) -> None:
    """Wider, it has no slot; 16 bits again, it starts at zero; from one kind of them to the other the slot follows."""
    p = nn.Parameter(random((40,), 0).bfloat16())
    optimizer = Ada2MS([p], **GIVEN, **options)
    train([p], optimizer, range(2))
    for dtype in (torch.float16, torch.float32, torch.bfloat16, torch.float64, torch.float16):
        p.data = p.data.to(dtype)
        p.grad = None
        before = p.detach().double()
        train([p], optimizer, range(2, 3))
        assert ("compensation" in optimizer.state[p]) == (dtype.itemsize == 2)
        assert (held(optimizer, p) - before).abs().max() < 2.0**-7  # half a unit at most, and a step
        if dtype.itemsize == 2:
            assert compensation(optimizer, p).dtype == dtype


@pytest.mark.parametrize("options", [{"foreach": False}, pytest.param({"fused": True}, marks=needs_compiler)], ids=str)
def test_cleared_state_and_tied_weights(options: dict[str, Any]) -> None:
    """A user who clears the state clears the slot; a weight that two layers share has one."""
    first = nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
    second = nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    optimizer = Ada2MS(model.parameters(), **GIVEN, **options)
    for step in range(3):
        optimizer.zero_grad()
        model(random((2, 4), step, dtype=torch.bfloat16)).float().square().sum().backward()
        optimizer.step()
        if step == 1:
            assert list(optimizer.state) == [first.weight]
            assert compensation(optimizer, first.weight).any()
            optimizer.state.clear()
            kept = first.weight.detach().double()
    assert (held(optimizer, first.weight) - kept).abs().max() < 2e-4


def test_no_learning_rate_no_change() -> None:
    """What distributed checkpointing does to make the state: a step with lr = 0 and gradients of zero."""
    params = parameters(torch.bfloat16)
    before = [p.detach().clone() for p in params]
    optimizer = Ada2MS(params, lr=torch.tensor(0.0), compensated=True)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, x in zip(params, before, strict=True):
        assert torch.equal(p, x)
        assert p.dtype != torch.bfloat16 or not compensation(optimizer, p).any()


@pytest.mark.filterwarnings("ignore:torch.distributed is (disabled, )?unavailable or uninitialized:UserWarning")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
def test_a_distributed_checkpoint_without_it(tmp_path: Path) -> None:
    """Every key must be there, torch says, as of any option; a partial load keeps the zeros."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as sd

    model = nn.Linear(3, 2, dtype=torch.bfloat16)
    plain = Ada2MS(model.parameters(), lr=1e-4)
    train(list(model.parameters()), plain, range(2))
    dcp.save({"optimizer": sd.get_optimizer_state_dict(model, plain)}, checkpoint_id=tmp_path)
    model.zero_grad()  # torch makes the state to be loaded into by a step, unless there are gradients
    optimizer = Ada2MS(model.parameters(), **GIVEN)
    state = {"optimizer": sd.get_optimizer_state_dict(model, optimizer)}
    with pytest.raises(dcp.api.CheckpointException, match=r"Missing key in checkpoint state_dict: .*\.compensat"):
        dcp.load(state, checkpoint_id=tmp_path)
    dcp.load(state, checkpoint_id=tmp_path, planner=dcp.DefaultLoadPlanner(allow_partial_load=True))
    sd.set_optimizer_state_dict(model, optimizer, state["optimizer"])
    assert optimizer.param_groups[0]["compensated"] is True
    assert torch.equal(optimizer.state[model.weight]["exp_avg"], plain.state[model.weight]["exp_avg"])
    assert not compensation(optimizer, model.weight).any()
    train(list(model.parameters()), optimizer, range(2, 3))
    assert compensation(optimizer, model.weight).any()


def named(params: list[nn.Parameter]) -> dict[str, nn.Parameter]:
    return dict(zip("abcde", params, strict=True))


@DTYPES
@pytest.mark.parametrize("how", ["state", "file", "checkpoint"])
def test_hand_off_continues_bit_for_bit(how: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Through a state, a file of it, and a checkpoint that was written of it and read without a model."""
    params = parameters(dtype)
    optimizer = Ada2MS(params, **GIVEN)
    train(params, optimizer, range(3))
    state = export_state(named(params), optimizer)
    assert state.compensated
    assert arguments(state)["compensated"] is True
    if how == "file":
        state.save(tmp_path / "state.safetensors")
        state = State.load(tmp_path / "state.safetensors")
    others = [nn.Parameter(torch.zeros_like(p)) for p in params]
    other = Ada2MS(others, **GIVEN)
    if how == "checkpoint":
        write(state, tmp_path / "state.pt")
        content = torch.load(tmp_path / "state.pt", weights_only=True)
        assert content["optimizer"]["param_groups"][0]["compensated"] is True
        assert (
            read(tmp_path / "state.pt").parameters["a"].compensation.tolist()
            == compensation(optimizer, params[0]).tolist()
        )
        other.load_state_dict(content["optimizer"])
        assert compensation(other, others[0]).any()  # of its dtype, which the file does not have
        with torch.no_grad():
            for name, p in named(others).items():
                p.copy_(content["model"][name])
    else:
        import_state(named(others), other, state)
    train(params, optimizer, range(3, 5))
    train(others, other, range(3, 5))
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        if p.dtype == dtype:
            assert torch.equal(compensation(optimizer, p), compensation(other, q))


@DTYPES
def test_hand_off_to_other_types(dtype: torch.dtype) -> None:
    """A wider parameter takes the sum; 16 bits without a slot do not, unless they may be rounded; and a slot takes what
    is left of a wider value, also of a parameter that has had no update.
    """
    params = parameters(dtype)
    optimizer = Ada2MS(params, **GIVEN)
    train(params, optimizer, range(3))
    state = export_state(named(params), optimizer)
    wide = [nn.Parameter(torch.zeros(p.shape)) for p in params]
    for given in ({}, {"compensated": True}):
        target = Ada2MS(wide, **given)  # type: ignore[arg-type]
        import_state(named(wide), target, state)
        for p, q in zip(params, wide, strict=True):
            assert torch.equal(q.double(), held(optimizer, p))
            assert "compensation" not in target.state[q]
    narrow = [nn.Parameter(torch.zeros_like(p)) for p in params]
    plain = Ada2MS(narrow)
    with pytest.raises(StateError, match="type: param of 'a'"):
        import_state(named(narrow), plain, state)
    assert not any(p.any() for p in narrow)
    import_state(named(narrow), plain, state, cast=True)
    for p, q in zip(params, narrow, strict=True):
        assert torch.equal(held(optimizer, p).to(q.dtype), q)
    # From float32 that was never in 16 bits; one of them without an update.
    values = [nn.Parameter(random(tuple(p.shape), i + 50, dtype=torch.float32)) for i, p in enumerate(params)]
    source = Ada2MS(values)
    for p in values[1:]:
        p.grad = torch.ones_like(p)
    source.step()
    back = Ada2MS(narrow, **GIVEN)
    import_state(named(narrow), back, export_state(named(values), source), cast=True)
    for p, q in zip(values, narrow, strict=True):
        if q.dtype == dtype and q.numel():
            assert torch.equal(q, p.to(dtype))
            assert torch.equal(compensation(back, q), (p - q.float()).to(dtype))
    assert compensation(back, narrow[0]).any()
    train(narrow, back, range(3))
    assert int(back.state[narrow[0]]["step"]) == 3


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
def test_complex_numbers_of_16_bits_have_no_hand_off_to_them() -> None:
    """NumPy has no such type: an error says so; what they hold goes to wider ones."""
    p = nn.Parameter(torch.view_as_complex(random((6, 2), 0).half()))
    p.grad = p.detach().clone()
    optimizer = Ada2MS([p], **GIVEN)
    optimizer.step()
    state = export_state({"p": p}, optimizer)
    with pytest.raises(StateError, match="'p' is complex32, which NumPy does not have"):
        import_state({"p": p}, optimizer, state)
    wide = nn.Parameter(torch.zeros(6, dtype=torch.complex64))
    import_state({"p": wide}, Ada2MS([wide]), state)
    assert torch.equal(wide.detach(), p.to(torch.complex64) + compensation(optimizer, p).to(torch.complex64))
