"""Sums for sketches on CUDA in Triton: one read of all tensors, in two launches, however many tensors there are."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ada2ms.core.trace.sketch import WIDTH, Codes
from ada2ms.torch.kernels.fused_cuda import copied
from ada2ms.torch.numbers import compute_dtype

_BLOCK, _CHUNK = 512, 8192  # entries at once; entries of a program, which are of one tensor
_PARTS = 64  # sums of programs that are added at once
_COLUMNS = tl.constexpr(16)  # in memory, of which WIDTH are used
_TABLES = 8  # that are kept, for tensors that come again at the same addresses
_TYPES = {torch.float32, torch.float64, torch.float16, torch.bfloat16}


@triton.jit  # type: ignore[untyped-decorator]
def _signed(code, bit: tl.constexpr, x):  # type: ignore[no-untyped-def]
    """An entry with its sign in the sum of this bit."""
    return tl.where((code & (1 << bit)) != 0, -x, x)


@triton.jit  # type: ignore[untyped-decorator]
def _partial_sums(  # type: ignore[no-untyped-def]
    table,
    programs,
    partials,
    X: tl.constexpr,  # noqa: N803
    W: tl.constexpr,  # noqa: N803
    CHUNK: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """The squares and the signed sums of a chunk of a tensor: the row of the table, and which chunk, by `programs`."""
    program = programs + 2 * tl.program_id(0)
    row, start = table + tl.load(program) * 8, tl.load(program + 1) * CHUNK
    size, columns = tl.load(row + 3), tl.load(row + 4)
    first = start // columns
    offset, width = (start - first * columns).to(tl.int32), columns.to(tl.int32)
    x_ptr = tl.load(row).to(tl.pointer_type(X)) + start
    row_codes = tl.load(row + 1).to(tl.pointer_type(tl.uint8)) + first
    column_codes = tl.load(row + 2).to(tl.pointer_type(tl.uint8))
    left = tl.minimum(size - start, CHUNK).to(tl.int32)
    zero = tl.zeros([BLOCK], W)
    squares, s0, s1, s2, s3, s4, s5, s6, s7 = zero, zero, zero, zero, zero, zero, zero, zero, zero
    for block in range(0, left, BLOCK):
        i = block + tl.arange(0, BLOCK)
        mask = i < left
        x = tl.load(x_ptr + i, mask=mask, other=0.0).to(W)
        place = offset + i
        r = place // width
        code = tl.load(row_codes + r, mask=mask, other=0) ^ tl.load(
            column_codes + place - r * width, mask=mask, other=0
        )
        squares += x * x
        s0 += _signed(code, 0, x)
        s1 += _signed(code, 1, x)
        s2 += _signed(code, 2, x)
        s3 += _signed(code, 3, x)
        s4 += _signed(code, 4, x)
        s5 += _signed(code, 5, x)
        s6 += _signed(code, 6, x)
        s7 += _signed(code, 7, x)
    out = partials + tl.program_id(0) * _COLUMNS
    tl.store(out, tl.sum(squares.to(tl.float64)))
    tl.store(out + 1, tl.sum(s0.to(tl.float64)))
    tl.store(out + 2, tl.sum(s1.to(tl.float64)))
    tl.store(out + 3, tl.sum(s2.to(tl.float64)))
    tl.store(out + 4, tl.sum(s3.to(tl.float64)))
    tl.store(out + 5, tl.sum(s4.to(tl.float64)))
    tl.store(out + 6, tl.sum(s5.to(tl.float64)))
    tl.store(out + 7, tl.sum(s6.to(tl.float64)))
    tl.store(out + 8, tl.sum(s7.to(tl.float64)))


@triton.jit  # type: ignore[untyped-decorator]
def _totals(table, partials, out, USED: tl.constexpr, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """The sums over the programs of a tensor; zeros if it has none."""
    row = table + tl.program_id(0) * 8
    first, count = tl.load(row + 5), tl.load(row + 6)
    column = tl.arange(0, _COLUMNS)
    total = tl.zeros([_COLUMNS], tl.float64)
    for begin in range(0, count, PARTS):
        i = begin + tl.arange(0, PARTS)
        mask = (i < count)[:, None] & (column < USED)[None, :]
        total += tl.sum(tl.load(partials + (first + i)[:, None] * _COLUMNS + column[None, :], mask=mask, other=0.0), 0)
    tl.store(out + tl.program_id(0) * USED + column, total, mask=column < USED)


class Sums:
    """Squares and signed sums of tensors on one device; keeps what it needs for tensors that come again."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._codes: dict[int, tuple[Tensor, Tensor]] = {}
        self._tables: dict[Any, tuple[Tensor, Tensor, dict[torch.dtype, int]]] = {}

    def __call__(self, tensors: Sequence[Tensor | None], codes: Sequence[Codes]) -> Tensor:
        """(tensors, WIDTH) in float64, with rows of zeros for what is None.

        Args:
            tensors: contiguous, of floating point; all on this device.
            codes: of each; the same object for the same codes, which must not be freed.
        """
        used = [x if x is None or x.dtype in _TYPES else x.float() for x in tensors]
        key = (*[x if x is None else (x.data_ptr(), x.dtype) for x in used], *map(id, codes))
        if (found := self._tables.get(key)) is None:
            found = self._table(used, codes)
            while len(self._tables) >= _TABLES:
                del self._tables[next(iter(self._tables))]
            self._tables[key] = found
        table, programs, counts = found
        partials = torch.empty(len(programs), _COLUMNS.value, dtype=torch.float64, device=self._device)
        out = torch.empty(len(tensors), WIDTH, dtype=torch.float64, device=self._device)
        begin = 0
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            for dtype, count in counts.items():
                types = (getattr(tl, str(x).removeprefix("torch.")) for x in (dtype, compute_dtype(dtype)))
                part = slice(begin, begin + count)
                _partial_sums[count,](table, programs[part], partials[part], *types, _CHUNK, _BLOCK)
                begin += count
            _totals[len(tensors),](table, partials, out, WIDTH, _PARTS)
        return out

    def _table(
        self, tensors: Sequence[Tensor | None], codes: Sequence[Codes]
    ) -> tuple[Tensor, Tensor, dict[torch.dtype, int]]:
        """Of each tensor: three addresses, entries, columns, its first program and their number; of each program: whose
        it is and which chunk; and the number of programs of each dtype, in their order.
        """
        table = np.zeros((len(tensors), 8), np.int64)
        programs, counts, begin = [], {}, 0
        for dtype in dict.fromkeys(x.dtype for x in tensors if x is not None):
            members = [(i, x) for i, x in enumerate(tensors) if x is not None and x.dtype == dtype and x.numel()]
            counts[dtype] = 0
            for i, x in members:
                rows, columns = self._on_device(codes[i])
                count = -(-x.numel() // _CHUNK)
                table[i, :7] = (
                    x.data_ptr(), rows.data_ptr(), columns.data_ptr(), x.numel(), len(columns), begin, count
                )  # fmt: skip
                programs.append(np.column_stack([np.full(count, i), np.arange(count)]))
                begin += count
                counts[dtype] += count
        flat = np.concatenate([table.ravel(), *(x.ravel() for x in programs)])
        on_device = copied(torch.from_numpy(flat), self._device)
        used = {dtype: count for dtype, count in counts.items() if count}
        return on_device[: table.size].view(-1, 8), on_device[table.size :].view(-1, 2), used

    def _on_device(self, codes: Codes) -> tuple[Tensor, Tensor]:
        if id(codes) not in self._codes:
            rows, columns = (torch.from_numpy(x).to(self._device) for x in codes)
            self._codes[id(codes)] = rows, columns
        return self._codes[id(codes)]
