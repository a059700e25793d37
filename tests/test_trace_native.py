"""The sums of sketches by C++, against float64 entry by entry; and what happens where it cannot be compiled."""

import ctypes
import functools
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ada2ms.core.trace import native
from ada2ms.core.trace.sketch import WIDTH, codes, resolution, signs_of, sketch
from support import slow

SHAPES = [(), (0,), (3, 0, 2), (1,), (5,), (700,), (64, 33), (7, 3, 3, 16), (9, 8), (100, 7), (130, 2), (1, 1100)]
LARGE = [(513, 257), (1025, 12), (3, 2500), (1030, 1100), (140_000,)]  # several tasks, panels, strips and chunks


def built(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """The library, compiled anew."""
    if native._compiler() is None:
        pytest.skip("there is no compiler of C++")
    patch.setenv("XDG_CACHE_HOME", str(folder))
    patch.setattr(native, "compiled", functools.cache(native.compiled.__wrapped__))
    assert native.compiled() is not None
    (path,) = (folder / "ada2ms").iterdir()
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library, compiled for this processor."""
    with pytest.MonkeyPatch.context() as patch:
        return built(tmp_path_factory.mktemp("cache"), patch)


@pytest.fixture(scope="module")
def made_for_the_least(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library, compiled for the least of this processor's kind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_instructions", list)
        return built(tmp_path_factory.mktemp("cache"), patch)


@pytest.fixture(params=["made", *slow("made_for_the_least")])
def sums(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Sums of arrays, by all that this processor has, or by the least that its kind has."""
    made = request.getfixturevalue(request.param)
    monkeypatch.setattr(native, "compiled", lambda: native._declared(ctypes.CDLL(str(made))))

    def of(arrays: Sequence[Any], given: Sequence[Any], threads: int = 1) -> Any:
        addresses, names = [x.ctypes.data for x in arrays], [x.dtype.name for x in arrays]
        return native.Sums()(addresses, names, given, threads)

    return of


def typed(x: Any, dtype: str) -> Any:
    if dtype == "bfloat16":
        return np.asarray(x).astype(pytest.importorskip("ml_dtypes").bfloat16)
    return np.asarray(x, dtype)


def by_definition(x: Any, found: Any) -> Any:
    """Squares and signed sums; in float64, but exact sums where float64 is what is judged."""
    wide = x.astype(np.float64).reshape(len(found.rows), len(found.columns))
    signed = signs_of(found.rows)[:, :, None] * wide * signs_of(found.columns)[:, None, :]
    total: Any = math.fsum if x.dtype == np.float64 else np.sum
    return np.array([total((wide * wide).ravel()), *(total(each.ravel()) for each in signed)])


def assert_near(found: Any, expected: Any, dtype: str) -> None:
    bound = resolution(dtype) * math.sqrt(expected[0])
    assert abs(math.sqrt(found[0]) - math.sqrt(expected[0])) <= bound
    assert np.abs(found[1:] - expected[1:]).max() <= bound


@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("kind", ["normal", "constant", "tiny", "huge"])
def test_sums_are_those_of_the_definition(sums: Callable[..., Any], dtype: str, kind: str) -> None:
    """To the resolution, all tensors in one call; squares also where those of float32 are 0 or infinite."""
    rng = np.random.default_rng(0)
    scale = {"tiny": 1e-7 if dtype == "float16" else 1e-30, "huge": 1e4 if dtype == "float16" else 1e30}.get(kind, 1.0)
    shapes = SHAPES + (LARGE if kind in ("normal", "constant") else [])
    arrays = [typed(np.full(s, 0.1) if kind == "constant" else rng.normal(size=s) * scale, dtype) for s in shapes]
    given = [codes(shape) for shape in shapes]
    found = sums(arrays, given)
    for x, each, row in zip(arrays, given, found, strict=True):
        assert_near(row, by_definition(x, each), dtype)
    assert np.array_equal(sums(arrays, given, 3), found), "the number of threads must not matter"


def test_all_halves_are_what_numpy_says(sums: Callable[..., Any]) -> None:
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    for x in (every[np.isfinite(every)], every[:1024], every[np.isfinite(every)][:63488].reshape(256, 248)):
        assert_near(sums([x], [codes(x.shape)])[0], by_definition(x, codes(x.shape)), "float16")


def test_axes_and_parts_are_as_in_numpy(sums: Callable[..., Any]) -> None:
    """Of a tensor in another order of axes, divided unevenly and with an empty part."""
    x = np.random.default_rng(1).normal(size=(40, 24, 9)).astype(np.float32)
    whole = by_definition(x, codes(x.shape))
    here, axes = np.ascontiguousarray(x.transpose(2, 0, 1)), (2, 0, 1)
    cuts = [(0, 17), (17, 17), (17, 40)]
    parts = [np.ascontiguousarray(here[:, b:e]) for b, e in cuts]
    given = [codes(part.shape, axes, offset=(0, b, 0)) for part, (b, _) in zip(parts, cuts, strict=True)]
    assert_near(sums(parts, given).sum(0), whole, "float32")
    assert_near(sums([here], [codes(here.shape, axes)])[0], whole, "float32")


@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows(sums: Callable[..., Any], dtype: str, value: float) -> None:
    """In every sum of its tensor, and in no other's."""
    arrays = [typed(np.ones(shape), dtype) for shape in [(300, 300), (1000,), (1, 700), (300, 300)]]
    for x in arrays[:3]:
        x.reshape(-1)[-1] = value
    found = sums(arrays, [codes(x.shape) for x in arrays])
    assert not np.isfinite(found[:3]).any()
    assert np.isfinite(found[3]).all()


def test_nothing_is_summed_of_nothing(sums: Callable[..., Any]) -> None:
    assert sums([], []).shape == (0, WIDTH)


@pytest.mark.parametrize("entries", [0, 10**9], ids=["native", "plain"])
def test_sketches_of_arrays_are_those_of_numpy(
    sums: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, entries: int
) -> None:
    """In any layout and type; twice, and of other arrays of the same shapes, whose codes are known by then."""
    monkeypatch.setattr(native, "ENTRIES", entries)
    sketches, rng = native.Sketcher(), np.random.default_rng(2)
    axes = [None, (1, 0), (2, 0, 1), None, None, None]
    for seed in range(2):
        x = rng.normal(size=(30, 40)).astype(np.float32)
        image, pairs = rng.normal(size=(4, 5, 6)), x[:3] + 1j * x[3:6]
        arrays = [x, np.asfortranarray(x), image.transpose(1, 2, 0)[:, ::2], pairs, np.arange(seed, 9), np.float32(3)]
        found = sketches(arrays, axes)
        for array, order, row in zip(arrays, axes, found, strict=True):
            expected = sketch(array, order)
            assert np.abs(row - expected).max() <= 2 * resolution(np.asarray(array).dtype.name) * expected[0]
    assert sketches([], []).shape == (0, WIDTH)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of libraries, which is empty; nothing is remembered of those before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "compiled", functools.cache(native.compiled.__wrapped__))
    return tmp_path / "cache" / "ada2ms"


