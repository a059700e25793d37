"""Any optimizer of torch, stepped by given gradients on given parameters; and golden cases replayed by Ada2MS.

For tests, `ada2ms check` and `ada2ms identify`; `Driven` is an `Optimizer` of `ada2ms.conformance`.
"""

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from ada2ms.core import golden
from ada2ms.core.cases import (
    Array,
    Path,
    Race,
    Replay,
    Snapshot,
    choices,
    dtypes,
    hyperparameters,
    initial,
    recorded,
)
from ada2ms.torch.kernels import choose, fused_cpu
from ada2ms.torch.optimizer import Ada2MS


@contextmanager
def settings(dtype: str, device: str = "cpu") -> Iterator[None]:
    """The precision as a user of `dtype` sets it: GPUs may multiply float32 in a shorter format."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


def version() -> str:
    """Torch's."""
    return str(torch.__version__)


def devices() -> list[str]:
    """Those that this torch sees here: the CPU, and its accelerator."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return ["cpu", *([] if accelerator is None else [accelerator.type])]


def lacks(device: str, dtype: str) -> str:
    """Why a device cannot compute in a dtype; "" if it can."""
    try:
        torch.ones(1, dtype=getattr(torch, dtype), device=device).add(1)
    except (TypeError, RuntimeError, NotImplementedError, AssertionError) as error:
        return str(error).partition("\n")[0]
    return ""


def paths(device: str, few: Collection[str] | None = None) -> list[Path]:
    """The ways of a step on a device; one of them, the fused one if there is one, replays all cases."""
    kind = torch.device(device).type
    fused = _fused(kind)
    found = [
        Path("for-loop", replay(foreach=False), share="cover" if kind == "cuda" or fused.replay else "all"),
        Path("foreach", replay(foreach=True), share="all" if kind == "cuda" else "cover"),
        fused,
        Path("capturable", replay(capturable=True)),
    ]
    if kind == "cuda":
        captured = replay(capturable=True, fused=fused.replay is not None, made=Captured)
        found.append(Path("CUDA graph", captured))
    return found


def _fused(kind: str) -> Path:
    """Compiles it, which takes some ten seconds once."""
    if kind not in ("cpu", "cuda"):
        return Path("fused", reason=f"is for cpu and cuda; on {kind} the default takes its place")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        there = (fused_cpu.extension if kind == "cpu" else choose.fused_cuda)() is not None
    if there:
        return Path("fused", replay(fused=True), share="all")
    return Path("fused", reason=str(said[-1].message) if said else "it was not compiled before, either")


def races(device: str, shapes: Sequence[tuple[int, ...]]) -> Iterator[Race]:
    """A step of Ada2MS beside one of AdamW, by torch's choice of path, and fused."""
    params = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    wait = (lambda: None) if torch.device(device).type == "cpu" else partial(torch.accelerator.synchronize, device)
    yield Race("default", Ada2MS(params).step, torch.optim.AdamW(params).step, wait)
    if _fused(torch.device(device).type).replay is not None:
        yield Race("fused", Ada2MS(params, fused=True).step, torch.optim.AdamW(params, fused=True).step, wait)


class Driven:
    """An optimizer of torch that is stepped by gradients in NumPy.

    Args:
        make: gets the parameters, and returns their optimizer.
        params: initial values.
        dtype: of the parameters, and of their gradients.
        dtypes: of each parameter, where they differ.
        device: torch's name of it, such as "cpu", "cuda:1" or "mps".
        compiled: steps by torch.compile.

    Attributes:
        parameters: torch's, in order.
        optimizer: what `make` returned.
    """

    def __init__(
        self,
        make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
        params: Sequence[Array],
        *,
        dtype: str = "float32",
        dtypes: Sequence[str] | None = None,
        device: str = "cpu",
        compiled: bool = False,
    ) -> None:
        kinds = [getattr(torch, kind) for kind in dtypes or [dtype] * len(params)]
        self.parameters = [
            torch.nn.Parameter(torch.tensor(p, dtype=kind, device=device))
            for p, kind in zip(params, kinds, strict=True)
        ]
        self.optimizer = make(self.parameters)
        step: Callable[[], Any] = self.optimizer.step
        self._step = torch.compile(step) if compiled else step

    def step(self, gradients: Sequence[Array | None]) -> None:
        """One step; None is a gradient that is missing."""
        for p, g in zip(self.parameters, gradients, strict=True):
            p.grad = None if g is None else torch.tensor(g, dtype=p.dtype, device=p.device)
        self._step()

    @property
    def params(self) -> list[Array]:
        """The current values, in float64."""
        return [numpy(p) for p in self.parameters]

    @property
    def lr(self) -> Any:
        """The learning rate of the first group; to set it sets those of all."""
        return self.optimizer.param_groups[0]["lr"]

    @lr.setter
    def lr(self, value: float) -> None:
        for group in self.optimizer.param_groups:
            set_lr(group, value)


