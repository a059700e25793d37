"""The update on CUDA in Triton: one launch and one pass over all tensors, with every number read from device memory.

Nothing here waits for the device or is compiled again when a number changes, and it can be captured in a CUDA graph.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from ada2ms.core.coefficients import Coefficients, power_kind
from ada2ms.torch.kernels import Compensations, Options, at, single

_BLOCK, _CHUNK = 1024, 8192  # entries at once; entries of a program, which are of one tensor


@triton.jit  # type: ignore[untyped-decorator]
def _power(x, coarse, fine):  # type: ignore[no-untyped-def]
    """x^(coarse + fine) in float32, to some epsilons; as in fused_cpu.cpp, but for the device's own log2 and exp2."""
    subnormal = x < 1.1754943508222875e-38
    bits = tl.where(subnormal, x * 16777216.0, x).to(tl.int32, bitcast=True)
    # x = 2^e * y, with y between the roots of 1/2 and 2;   (coarse + fine)*log2(x) = n + r, with n whole
    whole = (bits - 0x3F3504F3) >> 23
    y = (bits - (whole << 23)).to(tl.float32, bitcast=True)
    e = tl.where(subnormal, whole - 24, whole).to(tl.float32)
    rest = fine * e + (coarse + fine) * tl.log2(y)
    n = tl.floor(coarse * e + rest + 0.5)
    two_to_n = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    result = tl.exp2((coarse * e - n) + rest) * two_to_n
    return tl.where((x > 0) & (x < float("inf")), result, x)


