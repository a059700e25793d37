"""On several processes (gloo, CPU): every way to divide a model gives the trajectory of one process.

The bound, 1e-12 of the largest entry: float64, and sums in another order. All scenarios of a world run in one set of
processes; what they raise is the tests' to report.
"""

import copy
import functools
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ada2ms.torch import Ada2MS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed"),
]
STEPS = 4
OPTIONS: dict[str, Any] = {"lr": 0.1, "adaptivity": 0.4}


def model(hidden: int = 7) -> nn.Sequential:
    """By default of sizes that no number of processes divides evenly."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, hidden), nn.Tanh(), nn.Linear(hidden, 3)).double()


def batch(step: int, part: int | None = None, parts: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    return x if part is None else x.chunk(parts)[part]


def train(net: nn.Module, optimizer: Any, steps: range, part: int | None = None, parts: int = 2) -> None:
    for step in steps:
        optimizer.zero_grad()
        net(batch(step, part, parts)).square().mean().backward()
        optimizer.step()


def alone(hidden: int = 7, **options: Any) -> list[Tensor]:
    """The parameters after training in one process."""
    net = model(hidden)
    train(net, Ada2MS(net.parameters(), **OPTIONS, **options), range(STEPS))
    return [p.detach() for p in net.parameters()]


def assert_same(actual: list[Tensor], expected: list[Tensor], bound: float = 1e-12) -> None:
    assert len(actual) == len(expected)
    for p, q in zip(actual, expected, strict=True):
        assert p.shape == q.shape
        assert (p.detach() - q).abs().max() <= bound * q.abs().max()


def full(net: nn.Module) -> list[Tensor]:
    return [p.full_tensor() if hasattr(p, "full_tensor") else p for p in net.parameters()]


def reductions(optimizer: Any) -> int:
    """The number of collectives of one step, all of them all-reduces."""
    from torch.distributed.tensor.debug import CommDebugMode

    with CommDebugMode() as mode:
        optimizer.step()
    counts = {str(op): n for op, n in mode.get_comm_counts().items() if n}
    assert all("all" in op and "reduce" in op for op in counts), counts
    return sum(counts.values())


def ddp(rank: int, world: int) -> None:
    net = nn.parallel.DistributedDataParallel(model())
    optimizer = Ada2MS(net.parameters(), **OPTIONS)
    train(net, optimizer, range(STEPS), rank, world)
    assert_same(list(net.module.parameters()), alone())
    assert reductions(optimizer) == 0


def fully_shard(rank: int, world: int, scope: Any = "model") -> None:
    from torch.distributed.fsdp import fully_shard

    net = model()
    fully_shard(net[0])
    fully_shard(net)
    optimizer = Ada2MS(net.parameters(), **OPTIONS, scope=scope)
    train(net, optimizer, range(STEPS), rank, world)
    assert_same(full(net), alone(scope=scope))
    assert reductions(optimizer) == 1


def hybrid_shard(rank: int, world: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = model()
    fully_shard(net, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard")))
    optimizer = Ada2MS(net.parameters(), **OPTIONS)
    train(net, optimizer, range(STEPS), rank, world)
    assert_same(full(net), alone())
    assert reductions(optimizer) == 1


def tensor_parallel(rank: int, world: int) -> None:
    """Sharded parameters and a replicated one in one optimizer."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    net = model(hidden=8)  # torch's tensor parallelism divides evenly only
    parallelize_module(net, init_device_mesh("cpu", (world,)), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    optimizer = Ada2MS(net.parameters(), **OPTIONS)
    train(net, optimizer, range(STEPS))
    assert_same(full(net), alone(hidden=8))
    assert reductions(optimizer) == 1


def pipeline(rank: int, world: int) -> None:
    """Every process steps its own parameters only; one has no gradient at one step, and none has at another."""
    options = {**OPTIONS, "nonfinite": "skip"}
    whole_net, net = model(), model()
    reference = Ada2MS(whole_net.parameters(), **options)
    mine = list(net[0 if rank == 0 else 2].parameters())
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
    assert optimizer.param_groups[0]["skipped"] == 1
    assert optimizer.param_groups[0]["global_step"] == reference.param_groups[0]["global_step"] == STEPS
    assert reductions(optimizer) == 1
    with pytest.raises(TypeError, match="neither copied nor pickled"):
        copy.deepcopy(optimizer)


def zero_redundancy(rank: int, world: int) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    net = nn.parallel.DistributedDataParallel(model())
    sharing: Any = functools.partial(Ada2MS, shard_group=dist.group.WORLD)
    optimizer = ZeroRedundancyOptimizer(net.parameters(), optimizer_class=sharing, **OPTIONS)
    train(net, optimizer, range(STEPS), rank, world)
    assert_same(list(net.module.parameters()), alone())


def fsdp1(rank: int, world: int) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    net = FullyShardedDataParallel(model(), use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match="Invalid shard_group: None"):
        Ada2MS(net.parameters(), **OPTIONS)
    optimizer = Ada2MS(net.parameters(), **OPTIONS, shard_group=dist.group.WORLD)
    train(net, optimizer, range(STEPS), rank, world)
    with FullyShardedDataParallel.summon_full_params(net):
        assert_same(list(net.parameters()), alone())


def checkpoint(rank: int, world: int, flatten: bool, full_state: bool) -> None:
    """Saved in mid-training and resumed by torch.distributed.checkpoint: difference 0."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as sd
    from torch.distributed.fsdp import fully_shard

    options = sd.StateDictOptions(
        flatten_optimizer_state_dict=flatten, full_state_dict=full_state, broadcast_from_rank0=full_state
    )
    trained: list[Any] = []
    kept: Any = None
    folder = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folder)
    for resumed in (False, True):
        net = model()
        fully_shard(net)
        optimizer = Ada2MS(net.parameters(), **OPTIONS)
        if resumed and full_state:
            sd.set_optimizer_state_dict(net, optimizer, optim_state_dict=kept[1], options=options)
            sd.set_model_state_dict(net, kept[0], options=options)
        elif resumed:
            state: Any = dict(
                zip(("model", "optimizer"), sd.get_state_dict(net, optimizer, options=options), strict=True)
            )
            dcp.load(state, checkpoint_id=folder[0])
            sd.set_state_dict(
                net, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options
            )
        else:
            train(net, optimizer, range(2), rank, world)
            states = sd.get_state_dict(net, optimizer, options=options)
            kept = copy.deepcopy(states)
            if not full_state:
                dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=folder[0])
        assert optimizer.param_groups[0]["global_step"] == 2
        train(net, optimizer, range(2, STEPS), rank, world)
        trained.append(full(net))
    assert_same(trained[1], [p.detach() for p in trained[0]], bound=0)


SCENARIOS: dict[tuple[int, str], Callable[[int, int], None]] = {
    (2, "ddp"): ddp,
    (2, "fully_shard"): fully_shard,
    (2, "fully_shard, scope tensor"): functools.partial(fully_shard, scope="tensor"),
    (2, "tensor parallel"): tensor_parallel,
    (2, "pipeline"): pipeline,
    (2, "ZeroRedundancyOptimizer"): zero_redundancy,
    (2, "FullyShardedDataParallel"): fsdp1,
    (2, "checkpoint"): functools.partial(checkpoint, flatten=False, full_state=False),
    (2, "checkpoint, flattened"): functools.partial(checkpoint, flatten=True, full_state=False),
    (2, "checkpoint, full, from rank 0"): functools.partial(checkpoint, flatten=False, full_state=True),
    (4, "fully_shard"): fully_shard,
    (4, "hybrid shard"): hybrid_shard,
}


def work(rank: int, world: int, folder: str) -> None:
    """One process: every scenario of this world, and what each raised, if anything."""
    from datetime import timedelta

    torch.set_num_threads(1)
    outcome = {}
    dist.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    for (size, name), scenario in SCENARIOS.items():
        if size == world:
            try:
                scenario(rank, world)
                outcome[name] = ""
            except Exception:
                outcome[name] = traceback.format_exc()
    torch.save(outcome, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, str]]]:
    @functools.cache
    def run(world: int) -> list[dict[str, str]]:
        folder: Path = tmp_path_factory.mktemp(f"world{world}")
        torch.multiprocessing.spawn(work, (world, str(folder)), nprocs=world)
        return [torch.load(folder / f"{rank}.pt") for rank in range(world)]

    return run


@pytest.mark.parametrize(("world", "name"), SCENARIOS, ids=str)
def test_divided(world: int, name: str, outcomes: Callable[[int], list[dict[str, str]]]) -> None:
    for rank, outcome in enumerate(outcomes(world)):
        assert not outcome[name], f"rank {rank}:\n{outcome[name]}"
