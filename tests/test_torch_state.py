"""The torch optimizer's state: saved, restored, copied, and taken over from AdamW."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch_support import saved_and_loaded, shared_numbers

from ada2ms import core
from ada2ms.torch import Ada2MS, export_state, import_state

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.complex64]


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(3, 2, generator=generator, dtype=dtype)) for dtype in DTYPES]


def train(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step()


def identical(left: Any, right: Any) -> None:
    """Bit for bit, dtypes included."""
    assert type(left) is type(right)
    if isinstance(left, Tensor):
        torch.testing.assert_close(left, right, rtol=0, atol=0)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            identical(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        for x, y in zip(left, right, strict=True):
            identical(x, y)
    else:
        assert left == right


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"capturable": True}, {"nonfinite": "skip"}], ids=str)
@pytest.mark.parametrize(
    "adaptivity",
    [0.3, core.Constant(0.4), core.Linear(1, 0, 8), core.Cosine(1, 0, 8), core.Exponential(1, 0, 4.0)],
    ids=str,
)
def test_resuming_continues_bit_for_bit(adaptivity: Any, options: dict[str, Any], scope: Any) -> None:
    """Through torch.save and a load that takes plain data only, in the middle of a schedule, in every precision."""
    params = parameters()
    options = {"adaptivity": adaptivity, "scope": scope, **options}
    optimizer = Ada2MS([{"params": params[:2]}, {"params": params[2:], "betas": (0.8, 0.9)}], **options)
    train(params, optimizer, range(3))
    saved = saved_and_loaded(optimizer.state_dict())
    resumed = copy.deepcopy(params)
    other = Ada2MS([{"params": resumed[:2], "lr": 7.0}, {"params": resumed[2:]}], **{**options, "adaptivity": 0.0})
    other.load_state_dict(saved)
    assert other.param_groups[0]["adaptivity"] == adaptivity
    train(params, optimizer, range(3, 6))
    train(resumed, other, range(3, 6))
    identical(resumed, params)
    identical([other.state[p] for p in resumed], [optimizer.state[p] for p in params])
    identical(other.state_dict(), optimizer.state_dict())


def test_loading_keeps_float32_state_and_the_users_hooks() -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer, called = Ada2MS([p]), []
    train([p], optimizer, range(2))
    optimizer.register_load_state_dict_pre_hook(
        lambda _, state_dict: called.append(type(state_dict["state"][0]["step"]))
    )
    optimizer.register_load_state_dict_post_hook(lambda o: called.append(o.state[p]["exp_avg"].dtype))
    optimizer.register_state_dict_post_hook(lambda _, state_dict: called.append(sorted(state_dict)))
    before = copy.deepcopy(optimizer.state[p])
    optimizer.load_state_dict(optimizer.state_dict())
    assert called == [["param_groups", "state"], Tensor, torch.float32]
    identical(optimizer.state[p], before)
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1


def test_a_callable_is_not_saved() -> None:
    """Code is not data: the optimizer that loads keeps its own callable."""
    p = nn.Parameter(torch.ones(3))
    mine, yours = (lambda count: 0.25), (lambda count: 0.75)
    saved = saved_and_loaded(Ada2MS([p], adaptivity=mine).state_dict())
    assert saved["param_groups"][0]["adaptivity"] is None
    optimizer = Ada2MS([p], adaptivity=yours)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["adaptivity"] is yours


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_continue_bit_for_bit(how: Any) -> None:
    params = parameters()
    optimizer = Ada2MS(params, adaptivity=core.Linear(1, 0, 8))
    train(params, optimizer, range(3))
    copied, other = how((params, optimizer))
    assert other.param_groups[0]["params"][0] is copied[0]
    train(params, optimizer, range(3, 6))
    train(copied, other, range(3, 6))
    identical(copied, params)
    identical(other.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_from_adamw(scope: Any) -> None:
    """The state of AdamW is taken over; s is the mean of v over all entries, of as many steps; the rest is ours."""
    params = [
        nn.Parameter(torch.randn(3)),
        nn.Parameter(torch.randn(5, dtype=torch.complex64)),
        nn.Parameter(torch.ones(2)),
    ]
    adamw = torch.optim.AdamW([{"params": params[:1]}, {"params": params[1:], "lr": 0.5}], weight_decay=0.25)
    train(params[:2], adamw, range(4))
    optimizer = Ada2MS([{"params": params[:1]}, {"params": params[1:]}], adaptivity=0.3, scope=scope)
    optimizer.load_state_dict(saved_and_loaded(adamw.state_dict()))
    v = [adamw.state[params[0]]["exp_avg_sq"], torch.view_as_real(adamw.state[params[1]]["exp_avg_sq"])]
    for i, group in enumerate(optimizer.param_groups):
        assert (group["weight_decay"], group["adaptivity"], group["scope"]) == (0.25, 0.3, scope)
        shared = shared_numbers(optimizer, i)
        if scope == "model":
            torch.testing.assert_close(shared["global_exp_avg_sq"], torch.cat([x.flatten() for x in v]).mean())
        assert shared["global_step"] == 4
    for p, x in zip(params, v, strict=False):
        identical(optimizer.state[p]["exp_avg"], adamw.state[p]["exp_avg"])
        if scope == "tensor":
            torch.testing.assert_close(optimizer.state[p]["global_exp_avg_sq"], x.mean())
    assert optimizer.param_groups[1]["lr"] == 0.5
    train(params, optimizer, range(4, 6))
    assert all(p.isfinite().all() for p in params)


def test_from_adamw_at_adaptivity_1_continues_adamw() -> None:
    params = [nn.Parameter(torch.randn(3, dtype=torch.float64)) for _ in range(2)]
    adamw = torch.optim.AdamW(params, lr=0.1)
    train(params, adamw, range(3))
    resumed = copy.deepcopy(params)
    optimizer = Ada2MS(resumed, adaptivity=1.0)
    optimizer.load_state_dict(copy.deepcopy(adamw.state_dict()))  # torch shares the tensors
    train(params, adamw, range(3, 6))
    train(resumed, optimizer, range(3, 6))
    torch.testing.assert_close(resumed, params, rtol=1e-14, atol=1e-14)


def test_s_equals_mean_v_while_every_gradient_is_there() -> None:
    """Why an AdamW checkpoint can be taken over at all: the average is linear."""
    params = [nn.Parameter(torch.randn(n, dtype=torch.float64)) for n in (3, 50)]
    optimizer = Ada2MS(params)
    train(params, optimizer, range(5))
    mean = torch.cat([optimizer.state[p]["exp_avg_sq"] for p in params]).mean()
    torch.testing.assert_close(shared_numbers(optimizer)["global_exp_avg_sq"], mean, rtol=1e-14, atol=0)


def test_an_earlier_state_dict() -> None:
    """Options that it has not yet are this optimizer's; steps may be numbers."""
    params = [nn.Parameter(torch.randn(3))]
    optimizer = Ada2MS(params, nonfinite="skip", adaptivity=0.75)
    train(params, optimizer, range(3))
    saved = optimizer.state_dict()
    for name in ("nonfinite", "adaptivity", "capturable", "foreach", "maximize", "differentiable"):
        del saved["param_groups"][0][name]
    del saved["state"][0]["skipped"]
    saved["state"][0]["step"] = 3
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert (group["nonfinite"], group["adaptivity"], shared_numbers(optimizer)["skipped"]) == ("skip", 0.75, 0)
    assert optimizer.state[params[0]]["step"] == torch.tensor(3.0)
    train(params, optimizer, range(3, 4))
    assert optimizer.state[params[0]]["step"] == 4


