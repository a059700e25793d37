"""The update over lists of tensors, for Keras' torch backend.

Keras has such functions for its own optimizers, which it finds by their class. Updating one variable after the other
by `keras.ops` takes four times as long for a hundred small variables.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ada2ms.core.coefficients import PowerKind, power_kind
from ada2ms.tf.kernels import Coefficients, Options


@torch.no_grad()
def update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    coefficients: Coefficients,
    options: Options,
) -> None:
    """Updates parameters and moments in place. No tensor may be in a list twice."""
    _, one_minus_b1, b2, one_minus_b2 = coefficients.betas
    exp_avgs, exp_avg_sqs = list(exp_avgs), list(exp_avg_sqs)
    # Wider than their state are the parameters of a model after `double()`, which Keras knows nothing of.
    wide = [x.to(torch.promote_types(x.dtype, m.dtype)) for x, m in zip(params, exp_avgs, strict=True)]
    compensated = [(i, x.value) for i, x in enumerate(options.compensations) if x is not None]
    for i, compensation in compensated:
        wide[i] = wide[i] + compensation
    grads = [g.to(m.dtype) for g, m in zip(grads, exp_avgs, strict=True)]
    if coefficients.clip is not None:
        grads = list(torch._foreach_mul(grads, coefficients.clip))
    torch._foreach_lerp_(exp_avgs, grads, one_minus_b1)
    torch._foreach_mul_(exp_avg_sqs, b2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, one_minus_b2)

    powers = _denom_power(exp_avg_sqs, coefficients.exponent)
    # d = v_hat^(a/2) * s_hat^((1-a)/2) + eps
    d = [1 + x for x in coefficients.eps] if powers is None else list(torch._foreach_add(powers, coefficients.eps))
    if options.denom_can_be_zero:
        d = [x.masked_fill(x == 0, torch.inf) for x in d]
    d = list(torch._foreach_div(d, coefficients.step_sizes))
    if any(options.decays):
        decaying = [x for x, decays in zip(wide, options.decays, strict=True) if decays]
        torch._foreach_mul_(decaying, coefficients.decay_factor)
    torch._foreach_addcdiv_(wide, exp_avgs, d, -1.0)
    for param, new in zip(params, wide, strict=True):
        if param is not new:
            param.copy_(new)
    for i, compensation in compensated:  # 0 where a parameter is not finite
        compensation.copy_((wide[i] - params[i]).nan_to_num_(0.0, 0.0, 0.0))


def _denom_power(exp_avg_sqs: list[Tensor], exponent: float | Tensor) -> list[Tensor] | None:
    """v^exponent for exponents in [0, 0.5], where 0^0 = 1; None for ones."""
    kind = power_kind(exponent)
    if kind is PowerKind.ONE:
        return None
    if kind is PowerKind.POWER:
        logarithms = list(torch._foreach_log(exp_avg_sqs))
        if not isinstance(exponent, float):
            torch._foreach_clamp_min_(logarithms, -1e30)  # finite, since exponent 0 times -inf is NaN, and 0^0 is 1
        torch._foreach_mul_(logarithms, exponent)
        torch._foreach_exp_(logarithms)
        return logarithms
    roots = list(torch._foreach_sqrt(exp_avg_sqs))
    if kind is PowerKind.FOURTH_ROOT:
        torch._foreach_sqrt_(roots)
    return roots
