"""`compensated` in the kernel for CUDA, in Triton's interpreter where there is no GPU; and the bytes that it moves."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pytest
import torch
from test_torch_compensated import DIGITS
from test_torch_fused_cuda import Launches, launches, tensors  # noqa: F401  # a fixture
from torch import Tensor

from ada2ms.torch.coefficients import coefficients
from ada2ms.torch.kernels import Options, single
from support import EPSILON, require_device


def inputs(dtype: torch.dtype, device: str) -> tuple[list[Tensor], ...]:
    """Parameters, gradients, moments and compensations of all shapes and layouts; at last one that has gaps."""
    p, g = tensors(dtype, 0, device), tensors(dtype, 1, device)
    p.append(torch.ones(6, 14, dtype=dtype, device=device)[:, ::2])
    g.append(torch.ones(6, 7, dtype=dtype, device=device))
    m = [torch.empty_like(y, dtype=torch.float32).copy_(x) for x, y in zip(g, p, strict=True)]
    v = [x.square() for x in m]
    # half a unit of some, so that there are ties
    c = [torch.empty_like(x).copy_(x * torch.finfo(dtype).eps / 4) for x in p]
    with torch.no_grad():
        c[3].copy_(p[3].abs().log2().floor().exp2() * torch.finfo(dtype).eps / 2)
        p[3][0, :2] = torch.tensor([torch.inf, torch.finfo(dtype).max])
    return p, g, m, v, c


def compare(device: str) -> None:
    """A step of the kernel against one of the for-loop's, which has been compared with the specification."""
    from ada2ms.torch.kernels import fused_cuda

    for dtype, a in product(DIGITS, (0.0, 0.3)):
        rounds = device == "cuda" or dtype == torch.float16  # Triton's interpreter cuts bfloat16 off
        p, g, m, v, c = inputs(dtype, device)
        t, s_hat = torch.tensor(3.0, device=device), torch.tensor(0.3, dtype=torch.float64, device=device)
        lr = torch.tensor(1e-3, dtype=torch.float64, device=device)
        options = Options(0.9, 0.99, 1 - 0.9, 1 - 0.99, 1 - lr, a)
        given = lr, (0.9, 0.99), 1e-8, a, [t] * len(p), [s_hat] * len(p), torch.device(device)
        each, double = (coefficients(*given, x, fold=False, gather=True) for x in (torch.float32, torch.float64))
        expected = [[x.clone() for x in some] for some in (p, m, v, c)]
        single.update(expected[0], g, expected[1], expected[2], each, options, expected[3])
        before = [[x.clone() for x in some] for some in (p, c)]
        for live in (False, True):
            here, masked = options._replace(step_is_live=torch.tensor(live, device=device)), double
            if not live:  # as the step masks them
                here = here._replace(weight1=0 * lr, weight2=0 * lr, decay_factor=1 - 0 * lr)
                masked = double._replace(step_size=0 * double.step_size)
            fused_cuda.update(p, g, m, v, masked, here, c)
            if not live:
                for found, kept in zip((p, c), before, strict=True):
                    for x, y in zip(found, kept, strict=True):
                        assert torch.equal(x, y)
        for i, (q, lost) in enumerate(zip(expected[0], expected[3], strict=True)):
            if q.numel():
                finite = q.isfinite()
                assert torch.equal(p[i].isfinite(), finite)
                assert (c[i][~finite] == 0).all()
                off = (p[i].double() + c[i].double() - q.double() - lost.double())[finite].abs().max()
                assert off <= 2 * DIGITS[dtype] * q[finite].double().abs().max(), (dtype, a, q.shape, off)
                torch.testing.assert_close(m[i], expected[1][i], rtol=8 * EPSILON["float32"], atol=1e-7)
                assert (c[i].abs() <= torch.finfo(dtype).eps / (2 if rounds else 1) * p[i].abs()).all()
        if not rounds:
            continue
        # In a step of nothing, ties go to the even neighbour, and what is beside them to the nearer one.
        unit = torch.finfo(dtype).eps
        odd = torch.tensor([1 + unit, -1 - unit, 1.0, 1 + unit], dtype=dtype, device=device)
        lost = torch.tensor([0.5, -0.5, 0.5, 0.4375], dtype=dtype, device=device) * unit
        zeros = [torch.zeros(4, device=device) for _ in range(3)]
        small = coefficients(lr, (0.9, 0.99), 1e-8, a, [t], [s_hat], lr.device, torch.float64, fold=False, gather=True)
        fused_cuda.update(
            [odd], [zeros[0].to(dtype)], [zeros[1]], [zeros[2]], small, options._replace(decay_factor=None), [lost]
        )
        assert odd.tolist() == [1 + 2 * unit, -1 - 2 * unit, 1.0, 1 + unit], (dtype, a)
        assert (lost / unit).tolist() == [-0.5, 0.5, 0.5, 0.4375], (dtype, a)


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (it comes with torch for CUDA)")
@pytest.mark.slow
@pytest.mark.parametrize("captured", [False, True])
def test_the_kernel_in_tritons_interpreter(captured: bool) -> None:
    """In a process of its own: Triton reads the switch once."""
    code = "import test_torch_compensated_fused as t; t.compare('cpu')"
    if captured:  # a CUDA graph, for which the kernel's table takes another way
        code = f"import ada2ms.torch.kernels.fused_cuda as f; f._captured = lambda device: True; {code}"
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_benchmark_runs() -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "torch_compensated.py"
    start = [sys.executable, "-W", "error", str(script), "--smoke"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(start, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("compensated") == 3


@pytest.mark.gpu
def test_the_kernel_on_cuda() -> None:
    require_device("torch", "gpu")
    compare("cuda")


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset:UserWarning")  # Triton 3.9; moves no bytes
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", DIGITS, ids=str)
def test_compiled_for_cuda_it_moves_each_entry_once(
    launches: Launches,  # noqa: F811
    dtype: torch.dtype,
    offset: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """26 bytes an entry, by 16 at a time where that is aligned: 4 more than without, 2 less than of float32."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ada2ms.torch.kernels import fused_cuda

    kinds = (dtype, dtype, torch.float32, torch.float32, dtype)
    p, g, m, v, c = ([torch.zeros(16384 + offset, dtype=kind)[offset:]] for kind in kinds)
    given = 0.1, (0.9, 0.99), 1e-8, 0.3, [torch.tensor(1.0)], [torch.tensor(1.0)], p[0].device, torch.float64
    fused_cuda.update(
        p, g, m, v, coefficients(*given, fold=False, gather=True), Options(0.9, 0.99, 0.1, 0.01, None, 0.3), c
    )
    monkeypatch.undo()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ((_, *arguments),) = launches.found
    named = dict(zip(fused_cuda._update.arg_names, arguments, strict=True))
    assert named["table"].view(-1, 9)[:, [0, 1, 2, 3, 8]].tolist() == [[x[0].data_ptr() for x in (p, g, m, v, c)]]
    assert named["ALIGNED"] == (offset == 0)
    pointers = {torch.int64: "*i64", torch.float64: "*fp64"}
    signature = {name: pointers[x.dtype] if isinstance(x, Tensor) else "constexpr" for name, x in named.items()}
    constants = {name: x for name, x in named.items() if not isinstance(x, Tensor)}
    compiled = triton.compile(ASTSource(fused_cuda._update, signature, constants), target=GPUTarget("cuda", 90, 32))
    conversions = re.findall(r"cvt\S*\.b?f16\S*\.f32", compiled.asm["ptx"])
    assert conversions
    assert all(name.startswith("cvt.rn.") for name in conversions)  # to nearest even
    threads = 32 * compiled.metadata.num_warps
    found = re.findall(r"(ld|st)\.global\.(?:v(\d)\.)?b(\d+)", compiled.asm["ptx"])
    moved = {kind: [int(n or 1) * int(bits) // 8 for name, n, bits in found if name == kind] for kind in ("ld", "st")}
    assert sum(moved["st"]) * threads == fused_cuda._BLOCK * (2 + 4 + 4 + 2)
    if offset == 0:
        assert set(moved["st"]) == {16}
        assert sum(n for n in moved["ld"] if n == 16) * threads == fused_cuda._BLOCK * (2 + 2 + 4 + 4 + 2)
