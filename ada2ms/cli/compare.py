"""`ada2ms compare`: optimizers under one protocol, on this machine."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ada2ms._extras import require_all
from ada2ms.cli.arguments import whole_number

if TYPE_CHECKING:
    from ada2ms.compare.protocol import Protocol

_MODULES = ("torch", "sklearn", "matplotlib", "rich")


def add(commands: Any) -> None:
    """Adds `compare` to the command line."""
    command = commands.add_parser(
        "compare",
        help="train with Ada2MS, AdamW, momentum SGD and others under one protocol, and compare",
        description="Tunes and trains every optimizer in the same way (docs/comparison.md says how) and writes tables "
        "and pictures. A comparison that was stopped goes on where it was when it is started again.",
    )
    command.set_defaults(run=run)
    command.add_argument(
        "--out", type=Path, help="folder of the records (default: ada2ms-compare; with --default, ada2ms-default)"
    )
    command.add_argument(
        "--default",
        action="store_true",
        help="the study that the default adaptivity is chosen by, in place of the comparison (docs/default.md)",
    )
    command.add_argument("--smoke", action="store_true", help="runs of a few steps: only whether all of it works")
    command.add_argument("--tasks", nargs="+", metavar="TASK", help="whole names, or the words that they begin with")
    command.add_argument("--optimizers", nargs="+", metavar="OPTIMIZER", help="likewise")
    command.add_argument("--cifar", type=Path, metavar="FOLDER", help="holds cifar-10-batches-py or cifar-100-python")
    command.add_argument(
        "--seeds", type=whole_number("seeds", 1), metavar="N", help="how many to test with (default: 5)"
    )
    command.add_argument(
        "--workers", type=whole_number("workers", 1), metavar="N", help="runs at a time (default: as many as cores)"
    )
    command.add_argument("--device", default="cpu", help="of torch, on which to train (default: %(default)s)")
    command.add_argument("--report", action="store_true", help="only write tables and pictures of what is finished")


def run(arguments: argparse.Namespace) -> int:
    """Does, or goes on with, a comparison and reports; 0 if it is finished, 2 if it cannot run, 130 if interrupted."""
    require_all("The comparison", _MODULES if arguments.default else ("pytorch_optimizer", *_MODULES), "compare")
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from ada2ms.compare import report, runner, verdict
    from ada2ms.compare.study import Study

    console = Console()
    out = arguments.out or Path("ada2ms-default" if arguments.default else "ada2ms-compare")
    try:
        protocol = _protocol(arguments)
        if arguments.report:
            records = runner.load(out)
        else:
            with Progress(
                TextColumn("runs"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=console,
                speed_estimate_period=600,
            ) as bar:
                task = bar.add_task("")
                records = runner.compare(
                    protocol,
                    out,
                    workers=arguments.workers,
                    device=arguments.device,
                    cifar=arguments.cifar,
                    progress=lambda done, total: bar.update(task, completed=done, total=total),
                )
    except (runner.CompareError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nStopped; the same command goes on from what is in {out}", file=sys.stderr)
        return 130
    if not records:
        print(f"Nothing is finished in {str(out)!r}", file=sys.stderr)
        return 2
    files = (
        verdict.write(protocol, records, out) if isinstance(protocol, Study) else report.write(protocol, records, out)
    )
    if not files:
        print(f"Fewer than two seeds are tested for every task and optimizer in {str(out)!r}", file=sys.stderr)
        return 2
    for file in files:
        console.print(str(file), markup=False, soft_wrap=True)
    return 0


def _protocol(arguments: argparse.Namespace) -> "Protocol":
    """The protocol that the arguments choose.

    Raises:
        ValueError: there is no such task or optimizer, or the study has no such option.
    """
    from ada2ms.compare import study
    from ada2ms.compare.optimizers import CANDIDATES
    from ada2ms.compare.protocol import SMOKE, TASKS, Protocol

    if arguments.default:
        for option in ("tasks", "optimizers", "cifar", "seeds"):
            if getattr(arguments, option) is not None:
                raise ValueError(f"--{option} does not go with --default, whose protocol is fixed")
        return study.SMOKE if arguments.smoke else study.Study()
    protocol = SMOKE if arguments.smoke else Protocol()
    if arguments.cifar is not None:
        protocol = replace(protocol, tasks=tuple(name for name, task in TASKS.items() if task.data == "CIFAR"))
    if arguments.tasks:
        protocol = replace(protocol, tasks=_named("tasks", arguments.tasks, tuple(TASKS)))
    if arguments.optimizers:
        protocol = replace(protocol, optimizers=_named("optimizers", arguments.optimizers, tuple(CANDIDATES)))
    if arguments.seeds:
        protocol = replace(protocol, seeds=tuple(range(1, arguments.seeds + 1)))
    return protocol


def _named(argument: str, wanted: list[str], names: tuple[str, ...]) -> tuple[str, ...]:
    """The names that begin with the words wanted, or are them.

    Raises:
        ValueError: no name does.
    """
    found: list[str] = []
    for words in wanted:
        exact = [name for name in names if name.lower() == words.lower()]
        matches = exact or [name for name in names if name.lower().startswith(words.lower())]
        if not matches:
            raise ValueError(f"Invalid {argument}: {words!r} (must be or begin one of: {'; '.join(names)})")
        found += matches
    return tuple(name for name in names if name in found)
