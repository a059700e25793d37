"""The kernel for CUDA, on CUDA where there is one; and its code in Triton's interpreter where Triton is installed."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_support import Operations

from ada2ms.torch import Ada2MS
from ada2ms.torch.coefficients import coefficients
from ada2ms.torch.kernels import Options, single
from ada2ms.torch.reduce import squares
from support import EPSILON, require_device, slow

SHAPES = [(3, 4), (), (0,), (7, 401), (64, 160)]


def tensors(dtype: torch.dtype, seed: int, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in SHAPES]
    image = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64).to(device, dtype)
    unaligned = torch.randn(9001, generator=generator, dtype=torch.float64).to(device, dtype)[1:]
    return [*found, image if seed % 2 else image.to(memory_format=torch.channels_last), unaligned]


DTYPES = ("float32", "float64", "bfloat16", "float16")


def compare(device: str, dtypes: Sequence[str] = DTYPES) -> None:
    """A step of the kernel against one of the for-loop's, from the same state, for all that may differ."""
    from ada2ms.torch.kernels import fused_cuda

    for kind, a, eps in product(dtypes, [0.0, 0.3, 0.5, 1.0, torch.tensor(0.7)], [1e-8, 0.0]):
        dtype = getattr(torch, kind)
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
        lr = torch.tensor(0.1, dtype=torch.float64, device=device)
        o = Options(0.9, 0.99, 1 - 0.9, 1 - 0.99, 1 - lr * 0.1, a, maximize=a == 0.3)
        given = lr, (0.9, 0.99), eps, a, t, s_hat, torch.device(device)
        each, double = (coefficients(*given, x, fold=False, gather=True) for x in (wide, torch.float64))
        expected = [[x.clone() for x in xs] for xs in (p, m, v)]
        single.update(expected[0], g, *expected[1:], each, o)
        scaled, scale = [x * 4 for x in g], torch.tensor(4.0, device=device)
        for live in (False, True):
            before = [x.clone() for x in p]
            here = o._replace(inv_scale=1 / scale, step_is_live=torch.tensor(live, device=device))
            masked = double
            if not live:  # as the step masks them
                here = here._replace(weight1=0.0, weight2=0.0, decay_factor=None)
                masked = double._replace(step_size=0 * double.step_size)
            fused_cuda.update(p, scaled, m, v, masked, here)
            if not live:
                torch.testing.assert_close(p, before, rtol=0, atol=0)
        rounding = EPSILON["float64" if wide == torch.float64 else "float32"]
        for name, left, right in zip("pmv", (p, m, v), expected, strict=True):
            for x, y in zip(left, right, strict=True):
                bound = 8 * (torch.finfo(dtype).eps / 8 if name == "p" and dtype != wide else rounding)
                worst = (x.double() - y.double()).abs().max().item() if x.numel() else 0.0
                largest = y.double().abs().max().item() if y.numel() else 0.0
                assert worst <= bound * largest, (dtype, a, eps, name, x.shape, worst / largest)


class Launches:
    """Stands in for a kernel, and notes what it is launched with."""

    def __init__(self) -> None:
        self.found: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int]) -> Any:
        return lambda *arguments: self.found.append((grid[0], *arguments))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    fused_cuda = pytest.importorskip(
        "ada2ms.torch.kernels.fused_cuda", reason="Triton is not installed", exc_type=ImportError
    )
    stand_in = Launches()
    monkeypatch.setattr(fused_cuda, "_update", stand_in)
    return stand_in


def launch(
    tensors: int, dtype: torch.dtype = torch.float32, adaptivity: float = 0.3, size: int = 20_000, offset: int = 0
) -> list[str]:
    """A step of that many tensors, and the operations of torch that it takes beside the kernel."""
    from ada2ms.torch.kernels import fused_cuda

    kinds = (dtype, dtype, torch.float32, torch.float32)
    p, g, m, v = ([torch.zeros(size + offset, dtype=kind)[offset:] for _ in range(tensors)] for kind in kinds)
    options = Options(0.9, 0.99, 0.1, 0.01, None, adaptivity)
    steps = [torch.tensor(1.0) for _ in range(tensors)]
    given = 0.1, (0.9, 0.99), 1e-8, adaptivity, steps, [torch.tensor(1.0)], p[0].device, torch.float64
    with Operations() as operations:
        fused_cuda.update(p, g, m, v, coefficients(*given, fold=False, gather=True), options)
    return operations.found


def test_one_launch_for_all_tensors(launches: Launches) -> None:
    """A program for every 8192 entries of each; and no operation of torch for each tensor."""
    operations = []
    for tensors in (2, 30):
        operations.append(launch(tensors))
        assert [x[0] for x in launches.found] == [3 * tensors]
        assert launches.found.pop()[2].tolist() == [i for i in range(tensors) for _ in range(3)]
    assert operations[0] == operations[1]


def test_the_sum_of_squares_takes_no_operation_for_each_tensor() -> None:
    """Of float32 gradients, summed in float64 as for the fused kernel: one conversion, after they are put together."""
    found = []
    for tensors in (3, 30):
        with torch.no_grad(), Operations() as operations:
            squares([torch.ones(7) for _ in range(tensors)], torch.float64)
        found.append([name for name in operations.found if name not in ("aten::ones", "aten::fill_", "aten::empty")])
    assert found[0] == found[1]


