"""The rule over lists of tensors: one tensor at a time, or by torch's operations over lists.

Scalars (learning rate, adaptivity, s_hat, counts) are Python numbers where the host knows them, and 0-d tensors where
it does not: while compiling, under CUDA graphs, and for whatever must not wait for the device.
"""

import functools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ada2ms.core import spec

Scalar = float | Tensor
_SMALLEST = {dtype: torch.finfo(dtype).tiny for dtype in (torch.float32, torch.float64)}  # finfo itself is slow
T = TypeVar("T")


def correction(beta: Scalar, count: Scalar, dtype: torch.dtype) -> Scalar:
    """1 - beta**count, without the cancellation that costs 1 - beta**count its digits; `dtype` where it is a tensor."""
    if isinstance(count, Tensor):
        count = count.to(dtype).clamp(min=1)  # 0 where the first step is skipped, which updates nothing
    if isinstance(beta, Tensor):
        return -torch.expm1(count * beta.to(dtype).log())
    if isinstance(count, Tensor):
        return -torch.expm1(count * math.log(beta)) if beta else torch.ones_like(count)
    return spec.correction(beta, int(count))


def root(v: Tensor, adaptivity: Scalar, differentiable: bool) -> Tensor:
    """v**(a/2); square roots in place of powers where they say the same."""
    if not isinstance(adaptivity, Tensor):
        if adaptivity == 1:
            return v.sqrt()
        if adaptivity == 0.5:
            return v.sqrt().sqrt() if differentiable else v.sqrt().sqrt_()
    # autograd keeps what pow was given, and v changes in the next step
    return (v.clone() if differentiable else v).pow(adaptivity / 2)


def foreach_root(v: list[Tensor], adaptivity: Scalar) -> list[Tensor]:
    """`root` of each."""
    if not isinstance(adaptivity, Tensor) and adaptivity in (0.5, 1):
        roots = list(torch._foreach_sqrt(v))
        if adaptivity == 0.5:
            torch._foreach_sqrt_(roots)
        return roots
    if isinstance(adaptivity, Tensor):
        return list(torch._foreach_pow(v, [adaptivity.to(v[0].device) / 2] * len(v)))
    return list(torch._foreach_pow(v, adaptivity / 2))


def scale(adaptivity: Scalar, s_hat: Scalar, correction2: Scalar) -> Scalar:
    """s_hat**((1-a)/2) / correction2**(a/2): what turns v**(a/2) into the denominator, up to eps."""
    if not isinstance(adaptivity, Tensor) and adaptivity == 1:
        s_hat = 1.0  # s**0, whatever s is
    return s_hat ** ((1 - adaptivity) / 2) / correction2 ** (adaptivity / 2)


def scalars(t: Scalar, s_hat: Scalar, device: torch.device, dtype: torch.dtype, o: "Options") -> "Scalars":
    """The numbers of a tensor on this device whose state is of this dtype."""
    step_size = o.lr / correction(o.beta1, t, dtype)
    if isinstance(s_hat, Tensor):
        s_hat = s_hat.to(device)
    if not isinstance(o.adaptivity, Tensor) and o.adaptivity == 0:
        return Scalars(step_size / _without_zeros(s_hat**0.5 + o.eps, o.eps, dtype), None, 0.0)
    factor = scale(o.adaptivity, s_hat, correction(o.beta2, t, dtype))
    if o.differentiable or isinstance(factor, Tensor) or not 0 < factor < math.inf:
        return Scalars(step_size, factor, o.eps)
    return Scalars(step_size / factor, 1.0, o.eps / factor)  # both sides of the quotient by factor: one pass less


def scalars_of_each(
    steps: Sequence[Scalar], s_hats: Sequence[Scalar], exp_avg_sqs: Sequence[Tensor], o: "Options"
) -> "list[Scalars]":
    """`scalars` of each tensor, by a few operations: together for those whose counts are equal, or are tensors."""
    devices, dtypes = [v.device for v in exp_avg_sqs], [v.dtype for v in exp_avg_sqs]
    one = partial(scalars, o=o)
    if torch.compiler.is_compiling():  # which fuses what is done to each
        return list(map(one, steps, s_hats, devices, dtypes))
    if not (_to_stack(steps) or _to_stack(s_hats)):
        return list(map(functools.cache(one), steps, s_hats, devices, dtypes))

    def alike(i: int) -> Any:
        there = [isinstance(x, Tensor) and x.device == devices[i] for x in (steps[i], s_hats[i])]
        return devices[i], dtypes[i], None if there[0] else steps[i], None if there[1] else s_hats[i]

    found: dict[int, Scalars] = {}
    for indices in together(range(len(steps)), alike):
        t, s_hat = (stacked([x[i] for i in indices]) for x in (steps, s_hats))
        step_size, factor, eps = one(t, s_hat, devices[indices[0]], dtypes[indices[0]])
        split = [x.unbind() if isinstance(x, Tensor) and x.ndim else [x] * len(indices) for x in (step_size, factor)]
        found.update((i, Scalars(x, y, eps)) for i, x, y in zip(indices, *split, strict=True))
    return [found[i] for i in range(len(steps))]


