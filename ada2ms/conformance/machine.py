"""Runs the golden vectors in whatever of the frameworks is installed, each in a process of its own."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from typing import Any, Final

import numpy as np

from ada2ms.conformance import rows, rule
from ada2ms.conformance.rows import Row
from ada2ms.conformance.worker import Task
from ada2ms.core.cases import Path

FRAMEWORKS: Final = {"torch": ("torch",), "keras": ("keras",), "jax": ("jax", "optax")}  # and what each needs
KERAS_BACKENDS: Final = ("tensorflow", "jax", "torch")
_EXTRAS: Final = {"torch": "torch", "keras": "tf", "jax": "jax"}
# The path of imports is that of this process, so that the same package is judged, however it was found.
_BOOT: Final = "import sys; sys.path[:] = {path!r}; from ada2ms.conformance.worker import main; main()"


@dataclass
class Outcome:
    """What came of a run over this machine.

    Attributes:
        rows: of the vectors.
        speeds: lines of the table of speed.
        absent: frameworks that are not installed, with the reason.
    """

    rows: list[Row] = field(default_factory=list)
    speeds: list[dict[str, Any]] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)

    @property
    def off(self) -> list[Row]:
        return [row for row in self.rows if row.off]

    def status(self, asked: Sequence[str] = ()) -> int:
        """0 all right, 1 something is off, 2 nothing could be run, or nothing of a framework that is asked for."""
        if self.off:
            return 1
        ran = {row.framework.partition(" ")[0] for row in self.rows if row.ran} - {"numpy"}
        return 2 if not ran or set(asked) - ran else 0


def missing(framework: str) -> str:
    """Why a framework cannot be run; "" if it is installed."""
    absent = [module for module in FRAMEWORKS[framework] if find_spec(module) is None]
    if absent:
        return f"{', '.join(absent)} not installed: pip install 'ada2ms[{_EXTRAS[framework]}]'"
    if framework == "keras" and not any(map(find_spec, KERAS_BACKENDS)):
        return f"no backend of Keras is installed ({', '.join(KERAS_BACKENDS)})"
    return ""


def tasks(frameworks: Sequence[str], device: str | None, everything: bool, speed: bool) -> Iterator[Task]:
    """What there is to do, the dearest first."""
    for framework in sorted(frameworks, key=lambda name: ("keras", "jax", "torch").index(name)):
        backends = [name for name in KERAS_BACKENDS if find_spec(name)] if framework == "keras" else [""]
        for backend in backends:
            label = f"keras on {backend}" if backend else framework
            yield Task(framework, label, device, everything, speed)


def environment(task: Task) -> dict[str, str]:
    """That of a task's process: Keras' backend, and what lets several processes share the GPU and the cores."""
    found = {
        **({} if task.speed else {"OMP_NUM_THREADS": "1"}),
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "TF_FORCE_GPU_ALLOW_GROWTH": "true",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        **os.environ,
    }
    if task.framework == "keras":
        found["KERAS_BACKEND"] = task.label.rpartition(" ")[2]
    return found


def perform(task: Task, outcome: Outcome, progress: rows.Progress) -> None:
    """Runs a task in a process, and adds what it says to the outcome."""
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, "-c", _BOOT.format(path=sys.path)]
        with subprocess.Popen(
            command,
            env=environment(task),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(asdict(task)) + "\n")
            process.stdin.close()
            for line in process.stdout:
                what = json.loads(line)
                progress(what["progress"]) if "progress" in what else found.append(what)
        errors.seek(0)
        said = errors.read().strip().splitlines()
    outcome.rows += [Row(**what["row"]) for what in found if "row" in what]
    outcome.speeds += [what["speed"] for what in found if "speed" in what]
    if process.returncode:
        reason = f"the process ended with status {process.returncode}: {said[-1] if said else 'it said nothing'}"
        outcome.rows.append(Row(task.label, "", task.device or "", "", "", off=[reason], wrong=1))


def the_rule(progress: rows.Progress) -> list[Row]:
    """The rule itself, in NumPy: whether this machine's arithmetic is what it is taken for."""
    path = Path("the rule itself", rule.replay)
    made = [Row("numpy", np.__version__, "cpu", path.name, dtype) for dtype in ("float64", "float32")]
    return [rows.run(row, path, True, progress) for row in made]


def run(
    frameworks: Sequence[str],
    device: str | None = None,
    everything: bool = False,
    speed: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """The rule itself in NumPy, and every framework that is installed, on every device.

    Args:
        frameworks: "torch", "keras", "jax".
        device: only this one, by any framework's name, such as "cpu", "cuda:1", "gpu" or "mps".
        everything: all cases by all paths.
        speed: also how long a step takes beside the framework's AdamW; nothing else runs beside it.
        progress: told what is being done.
    """
    outcome = Outcome(absent={name: reason for name in frameworks if (reason := missing(name))})
    todo = list(tasks([name for name in frameworks if name not in outcome.absent], device, everything, speed))
    cores = os.cpu_count() or 1
    if len(todo) < cores and not speed:  # each precision is compiled apart anyway
        todo = [replace(task, dtypes=(dtype,)) for task in todo for dtype in task.dtypes]
    parts = {task: Outcome() for task in todo}
    with ThreadPoolExecutor(1 if speed else cores) as pool:
        running = [pool.submit(perform, task, part, progress) for task, part in parts.items()]
        outcome.rows += pool.submit(the_rule, progress).result()
        for done in running:
            done.result()
    order = {name: i for i, name in enumerate(frameworks)}
    for task in sorted(todo, key=lambda task: order[task.framework]):
        outcome.rows += parts[task].rows
        outcome.speeds += parts[task].speeds
    return outcome
