"""The torch optimizer beyond the golden trajectories: torch's options, errors, dtypes, layouts, autograd."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_support import assert_same, give_gradients, parameters, random, shared_numbers

from ada2ms import core
from ada2ms.torch import Ada2MS
from support import needs_compiler, place, require_device

IMPLEMENTATIONS = [
    pytest.param({"foreach": False}, id="for-loop"),
    pytest.param({"foreach": True}, id="foreach"),
    pytest.param({"fused": True}, id="fused", marks=needs_compiler),
    pytest.param({"foreach": False, "capturable": True}, id="for-loop capturable"),
    pytest.param({"foreach": True, "capturable": True}, id="foreach capturable"),
]
ADAPTIVITIES = [0.0, 0.3, 0.5, 1.0, core.Linear(1.0, 0.0, 5), core.Cosine(0.0, 1.0, 4), core.Exponential(1.0, 0.0, 2.0)]


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("adaptivity", ADAPTIVITIES, ids=str)
@pytest.mark.parametrize("options", IMPLEMENTATIONS)
def test_follows_the_specification(options: dict[str, Any], adaptivity: Any, scope: Any, device: str) -> None:
    """Ten steps with two groups and missing gradients: float64, within the roundings of a few operations a step."""
    require_device("torch", device)
    params = parameters(dtype=torch.float64, device=place("torch", device))
    arrays = [p.detach().cpu().numpy().copy() for p in params]
    given = {"lr": 0.01, "adaptivity": adaptivity, "scope": scope}
    expected = core.Ada2MS([{"params": arrays[:2], "weight_decay": 0.3}, {"params": arrays[2:], "b2": 0.9}], **given)
    groups = [{"params": params[:2], "weight_decay": 0.3}, {"params": params[2:], "betas": (0.9, 0.9)}]
    optimizer = Ada2MS(groups, **given, **options)
    for step in range(10):
        give_gradients(params, step, missing=True)
        expected.step([None if p.grad is None else p.grad.cpu().numpy() for p in params])
        optimizer.step()
    assert_same(params, [nn.Parameter(torch.from_numpy(x)) for x in arrays], 1e-13)
    assert [int(shared_numbers(optimizer, i)["global_step"]) for i in range(2)] == [10, 10]


@pytest.mark.parametrize("options", IMPLEMENTATIONS)
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex128])
def test_adaptivity_1_is_adamw(dtype: torch.dtype, maximize: bool, options: dict[str, Any]) -> None:
    """Twenty steps; a few roundings a step of difference, for the same formula in another order."""
    ours, theirs = parameters(), parameters()
    with torch.no_grad():
        ours, theirs = ([nn.Parameter(p.to(dtype)) for p in params] for params in (ours, theirs))
    hyper: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1, "maximize": maximize}
    left, right = Ada2MS(ours, adaptivity=1, **hyper, **options), torch.optim.AdamW(theirs, **hyper)
    for step in range(20):
        for params in (ours, theirs):
            give_gradients(params, step, missing=True)
            if dtype.is_complex:
                for i, p in enumerate(params):
                    p.grad = None if p.grad is None else p.grad + 1j * random(tuple(p.shape), i)
        left.step()
        right.step()
    for p, q in zip(ours, theirs, strict=True):
        assert p.numel() == 0 or (p - q).abs().max() <= 20 * torch.finfo(dtype).eps * q.abs().max()


@needs_compiler
def test_half_precision_has_float32_state() -> None:
    """A 16-bit parameter takes the float32 step from its own value, rounded once; even where g*g overflows 16 bits."""
    for dtype in (torch.bfloat16, torch.float16):
        for options in ({"foreach": False}, {"foreach": True}, {"fused": True}):
            p, q = (nn.Parameter(torch.linspace(-3, 3, 8, dtype=dtype)) for _ in range(2))
            wide = nn.Parameter(torch.empty(8))
            narrow, reference = Ada2MS([p], lr=0.1, **options), Ada2MS([wide], lr=0.1, **options)
            for step in range(5):
                p.grad = 300 * random((8,), step).to(dtype)
                wide.grad = p.grad.float()
                with torch.no_grad():
                    wide.copy_(q)
                narrow.step()
                reference.step()
                with torch.no_grad():
                    q.copy_(wide)
            assert torch.equal(p, q)
            assert p.dtype == dtype
            assert all(narrow.state[p][key].dtype == torch.float32 for key in ("exp_avg", "exp_avg_sq"))
            assert shared_numbers(narrow)["global_exp_avg_sq"].isfinite()


@pytest.mark.parametrize("options", IMPLEMENTATIONS)
@pytest.mark.parametrize("eps", [0.0, 1e-60, 1e-8])
@pytest.mark.parametrize("adaptivity", [0.0, 0.3, 0.5, 1.0])
def test_zeros_give_no_update(adaptivity: float, eps: float, options: dict[str, Any]) -> None:
    """Gradients of zero change nothing but by weight decay, whether eps is 0, vanishes in float32, or not."""
    params, before = parameters(dtype=torch.float32), parameters(dtype=torch.float32)
    optimizer = Ada2MS(params, lr=0.5, eps=eps, weight_decay=0, adaptivity=adaptivity, **options)
    for _ in range(3):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert_same(params, before, 0)


def test_no_learning_rate_no_change() -> None:
    """What distributed checkpointing does to make the state: a step with lr = 0 and gradients of zero."""
    params, before = parameters(dtype=torch.float32), parameters(dtype=torch.float32)
    optimizer = Ada2MS(params, lr=torch.tensor(0.0))
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_same(params, before, 0)
    assert all(key in optimizer.state[p] for p in params for key in ("step", "exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("options", IMPLEMENTATIONS)
def test_skipped_steps_leave_no_trace(options: dict[str, Any], scope: Any) -> None:
    """With steps of NaN or infinity among them, bit for bit as without those; also when the first step is one."""
    runs = []
    for bad_steps in ((0, 2, 3), ()):
        params = parameters(dtype=torch.float32)
        optimizer = Ada2MS(params, lr=0.1, nonfinite="skip", scope=scope, adaptivity=core.Linear(1, 0, 4), **options)
        for step in range(6):
            for bad in (math.nan, math.inf) if step in bad_steps else ():
                give_gradients(params, step)
                params[2].grad[1] = bad
                optimizer.step()
            give_gradients(params, step)
            optimizer.step()
        assert shared_numbers(optimizer)["skipped"] == 2 * len(bad_steps)
        states = [{key: x for key, x in optimizer.state[p].items() if key != "skipped"} for p in params]
        runs.append((params, states, shared_numbers(optimizer)))
    (params, states, group), (params_without, states_without, group_without) = runs
    torch.testing.assert_close(params, params_without, rtol=0, atol=0)
    torch.testing.assert_close(states, states_without, rtol=0, atol=0)
    assert all(torch.equal(group[key], group_without[key]) for key in ("global_exp_avg_sq", "global_step"))


def test_nonfinite_gradients_propagate_by_default() -> None:
    params = parameters(dtype=torch.float32)
    optimizer = Ada2MS(params)
    give_gradients(params, 0)
    params[2].grad[1] = math.nan
    optimizer.step()
    assert all(p.isnan().all() for p in params)
    assert shared_numbers(optimizer)["skipped"] == 0


def test_splitting_into_groups_changes_nothing() -> None:
    """One group, two groups, and a group added before the first step: the same numbers; s is the whole model's."""
    trained = []
    for split in ("none", "two", "added"):
        params = parameters(dtype=torch.float64)
        if split == "none":
            optimizer = Ada2MS(params, lr=0.1)
        elif split == "two":
            optimizer = Ada2MS([{"params": params[:2]}, {"params": params[2:]}], lr=0.1)
        else:
            optimizer = Ada2MS(params[:2], lr=0.1)
            optimizer.add_param_group({"params": params[2:]})
        for step in range(5):
            give_gradients(params, step)
            optimizer.step()
        trained.append(params)
    assert_same(trained[1], trained[0], 0)
    assert_same(trained[2], trained[0], 0)


