"""What recording costs in torch: how many kernels and operations sketches take; and Triton's, against NumPy."""

import ctypes
import os
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch_support import Operations

from ada2ms.core.trace import Trace, native
from ada2ms.core.trace.sketch import codes, resolution, sketch
from ada2ms.torch import Recorder, sketches
from ada2ms.torch.sketches import Sketcher
from ada2ms.torch.trace import parameters
from support import require_device

SHAPES = [(), (0, 3), (2500,), (60, 41), (8, 4, 3, 3), (1, 1100), (1100, 1)]


def tensors(dtype: torch.dtype, device: str, seed: int = 0) -> list[Tensor | None]:
    """In every layout, and one that is missing."""
    rng = torch.Generator().manual_seed(seed)
    found = [torch.randn(shape, generator=rng, dtype=torch.float64).to(device, dtype) for shape in SHAPES]
    image, matrix, row = (
        torch.randn(*shape, generator=rng, dtype=torch.float64).to(device, dtype)
        for shape in ((2, 3, 4, 5), (30, 40), (1101,))
    )
    return [*found, None, image.to(memory_format=torch.channels_last), matrix.t(), matrix[:, ::2], row[1:]]


def compare(device: str, dtypes: tuple[str, ...]) -> None:
    """Triton's kernels with NumPy."""
    from ada2ms.torch import sketches_cuda

    if device == "cpu":  # smaller parts, for Triton's interpreter is slow
        sketches.sketches_plain = sketches_cuda  # type: ignore[attr-defined]
        sketches_cuda._CHUNK, sketches_cuda._BLOCK, sketches_cuda._PARTS = 1024, 256, 2
    compare_with_numpy(device, dtypes)


def compare_with_numpy(device: str, dtypes: tuple[str, ...]) -> None:
    """Sketches of tensors of several types at once, again after they have changed in place, and of others."""
    every = [x for dtype in dtypes for x in tensors(getattr(torch, dtype), device)]
    like = [torch.zeros(5) if x is None else x for x in every]
    params = [nn.Parameter(x.detach().clone()) for x in like]
    named = {str(i): p for i, p in enumerate(params)}
    sketcher = Sketcher(params, parameters(named, torch.optim.SGD(params), None, None))
    others = [x for dtype in dtypes for x in tensors(getattr(torch, dtype), device, seed=1)]
    for given in (every, every, others):
        for row, x in zip(sketcher(given).cpu().numpy(), given, strict=True):
            if x is None:
                assert not row.any()
                continue
            wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
            expected = sketch(wide.cpu().numpy())
            bound = 2 * resolution(str(x.dtype).removeprefix("torch.")) * expected[0]
            assert np.abs(row - expected).max() <= bound, (x.shape, x.stride(), x.dtype)
        for x in given:
            if x is not None:
                x.mul_(-3)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The sums in C++, compiled into a cache of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        found = native.compiled.__wrapped__()
    if found is None:
        pytest.skip("there is no compiler of C++")
    return found


