"""`measure` on several processes: what one process measures of the whole model, by one all-reduce."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_support import (
    OPTIONS,
    STEPS,
    communicates,
    in_columns_and_rows,
    in_two_dimensions,
    model,
    train,
)
from torch import nn

from ada2ms.core.measurements import PREFIX
from ada2ms.torch import Ada2MS, measure

FOUR = 4 * 4  # sums of squares for each of the model's parameters


def alone(hidden: int = 7, **options: Any) -> dict[str, float]:
    net = model(hidden)
    optimizer = Ada2MS(net.parameters(), **OPTIONS, **options)
    train(net, optimizer, range(STEPS))
    return measure(optimizer, net, wait=True)


def same(net: nn.Module, optimizer: Any, expected: dict[str, float], *reduced: int) -> None:
    """To a bound that sums in another order need, in float64."""
    found: dict[str, float] = {}
    communicates(lambda: found.update(measure(optimizer, net, wait=True)), *reduced)
    assert found == pytest.approx(expected, rel=1e-11)
    communicates(lambda: measure(optimizer))


def fully_shard(rank: int, world: int) -> None:
    """With four processes some have nothing of the smaller tensors."""
    from torch.distributed.fsdp import fully_shard

    for scope in ("model", "tensor"):
        net = model()
        fully_shard(net[0])
        fully_shard(net)
        optimizer = Ada2MS(net.parameters(), **OPTIONS, scope=scope)
        train(net, optimizer, range(STEPS), rank, world)
        same(net, optimizer, alone(scope=scope), FOUR)


def tensor_parallel(rank: int, world: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    net = in_columns_and_rows(init_device_mesh("cpu", (world,)))
    optimizer = Ada2MS(net.parameters(), **OPTIONS)
    train(net, optimizer, range(STEPS))
    same(net, optimizer, alone(hidden=8), FOUR)


def two_dimensions(rank: int, world: int) -> None:
    net, part = in_two_dimensions(world)
    optimizer = Ada2MS(net.parameters(), **OPTIONS)
    train(net, optimizer, range(STEPS), part)
    same(net, optimizer, alone(hidden=8), FOUR, FOUR)


def zero_redundancy(rank: int, world: int) -> None:
    """Every process measures the parameters that it updates, and together they have all."""
    from functools import partial

    from torch.distributed.optim import ZeroRedundancyOptimizer

    net = model()
    make: Any = partial(Ada2MS, shard_group=dist.group.WORLD)
    optimizer = ZeroRedundancyOptimizer(net.parameters(), make, **OPTIONS)
    train(nn.parallel.DistributedDataParallel(net), optimizer, range(STEPS), rank, world)
    found, expected = measure(optimizer, net, wait=True), alone()
    assert found == pytest.approx({name: expected[name] for name in found}, rel=1e-11)
    each: list[Any] = [None] * world
    dist.all_gather_object(each, sorted(found))
    assert {name for names in each for name in names} == set(expected)


def fsdp1(rank: int, world: int) -> None:
    """Its parameters are parts of tensors, and do not say which: without them, the numbers of the model."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    net = FullyShardedDataParallel(model(), use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = Ada2MS(net.parameters(), **OPTIONS, shard_group=dist.group.WORLD)
    train(net, optimizer, range(STEPS), rank, world)
    with pytest.raises(ValueError, match="Invalid model: its parameters are shards of FullyShardedDataParallel"):
        measure(optimizer, net)
    found, expected = measure(optimizer, wait=True), alone()
    assert found == pytest.approx({name: expected[name] for name in found}, rel=1e-11)
    assert PREFIX + "global_second_moment" in found


SCENARIOS: dict[str, Callable[[int, int], None]] = {
    "fully_shard, measured": fully_shard,
    "tensor parallel, measured": tensor_parallel,
    "tensor parallel and fully_shard, measured": two_dimensions,
    "ZeroRedundancyOptimizer, measured": zero_redundancy,
    "FullyShardedDataParallel, measured": fsdp1,
}
