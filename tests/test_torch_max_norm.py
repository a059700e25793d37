"""`max_norm` in torch: clipping by the sum that the step takes anyway, in every implementation of the step.

What it should give is told by the rule in NumPy, by torch's own clip function before AdamW, and by gradients that are
clipped here, before a step without it.
"""

import copy
import math
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch_support import assert_same, random, shared_numbers

from ada2ms import core
from ada2ms.torch import Ada2MS
from support import EPSILON, needs_compiler, slow

STEPS = 5
SHAPES = [(3, 4), (), (5,), (0,), (2, 30)]
PATHS: dict[str, dict[str, Any]] = {
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "capturable": {"capturable": True, "foreach": True},
    "for-loop, capturable": {"capturable": True, "foreach": False},
    "differentiable": {"differentiable": True},
}
ALL_PATHS = pytest.mark.parametrize(
    "path", [pytest.param(name, marks=needs_compiler) if name == "fused" else name for name in PATHS]
)
SCOPES = pytest.mark.parametrize("scope", ["model", "tensor"])
# The norms of the gradients are about 10 in step 0, 1 in step 1, 10 in step 2, and so on: with this some are clipped.
MAX_NORM = 3.0


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(random(shape, seed, dtype=torch.float64).to(dtype)) for seed, shape in enumerate(SHAPES)]


def in_groups(params: list[nn.Parameter], path: str, **options: Any) -> Ada2MS:
    """Two groups of several hyperparameters."""
    groups = [{"params": params[:2]}, {"params": params[2:], "betas": (0.8, 0.9), "weight_decay": 0.1}]
    options = {"lr": 0.1, "adaptivity": 0.3, **PATHS[path], **options}
    if options.get("differentiable"):  # the parameters of a differentiable step are no leaves
        groups = [{**group, "params": [p.data for p in group["params"]]} for group in groups]
    return Ada2MS(groups, **options)


def in_use(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def gradients(step: int) -> list[Tensor]:
    size = 0.1 if step % 2 else 1.0
    return [random(shape, 100 * step + i, dtype=torch.float64) * size for i, shape in enumerate(SHAPES)]


def norm_of(grads: list[Tensor]) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in grads))


def train(optimizer: Ada2MS, clip_to: float | None = None, steps: range = range(STEPS)) -> Iterator[list[Tensor]]:
    """Steps with gradients that are, on demand, clipped before; yields the gradients as they were before."""
    params = in_use(optimizer)
    for step in steps:
        grads = [g.to(p.dtype) for g, p in zip(gradients(step), params, strict=True)]
        c = 1.0 if clip_to is None else min(1.0, clip_to / norm_of(grads))
        for p, g in zip(params, grads, strict=True):
            p.grad = g * c
        optimizer.step()
        yield grads


def state_of(optimizer: Ada2MS) -> list[Tensor]:
    keys = ("exp_avg", "exp_avg_sq", "global_exp_avg_sq")
    return [optimizer.state[p][key].detach() for p in in_use(optimizer) for key in keys]


@ALL_PATHS
@SCOPES
@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
@pytest.mark.parametrize("maximize", [False, True])
def test_equals_a_clip_before_the_step(path: str, scope: Any, nonfinite: Any, maximize: bool) -> None:
    """Parameters and state, to some roundings a step: of one factor in place of those of every gradient."""
    options: Any = {"scope": scope, "nonfinite": nonfinite, "maximize": maximize}
    clipping = in_groups(parameters(), path, max_norm=MAX_NORM, **options)
    plain = in_groups(parameters(), "for-loop", **options)
    norms = []
    for grads in train(clipping):
        norms.append(norm_of(grads))
        assert clipping.grad_norm is not None
        assert (clipping.grad_norm.ndim, clipping.grad_norm.requires_grad) == (0, False)
        assert float(clipping.grad_norm) == pytest.approx(norms[-1], rel=1e-14)
        for p, g in zip(in_use(clipping), grads, strict=True):
            assert torch.equal(p.grad, g)  # untouched
    assert min(norms) < MAX_NORM < max(norms)
    list(train(plain, MAX_NORM))
    assert_same(in_use(clipping), in_use(plain), 1e-13)
    assert_same(state_of(clipping), state_of(plain), 1e-13)  # type: ignore[arg-type]


