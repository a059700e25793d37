"""Sketches of tensors, on their device, sharded or not; `ada2ms.core.trace.sketch` says what they are."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ada2ms.core.trace import Parameter
from ada2ms.core.trace.sketch import SUMS, signs
from ada2ms.torch.numbers import compute_dtype
from ada2ms.torch.reduce import all_reduced_sum, local, squares

_BLOCK = 8192  # rows that are summed at once


class Sketcher:
    """Sketches of tensors that are like the parameters: (parameters, 1 + SUMS), on the device of the first."""

    def __init__(self, params: Sequence[Tensor], parameters: Sequence[Parameter]) -> None:
        self._params = params
        self._signs = []
        kept: dict[Any, tuple[Tensor, Tensor]] = {}  # tensors of one shape share them
        for p, parameter in zip(params, parameters, strict=True):
            shape, offset = _place(p)
            key = shape, offset, parameter.axes, p.device, p.dtype
            if key not in kept:
                found = signs(shape, parameter.axes, offset=offset, is_complex=p.is_complex())
                dtype = torch.empty(0, dtype=compute_dtype(p.dtype)).real.dtype
                rows, columns = (torch.from_numpy(x).to(p.device) for x in found)
                kept[key] = rows.to(dtype), columns.to(_sum_dtype(p.device))
            self._signs.append(kept[key])

    def __call__(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Rows of zeros for what is None."""
        device = self._params[0].device if self._params else torch.device("cpu")
        dtype = _sum_dtype(device)
        own = [None if x is None else local(x, p).detach() for x, p in zip(tensors, self._params, strict=True)]
        present = [x for x in own if x is not None]
        norms = iter(squares(present, dtype).to(device)[:, None].unbind())
        zero = torch.zeros(1, dtype=dtype, device=device)
        groups: dict[int, list[int]] = {}  # tensors of one shape, whose small sums are taken together
        for i, (x, pair) in enumerate(zip(own, self._signs, strict=True)):
            if x is not None:
                groups.setdefault(id(pair), []).append(i)
        sums: dict[int, Tensor] = {}
        with _full_precision(device):
            for members in groups.values():
                rows, columns = self._signs[members[0]]
                partial = torch.stack([_partial(x, rows, columns) for i in members if (x := own[i]) is not None])
                whole_sums = (partial.to(columns.dtype) * columns).sum(2).to(device, dtype)
                sums.update(zip(members, whole_sums.unbind(), strict=True))
        none = zero.expand(SUMS)
        found = [
            torch.cat([zero, none]) if i not in sums else torch.cat([next(norms), sums[i]]) for i in range(len(own))
        ]
        whole = all_reduced_sum(torch.stack(found), self._params, each=True) if found else zero.expand(0, 1 + SUMS)
        return torch.cat([whole[:, :1].sqrt(), whole[:, 1:]], 1)


def _partial(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The signed sums along the leading axes, (SUMS, columns); of long ones in blocks, whose sums are wider."""
    matrix = x.reshape(rows.shape[1], columns.shape[1]).to(rows.dtype)
    if len(matrix) <= _BLOCK:
        return rows @ matrix
    total = torch.zeros(columns.shape, dtype=columns.dtype, device=columns.device)
    for begin in range(0, len(matrix), _BLOCK):
        total += rows[:, begin : begin + _BLOCK] @ matrix[begin : begin + _BLOCK]
    return total


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Products in float32 as they are written, whatever the user allows for the model: no TF32, no autocast."""
    before = torch.get_float32_matmul_precision()
    if before != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if before != "highest":
            torch.set_float32_matmul_precision(before)


def _sum_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _place(p: Any) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """The shape of what is here of a parameter, and where in the whole it begins; None if it is the whole."""
    if not hasattr(p, "device_mesh"):
        return tuple(p.shape), None
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    return tuple(shape), tuple(offset)
