"""One framework in a process of its own, for `ada2ms check`: prints a JSON object a line.

A framework that crashes, or that is chosen once in a process as Keras' backend is, leaves the others alone.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final, TextIO

from ada2ms.conformance import rows, speed

_ROOMS: Final = {"torch": "torch", "jax": "jax", "keras": "tf"}
_KINDS: Final = {"torch": {"gpu": "cuda"}, "jax": {"cuda": "gpu"}, "keras": {"cuda": "gpu"}}  # by what others say


@dataclass(frozen=True)
class Task:
    """What a process is to do; `device` is any framework's name of one, or None for all that are there."""

    framework: str
    label: str
    device: str | None = None
    everything: bool = False
    speed: bool = False
    dtypes: tuple[str, ...] = ("float64", "float32")


def found_devices(task: Task, drive: Any) -> list[str]:
    """The framework's names of the devices to run on.

    Raises:
        LookupError: it does not see the device that is asked for.
    """
    there: list[str] = drive.devices()
    if task.device is None:
        return there
    kind, _, index = task.device.partition(":")
    kind = _KINDS[task.framework].get(kind, kind)
    if kind not in {device.partition(":")[0] for device in there}:
        raise LookupError(f"{task.label} sees no {task.device} here, but {', '.join(there)}")
    return [f"{kind}:{index}" if index else next(device for device in there if device.partition(":")[0] == kind)]


def work(task: Task) -> Iterator[dict[str, Any]]:
    """What to print: {"progress": text}, {"row": a row} and {"speed": a line of that table}."""
    if task.framework == "keras":
        with suppress(ImportError):
            import_module("triton")  # after TensorFlow, torch for CUDA crashes (tensorflow/tensorflow#124205)
    yield {"progress": f"importing {task.label}"}
    nothing = rows.Row(task.label, "", task.device or "", "", "")
    try:
        drive: Any = import_module(f"ada2ms.{_ROOMS[task.framework]}.drive")
        devices = found_devices(task, drive)
    except (ImportError, LookupError) as error:
        nothing.note = str(error).partition("\n")[0]
        yield {"row": nothing.data()}
        return

    def progress(text: str) -> None:
        say({"progress": text})

    for device in devices:
        for row in rows.rows(task.label, drive, device, task.dtypes, task.everything, progress):
            yield {"row": row.data()}
        if task.speed:
            for line in speed.lines(task.label, drive, device, progress):
                yield {"speed": line}


_OUTPUT: TextIO = sys.stdout


def say(what: dict[str, Any]) -> None:
    print(json.dumps(what), file=_OUTPUT, flush=True)


def main() -> None:
    """Reads a task as JSON from the standard input."""
    global _OUTPUT
    _OUTPUT, sys.stdout = sys.stdout, sys.stderr  # what a framework prints is no line of ours
    for what in work(Task(**json.loads(sys.stdin.readline()))):
        say(what)
