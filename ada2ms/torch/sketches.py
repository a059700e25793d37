"""Sketches of tensors, on their device, sharded or not; `ada2ms.core.trace.sketch` says what they are."""

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ada2ms.core.trace import Parameter, native
from ada2ms.core.trace.sketch import WIDTH, Codes, codes
from ada2ms.torch import sketches_cpu, sketches_plain
from ada2ms.torch.reduce import all_reduced_sum, are_plain, local

Sums = Callable[[Sequence[Tensor | None], Sequence[Codes]], Tensor]


class Sketcher:
    """Sketches of tensors that are like the parameters: (parameters, WIDTH), on the device of the first."""

    def __init__(self, params: Sequence[Tensor], parameters: Sequence[Parameter]) -> None:
        self._params = params
        self._where = [(*_place(p), parameter.axes) for p, parameter in zip(params, parameters, strict=True)]
        self._codes: dict[Any, Codes] = {}
        self._contiguous = [self._codes_of(where, None) for where in self._where]
        self._sums: dict[torch.device, Sums] = {}

    def __call__(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Rows of zeros for what is None."""
        sketches = self.sums(tensors)[0]
        sketches[:, 0].sqrt_()
        return sketches

    @torch.no_grad()
    def sums(self, *lists: Sequence[Tensor | None]) -> Tensor:
        """Of each list the sketches, but of squares in place of norms: (lists, parameters, WIDTH)."""
        params, each, of_each = self._params, [x for tensors in lists for x in tensors], self._contiguous
        if len(lists) > 1:
            params, of_each = [*params] * len(lists), of_each * len(lists)
        present = [x for x in each if x is not None]
        if not are_plain(present) or not all(x.is_contiguous() for x in present):
            each, of_each = self._laid_out(each)
        places = list(dict.fromkeys([x.device for x in each if x is not None]))
        if len(places) == 1:
            total = self._sums_on(places[0])(each, of_each)
        else:
            device = self._params[0].device if self._params else torch.device("cpu")
            total = torch.zeros(len(each), WIDTH, dtype=sketches_plain.sum_dtype(device), device=device)
            for place in places:
                here = [x if x is not None and x.device == place else None for x in each]
                total += self._sums_on(place)(here, of_each).to(total)
        return all_reduced_sum(total, params, each=True).view(len(lists), len(self._params), WIDTH)

    def _laid_out(self, tensors: Sequence[Tensor | None]) -> tuple[list[Tensor | None], list[Codes]]:
        """Contiguous real tensors, of what is here, and their codes."""
        found, of_each, count = list(tensors), [], len(self._params)
        for i, x in enumerate(tensors):
            order = None
            if x is not None:
                found[i], order = _laid_out(local(x, self._params[i % count]))
            of_each.append(self._codes_of(self._where[i % count], order))
        return found, of_each

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

    def _sums_on(self, device: torch.device) -> Sums:
        if device not in self._sums:
            self._sums[device] = self._new_sums_on(device)
        return self._sums[device]

    def _new_sums_on(self, device: torch.device) -> Sums:
        if device.type == "cpu" and native.is_available(sum(math.prod(shape) for shape, *_ in self._where)):
            return sketches_cpu.Sums()
        on_cuda = _on_cuda() if device.type == "cuda" else None
        found: Sums = (sketches_plain if on_cuda is None else on_cuda).Sums(device)
        return found


def _laid_out(x: Tensor) -> tuple[Tensor, tuple[int, ...] | None]:
    """A contiguous tensor of the same entries, with its axes in this order; a view if they lie without gaps."""
    if x.layout is not torch.strided:
        return x.to_dense().contiguous(), None
    if x.is_contiguous():
        return x, None
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
