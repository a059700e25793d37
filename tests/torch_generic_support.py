"""The inputs that torch's own test tools give for AdamW, and what else the checks over them share."""

import functools
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

Options = dict[str, Any]


@functools.cache
def adamw() -> Any:
    from torch.testing._internal.common_optimizers import optim_db

    (info,) = [info for info in optim_db if info.optim_cls is AdamW]
    return info


def inputs(device: str, *implementations: str) -> Iterator[Options]:
    """Keyword arguments, with every way to compute the step of those named: "foreach", "fused", "differentiable"."""
    found = 0
    for given in adamw().optim_inputs_func(device=device):
        options = {key: value for key, value in given.kwargs.items() if key != "amsgrad"}
        for implementation in (None, *implementations):
            found += 1
            yield {**deepcopy(options), **{name: name == implementation for name in implementations}}
    assert found >= 5


def linear(device: str, dtype: torch.dtype = torch.float32, contiguous: bool = True) -> tuple[list[nn.Parameter], Any]:
    """Weight and bias, and the loss as a function of the optimizer that is to clear their gradients."""
    torch.manual_seed(0)
    kind: Any = {"device": device, "dtype": dtype}
    if contiguous:
        weight, bias = nn.Parameter(torch.randn(10, 5, **kind)), nn.Parameter(torch.randn(10, **kind))
    else:
        weight, bias = (
            nn.Parameter(torch.randn(10, 5, 2, **kind)[..., 0]),
            nn.Parameter(torch.randn(10, 2, **kind)[..., 0]),
        )
    x = torch.randn(5, **kind)

    def loss(optimizer: Optimizer, weight: Tensor = weight, bias: Tensor = bias) -> Tensor:
        optimizer.zero_grad()
        value = (weight.mv(x) + bias).square().sum()
        value.backward()
        return value

    return [weight, bias], loss


def same(left: Any, right: Any) -> None:
    if isinstance(left, Tensor):
        torch.testing.assert_close(left, right, rtol=0, atol=0)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            same(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        for x, y in zip(left, right, strict=True):
            same(x, y)
    else:
        assert left == right