@pytest.fixture
def compiled(library: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Has models of any size summed in C++; the list has how many tensors were, by call."""
    calls: list[int] = []
    whole = native.Sums.__call__

    def noted(self: native.Sums, addresses: Any, *rest: Any) -> Any:
        calls.append(len(addresses))
        return whole(self, addresses, *rest)

    monkeypatch.setattr(native, "compiled", lambda: library)
    monkeypatch.setattr(native, "ENTRIES", 0)
    monkeypatch.setattr(native.Sums, "__call__", noted)
    return calls


def test_the_sums_in_cpp(compiled: list[int]) -> None:
    """In every layout and type."""
    compare_with_numpy("cpu", native.DTYPES)
    assert compiled == [4 * (len(tensors(torch.float32, "cpu")) - 1)] * 3


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not list a process' threads")
def test_the_sums_in_cpp_are_made_by_the_threads_of_torch(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which wait for work for a while without sleeping: beside them others would not have the processors."""
    if not hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        pytest.skip("torch has no OpenMP here")
    monkeypatch.setattr(native, "compiled", lambda: library)
    x, given, most, tasks = torch.ones(1 << 21), codes((1 << 21,)), [], Path("/proc/self/task")
    done, threads = threading.Event(), torch.get_num_threads()

    def watch() -> None:
        while not done.is_set():
            most.append(len(list(tasks.iterdir())))

    watcher = threading.Thread(target=watch)
    try:
        torch.set_num_threads(2)
        (x + x).sum()  # by both threads, which are there from now on
        watcher.start()
        known = len(list(tasks.iterdir()))
        for _ in range(20):
            native.Sums()([x.data_ptr()], ["float32"], [given], 2)
    finally:
        done.set()
        watcher.join()
        torch.set_num_threads(threads)
    assert len(most) > 5
    assert max(most) <= known


def test_a_recorder_of_a_large_model_sums_in_cpp(
    compiled: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """From a number of entries on; what has no gradient is left out, and complex numbers are pairs."""
    params = {
        "a": nn.Parameter(torch.randn(30, 40)),
        "b": nn.Parameter(torch.randn(50)),
        "c": nn.Parameter(torch.randn(7, 3, dtype=torch.complex64)),
    }
    for p in list(params.values())[::2]:
        p.grad = torch.randn_like(p)
    found = []
    for entries in (1292, 1293):
        monkeypatch.setattr(native, "ENTRIES", entries)
        optimizer = torch.optim.SGD(params.values(), lr=0.0)
        with Recorder(tmp_path / "run", params, optimizer):
            optimizer.step()
        found.append(Trace.load(tmp_path / "run").steps[0])
    assert compiled == [5, 3]
    assert found[0].missing.tolist() == found[1].missing.tolist() == [False, True, False]
    for what in ("value", "gradient"):
        here, there = (step.sketches[what] for step in found)
        assert np.array_equal(np.isnan(here), np.isnan(there))
        assert np.nanmax(np.abs(here - there)) <= 2 * resolution("float32") * np.nanmax(there[:, 0])


def test_what_is_negative_by_a_flag_is_summed_by_torch(compiled: list[int]) -> None:
    params = [nn.Parameter(torch.ones(1))]
    sketcher = Sketcher(params, parameters({"x": params[0]}, torch.optim.SGD(params), None, None))
    norm, *sums = sketch(np.ones(1))
    for x, sign in ((torch.ones(1), 1), (torch._neg_view(torch.ones(1)), -1)):
        assert sketcher([x])[0].tolist() == [norm, *(sign * each for each in sums)]
        assert compiled == [1]


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (it comes with torch for CUDA)")
@pytest.mark.slow
@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("float64", "float16")], ids=str)
def test_the_kernels_in_tritons_interpreter(dtypes: tuple[str, ...]) -> None:
    """In a process of its own: Triton reads the switch once."""
    code = f"import test_torch_trace_cost as t; t.compare('cpu', {dtypes})"
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_the_kernels_on_cuda() -> None:
    require_device("torch", "gpu")
    compare("cuda", ("float32", "float64", "bfloat16", "float16"))


@pytest.mark.gpu
def test_a_recorded_step_on_cuda_waits_for_nothing(tmp_path: Path) -> None:
    """And launches as many kernels more for three tensors as for thirty; a learning rate on the device is as good."""
    require_device("torch", "gpu")
    from torch.profiler import ProfilerActivity, profile

    found: dict[bool, list[int]] = {False: [], True: []}
    for recorded in found:
        for n in (3, 30):
            params = {str(i): nn.Parameter(torch.randn(48, device="cuda")) for i in range(n)}
            for p in params.values():
                p.grad = torch.randn_like(p)
            optimizer = torch.optim.AdamW(params.values(), lr=torch.tensor(0.1, device="cuda"), fused=True)
            recorder = Recorder(tmp_path / f"{n}", params, optimizer, full=0) if recorded else None
            optimizer.step()
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as events:
                optimizer.step()
            names = [event.name for event in events.events() or []]
            assert not {"cudaStreamSynchronize", "cudaEventSynchronize"} & set(names)
            found[recorded].append(sum(name.startswith(("cudaLaunchKernel", "cuLaunchKernel")) for name in names))
            if recorder is not None:
                recorder.close()
    added = [traced - plain for plain, traced in zip(found[False], found[True], strict=True)]
    assert 0 < added[0] <= 12
    assert added[0] == added[1]
    assert Trace.load(tmp_path / "30").steps[1].hyper[0]["lr"] == pytest.approx(0.1)


