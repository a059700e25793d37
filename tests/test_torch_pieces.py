"""The default implementation of large tensors on a CPU: in pieces, with a power of its own."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ada2ms import core
from ada2ms.torch import Ada2MS
from ada2ms.torch.kernels import power, single
from support import EPSILON


def randn(shape: Any, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("h", [1e-30, 0.01, 0.1249, 0.125, 0.15, 0.2499, 0.3, 0.375, 0.4999])
def test_the_power_is_within_its_bound(h: float) -> None:
    """Numbers of each exponent that float32 has, against float64; 0, infinity and NaN are their own powers."""
    rng = np.random.default_rng(0)
    v = np.ldexp(rng.uniform(1, 2, 277 * 500), np.tile(np.arange(-149, 128), 500)).astype("f4")
    special = np.array([0, np.inf, np.nan], "f4")
    values = torch.from_numpy(np.concatenate([v, special]))
    assert power.by_roots_and_logarithm(values, h)
    found = power.power_by_roots_and_logarithm(values, h).double().numpy()
    wide = v.astype("f8")
    bound = 1.1 * (h - int(8 * h) / 8) * np.abs(np.log2(wide)) + 3
    assert np.all(np.abs(found[: v.size] / wide**h - 1) <= bound * EPSILON["float32"])
    np.testing.assert_array_equal(found[v.size :], [0, np.inf, np.nan])


@pytest.mark.parametrize("adaptivity", [0.0, 0.3, 0.5, 1.0])
def test_pieces_are_of_the_rule(adaptivity: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of pieces that do not fill the tensor; of tensors that are smaller, empty, or not contiguous."""
    monkeypatch.setattr(single, "_PIECE", 7)
    monkeypatch.setattr(single, "_BLOCK", 1)
    assert [x.numel() for x in single._split(torch.zeros(22))] == [6, 6, 6, 4]
    params = [nn.Parameter(randn(shape, 0)) for shape in [(5, 6), (7,), (), (0, 3), (22,)]]
    params.append(nn.Parameter(randn((8, 4), 1).t()))
    arrays = [p.detach().numpy().copy() for p in params]
    optimizer = Ada2MS(params, lr=0.1, adaptivity=adaptivity)
    rule = core.Ada2MS(arrays, lr=0.1, adaptivity=adaptivity)
    for step in range(3):
        for i, p in enumerate(params):
            p.grad = randn(p.shape, 10 * step + i)
        rule.step([None if p.grad is None else p.grad.numpy() for p in params])
        optimizer.step()
    for p, x in zip(params, arrays, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), x, rtol=0, atol=1e-13 * np.abs(x).max(initial=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_tensor(dtype: torch.dtype) -> None:
    """More than a piece, in the types whose power is the one of this file, against the rule in float64."""
    n = single._PIECE + 5
    p = nn.Parameter(randn(n, 0).to(dtype))
    start = p.detach().double().numpy().copy()
    array = start.copy()
    optimizer = Ada2MS([p], lr=0.1, adaptivity=0.3, weight_decay=0.0)
    rule = core.Ada2MS([array], lr=0.1, adaptivity=0.3, weight_decay=0.0)
    p.grad = randn(n, 1).to(dtype)
    optimizer.step()
    rule.step([p.grad.double().numpy()])
    rounding = EPSILON["float32"] if dtype == torch.float32 else torch.finfo(dtype).eps
    # the difference is rounded, and the update is off by some epsilons of its own
    bound = rounding * np.maximum(np.abs(array), np.abs(start)) + 8 * EPSILON["float32"] * np.abs(array - start)
    assert np.all(np.abs(p.detach().double().numpy() - array) <= bound)


@pytest.mark.parametrize("rest", [1, 100, 4095, 4097])
def test_a_rest_is_rounded_as_the_tensor(rest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit as without pieces, as in another layout, which has none."""
    found = []
    for piece in (8192, 1 << 19):
        monkeypatch.setattr(single, "_PIECE", piece)
        p = nn.Parameter(randn(2 * 8192 + rest, 0).float())
        optimizer = Ada2MS([p], lr=0.1, adaptivity=0.9)
        for step in range(3):
            p.grad = randn(p.shape, step).float() * 10.0 ** (step - 2)
            optimizer.step()
        found.append(p.detach())
    assert torch.equal(*found)


def test_pieces_have_their_part_of_the_compensation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit as without pieces, which tests/test_torch_compensated.py compares with the rule."""
    found = []
    monkeypatch.setattr(single, "_BLOCK", 1)
    for piece in (7, 1000):
        monkeypatch.setattr(single, "_PIECE", piece)
        p = nn.Parameter(randn(30, 0).bfloat16())
        optimizer = Ada2MS([p], lr=1e-3, compensated=True)
        for step in range(3):
            p.grad = randn(30, step).bfloat16()
            optimizer.step()
        found.append([p.detach(), optimizer.state[p]["compensation"]])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
    assert found[0][1].any()