@ALL_PATHS
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, *slow(torch.float64)])
@pytest.mark.parametrize("max_norm", [0.05, 20.0])
def test_equals_the_rule(path: str, dtype: torch.dtype, max_norm: float) -> None:
    """Always and never clipped; gradients of 16 bits are clipped in float32, not rounded once more."""
    if dtype == torch.float16 and path == "differentiable":
        pytest.skip("autograd does not follow a parameter that is rounded")
    optimizer = in_groups(parameters(dtype), path, max_norm=max_norm)
    arrays = [p.detach().numpy().copy() for p in in_use(optimizer)]
    groups = [{"params": arrays[:2]}, {"params": arrays[2:], "b1": 0.8, "b2": 0.9, "weight_decay": 0.1}]
    rule = core.Ada2MS(groups, lr=0.1, adaptivity=0.3, max_norm=max_norm)
    for grads in train(optimizer):
        rule.step([g.numpy() for g in grads])
    wide = torch.promote_types(dtype, torch.float32)
    bound = 8 * STEPS * torch.finfo(wide).eps
    for i, (p, x) in enumerate(zip(in_use(optimizer), arrays, strict=True)):
        group, j = (rule.groups[0], i) if i < 2 else (rule.groups[1], i - 2)
        pairs = [(p.detach(), x, STEPS * torch.finfo(dtype).eps if dtype == torch.float16 else bound)]
        pairs += [
            (optimizer.state[p][key].detach(), getattr(group, key)[j], bound) for key in ("exp_avg", "exp_avg_sq")
        ]
        for left, right, allowed in pairs:
            largest = np.abs(right.astype(np.float64)).max(initial=0)
            assert np.abs(left.double().numpy() - right).max(initial=0) <= allowed * largest


@pytest.mark.parametrize("path", ["for-loop", "foreach", pytest.param("fused", marks=needs_compiler)])
def test_as_clip_grad_norm_and_adamw(path: str) -> None:
    """At adaptivity 1, but for the 1e-6 that torch adds to the norm: c and m have an error of 1e-6/norm, v one of twice
    that, and the update, m/sqrt(v), one of twice that at most. Next to no update is larger than lr.
    """
    options: Any = {"lr": 0.1, "weight_decay": 0.1, **PATHS[path]}
    params, others = parameters(), parameters()
    ours = Ada2MS(params, **options, adaptivity=1, max_norm=MAX_NORM)
    adamw = torch.optim.AdamW(others, **options)
    smallest = math.inf
    for step in range(STEPS):
        for some in (params, others):
            for p, g in zip(some, gradients(step), strict=True):
                p.grad = g.clone()
        norm = clip_grad_norm_(others, MAX_NORM)
        smallest = min(smallest, float(norm)) if norm > MAX_NORM else smallest
        adamw.step()
        ours.step()
        torch.testing.assert_close(ours.grad_norm, norm, rtol=1e-14, atol=0)
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=STEPS * 0.1 * 2e-6 / smallest)
        assert p.numel() < 5 or not torch.equal(p, q)  # so that the bound was put to the test


@ALL_PATHS
@SCOPES
def test_infinity_is_the_norm_alone(path: str, scope: Any) -> None:
    """Bit for bit the step without `max_norm`, which gives the norm, too."""
    runs = [in_groups(parameters(), path, scope=scope, max_norm=max_norm) for max_norm in (None, math.inf, 1e300)]
    for steps in zip(*(train(run) for run in runs), strict=True):
        for run, grads in zip(runs, steps, strict=True):
            assert float(run.grad_norm) == pytest.approx(norm_of(grads), rel=1e-14)  # type: ignore[arg-type]
    for run in runs[1:]:
        assert_same(in_use(run), in_use(runs[0]), 0)
        assert_same(state_of(run), state_of(runs[0]), 0)  # type: ignore[arg-type]