def test_groups_that_do_not_fit_are_torchs_error() -> None:
    optimizer = Ada2MS([nn.Parameter(torch.ones(3))])
    saved = Ada2MS([{"params": [nn.Parameter(torch.ones(3))]}, {"params": [nn.Parameter(torch.ones(3))]}]).state_dict()
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match="doesn't match the size"):
        optimizer.load_state_dict(Ada2MS([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]).state_dict())


def test_a_state_dict_shares_no_count_with_the_optimizer_that_loads_it() -> None:
    params = [nn.Parameter(torch.randn(3))]
    optimizer = Ada2MS(params)
    train(params, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    other = Ada2MS(params)
    other.load_state_dict(saved)
    train(params, other, range(2))
    assert saved["state"][0]["global_step"] == saved["state"][0]["step"] == 2
    assert np.isclose(
        float(saved["state"][0]["global_exp_avg_sq"]), float(shared_numbers(optimizer)["global_exp_avg_sq"])
    )


@pytest.mark.parametrize("kind", [Ada2MS, torch.optim.AdamW])
def test_values_of_parameters_that_the_optimizer_is_not_over_are_named(kind: Any) -> None:
    """On both sides: a run that goes on without them is another run."""
    model, other = nn.Linear(2, 3), nn.Linear(2, 3)
    exported = export_state(model, kind([model.weight]))
    why = "the optimizer has no moments of it"
    there = [f"the value of 'bias' is not in this state: {why}"]
    assert exported.notes == there
    report = import_state(other, kind([other.weight]), exported)
    assert report.notes == [*there, f"the value of 'bias' stays as it was here: {why}"]
    assert (torch.equal(other.weight, model.weight), torch.equal(other.bias, model.bias)) == (True, False)
    assert export_state(model, kind(model.parameters())).notes == []
    assert export_state(model, kind([model.weight]), values=False).notes == []
