"""Sums for sketches by operations of torch, for any device."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from ada2ms.core.trace.sketch import SUMS, Codes, signs_of
from ada2ms.torch.numbers import compute_dtype
from ada2ms.torch.reduce import squares

_BLOCK = 8192  # rows that are summed at once
_CHUNK = 256  # rows of which bags are made; they stay in a cache meanwhile
_BAG_COLUMNS = 32  # from so many on bags are faster than products of matrices


class Sums:
    """Squares and signed sums of tensors on one device; keeps what it needs for tensors that come again."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._dtype = sum_dtype(device)
        self._kept: dict[tuple[int, torch.dtype], _Rows] = {}

    def __call__(self, tensors: Sequence[Tensor | None], codes: Sequence[Codes]) -> Tensor:
        """(tensors, WIDTH) in the widest type of the device, with rows of zeros for what is None.

        Args:
            tensors: contiguous, of floating point; all on this device.
            codes: of each; the same object for the same codes, which must not be freed.
        """
        groups: dict[tuple[int, torch.dtype], list[int]] = {}  # of one shape, whose small sums are taken together
        for i, (x, c) in enumerate(zip(tensors, codes, strict=True)):
            if x is not None:
                groups.setdefault((id(c), compute_dtype(x.dtype)), []).append(i)
        found: list[Tensor] = [torch.zeros(SUMS, dtype=self._dtype, device=self._device)] * len(tensors)
        with _full_precision(self._device):
            for key, members in groups.items():
                if key not in self._kept:
                    self._kept[key] = _Rows(codes[members[0]], key[1], self._device, self._dtype)
                rows = self._kept[key]
                partial = torch.stack([rows.sums(x) for i in members if (x := tensors[i]) is not None])
                whole = (partial.to(self._dtype) * rows.columns).sum(2)
                for i, row in zip(members, whole.unbind(), strict=True):
                    found[i] = row
        present = [x for x in tensors if x is not None]
        norms = squares(present, self._dtype)
        if len(present) < len(tensors):
            each, zero = iter(norms.unbind()), torch.zeros((), dtype=self._dtype, device=self._device)
            norms = torch.stack([zero if x is None else next(each) for x in tensors])
        return torch.cat([norms[:, None], torch.stack(found)], 1)


class _Rows:
    """Signs of rows, by which the rows of a matrix are summed, and of columns.

    For large float32 tensors on a CPU the products with 8 rows of signs, for which its libraries are slow, are taken in
    two steps. The signs of the first four sums, and of the last four, make 16 patterns, of which 8 are the others
    negated. So the rows of a chunk are summed into 2 times 8 bags by their pattern, as `embedding_bag` sums rows with
    weights, and the products are taken of bags.
    """

    def __init__(self, codes: Codes, dtype: torch.dtype, device: torch.device, wide: torch.dtype) -> None:
        self._shape, self._dtype = (len(codes.rows), len(codes.columns)), dtype
        self.columns = torch.from_numpy(signs_of(codes.columns)).to(device, wide)
        self._bags: tuple[Tensor, Tensor, Tensor] | None = None
        signs = signs_of(codes.rows)
        in_bags = device.type == "cpu" and dtype == torch.float32
        if in_bags and self._shape[0] >= _CHUNK and self._shape[1] >= _BAG_COLUMNS:
            signs, *bags = _in_bags(codes.rows)
            self._bags = (torch.from_numpy(bags[0]), torch.from_numpy(bags[1]), torch.from_numpy(bags[2]))
        self._signs = torch.from_numpy(signs).to(device, dtype)

    def sums(self, x: Tensor) -> Tensor:
        """The signed sums along the leading axes, (SUMS, columns); of long ones in blocks, whose sums are wider."""
        matrix = x.reshape(self._shape).to(self._dtype)
        if self._bags is not None:
            rows, offsets, weights = self._bags
            matrix = embedding_bag(rows, matrix, offsets, mode="sum", per_sample_weights=weights)
        if len(matrix) <= _BLOCK:
            return self._signs @ matrix
        total = torch.zeros(self.columns.shape, dtype=self.columns.dtype, device=matrix.device)
        for begin in range(0, len(matrix), _BLOCK):
            total += self._signs[:, begin : begin + _BLOCK] @ matrix[begin : begin + _BLOCK]
        return total


def _in_bags(codes: Any) -> tuple[Any, Any, Any, Any]:
    """The signs of the bags, (SUMS, bags), 0 in the sums that they are not for; and their rows, offsets and weights."""
    half = SUMS // 2
    negated, patterns = (1 << half) - 1, 1 << (half - 1)  # that is all bits; patterns up to their sign
    chunks, place = -(-len(codes) // _CHUNK), np.arange(len(codes)) // _CHUNK
    bags, weights = [], []
    for k in range(2):
        pattern = codes.astype(np.int64) >> half * k & negated
        is_negative = pattern >= patterns
        bags.append((2 * place + k) * patterns + np.where(is_negative, pattern ^ negated, pattern))
        weights.append(np.where(is_negative, -1.0, 1.0))
    bag = np.concatenate(bags)
    order = np.argsort(bag, kind="stable")
    counts = np.bincount(bag, minlength=2 * patterns * chunks)
    signs = np.zeros((SUMS, chunks, 2, patterns))
    for k in range(2):
        signs[half * k : half * (k + 1), :, k] = signs_of(np.arange(patterns, dtype=np.uint8))[:half, None]
    return (
        signs.reshape(SUMS, -1),
        (order % len(codes)).astype(np.int32),
        (np.cumsum(counts) - counts).astype(np.int32),
        np.concatenate(weights)[order].astype(np.float32),
    )


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


def sum_dtype(device: torch.device) -> torch.dtype:
    """The widest type of a device."""
    return torch.float32 if device.type == "mps" else torch.float64