@triton.jit  # type: ignore[untyped-decorator]
def _denom_power(v, coarse, fine, KIND: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """v^(a/2), by as many square roots as `PowerKind` says, or by a power where it is 3."""
    double: tl.constexpr = v.dtype.is_fp64()
    if KIND == 3:
        v = tl.exp2((coarse + fine) * tl.log2(v)) if double else _power(v, coarse, fine)
    else:
        for _ in tl.static_range(KIND):
            v = tl.sqrt(v) if double else tl.sqrt_rn(v)  # the other one is approximate in float32
    return v


@triton.jit  # type: ignore[untyped-decorator]
def _lost(new, P: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """What rounding takes from new values; 0 where they are not finite then."""
    rest = new - new.to(P).to(new.dtype)
    return tl.where(tl.abs(rest) < float("inf"), rest, 0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _update(  # type: ignore[no-untyped-def]
    table,
    owners,
    numbers,
    each,
    P: tl.constexpr,  # noqa: N803
    G: tl.constexpr,  # noqa: N803
    M: tl.constexpr,  # noqa: N803
    ALIGNED: tl.constexpr,  # noqa: N803
    KIND: tl.constexpr,  # noqa: N803
    COMPENSATED: tl.constexpr,  # noqa: N803
    CHUNK: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """A chunk of the tensor that owns it, by its row in the table, with the numbers of all and of each tensor."""
    row = table + tl.load(owners + tl.program_id(0)) * (9 if COMPENSATED else 8)
    p_ptr = tl.load(row).to(tl.pointer_type(P))
    g_ptr = tl.load(row + 1).to(tl.pointer_type(G))
    m_ptr = tl.load(row + 2).to(tl.pointer_type(M))
    v_ptr = tl.load(row + 3).to(tl.pointer_type(M))
    c_ptr = tl.load(row + 8).to(tl.pointer_type(P)) if COMPENSATED else p_ptr
    index, first = tl.load(row + 5), tl.load(row + 6)
    step_is_live = tl.load(numbers + 1)
    size = tl.load(row + 4) * step_is_live.to(tl.int64)  # no entries in a step that does not count
    if ALIGNED:  # so that it loads and stores 16 bytes at a time
        p_ptr, g_ptr = tl.multiple_of(p_ptr, 16), tl.multiple_of(g_ptr, 16)
        m_ptr, v_ptr, size = tl.multiple_of(m_ptr, 16), tl.multiple_of(v_ptr, 16), tl.multiple_of(size, 16)
        c_ptr = tl.multiple_of(c_ptr, 16)

    inv_scale, eps, decay_factor = tl.load(numbers).to(M), tl.load(numbers + 4).to(M), tl.load(numbers + 6).to(M)
    beta1, beta2, exponent = tl.load(numbers + 2), tl.load(numbers + 3), tl.load(numbers + 5)
    beta1, weight1 = beta1.to(M), (1 - beta1).to(M)
    beta2, weight2 = beta2.to(M), (1 - beta2).to(M)
    coarse = tl.floor(exponent * 2.0**17 + 0.5) * 2.0**-17  # times an exponent it is exact in float32
    coarse, fine = coarse.to(M), (exponent - coarse).to(M)
    step_size, denom_scale = tl.load(each + 2 * index).to(M), tl.load(each + 2 * index + 1).to(M)

    start = (tl.program_id(0) - first) * CHUNK
    for block in range(start, min(start + CHUNK, size), BLOCK):
        i = block + tl.arange(0, BLOCK)
        mask = i < size
        m, v = tl.load(m_ptr + i, mask=mask, other=0.0), tl.load(v_ptr + i, mask=mask, other=0.0)
        g = tl.load(g_ptr + i, mask=mask, other=0.0).to(M) * inv_scale
        p = tl.load(p_ptr + i, mask=mask, other=0.0).to(M)
        if COMPENSATED:
            p += tl.load(c_ptr + i, mask=mask, other=0.0).to(M)
        m = beta1 * m + weight1 * g
        v = beta2 * v + weight2 * g * g
        quotient = m  # at the adaptivity 0 the step size has been divided by d
        if KIND != 0:
            # d = v_hat^(a/2) * s_hat^((1-a)/2) + eps
            d = denom_scale * _denom_power(v, coarse, fine, KIND) + eps
            d = tl.where(d == 0, float("inf"), d)  # where nothing has moved yet, the update is 0 / inf = 0
            quotient = m / d if m.dtype.is_fp64() else tl.div_rn(m, d)  # the other one is approximate in float32
        p = decay_factor * p - step_size * quotient
        tl.store(m_ptr + i, m, mask=mask)
        tl.store(v_ptr + i, v, mask=mask)
        tl.store(p_ptr + i, p.to(P), mask=mask)
        if COMPENSATED:
            tl.store(c_ptr + i, _lost(p, P).to(P), mask=mask)


def update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    coefficients: Coefficients,
    options: Options,
    compensations: Compensations = (),
) -> None:
    """See `ada2ms.torch.kernels`."""
    device = exp_avgs[0].device
    compute_dtype = {dtype: torch.promote_types(dtype, torch.float32) for dtype in {p.dtype for p in params}}
    rows: dict[tuple[torch.dtype, ...], list[tuple[int, ...]]] = {}  # by what the kernel is compiled for
    held = []  # gradients that were laid out anew, until they have been read
    lists = zip(params, grads, exp_avgs, exp_avg_sqs, compensations or [None] * len(params), strict=True)
    for i, (p, g, m, v, c) in enumerate(lists):
        written = (m, v) if c is None else (m, v, c)
        contiguous = p.is_contiguous() and g.is_contiguous() and all(x.is_contiguous() for x in written)
        if not m.dtype == v.dtype == compute_dtype[p.dtype] or not (contiguous or _same_layout(p, *written)):  # rare
            each = Coefficients(*(at(x, [i]) for x in coefficients))
            single.update([p], [_masked(g, options, m.dtype)], [m], [v], each, options, [c])
            continue
        if not (contiguous or _same_layout(p, g)):
            g = torch.empty_like(p, dtype=g.dtype).copy_(g)
            held.append(g)
        row = (p.data_ptr(), g.data_ptr(), m.data_ptr(), v.data_ptr(), p.numel(), i)
        rows.setdefault((p.dtype, g.dtype, m.dtype), []).append(row if c is None else (*row, c.data_ptr()))

    kind = int(power_kind(options.adaptivity / 2))
    of_all, of_each = _of_all(coefficients.eps, options, device), _of_each(coefficients, len(params), device)
    for dtypes, found in rows.items():
        types = [getattr(tl, str(dtype).removeprefix("torch.")) for dtype in dtypes]
        p_type, g_type, m_type = dtypes
        compensated = len(found[0]) == 7  # parameters of a dtype are, or are not
        itemsizes = [p_type.itemsize, g_type.itemsize, *[m_type.itemsize] * 2, *[p_type.itemsize] * compensated]
        for aligned, parts in _parts(np.array(found), itemsizes):
            table, owners = _table(parts, device)
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                arguments = table, owners, of_all, of_each, *types, aligned, kind, compensated
                _update[len(owners),](*arguments, _CHUNK, _BLOCK)


def _masked(g: Tensor, options: Options, dtype: torch.dtype) -> Tensor:
    """A gradient for the kernel that is given it unscaled, and zeros in a step that does not count."""
    g = g.to(dtype) * options.inv_scale
    return g if options.step_is_live is None else torch.where(options.step_is_live.to(g.device), g, 0.0)


def _parts(rows: NDArray[Any], itemsizes: list[int]) -> Iterator[tuple[bool, NDArray[Any]]]:
    """Cuts tensors in two, so that whole multiples of 16 entries at addresses that are such multiples go together.

    Rows are (four pointers, number of entries, index of the tensor), and (pointer to the compensation) if it has one.
    """
    sizes, pointers = rows[:, 4], [0, 1, 2, 3, 6][: len(itemsizes)]
    aligned = np.where((rows[:, pointers] % 16 == 0).all(axis=1), sizes - sizes % 16, 0)
    body, tail = rows.copy(), rows.copy()
    body[:, 4] = aligned
    tail[:, pointers] += aligned[:, None] * np.array(itemsizes)
    tail[:, 4] -= aligned
    for is_aligned, part in ((True, body), (False, tail)):
        if (part := part[part[:, 4] > 0]).size:
            yield is_aligned, part


def _table(rows: NDArray[Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """The kernel's table of tensors, of eight or nine numbers each, and the tensor that each program works on."""
    programs = -(-rows[:, 4] // _CHUNK)
    table = np.column_stack([rows[:, :6], programs.cumsum() - programs, programs, rows[:, 6:]])
    if _captured(device):  # where every number of the host becomes an argument of a launch
        on_device = _on_device(table.ravel().tolist(), torch.int64, device)
        return on_device, torch.repeat_interleave(on_device[7 :: table.shape[1]], output_size=int(programs.sum()))
    owners = np.repeat(np.arange(len(rows)), programs)
    on_device = copied(torch.from_numpy(np.concatenate([table.ravel(), owners])), device)
    return on_device[: table.size], on_device[table.size :]


def _of_all(eps: float, options: Options, device: torch.device) -> Tensor:
    """What the tensors share: gradient factor, whether the step counts, b1, b2, eps, a/2, 1 - lr*wd; float64."""
    numbers = (
        -options.inv_scale if options.maximize else options.inv_scale,
        1.0 if options.step_is_live is None else options.step_is_live,
        options.beta1,
        options.beta2,
        eps,
        options.adaptivity / 2,
        1.0 if options.decay_factor is None else options.decay_factor,
    )
    vector = _on_device([0.0 if isinstance(x, Tensor) else x for x in numbers], torch.float64, device)
    for i, x in enumerate(numbers):
        if isinstance(x, Tensor):
            vector[i].copy_(x)
    return vector


def _of_each(coefficients: Coefficients, n: int, device: torch.device) -> Tensor:
    """Step size and `denom_scale` of each tensor, float64; by a few operations for all of them together."""
    scale = 1.0 if coefficients.denom_scale is None else coefficients.denom_scale
    columns = []
    for x in (coefficients.step_size, scale):
        x = torch.stack(x) if isinstance(x, list) and isinstance(x[0], Tensor) else x
        if not isinstance(x, Tensor):
            x = _on_device(x if isinstance(x, list) else [x], torch.float64, device)
        columns.append(x.to(device, torch.float64).expand(n))
    return torch.stack(columns, dim=1)


def _on_device(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A vector of these numbers, without waiting for the device."""
    if _captured(device):  # each replay would copy what the host's memory has by then
        vector = torch.zeros(len(numbers), dtype=dtype, device=device)
        torch._foreach_add_(list(vector.unbind()), numbers)  # takes them as arguments of its kernel
        return vector
    return copied(torch.tensor(numbers, dtype=dtype, device="cpu"), device)  # whatever the default device is


def copied(host: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, from pinned memory, so that the host need not wait for it."""
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def _captured(device: torch.device) -> bool:
    """Whether what is launched becomes part of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _same_layout(p: Tensor, *others: Tensor) -> bool:
    """Whether they lie in memory alike, and without gaps."""
    if p.is_contiguous():
        return all(x.is_contiguous() for x in others)
    dense = torch.empty_like(p, device="meta").stride() == p.stride()
    return dense and all(x.stride() == p.stride() for x in others)
