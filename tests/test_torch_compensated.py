"""`compensated` in torch: the rule, by every implementation."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_torch import IMPLEMENTATIONS
from torch import Tensor, nn
from torch_support import random, shared_numbers

from ada2ms import core
from ada2ms.core.spec import BFLOAT16, widen
from ada2ms.torch import Ada2MS
from support import needs_compiler, place, require_device

# Of a unit of the compensation, which is half a unit of the parameter at most: what theta + compensation has.
DIGITS = {torch.bfloat16: 2.0**-16, torch.float16: 2.0**-22}
DTYPES = pytest.mark.parametrize("dtype", DIGITS, ids=str)
PATHS = pytest.mark.parametrize("options", IMPLEMENTATIONS)
SHAPES = [(3, 4), (), (5,), (0,), (2, 1500)]


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def parameters(dtype: torch.dtype, device: str = "cpu") -> list[nn.Parameter]:
    """Of 16 bits, and one that is wider, among them."""
    kinds = [dtype, dtype, torch.float32, dtype, dtype]
    return [
        nn.Parameter(random(shape, i).to(device, kind))
        for i, (shape, kind) in enumerate(zip(SHAPES, kinds, strict=True))
    ]


def give_gradients(params: list[nn.Parameter], step: int, *, missing: bool = False) -> None:
    for i, p in enumerate(params):
        p.grad = random(tuple(p.shape), 100 * step + i + 10).to(p.device, p.dtype)
        if missing and (i + step) % 4 == 0:
            p.grad = None


def compensation(optimizer: Ada2MS, p: Tensor) -> Tensor:
    found = optimizer.state[p]["compensation"]
    assert isinstance(found, Tensor)
    assert found.dtype == p.dtype
    return found


def held(optimizer: Ada2MS, p: Tensor) -> Tensor:
    """Theta and what its rounding has lost, in float64."""
    lost = optimizer.state[p]["compensation"].double().cpu() if "compensation" in optimizer.state[p] else 0.0
    return p.detach().double().cpu() + lost


def numpy(x: Tensor) -> NDArray[Any]:
    """As the specification takes it: the bits of a bfloat16."""
    x = x.detach().cpu().clone()
    return x.view(torch.int16).numpy().view(BFLOAT16) if x.dtype == torch.bfloat16 else x.numpy()


@pytest.mark.parametrize("adaptivity", [0.0, 0.3, 0.5, 1.0])
@DTYPES
@PATHS
def test_follows_the_specification(options: dict[str, Any], dtype: torch.dtype, adaptivity: float, device: str) -> None:
    """Ten steps, each of them smaller than a unit of most parameters. The bound is a unit of the compensation a step:
    where a sum of float32 is a digit off, that is by how much what is kept of it may be."""
    require_device("torch", device)
    params = parameters(dtype, place("torch", device))
    start = [p.detach().double().cpu() for p in params]
    arrays = [numpy(p) for p in params]
    given: dict[str, Any] = {"lr": 1e-3, "adaptivity": adaptivity, "compensated": True}
    expected = core.Ada2MS([{"params": arrays[:2], "weight_decay": 1.0}, {"params": arrays[2:], "b2": 0.9}], **given)
    groups = [{"params": params[:2], "weight_decay": 1.0}, {"params": params[2:], "betas": (0.9, 0.9)}]
    optimizer = Ada2MS(groups, **given, **options)
    for step in range(10):
        give_gradients(params, step, missing=True)
        expected.step([None if p.grad is None else p.grad.float().cpu().numpy() for p in params])
        optimizer.step()
    lost = [x for group in expected.groups for x in group.compensation]
    for p, x, array, c in zip(params, start, arrays, lost, strict=True):
        assert ("compensation" in optimizer.state[p]) == (p.dtype == dtype)
        if p.numel():
            want = torch.as_tensor(widen(array).astype(np.float64) + (0 if c is None else widen(c)))
            bound = 10 * (DIGITS[dtype] if p.dtype == dtype else torch.finfo(p.dtype).eps) * float(x.abs().max())
            assert (held(optimizer, p) - want).abs().max() <= bound
            assert bound < 0.25 * (want - x).abs().max() or p.numel() == 1


@DTYPES
@PATHS
def test_theta_is_the_nearest_and_ties_are_even(options: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    """Steps of a known size onto, and beside, the middle between two neighbours; bit for bit."""
    require_device("torch", device)
    unit = torch.finfo(dtype).eps
    values = torch.tensor([1.0, 1 + unit, -1.0, -1 - unit, 2 - unit, 1.5] * 7, dtype=dtype)  # vectors, and a rest
    for change, even in ((0.5, [1, 1 + 2 * unit, -1 + unit / 2, -1, 2, 1.5]), (0.75, None), (0.25, None)):
        p = nn.Parameter(values.to(place("torch", device), copy=True))
        optimizer = Ada2MS(
            [p], lr=change * unit, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0, compensated=True, **options
        )
        p.grad = -torch.ones_like(p)
        optimizer.step()
        exact = values.double() + change * unit
        torch.testing.assert_close(held(optimizer, p), exact, rtol=0, atol=0)
        assert torch.equal(p.detach().cpu(), exact.to(dtype))
        if even is not None:
            assert p.tolist() == even * 7


@DTYPES
@PATHS
@pytest.mark.parametrize("first", [False, True])
def test_a_skipped_step_leaves_both(options: dict[str, Any], dtype: torch.dtype, first: bool, device: str) -> None:
    """Also where the compensation is half a unit of an odd theta, whose sum would be divided otherwise."""
    require_device("torch", device)
    params = parameters(dtype, place("torch", device))
    optimizer = Ada2MS(params, lr=1e-4, weight_decay=1.0, nonfinite="skip", compensated=True, **options)
    if not first:
        give_gradients(params, 0)
        optimizer.step()
        unit = torch.finfo(dtype).eps
        with torch.no_grad():
            params[0].fill_(1 + unit)
            compensation(optimizer, params[0]).fill_(unit / 2)
            assert (params[0].float() + unit / 2).to(dtype)[0, 0] != params[0][0, 0]
    before = [(p.detach().clone(), held(optimizer, p)) for p in params]
    for bad in (math.nan, math.inf):
        give_gradients(params, 1)
        params[4].grad[0, 7] = bad
        optimizer.step()
    for p, (theta, both) in zip(params, before, strict=True):
        assert torch.equal(p.detach(), theta)
        assert torch.equal(held(optimizer, p), both)
    assert int(shared_numbers(optimizer)["skipped"]) == 2


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        pytest.param(torch.bfloat16, {"fused": True}, marks=needs_compiler),
        pytest.param(torch.float16, {"fused": True}, marks=needs_compiler),  # which alone may have gradients of it
        (torch.bfloat16, {"capturable": True, "foreach": True}),
        (torch.bfloat16, {"foreach": False}),
    ],
    ids=str,
)
def test_grad_scaler(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Scaled by a power of two it is the same trajectory, bit for bit; and a step of infinity leaves everything."""
    runs = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)):
        params = parameters(dtype)
        optimizer = Ada2MS(params, lr=1e-4, compensated=True, **options)
        for step in range(4):
            give_gradients(params, step)
            if scaler is None:
                optimizer.step()
                continue
            scaler.scale(torch.ones(()))
            for p in params:
                p.grad.mul_(scaler.get_scale())
            if step == 2:  # once more, with an overflow
                kept = [p.grad.clone() for p in params]
                params[0].grad[0, 0] = math.inf
                before = [(p.detach().clone(), held(optimizer, p)) for p in params]
                scaler.step(optimizer)
                scaler.update(2.0**10)
                for p, (theta, both) in zip(params, before, strict=True):
                    assert torch.equal(p.detach(), theta)
                    assert torch.equal(held(optimizer, p), both)
                for p, g in zip(params, kept, strict=True):
                    p.grad.copy_(g)
            scaler.step(optimizer)
            scaler.update()
        runs.append([(p.detach(), held(optimizer, p)) for p in params])
    torch.testing.assert_close(*runs, rtol=0, atol=0)