@pytest.fixture
def compile_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Has a script do the compiler's work, $to being what it is to make; the lines of the file are its calls."""

    def given(script: str) -> Path:
        path, calls = tmp_path / "compiler", tmp_path / "calls"
        calls.touch()
        path.write_text(f'#!/bin/sh\nfor to; do :; done\necho "$@" >> "{calls}"\n{script}\n')
        path.chmod(0o755)
        monkeypatch.setenv("CXX", str(path))
        return calls

    return given


def count(calls: Path) -> int:
    return len(calls.read_text().splitlines())


def works() -> bool:
    """Whether a library was had, and sums."""
    x = np.ones((3, 3), np.float32)
    found = native.compiled()
    return found is not None and native.Sums()([x.ctypes.data], ["float32"], [codes(x.shape)], 1)[0, 0] == 9


def test_it_is_compiled_once_for_all_processes(made: Path, cache: Path, compile_by: Callable[[str], Path]) -> None:
    calls = compile_by(f'cp "{made}" "$to"')
    assert works()
    native.compiled.cache_clear()
    assert works()
    assert count(calls) == 1
    assert [path.suffix for path in cache.iterdir()] == [".so"]


def test_it_is_made_anew_when_what_it_includes_has_changed(
    made: Path, cache: Path, compile_by: Callable[[str], Path], tmp_path: Path
) -> None:
    calls, included = compile_by(f'cp "{made}" "$to"'), tmp_path / "x.h"
    for text in ("1", "1", "2"):
        included.write_text(text)
        assert native.built(native.SOURCE, [included], [tmp_path]) is not None
    assert count(calls) == 2
    assert f"-I{tmp_path}" in calls.read_text()


