"""The command line: `ada2ms demo`, `ada2ms compare` and `ada2ms state`, also `python -m ada2ms`."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from ada2ms import __version__, cli_compare, cli_state
from ada2ms.core import schedules
from ada2ms.core.hyperparameters import DEFAULTS, Scheduled, check


def adaptivity(text: str) -> Scheduled:
    """A number in [0, 1], or the kind and the fields of a schedule, such as `linear:1:0:200`, `exponential:1:0:50`."""
    kind, *values = text.split(":")
    try:
        if not values:
            number = float(kind)
            check("adaptivity", number)
            return number
        if kind not in schedules.KINDS:
            raise ValueError(f"must be a number, or one of {', '.join(schedules.KINDS)} with its fields")
        names = [field.name for field in fields(schedules.KINDS[kind])]
        if len(values) != len(names):
            raise ValueError(f"must be {':'.join([kind, *names])}")
        given = {name: int(x) if name == "steps" else float(x) for name, x in zip(names, values, strict=True)}
        return schedules.from_dict({"schedule": kind, **given})
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"Invalid adaptivity: {text!r} ({error})") from None


def steps(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"Invalid steps: {text!r} (must be a whole number above 0)")
    return int(text)


def seed(text: str) -> int:
    """A whole number, at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"Invalid seed: {text!r} (must be a whole number, at least 0)")
    return int(text)


def demo(arguments: argparse.Namespace) -> int:
    """Trains the same network in every framework; 0 if the trajectories stay together, 1 if not, 2 if it cannot run.

    130 if it is interrupted.
    """
    absent = [module for module in ("sklearn", "matplotlib", "rich") if find_spec(module) is None]
    if absent:
        print(f"The demo needs {', '.join(absent)}: pip install 'ada2ms[demo]'", file=sys.stderr)
        return 2
    from rich.console import Console
    from rich.progress import Progress

    from ada2ms.demo.run import FRAMEWORKS, missing, parted, train

    console = Console(stderr=arguments.json)
    wanted = list(dict.fromkeys(arguments.frameworks or FRAMEWORKS))
    lacking = {name: reason for name in wanted if (reason := missing(name))}
    for reason in lacking.values():
        console.print(f"Not installed: {reason}", markup=False, soft_wrap=True)
    installed = [name for name in wanted if name not in lacking]
    if not installed or (arguments.frameworks and lacking):
        return 2

    from ada2ms.demo import report

    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"Invalid out: {str(arguments.out)!r} ({error.strerror})", file=sys.stderr)
        return 2
    try:
        with Progress(console=console) as progress:
            runs = [
                train(
                    legs,
                    arguments.steps,
                    arguments.seed,
                    arguments.adaptivity,
                    partial(progress.track, total=arguments.steps, description="->".join(legs)),
                )
                for legs in [*([name] for name in installed), *([[*installed, installed[0]]] * arguments.handoff)]
            ]
    except KeyboardInterrupt:
        print("Stopped", file=sys.stderr)
        return 130
    file = arguments.out / "trajectories.png"
    report.picture(runs, file)
    if arguments.json:
        print(json.dumps(report.data(runs), indent=1))
    else:
        console.print(report.table(runs))
    console.print(f"Picture: {file}", markup=False, soft_wrap=True)
    over = parted(runs)
    for sentence in over:
        console.print(f"Beyond the bound: {sentence}", markup=False, soft_wrap=True)
    return 1 if over else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    parser = argparse.ArgumentParser(prog="ada2ms", description=__doc__)
    parser.add_argument("--version", action="version", version=f"ada2ms {__version__}")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("demo", help="train the same network on real data in every installed framework")
    command.set_defaults(run=demo)
    command.add_argument("--steps", type=steps, default=200, help="batches to train on (default: %(default)s)")
    command.add_argument("--seed", type=seed, default=0, help="of the weights and batches (default: %(default)s)")
    command.add_argument(
        "--adaptivity",
        type=adaptivity,
        default=DEFAULTS.adaptivity,
        help="a number in [0, 1] or a schedule such as linear:1:0:200 (default: %(default)s)",
    )
    command.add_argument("--out", type=Path, default=Path("ada2ms-demo"), help="folder for the picture")
    command.add_argument("--frameworks", nargs="+", choices=("torch", "tf", "jax"), help="default: those installed")
    command.add_argument(
        "--handoff",
        action="store_true",
        help="one more run, handed from framework to framework: each goes on from the state of the one before",
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of the table")
    cli_compare.add(commands)
    cli_state.add(commands)
    arguments = parser.parse_args(argv)
    status: int = arguments.run(arguments)
    return status