@ALL_PATHS
@SCOPES
@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("max_norm", [MAX_NORM, math.inf])
def test_gradients_that_are_not_finite(path: str, scope: Any, bad: float, max_norm: float) -> None:
    """As in the rule: a factor of 0 or NaN, and NaN where that meets an infinity; or a step that is skipped."""
    optimizer = in_groups(parameters(), path, scope=scope, max_norm=max_norm)
    skipping = in_groups(parameters(), path, scope=scope, max_norm=max_norm, nonfinite="skip")
    arrays = [p.detach().numpy().copy() for p in parameters()]
    groups = [{"params": arrays[:2]}, {"params": arrays[2:], "b1": 0.8, "b2": 0.9, "weight_decay": 0.1}]
    rule = core.Ada2MS(groups, lr=0.1, adaptivity=0.3, scope=scope, max_norm=max_norm)
    for optimizer_ in (optimizer, skipping):
        for p, g in zip(in_use(optimizer_), gradients(0), strict=True):
            p.grad = g
        in_use(optimizer_)[0].grad[1, 2] = bad
        optimizer_.step()
        torch.testing.assert_close(float(optimizer_.grad_norm), bad, equal_nan=True)  # type: ignore[arg-type]
    with np.errstate(invalid="ignore"):
        rule.step([p.grad.numpy() for p in in_use(optimizer)])
    for p, x in zip(in_use(optimizer), arrays, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), x, rtol=1e-13)
    if max_norm == math.inf:  # which is none
        plain = in_groups(parameters(), path, scope=scope)
        for p, q in zip(in_use(plain), in_use(optimizer), strict=True):
            p.grad = q.grad
        plain.step()
        for p, q in zip(in_use(plain), in_use(optimizer), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=0, equal_nan=True)
    assert shared_numbers(skipping)["skipped"] == 1
    assert_same(in_use(skipping), parameters(), 0)
    list(train(skipping, steps=range(1, 3)))
    assert shared_numbers(skipping)["global_step"] == 2


@ALL_PATHS
@SCOPES
@pytest.mark.parametrize("size", [0.0, 1e-12, 1e15])
def test_very_small_and_very_large_gradients(path: str, scope: Any, size: float) -> None:
    """In float32, whose smallest number is above the square of such a factor, of 1e-22: as the rule."""
    optimizer = in_groups(parameters(torch.float32), path, scope=scope, max_norm=1e-6, eps=0.0)
    arrays = [p.detach().numpy().copy() for p in parameters(torch.float32)]
    groups = [{"params": arrays[:2]}, {"params": arrays[2:], "b1": 0.8, "b2": 0.9, "weight_decay": 0.1}]
    rule = core.Ada2MS(groups, lr=0.1, adaptivity=0.3, scope=scope, max_norm=1e-6, eps=0.0)
    for step in range(2):
        grads = [(g * size).float() for g in gradients(step)]
        for p, g in zip(in_use(optimizer), grads, strict=True):
            p.grad = g
        optimizer.step()
        rule.step([g.numpy() for g in grads])
    for p, x in zip(in_use(optimizer), arrays, strict=True):
        np.testing.assert_allclose(
            p.detach().numpy(), x, rtol=0, atol=16 * EPSILON["float32"] * np.abs(x).max(initial=0)
        )


def test_several_dtypes_and_complex_numbers() -> None:
    """One norm over all of them, complex numbers as pairs of reals, and 16 bits in float32."""
    dtypes = (torch.float64, torch.complex64, torch.bfloat16, torch.float32)
    for path in ("for-loop", "foreach", "capturable"):
        params = [nn.Parameter(random((6, 2), i, dtype=torch.float64).to(d)) for i, d in enumerate(dtypes)]
        others = copy.deepcopy(params)
        clipping, plain = Ada2MS(params, lr=0.1, max_norm=1.0, **PATHS[path]), Ada2MS(others, lr=0.1, foreach=False)
        for step in range(3):
            for i, p in enumerate(params):
                given = [random((6, 2), 10 * step + i + part, dtype=torch.float64) for part in (0, 5)]
                g = torch.complex(*given).to(p.dtype) if p.is_complex() else given[0].to(p.dtype)
                p.grad = g
            norm = math.sqrt(sum(float(p.grad.abs().double().square().sum()) for p in params if p.grad is not None))
            for p, q in zip(params, others, strict=True):
                assert p.grad is not None
                q.data = q.data.float() if q.dtype == torch.bfloat16 else q.data  # its gradient is not to be rounded
                q.grad = (p.grad.to(q.dtype)) / norm
            clipping.step()
            plain.step()
            assert float(clipping.grad_norm) == pytest.approx(norm, rel=1e-6)  # type: ignore[arg-type]
        for p, q in zip(params, others, strict=True):
            rounding = 4 * 2.0**-8 if p.dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(p.detach().to(q.dtype), q.detach(), rtol=rounding, atol=rounding)


