"""Every way to divide a model among processes: what each process does, and asserts."""

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_checkpoints import checkpoint
from distributed_compensated import SCENARIOS as COMPENSATED
from distributed_measurements import SCENARIOS as MEASURED
from distributed_support import (
    OPTIONS,
    STEPS,
    Collectives,
    alone,
    assert_same,
    batch,
    communicates,
    full,
    in_columns_and_rows,
    in_two_dimensions,
    model,
    train,
)
from torch import Tensor, nn
from torch_support import shared_numbers

from ada2ms.torch import Ada2MS


def ddp(rank: int, world: int) -> None:
    net = nn.parallel.DistributedDataParallel(model())
    optimizer = Ada2MS(net.parameters(), **OPTIONS)
    train(net, optimizer, range(STEPS), rank, world)
    assert_same(list(net.module.parameters()), alone())
    communicates(optimizer.step)


def fully_shard(rank: int, world: int, scope: Any = "model") -> None:
    from torch.distributed.fsdp import fully_shard

    net = model()
    fully_shard(net[0])
    fully_shard(net)
    optimizer = Ada2MS(net.parameters(), **OPTIONS, scope=scope)
    train(net, optimizer, range(STEPS), rank, world)
    assert_same(full(net), alone(scope=scope))
    communicates(optimizer.step, 1 if scope == "model" else 4)  # or one number for each tensor


