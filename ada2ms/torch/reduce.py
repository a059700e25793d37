"""Sums of squares: over one tensor, over a model, over a model that is divided among processes."""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_ROW, _ROWS = 1024, 16  # what is summed at once; in how many of these it is not worth while
_PLAIN = Tensor, torch.nn.Parameter  # no set: the compiler of torch 2.6 cannot look into one
_COMPLEX = {torch.complex32, torch.complex64, torch.complex128}


def _is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, without the second that importing the class takes where there are none."""
    return type(tensor) not in _PLAIN and hasattr(tensor, "device_mesh")


def are_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether they are whole and real, so that `local` would give them back."""
    return set(map(type, tensors)).issubset(_PLAIN) and _COMPLEX.isdisjoint({x.dtype for x in tensors})


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


def numel(tensor: Tensor) -> int:
    """The number of real entries of the whole tensor, wherever its parts are."""
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def squares(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    """sum(g*g) of each of these plain real tensors, summed in at least float32, without a copy of any."""
    if not parts:
        return torch.zeros(0, dtype=dtype, device="cpu")
    norms: dict[int, Tensor] = {}
    if not (torch.compiler.is_compiling() or torch.is_grad_enabled()):
        many = [i for i, part in enumerate(parts) if part.is_cuda or (part.is_cpu and part.numel() <= _ROWS * _ROW)]
        if many:
            double = any(parts[i].dtype == torch.float64 for i in many)
            compute_dtype = torch.float64 if double else torch.float32
            found = torch._foreach_norm([parts[i] for i in many], 2, dtype=compute_dtype)
            norms = dict(zip(many, found, strict=True))
    each = [norms[i] if i in norms else _norm(part) for i, part in enumerate(parts)]
    place, widest = each[0].device, torch.float64 if any(x.dtype == torch.float64 for x in each) else torch.float32
    if any(x.device != place or x.dtype != widest for x in each):
        each = [x.to(place, widest) for x in each]
    return torch.stack(each).to(dtype).square()  # one conversion, not one for each


def _norm(part: Tensor) -> Tensor:
    compute_dtype = torch.promote_types(part.dtype, torch.float32)
    norm: Tensor
    if part.is_cpu and part.numel() > _ROWS * _ROW and not torch.compiler.is_compiling():
        # One running sum loses 7e-4 of the sum of ten million entries; a sum for each row does not, at that speed.
        flat = part.reshape(-1)
        end = flat.numel() // _ROW * _ROW
        norm = torch.linalg.vector_norm(flat[:end].view(-1, _ROW), dim=1, dtype=compute_dtype)
        part = torch.cat([norm, flat[end:].to(compute_dtype)])
    norm = torch.linalg.vector_norm(part, dtype=compute_dtype)
    return norm


def all_reduced_sum(values: Tensor, tensors: Sequence[Any], *, each: bool) -> Tensor:
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
    order, results = list(plain), []
    if plain:
        part = _some(values, dict.fromkeys(plain, 1))
        results.append(part if each else part.sum())
    for mesh, divided in by_mesh.items():
        reduced = [any(column) for column in zip(*divided.values(), strict=True)]
        copies = {
            i: math.prod(mesh.size(dim) for dim in range(mesh.ndim) if reduced[dim] and not divided[i][dim])
            for i in divided
        }
        part = _some(values, copies)
        placements = [Partial() if dim else Replicate() for dim in reduced]
        part = DTensor.from_local(part if each else part.sum(), mesh, placements, run_check=False)
        results.append(part.full_tensor())
        order += divided
    if not each:
        return torch.stack(results).sum()
    found = dict(zip(order, torch.cat(results).unbind(), strict=True))
    return torch.stack([found[i] for i in range(len(found))])


def _some(values: Tensor, divisors: dict[int, int]) -> Tensor:
    """The values of these indices, each by its divisor; without a list in the device's memory, which waits for it."""
    if list(divisors) == list(range(len(values))) and set(divisors.values()) == {1}:
        return values
    parts = values.unbind()
    return torch.stack(torch._foreach_div([parts[i] for i in divisors], [float(n) for n in divisors.values()]))


def all_reduced_sum_over(group: Any, values: Tensor, tensors: Sequence[Any], like: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over the tensors of every member of a process group, and the number of their entries."""
    total = all_reduced_sum(values, tensors, each=False) if len(values) else torch.zeros_like(like)
    pair = torch.stack([total, torch.full_like(total, sum(map(numel, tensors)), dtype=like.dtype)])
    torch.distributed.all_reduce(pair, group=group)
    return pair[0], pair[1]


def mean(tensors: Sequence[Tensor]) -> Tensor:
    """The mean over the entries of all of these, wherever their parts are, in at least float32."""
    dtype = max((torch.promote_types(local(x).dtype, torch.float32) for x in tensors), key=lambda dtype: dtype.itemsize)
    sums = torch.stack([local(x).sum(dtype=dtype).to(tensors[0].device) for x in tensors])
    return all_reduced_sum(sums, tensors, each=False) / max(sum(map(numel, tensors)), 1)
