"""`ada2ms check`: right where it is right, and a wrong kernel, a crash, a missing framework or device shows."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import variants
from mutation import MUTANTS, mutate, rejection

import ada2ms
from ada2ms.cli import check, main
from ada2ms.conformance import machine, rows, rule, worker
from ada2ms.conformance.known import variants as known_variants
from ada2ms.conformance.rows import Row
from ada2ms.conformance.worker import Task
from ada2ms.core import cases, golden

ALL = golden.load()


# Which cases are run.


def test_the_named_variants_are_those_of_today() -> None:
    assert known_variants()["named"] == variants.named(), "python tests/variants.py --write"
    _, table, _ = variants.split(variants.PAGE.read_text(encoding="utf-8"))
    assert table == variants.table(variants.named()), "python tests/variants.py --write"


def test_the_cover_tells_every_variant() -> None:
    """By the case under which a variant stands; so that a path that runs these alone tells it as well."""
    cover, by_id = known_variants()["cover"], {case.id: case for case in ALL}
    told = {name: by_id[case] for case, names in cover.items() for name in names}
    assert set(told) == {mutant.name for mutant in MUTANTS}
    for mutant in MUTANTS:
        assert rejection(mutate(*mutant.edits), told[mutant.name]), mutant.name
    assert all(cases.factors(by_id[case]) is not None for case in cover), "JAX and Keras cannot state it"


def test_what_a_path_is_asked_for() -> None:
    cover = set(known_variants()["cover"])
    paths: list[cases.Path] = [cases.Path("x", share=x) for x in ("all", "cover", "once", "few", "none")]
    found = {path.share: rows.chosen(path, "float64", False) for path in paths}
    assert all(rows.chosen(path, "float64", True) == list(ALL) for path in paths)
    assert found["all"] == list(ALL)
    assert found["once"] == found["few"]
    assert rows.chosen(paths[2], "float32", False) == found["cover"]
    assert found["none"] == []
    assert {case.id for case in found["cover"]} == cover
    assert 0 < len(found["few"]) <= rows.FEW
    assert {case.id for case in found["few"]} <= cover


# Rows.


def rule_row(replay: Any = rule.replay, dtype: str = "float64", **options: Any) -> Row:
    path = cases.Path("the rule", replay, **options)
    return rows.run(Row("numpy", "2", "cpu", path.name, dtype), path, False)


def test_a_row_of_what_is_right() -> None:
    row = rule_row()
    assert (row.off, row.note, row.wrong) == ([], "", 0)
    assert row.worst is not None
    assert 0 < row.worst < row.bound
    assert row.of == sum("float64" in cases.precisions(case) for case in ALL) > row.cases > 0
    assert rule_row(dtype="float32").bound == 8


def test_a_row_of_what_is_off() -> None:
    """Every case is still run; the first three are told."""
    module = mutate(*next(mutant.edits for mutant in MUTANTS if mutant.name == "no eps"))
    near = [case for case in ALL if case.id.startswith("magnitudes/eps-near")]

    def replay(case: golden.Case, dtype: str, device: str) -> Any:
        from mutation import replay as replayed

        return replayed(module if case in near else mutate(), case, dtype)

    row = rule_row(replay, share="all")
    assert row.wrong == len(near) > 0
    assert row.off[0].startswith("magnitudes/eps-near")
    assert row.cases == row.of
    assert len(row.off) <= 3


def test_a_row_of_what_raises_and_of_what_cannot_be_stated() -> None:
    def replay(case: golden.Case, dtype: str, device: str) -> Any:
        if case.id.startswith("clip"):
            raise cases.NotStated("no clipping here")
        raise RuntimeError("no kernel\nfor this")

    row = rule_row(replay)
    assert row.note.endswith("cases that it cannot state: no clipping here")
    assert row.wrong == row.cases > 0
    assert row.off[0].endswith(": raised RuntimeError: no kernel")
    assert "Infinity" not in json.dumps(row.data())


def test_a_row_of_what_cannot_be_had() -> None:
    row = rows.run(Row("torch", "2", "mps", "fused", "float32"), cases.Path("fused", reason="is for cpu"), False)
    assert (row.ran, row.off, row.note) == (False, [], "is for cpu")
    row = rule_row(share="none")
    assert (row.ran, row.off, row.note) == (False, [], "takes long; --all runs it")


def test_a_captured_step_goes_by_the_buffers_of_its_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a graph that captures nothing and replays by a step, which is what one on CUDA comes to."""
    torch = pytest.importorskip("torch")
    from ada2ms.torch import drive

    class Graph:
        replayed = 0
        step: Any

        def replay(self) -> None:
            Graph.replayed += 1
            self.step()

    class Capture:
        def __init__(self, graph: Graph) -> None:
            run = running[-1]
            graph.step = run.optimizer.step
            self.tensors = [*run.parameters, *(x for state in run.optimizer.state.values() for x in state.values())]

        def __enter__(self) -> None:
            self.before = [x.detach().clone() for x in self.tensors]

        def __exit__(self, *_: object) -> None:
            with torch.no_grad():
                for x, value in zip(self.tensors, self.before, strict=True):
                    x.copy_(value)

    class Captured(drive.Captured):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            running.append(self)

    running: list[Captured] = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(drive, "Captured", Captured)
    row = rule_row(drive.replay(drive.Captured, capturable=True))
    assert (row.off, row.wrong) == ([], 0)
    assert Graph.replayed > row.cases


