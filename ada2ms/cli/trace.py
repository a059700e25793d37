"""`ada2ms trace`: where do two runs part, and is one run's optimizer what it says?

A trace is what `Recorder` of ada2ms.torch, ada2ms.tf or ada2ms.jax writes while a run goes on, with any optimizer of
these frameworks. Exit status: 0, only rounding; 1, parted; 2, cannot tell, or cannot read.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

from ada2ms._extras import require_all
from ada2ms.cli.arguments import reported
from ada2ms.core.trace import Trace, TraceError, Verdict, diff, judge, resumed
from ada2ms.core.trace.measured import measured
from ada2ms.core.trace.outputs import Output

_LONG = 500  # steps from which on progress is shown


def add(commands: Any) -> None:
    """Adds `trace show`, `trace diff` and `trace judge` to the command line."""
    parser = commands.add_parser(
        "trace",
        help="where two runs part, and why",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(required=True)

    command = actions.add_parser("show", help="what a trace holds")
    command.set_defaults(run=reported(show, TraceError, OSError, ValueError))
    command.add_argument("file", type=Path, help="a trace")
    command.add_argument("--picture", type=Path, metavar="FILE", help="draw each parameter's ratio of update to weight")

    command = actions.add_parser("diff", help="the first step and stage at which B is another run than A, and why")
    command.set_defaults(run=reported(compare, TraceError, OSError, ValueError))
    command.add_argument("file", type=Path, metavar="A", help="a trace")
    command.add_argument("other", type=Path, metavar="B", help="a trace of what should be the same run")
    command.add_argument(
        "--then",
        type=Path,
        action="append",
        default=[],
        metavar="B2",
        help="the trace in which B goes on from a checkpoint; several times if it does so more than once",
    )
    command.add_argument(
        "--repeat",
        type=Path,
        metavar="A2",
        help="a second recording of A with other rounding, such as of another number of threads: how far rounding goes",
    )
    command.add_argument(
        "--arithmetic",
        choices=("float64", "float32", "float16", "bfloat16"),
        help="in which the models compute, if not in the type of their parameters (autocast, mixed_precision)",
    )
    command.add_argument("--picture", type=Path, metavar="FILE", help="draw where and by how much they differ")

    command = actions.add_parser("judge", help="whether the updates of a run are those of its optimizer's rule")
    command.set_defaults(run=reported(acquit, TraceError, OSError))
    command.add_argument("file", type=Path, help="a trace")
    for action in actions.choices.values():
        action.add_argument("--json", action="store_true", help="print JSON instead of text")


def show(arguments: argparse.Namespace) -> int:
    """Prints what a trace holds."""
    trace = Trace.load(arguments.file)
    if arguments.picture is not None:
        from ada2ms.inside import draw

        draw(measured(trace), arguments.picture, title=str(trace.about.get("optimizer", "")))
    facts: dict[str, Any] = {
        "source": trace.about.get("source"),
        "optimizer": trace.about.get("optimizer"),
        "steps": len(trace.steps),
        "complete": trace.complete,
        "with entries": sum(bool(step.full) for step in trace.steps),
        "skipped": [step.number for step in trace.steps if step.skipped],
        "parameters": {p.name: [list(p.shape), p.dtype, p.own] for p in trace.parameters},
        "statistics": {p.name: [list(p.shape), p.dtype, p.own] for p in trace.statistics or []},
        "outputs": {each.name: [[x.shape, x.dtype] for x in each.arrays] for each in _outputs(trace)},
    }
    rows = [_row(trace, i) for i in _shown(len(trace.steps))]
    if arguments.json:
        print(json.dumps({**facts, "rows": [_row(trace, i) for i in range(len(trace.steps))]}))
        return 0
    for name, value in facts.items():
        if name not in ("parameters", "statistics", "outputs") and not (name == "skipped" and not value):
            print(f"{name:14}{value}")
    if not trace.complete:
        print(f"{'':14}the recorder was not closed: the run goes on, or was killed")
    every = [*trace.parameters, *(trace.statistics or [])]
    width = max((len(p.name) for p in every), default=0)
    for i, p in enumerate(every):
        kind = "  statistics" if i >= len(trace.parameters) else ""
        print(f"  {p.name:{width}}  {p.shape}  {p.dtype}" + (f"  from {p.own}" if p.own != p.name else "") + kind)
    for name, arrays in facts["outputs"].items():
        print(f"  {name:{width}}  {', '.join(f'{tuple(shape)}  {dtype}' for shape, dtype in arrays)}  output")
    print(
        f"{'step':>7} {'batches':>8} {'loss':>12} {'|gradient|':>11} {'|update|':>10} {'|value|':>10}  hyperparameters"
    )
    for row in rows:
        told = ", ".join(f"{name} {value:g}" for name, value in (row["hyper"][0] if row["hyper"] else {}).items())
        loss = "" if row["loss"] is None else f"{row['loss']:.6g}"
        print(
            f"{row['step']:>7} {row['batches']:>8} {loss:>12} {row['gradient']:>11.4e} {row['update']:>10.3e} "
            f"{row['value']:>10.4e}  {told}"
        )
    if arguments.picture is not None:
        print(f"Picture: {arguments.picture}")
    return 0


def compare(arguments: argparse.Namespace) -> int:
    """Prints where two traces part."""
    a, b = Trace.load(arguments.file), reduce(resumed, map(Trace.load, [arguments.other, *arguments.then]))
    repeat = None if arguments.repeat is None else Trace.load(arguments.repeat)
    if arguments.picture is not None:
        require_all("The picture", ("matplotlib",), "demo")
    with _progress(min(len(a.steps), len(b.steps))) as progress:
        verdict = diff(a, b, repeat, arithmetic=arguments.arithmetic, progress=progress)
    if arguments.picture is not None:
        from ada2ms.cli.picture import draw

        draw(a, b, verdict, arguments.picture)
    return _said(verdict, arguments)


def acquit(arguments: argparse.Namespace) -> int:
    """Prints whether a trace's updates are those of its optimizer's rule."""
    return _said(judge(Trace.load(arguments.file)), arguments)


def _said(verdict: Verdict, arguments: argparse.Namespace) -> int:
    print(json.dumps(verdict.data(), indent=1) if arguments.json else verdict)
    picture = getattr(arguments, "picture", None)
    if picture is not None and not arguments.json:
        print(f"Picture: {picture}")
    return verdict.status


def _row(trace: Trace, i: int) -> dict[str, Any]:
    step = trace.steps[i]
    norms = {}
    for what, sketches in step.sketches.items():
        norm = sketches[:, 0]
        norms[what] = math.sqrt(float((norm[norm == norm] ** 2).sum()))
    return {"step": step.number, "batches": len(step.batches), "loss": step.loss, "hyper": step.hyper, **norms}


def _outputs(trace: Trace) -> list[Output]:
    """Of the first step, as those of the others are."""
    return trace.steps[0].outputs if trace.steps else []


def _shown(steps: int) -> list[int]:
    """The first and the last ten steps."""
    return list(range(steps)) if steps <= 20 else [*range(10), *range(steps - 10, steps)]


class _progress:  # noqa: N801  # a context, as `open` is
    """Tells how far a long comparison is, on a terminal."""

    def __init__(self, steps: int) -> None:
        self._shows = steps >= _LONG and sys.stderr.isatty()

    def __enter__(self) -> Callable[[int, int], None] | None:
        return self._tell if self._shows else None

    def __exit__(self, *_: object) -> None:
        if self._shows:
            print(file=sys.stderr)

    @staticmethod
    def _tell(done: int, steps: int) -> None:
        if done % 100 == 0 or done == steps:
            print(f"\r{done} of {steps} steps", end="", file=sys.stderr, flush=True)