class Launches:
    """Stands in for a kernel of Triton, and notes the number of programs."""

    def __init__(self) -> None:
        self.found: list[int] = []

    def __getitem__(self, grid: tuple[int]) -> Any:
        return lambda *arguments: self.found.append(grid[0])


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Of both kernels, which then stand in for the operations of torch on the CPU."""
    cuda = pytest.importorskip("ada2ms.torch.sketches_cuda", reason="Triton is not installed", exc_type=ImportError)
    stand_in = Launches()
    monkeypatch.setattr(cuda, "_partial_sums", stand_in)
    monkeypatch.setattr(cuda, "_totals", stand_in)
    monkeypatch.setattr(sketches, "sketches_plain", cuda)
    return stand_in


def added_operations(count: int, path: Path, steps: int = 3) -> list[str]:
    """Operations that recording adds to the last of some steps of SGD, which has one for all tensors."""
    found = []
    for recorded in (False, True):
        params = {str(i): nn.Parameter(torch.ones(20_000)) for i in range(count)}
        optimizer = torch.optim.SGD(params.values(), lr=0.1, foreach=True)
        for p in params.values():
            p.grad = torch.ones_like(p)
        recorder = Recorder(path / f"{count}", params, optimizer, full=0, flush=100) if recorded else None
        for _ in range(steps):
            with Operations() as operations:
                optimizer.step()
        found.append([name for name in operations.found if name != "aten::detach"])
        assert recorder is None or not recorder.close()
    plain, traced = found
    for name in plain:
        traced.remove(name)
    return traced


def test_recording_takes_no_operation_for_each_tensor(launches: Launches, tmp_path: Path) -> None:
    """Two kernels before the step, of values and gradients, and two after it; nothing is uploaded again."""
    few = added_operations(2, tmp_path)
    assert launches.found == [12, 4, 6, 2] * 3
    launches.found.clear()
    many = added_operations(30, tmp_path)
    assert launches.found == [180, 60, 90, 30] * 3
    assert few == many == ["aten::empty"] * 4


def test_tensors_of_other_types_are_one_launch_for_each(launches: Launches) -> None:
    from ada2ms.torch.sketches_cuda import Sums

    given = [torch.ones(3), torch.ones(3, dtype=torch.float64), torch.ones(9000), None, torch.ones(0).half()]
    each = [codes((0,) if x is None else tuple(x.shape)) for x in given]
    Sums(torch.device("cpu"))(given, each)
    assert launches.found == [3, 1, 5]


@pytest.mark.parametrize(
    ("shape", "in_bags"),
    [((256, 32), True), ((1000, 33), True), ((2, 300, 40), True), ((513, 2, 50), True), ((256, 31), False)],
    ids=str,
)
def test_large_tensors_are_summed_in_bags(shape: tuple[int, ...], in_bags: bool) -> None:
    """With whole and partial chunks of rows, of which the bags are made; in any order of axes."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    params = [nn.Parameter(x)]
    sketcher = Sketcher(params, parameters({"x": params[0]}, torch.optim.SGD(params), None, None))
    backwards = tuple(reversed(range(x.ndim)))
    with Operations() as operations:
        (found,) = sketcher([x]).numpy()
    assert ("aten::_embedding_bag_forward_only" in operations.found) == in_bags, operations.found
    (turned,) = sketcher([x.permute(backwards).contiguous().permute(backwards)]).numpy()
    bound = 2 * resolution("float32") * np.linalg.norm(x.numpy())
    for row in (found, turned):
        assert np.abs(row - sketch(x.numpy())).max() <= bound
    x[0] = torch.inf
    assert not np.isfinite(sketcher([x]).numpy()).any()
