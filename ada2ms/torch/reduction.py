"""Sums of squares: over one tensor, over a model, over a model that is divided among processes."""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_ROW = 1024
_PLAIN = (Tensor, torch.nn.Parameter)


def _is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, without the second that importing the class takes where there are none."""
    return type(tensor) not in _PLAIN and hasattr(tensor, "device_mesh")


def local(tensor: Any, like: Any = None) -> Tensor:
    """This process' part of a sharded tensor (divided as `like` is), as pairs of reals if complex; without a copy."""
    if _is_sharded(tensor):
        if like is not None and tensor.placements != like.placements:
            tensor = tensor.redistribute(placements=like.placements)
        tensor = tensor.to_local()
    return writable(torch.view_as_real(tensor) if tensor.is_complex() else tensor)


def writable(tensor: Tensor) -> Tensor:
    """A view to write to: torch.compile (of torch 2.13) loses operations in place on 0-d float64 tensors."""
    return tensor.view(1) if tensor.ndim == 0 and torch.compiler.is_compiling() else tensor


def entries(tensor: Tensor) -> int:
    """The number of real entries of the whole tensor, wherever its parts are."""
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def squares(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    """sum(g*g) of each of these plain real tensors, summed in at least float32, without a copy of any."""
    if not parts:
        return torch.zeros(0, dtype=dtype)
    if all(part.is_cuda for part in parts) and not (torch.compiler.is_compiling() or torch.is_grad_enabled()):
        wide = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
        return together(torch._foreach_norm(parts, 2, dtype=wide)).to(dtype).square()
    return together([_square(part, dtype) for part in parts])


def together(scalars: Sequence[Tensor]) -> Tensor:
    """0-d tensors as one tensor, on the device of the first."""
    return torch.stack([x.to(scalars[0].device) for x in scalars])


def _square(part: Tensor, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(part.dtype, torch.float32)
    if not part.is_cpu or torch.compiler.is_compiling():
        norm: Tensor = torch.linalg.vector_norm(part, dtype=wide)
        return norm.to(dtype).square()
    # On a CPU one running sum loses 7e-4 of the sum of ten million entries; a sum for each row does not, at that speed.
    flat = part.reshape(-1)
    end = flat.numel() // _ROW * _ROW
    rows: Tensor = torch.linalg.vector_norm(flat[:end].view(-1, _ROW), dim=1, dtype=wide)
    rest: Tensor = torch.linalg.vector_norm(flat[end:], dtype=wide)
    return rows.square().sum(dtype=dtype) + rest.to(dtype).square()


def whole(values: Tensor, tensors: Sequence[Any], *, each: bool) -> Tensor:
    """The sum over the whole of all tensors, or of `each`, given the sum over this process' part of each.

    One all-reduce, of as many numbers, per device mesh and per dimension of it along which something is divided.
    """
    by_mesh: dict[Any, dict[int, Any]] = defaultdict(dict)
    for i, tensor in enumerate(tensors):
        if _is_sharded(tensor):
            by_mesh[tensor.device_mesh][i] = [not placement.is_replicate() for placement in tensor.placements]
    if not by_mesh:
        return values if each else values.sum()
    from torch.distributed.tensor import DTensor, Partial, Replicate

    plain = [i for i, tensor in enumerate(tensors) if not _is_sharded(tensor)]
    order, results = list(plain), [values[plain] if each else values[plain].sum()]
    for mesh, divided in by_mesh.items():
        reduced = [any(column) for column in zip(*divided.values(), strict=True)]
        copies = [
            math.prod(mesh.size(dim) for dim in range(mesh.ndim) if reduced[dim] and not divided[i][dim])
            for i in divided
        ]
        part = values[list(divided)] / torch.tensor(copies, dtype=values.dtype, device=values.device)
        placements = [Partial() if dim else Replicate() for dim in reduced]
        part = DTensor.from_local(part if each else part.sum(), mesh, placements, run_check=False)
        results.append(part.full_tensor())
        order += divided
    if not each:
        return torch.stack(results).sum()
    return torch.cat(results)[torch.tensor(order, device=values.device).argsort()]


def among(group: Any, values: Tensor, tensors: Sequence[Any], like: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over the tensors of every member of a process group, and the number of their entries."""
    total = whole(values, tensors, each=False) if len(values) else torch.zeros_like(like)
    pair = torch.stack([total, torch.full_like(total, sum(map(entries, tensors)), dtype=like.dtype)])
    torch.distributed.all_reduce(pair, group=group)
    return pair[0], pair[1]
