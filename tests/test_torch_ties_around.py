"""S and k beside parameters that are no ordinary ones, in other types, and what tying costs."""

import copy
from functools import partial
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch_support import KEYS, K, S, pair, parameter, shared, train

from ada2ms.torch import Ada2MS, checks, export_state
from support import needs_compiler


@pytest.fixture
def process_group(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("options", [{}, pytest.param({"fused": True}, marks=needs_compiler)], ids=str)
@pytest.mark.parametrize(
    "frozen",
    [
        torch.zeros(2).to(torch.float8_e4m3fn),
        torch.zeros(2, dtype=torch.uint8),
        torch.zeros(2, device="meta"),
        torch.zeros(2),
    ],
    ids=["float8", "uint8", "meta", "float32"],
)
def test_a_group_that_is_never_trained(frozen: Tensor, options: Any) -> None:
    """It changes nothing, and has no state that could not be made; AdamW trains the rest, too."""
    trained = []
    for other in (frozen, None):
        p = parameter(3)
        groups: list[dict[str, Any]] = [{"params": [p]}]
        if other is not None:
            groups.append({"params": [nn.Parameter(other, requires_grad=False)], "betas": (0.9, 0.9)})
        optimizer = Ada2MS(groups, **options)
        for step in range(4):
            train(optimizer, range(step, step + 1), [p])
            if step == 2:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        trained.append((p.detach(), optimizer.state[p]))
    torch.testing.assert_close(*trained, rtol=0, atol=0)


def test_of_a_group_without_gradients_what_can_be_trained_has_the_state() -> None:
    p, small, q = parameter(3), parameter(2).requires_grad_(False), parameter(50)
    optimizer = Ada2MS([{"params": [p]}, {"params": [small, q], "betas": (0.9, 0.9)}])
    train(optimizer, range(2), [p])
    assert not optimizer.state.get(small)
    assert shared(optimizer, q)[1] == 2


def test_a_parameter_in_two_groups() -> None:
    """Of one b2 as AdamW, at adaptivity 1; of two, an error that says so, before anything changes."""
    trained = []
    for make in (partial(Ada2MS, adaptivity=1.0), torch.optim.AdamW):
        p, q = parameter(3), parameter(4)
        optimizer: Any = make([{"params": [p]}, {"params": [q]}], foreach=False)
        optimizer.param_groups.append({**optimizer.param_groups[0], "params": [p]})
        train(optimizer, range(3), [p, q])
        trained.append(p.detach().clone())
        if make is not torch.optim.AdamW:
            optimizer.param_groups[2]["betas"] = (0.9, 0.9)
            before = copy.deepcopy(optimizer.state_dict()["state"])
            with pytest.raises(ValueError, match=r"is in groups 0 and 2, whose betas\[1\] are 0.999 and 0.9"):
                train(optimizer, range(1), [p, q])
            torch.testing.assert_close(optimizer.state_dict()["state"], before, rtol=0, atol=0)
    torch.testing.assert_close(*trained, rtol=1e-13, atol=0)


@pytest.mark.parametrize("sizes", [[(4, 400)], [(4, 4), (3, 3)], [(400, 4)]], ids=str)
def test_tensors_that_a_user_replaces_are_no_shards(sizes: list[tuple[int, int]], process_group: Any) -> None:
    """Which are told from DeepSpeed's by their size: as without a process group."""
    trained = []
    for alone in (False, True):
        if alone:
            dist.destroy_process_group()
        old, new = ([torch.ones(pair[i], requires_grad=True) for pair in sizes] for i in (0, 1))
        optimizer = Ada2MS([{"params": [x]} for x in old], lr=0.1)
        train(optimizer, range(2))
        for group, x in zip(optimizer.param_groups, new, strict=True):
            group["params"] = [x]
        train(optimizer, range(2, 4))
        trained.append([x.detach() for x in new])
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.testing.assert_close(*trained, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # which torch itself uses
def test_zero_redundancy_with_a_partial(process_group: Any) -> None:
    """As the class says it: the state dict can be copied, and goes on."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    trained = []
    for _ in range(2):
        p, q = parameter(3), parameter(50)
        make: Any = partial(Ada2MS, shard_group=process_group)
        optimizer = ZeroRedundancyOptimizer([p, q], make, lr=0.1)
        if trained:
            optimizer = Ada2MS([p, q], lr=0.1)  # type: ignore[assignment]
        train(optimizer, range(3))
        if isinstance(optimizer, ZeroRedundancyOptimizer):
            optimizer.consolidate_state_dict()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(optimizer, range(3, 6))
        trained.append((p.detach(), q.detach()))
    torch.testing.assert_close(*trained, rtol=1e-14, atol=0)


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("foreach", [False, True])
def test_one_moment_that_is_cast(key: str, foreach: bool) -> None:
    """Back to float32 in the next step, as both are."""
    p = nn.Parameter(torch.ones(3))
    optimizer = Ada2MS([p], foreach=foreach)
    train(optimizer, range(2))
    optimizer.state[p][key] = optimizer.state[p][key].bfloat16()
    train(optimizer, range(2, 3))
    assert optimizer.state[p][key].dtype == torch.float32
    assert p.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_counts_that_are_integers(dtype: torch.dtype) -> None:
    p, q, optimizer = pair(0.999)
    train(optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state.update({key: state[key].to(dtype) for key in ("step", "global_step", "skipped")})
    optimizer.load_state_dict(saved)
    train(optimizer, range(3, 5))
    assert optimizer.state[p][K] is optimizer.state[q][K]
    assert optimizer.state[p][K].dtype == torch.float32
    assert [float(optimizer.state[q][key]) for key in ("step", "global_step")] == [5, 5]


def test_an_s_that_a_state_dict_lacks() -> None:
    """With scope "tensor": the mean of v."""
    p, q, optimizer = pair(scope="tensor")
    train(optimizer, range(7))
    saved = copy.deepcopy(optimizer.state_dict())
    expected = [shared(optimizer, x) for x in (p, q)]
    del saved["state"][1][S]
    optimizer.load_state_dict(saved)
    assert [shared(optimizer, x) for x in (p, q)] == [pytest.approx(x) for x in expected]


@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
def test_one_b2_in_three_types(order: tuple[int, ...]) -> None:
    """Whatever the order of the groups, they share s."""
    b2s: list[Any] = [0.999, float(np.float32(0.999)), torch.tensor(0.999)]
    params = [parameter(n) for n in (3, 4, 5)]
    groups: list[Any] = []
    for p, i in zip(params, order, strict=True):
        groups.append({"params": [p], "betas": (torch.tensor(0.9) if i == 2 else 0.9, b2s[i])})
    optimizer = Ada2MS(groups)
    train(optimizer, range(3))
    for key in KEYS:
        assert len({id(optimizer.state[p][key]) for p in params}) == 1
    assert shared(optimizer, params[0])[1] == 3


def test_a_wrappers_state_beside_ours_is_no_part_of_an_exported_one() -> None:
    p = parameter(3)
    optimizer = Ada2MS([p])
    train(optimizer, range(2))
    before = export_state({"p": p}, optimizer)
    optimizer.state[p]["old_p"] = p.detach().clone()
    after = export_state({"p": p}, optimizer)
    assert vars(after.groups[0]) == vars(before.groups[0])
    np.testing.assert_array_equal(after.parameters["p"].exp_avg_sq, before.parameters["p"].exp_avg_sq)


def test_making_many_groups_costs_the_same_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by how often size and reference are asked, of tensors that could be flat shards."""
    asked = []
    monkeypatch.setattr(checks, "numel", lambda p: asked.append(p) or p.numel())
    counting = SimpleNamespace(ref=lambda p: asked.append(p) or (lambda: p))  # torch has weak references of its own
    monkeypatch.setattr(checks, "weakref", counting)
    optimizer = Ada2MS([{"params": [parameter(2).detach()]} for _ in range(20)])
    for _ in range(20):
        optimizer.add_param_group({"params": [parameter(2).detach()]})
    assert len(asked) == 80
    train(optimizer, range(1))
    assert len(asked) == 80


def test_a_b2_that_changes_with_every_step_copies_no_moment() -> None:
    p, q, optimizer = pair(0.999)
    train(optimizer, range(1))
    before = {id(x) for y in (p, q) for x in optimizer.state[y].values()}
    for step in range(1, 4):
        for group in optimizer.param_groups:
            group["betas"] = (0.9, 0.99 + step / 1000)
        train(optimizer, range(step, step + 1))
    assert {id(x) for y in (p, q) for x in optimizer.state[y].values()} == before