def test_a_group_added_later_joins_the_average_of_its_b2() -> None:
    params = parameters(dtype=torch.float32)
    optimizer = Ada2MS(params[:2], betas=(0.9, 0.99))
    give_gradients(params, 0)
    optimizer.step()
    for p in params[2:]:
        p.grad = p.grad * 3
    optimizer.add_param_group({"params": params[2:3]})
    optimizer.add_param_group({"params": params[3:], "betas": (0.9, 0.9)})
    before = float(shared_numbers(optimizer)["global_exp_avg_sq"])
    optimizer.step()  # of the same gradients: the mean of g*g is that of every parameter
    first, joined, new = (shared_numbers(optimizer, i) for i in range(3))
    assert joined["global_exp_avg_sq"] is first["global_exp_avg_sq"]
    assert joined["global_step"] is first["global_step"]
    assert (int(joined["global_step"]), int(new["global_step"])) == (2, 2)
    mean = float(torch.cat([p.grad.flatten() for p in params]).square().mean())
    assert float(first["global_exp_avg_sq"]) == pytest.approx(0.99 * before + 0.01 * mean, rel=1e-6)
    # s_hat = s/(1-b2^k) was the model's
    assert float(new["global_exp_avg_sq"]) == pytest.approx(0.9 * before / 0.01 * 0.1 + 0.1 * mean, rel=1e-6)


def test_s_has_the_precision_of_the_widest_parameter() -> None:
    params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.float64))]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = Ada2MS(params[:1])
    optimizer.step()
    assert shared_numbers(optimizer)["global_exp_avg_sq"].dtype == torch.float32
    optimizer.add_param_group({"params": params[1:]})
    optimizer.step()
    assert [shared_numbers(optimizer, i)["global_exp_avg_sq"].dtype for i in range(2)] == [torch.float64] * 2