def stacked(numbers: Sequence[Scalar]) -> Scalar:
    """The number that all of these are; or, of tensors that differ, a vector."""
    return torch.stack([torch.as_tensor(x) for x in numbers]) if _to_stack(numbers) else numbers[0]


def _to_stack(numbers: Sequence[Scalar]) -> bool:
    first = numbers[0]
    return isinstance(first, Tensor) and any(x is not first for x in numbers)


def _without_zeros(d: Any, eps: float, dtype: torch.dtype) -> Any:
    """`d` with infinity for 0, which too small an eps leaves where nothing has moved yet: no update there."""
    smallest = _SMALLEST[dtype]
    if eps >= smallest:
        return d
    return torch.where(d == 0, math.inf, d) if isinstance(d, Tensor) else d if d >= smallest else math.inf


class Scalars(NamedTuple):
    """theta <- ... - step_size * m / (factor * v**(a/2) + eps); or ... - step_size * m, where factor is None."""

    step_size: Scalar
    factor: Scalar | None
    eps: float


class Options(NamedTuple):
    """The hyperparameters of a group in this step."""

    lr: Scalar
    beta1: Scalar
    beta2: Scalar
    eps: float
    weight_decay: Scalar
    adaptivity: Scalar
    maximize: bool
    differentiable: bool
    live: Tensor | None  # false skips the step by weights of 0 (lr is 0 already); None: the host knows that it counts
    grad_scale: Tensor | None = None  # what the gradients are still to be divided by, where the kernel does it


def _single_tensor_ada2ms(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Scalar],
    s_hats: Sequence[Scalar],
    o: Options,
) -> None:
    numbers = scalars_of_each(steps, s_hats, exp_avg_sqs, o)
    for p, g, m, v, (step_size, factor, eps) in zip(params, grads, exp_avgs, exp_avg_sqs, numbers, strict=True):
        theta = p if p.dtype == m.dtype else p.to(m.dtype)
        g = g if g.dtype == m.dtype else g.to(m.dtype)
        if o.maximize:
            g = -g
        weight1, weight2 = 1 - o.beta1, 1 - o.beta2
        if o.live is not None:  # a step that is skipped: no gradient, no weight, no learning rate
            live = o.live.to(g.device)
            g = torch.where(live, g, 0.0)
            weight1, weight2 = weight1 * live.to(m.dtype), weight2 * live.to(m.dtype)

        # m <- b1*m + (1-b1)*g,   v <- b2*v + (1-b2)*g*g
        m.lerp_(g, _as(weight1, m))
        if isinstance(weight2, Tensor):
            v.lerp_(g.square(), _as(weight2, v))
        else:
            v.mul_(o.beta2).addcmul_(g, g, value=weight2)

        # d = v_hat^(a/2) * s_hat^((1-a)/2) + eps
        d = None
        if factor is not None:
            d = root(v, o.adaptivity, o.differentiable)
            if o.differentiable:
                d = d * factor
            elif isinstance(factor, Tensor) or factor != 1:
                d.mul_(factor)
            d = _without_zeros(d.add_(eps), eps, v.dtype)

        # theta <- theta*(1 - lr*wd) - lr*m_hat/d
        if not isinstance(o.weight_decay, (int, float)) or o.weight_decay != 0:
            theta = theta.mul_(1 - o.lr * o.weight_decay)
        if o.differentiable:
            m = m.clone()
        if d is None:
            theta = theta.sub_(m * step_size) if isinstance(step_size, Tensor) else theta.add_(m, alpha=-step_size)
        elif isinstance(step_size, Tensor):
            theta = theta.sub_(m * step_size / d)
        else:
            theta = theta.addcdiv_(m, d, value=-step_size)
        if p.dtype != m.dtype:
            p.copy_(theta)


