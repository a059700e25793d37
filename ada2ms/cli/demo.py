"""`ada2ms demo`: the same network in every framework, on this machine."""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ada2ms._extras import require_all
from ada2ms.cli.arguments import adaptivity, whole_number
from ada2ms.core.hyperparameters import DEFAULTS

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from ada2ms.demo.run import Run


def add(commands: Any) -> None:
    """Adds `demo` to the command line."""
    command = commands.add_parser(
        "demo",
        help="train the same network on real data in every installed framework",
        description="Trains the same network on real data in every installed framework, from the same weights on the "
        "same batches, and draws how far the runs are from each other. Exit status: 0, they stay together; 1, they do "
        "not; 2, it cannot run.",
    )
    command.set_defaults(run=run)
    command.add_argument(
        "--steps", type=whole_number("steps", 1), default=200, help="batches to train on (default: %(default)s)"
    )
    command.add_argument(
        "--seed", type=whole_number("seed", 0), default=0, help="of the weights and batches (default: %(default)s)"
    )
    command.add_argument(
        "--adaptivity",
        type=adaptivity,
        default=DEFAULTS.adaptivity,
        help="a number in [0, 1] or a schedule such as linear:1:0:200 (default: %(default)s)",
    )
    command.add_argument(
        "--out", type=Path, default=Path("ada2ms-demo"), help="folder for the picture (default: %(default)s)"
    )
    command.add_argument("--frameworks", nargs="+", choices=("torch", "tf", "jax"), help="default: those installed")
    command.add_argument(
        "--keras-backends",
        nargs="+",
        choices=("tensorflow", "jax", "torch"),
        help="train in Keras once on each of these, in a process of its own (default: on one, that of KERAS_BACKEND or "
        "the first of these that is installed)",
    )
    command.add_argument(
        "--handoff",
        action="store_true",
        help="one more run, handed from framework to framework: each goes on from the state of the one before; and "
        "some steps of a Vision Transformer, handed over likewise (in JAX with flax)",
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of the table")


def run(arguments: argparse.Namespace) -> int:
    """Trains the same network in every framework; 0 if the trajectories stay together, 1 if not, 2 if it cannot run.

    130 if it is interrupted.
    """
    require_all("The demo", ("sklearn", "matplotlib", "rich"), "demo")
    from rich.console import Console

    from ada2ms.demo.run import FRAMEWORKS, missing

    console = Console(stderr=arguments.json)
    wanted = list(dict.fromkeys(arguments.frameworks or FRAMEWORKS))
    backends = list(dict.fromkeys(arguments.keras_backends or ()))
    if backends and "tf" not in wanted:
        print(f"Invalid keras-backends: {' '.join(backends)!r} (tf must be among the frameworks)", file=sys.stderr)
        return 2
    lacking = {name: reason for name in wanted if (reason := missing(name, backends))}
    for reason in lacking.values():
        console.print(f"Not installed: {reason}", markup=False, soft_wrap=True)
    installed = [name for name in wanted if name not in lacking]
    if not installed or (arguments.frameworks and lacking) or (backends and "tf" in lacking):
        return 2
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"Invalid out: {str(arguments.out)!r} ({error.strerror})", file=sys.stderr)
        return 2
    if backends:
        os.environ.setdefault("KERAS_BACKEND", backends[0])  # of what is handed over, which stays in this process
    try:
        return _train(arguments, installed, backends, console)
    except KeyboardInterrupt:
        print("Stopped", file=sys.stderr)
        return 130


def _train(arguments: argparse.Namespace, installed: list[str], backends: list[str], console: "Console") -> int:
    """Trains in these frameworks and shows what came of it; 0 if the trajectories stay together, 1 if not."""
    from rich.progress import Progress

    from ada2ms.demo import report, vit
    from ada2ms.demo.run import parted

    with Progress(console=console) as progress:
        runs = list(_runs(arguments, installed, backends, progress))
        with_vit = vit.installed(installed) if arguments.handoff else []
        track = partial(progress.track, description="Vision Transformer")
        transformer = vit.hand_over(with_vit, arguments.seed, arguments.adaptivity, track) if with_vit else []
    file = arguments.out / "trajectories.png"
    report.picture(runs, file)
    if arguments.json:
        more = {"transformer": report.data_of_transformer(transformer)} if transformer else {}
        print(json.dumps(report.data(runs) | more, indent=1))
    else:
        console.print(report.table(runs))
        if transformer:
            console.print(report.table_of_transformer(transformer))
    if arguments.handoff and with_vit != installed:
        console.print("Without the Vision Transformer in jax: flax not installed (pip install flax)", soft_wrap=True)
    console.print(f"Picture: {file}", markup=False, soft_wrap=True)
    over = parted(runs) + vit.parted(transformer)
    for sentence in over:
        console.print(f"Beyond the bound: {sentence}", markup=False, soft_wrap=True)
    return 1 if over else 0


def _runs(
    arguments: argparse.Namespace, installed: list[str], backends: list[str], progress: "Progress"
) -> Iterator["Run"]:
    """One for each framework, for each of the backends named in place of Keras' one, and for the hand-over."""
    from ada2ms.demo.run import train, train_on

    options = (arguments.steps, arguments.seed, arguments.adaptivity)
    handed_over = [[*installed, installed[0]]] * arguments.handoff
    for segments in [*([name] for name in installed), *handed_over]:
        if segments == ["tf"] and backends:
            for backend in backends:
                task = progress.add_task(f"tf on {backend}", total=None)
                yield train_on(backend, *options)
                progress.update(task, total=1, completed=1)
        else:
            track = partial(progress.track, total=arguments.steps, description="->".join(segments))
            yield train(segments, *options, track)
