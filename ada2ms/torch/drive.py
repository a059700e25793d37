"""Any optimizer of torch, stepped by given gradients on given parameters; and golden cases replayed by Ada2MS.

For tests, `ada2ms check` and `ada2ms identify`; `Driven` is an `Optimizer` of `ada2ms.conformance`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ada2ms.core import golden
from ada2ms.core.cases import Array, Replay, Snapshot, choices, dtypes, hyperparameters, initial, recorded
from ada2ms.torch.optimizer import Ada2MS


@contextmanager
def settings(dtype: str, device: str = "cpu") -> Iterator[None]:
    """The precision as a user of `dtype` sets it: GPUs may multiply float32 in a shorter format."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


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
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(value)
            else:
                group["lr"] = value


def numpy(x: torch.Tensor) -> Array:
    """In float64, by way of the CPU: there are devices without it."""
    found: Array = x.detach().cpu().double().numpy()
    return found


def driven(case: golden.Case, dtype: str, device: str, **options: Any) -> Driven:
    """Ada2MS as a golden case asks for it; `options` are those that choose an implementation, such as `fused`."""

    def make(params: list[torch.nn.Parameter]) -> Ada2MS:
        groups, remaining = [], iter(params)
        for given in case.groups:
            hyper = hyperparameters(given)
            betas = (hyper.pop("b1"), hyper.pop("b2"))
            groups.append({"params": [next(remaining) for _ in given.params], "betas": betas, **hyper})
        return Ada2MS(groups, **choices(case), **options)

    return Driven(make, initial(case), dtypes=dtypes(case, dtype), device=device)


def replay(**options: Any) -> Replay:
    """Replays golden cases by Ada2MS with these options: `foreach`, `fused`, `capturable`."""

    def run(case: golden.Case, dtype: str, device: str) -> Iterator[Snapshot | None]:
        run = driven(case, dtype, device, **options)
        for i, gradients in enumerate(case.gradients):
            for group, given in zip(run.optimizer.param_groups, case.groups, strict=True):
                group["lr"] = given.lr[i]
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
