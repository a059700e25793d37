"""`max_norm`: the norm of the gradients of the whole model, and what they are multiplied by."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ada2ms.torch.kernels import Scalar
from ada2ms.torch.numbers import known_to_host, number
from ada2ms.torch.shared import choice


def square_sum(group: dict[str, Any], total: Tensor) -> Tensor | None:
    """The sum before clipping as the optimizer keeps it; a compiled program has it as a result only with `max_norm`."""
    if torch.compiler.is_compiling() and choice(group, "max_norm") is None:
        return None
    return total.detach() if group["differentiable"] else total


def clip_factor(max_norm: Any, groups: Sequence[dict[str, Any]], total: Tensor, step_is_live: bool | Tensor) -> Scalar:
    """The factor c = min(1, max_norm/sqrt(G2)).

    Args:
        max_norm: a number, or a tensor of one element.
        groups: the optimizer's.
        total: G2, the sum of g*g over the model; 0 in a step that is masked.
        step_is_live: whether the step counts.

    Returns:
        A Python number if the host may know it and autograd does not follow the step.
    """
    max_norm = number(max_norm)
    differentiable = any(group["differentiable"] for group in groups)
    if step_is_live is True and not differentiable and all(known_to_host(group, total) for group in groups):
        norm = math.sqrt(total.item())
        c: float = max_norm / norm if norm else 1.0
        return 1.0 if c > 1 else c  # NaN stays NaN
    if differentiable:  # the derivative of sqrt is infinite at 0
        total = total.clamp(min=torch.finfo(total.dtype).tiny)
    excess: Tensor = total.sqrt() / max_norm
    return excess.clamp(min=1.0).reciprocal()
