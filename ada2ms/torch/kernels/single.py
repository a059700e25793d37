"""The update of one tensor after the other."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ada2ms.core.coefficients import Coefficients, PowerKind, denom_can_be_zero, power_kind
from ada2ms.torch.kernels import Compensations, Options, Scalar, like, of_each, smallest_normal, weights
from ada2ms.torch.kernels.compensation import write
from ada2ms.torch.kernels.power import by_roots_and_logarithm, power_by_roots_and_logarithm

_PIECE = 1 << 19  # entries at most
_BLOCK = 64  # entries that torch's loops take at once, at most; what is left of them may be rounded otherwise


def update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    coefficients: Coefficients,
    options: Options,
    compensations: Compensations = (),
) -> None:
    """See `ada2ms.torch.kernels`; the only implementation that autograd can follow."""
    n, decay_factor = len(params), options.decay_factor
    differentiable, exponent = options.differentiable, options.adaptivity / 2
    kind = power_kind(exponent)
    each = zip(*(of_each(x, n) for x in coefficients), strict=True)
    tensors = zip(params, grads, exp_avgs, exp_avg_sqs, compensations or [None] * n, strict=True)
    pieces = ((piece, numbers) for some, numbers in zip(tensors, each, strict=True) for piece in _pieces(some, options))
    for (p, g, m, v, compensation), (step_size, denom_scale, eps) in pieces:
        dtype = m.dtype
        theta = p if p.dtype == dtype else p.to(dtype)
        if compensation is not None:
            theta = theta.add_(compensation)
        g = g if g.dtype == dtype else g.to(dtype)
        _update_moments(g, m, v, options)

        d = None
        if denom_scale is not None:
            # d = v_hat^(a/2) * s_hat^((1-a)/2) + eps
            d = _denom_power(v, exponent, kind, differentiable)
            if differentiable:
                d = d * denom_scale
            elif isinstance(denom_scale, Tensor) or denom_scale != 1:
                d.mul_(denom_scale)
            d = d.add_(eps)
            if denom_can_be_zero(eps, smallest_normal(dtype)):
                d = torch.where(d == 0, math.inf, d)  # where nothing has moved yet, the update is 0 / inf = 0

        # theta <- theta*(1 - lr*wd) - lr*m_hat/d
        if decay_factor is not None:
            theta = theta.mul_(decay_factor)
        if differentiable:
            m = m.clone()  # autograd keeps what the quotient was given, and m changes in the next step
        theta = _subtract(theta, m, d, step_size)
        if compensation is not None:
            write(p, compensation, theta, options.step_is_live)
        elif p.dtype != dtype:
            p.copy_(theta)


_Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]  # the last is the compensation, if there is one


def _pieces(tensors: _Tensors, options: Options) -> Iterable[_Tensors]:
    """The tensors; large ones on a CPU in pieces that stay in the cache from one operation to the next."""
    p, g, m, v, compensation = tensors
    if not p.is_cpu or p.numel() <= _PIECE or options.differentiable or torch.compiler.is_compiling():
        return [tensors]
    if not all(x is None or x.is_contiguous() for x in tensors):
        return [tensors]
    parts = _split(p)
    last = [None] * len(parts) if compensation is None else _split(compensation)
    return zip(parts, _split(g), _split(m), _split(v), last, strict=True)


def _split(tensor: Tensor) -> Sequence[Tensor]:
    """Pieces of about one size, of whole blocks: a small rest would have the power of small tensors, which rounds
    otherwise.
    """
    blocks = -(-tensor.numel() // _BLOCK)
    pieces = -(-tensor.numel() // _PIECE)
    return torch.split(tensor.view(-1), -(-blocks // pieces) * _BLOCK)


def _update_moments(g: Tensor, m: Tensor, v: Tensor, options: Options) -> None:
    # m <- b1*m + (1-b1)*g,   v <- b2*v + (1-b2)*g*g
    weight1, weight2, factor = weights(options, m.dtype)
    if factor is not None:
        g = g * like(factor, g)
    if options.maximize:
        g = -g
    if isinstance(weight1, Tensor) or weight1 == options.weight1:
        m.lerp_(g, like(weight1, m))
    else:
        m.mul_(options.beta1).add_(g, alpha=weight1)
    if isinstance(weight2, Tensor):
        v.lerp_(g.square(), like(weight2, v))
    else:
        v.mul_(options.beta2).addcmul_(g, g, value=weight2)


def _denom_power(v: Tensor, exponent: Scalar, kind: PowerKind, differentiable: bool) -> Tensor:
    """v**(a/2), in a tensor of its own."""
    if kind is PowerKind.SQRT:
        return v.sqrt()
    if kind is PowerKind.FOURTH_ROOT:
        return v.sqrt().sqrt() if differentiable else v.sqrt().sqrt_()
    if not differentiable and by_roots_and_logarithm(v, exponent):
        return power_by_roots_and_logarithm(v, float(exponent))
    # autograd keeps what pow was given, and v changes in the next step
    return (v.clone() if differentiable else v).pow(exponent)


def _subtract(theta: Tensor, m: Tensor, d: Tensor | None, step_size: Scalar) -> Tensor:
    if isinstance(step_size, Tensor):
        return theta.sub_(m * step_size if d is None else m * step_size / d)
    return theta.add_(m, alpha=-step_size) if d is None else theta.addcdiv_(m, d, value=-step_size)
