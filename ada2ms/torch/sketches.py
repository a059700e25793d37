"""Sketches of tensors, on their device, sharded or not; `ada2ms.core.trace.sketch` says what they are."""

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ada2ms.core.trace import Parameter
from ada2ms.core.trace.sketch import WIDTH, Codes, codes
from ada2ms.torch import sketches_plain
from ada2ms.torch.reduce import all_reduced_sum, local

Sums = Callable[[Sequence[Tensor | None], Sequence[Codes]], Tensor]


class Sketcher:
    """Sketches of tensors that are like the parameters: (parameters, WIDTH), on the device of the first."""

    def __init__(self, params: Sequence[Tensor], parameters: Sequence[Parameter]) -> None:
        self._params = params
        self._where = [(*_place(p), parameter.axes) for p, parameter in zip(params, parameters, strict=True)]
        self._codes: dict[Any, Codes] = {}
        self._contiguous = [self._codes_of(where, None) for where in self._where]
        self._sums: dict[tuple[torch.device, bool], Sums] = {}

    @torch.no_grad()
    def __call__(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Rows of zeros for what is None."""
        own = [None if x is None else local(x, p).detach() for x, p in zip(tensors, self._params, strict=True)]
        each, of_each = list(own), list(self._contiguous)
        for i, x in enumerate(own):
            if x is not None and (x.layout is not torch.strided or not x.is_contiguous()):
                each[i], order = _laid_out(x)
                of_each[i] = self._codes_of(self._where[i], order)
        device = self._params[0].device if self._params else torch.device("cpu")
        devices = dict.fromkeys(x.device for x in each if x is not None)
        parts = [
            self._sums_on(place, each)([x if x is not None and x.device == place else None for x in each], of_each)
            for place in devices
        ]
        if not parts:
            return torch.zeros(len(each), WIDTH, dtype=sketches_plain.sum_dtype(device), device=device)
        total = sum((part.to(device) for part in parts[1:]), parts[0].to(device))
        whole = all_reduced_sum(total, self._params, each=True)
        whole[:, 0].sqrt_()
        return whole

    def _codes_of(self, where: tuple[Any, ...], order: tuple[int, ...] | None) -> Codes:
        """Of what lies at this place of a parameter, with its axes in this order."""
        shape, offset, axes = where
        key = *where, order
        if key not in self._codes:
            axes = tuple(range(len(shape))) if axes is None else (*axes, *range(len(axes), len(shape)))
            offset = (0,) * len(shape) if offset is None else (*offset, *[0] * (len(shape) - len(offset)))
            turned = [[x[k] for k in order or range(len(shape))] for x in (shape, axes, offset)]
            self._codes[key] = codes(turned[0], turned[1], offset=turned[2])
        return self._codes[key]

    def _sums_on(self, device: torch.device, tensors: Sequence[Tensor | None]) -> Sums:
        plain = all(type(x) is Tensor for x in tensors if x is not None)
        if (device, plain) not in self._sums:
            on_cuda = _on_cuda() if plain and device.type == "cuda" else None
            self._sums[device, plain] = (sketches_plain if on_cuda is None else on_cuda).Sums(device)
        return self._sums[device, plain]


def _laid_out(x: Tensor) -> tuple[Tensor, tuple[int, ...] | None]:
    """A contiguous tensor of the same entries, with its axes in this order; a view if they lie without gaps."""
    if x.layout is not torch.strided:
        return x.to_dense().contiguous(), None
    order = tuple(int(k) for k in np.argsort([-n for n in x.stride()], kind="stable"))
    y = x.permute(order)
    return (y, order) if y.is_contiguous() else (x.contiguous(), None)


@functools.cache
def _on_cuda() -> Any:
    """The kernels in Triton, which comes with torch for CUDA; None where it does not."""
    try:
        return importlib.import_module("ada2ms.torch.sketches_cuda")
    except ImportError:
        return None


def _place(p: Any) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """The shape of what is here of a parameter, complex numbers as pairs, and where it begins; None if it is whole."""
    if not hasattr(p, "device_mesh"):
        shape, offset = tuple(p.shape), None
    else:
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        found = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
        shape, offset = tuple(found[0]), tuple(found[1])
    return ((*shape, 2) if p.is_complex() else shape), offset
