"""The kernel for CUDA, on CUDA where there is one; and its code in Triton's interpreter where Triton is installed."""

import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ada2ms.torch import Ada2MS
from ada2ms.torch.functional import Options, _single_tensor_ada2ms
from support import EPSILON, require_device

SHAPES = [(3, 4), (), (0,), (7, 401)]


def tensors(dtype: torch.dtype, seed: int, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in SHAPES]
    image = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64).to(device, dtype)
    return [*found, image if seed % 2 else image.to(memory_format=torch.channels_last)]


def compare(device: str) -> None:
    """A step of the kernel against one of `_single_tensor_ada2ms`, from the same state, for all that may differ."""
    from ada2ms.torch.fused_cuda import _fused_ada2ms

    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
    for dtype, a, eps in product(dtypes, [0.0, 0.3, 0.5, 1.0, torch.tensor(0.7)], [1e-8, 0.0]):
        wide = torch.promote_types(dtype, torch.float32)
        p, g = tensors(dtype, 0, device), tensors(dtype, 1, device)
        m, v = (
            [torch.empty_like(y, dtype=wide).copy_(x) for x, y in zip(tensors(wide, s, device), p, strict=True)]
            for s in (2, 3)
        )
        for x, y, z, sign in zip(v, m, g, p, strict=True):
            x.square_()
            for tensor in (x, y, z):
                tensor.mul_(sign > 0)  # where nothing has moved yet
        t = [torch.tensor(float(i + 1), device=device) for i in range(len(p))]
        s_hat = [torch.tensor(0.3, dtype=torch.float64, device=device)] * len(p)
        common: dict[str, Any] = {
            "lr": torch.tensor(0.1, dtype=torch.float64, device=device),
            "beta1": 0.9,
            "beta2": 0.99,
        }
        o = Options(
            **common, eps=eps, weight_decay=0.1, adaptivity=a, maximize=a == 0.3, differentiable=False, live=None
        )
        expected = [[x.clone() for x in xs] for xs in (p, m, v)]
        _single_tensor_ada2ms(expected[0], g, *expected[1:], t, s_hat, o)
        scaled, scale = [x * 4 for x in g], torch.tensor(4.0, device=device)
        for live in (False, True):
            before = [x.clone() for x in p]
            here = o._replace(grad_scale=scale, live=torch.tensor(live, device=device))
            _fused_ada2ms(p, scaled, m, v, t, s_hat, here)
            if not live:
                torch.testing.assert_close(p, before, rtol=0, atol=0)
        rounding = EPSILON["float64" if wide == torch.float64 else "float32"]
        for name, left, right in zip("pmv", (p, m, v), expected, strict=True):
            for x, y in zip(left, right, strict=True):
                bound = 8 * (torch.finfo(dtype).eps / 8 if name == "p" and dtype != wide else rounding)
                worst = (x.double() - y.double()).abs().max().item() if x.numel() else 0.0
                largest = y.double().abs().max().item() if y.numel() else 0.0
                assert worst <= bound * largest, (dtype, a, eps, name, x.shape, worst / largest)


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (it comes with torch for CUDA)")
def test_the_kernel_in_tritons_interpreter() -> None:
    """8 roundings, as for one step of every implementation. In a process of its own: Triton reads the switch once."""
    code = "import test_torch_fused_cuda as t; t.compare('cpu')"
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_the_kernel_on_cuda() -> None:
    require_device("torch", "gpu")
    compare("cuda")


@pytest.mark.gpu
def test_captured_in_a_cuda_graph() -> None:
    """Replays follow a learning rate that is changed in place, as the steps without a graph do."""
    require_device("torch", "gpu")
    trained = []
    for captured in (False, True):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(100, device="cuda"))
        p.grad = torch.randn_like(p)
        lr = torch.tensor(0.1, device="cuda")
        optimizer = Ada2MS([p], lr=lr, fused=True, capturable=True)
        optimizer.step()
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                optimizer.step()
        for i in range(5):
            lr.fill_(0.1 / (i + 1))
            if captured:
                graph.replay()
            else:
                optimizer.step()
        trained.append(p.detach())
    torch.testing.assert_close(*trained, rtol=0, atol=0)
