"""The rule in NumPy on golden cases: that of `ada2ms.core.spec`, or another module's with the same interface."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from ada2ms import core
from ada2ms.core import golden
from ada2ms.core.cases import Array, Snapshot, any_infinite, choices, hyperparameters, recorded
from ada2ms.core.spec import BFLOAT16, rounded, widen


def optimizer_of(module: Any, case: golden.Case, dtype: str) -> Any:
    """The `Ada2MS` of `module` over a case's parameters in `dtype`, with the case's hyperparameters but for lr."""

    def made(p: Array, kind: str | None) -> Array:
        return p.astype(kind or dtype) if kind != "bfloat16" else rounded(p, BFLOAT16)

    groups = [
        {"params": [made(p, kind) for p, kind in zip(g.params, g.dtypes, strict=True)], **hyperparameters(g)}
        for g in case.groups
    ]
    return module.Ada2MS(groups, **choices(case))


def replay(case: golden.Case, dtype: str, device: str = "cpu") -> Iterator[Snapshot | None]:
    """Replays a case by the rule in NumPy."""
    optimizer = optimizer_of(core, case, dtype)

    def slot(name: str) -> list[Array]:
        return [widen(x).astype(np.float64) for g in optimizer.groups for x in getattr(g, name)]

    def snapshot() -> Snapshot:
        return Snapshot(
            slot("params"),
            slot("exp_avg"),
            slot("exp_avg_sq"),
            step=[t for g in optimizer.groups for t in g.step],
            s=[s for g in optimizer.groups for s in g.global_exp_avg_sq],
            k=[g.global_step for g in optimizer.groups],
            skipped=optimizer.skipped,
            compensation=[None if x is None else widen(x) for g in optimizer.groups for x in g.compensation],
        )

    for i, gradients in enumerate(case.gradients):
        for group, given in zip(optimizer.groups, case.groups, strict=True):
            group.hyper = core.Hyperparameters(lr=given.lr[i], **hyperparameters(given))
        with np.errstate(invalid="ignore" if any_infinite(gradients) else "raise"):
            optimizer.step([None if g is None else g.astype(dtype) for g in gradients])
        yield snapshot() if i + 1 in recorded(case) else None
