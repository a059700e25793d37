"""What tests of the torch backend share."""

import io
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ada2ms.torch import Ada2MS

S, K, SKIPPED = KEYS = ("global_exp_avg_sq", "global_step", "skipped")
SHAPES = [(3, 4), (), (5,), (0,), (2, 1500)]


def shared_numbers(optimizer: Ada2MS, group: int = 0) -> dict[str, Any]:
    """The state of one of a group's parameters, which has the numbers that all of them share."""
    return next(optimizer.state[p] for p in optimizer.param_groups[group]["params"] if optimizer.state.get(p))


class Operations(TorchDispatchMode):
    """The names of torch's operations but views; each is at least one launch on a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.found.append(func._schema.name)
        return func(*args, **(kwargs or {}))


class Waits(TorchDispatchMode):
    """Notes what makes Python wait for the device: reading a value, copying from it, or to it from pageable memory."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given, made = (
            {x.device.type for x in tree_leaves(tree) if isinstance(x, Tensor)} for tree in ((args, kwargs), result)
        )
        self.operations += "cuda" in made
        copied = func._schema.name in ("aten::_to_copy", "aten::copy_") and len(given | made) > 1
        if copied or ("cuda" in given and (made == {"cpu"} or "_local_scalar_dense" in func._schema.name)):
            self.found.append(f"{func}: {given} to {made}")
        return result


def parameter(n: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64))


def train(optimizer: Any, steps: range, params: list[Any] | None = None, scale: float = 1.0) -> None:
    """Gradients that depend on the step and the parameter's size, for these parameters, or all."""
    for step in steps:
        optimizer.zero_grad()
        for p in params or [p for group in optimizer.param_groups for p in group["params"]]:
            generator = torch.Generator().manual_seed(100 * step + p.numel())
            p.grad = (scale * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p.dtype)
        optimizer.step()


def shared(optimizer: Ada2MS, p: Tensor) -> tuple[float, float]:
    return float(optimizer.state[p][S]), float(optimizer.state[p][K])


def pair(b2: float = 0.9, **options: Any) -> tuple[nn.Parameter, nn.Parameter, Ada2MS]:
    """An optimizer of two groups of one parameter each, the second of this b2."""
    p, q = parameter(3), parameter(50)
    return p, q, Ada2MS([{"params": [p]}, {"params": [q], "betas": (0.9, b2)}], lr=0.1, **options)


def random(shape: tuple[int, ...], seed: int, **kind: Any) -> Tensor:
    return torch.tensor(np.random.default_rng(seed).normal(size=shape), **kind)


def parameters(**kind: Any) -> list[nn.Parameter]:
    return [nn.Parameter(random(shape, seed, **kind)) for seed, shape in enumerate(SHAPES)]


def give_gradients(params: list[nn.Parameter], step: int, missing: bool = False) -> None:
    """The same gradients for the same step and shapes; every fourth one missing, on demand."""
    for i, p in enumerate(params):
        p.grad = random(tuple(p.shape), 100 * step + i + 10).to(p.device, p.dtype)
        if missing and (i + step) % 4 == 0:
            p.grad = None


def assert_same(left: list[nn.Parameter], right: list[nn.Parameter], bound: float) -> None:
    """`bound` is relative to the largest entry of each tensor."""
    for p, q in zip(left, right, strict=True):
        if p.numel():
            assert (p.double().cpu() - q.double().cpu()).abs().max() <= bound * q.double().abs().max().cpu()


def saved_and_loaded(x: Any, weights_only: bool = True) -> Any:
    """What a file gives back; with weights only it is read without running anything."""
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)
