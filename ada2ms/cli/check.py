"""`ada2ms check`: does it compute what it says, on this machine?

Replays the golden vectors, optimizer runs with results of 50 digits, in every framework that is installed, on every
device that is there, by every path, and prints how far each is off, in epsilons of its precision. The bounds leave room
for rounding and for nothing else. Exit status 0: all right; 1: something is off; 2: nothing could be run, or nothing of
what --framework asks for.

Paths that take long, such as those that are compiled for each case, run the cases that together tell every known wrong
variant of the rule; where each operation is dispatched by itself, three of them. --all runs all cases by all paths.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ada2ms.cli.arguments import reported
from ada2ms.conformance.rows import Row


def add(commands: Any) -> None:
    """Adds `check` to the command line."""
    command = commands.add_parser(
        "check",
        help="replay the golden vectors in every installed framework, on every device",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=reported(run, ValueError))
    command.add_argument(
        "--framework",
        action="append",
        choices=("torch", "keras", "jax"),
        help="one of them; may be given several times (default: those installed)",
    )
    command.add_argument(
        "--device",
        type=device,
        help="only this one, such as cpu, cuda, cuda:1, mps, xpu or tpu (default: all that are there)",
    )
    command.add_argument("--all", action="store_true", help="every case by every path, which may take many minutes")
    command.add_argument(
        "--speed", action="store_true", help="also a step's time beside the framework's own AdamW, in interleaved turns"
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of the table")


def device(text: str) -> str:
    """A kind of device, and the number of one of them."""
    if not re.fullmatch(r"[a-z]+(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"Invalid device: {text!r} (must be a kind, or kind:number, such as cuda:1)")
    return text


def run(arguments: argparse.Namespace) -> int:
    """Checks this machine and prints a table; the exit status says what came of it."""
    from ada2ms.conformance import machine

    asked = list(dict.fromkeys(arguments.framework or []))
    shown = _Progress()
    try:
        outcome = machine.run(
            asked or list(machine.FRAMEWORKS), arguments.device, arguments.all, arguments.speed, shown.tell
        )
    except KeyboardInterrupt:
        print("Stopped", file=sys.stderr)
        return 130
    finally:
        shown.end()
    status = outcome.status(asked)
    if arguments.json:
        rows = [row.data() for row in outcome.rows]
        print(json.dumps({"status": status, "rows": rows, "speed": outcome.speeds, "absent": outcome.absent}, indent=1))
        return status
    print("\n".join([*table(outcome.rows), "", *notes(outcome.rows, arguments.all)]))
    if outcome.speeds:
        print("\n".join(["", *speeds(outcome.speeds)]))
    for name, reason in outcome.absent.items():
        print(f"Not run: {name}: {reason}")
    print(_VERDICTS[status])
    return status


_VERDICTS = {
    0: "All right: what ran computes the rule.",
    1: "OFF: something does not compute the rule; it is named above.",
    2: "Cannot tell: nothing could be run of what was to be.",
}


def cells(row: Row) -> list[str]:
    """A row of the table as text."""
    name = f"{row.framework.partition(' ')[0]} {row.version}" if row.version else row.framework
    found = [name, row.device, row.path, row.dtype]
    if row.off and not row.ran:
        return [*found, "", "OFF", "", ""]
    if not row.ran:
        return [*found, "not run", "", "", ""]
    unit = "" if row.dtype == "float64" else " a step"
    worst = "OFF" if row.off else f"{row.worst:.3g}"
    return [*found, f"{row.cases} of {row.of}", worst, f"{row.bound:.0f}{unit}", f"{row.seconds:.1f}"]


HEADER = ["framework", "device", "path", "precision", "cases", "epsilons off", "bound", "seconds"]


def table(rows: Sequence[Row]) -> list[str]:
    """The lines of the table, in columns."""
    return columns([HEADER, *map(cells, rows)])


def columns(lines: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(f"{x:{width}}" for x, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def notes(rows: Sequence[Row], everything: bool) -> list[str]:
    """What is off, and why something was not run."""
    found = []
    for row in rows:
        where = " ".join(filter(None, [row.framework, row.device, row.path, row.dtype]))
        found += [f"OFF  {where}: {reason}" for reason in row.off]
        if row.wrong > len(row.off):
            found.append(f"OFF  {where}: and {row.wrong - len(row.off)} cases more")
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.note:
            where = " ".join(filter(None, [row.framework, row.device, "" if row.ran else row.path]))
            reasons.setdefault(row.note, []).append(where)
    found += [f"Not run in {', '.join(dict.fromkeys(wheres))}: {reason}." for reason, wheres in reasons.items()]
    if not everything and any(row.ran and row.cases < row.of / 2 for row in rows):
        found.append(
            "Paths that take long run those cases that tell every known wrong variant, or three; --all runs all."
        )
    return found


def speeds(lines: Sequence[dict[str, Any]]) -> list[str]:
    """The table of speed."""
    header = ["framework", "device", "path", "ms a step", "AdamW", "ratio"]
    return columns(
        [header]
        + [
            [x["framework"], x["device"], x["path"], f"{x['ours']:.3f}", f"{x['theirs']:.3f}", f"{x['ratio']:.2f}"]
            for x in lines
        ]
    )


class _Progress:
    """One line on a terminal's standard error; nothing elsewhere."""

    def __init__(self) -> None:
        self._shows = sys.stderr.isatty()

    @property
    def tell(self) -> Callable[[str], None]:
        return self._tell if self._shows else lambda _: None

    def _tell(self, text: str) -> None:
        print(f"\r\033[K{text[:100]}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._shows:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
