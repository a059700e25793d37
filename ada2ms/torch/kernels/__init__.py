"""The update of parameters and moments, in four implementations of one signature.

    update(params, grads, exp_avgs, exp_avg_sqs, coefficients, options, compensations)

Each takes lists of plain real tensors, whose moments are all on one device and of one dtype, and works in place.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Scalar = float | Tensor  # a Python number where the host knows it, else a 0-d tensor
Compensations = Sequence[Tensor | None]  # None beside a parameter that is wider than 16 bits; empty if all have none


class Options(NamedTuple):
    """What the tensors of a group have in common in this step.

    In a step that is masked, `weight1` and `weight2` are 0, `decay_factor` is 1, and gradients are zeros.

    Attributes:
        beta1, beta2: decay rates of the moments.
        weight1, weight2: of this step's gradient in the moments: 1 - beta1 and 1 - beta2.
        decay_factor: 1 - lr * weight_decay; None without weight decay.
        adaptivity: in this step.
        maximize: whether gradients are to be negated.
        differentiable: whether autograd follows the step.
        inv_scale: what gradients are still to be multiplied by: what clips them and, for a kernel that unscales them by
            itself, the inverse of their scale.
        step_is_live: whether the step counts, if the host does not know: for kernels that need no masked gradients, and
            for compensations.
    """

    beta1: Scalar
    beta2: Scalar
    weight1: Scalar
    weight2: Scalar
    decay_factor: Scalar | None
    adaptivity: Scalar
    maximize: bool = False
    differentiable: bool = False
    inv_scale: Scalar = 1.0
    step_is_live: Tensor | None = None


def of_each(value: Any, n: int) -> list[Any]:
    """A coefficient for each of n tensors, which may be one for all, a list, or a vector on the device."""
    if isinstance(value, Tensor) and value.ndim:
        return list(value.unbind())
    return value if isinstance(value, list) else [value] * n


def at(value: Any, indices: Sequence[int]) -> Any:
    """A coefficient for some of the tensors."""
    if isinstance(value, Tensor) and value.ndim:
        parts = value.unbind()
        return [parts[i] for i in indices]
    return [value[i] for i in indices] if isinstance(value, list) else value


def like(weight: Scalar, tensor: Tensor) -> Scalar:
    """A weight beside the tensor that it is for, in its dtype."""
    return weight.to(tensor.device, tensor.dtype) if isinstance(weight, Tensor) else weight


def weights(options: Options, dtype: torch.dtype) -> tuple[Scalar, Scalar, Scalar | None]:
    """The weights of g and of g*g in moments of this dtype, and what g is still to be multiplied by, if anything.

    A factor that the host knows joins the weights, so that no gradient is written anew.
    """
    factor, weight1, weight2 = options.inv_scale, options.weight1, options.weight2
    if not isinstance(factor, Tensor) and factor == 1:
        return weight1, weight2, None
    if isinstance(factor, Tensor) or isinstance(weight1, Tensor) or isinstance(weight2, Tensor):
        return weight1, weight2, factor
    joined = weight2 * factor * factor
    if joined >= smallest_normal(dtype):  # which `dtype` holds with all its digits
        return weight1 * factor, joined, None
    return weight1, weight2, factor


def group_indices(keys: Sequence[Any]) -> list[list[int]]:
    """The indices of equal keys, together."""
    indices: dict[Any, list[int]] = {}
    for i, key in enumerate(keys):
        indices.setdefault(key, []).append(i)
    return list(indices.values())


def smallest_normal(dtype: torch.dtype) -> float:
    return _SMALLEST[dtype]


_SMALLEST = {dtype: torch.finfo(dtype).tiny for dtype in (torch.float32, torch.float64)}  # finfo itself is slow