@pytest.mark.slow
def test_several_processes_at_once_have_it_all(made: Path, cache: Path, compile_by: Callable[[str], Path]) -> None:
    """Also if one of them is killed while it compiles."""
    calls = compile_by(f'sleep 1; cp "{made}" "$to"')
    code = "import test_trace_native as t; print(t.works())"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    command = [sys.executable, "-c", code]
    children = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    end = time.monotonic() + 100
    while count(calls) < 3 and time.monotonic() < end:
        time.sleep(0.02)
    children[0].send_signal(signal.SIGKILL)
    assert [child.communicate()[0].strip() for child in children] == ["", "True", "True"]
    assert works()
    assert count(calls) == 3


FORKED = """
import os, sys
import numpy as np
import torch
from ada2ms.core.trace import native

torch.set_num_threads(2)
torch.ones(2000, 2000).sum()  # by OpenMP's threads, of which a child has none
if not (child := os.fork()):
    torch.set_num_threads(1)
    native.Sketcher()([np.ones((2000, 2000), np.float32)], [None])
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_child_has_as_many_threads_as_torch_there() -> None:
    pytest.importorskip("torch")
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED], check=True, timeout=60)


@pytest.mark.parametrize("damage", [b"", b"no library", None], ids=["empty", "text", "half"])
def test_a_damaged_library_is_made_again(
    made: Path, cache: Path, compile_by: Callable[[str], Path], damage: bytes | None
) -> None:
    calls = compile_by(f'cp "{made}" "$to"')
    assert works()
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    kept.unlink()  # and not written over, for this process has it in its memory
    kept.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    native.compiled.cache_clear()
    assert works()
    assert count(calls) == 2
    assert kept.read_bytes() == whole


@pytest.mark.parametrize("place", ["a file", "read-only", "no home"])
def test_without_a_cache_each_process_compiles(
    made: Path, cache: Path, compile_by: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    calls = compile_by(f'cp "{made}" "$to"')
    if place == "a file":
        cache.parent.write_text("")
    elif place == "read-only":
        if os.geteuid() == 0:
            monkeypatch.setenv("XDG_CACHE_HOME", "/proc/self")  # where root cannot write either
        else:
            cache.parent.mkdir(mode=0o555)
    else:
        monkeypatch.setattr(native, "_cache", lambda: None)
    assert works()
    assert count(calls) == 1


@pytest.mark.parametrize("script", ["exit 1", "exec sleep 60", "", 'echo no library > "$to"'], ids=str)
def test_where_it_cannot_be_compiled_there_is_none(
    cache: Path, compile_by: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    """Because the compiler fails, takes for ever, or makes nothing that can be loaded; and it is not asked again."""
    monkeypatch.setattr(native, "_SECONDS", 0.3)
    calls, start = compile_by(script), time.monotonic()
    assert not native.is_available(native.ENTRIES)
    assert time.monotonic() - start < 30
    assert not native.is_available(native.ENTRIES)
    assert count(calls) == 1
    assert not list(cache.iterdir())


def test_without_a_compiler_there_is_none(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert not native.is_available(native.ENTRIES)
    monkeypatch.setenv("CXX", "/no/compiler -with=arguments")
    native.compiled.cache_clear()
    assert not native.is_available(native.ENTRIES)


def test_small_models_are_not_worth_a_compiler(cache: Path, compile_by: Callable[[str], Path]) -> None:
    calls = compile_by("exit 1")
    assert not native.is_available(native.ENTRIES - 1)
    assert count(calls) == 0


def test_libraries_of_other_machines_have_other_names(
    made: Path, cache: Path, compile_by: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = compile_by(f'cp "{made}" "$to"')
    for flags in (["-mavx2"], []):
        monkeypatch.setattr(native, "_instructions", lambda flags=flags: flags)
        native.compiled.cache_clear()
        assert works()
    assert len(list(cache.iterdir())) == 2
    assert [" -mavx2 " in call for call in calls.read_text().splitlines()] == [True, False]
