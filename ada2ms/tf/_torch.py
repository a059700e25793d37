"""The rule over lists of tensors, for Keras' torch backend.

Keras has such functions for its own optimizers, which it finds by their class. Without one, an optimizer is called once
for each variable, through `keras.ops`, which takes four times as long for a hundred small variables.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def squares(gradients: list[Tensor], dtype: str) -> Tensor:
    """sum(g*g) of each."""
    return torch.stack([torch.square(g).sum(dtype=getattr(torch, dtype)) for g in gradients])


@torch.no_grad()
def update(
    variables: list[Tensor],
    gradients: list[Tensor],
    momentums: list[Tensor],
    velocities: list[Tensor],
    sizes: list[Tensor],
    epsilons: list[Tensor],
    decayed: Sequence[bool],
    decay: Tensor,
    *,
    beta_1: float,
    beta_2: float,
    guarded: bool,
    adaptivity: float | Tensor,
) -> None:
    """Updates variables and moments in place; `sizes`, `epsilons`, `decay` and `adaptivity` are those of a `Step`."""
    # The same, unless they are of 16 bits; wider than their state are those of a model after `double()`.
    wide = [x.to(torch.promote_types(x.dtype, m.dtype)) for x, m in zip(variables, momentums, strict=True)]
    gradients = [g.to(m.dtype) for g, m in zip(gradients, momentums, strict=True)]
    torch._foreach_lerp_(momentums, gradients, 1 - beta_1)
    torch._foreach_mul_(velocities, beta_2)
    torch._foreach_addcmul_(velocities, gradients, gradients, 1 - beta_2)

    d = _power(velocities, adaptivity / 2)
    d = [1 + x for x in epsilons] if d is None else list(torch._foreach_add(d, epsilons))
    if guarded:  # where nothing has moved yet, the update is 0
        d = [x.masked_fill(x == 0, torch.inf) for x in d]
    d = list(torch._foreach_div(d, sizes))
    if any(decayed):
        torch._foreach_mul_([x for x, yes in zip(wide, decayed, strict=True) if yes], decay)
    torch._foreach_addcdiv_(wide, momentums, d, -1.0)
    for x, y in zip(variables, wide, strict=True):
        if x is not y:
            x.copy_(y)


def _power(velocities: list[Tensor], exponent: float | Tensor) -> list[Tensor] | None:
    """velocity**exponent for exponents in [0, 0.5]; None for ones."""
    if not isinstance(exponent, float):
        logarithms = list(torch._foreach_log(velocities))
        torch._foreach_clamp_min_(logarithms, -1e30)  # finite: 0**0 = 1
    elif exponent == 0.0:
        return None
    elif exponent in (0.25, 0.5):
        roots = list(torch._foreach_sqrt(velocities))
        if exponent == 0.25:
            torch._foreach_sqrt_(roots)
        return roots
    else:
        logarithms = list(torch._foreach_log(velocities))
    torch._foreach_mul_(logarithms, exponent)
    torch._foreach_exp_(logarithms)
    return logarithms
