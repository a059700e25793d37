"""Which kernel updates the tensors of a group."""

import functools
import importlib
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import _default_to_fused_or_foreach

from ada2ms.torch.kernels import foreach, fused_cpu, single


class Kernel(NamedTuple):
    """A kernel, and what it does besides.

    Attributes:
        update: see `ada2ms.torch.kernels`.
        squares: sum(g*g) of each gradient, in a dtype; None if `ada2ms.torch.reduce.squares` is for that.
        counts: the values of 0-d tensors on the CPU, all at once.
        scales: whether it scales gradients, and masks them, by itself.
        folds: whether both sides of the quotient m/d may be divided by what is common to d.
        on_device: whether it reads its coefficients from the device, in float64.
    """

    update: Callable[..., None]
    squares: Callable[[list[Tensor], torch.dtype], Tensor] | None = None
    counts: Callable[[list[Tensor]], list[float]] | None = None
    scales: bool = False
    folds: bool = True
    on_device: bool = False


_SINGLE, _FOREACH = Kernel(single.update), Kernel(foreach.update)
_FUSED_CPU = Kernel(fused_cpu.update, fused_cpu.squares, fused_cpu.counts, scales=True)


def choose(params: Sequence[Tensor], grads: Sequence[Tensor], group: dict[str, Any]) -> Kernel:
    """The kernel for these plain tensors, by the group's options; as torch.optim.AdamW chooses."""
    if group["fused"] and not torch.compiler.is_compiling():  # whose compiler fuses the default implementation
        if fused_cpu.supports(grads):
            return _FUSED_CPU
        if set(map(type, grads)) == {Tensor} and all(x.is_cuda for x in grads) and (cuda := fused_cuda()) is not None:
            return Kernel(cuda.update, scales=True, folds=False, on_device=True)
    use_foreach = group["foreach"]
    if use_foreach is None:
        use_foreach = _default_to_fused_or_foreach(list(params), group["differentiable"], use_fused=False)[1]
    if use_foreach:
        return _FOREACH
    return _SINGLE._replace(folds=False) if group["differentiable"] else _SINGLE


def is_single(kernel: Kernel) -> bool:
    return kernel.update is single.update


@functools.cache
def fused_cuda() -> ModuleType | None:
    """The kernel in Triton, which comes with torch for CUDA; None, after a warning, where it does not."""
    try:
        return importlib.import_module("ada2ms.torch.kernels.fused_cuda")
    except ImportError as error:
        warnings.warn(
            f"Ada2MS(fused=True) needs Triton on CUDA ({error}): pip install triton; the default implementation takes "
            "its place.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