@pytest.mark.parametrize("n", [1023, 1024, 1025, 16 * 1024, 16 * 1024 + 1, 3_000_001])
def test_sum_of_squares_of_many(n: int) -> None:
    """To float32's precision, whatever the number of entries: one running sum would be off by 1e-4 at three million."""
    p = nn.Parameter(torch.zeros(n))
    p.grad = random((n,), 0, dtype=torch.float32)
    optimizer = Ada2MS([p], betas=(0.9, 0.0))
    optimizer.step()
    exact = p.grad.double().square().mean().item()
    s = float(shared_numbers(optimizer)["global_exp_avg_sq"])
    assert abs(s - exact) <= 1e-6 * exact


@pytest.mark.parametrize("options", IMPLEMENTATIONS)
def test_memory_layout_does_not_matter(options: dict[str, Any]) -> None:
    """Channels-last and strided parameters, and gradients whose strides are others: the same numbers as contiguous."""
    shape = (2, 3, 4, 5)
    plain = [nn.Parameter(random(shape, i, dtype=torch.float64)) for i in range(3)]
    strided = torch.empty(2, 3, 4, 10, dtype=torch.float64)[..., ::2]
    with torch.no_grad():
        layouts = [
            nn.Parameter(plain[0].to(memory_format=torch.channels_last)),
            nn.Parameter(strided.copy_(plain[1])),
            nn.Parameter(plain[2].clone()),
        ]
    assert not layouts[1].is_contiguous()
    reference, optimizer = Ada2MS(plain, lr=0.1, **options), Ada2MS(layouts, lr=0.1, **options)
    for step in range(3):
        for i in range(3):
            plain[i].grad = random(shape, 10 * step + i)
        layouts[0].grad = plain[0].grad.clone()
        layouts[1].grad = plain[1].grad.to(memory_format=torch.channels_last)
        layouts[2].grad = plain[2].grad.transpose(0, 3).contiguous().transpose(0, 3)
        reference.step()
        optimizer.step()
    assert_same(layouts, plain, 1e-14)  # the sum of squares is in another order


def test_learning_rate_and_adaptivity_as_tensors_and_callables() -> None:
    """One-element tensors of any shape and a callable of the count give what the numbers give."""
    trained = []
    for numbers in (True, False):
        params = parameters(dtype=torch.float64)
        optimizer = Ada2MS(
            params,
            lr=0.25 if numbers else torch.tensor([[0.25]]),
            betas=(0.5, 0.75) if numbers else (torch.tensor([0.5]), torch.tensor(0.75)),
            adaptivity=0.75 if numbers else torch.tensor([0.75]),
        )
        for step in range(6):
            if step == 3:
                optimizer.param_groups[0]["adaptivity"] = 0.5 if numbers else (lambda count: 0.5 if count >= 3 else 1.0)
            give_gradients(params, step)
            optimizer.step()
        trained.append(params)
    assert_same(trained[1], trained[0], 1e-15)


def test_schedule_is_given_the_count_of_completed_updates() -> None:
    params, counts = parameters(dtype=torch.float32), []
    optimizer = Ada2MS(params, adaptivity=lambda count: counts.append(count) or 0.5)
    for step in range(3):
        give_gradients(params, step)
        optimizer.step()
    assert counts == [0, 1, 2]
    assert all(type(count) is int for count in counts)


def test_differentiable() -> None:
    """Derivatives of three steps by parameters, gradients and hyperparameters, against finite differences."""
    p = random((3,), 0, dtype=torch.float64).requires_grad_()
    gradients = random((3, 3), 1, dtype=torch.float64).requires_grad_()
    hyper = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.1, 0.7, 0.8, 0.3)]

    def train(adaptivity: float) -> Callable[..., Tensor]:
        def train(p: Tensor, gradients: Tensor, lr: Tensor, beta1: Tensor, beta2: Tensor, decay: Tensor) -> Tensor:
            p = p.clone()
            options = {"lr": lr, "betas": (beta1, beta2), "weight_decay": decay, "adaptivity": adaptivity}
            optimizer = Ada2MS([p], **options, differentiable=True)  # type: ignore[arg-type]
            for g in gradients:
                p.grad = g
                optimizer.step()
            return p

        return train

    for adaptivity in (0.0, 0.3, 0.5, 1.0):
        assert torch.autograd.gradcheck(train(adaptivity), (p, gradients, *hyper))


def test_parameters_may_move_after_construction() -> None:
    """A model on the meta device gets its storage after the optimizer was made."""
    model = nn.Linear(3, 1, device="meta")
    optimizer = Ada2MS(model.parameters())
    model.to_empty(device="cpu")
    for p in model.parameters():
        nn.init.ones_(p)
        p.grad = torch.ones_like(p)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    optimizer.step()
    assert shared_numbers(optimizer)["global_exp_avg_sq"].device.type == "cpu"
    assert float(shared_numbers(optimizer)["global_exp_avg_sq"]) == pytest.approx(1e-3)