@pytest.mark.parametrize("offset", [0, 1])
def test_aligned_is_what_is_whole_multiples_of_16(launches: Launches, offset: int) -> None:
    launch(2, size=9001, offset=offset)
    sizes = {}
    for _, table, _, _, _, _, _, _, aligned, *_ in launches.found:
        rows = table.view(-1, 8)
        assert not (aligned and (rows[:, :5] % 16).any())
        sizes[aligned] = rows[:, 4].tolist()
    assert sizes == ({False: [9001] * 2} if offset else {True: [8992] * 2, False: [9] * 2})


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset:UserWarning")  # Triton 3.9; moves no bytes
@pytest.mark.parametrize("adaptivity", [0.0, 0.5, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_for_cuda_it_moves_each_entry_once(
    launches: Launches,
    dtype: torch.dtype,
    adaptivity: float,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """By 16 bytes at a time: the instructions for a block, compiled without a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launch(1, dtype, adaptivity)
    monkeypatch.undo()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from ada2ms.torch.kernels.fused_cuda import _BLOCK, _update

    ((_, *arguments),) = launches.found
    given = dict(zip(_update.arg_names, arguments, strict=True))
    pointers = {torch.int64: "*i64", torch.float64: "*fp64"}
    signature = {name: pointers[x.dtype] if isinstance(x, Tensor) else "constexpr" for name, x in given.items()}
    source = ASTSource(_update, signature, {name: x for name, x in given.items() if not isinstance(x, Tensor)})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    threads = 32 * compiled.metadata.num_warps
    moved = re.findall(r"(ld|st)\.global\.(?:v(\d)\.)?b(\d+)", compiled.asm["ptx"])
    for kind, arrays in (
        ("ld", (dtype, dtype, torch.float32, torch.float32)),
        ("st", (dtype, torch.float32, torch.float32)),
    ):
        widths = [int(n) * int(bits) // 8 for name, n, bits in moved if name == kind and n]  # the rest are numbers
        assert set(widths) == {16}
        assert sum(widths) * threads == _BLOCK * sum(x.itemsize for x in arrays)
    assert all(n for name, n, _ in moved if name == "st")


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (it comes with torch for CUDA)")
@pytest.mark.parametrize(
    "case", [(False, DTYPES[::2]), *slow((True, DTYPES[:1]), (False, DTYPES[1::2]), (True, DTYPES[1:]))], ids=str
)
def test_the_kernel_in_tritons_interpreter(case: tuple[bool, Sequence[str]]) -> None:
    """8 roundings, as for one step of every implementation. In a process of its own: Triton reads the switch once."""
    capturing, dtypes = case
    code = f"import test_torch_fused_cuda as t; t.compare('cpu', {dtypes})"
    if capturing:  # a CUDA graph, for which the kernel's table takes another way
        code = f"import ada2ms.torch.kernels.fused_cuda as f; f._captured = lambda device: True; {code}"
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_the_kernel_on_cuda() -> None:
    require_device("torch", "gpu")
    compare("cuda")


def kernels_of_a_step(make: Any, tensors: int) -> int:
    """By torch's profiler; nothing in the step may wait for the device."""
    from torch.profiler import ProfilerActivity, profile

    params = [nn.Parameter(torch.randn(48, device="cuda")) for _ in range(tensors)]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = make(params)
    optimizer.step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as recorded:
        optimizer.step()
    names = [event.name for event in recorded.events() or []]
    assert not {"cudaStreamSynchronize", "cudaEventSynchronize"} & set(names)
    return names.count("cudaLaunchKernel") + names.count("cuLaunchKernelEx") + names.count("cudaLaunchKernelExC")


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"fused": True}, {}, {"capturable": True}], ids=str)
def test_kernels_of_a_step_on_cuda(options: dict[str, Any]) -> None:
    """For ten times the tensors no more of them are added than in AdamW (torch has some for each with capturable)."""
    require_device("torch", "gpu")
    ours, theirs = (
        [kernels_of_a_step(lambda params, make=make: make(params, **options), n) for n in (3, 30)]
        for make in (Ada2MS, torch.optim.AdamW)
    )
    assert ours[0] > 0
    assert ours[1] - ours[0] <= theirs[1] - theirs[0]


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"fused": True}, {}, {"capturable": True}, {"nonfinite": "skip"}], ids=str)
def test_max_norm_takes_no_kernel_for_each_tensor_on_cuda(options: dict[str, Any]) -> None:
    """For all of them together it takes some of one thread; and nothing waits."""
    require_device("torch", "gpu")
    plain, clipping = (
        [kernels_of_a_step(lambda params, extra=extra: Ada2MS(params, **extra, **options), n) for n in (3, 30)]
        for extra in ({}, {"max_norm": 1.0})
    )
    assert clipping[1] - clipping[0] == plain[1] - plain[0]
    assert 0 < clipping[0] - plain[0] <= 12


@pytest.mark.gpu
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_captured_in_a_cuda_graph(max_norm: float | None) -> None:
    """Replays follow a learning rate that is changed in place, as the steps without a graph do."""
    require_device("torch", "gpu")
    trained: list[list[Tensor]] = []
    for captured in (False, True):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(n, device="cuda")) for n in (100, 3, 20_000)]
        for p in params:
            p.grad = torch.randn_like(p)
        lr = torch.tensor(0.1, device="cuda")
        optimizer = Ada2MS(params, lr=lr, fused=True, capturable=True, max_norm=max_norm)
        optimizer.step()
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                optimizer.step()
        for i in range(5):
            lr.fill_(0.1 / (i + 1))
            for p in params:
                p.grad *= 0.7  # type: ignore[operator]
            if captured:
                graph.replay()
            else:
                optimizer.step()
        assert optimizer.grad_norm is not None
        norm = torch.nn.utils.clip_grad_norm_(params, torch.inf)
        torch.testing.assert_close(optimizer.grad_norm, norm)  # of the last replay
        trained.append([p.detach() for p in params])
    torch.testing.assert_close(*trained, rtol=0, atol=0)
