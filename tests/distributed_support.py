"""A small model that processes divide, what it should become, and the collectives that a step takes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ada2ms.torch import Ada2MS

STEPS = 4
OPTIONS: dict[str, Any] = {"lr": 0.1, "adaptivity": 0.4}


def model(hidden: int = 7) -> nn.Sequential:
    """By default of sizes that no number of processes divides evenly."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, hidden), nn.Tanh(), nn.Linear(hidden, 3)).double()


def in_columns_and_rows(mesh: Any) -> nn.Sequential:
    """The model by tensor parallelism, which divides evenly only."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    net = model(hidden=8)
    parallelize_module(net, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return net


def in_two_dimensions(world: int) -> tuple[nn.Sequential, int]:
    """The same within `fully_shard` over two parts of the data; and which part this process has."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("data", "tensor"))
    net = in_columns_and_rows(mesh["tensor"])
    fully_shard(net, mesh=mesh["data"])
    return net, mesh["data"].get_local_rank()


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


class Collectives(TorchDispatchMode):
    """The name of every collective and the number of entries that it moves."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, Tensor) and hasattr(kind, "placements") for kind in types):
            return NotImplemented  # a DTensor, which then calls this with its parts
        name = func._schema.name
        if name.partition("::")[0] in ("c10d", "_c10d_functional") and "_tensor" not in name:  # to wait, to wrap
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            self.found.append((name.partition("::")[2].replace("_", ""), sum(x.numel() for x in tensors)))
        return func(*args, **(kwargs or {}))


def communicates(step: Callable[[], Any], *expected: int, besides: str = "") -> None:
    """Fails unless the step makes an all-reduce of each of these numbers of entries, and nothing else (`besides`)."""
    with Collectives() as mode:
        step()
    found = [(name, n) for name, n in mode.found if not besides or not name.startswith(besides)]
    assert found == [("allreduce", n) for n in expected], mode.found
