"""Traces of a run in several processes: which of them writes, and what all of them have seen."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from ada2ms.core.trace import Step
from ada2ms.core.trace.outputs import joined


def is_first() -> bool:
    return not (
        torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank()
    )


def world_size(group: Any) -> int:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    return torch.distributed.get_world_size(group)


def combine(steps: Sequence[Step], group: Any, world: int) -> None:
    """Losses, batches and outputs of all processes: means, and sums; in another order than one process would have."""
    told: list[Any] = [None] * world
    torch.distributed.all_gather_object(told, [(step.loss, step.batches, step.outputs) for step in steps], group=group)
    for step, parts in zip(steps, zip(*told, strict=True), strict=True):
        step.outputs = joined([outputs for _, _, outputs in parts])
        losses = [loss for loss, _, _ in parts if loss is not None]
        step.loss = sum(losses) / len(losses) if losses else None
        every = [batches for _, batches, _ in parts]
        if all(batches == every[0] for batches in every):
            continue  # each process has the whole batch
        step.batches = [
            [_joined([batches[i][k] for batches in every]) for k in range(len(every[0][i]))]
            for i in range(min(map(len, every)))
        ]


def _joined(parts: Sequence[Sequence[float]]) -> list[float]:
    """The fingerprint of an array that is divided: what does not depend on the order, and NaN."""
    sums = [math.fsum(x) for x in zip(*(part[:4] for part in parts), strict=True)]
    return [*sums, *[math.nan] * (len(parts[0]) - 4)]