# A machine's status.


def test_the_status() -> None:
    ran, off = (Row("torch", "2", "cpu", "foreach", "float64", cases=5, off=x) for x in ([], ["clip/never-model: off"]))
    alone = Row("numpy", "2", "cpu", "the rule itself", "float64", cases=5)
    not_run = Row("keras on jax", "3", "cpu", "x", "float64", note="cannot be imported")
    assert machine.Outcome([alone, ran, not_run]).status() == 0
    assert machine.Outcome([alone, ran, off]).status() == 1
    assert machine.Outcome([alone, not_run]).status() == 2
    assert machine.Outcome([alone, ran, not_run]).status(["torch"]) == 0
    assert machine.Outcome([alone, ran, not_run]).status(["torch", "keras"]) == 2


@pytest.mark.parametrize(
    ("cores", "speed", "processes"), [(1, False, 1), (2, False, 2), (2, True, 1), (None, False, 1)]
)
def test_a_framework_alone_takes_two_cores(
    cores: int | None, speed: bool, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Task] = []
    monkeypatch.setattr(machine.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(machine, "find_spec", lambda name: name)
    monkeypatch.setattr(machine, "the_rule", lambda progress: [])
    monkeypatch.setattr(machine, "perform", lambda task, outcome, progress: done.append(task))
    machine.run(["torch"], speed=speed)
    assert len(done) == processes
    assert sorted(dtype for task in done for dtype in task.dtypes) == ["float32", "float64"]


def test_keras_runs_on_each_of_its_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "find_spec", lambda name: name if name != "torch" else None)
    found = list(machine.tasks(["jax", "keras"], None, False, False))
    assert [task.label for task in found] == ["keras on tensorflow", "keras on jax", "jax"]
    assert machine.environment(found[1])["KERAS_BACKEND"] == "jax"


def test_a_framework_that_is_not_installed_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    assert main(["check"]) == 2
    said = capsys.readouterr().out
    assert "Not run: torch: torch not installed: pip install 'ada2ms[torch]'" in said
    assert "Not run: jax: jax, optax not installed: pip install 'ada2ms[jax]'" in said
    assert "Cannot tell" in said


def test_a_device_that_there_is_not() -> None:
    [row] = [x["row"] for x in worker.work(Task("torch", "torch", "tpu")) if "row" in x]
    assert row["note"].startswith("torch sees no tpu here, but cpu")


@pytest.mark.parametrize("text", ["cpu:x", "", "cuda:", "GPU 1"])
def test_what_is_no_device(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["check", "--device", text])
    assert exited.value.code == 2
    assert f"Invalid device: {text!r} (must be a kind, or kind:number, such as cuda:1)" in capsys.readouterr().err


def test_a_number_that_no_device_has() -> None:
    pytest.importorskip("jax")
    from ada2ms.jax import drive

    assert drive.lacks("cpu", "float64") == drive.lacks("cpu:0", "float32") == ""
    assert drive.lacks("cpu:99", "float32").startswith("there is no cpu:99: JAX sees ")


@pytest.mark.keras
def test_a_number_that_no_device_of_keras_has() -> None:
    from ada2ms.tf import drive

    assert drive.lacks("cpu", "float64") == ""
    if keras_backend() != "torch":  # which has one CPU, by any number
        assert drive.lacks("cpu:99", "float32").startswith("there is no cpu:99 ")


def keras_backend() -> str:
    import keras

    return str(keras.backend.backend())


def test_devices_by_the_words_of_other_frameworks() -> None:
    class Drive:
        @staticmethod
        def devices() -> list[str]:
            return ["cpu", "gpu:0"]

    assert worker.found_devices(Task("keras", "keras on jax", "cuda"), Drive) == ["gpu:0"]
    assert worker.found_devices(Task("keras", "keras on jax", "cuda:1"), Drive) == ["gpu:1"]
    assert worker.found_devices(Task("keras", "keras on jax"), Drive) == ["cpu", "gpu:0"]
    with pytest.raises(LookupError, match="sees no mps"):
        worker.found_devices(Task("keras", "keras on jax", "mps"), Drive)


