"""What the torch optimizer is called with: bad input, closures, hooks, GradScaler."""

import math
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch_support import assert_same, give_gradients, parameters, shared_numbers

from ada2ms.core import Linear
from ada2ms.torch import Ada2MS, export_state, import_state, measure
from support import needs_compiler


def test_a_schedule_out_of_range_is_an_error() -> None:
    params = parameters(dtype=torch.float32)
    optimizer = Ada2MS(params, adaptivity=lambda count: 1.5)
    give_gradients(params, 0)
    with pytest.raises(ValueError, match=r"Invalid adaptivity: 1\.5"):
        optimizer.step()


def test_closure_and_hooks() -> None:
    p, called = nn.Parameter(torch.ones(2)), []
    optimizer = Ada2MS([("weight", p)])
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))

    def closure() -> Tensor:
        called.append("closure")
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 2
    assert called == ["before", "closure", "after"]
    assert optimizer.param_groups[0]["param_names"] == ["weight"]
    assert torch.all(p < 1)


def test_sparse_gradients_are_an_error() -> None:
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    p.grad, q.grad = torch.ones(3), torch.ones(3).to_sparse()
    optimizer = Ada2MS([p, q])
    with pytest.raises(RuntimeError, match="Ada2MS does not support sparse gradients"):
        optimizer.step()
    assert torch.equal(p, torch.ones(3))
    assert not optimizer.state


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, r"Invalid learning rate: -1\.0 \(lr must be a number in \[0, inf\)\)"),
        ({"lr": lambda count: 1.0}, TypeError, r"Invalid learning rate"),
        ({"betas": (1.0, 0.9)}, ValueError, r"Invalid beta parameter at index 0: 1\.0"),
        ({"betas": (0.9, -0.1)}, ValueError, r"Invalid beta parameter at index 1: -0\.1"),
        ({"betas": 0.9}, ValueError, r"Invalid betas: 0\.9"),
        ({"eps": -1e-8}, ValueError, r"Invalid epsilon value: -1e-08"),
        ({"eps": "small"}, TypeError, r"Invalid epsilon value: 'small'"),
        ({"weight_decay": math.nan}, ValueError, r"Invalid weight_decay value: nan"),
        ({"adaptivity": 1.01}, ValueError, r"Invalid adaptivity: 1\.01 .*\[0, 1\] or a schedule"),
        ({"adaptivity": None}, TypeError, r"Invalid adaptivity: None"),
        ({"scope": "layer"}, ValueError, r"Invalid scope: 'layer' .*'model', 'tensor'"),
        ({"nonfinite": "raise"}, ValueError, r"Invalid nonfinite: 'raise' .*'propagate', 'skip'"),
    ],
)
def test_bad_input(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    """For the whole optimizer, and for one group of it, which is not added then."""
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    with pytest.raises(error, match=message):
        Ada2MS([p], **arguments)
    optimizer = Ada2MS([p])
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [q], **arguments})
    assert len(optimizer.param_groups) == 1


def test_a_shard_group_is_a_process_group() -> None:
    """`new_group` gives a number to processes that are no members, which must not pass for a group."""
    for value in (dist.GroupMember.NON_GROUP_MEMBER, "world", object()):
        with pytest.raises(TypeError, match=f"Invalid shard_group: {re.escape(repr(value))} .*ProcessGroup.* or None"):
            Ada2MS([nn.Parameter(torch.ones(3))], shard_group=value)  # type: ignore[arg-type]


def test_scope_and_nonfinite_are_the_optimizers() -> None:
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    for name, value in (("scope", "tensor"), ("nonfinite", "skip")):
        with pytest.raises(ValueError, match=f"Invalid {name}: '{value}' \\(must be the optimizer's"):
            Ada2MS([{"params": [p]}, {"params": [q], name: value}])


def test_grad_scaler_around_the_step() -> None:
    """Without fused, GradScaler unscales and skips: the trajectory is that of the unscaled gradients."""
    params, plain = parameters(dtype=torch.float32), parameters(dtype=torch.float32)
    scaled, reference = Ada2MS(params, lr=0.1), Ada2MS(plain, lr=0.1)
    train_scaled(params, scaled)
    for step in (0, 2):
        give_gradients(plain, step)
        reference.step()
    assert_same(params, plain, 0)


@needs_compiler
@pytest.mark.parametrize("capturable", [False, True])
def test_grad_scaler_inside_the_step(capturable: bool) -> None:
    """With fused, the step gets scale and verdict; s is of the unscaled gradients, and does not move where it skips."""
    params, plain = parameters(dtype=torch.float32), parameters(dtype=torch.float32)
    scaled, reference = Ada2MS(params, lr=0.1, fused=True, capturable=capturable), Ada2MS(plain, lr=0.1, fused=True)
    assert scaled._step_supports_amp_scaling
    train_scaled(params, scaled)
    for step in (0, 2):
        give_gradients(plain, step)
        reference.step()
    assert_same(params, plain, 0 if not capturable else 1e-6)  # scales are powers of 2; capturable rounds lr/(1-b1^t)
    s, expected = (shared_numbers(o)["global_exp_avg_sq"] for o in (scaled, reference))
    torch.testing.assert_close(s, expected, rtol=1e-6, atol=0)
    assert shared_numbers(scaled)["global_step"] == 2


def train_scaled(params: list[nn.Parameter], optimizer: Ada2MS) -> None:
    """Steps 0 and 2, and between them one whose scaled gradients overflow."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        scale = scaler.scale(torch.ones(())).item()
        give_gradients(params, step)
        for p in params:
            assert p.grad is not None
            p.grad *= scale
        if step == 1:
            params[2].grad[0] = math.inf
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 512


def test_fused_excludes_foreach_and_differentiable() -> None:
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(RuntimeError, match="`fused` and `foreach` cannot be `True` together"):
        Ada2MS([p], fused=True, foreach=True)
    with pytest.raises(RuntimeError, match="`fused` does not support `differentiable`"):
        Ada2MS([p], fused=True, differentiable=True)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scope": "tensor"},
        {"capturable": True},
        {"max_norm": 0.1, "nonfinite": "skip"},
        {"adaptivity": Linear(1, 0, 9)},
    ],
    ids=str,
)
def test_the_default_device_decides_nothing(options: dict[str, Any]) -> None:
    """Not of a step, nor of a load, a hand-off or a measurement: "meta", of which no value can be read, shows it."""
    found = []
    for device in ("cpu", "meta"):
        params = parameters()
        optimizer = Ada2MS([{"params": params[:2]}, {"params": params[2:], "betas": (0.9, 0.9)}], **options)
        for step in range(3):
            give_gradients(params, step)
            with torch.device(device):
                optimizer.step()
                optimizer.load_state_dict(optimizer.state_dict())
                numbers = measure(optimizer, wait=True)
        model = nn.ParameterList(params)
        with torch.device(device):
            import_state(model, optimizer, export_state(model, optimizer))
        found.append((params, optimizer.state_dict()["state"], numbers))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
