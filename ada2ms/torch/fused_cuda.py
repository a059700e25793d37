"""The rule on CUDA, in Triton: one pass over the data of a tensor, with every number read from device memory.

Nothing here waits for the device or is compiled again when a number changes, and it can be captured in a CUDA graph.
"""

from collections.abc import Sequence

import torch
import triton  # type: ignore[import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,unused-ignore]
from torch import Tensor

from ada2ms.torch.functional import Options, Scalar, _single_tensor_ada2ms, scalars

_BLOCK = 1024


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _power(x, coarse, fine):  # type: ignore[no-untyped-def]
    """x^(coarse + fine) in float32, to some epsilons; as in fused.cpp, but for the device's own log2 and exp2."""
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


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _root(v, coarse, fine, ROOT: tl.constexpr, DOUBLE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """The power of v; its square root where ROOT is 1, the root of that where it is 2."""
    if ROOT == 3:
        v = tl.exp2((coarse + fine) * tl.log2(v)) if DOUBLE else _power(v, coarse, fine)
    else:
        for _ in tl.static_range(ROOT):
            v = tl.sqrt(v) if DOUBLE else tl.sqrt_rn(v)  # the other one is approximate in float32
    return v


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _update(p_ptr, g_ptr, m_ptr, v_ptr, numbers, n, ROOT: tl.constexpr, DOUBLE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """A block of a tensor, given its row of `_numbers`."""
    unscale, live = tl.load(numbers), tl.load(numbers + 1)
    beta1, weight1 = tl.load(numbers + 2), tl.load(numbers + 3)
    beta2, weight2 = tl.load(numbers + 4), tl.load(numbers + 5)
    coarse, fine = tl.load(numbers + 6), tl.load(numbers + 7)
    factor, eps = tl.load(numbers + 8), tl.load(numbers + 9)
    decay, step_size = tl.load(numbers + 10), tl.load(numbers + 11)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n * live.to(tl.int64)  # 0 of them in a step that is skipped
    m, v = tl.load(m_ptr + i, mask=mask, other=0.0), tl.load(v_ptr + i, mask=mask, other=0.0)
    g = tl.load(g_ptr + i, mask=mask, other=0.0).to(m.dtype) * unscale
    p = tl.load(p_ptr + i, mask=mask, other=0.0).to(m.dtype)
    m = beta1 * m + weight1 * g
    v = beta2 * v + weight2 * g * g
    update = m
    if ROOT != 0:
        d = factor * _root(v, coarse, fine, ROOT, DOUBLE) + eps
        update = m / tl.where(d == 0, float("inf"), d)  # 0 only without eps: nothing has moved yet
    p = decay * p - step_size * update
    tl.store(m_ptr + i, m, mask=mask)
    tl.store(v_ptr + i, v, mask=mask)
    tl.store(p_ptr + i, p.to(p_ptr.dtype.element_ty), mask=mask)


def _fused_ada2ms(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    s_hats: Sequence[Scalar],
    o: Options,
) -> None:
    """As `_single_tensor_ada2ms`, for tensors of one device."""
    root = 3 if isinstance(o.adaptivity, Tensor) else {0: 0, 1: 1, 0.5: 2}.get(o.adaptivity, 3)
    numbers = _numbers(steps, s_hats, o, exp_avgs[0].device)
    narrow = numbers.float()
    for i, (p, g, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        wide = torch.promote_types(p.dtype, torch.float32)
        if not _together(p, m, v) or m.dtype != wide or v.dtype != wide:  # rare; without a kernel
            if o.grad_scale is not None:
                g = g.to(wide) / o.grad_scale.to(g.device)
            one = o._replace(grad_scale=None)
            _single_tensor_ada2ms([p], [g], [m], [v], [steps[i]], [s_hats[i]], one)
            continue
        if not _together(p, g):
            g = torch.empty_like(p, dtype=g.dtype).copy_(g)
        if p.numel():
            row = (numbers if wide == torch.float64 else narrow)[i]
            grid = (triton.cdiv(p.numel(), _BLOCK),)
            _update[grid](p, g, m, v, row, p.numel(), ROOT=root, DOUBLE=wide == torch.float64, BLOCK=_BLOCK)


def _numbers(steps: Sequence[Tensor], s_hats: Sequence[Scalar], o: Options, device: torch.device) -> Tensor:
    """A row for each tensor, float64; for all of them together, so that it takes a few operations and no waiting."""

    def column(x: Scalar) -> Tensor:
        kind = {"dtype": torch.float64, "device": device}
        if isinstance(x, Tensor):
            return x.to(**kind).expand(len(steps))  # type: ignore[call-overload,no-any-return]
        return torch.full((len(steps),), x, **kind)  # type: ignore[call-overload,no-any-return]

    t = torch.stack([t.to(device, torch.float64) for t in steps])
    same = all(s is s_hats[0] for s in s_hats)
    s_hat = column(s_hats[0]) if same else torch.cat([column(s)[:1] for s in s_hats])
    step_size, factor, eps = scalars(t, s_hat, device, torch.float64, o)
    unscale = column(1.0) if o.grad_scale is None else 1 / column(o.grad_scale)
    exponent = column(o.adaptivity) / 2
    coarse = (exponent * 2**17).round() / 2**17  # times an exponent it is exact in float32
    columns = (
        -unscale if o.maximize else unscale,
        1.0 if o.live is None else o.live,
        o.beta1,
        1 - o.beta1,
        o.beta2,
        1 - o.beta2,
        coarse,
        exponent - coarse,
        0.0 if factor is None else factor,
        eps,
        1 - o.lr * o.weight_decay,
        step_size,
    )
    return torch.stack([column(x) for x in columns], dim=1)


def _together(p: Tensor, *others: Tensor) -> bool:
    """Whether they lie in memory alike, and without gaps."""
    if p.is_contiguous():
        return all(x.is_contiguous() for x in others)
    dense = torch.empty_like(p, device="meta").stride() == p.stride()
    return dense and all(x.stride() == p.stride() for x in others)