# The command.


def broken(folder: Path, file: str, *edits: tuple[str, str]) -> Path:
    """A copy of the package in a folder, with pieces of a file, each found there once, replaced."""
    package = Path(ada2ms.__file__).parent
    shutil.copytree(package, folder / "ada2ms", ignore=shutil.ignore_patterns("__pycache__"))
    source = (folder / "ada2ms" / file).read_text()
    for old, new in edits:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    (folder / "ada2ms" / file).write_text(source)
    return folder


def command(folder: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """The exit status and the JSON of `ada2ms check` in a process, with the package of that folder."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
    arguments = [sys.executable, "-m", "ada2ms", "check", "--json", *options]
    done = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1, 2), done.stderr
    return done.returncode, json.loads(done.stdout)


def test_a_wrong_kernel_shows_and_what_cannot_be_had_is_a_row(tmp_path: Path) -> None:
    """Eps left out in one path of torch: that path is off, and no other."""
    folder = broken(tmp_path, "torch/kernels/foreach.py", ("    torch._foreach_add_(d, coefficients.eps)\n", ""))
    (folder / "ada2ms" / "torch" / "kernels" / "fused_cpu.cpp").unlink()
    drive = folder / "ada2ms" / "torch" / "drive.py"
    drive.write_text(drive.read_text().replace('"all"', '"cover"'))
    status, found = command(folder, "--framework", "torch", "--device", "cpu")
    assert (status, found["status"]) == (1, 1)
    by_path = {(row["path"], row["dtype"]): Row(**row) for row in found["rows"] if row["framework"] == "torch"}
    assert {path for path, _ in by_path} == {"for-loop", "foreach", "fused", "capturable"}
    assert {path for path, row in by_path.items() if row.off} == {("foreach", "float64"), ("foreach", "float32")}
    assert "is off by" in by_path["foreach", "float64"].off[0]
    for (path, _), row in by_path.items():
        assert row.ran is (path != "fused")
        assert bool(row.note) is (path == "fused")
    assert "which failed" in by_path["fused", "float64"].note
    text = "\n".join(check.table(list(by_path.values())))
    assert "18 of 180  OFF" in text
    assert "fused       float32    not run" in text
    assert "OFF  torch cpu foreach float64: " in "\n".join(check.notes(list(by_path.values()), False))


@pytest.mark.slow
@pytest.mark.timeout(900)  # beside others; alone it takes a minute
def test_every_framework_is_right(tmp_path: Path) -> None:
    """By all that is installed here, and with speed."""
    status, found = command(Path(ada2ms.__file__).parents[1], "--speed", "--device", "cpu")
    assert status == 0
    ran = {row["framework"] for row in found["rows"] if row["cases"]}
    assert ran == {"numpy", "torch", "keras on tensorflow", "keras on jax", "keras on torch", "jax"}
    assert {line["framework"] for line in found["speed"]} == ran - {"numpy"}
    assert all(0.1 < line["ratio"] < 10 for line in found["speed"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("framework", "file", "edit", "off"),
    [
        ("jax", "jax/kernels/leaf.py", ("b1 * m + one_minus_b1 * g", "b1 * m + g"), {"jax"}),
        (
            "keras",  # on torch it has a kernel of its own
            "tf/kernels/ops.py",
            ("theta * cast(coefficients.decay_factor, dtype)", "theta"),
            {"keras on tensorflow", "keras on jax"},
        ),
    ],
)
def test_a_wrong_kernel_shows(framework: str, file: str, edit: tuple[str, str], off: set[str], tmp_path: Path) -> None:
    status, found = command(broken(tmp_path, file, edit), "--framework", framework)
    assert status == 1
    for row in found["rows"]:
        assert bool(row["off"]) is (row["cases"] > 0 and row["framework"] in off), row


def test_a_process_that_dies_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what it said before is not lost."""
    row = json.dumps({"row": Row("torch", "2", "cpu", "for-loop", "float64", cases=3).data()})
    boot = f"import os, sys; print({row!r}, flush=True); print('bad kernel', file=sys.stderr, flush=True); os.abort()"
    monkeypatch.setattr(machine, "_BOOT", boot.replace("{", "{{").replace("}", "}}"))
    outcome = machine.Outcome()
    machine.perform(Task("torch", "torch"), outcome, lambda _: None)
    assert outcome.rows[0].cases == 3
    assert outcome.status() == 1
    assert outcome.off[0].off == ["the process ended with status -6: bad kernel"]
