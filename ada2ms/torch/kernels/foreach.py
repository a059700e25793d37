"""The update of many tensors together, by torch's operations over lists."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ada2ms.core.coefficients import Coefficients, PowerKind, denom_can_be_zero, power_kind
from ada2ms.torch.kernels import (
    Compensations,
    Options,
    Scalar,
    at,
    group_indices,
    like,
    of_each,
    smallest_normal,
    weights,
)
from ada2ms.torch.kernels.compensation import write


def update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    coefficients: Coefficients,
    options: Options,
    compensations: Compensations = (),
) -> None:
    """See `ada2ms.torch.kernels`."""
    if options.differentiable:
        raise AssertionError("_foreach ops don't support autograd")
    together = group_indices([p.dtype for p in params])
    for indices in together:
        some = [x for i in indices for x in compensations[i : i + 1] if x is not None]  # of each, or of none
        if len(together) == 1:
            _update(list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), some, coefficients, options)
        else:
            p, g, m, v = ([x[i] for i in indices] for x in (params, grads, exp_avgs, exp_avg_sqs))
            _update(p, g, m, v, some, Coefficients(*(at(x, indices) for x in coefficients)), options)


def _update(
    p: list[Tensor],
    g: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    compensations: list[Tensor],
    coefficients: Coefficients,
    options: Options,
) -> None:
    """The update of parameters of one dtype."""
    dtype = m[0].dtype
    same = p[0].dtype == dtype
    theta = p if same else [x.to(dtype) for x in p]
    if compensations:
        torch._foreach_add_(theta, _widened(compensations, dtype))
    g = [x if x.dtype == dtype else x.to(dtype) for x in g]
    _update_moments(g, m, v, options)
    del g
    d = None if coefficients.denom_scale is None else _denominators(v, coefficients, options.adaptivity)
    if options.decay_factor is not None:
        torch._foreach_mul_(theta, options.decay_factor)
    _subtract(theta, m, d, coefficients.step_size)
    if compensations:
        _write(p, compensations, theta, options.step_is_live)
    elif not same:  # asking whether theta is p would have the compiler of torch 2.6 compare their entries
        torch._foreach_copy_(p, theta)


def _widened(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Copies in a wider dtype, by one operation."""
    wide = [torch.empty_like(x, dtype=dtype) for x in tensors]
    torch._foreach_copy_(wide, tensors)
    return wide


def _write(p: list[Tensor], compensations: list[Tensor], new: list[Tensor], step_is_live: Tensor | None) -> None:
    """`write` for many tensors, by operations over lists where there are such."""
    if step_is_live is not None or torch.compiler.is_compiling():
        for tensors in zip(p, compensations, new, strict=True):
            write(*tensors, step_is_live)
        return
    torch._foreach_copy_(p, new)
    torch._foreach_sub_(new, _widened(p, new[0].dtype))
    for x in new:
        x.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    torch._foreach_copy_(compensations, new)


def _update_moments(g: list[Tensor], m: list[Tensor], v: list[Tensor], options: Options) -> None:
    # m <- b1*m + (1-b1)*g,   v <- b2*v + (1-b2)*g*g
    weight1, weight2, factor = weights(options, m[0].dtype)
    if factor is not None:
        g = list(torch._foreach_mul(g, like(-factor if options.maximize else factor, g[0])))
    elif options.maximize:
        g = list(torch._foreach_neg(g))
    if isinstance(weight1, Tensor):
        _average(m, g, weight1)
    elif weight1 == options.weight1:
        torch._foreach_lerp_(m, g, weight1)
    else:
        torch._foreach_mul_(m, options.beta1)
        torch._foreach_add_(m, g, alpha=weight1)
    if isinstance(weight2, Tensor):
        _average(v, list(torch._foreach_mul(g, g)), weight2)
    else:
        torch._foreach_mul_(v, options.beta2)
        torch._foreach_addcmul_(v, g, g, weight2)


def _average(averages: list[Tensor], values: list[Tensor], weight: Tensor) -> None:
    """Each average <- (1-weight)*average + weight*value, with a weight that the host does not know."""
    weight = weight.to(averages[0].device)
    torch._foreach_mul_(averages, (1 - weight).to(averages[0].dtype))
    torch._foreach_add_(averages, torch._foreach_mul(values, weight.to(averages[0].dtype)))


def _denominators(v: list[Tensor], coefficients: Coefficients, adaptivity: Scalar) -> list[Tensor]:
    # d = v_hat^(a/2) * s_hat^((1-a)/2) + eps
    d = _denom_powers(v, adaptivity)
    if not all(isinstance(x, float) and x == 1 for x in set(of_each(coefficients.denom_scale, 1))):
        _scale(d, coefficients.denom_scale)
    torch._foreach_add_(d, coefficients.eps)
    smallest = smallest_normal(v[0].dtype)
    if any(denom_can_be_zero(eps, smallest) for eps in of_each(coefficients.eps, 1)):
        d = [torch.where(x == 0, math.inf, x) for x in d]  # where nothing has moved yet, the update is 0 / inf = 0
    return d


def _denom_powers(v: list[Tensor], adaptivity: Scalar) -> list[Tensor]:
    """v**(a/2) of each, in tensors of their own."""
    exponent = adaptivity / 2
    kind = power_kind(exponent)
    if kind in (PowerKind.SQRT, PowerKind.FOURTH_ROOT):
        powers = list(torch._foreach_sqrt(v))
        if kind is PowerKind.FOURTH_ROOT:
            torch._foreach_sqrt_(powers)
        return powers
    if isinstance(exponent, Tensor):
        return list(torch._foreach_pow(v, [exponent.to(v[0].device)] * len(v)))
    return list(torch._foreach_pow(v, exponent))


def _subtract(theta: list[Tensor], m: list[Tensor], d: list[Tensor] | None, step_size: Any) -> None:
    # theta <- theta - lr*m_hat/d
    numbers = step_size if isinstance(step_size, list) else [step_size] * len(theta)
    if d is not None and not any(isinstance(x, Tensor) for x in numbers):
        torch._foreach_addcdiv_(theta, m, d, [-x for x in numbers])
        return
    change = list(torch._foreach_div(m, d)) if d is not None else [x.clone() for x in m]
    _scale(change, step_size)
    torch._foreach_sub_(theta, change)


def _scale(tensors: list[Tensor], factors: Any) -> None:
    """Multiplies each by its factor; by one operation if they share it, as they do when every gradient is there."""
    if isinstance(factors, list) or (isinstance(factors, Tensor) and factors.ndim):
        torch._foreach_mul_(tensors, of_each(factors, len(tensors)))
    else:
        torch._foreach_mul_(tensors, factors)