def hybrid_shard(rank: int, world: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = model()
    fully_shard(net, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard")))
    optimizer = Ada2MS(net.parameters(), **OPTIONS)
    train(net, optimizer, range(STEPS), rank, world)
    assert_same(full(net), alone())
    communicates(optimizer.step, 1)


def tensor_parallel(rank: int, world: int) -> None:
    """Sharded parameters and a replicated one in one optimizer."""
    from torch.distributed.device_mesh import init_device_mesh

    net = in_columns_and_rows(init_device_mesh("cpu", (world,)))
    optimizer = Ada2MS(net.parameters(), **OPTIONS)
    train(net, optimizer, range(STEPS))
    assert_same(full(net), alone(hidden=8))
    communicates(optimizer.step, 1)


def two_dimensions(rank: int, world: int) -> None:
    """`fully_shard` over tensor parallelism: both dimensions of the mesh are reduced, one after the other."""
    net, part = in_two_dimensions(world)
    optimizer = Ada2MS(net.parameters(), **OPTIONS)
    train(net, optimizer, range(STEPS), part)
    assert_same(full(net), alone(hidden=8))
    communicates(optimizer.step, 1, 1)


def mixed(rank: int, world: int) -> None:
    """Sharded, replicated and plain parameters in one optimizer, and one plain parameter that has no gradient."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    places: list[Any] = [[Shard(0)], [Replicate()], [Shard(1)], None]
    whole_net = model()
    whole_params = list(whole_net.parameters())
    reference = Ada2MS(whole_params, **OPTIONS)

    def spread(x: Tensor, place: Any) -> Tensor:
        return x.detach().clone() if place is None else distribute_tensor(x.detach(), mesh, place)

    params = [nn.Parameter(spread(p, place)) for p, place in zip(whole_params, places, strict=True)]
    optimizer = Ada2MS([*params, nn.Parameter(torch.ones(3))], **OPTIONS)
    for step in range(STEPS):
        whole_net.zero_grad()
        whole_net(batch(step)).square().mean().backward()
        for p, q, place in zip(params, whole_params, places, strict=True):
            assert q.grad is not None
            p.grad = spread(q.grad, place)
        reference.step()
        optimizer.step()
    assert_same(
        [p.full_tensor() if hasattr(p, "full_tensor") else p for p in params], [p.detach() for p in whole_params]
    )
    communicates(optimizer.step, 1)


def scheduled_pipeline(rank: int, world: int) -> None:
    """Torch's pipeline, of as many stages as there are processes, each with its optimizer."""
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    def layers() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(4))).double()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().sum()

    sums = {"scale_grads": False} if "scale_grads" in inspect.signature(ScheduleGPipe.__init__).parameters else {}
    whole_net, stages = layers(), list(layers())
    reference = Ada2MS(whole_net.parameters(), **OPTIONS)
    stage = nn.Sequential(*stages[rank * 4 // world : (rank + 1) * 4 // world])
    optimizer = Ada2MS(stage.parameters(), **OPTIONS, shard_group=dist.group.WORLD)
    pipe = ScheduleGPipe(PipelineStage(stage, rank, world, torch.device("cpu")), 2, loss_fn=loss, **sums)
    for step in range(STEPS):
        x, target = batch(step), batch(step + 100)
        reference.zero_grad()
        loss(whole_net(x), target).backward()
        reference.step()
        optimizer.zero_grad()
        pipe.step(*([x] if rank == 0 else []), **({"target": target} if rank == world - 1 else {}))
        optimizer.step()
    mine = list(whole_net[rank * 4 // world : (rank + 1) * 4 // world].parameters())
    assert_same(list(stage.parameters()), [p.detach() for p in mine])
    communicates(optimizer.step, 2)


def pipeline(rank: int, world: int) -> None:
    """Every process steps its own parameters only; some have no gradient at one step, and none has at another."""
    options = {**OPTIONS, "nonfinite": "skip"}
    whole_net, net = model(), model()
    reference = Ada2MS(whole_net.parameters(), **options)
    each = 4 // world
    mine = list(net.parameters())[rank * each : (rank + 1) * each]
    optimizer = Ada2MS(mine, **options, shard_group=dist.group.WORLD)
    for step in range(STEPS + 2):
        for network in (net, whole_net):
            network.zero_grad()
            network(batch(step)).square().mean().backward()
            for p in network[2].parameters() if step == 1 else network.parameters() if step == 2 else ():
                p.grad = None
        if step == 3:  # one process sees the NaN, and all skip
            for network in (net, whole_net):
                network[0].bias.grad[0] = torch.nan
        reference.step()
        optimizer.step()
        with torch.no_grad():  # what the other stage has
            for p, q in zip(net.parameters(), whole_net.parameters(), strict=True):
                if not any(p is x for x in mine):
                    p.copy_(q)
    assert_same(list(net.parameters()), [p.detach() for p in whole_net.parameters()])
    assert shared_numbers(optimizer)["skipped"] == 1
    assert shared_numbers(optimizer)["global_step"] == shared_numbers(reference)["global_step"] == STEPS
    communicates(optimizer.step, 2)
    with pytest.raises(TypeError, match="neither copied nor pickled"):
        copy.deepcopy(optimizer)


def zero_redundancy(rank: int, world: int, **options: Any) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    net = nn.parallel.DistributedDataParallel(model())
    sharing: Any = functools.partial(Ada2MS, shard_group=dist.group.WORLD)
    optimizer = ZeroRedundancyOptimizer(net.parameters(), optimizer_class=sharing, **OPTIONS, **options)
    train(net, optimizer, range(STEPS), rank, world)
    assert_same(list(net.module.parameters()), alone(**options))
    communicates(optimizer.step, 2, besides="broadcast")  # by which it hands the parameters round


def fsdp1(rank: int, world: int) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    net = FullyShardedDataParallel(model(), use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match="Invalid shard_group: None"):
        Ada2MS(net.parameters(), **OPTIONS)
    with pytest.raises(ValueError, match="Invalid scope: 'tensor'"):
        Ada2MS(net.parameters(), lr=0.1, shard_group=dist.group.WORLD, scope="tensor", max_norm=1.0)
    optimizer = Ada2MS(net.parameters(), **OPTIONS, shard_group=dist.group.WORLD)
    train(net, optimizer, range(STEPS), rank, world)
    with FullyShardedDataParallel.summon_full_params(net):
        assert_same(list(net.parameters()), alone())
    communicates(optimizer.step, 2)


def flat_shards(rank: int, world: int) -> None:
    """What DeepSpeed's ZeRO does to an optimizer: after construction the parameters of each group become one flat shard
    of them, padded with zeros; groups are stepped one by one.
    """
    net, group = model(), dist.group.WORLD
    params = list(net.parameters())
    sizes = [p.numel() for p in params]
    each = -(-sum(sizes) // world) + 1  # one zero at least
    length = each * world

    def shard(tensors: list[Tensor]) -> Tensor:
        flat = torch.cat([x.detach().flatten() for x in tensors])
        return torch.nn.functional.pad(flat, (0, length - flat.numel()))[rank * each : (rank + 1) * each].clone()

    def replace(optimizer: Ada2MS) -> Tensor:
        master = shard(params).requires_grad_()
        optimizer.param_groups[0]["params"] = [master]
        master.grad = torch.ones_like(master)
        return master

    optimizer = Ada2MS(params, **OPTIONS)
    replace(optimizer)
    with pytest.raises(ValueError, match=r"Invalid shard_group: None \(the parameters were replaced by flat shards"):
        optimizer.step()
    optimizer = Ada2MS([{"params": params[:2]}, {"params": params[2:]}], **OPTIONS, shard_group=group)
    optimizer.param_groups.pop()
    replace(optimizer)
    with pytest.raises(ValueError, match=r"Invalid params: 2 groups .* there must be one group"):
        optimizer.step()

    optimizer = Ada2MS(params, lr=0.1, shard_group=group, scope="tensor", max_norm=1.0)
    replace(optimizer)
    with pytest.raises(ValueError, match="Invalid scope: 'tensor'"):
        optimizer.step()

    optimizer = Ada2MS(params, **OPTIONS, shard_group=group)
    master = replace(optimizer)
    for step in range(STEPS):
        net.zero_grad()
        net(batch(step)).square().mean().backward()
        master.grad = shard([p.grad for p in params if p.grad is not None])
        optimizer.step()
        parts = [torch.empty_like(master) for _ in range(world)]
        dist.all_gather(parts, master.detach())
        with torch.no_grad():
            for p, x in zip(params, torch.cat(parts)[: sum(sizes)].split(sizes), strict=True):
                p.copy_(x.view_as(p))
    assert_same(params, alone())
    communicates(optimizer.step, 2)


def norms(rank: int, world: int) -> None:
    """`grad_norm`, before clipping, is the whole model's, whichever part a process has; by no collective of its own.

    The gradients are those of one process, since every process has the whole batch.
    """
    from torch.distributed.device_mesh import init_device_mesh

    whole_net, net = model(), model()
    tensors = in_columns_and_rows(init_device_mesh("cpu", (world,)))
    each = 4 // world
    mine = list(net.parameters())[rank * each : (rank + 1) * each]
    for scope in ("model", "tensor"):
        stage = Ada2MS(mine, lr=0.0, scope=scope, max_norm=1e-3, shard_group=dist.group.WORLD)
        parallel = Ada2MS(tensors.parameters(), lr=0.0, scope=scope, max_norm=1e-3)
        for network, optimizer, reference in ((net, stage, whole_net), (tensors, parallel, model(hidden=8))):
            for some in (network, reference):
                some.zero_grad()
                some(batch(0)).square().mean().backward()
            optimizer.step()
            norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
            with Collectives() as mode:
                assert optimizer.grad_norm is not None
                torch.testing.assert_close(optimizer.grad_norm, norm, rtol=1e-13, atol=0)
            assert mode.found == []


def clipping(scenario: Callable[[int, int], None]) -> Callable[[int, int], None]:
    """A scenario with `max_norm`, in every optimizer of it and the one that it is compared with; so small that it clips
    in every step. It makes as many collectives, of as many numbers, as without.
    """

    def run(rank: int, world: int) -> None:
        OPTIONS["max_norm"] = 1e-3
        try:
            scenario(rank, world)
        finally:
            del OPTIONS["max_norm"]

    return run


SCENARIOS: dict[str, Callable[[int, int], None]] = {
    "ddp": ddp,
    "fully_shard": fully_shard,
    "fully_shard, scope tensor": functools.partial(fully_shard, scope="tensor"),
    "hybrid shard": hybrid_shard,
    "tensor parallel": tensor_parallel,
    "tensor parallel and fully_shard": two_dimensions,
    "sharded, replicated and plain": mixed,
    "pipeline": pipeline,
    "pipeline of torch": scheduled_pipeline,
    "ZeroRedundancyOptimizer": zero_redundancy,
    "FullyShardedDataParallel": fsdp1,
    "flat shards": flat_shards,
    "norms": norms,
    "checkpoint": functools.partial(checkpoint, flatten=False, full_state=False),
    "checkpoint, flattened": functools.partial(checkpoint, flatten=True, full_state=False),
    "checkpoint, full, from rank 0": functools.partial(checkpoint, flatten=False, full_state=True),
}
SCENARIOS |= {
    f"{name}, clipping": clipping(SCENARIOS[name])
    for name in (
        "ddp",
        "fully_shard",
        "fully_shard, scope tensor",
        "hybrid shard",
        "tensor parallel",
        "tensor parallel and fully_shard",
        "sharded, replicated and plain",
        "pipeline",
        "pipeline of torch",
        "ZeroRedundancyOptimizer",
        "FullyShardedDataParallel",
        "flat shards",
        "checkpoint, flattened",
    )
}
SCENARIOS["ZeroRedundancyOptimizer, scope tensor, clipping"] = clipping(
    functools.partial(zero_redundancy, scope="tensor")
)
SCENARIOS |= COMPENSATED | MEASURED
RESHARDED = "checkpoint, of another number of processes"
PLANES = tuple(
    x for x in SCENARIOS if x.startswith(("hybrid shard", "tensor parallel and fully_shard"))
)  # of two dimensions, each of two processes
CASES = [(world, name) for world in (2, 4) for name in (*SCENARIOS, RESHARDED) if world == 4 or name not in PLANES]
CASES.append((1, RESHARDED))
FSDP2 = (
    *PLANES,
    *(x for x in SCENARIOS if x.startswith(("fully_shard", "checkpoint"))),
    RESHARDED,
)
