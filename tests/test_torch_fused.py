"""The fused step on CPUs: its kernel, against the rule and the default implementation; and what there is without it.

tests/test_torch.py and tests/test_trajectories.py run it through what they run every implementation through.
"""

import copy
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch_support import shared_numbers

from ada2ms import core
from ada2ms.core.coefficients import Coefficients
from ada2ms.torch import Ada2MS
from ada2ms.torch.kernels import Options, fused_cpu
from support import EPSILON, needs_compiler


def randn(shape: Any, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Calls(TorchDispatchMode):
    """The names of the operations that write to tensors or read more than a number."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "ada2ms" or any(isinstance(x, Tensor) and x.numel() > 1 for x in args):
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@needs_compiler
@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_one_pass_for_a_group_after_one_for_the_sum(scope: Any) -> None:
    params = [nn.Parameter(randn((3, 5), i)) for i in range(4)]
    optimizer = Ada2MS([{"params": params[:1]}, {"params": params[1:], "lr": 0.5}], fused=True, scope=scope)
    for p in params:
        p.grad = randn((3, 5), 9)
    optimizer.step()
    with Calls() as calls:
        optimizer.step()
    calls.names = [name for name in calls.names if name != "ada2ms::counts"]  # reads a number of each tensor's state
    passes = [name for name in calls.names if name.startswith("ada2ms") or scope == "tensor"]
    if scope == "model":  # else what is small, but more than a number, is each tensor's mean
        assert [name for name in calls.names if name not in ("aten::sum", "aten::_to_copy")] == passes
    assert [name for name in passes if name.startswith("ada2ms")] == ["ada2ms::squares"] * 2 + ["ada2ms::step"] * 2


@needs_compiler
@pytest.mark.parametrize("adaptivity", [0.01, 0.3, 0.5, 0.7, 0.99, 1.0])
def test_the_power_is_exact_to_some_roundings(adaptivity: float) -> None:
    """Whatever the size of v, subnormal ones included: two epsilons for the power, and half of one for each of the four
    operations beside it that round: the factor, its product with the root, the quotient, its product with the step."""
    exponents = np.random.default_rng(0).uniform(-22.4, 18, 40_000)
    g = torch.tensor(10.0**exponents, dtype=torch.float32)
    g = torch.cat([g, torch.tensor([1.0, 2.0**-63, 2.0**63, 2.0**0.5])])
    v = g * g
    g, v = g[v > 0], v[v > 0].double()
    assert (v < 2.0**-126).sum() > 100
    p = nn.Parameter(torch.zeros_like(g))
    p.grad = g
    optimizer = Ada2MS([p], lr=1.0, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0, adaptivity=adaptivity, fused=True)
    optimizer.step()
    s = float(shared_numbers(optimizer)["global_exp_avg_sq"])
    expected = -g.double() / (v ** (adaptivity / 2) * s ** ((1 - adaptivity) / 2))
    normal = expected.abs() > 2.0**-126  # what is smaller has fewer digits itself
    error = ((p.detach().double() - expected) / expected)[normal].abs().max().item()
    assert error <= 4 * EPSILON["float32"]


@needs_compiler
@pytest.mark.parametrize("adaptivity", [1e-9, 0.01, 0.3, 0.7, 0.99, 1 - 1e-6])
def test_the_power_of_every_size(adaptivity: float) -> None:
    """1 / v^(a/2) for numbers of each exponent that float32 has: two epsilons for the power, half of one for the
    quotient. 0, infinity and NaN are their own powers; and where d is 0, nothing moves."""
    rng = np.random.default_rng(0)
    v = np.ldexp(rng.uniform(1, 2, (2, 277 * 500)), np.tile(np.arange(-149, 128), 1000).reshape(2, -1)).astype("f4")
    special = np.array([0, np.inf, np.nan, -np.nan], "f4")
    found = power_reciprocals(np.concatenate([v.reshape(-1), special]), adaptivity)
    error = np.abs(found[: v.size] * v.reshape(-1).astype("f8") ** (adaptivity / 2) - 1)
    assert np.max(error) <= 2.5 * EPSILON["float32"]
    np.testing.assert_array_equal(found[v.size :], [0, 0, np.nan, np.nan])


def power_reciprocals(v: np.ndarray[Any, Any], adaptivity: float) -> np.ndarray[Any, Any]:
    """The quotient m/d of a step in which moments stay as they are, with m = 1 and d = v^(a/2)."""
    values = torch.from_numpy(v)
    p, g = torch.zeros_like(values), torch.zeros_like(values)
    options = Options(beta1=1.0, beta2=1.0, weight1=0.0, weight2=0.0, decay_factor=None, adaptivity=adaptivity)
    fused_cpu.update([p], [g], [torch.ones_like(p)], [values], Coefficients(1.0, 1.0, 0.0), options)
    return -p.double().numpy()


@needs_compiler
@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="of x86-64")
@pytest.mark.parametrize("isa", ["default", "avx2"])
def test_with_fewer_instructions_than_the_machine_has(isa: str) -> None:
    start = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "power or special or tensors"]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": isa, "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(start, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("adaptivity", [0.0, 0.3, 0.5, 1.0])
def test_special_values_of_v(adaptivity: float, dtype: torch.dtype) -> None:
    """Zero, subnormal, infinite and NaN: as the default implementation."""
    tiny = torch.finfo(dtype).tiny
    values = torch.tensor([0.0, tiny / 1024, tiny, 1.0, torch.finfo(dtype).max, torch.inf, torch.nan], dtype=dtype)
    found = []
    for flag in (True, False):
        p = nn.Parameter(torch.zeros_like(values))
        p.grad = torch.zeros_like(p)
        optimizer = Ada2MS([p], adaptivity=adaptivity, weight_decay=0.0, fused=flag)
        optimizer.step()
        optimizer.state[p]["exp_avg"].fill_(1e-3)
        optimizer.state[p]["exp_avg_sq"].copy_(values)
        shared_numbers(optimizer)["global_exp_avg_sq"].fill_(0.5)
        optimizer.step()
        found.append(p.detach())
    torch.testing.assert_close(*found, rtol=8 * torch.finfo(dtype).eps, atol=0, equal_nan=True)


@needs_compiler
@pytest.mark.parametrize("adaptivity", [0.0, 0.5, 1.0, core.Linear(1, 0, 2), core.Linear(0, 1, 2)], ids=str)
@pytest.mark.parametrize("capturable", [False, True])
def test_an_adaptivity_in_a_tensor(adaptivity: Any, capturable: bool) -> None:
    """Which with `capturable` is one for the host, too; 0, 1/2 and 1 are computed otherwise than other numbers."""
    p = nn.Parameter(randn(70, 0))
    array = p.detach().numpy().copy()
    given = adaptivity if callable(adaptivity) else torch.tensor(adaptivity, dtype=torch.float64)
    optimizer = Ada2MS([p], lr=0.1, adaptivity=given, capturable=capturable, fused=True)
    rule = core.Ada2MS([array], lr=0.1, adaptivity=adaptivity)
    for step in range(4):
        p.grad = randn(70, 1 + step)
        rule.step([p.grad.numpy()])
        optimizer.step()
    np.testing.assert_allclose(p.detach().numpy(), array, rtol=0, atol=1e-13 * np.abs(array).max())


@needs_compiler
@pytest.mark.parametrize("adaptivity", [0.0, 0.3, 0.5, 1.0])
def test_many_tensors(adaptivity: float) -> None:
    """A thousand, of all sizes, with counts that differ since gradients are missing, on two threads."""
    sizes = [(i * 37) % 331 for i in range(1000)] + [50_000, 0, 100_000]
    params = [nn.Parameter(randn(n, i)) for i, n in enumerate(sizes)]
    arrays = [p.detach().numpy().copy() for p in params]
    optimizer = Ada2MS(params, lr=0.1, adaptivity=adaptivity, fused=True)
    rule = core.Ada2MS(arrays, lr=0.1, adaptivity=adaptivity)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for step in range(3):
            for i, p in enumerate(params):
                p.grad = None if (i + step) % 4 == 0 else randn(p.shape, 5000 * step + i)
            rule.step([None if p.grad is None else p.grad.numpy() for p in params])
            optimizer.step()
    finally:
        torch.set_num_threads(before)
    for p, x in zip(params, arrays, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), x, rtol=0, atol=1e-13 * np.abs(x).max(initial=0))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_the_sum_is_exact_and_the_same_on_any_number_of_threads(dtype: torch.dtype) -> None:
    """In float64, in which it is exact to its roundings."""
    tensors = [randn(n, n).to(dtype) for n in (1, 31, 33, 0, 1 << 15, 300_001)]
    before, sums = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            sums.append(fused_cpu.squares(tensors, torch.float64))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], sums[2])
    exact = torch.tensor([np.sum(np.square(x.double().numpy())) for x in tensors])
    torch.testing.assert_close(sums[0], exact, rtol=1e-14, atol=0)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scaled_gradients(dtype: torch.dtype) -> None:
    """Scale and verdict as GradScaler hands them over: unscaled within the pass, the gradients themselves untouched."""
    p, q = (nn.Parameter(randn(50, 0, dtype)) for _ in range(2))
    optimizer, reference = Ada2MS([p], lr=0.1, fused=True), Ada2MS([q], lr=0.1, fused=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(384.0), torch.tensor(0.0)  # type: ignore[attr-defined]
    for step in range(4):
        optimizer.found_inf.fill_(step == 2)  # type: ignore[attr-defined]
        q.grad = randn(50, step + 1, dtype).mul_(8).round_().div_(8)
        p.grad = q.grad * 384  # exact: few digits
        given = p.grad.clone()
        optimizer.step()
        assert torch.equal(p.grad, given)
        if step != 2:
            reference.step()
    # 1/384 is rounded once; what the parameter is rounded to may then be the next number
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(p, q, rtol=rounding, atol=8 * EPSILON["float32"])
    found = shared_numbers(optimizer), shared_numbers(reference)
    torch.testing.assert_close(*(x["global_exp_avg_sq"] for x in found), rtol=1e-6, atol=0)
    assert [int(x["global_step"]) for x in found] == [3, 3]


@needs_compiler
def test_other_dtypes_of_gradients_and_of_state() -> None:
    """A model that was cast after its first step: its state follows, and is never narrower than float32."""
    p = nn.Parameter(randn(40, 0, torch.float32))
    optimizer = Ada2MS([p], fused=True)
    q = copy.deepcopy(p)
    reference = Ada2MS([q])
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32):
        for x, o in ((p, optimizer), (q, reference)):
            x.data = x.data.to(dtype)
            x.grad = randn(40, 1, torch.float32).to(dtype)
            o.step()
            assert o.state[x]["exp_avg"].dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(p, q, rtol=0, atol=torch.finfo(torch.bfloat16).eps)  # rounded to that on the way


@needs_compiler
def test_autograd_sees_that_parameters_changed() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = Ada2MS([p], fused=True)
    p.grad = torch.ones(3)
    loss = p.square().sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_compiler
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_resumes_what_was_not_fused_and_the_reverse(scope: Any, first: bool) -> None:
    """One state dict for both, keys, dtypes and all but the flag; and one trajectory, to a few roundings a step."""
    dtypes = (torch.float32, torch.complex64, torch.bfloat16)

    def values(seed: int, dtype: torch.dtype) -> Tensor:
        return randn(6, seed, torch.complex64 if dtype.is_complex else torch.float32).to(dtype)

    params = [[nn.Parameter(values(i, d)) for i, d in enumerate(dtypes)] for _ in range(2)]

    def train(mine: list[nn.Parameter], optimizer: Ada2MS, steps: range) -> None:
        for step in steps:
            for i, p in enumerate(mine):
                p.grad = values(10 * step + i, p.dtype)
            optimizer.step()

    optimizers = [Ada2MS(x, lr=0.01, scope=scope, adaptivity=0.3, fused=first) for x in params]
    for x, o in zip(params, optimizers, strict=True):
        train(x, o, range(3))
    saved = optimizers[1].state_dict()
    other = Ada2MS(params[1], scope=scope, fused=not first)
    for group in saved["param_groups"]:
        group["fused"] = not first
    other.load_state_dict(copy.deepcopy(saved))
    left, right = optimizers[0], other
    train(params[0], left, range(3, 6))
    train(params[1], right, range(3, 6))
    for p, q in zip(*params, strict=True):
        assert left.state[p].keys() == right.state[q].keys()
        for key, x in left.state[p].items():
            assert x.dtype == right.state[q][key].dtype
            torch.testing.assert_close(x, right.state[q][key], rtol=24 * EPSILON["float32"], atol=1e-7)
        tolerance = torch.finfo(p.dtype).eps if p.dtype == torch.bfloat16 else 24 * EPSILON["float32"]
        torch.testing.assert_close(p, q, rtol=tolerance, atol=1e-7)


@pytest.mark.filterwarnings("ignore:`torch.jit.script.*` is deprecated:DeprecationWarning")
def test_compiled_with_torch_it_is_the_default_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one graph, and without a kernel."""
    monkeypatch.setattr(fused_cpu, "extension", lambda: pytest.fail("the kernel was asked for"))
    found = []
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for compiled in (True, False):
        params = [nn.Parameter(randn(4, i)) for i in range(2)]
        optimizer = Ada2MS(params, lr=torch.tensor(0.1), fused=compiled)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for i in range(3):
            for p in params:
                p.grad = randn(4, i)
            step()
        found.append([p.detach() for p in params])
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)  # the learning rate is float32
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_nothing_is_compiled_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by default, and with fused=True not before the first step."""
    monkeypatch.setattr(fused_cpu, "extension", lambda: pytest.fail("the kernel was asked for"))
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    for options in ({}, {"fused": None}, {"fused": False}, {"foreach": True}):
        Ada2MS([p], **options).step()  # type: ignore[arg-type]
    Ada2MS([p], fused=True)


@pytest.mark.parametrize("missing", ["compiler", "a compiler that works", "ninja"])
def test_without_a_compiler(missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One warning, however many optimizers and steps, and the default implementation, bit for bit."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    if missing == "ninja":
        for tool in ("which", "c++", "g++", "sh"):
            if found := shutil.which(tool):
                (tmp_path / "bin").mkdir(exist_ok=True)
                (tmp_path / "bin" / tool).symlink_to(found)
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    else:
        monkeypatch.setenv("CXX", "no-such-compiler" if missing == "compiler" else "false")
    monkeypatch.setattr(fused_cpu, "extension", fused_cpu.functools.cache(fused_cpu.extension.__wrapped__))
    trained = []
    for flag in (True, True, False):
        p = nn.Parameter(randn(10, 0))
        optimizer = Ada2MS([p], lr=0.1, adaptivity=0.3, fused=flag)
        for step in range(3):
            p.grad = randn(10, step)
            if not trained and step == 0:
                with pytest.warns() as caught:
                    optimizer.step()
                (warning,) = [w for w in caught if issubclass(w.category, RuntimeWarning)]
                assert "fused=True" in str(warning.message)
                assert "g++" in str(warning.message)
                assert "pip install ninja" in str(warning.message)
            else:
                optimizer.step()
        trained.append(p.detach())
    assert torch.equal(trained[0], trained[2])
    assert torch.equal(trained[1], trained[2])


def _compiling(folder: Path, **options: Any) -> "subprocess.Popen[str]":
    """A process that has the extension compiled in this folder, and prints how long it took."""
    code = (
        "import time; from ada2ms.torch.kernels.fused_cpu import extension; t = time.time(); assert extension(); "
        "print(time.time() - t)"
    )
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(folder), "PYTHONPATH": ":".join(sys.path)}
    start = [sys.executable, "-W", "error", "-c", code]
    return subprocess.Popen(start, env=environment, stdout=subprocess.PIPE, text=True, **options)


@needs_compiler
@pytest.mark.slow
def test_processes_that_start_together(tmp_path: Path) -> None:
    """One compiles, the other waits for it; and a later one compiles nothing."""
    together = [_compiling(tmp_path) for _ in range(2)]
    times = [float(process.communicate(timeout=250)[0]) for process in together]
    assert [process.returncode for process in together] == [0, 0]
    assert float(_compiling(tmp_path).communicate(timeout=250)[0]) < min(times) / 2
    assert len(list(tmp_path.rglob("*.so"))) == 1


@needs_compiler
@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="kills a process and its children by POSIX' signals")
def test_a_process_that_was_killed_while_it_compiled_holds_nobody_up(tmp_path: Path) -> None:
    killed = _compiling(tmp_path, start_new_session=True)
    while not list(tmp_path.rglob("lock")):
        assert killed.poll() is None
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate(timeout=60)
    assert list(tmp_path.rglob("lock")), "torch's own lock stays, for which torch would wait for ever"
    after = _compiling(tmp_path)
    after.communicate(timeout=250)
    assert after.returncode == 0


@pytest.mark.slow
def test_the_benchmark_runs() -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "torch_step.py"
    start = [sys.executable, "-W", "error", str(script), "--smoke", "--isa", "default"]
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(start, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Ada2MS 0.5, fused") == 3
    assert " with DEFAULT" in done.stdout
