"""Parameters of 16 bits with a compensation, divided among processes: what each process does, and asserts."""

import copy
import functools
from typing import Any

import torch
import torch.distributed as dist
from distributed_support import communicates
from test_torch_compensated import give_gradients, held
from torch import Tensor, nn

from ada2ms.torch import Ada2MS

# At the adaptivity 1 no sum in another order comes into it, so that the numbers are those of one process, bit for bit.
OPTIONS: dict[str, Any] = {"lr": 1e-4, "adaptivity": 1.0, "compensated": True}


def model() -> nn.Sequential:
    """Of sizes that two processes do not divide evenly."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).bfloat16()


def train(params: list[nn.Parameter], optimizer: Any, steps: range) -> None:
    """By the same gradients in every process, of which each has its part."""
    from torch.distributed.tensor import distribute_tensor

    for step in steps:
        whole = [nn.Parameter(torch.empty(p.shape, dtype=p.dtype)) for p in params]
        give_gradients(whole, step)
        for p, q in zip(params, whole, strict=True):
            sharded: Any = p
            p.grad = distribute_tensor(q.grad, sharded.device_mesh, sharded.placements) if is_sharded(p) else q.grad
        optimizer.step()


def is_sharded(p: Any) -> bool:
    return hasattr(p, "placements")


def alone() -> list[tuple[Tensor, Tensor]]:
    params = list(model().parameters())
    optimizer = Ada2MS(params, **OPTIONS)
    train(params, optimizer, range(4))
    return [(p.detach(), held(optimizer, p)) for p in params]


def whole(optimizer: Any, p: Any) -> tuple[Tensor, Tensor]:
    slot = optimizer.state[p]["compensation"]
    if is_sharded(p):
        assert slot.placements == p.placements
        assert slot.to_local().shape == p.to_local().shape
        slot, p = slot.full_tensor(), p.full_tensor()
    return p.detach(), p.detach().double() + slot.double()


def fully_shard(rank: int, world: int) -> None:
    """The slot is divided as its parameter is; one all-reduce of one number, as without."""
    from torch.distributed.fsdp import fully_shard

    net = model()
    fully_shard(net)
    params = list(net.parameters())
    optimizer = Ada2MS(params, **OPTIONS)
    train(params, optimizer, range(4))
    found = [whole(optimizer, p) for p in params]
    torch.testing.assert_close(found, alone(), rtol=0, atol=0)
    communicates(optimizer.step, 1)


def checkpoint(rank: int, world: int, flatten: bool) -> None:
    """By torch.distributed.checkpoint's state dicts into an optimizer that has had no step: bit for bit."""
    from torch.distributed.checkpoint import state_dict as sd
    from torch.distributed.fsdp import fully_shard

    options = sd.StateDictOptions(flatten_optimizer_state_dict=flatten)
    found, kept = [], None
    for resumed in (False, True):
        net = model()
        fully_shard(net)
        params = list(net.parameters())
        optimizer = Ada2MS(params, **OPTIONS)
        if kept is None:
            train(params, optimizer, range(2))
            kept = copy.deepcopy(sd.get_state_dict(net, optimizer, options=options))
        else:
            fresh = sd.get_state_dict(net, optimizer, options=options)  # what is there to be loaded into
            assert fresh[1].keys() == kept[1].keys()
            sd.set_state_dict(net, optimizer, model_state_dict=kept[0], optim_state_dict=kept[1], options=options)
        assert all(optimizer.state[p]["compensation"].dtype == torch.bfloat16 for p in params)
        train(params, optimizer, range(2, 4))
        found.append([whole(optimizer, p) for p in params])
        assert resumed == (len(found) == 2)
    torch.testing.assert_close(found[0], alone(), rtol=0, atol=0)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def zero_redundancy(rank: int, world: int) -> None:
    """Each process has the slots of its parameters, and hands the parameters round."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    params = list(model().parameters())
    sharing: Any = functools.partial(Ada2MS, shard_group=dist.group.WORLD)
    optimizer = ZeroRedundancyOptimizer(params, optimizer_class=sharing, **OPTIONS)
    train(params, optimizer, range(4))
    expected = alone()
    for p, (theta, both) in zip(params, expected, strict=True):
        assert torch.equal(p, theta)
        if p in optimizer.optim.state:
            assert torch.equal(held(optimizer.optim, p), both)
    assert optimizer.optim.state


SCENARIOS = {
    "fully_shard, compensated": fully_shard,
    "ZeroRedundancyOptimizer, compensated": zero_redundancy,
    "checkpoint, compensated": functools.partial(checkpoint, flatten=False),
    "checkpoint, compensated, flattened": functools.partial(checkpoint, flatten=True),
}