@SCOPES
def test_derivatives(scope: Any) -> None:
    """Through two steps with a norm above, and below, `max_norm`; against finite differences, and at 0 not NaN."""
    given = random((3, 2), 1, dtype=torch.float64)

    def run(gradients: Tensor, max_norm: float) -> Tensor:
        params = [torch.ones(n, dtype=torch.float64) for n in (2, 1)]
        optimizer = Ada2MS(params, lr=0.1, scope=scope, differentiable=True, max_norm=max_norm, adaptivity=0.3)
        for row in gradients.unbind(1):
            for p, g in zip(params, row.split([2, 1]), strict=True):
                p.grad = g
            optimizer.step()
        return torch.cat(params)

    with warnings.catch_warnings(action="ignore"):  # of torch, that .grad of no leaf is read
        for max_norm in (0.5, 100.0, math.inf):
            x = given.clone().requires_grad_()
            assert torch.autograd.gradcheck(lambda x, max_norm=max_norm: run(x, max_norm), x)
        later = (given * torch.tensor([1.0, 0.0], dtype=torch.float64)).requires_grad_()  # zeros in the second step
        run(later, 1.0).sum().backward()
        assert torch.isfinite(later.grad).all()  # type: ignore[arg-type]


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize(
    "path", ["for-loop", "foreach", *(pytest.param(x, marks=needs_compiler) for x in ("fused", "fused, capturable"))]
)
def test_grad_scaler(path: str, unscale: bool) -> None:
    """Clipped is the unscaled gradient, whether the scaler has unscaled it before, or the fused step does it."""
    options: Any = PATHS.get(path, {"fused": True, "capturable": True})
    params, plain = parameters(torch.float32), parameters(torch.float32)
    optimizer = Ada2MS(params, lr=0.1, max_norm=MAX_NORM, **options)
    reference = Ada2MS(plain, lr=0.1, foreach=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        scale = scaler.scale(torch.ones(())).item()
        grads = [g.float() for g in gradients(step)]
        for p, g in zip(params, grads, strict=True):
            p.grad = g * scale
        if step == 1:
            params[2].grad[0] = math.inf  # type: ignore[index]
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        norm = norm_of(grads)
        if step != 1:
            for p, g in zip(plain, grads, strict=True):
                p.grad = g * min(1.0, MAX_NORM / norm)
            reference.step()
            assert float(optimizer.grad_norm) == pytest.approx(norm, rel=1e-6)  # type: ignore[arg-type]
        elif "fused" in path:
            assert float(optimizer.grad_norm) == math.inf  # type: ignore[arg-type]
    assert_same(params, plain, 8 * 3 * EPSILON["float32"])
    assert shared_numbers(optimizer)["global_step"] == 2


def test_the_norm_is_no_state() -> None:
    """None before the first step and in copies; a step without gradients, and a load, leave it alone."""
    optimizer = in_groups(parameters(), "for-loop", max_norm=1.0)
    assert optimizer.grad_norm is None
    list(train(optimizer, steps=range(1)))
    before = optimizer.grad_norm
    assert before is not None
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other.grad_norm is None
        assert other.param_groups[0]["max_norm"] == 1.0
        list(train(other, steps=range(1, 2)))
        assert other.grad_norm is not None
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.grad_norm == before
    assert shared_numbers(optimizer).keys() == {
        "step",
        "exp_avg",
        "exp_avg_sq",
        "global_exp_avg_sq",
        "global_step",
        "skipped",
    }
