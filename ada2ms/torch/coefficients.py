"""What a step computes once for each tensor, by `ada2ms.core.coefficients`, for all tensors of a group together.

A coefficient is one for all of them, or a list of Python numbers where the host knows the counts, or a vector on the
device where it does not: while compiling, under CUDA graphs, and for whatever must not wait for the device.
"""

import math
import operator  # torch.compile knows its pow, and not the builtin one
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ada2ms.core import coefficients as rule
from ada2ms.core.coefficients import Coefficients
from ada2ms.torch.kernels import Scalar, group_indices, of_each, smallest_normal
from ada2ms.torch.numbers import as_tensor


def bias_correction(beta: Scalar, count: Any, dtype: torch.dtype) -> Any:
    """1 - beta**count; of this dtype if one of them is a tensor."""
    if isinstance(count, Tensor):
        count = count.to(dtype).clamp(min=1)  # 0 where the first step is masked, which updates nothing
    if isinstance(beta, Tensor):
        beta = beta.to(dtype)
        return rule.bias_correction(beta, count, torch.expm1, torch.log)
    return rule.bias_correction(beta, count, torch.expm1 if isinstance(count, Tensor) else math.expm1)


def coefficients(
    lr: Scalar,
    betas: tuple[Scalar, Scalar],
    eps: float,
    adaptivity: Scalar,
    counts: Sequence[Scalar],
    s_hats: Sequence[Scalar],
    device: torch.device,
    dtype: torch.dtype,
    *,
    fold: bool,
    gather: bool = False,
) -> Coefficients:
    """The coefficients of tensors whose moments have one device and one dtype.

    Args:
        lr: as the others, of this step.
        betas: decay rates.
        eps: is added to d.
        adaptivity: in [0, 1].
        counts: t of each tensor.
        s_hats: one, or one for each tensor.
        device: of the moments.
        dtype: of numbers that are computed on a device; and of d.
        gather: whether numbers that are elsewhere go to the device, too, for a kernel that reads all of them there.
        fold: whether both sides of the quotient may be divided by the common factor, which saves a pass over d.

    Returns:
        Coefficients: `denom_scale` is None at the adaptivity 0, where `step_size` is divided by d.
    """

    def one(t: Any, s_hat: Any) -> Coefficients:
        return _coefficients(lr, betas, eps, adaptivity, t, s_hat, device, dtype, fold)

    some = list(s_hats) * len(counts) if len(s_hats) == 1 else list(s_hats)
    if torch.compiler.is_compiling():  # whose compiler fuses what is done to each
        return _columns([one(t, s_hat) for t, s_hat in zip(counts, some, strict=True)])
    if not (_differ(counts) or _differ(some)):
        known = {pair: one(*pair) for pair in set(zip(counts, some, strict=True))}
        if len(known) == 1:
            return next(iter(known.values()))
        return _columns([known[pair] for pair in zip(counts, some, strict=True)])
    if gather:
        return one(_vector(counts, device), _vector(some, device))
    # What is on the device together; but apart for each number that is not, which need not be copied to it.
    together = group_indices(
        [(_elsewhere(t, device), _elsewhere(s_hat, device)) for t, s_hat in zip(counts, some, strict=True)]
    )
    each: list[Any] = [None] * len(counts)
    for indices in together:
        found = one(*(_vector([x[i] for i in indices], device) for x in (counts, some)))
        if len(together) == 1:
            return found
        columns = [of_each(x, len(indices)) for x in found]
        for i, *numbers in zip(indices, *columns, strict=True):
            each[i] = Coefficients(*numbers)
    return _columns(each)


def _coefficients(
    lr: Scalar,
    betas: tuple[Scalar, Scalar],
    eps: float,
    adaptivity: Scalar,
    t: Any,
    s_hat: Any,
    device: torch.device,
    dtype: torch.dtype,
    fold: bool,
) -> Coefficients:
    if isinstance(s_hat, Tensor):
        s_hat = s_hat.to(device, dtype if s_hat.itemsize < dtype.itemsize else s_hat.dtype)
    step_size = lr / bias_correction(betas[0], t, dtype)
    if not isinstance(adaptivity, Tensor) and adaptivity == 0:
        # d = s_hat^(1/2) + eps
        d = rule.denom_scale(adaptivity, s_hat, None, operator.pow) + eps
        if rule.denom_can_be_zero(eps, smallest_normal(dtype)):
            zero = d == 0 if isinstance(d, Tensor) else d < smallest_normal(dtype)
            d = torch.where(zero, math.inf, d) if isinstance(d, Tensor) else math.inf if zero else d
        return Coefficients(step_size / d, None, 0.0)
    scale = rule.denom_scale(adaptivity, s_hat, bias_correction(betas[1], t, dtype), operator.pow)
    if fold and not isinstance(scale, Tensor) and 0 < scale < math.inf:
        return Coefficients(step_size / scale, 1.0, eps / scale)
    return Coefficients(step_size, scale, eps)


def _columns(each: Sequence[Coefficients]) -> Coefficients:
    """Lists of coefficients from those of each tensor; all or none have a `denom_scale`."""
    step_sizes, scales, eps = (list(column) for column in zip(*each, strict=True))
    return Coefficients(step_sizes, None if scales[0] is None else scales, eps)


def _differ(numbers: Sequence[Scalar]) -> bool:
    """Whether they are tensors, of different values as far as the host knows."""
    return isinstance(numbers[0], Tensor) and any(x is not numbers[0] for x in numbers)


def _elsewhere(number: Scalar, device: torch.device) -> Scalar | None:
    """The number, unless it is a tensor on this device."""
    return None if isinstance(number, Tensor) and number.device == device else number


def _vector(numbers: Sequence[Scalar], device: torch.device) -> Any:
    """The number that all of these are; or a vector of tensors."""
    if not _differ(numbers):
        return numbers[0]
    return torch.stack([as_tensor(x).to(device) for x in numbers])