def _multi_tensor_ada2ms(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Scalar],
    s_hats: Sequence[Scalar],
    o: Options,
) -> None:
    if o.differentiable:
        raise AssertionError("_foreach ops don't support autograd")
    for indices in together(params, lambda x: (x.device, x.dtype)):
        p, g, m, v = ([x[i] for i in indices] for x in (params, grads, exp_avgs, exp_avg_sqs))
        _update_together(p, g, m, v, [steps[i] for i in indices], [s_hats[i] for i in indices], o)


def _update_together(
    p: list[Tensor],
    g: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    t: list[Scalar],
    s_hat: list[Scalar],
    o: Options,
) -> None:
    """The rule over tensors of one device and dtype."""
    theta = [x.to(y.dtype) for x, y in zip(p, m, strict=True)]
    g = [x.to(y.dtype) for x, y in zip(g, m, strict=True)]
    device, dtype = v[0].device, v[0].dtype
    if o.maximize:
        g = list(torch._foreach_neg(g))
    weight1, weight2 = 1 - o.beta1, 1 - o.beta2
    if o.live is not None:  # a step that is skipped: no gradient, no weight, no learning rate
        live = o.live.to(device)
        zero = g[0].new_zeros(())
        g = [torch.where(live, x, zero) for x in g]
        weight1, weight2 = weight1 * live.to(dtype), weight2 * live.to(dtype)

    # m <- b1*m + (1-b1)*g,   v <- b2*v + (1-b2)*g*g
    if isinstance(weight1, Tensor):
        _decay_(m, list(g), weight1.to(device))
    else:
        torch._foreach_lerp_(m, g, weight1)
    if isinstance(weight2, Tensor):
        _decay_(v, list(torch._foreach_mul(g, g)), weight2.to(device))
    else:
        torch._foreach_mul_(v, o.beta2)
        torch._foreach_addcmul_(v, g, g, weight2)
    del g

    # d = v_hat^(a/2) * s_hat^((1-a)/2) + eps
    each = scalars_of_each(t, s_hat, v, o)
    step_sizes, factors, eps = [x.step_size for x in each], [x.factor for x in each], [x.eps for x in each]
    d = None
    if factors[0] is not None:
        d = foreach_root(v, o.adaptivity)
        if any(isinstance(x, Tensor) or x != 1 for x in factors):
            _scale_(d, factors)  # type: ignore[arg-type]  # all are None, or none
        torch._foreach_add_(d, eps)
        d = [_without_zeros(x, y, dtype) for x, y in zip(d, eps, strict=True)]

    # theta <- theta*(1 - lr*wd) - lr*m_hat/d
    if not isinstance(o.weight_decay, (int, float)) or o.weight_decay != 0:
        torch._foreach_mul_(theta, 1 - o.lr * o.weight_decay)
    numbers = [-x for x in step_sizes if not isinstance(x, Tensor)]
    if d is not None and len(numbers) == len(d):
        torch._foreach_addcdiv_(theta, m, d, numbers)
    else:
        update = list(torch._foreach_div(m, d)) if d is not None else [x.clone() for x in m]
        _scale_(update, step_sizes)
        torch._foreach_sub_(theta, update)
    if p[0].dtype != dtype:
        torch._foreach_copy_(p, theta)


def together(items: Sequence[T], key: Callable[[T], Any]) -> list[list[int]]:
    """Indices of the items that one operation may take together, for what is equal among them."""
    indices: dict[Any, list[int]] = {}
    for i, item in enumerate(items):
        indices.setdefault(key(item), []).append(i)
    return list(indices.values())


def _decay_(averages: list[Tensor], values: list[Tensor], weight: Tensor) -> None:
    """Each average <- (1-weight)*averages + weight*value of each, with a weight that the host does not know."""
    torch._foreach_mul_(averages, (1 - weight).to(averages[0].dtype))
    torch._foreach_add_(averages, torch._foreach_mul(values, weight.to(averages[0].dtype)))


def _scale_(tensors: list[Tensor], factors: Sequence[Scalar]) -> None:
    """Multiplies each by its factor; by one operation if they share it, as they do when every gradient is there."""
    if all(f is factors[0] for f in factors):
        torch._foreach_mul_(tensors, factors[0])
    else:
        torch._foreach_mul_(tensors, list(factors))  # type: ignore[arg-type]


def _as(weight: Scalar, like: Tensor) -> Scalar:
    return weight.to(like.device, like.dtype) if isinstance(weight, Tensor) else weight