def set_lr(group: dict[str, Any], value: float) -> None:
    """In place where it is a tensor."""
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(value)
    else:
        group["lr"] = value


def numpy(x: torch.Tensor) -> Array:
    """In float64, by way of the CPU: there are devices without it."""
    found: Array = x.detach().cpu().double().numpy()
    return found


class Captured(Driven):
    """Steps on CUDA are replayed from a graph: one is captured for each set of parameters that have gradients, after a
    first step without a graph, which makes their state. The learning rates are to be tensors, which a graph reads."""

    _graphs: dict[tuple[bool, ...], torch.cuda.CUDAGraph]
    _buffers: dict[tuple[bool, ...], list[torch.Tensor | None]]

    def step(self, gradients: Sequence[Array | None]) -> None:
        """One step; None is a gradient that is missing."""
        present = tuple(g is not None for g in gradients)
        if not hasattr(self, "_buffers"):
            self._graphs, self._buffers = {}, {}
        if present not in self._buffers or not any(present):
            super().step(gradients)
            self._graphs.clear()  # what the new state shares with others may have moved
            self._buffers[present] = [p.grad for p in self.parameters]
            return
        for p, buffer, g in zip(self.parameters, self._buffers[present], gradients, strict=True):
            p.grad = buffer
            if buffer is not None:
                buffer.copy_(torch.tensor(g, dtype=buffer.dtype))
        if present not in self._graphs:
            self._graphs[present] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graphs[present]):
                self.optimizer.step()
        self._graphs[present].replay()


def driven(case: golden.Case, dtype: str, device: str, made: type[Driven] = Driven, **options: Any) -> Driven:
    """Ada2MS as a golden case asks for it; `options` are those that choose an implementation, such as `fused`."""

    def make(params: list[torch.nn.Parameter]) -> Ada2MS:
        groups, remaining = [], iter(params)
        for given in case.groups:
            hyper = hyperparameters(given)
            betas = (hyper.pop("b1"), hyper.pop("b2"))
            lr = torch.tensor(given.lr[0], dtype=torch.float64, device=device) if made is Captured else given.lr[0]
            groups.append({"params": [next(remaining) for _ in given.params], "lr": lr, "betas": betas, **hyper})
        return Ada2MS(groups, **choices(case), **options)

    return made(make, initial(case), dtypes=dtypes(case, dtype), device=device)


def replay(made: type[Driven] = Driven, **options: Any) -> Replay:
    """Replays golden cases by Ada2MS with these options: `foreach`, `fused`, `capturable`."""

    def run(case: golden.Case, dtype: str, device: str) -> Iterator[Snapshot | None]:
        run = driven(case, dtype, device, made, **options)
        for i, gradients in enumerate(case.gradients):
            for group, given in zip(run.optimizer.param_groups, case.groups, strict=True):
                set_lr(group, given.lr[i])
            run.step(gradients)
            yield _snapshot(run, case) if i + 1 in recorded(case) else None

    return run


def _snapshot(run: Driven, case: golden.Case) -> Snapshot:
    state, groups = run.optimizer.state, run.optimizer.param_groups
    states = [state.get(p, {}) for p in run.parameters]  # made at a parameter's first update

    def slot(name: str) -> list[Array]:
        return [numpy(x[name]) if name in x else np.zeros(p.shape) for p, x in zip(run.parameters, states, strict=True)]

    def first(name: str, alike: Sequence[dict[str, Any]]) -> float:
        """Of the first of these groups that has a state: one that has none does not hold what it shares with others."""
        found = [of_group(run.optimizer, group) for group in alike]
        return float(next((x[name] for x in found if x), 0))

    def same_b2(group: dict[str, Any]) -> list[dict[str, Any]]:
        return [group, *(g for g in groups if g["betas"][1] == group["betas"][1])]

    return Snapshot(
        run.params,
        slot("exp_avg"),
        slot("exp_avg_sq"),
        step=[int(x.get("step", 0)) for x in states],
        s=[first("global_exp_avg_sq", same_b2(group)) for group in groups]
        if case.scope == "model"
        else [float(x.get("global_exp_avg_sq", 0)) for x in states],
        k=[int(first("global_step", [group, *groups])) for group in groups],
        skipped=int(of_group(run.optimizer, groups[0]).get("skipped", 0)),
        compensation=[numpy(x["compensation"]) if "compensation" in x else None for x in states],
    )


def of_group(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> dict[str, Any]:
    """The state of one of the group's parameters, which has the numbers that all of them share."""
    return next((optimizer.state[p] for p in group["params"] if optimizer.state.get(p)), {})
