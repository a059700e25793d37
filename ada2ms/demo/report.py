"""Shows what the demo found: a table, a picture, or JSON."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
from rich.table import Table

from ada2ms.demo.run import Run, from_each_other, from_other, mutual_bound, parted, rule_bound
from ada2ms.demo.vit import Segment
from ada2ms.demo.vit import parted as parted_transformer


def table(runs: list[Run]) -> Table:
    """One row per framework."""
    shown = Table(
        title="The same network, weights and batches in every framework",
        caption="loss: of the last batch; accuracy: on the test images; seconds: with compilation; from rule, from "
        "others: largest deviation of the parameters, relative to the largest of their tensor, from the NumPy rule fed "
        "the same gradients, and from the other frameworks."
        + "".join(f" handed over: {run.framework}." for run in runs if run.title == "handed over"),
        caption_justify="left",
        box=None,
        pad_edge=False,
    )
    shown.add_column("framework", no_wrap=True)
    for heading in ("loss", "accuracy", "seconds", "from rule", "from others"):
        shown.add_column(heading, justify="right")
    for run in runs:
        shown.add_row(
            run.title,
            f"{run.losses[-1]:.5f}",
            f"{run.accuracy:.1%}",
            f"{run.seconds:.1f}",
            f"{max(run.from_rule):.1e}",
            f"{_from_others(run, runs):.1e}" if len(runs) > 1 else "-",
        )
    return shown


def _from_others(run: Run, runs: list[Run]) -> float:
    return max((max(from_other(run, other)) for other in runs if other is not run), default=0.0)


def table_of_transformer(segments: list[Segment]) -> Table:
    """One row per framework that it went through."""
    shown = Table(
        title="A Vision Transformer, handed over in mid-run",
        caption="loss: on the test images; seconds: with compilation; from the run that stayed: largest deviation of "
        f"the parameters from those of the run in {segments[0].title} alone, relative to the largest of their tensor; "
        f"bound {mutual_bound(segments[-1].last):.1e}.",
        caption_justify="left",
        box=None,
        pad_edge=False,
    )
    shown.add_column("framework", no_wrap=True)
    for heading in ("steps", "loss", "seconds", "from the run that stayed"):
        shown.add_column(heading, justify="right")
    for segment in segments:
        shown.add_row(
            segment.title,
            f"{segment.first}-{segment.last}",
            f"{segment.loss:.5f}",
            f"{segment.seconds:.1f}",
            f"{max(segment.deviations):.1e}",
        )
    return shown


def data_of_transformer(segments: list[Segment]) -> dict[str, Any]:
    """What `table_of_transformer` shows, as plain data, with the deviation after each step."""
    return {
        "bound": mutual_bound(segments[-1].last),
        "parted": parted_transformer(segments),
        "segments": [asdict(segment) for segment in segments],
    }


def data(runs: list[Run]) -> dict[str, Any]:
    """What `table` shows, and the curves, as plain data."""
    steps = len(runs[0].losses)
    return {
        "steps": steps,
        "bounds": {"from_rule": rule_bound(steps), "from_each_other": mutual_bound(steps)},
        "parted": parted(runs),
        "from_each_other": from_each_other(runs),
        "frameworks": [
            {
                "framework": run.framework,
                "title": run.title,
                "final_loss": run.losses[-1],
                "test_accuracy": run.accuracy,
                "seconds": run.seconds,
                "largest_deviation_from_rule": max(run.from_rule),
                "largest_deviation_from_others": _from_others(run, runs),
                "losses": run.losses,
                "from_rule": run.from_rule,
            }
            for run in runs
        ],
    }


def picture(runs: list[Run], file: Path) -> None:
    """Saves the loss curves, laid over each other, and the deviations against the step on a log axis."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = range(1, len(runs[0].losses) + 1)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for i, run in enumerate(runs):  # wide below narrow, so that curves that coincide all show
        style = {"color": f"C{i}", "linewidth": 2.0 * (len(runs) - i) ** 1.3, "solid_capstyle": "butt"}
        left.plot(steps, run.losses, label=run.title, **style)
        right.plot(steps, run.from_rule, label=f"{run.title} from the NumPy rule", color=f"C{i}", linewidth=1)
    for run in runs:
        for framework, start in zip(run.framework.split("->"), run.starts, strict=True):
            if len(run.starts) > 1:  # where the training was handed over, and to which framework
                left.axvline(start, color="gray", linewidth=0.8, zorder=0)
                left.text(start, 0.01, f" {framework}", color="gray", transform=left.get_xaxis_transform())
    left.set(xlabel="step", ylabel="training loss", title="The same loss, drawn for every framework")
    if len(runs) > 1:
        right.plot(steps, from_each_other(runs), label="frameworks from each other", color="black", linewidth=1)
        right.plot(steps, [mutual_bound(step) for step in steps], ":", color="black", label="bound between frameworks")
    right.plot(steps, [rule_bound(step) for step in steps], "--", color="gray", label="bound from the NumPy rule")
    right.set(xlabel="step", ylabel="largest relative deviation", yscale="log", title="Deviation of the parameters")
    left.legend()
    right.legend(fontsize="small", ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