@DTYPES
@PATHS
def test_what_is_not_finite_has_no_compensation(options: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    """And no NaN comes of an infinite parameter; as in the specification, also where rounding makes it infinite."""
    require_device("torch", device)
    largest = torch.finfo(dtype).max
    values = torch.tensor([math.inf, -math.inf, math.nan, largest, -largest, 1.0], dtype=dtype)
    p = nn.Parameter(values.to(place("torch", device)))
    array = numpy(p)
    rule = core.Ada2MS([array], lr=largest / 64, weight_decay=0.0, compensated=True)
    optimizer = Ada2MS([p], lr=largest / 64, weight_decay=0.0, compensated=True, **options)
    g = torch.tensor([1.0, 1.0, 1.0, -1.0, 1.0, 1.0])
    for _ in range(3):
        p.grad = g.to(p)
        with np.errstate(over="ignore", invalid="ignore"):
            rule.step([g.numpy()])
        optimizer.step()
    torch.testing.assert_close(
        p.detach().double().cpu(), torch.from_numpy(widen(array)).double(), rtol=0.01, atol=0, equal_nan=True
    )
    assert p.isinf().tolist() == [True, True, False, True, True, False]
    assert compensation(optimizer, p).isfinite().all()
    assert (compensation(optimizer, p)[:5] == 0).all()


@PATHS
def test_memory_layout_does_not_matter(options: dict[str, Any], device: str) -> None:
    """Channels-last and strided parameters, and a slot that was laid out otherwise: bit for bit as contiguous ones.

    On CUDA the fused step leaves the latter two to torch's operations, which may round `new` otherwise in its last bit.
    """
    require_device("torch", device)
    lr, steps = 1e-4, 4
    # After k steps a compensation is at most k*lr, and in each its rounding to 8 bits may fall to the other side.
    bound = sum(range(steps + 1)) * lr * 2.0**-8 if device == "gpu" else 0.0
    shape, where = (2, 4, 4, 5), place("torch", device)
    plain = [nn.Parameter(random(shape, i).to(where, torch.bfloat16)) for i in range(3)]
    with torch.no_grad():
        strided = torch.empty(2, 4, 4, 10, dtype=torch.bfloat16, device=where)[..., ::2].copy_(plain[1])
        layouts = [
            nn.Parameter(x)
            for x in (plain[0].to(memory_format=torch.channels_last), strided, plain[2].detach().clone())
        ]
    given: dict[str, Any] = {"lr": lr, "compensated": True, "adaptivity": 1.0, **options}  # without s, a sum
    reference, optimizer = Ada2MS(plain, **given), Ada2MS(layouts, **given)
    for step in range(steps):
        give_gradients(plain, step)
        for p, q in zip(layouts, plain, strict=True):
            p.grad = q.grad.clone()
        reference.step()
        optimizer.step()
        if step == 1:
            slot = compensation(optimizer, layouts[2])
            optimizer.state[layouts[2]]["compensation"] = slot.to(memory_format=torch.channels_last)
    assert compensation(optimizer, layouts[0]).stride() == layouts[0].stride()
    for p, q in zip(layouts, plain, strict=True):
        assert torch.equal(p, q)
        torch.testing.assert_close(compensation(optimizer, p), compensation(reference, q), rtol=0.0, atol=bound)
        assert (compensation(reference, q) != 0).any()


@PATHS
def test_maximize(options: dict[str, Any]) -> None:
    runs = []
    for sign in (1, -1):
        params = parameters(torch.bfloat16)
        optimizer = Ada2MS(params, lr=1e-4, compensated=True, maximize=sign < 0, **options)
        for step in range(3):
            give_gradients(params, step)
            for p in params:
                p.grad.mul_(sign)
            optimizer.step()
        runs.append([(p.detach(), held(optimizer, p)) for p in params])
    torch.testing.assert_close(*runs, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
@PATHS
def test_complex_numbers_of_16_bits(options: dict[str, Any]) -> None:
    """complex32 counts as pairs of float16; and wider complex numbers have none, as real ones."""
    pairs = nn.Parameter(random((6, 2), 0).half())
    p = nn.Parameter(torch.view_as_complex(pairs.detach().clone()))
    left, right = (Ada2MS([x], lr=1e-4, compensated=True, **options) for x in (p, pairs))
    for step in range(4):
        give_gradients([pairs], step)
        p.grad = torch.view_as_complex(pairs.grad)
        left.step()
        right.step()
    assert torch.equal(torch.view_as_real(p.detach()), pairs)
    assert torch.equal(torch.view_as_real(compensation(left, p)), compensation(right, pairs))
    assert (compensation(right, pairs) != 0).any()
    wide = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    wide.grad = torch.ones_like(wide)
    optimizer = Ada2MS([wide], compensated=True, **options)
    optimizer.step()
    assert "compensation" not in optimizer.state[wide]


def test_differentiable() -> None:
    """The derivatives are those of the float32 step, whose rounding has none, and the numbers those of the for-loop."""
    numbers, derivatives = [], []
    for dtype, differentiable in ((torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, True)):
        lr = torch.tensor(1e-3, requires_grad=differentiable)
        start = random((5,), 0).bfloat16().to(dtype).requires_grad_()
        p = start.clone()
        optimizer = Ada2MS(
            [p if differentiable else start], lr=lr, compensated=True, differentiable=differentiable, foreach=False
        )
        for step in range(3):
            (p if differentiable else start).grad = random((5,), step + 1).bfloat16().to(dtype)
            optimizer.step()
        numbers.append((p if differentiable else start).detach())
        if differentiable:
            derivatives.append(torch.autograd.grad(p.float().sum(), (lr, start)))
    assert torch.equal(numbers[0], numbers[1])
    for x, y in zip(*derivatives, strict=True):
        torch.testing.assert_close(x.float(), y, rtol=2.0**-8, atol=0)
    assert (derivatives[0][0] != 0).all()
