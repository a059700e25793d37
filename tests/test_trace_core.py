"""The sketch and the file of a trace: what they keep, and how well."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ada2ms.core.trace import Parameter, Step, Trace, TraceError, Writer
from ada2ms.core.trace.file import Appender
from ada2ms.core.trace.model import TENSORS, empty_sketches, fingerprint, positions, resolve, sample
from ada2ms.core.trace.sketch import RESOLUTION, SUMS, WIDTH, axis_signs, distance, resolution, signs, sketch

SHAPES = [(), (0,), (3, 0, 2), (1,), (5,), (4096,), (64, 33), (7, 3, 3, 16), (2, 1, 3)]


def by_definition(x: Any) -> np.ndarray:
    """The sketch as the docstring states it, entry by entry."""
    x = np.asarray(x)
    if np.iscomplexobj(x):
        x = np.stack([x.real, x.imag], -1)
    terms: list[list[float]] = [[] for _ in range(SUMS)]
    each = [axis_signs(k, 0, n) for k, n in enumerate(x.shape)]
    for index in np.ndindex(x.shape):
        for j in range(SUMS):
            terms[j].append(float(x[index]) * math.prod(int(each[k][j, i]) for k, i in enumerate(index)))
    return np.array([math.sqrt(math.fsum(t * t for t in terms[0])), *map(math.fsum, terms)])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "complex64"])
def test_a_sketch_is_what_it_says(shape: tuple[int, ...], dtype: str) -> None:
    """To sixteen units of the precision in which is summed, of the norm."""
    rng = np.random.default_rng(0)
    x = np.asarray(rng.normal(size=shape) + (1j * rng.normal(size=shape) if dtype == "complex64" else 0)).astype(dtype)
    expected = by_definition(x)
    assert np.abs(sketch(x) - expected).max() <= resolution(dtype) * expected[0]


@pytest.mark.parametrize(("shape", "axes"), [((64, 33), (1, 0)), ((7, 3, 3, 16), (3, 2, 0, 1)), ((2, 3, 5), (2, 0, 1))])
def test_the_order_of_axes_changes_nothing(shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
    x = np.random.default_rng(1).normal(size=shape)
    here = x.transpose(axes)
    expected = sketch(x)
    assert np.abs(sketch(here, axes) - expected).max() <= resolution("float64") * expected[0]
    assert distance(sketch(here), expected) > 0.3 * expected[0], "without axes it is another tensor"


def test_parts_of_a_tensor_add_up() -> None:
    """However it is divided, in whatever layout, also unevenly and with an empty part."""
    x = np.random.default_rng(2).normal(size=(10, 6, 3))
    whole = sketch(x)[1:]
    here, axes = x.transpose(2, 0, 1), (2, 0, 1)
    total = np.zeros(SUMS)
    for begin, end in ((0, 4), (4, 8), (8, 10), (10, 10)):
        part = here[:, begin:end, 1:]
        rest = here[:, begin:end, :1]
        for piece, offset in ((part, (0, begin, 1)), (rest, (0, begin, 0))):
            found = signs(piece.shape, axes, offset=offset)
            matrix = piece.reshape(found.rows.shape[1], found.columns.shape[1])
            total += ((found.rows @ matrix) * found.columns).sum(1)
    assert np.abs(total - whole).max() <= 1e-13 * np.linalg.norm(x)


def test_signs_are_fair_and_differ_between_sums_and_axes() -> None:
    """Means and correlations of 2^14 signs are within 5 standard deviations of 0."""
    n = 2**14
    each = np.concatenate([axis_signs(axis, 0, n) for axis in range(3)]).astype(np.float64)
    assert np.abs(each.mean(1)).max() < 5 / np.sqrt(n)
    assert np.abs(each @ each.T / n - np.eye(3 * SUMS)).max() < 5 / np.sqrt(n)
    shifted = each[:, 1:] * each[:, :-1]
    assert np.abs(shifted.mean(1)).max() < 5 / np.sqrt(n)
    assert np.array_equal(axis_signs(1, 100, 200), axis_signs(1, 0, 300)[:, 100:200])
    assert axis_signs(0, 2**32 - 1, 2**32 + 1).shape == (SUMS, 2)


@pytest.mark.parametrize("kind", ["dense", "one entry", "rank one", "one row"])
def test_distances_are_estimated_within_a_factor(kind: str) -> None:
    """Over 200 pairs: a median within 30 %, and all but a few between a quarter and four times."""
    rng = np.random.default_rng(3)
    ratios = []
    for _ in range(200):
        x = rng.normal(size=(48, 40))
        delta = np.zeros_like(x)
        if kind == "dense":
            delta = 1e-3 * rng.normal(size=x.shape)
        elif kind == "one entry":
            delta[rng.integers(48), rng.integers(40)] = 0.1
        elif kind == "rank one":
            delta = 1e-3 * np.outer(rng.normal(size=48), rng.normal(size=40))
        else:
            delta[rng.integers(48)] = rng.normal(size=40)
        ratios.append(float(distance(sketch(x), sketch(x + delta))) / np.linalg.norm(delta))
    assert 0.7 < np.median(ratios) < 1.3
    assert np.mean([0.25 < r < 4 for r in ratios]) > 0.97


@pytest.mark.parametrize("shape", [(600_000,), (16384, 64), (3, 3, 96, 96)], ids=str)
def test_the_resolution_is_kept_for_large_tensors(shape: tuple[int, ...]) -> None:
    """A float32 tensor with a mean, which sums worst, against the same in float64."""
    x = (np.random.default_rng(4).normal(size=shape) + 1).astype(np.float32)
    expected = sketch(x.astype(np.float64))
    assert np.abs(sketch(x) - expected).max() <= RESOLUTION * np.finfo(np.float32).eps * expected[0]


def test_what_is_not_finite_shows() -> None:
    x = np.ones((4, 4), np.float32)
    x[1, 2] = np.nan
    assert np.isnan(sketch(x)).all()
    x[1, 2] = np.inf
    assert not np.isfinite(sketch(x)).any()


def test_bfloat16_is_summed_in_float32() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = np.random.default_rng(5).normal(size=(300, 20)).astype(ml_dtypes.bfloat16)
    assert np.array_equal(sketch(x), sketch(x.astype(np.float32)))


def step(number: int, count: int = 2, **given: Any) -> Step:
    rng = np.random.default_rng(number)
    sketches = {what: rng.normal(size=(count, WIDTH)) for what in TENSORS}
    return Step(number=0, sketches=sketches, missing=np.array([number % 2 == 0] * count), **given)


PARAMETERS = [Parameter("a", "A", (2, 3), "float32", (1, 0), 0), Parameter("b/c", "B", (), "bfloat16")]


def written(path: Path, steps: int, **options: Any) -> Writer:
    writer = Writer(path, **options)
    writer.begin({"framework": "none"}, PARAMETERS)
    for i in range(1, steps + 1):
        writer.batch([np.arange(6.0).reshape(2, 3) * i])
        writer.loss(lambda i=i: 1.0 / i)
        full = {"value": {"b/c": np.float32([i]), "a": np.ones((2, 3), np.float32)}} if i <= writer.full else {}
        writer.add(step(i, hyper=[{"lr": 0.1 / i}], extra={"s": 2.0}, full=full))
        if writer.is_due:
            writer.flush()
    return writer


def test_a_trace_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "run.trace"
    written(path, 5, flush=2, full=2).close()
    trace = Trace.load(path)
    assert trace.complete
    assert trace.parameters == PARAMETERS
    assert trace.about == {"framework": "none", "full": 2, "entries": 65536}
    assert [s.number for s in trace.steps] == [1, 2, 3, 4, 5]
    for i, found in enumerate(trace.steps, 1):
        expected = step(i)
        for what in TENSORS:
            assert np.array_equal(found.sketches[what], expected.sketches[what])
        assert np.array_equal(found.missing, expected.missing)
        assert (found.loss, found.losses, found.hyper, found.extra) == (1 / i, 1, [{"lr": 0.1 / i}], {"s": 2.0})
        assert found.batches == [[fingerprint(np.arange(6.0).reshape(2, 3) * i)]]
        assert set(found.full) == ({"value"} if i <= 2 else set())
    assert trace.steps[1].full["value"]["b/c"] == np.float32([2])
    assert trace.index == {"a": 0, "b/c": 1}


KILLED = """
import sys
sys.path.insert(0, "tests")
from pathlib import Path
from test_trace_core import written
writer = written(Path(sys.argv[1]), 7, flush=3)
print("ready", flush=True)
time.sleep(60)
"""


def test_a_killed_run_is_readable_up_to_its_last_flush(tmp_path: Path) -> None:
    path = tmp_path / "run.trace"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)],
        stdout=subprocess.PIPE,
        env=environment,
        cwd=Path(__file__).parents[1],
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGKILL)
    trace = Trace.load(path)
    assert [s.number for s in trace.steps] == [1, 2, 3, 4, 5, 6]
    assert not trace.complete


def test_a_file_cut_anywhere_is_readable_up_to_there(tmp_path: Path) -> None:
    """Or, cut before anything was written, refused with the reason."""
    whole, path = tmp_path / "whole", tmp_path / "cut"
    written(whole, 4, flush=1).close()
    data = whole.read_bytes()
    first = 15 + 20 + int.from_bytes(data[15 + 8 : 15 + 16], "little") + 32  # where the first chunk ends
    counts: list[int] = []
    for end in range(0, len(data), 97):
        path.write_bytes(data[:end])
        if not counts and end < first:
            with pytest.raises(TraceError, match=r"before anything|no trace|version"):
                Trace.load(path)
            continue
        trace = Trace.load(path)
        counts.append(len(trace.steps))
        assert not trace.complete
    assert counts == sorted(counts)
    assert set(counts) >= {0, 1, 2, 3}


def test_damage_is_refused_wherever_it_is(tmp_path: Path) -> None:
    """One flipped bit: an error that says so, never other numbers."""
    path = tmp_path / "run.trace"
    written(path, 2, flush=1).close()
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    for at in [*range(15, 40), *rng.integers(15, len(data), 150)]:
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1 :])
        with pytest.raises(TraceError, match="damaged"):
            Trace.load(path)
    path.write_bytes(data[:200] + data[300:])
    with pytest.raises(TraceError, match="damaged"):
        Trace.load(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"ada2ms-trace 2\n", r"its version is '2' \(readable: 1\)"),
        (b"PK\x03\x04 something", "it is no trace of ada2ms"),
        (b"", "it is no trace of ada2ms"),
        (b"ada2ms-trace 1\n", "before anything of it was written"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(TraceError, match=reason):
        Trace.load(path)
    with pytest.raises(FileNotFoundError, match="There is no file"):
        Trace.load(tmp_path / "none")


def test_no_other_file_is_overwritten_and_arguments_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="that is no trace"):
        Writer(path)
    assert path.read_bytes() == b"precious"
    for name, value in (("full", -1), ("entries", 0), ("flush", True), ("full", 1.5)):
        with pytest.raises(ValueError, match=f"Invalid {name}: {value!r}"):
            Writer(tmp_path / "run", **{name: value})
    written(tmp_path / "run", 3).close()
    written(tmp_path / "run", 1).close()
    assert len(Trace.load(tmp_path / "run").steps) == 1


def test_names_and_axes_are_resolved_and_what_does_not_fit_is_listed() -> None:
    shapes: dict[str, Any] = {"w": ((8, 3, 5, 5), "float32", 0), "b": ((8,), "float32", 1)}
    found = resolve(shapes, {"w": "0.conv.kernel"}, {"w": (3, 2, 0, 1)})
    assert found[0] == Parameter("0.conv.kernel", "w", (5, 5, 3, 8), "float32", (3, 2, 0, 1), 0)
    assert found[1] == Parameter("b", "b", (8,), "float32", None, 1)
    x = np.arange(600.0).reshape(5, 5, 3, 8)
    assert np.array_equal(sample(x.transpose(3, 2, 0, 1), found[0], 10**6), x)
    assert np.array_equal(sample(x.transpose(3, 2, 0, 1), found[0], 7), x.reshape(-1)[positions(600, 7)])
    assert positions(5, 10).tolist() == [0, 1, 2, 3, 4]
    assert resolve(shapes, lambda own: own.upper(), None)[1].name == "B"
    with pytest.raises(TraceError) as error:
        resolve({**shapes, "c": ((2,), "float32", 0)}, {"x": "y", "w": "c"}, {"z": (0,), "b": (1,)})
    for reason in ("no parameter 'x'", "no parameter 'z'", "['w', 'c'] are all called 'c'", "no order of its 1 axes"):
        assert reason in str(error.value)
    assert resolve(shapes, {"x": "y"}, {"x": (0,)}, others=["x"])[0].name == "w"


def test_fingerprints_tell_order_from_content() -> None:
    rng = np.random.default_rng(6)
    x = rng.normal(size=(8, 3, 4, 4)).astype(np.float32)
    by_sample = slice(4, 4 + 2 * SUMS)
    same, other_layout, other_order = (np.array(fingerprint(y)) for y in (x, x.transpose(0, 2, 3, 1), x[::-1]))
    assert np.allclose(other_layout[:4], same[:4], rtol=1e-6)
    assert np.allclose(other_layout[by_sample], same[by_sample], rtol=1e-5, atol=1e-4)
    assert np.allclose(other_order[:4], same[:4], rtol=1e-6)
    assert not np.allclose(other_order[by_sample], same[by_sample], rtol=1e-2)
    assert np.allclose(fingerprint(x.astype(np.float64)), same, rtol=1e-5, atol=1e-4)
    assert fingerprint(np.array([3, 1])) == fingerprint(np.array([3.0, 1.0]))
    assert fingerprint(2.0)[:4] == [1.0, 1.0, 2.0, 4.0]
    assert json.loads(json.dumps(fingerprint(np.zeros((0, 3)))))[:4] == [0, 0, 0, 0]


def test_a_chunk_is_in_the_layout_of_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "run.trace"
    written(path, 1).close()
    data = path.read_bytes()
    begin, length = 15 + 20, int.from_bytes(data[15 + 8 : 15 + 16], "little")
    second = begin + length + 32 + 20
    length = int.from_bytes(data[second - 12 : second - 4], "little")
    assert set(safetensors.load(data[second : second + length])) >= {*TENSORS, "missing"}


def test_the_pieces_of_a_trace_stand_for_themselves() -> None:
    assert replace(PARAMETERS[0], dtype="complex64").size == 12
    assert np.isnan(empty_sketches(2)["value"]).all()


def test_what_a_trace_does_not_have_is_refused_though_its_checksums_are_right(tmp_path: Path) -> None:
    """Such as of a later version that forgot to say so, or of another program."""
    path = tmp_path / "run.trace"
    contents: list[dict[str, Any]] = [{"framework": "none"}, {"parameters": [{"name": "a"}]}, {"parameters": 3}]
    for content in contents:
        appender = Appender(path)
        appender.append(content, {})
        appender.close()
        with pytest.raises(TraceError, match="what is written in it is not what a trace has"):
            Trace.load(path)
    appender = Appender(path)
    appender.append({"parameters": []}, {})
    appender.append({"steps": [{"number": 1, "colour": "red"}], "complete": True}, {"missing": np.zeros((1, 0), bool)})
    appender.close()
    with pytest.raises(TraceError, match="what is written in it is not what a trace has"):
        Trace.load(path)
