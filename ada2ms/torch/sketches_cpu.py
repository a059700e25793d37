"""Sums for sketches on CPUs by C++, which reads every entry once; by operations of torch for types that it has not."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ada2ms.core.trace import native
from ada2ms.core.trace.sketch import WIDTH, Codes
from ada2ms.torch import sketches_plain
from ada2ms.torch.reduce import are_plain

_NAMES = {getattr(torch, name): name for name in native.DTYPES}


class Sums:
    """Squares and signed sums of tensors on the CPU; keeps what it needs for tensors that come again."""

    def __init__(self) -> None:
        self._native, self._plain = native.Sums(), sketches_plain.Sums(torch.device("cpu"))

    def __call__(self, tensors: Sequence[Tensor | None], codes: Sequence[Codes]) -> Tensor:
        """(tensors, WIDTH) in float64, with rows of zeros for what is None; see `sketches_plain`."""
        present = [i for i, x in enumerate(tensors) if x is not None]
        found = [x for x in tensors if x is not None]
        if not are_plain(found) or any(x.dtype not in _NAMES or x.is_neg() for x in found):
            return self._plain(tensors, codes)
        addresses, dtypes = [x.data_ptr() for x in found], [_NAMES[x.dtype] for x in found]
        sums = self._native(addresses, dtypes, [codes[i] for i in present], torch.get_num_threads())
        if len(present) == len(tensors):
            return torch.from_numpy(sums)
        whole = torch.zeros(len(tensors), WIDTH, dtype=torch.float64)
        whole[present] = torch.from_numpy(sums)
        return whole
