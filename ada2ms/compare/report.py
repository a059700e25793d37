"""Turns the records of a comparison into tables (Markdown and CSV) and pictures."""

import csv
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib
import numpy as np

from ada2ms.compare.optimizers import ADAPTIVITIES, SCOPES, named
from ada2ms.compare.protocol import EVERY_TASK, Protocol, Record, Records, Stage

DEFAULT: Final = named(0.5, "model")  # what the others are held against: the default when the comparison was made
COLUMNS: Final = (
    "task",
    "optimizer",
    "rate",
    "decay",
    "validation",
    "test",
    "spread",
    "seeds",
    "train loss",
    "rates within 1 %",
    "diverged",
    "at the edge",
)


def write(protocol: Protocol, records: Records, folder: Path) -> list[Path]:
    """Writes `table.md`, `table.csv` and the pictures of what is finished; returns the files."""
    rows = [row for task in protocol.tasks for row in task_rows(protocol, records, task)]
    pictures = {"rates.png": _rates, "losses.png": _losses, "adaptivity.png": _adaptivity, "changes.png": _changes}
    files = [folder / name for name in ("table.md", "table.csv", *pictures)]
    files[0].write_text(markdown(protocol, records, rows))
    write_csv(files[1], COLUMNS, rows)
    for name, draw in pictures.items():
        draw(protocol, records, folder / name)
    return files


def write_csv(file: Path, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    """Writes rows under a header of these columns."""
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)


def task_rows(protocol: Protocol, records: Records, task: str) -> list[dict[str, Any]]:
    """A row for each optimizer that has been tested on the task, the best first."""
    rows = []
    for optimizer in protocol.optimizers:
        tests = _finished(protocol, records, task, optimizer, "test")
        if not tests:
            continue
        tried = _finished(protocol, records, task, optimizer, "rate")
        accuracies = [record["validation"]["accuracy"] for record in tried]
        best = tests[0]["run"]
        found = [record["test"]["accuracy"] for record in tests]
        losses = [record["train_loss"] for record in tests if record["train_loss"] is not None]
        rates = sorted(record["run"]["rate"] for record in tried)
        rows.append(
            {
                "task": task,
                "optimizer": optimizer,
                "rate": best["rate"],
                "decay": best["decay"],
                "validation": statistics.mean(record["validation"]["accuracy"] for record in tests),
                "test": statistics.mean(found),
                "spread": statistics.stdev(found) if len(found) > 1 else None,
                "seeds": len(found),
                "train loss": statistics.mean(losses) if losses else None,
                "rates within 1 %": sum(a >= max(accuracies) - 0.01 for a in accuracies),
                "diverged": sum(record["diverged"] for record in [*tried, *tests]),
                "at the edge": best["rate"] in (rates[0], rates[-1]) and len(rates) > 1,
            }
        )
    return sorted(rows, key=lambda row: -row["test"])


def markdown(protocol: Protocol, records: Records, rows: list[dict[str, Any]]) -> str:
    """The tables, in Markdown."""
    lines = [
        "# Tables",
        "",
        "Accuracies in per cent. Test: mean and standard deviation over seeds, of runs at the rate and decay that were",
        "best on the validation split; the text's is of the next character. Rates: how many of those tried come within",
        "one per cent of the best on the validation split. A rate marked * is at the edge of its grid.",
    ]
    for task in protocol.tasks:
        lines += ["", f"## {task}", "", "| optimizer | rate | decay | validation | test | train loss | rates |"]
        lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
        for row in rows:
            if row["task"] == task:
                spread = "" if row["spread"] is None else f" ± {100 * row['spread']:.2f}"
                loss = "" if row["train loss"] is None else f"{row['train loss']:.4f}"
                lines.append(
                    f"| {row['optimizer']} | {row['rate']:g}{'*' * row['at the edge']} | {row['decay']:g} | "
                    f"{100 * row['validation']:.2f} | {100 * row['test']:.2f}{spread} | {loss} | "
                    f"{row['rates within 1 %']} of {len(protocol.rates)} |"
                )
    if DEFAULT in protocol.optimizers:
        lines += _against_default(protocol, records)
    return "\n".join(lines) + "\n"


def _against_default(protocol: Protocol, records: Records) -> list[str]:
    visual = [task for task in protocol.tasks if EVERY_TASK[task].visual]
    others = [name for name in protocol.optimizers if name != DEFAULT]
    found = {name: differences(protocol, records, name, visual) for name in others}
    confidence = 1 - 0.05 / max(1, sum(map(comparable, others)))
    lines = [
        "",
        f"## Against {DEFAULT}",
        "",
        f"How much better the test accuracy is than that of {DEFAULT}, in points, seed by seed: mean over the seeds,",
        "for each task and for all visual tasks together; for these, an interval at "
        f"{100 * confidence:.2f} % (Student's t",
        "over the seeds; 95 % shared among all candidates for the default).",
        "",
        f"| optimizer | {' | '.join(protocol.tasks)} | visual tasks |",
        "| --- |" + " --- |" * (len(protocol.tasks) + 1),
    ]
    for name in others:
        cells = []
        for task in protocol.tasks:
            apart = differences(protocol, records, name, [task])
            cells.append(f"{100 * np.mean(apart):+.2f}" if apart else "")
        low, high = interval(found[name], confidence)
        together = f"{100 * np.mean(found[name]):+.2f} ({100 * low:+.2f} to {100 * high:+.2f})" if found[name] else ""
        lines.append(f"| {name} | {' | '.join(cells)} | {together} |")
    return lines


def comparable(name: str) -> bool:
    """Whether an optimizer is an Ada2MS other than the default: a candidate for it."""
    return name.startswith("Ada2MS") and name != DEFAULT


def differences(protocol: Protocol, records: Records, name: str, tasks: Iterable[str]) -> list[float]:
    """For each seed that has been tested, how much better than the default on average over the tasks."""
    columns = []
    for task in tasks:
        own, default = (_tests(protocol, records, task, optimizer) for optimizer in (name, DEFAULT))
        columns.append({seed: own[seed] - default[seed] for seed in own.keys() & default.keys()})
    seeds = set.intersection(*map(set, columns)) if columns else set()
    return [statistics.mean(column[seed] for column in columns) for seed in sorted(seeds)]


def _tests(protocol: Protocol, records: Records, task: str, optimizer: str) -> dict[int, float]:
    """Test accuracies by seed."""
    found = _finished(protocol, records, task, optimizer, "test")
    return {record["run"]["seed"]: record["test"]["accuracy"] for record in found}


def _finished(protocol: Protocol, records: Records, task: str, optimizer: str, stage: Stage) -> list[Record]:
    runs = protocol.chosen(task, optimizer, records)
    return [records[run.key] for run in runs if run.stage == stage and run.key in records]


def interval(values: list[float], confidence: float) -> tuple[float, float]:
    """Student's t interval of the mean; all numbers, if there are fewer than two values."""
    from scipy.stats import t

    if len(values) < 2:
        return -np.inf, np.inf
    half = t.ppf((1 + confidence) / 2, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values) - half, statistics.mean(values) + half


_Draw = Callable[[Any, str, list[Record], Any], None]


def _grid(protocol: Protocol, records: Records, draw: _Draw, file: Path, stage: Stage, title: str, **axes: Any) -> None:
    """A row of panels for each task: baselines; Ada2MS with one second moment for the model; and with one a tensor."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    ours = [[named(a, scope) for a in ADAPTIVITIES] for scope in SCOPES]
    baselines = [name for name in protocol.optimizers if not name.startswith("Ada2MS")]
    columns = [("baselines", baselines), ("Ada2MS", ours[0]), ('Ada2MS, scope "tensor"', ours[1])]
    figure, panels = pyplot.subplots(
        len(protocol.tasks),
        3,
        figsize=(15, 3.2 * len(protocol.tasks)),
        sharex="row",
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for task, row in zip(protocol.tasks, panels, strict=True):
        for panel, (heading, names) in zip(row, columns, strict=True):
            for i, name in enumerate(["AdamW", *(n for n in names if n != "AdamW")]):
                if name not in protocol.optimizers:
                    continue
                found = _finished(protocol, records, task, name, stage)
                style = {"color": "black", "linestyle": "--"} if name == "AdamW" else {"color": f"C{i - 1}"}
                if found:
                    draw(panel, name, found, {**style, "linewidth": 1.3})
            panel.set(title=f"{task}: {heading}", **axes)
            panel.grid(alpha=0.3)
            if panel.lines:
                panel.legend(fontsize="x-small")
    figure.suptitle(title)
    figure.savefig(file, dpi=80)
    pyplot.close(figure)


def _rates(protocol: Protocol, records: Records, file: Path) -> None:
    def draw(panel: Any, name: str, found: list[Record], style: Any) -> None:
        points = sorted((r["run"]["rate"], 100 * r["validation"]["accuracy"]) for r in found)
        rates, accuracies = zip(*points, strict=True)
        panel.plot(rates, accuracies, label=name, **style)
        best = int(np.argmax(accuracies))
        panel.plot(rates[best], accuracies[best], "o", color=style["color"], markersize=4)

    title = "Accuracy on the validation split against the peak learning rate; the best is marked"
    _grid(protocol, records, draw, file, "rate", title, xscale="log", xlabel="peak learning rate", ylabel="per cent")


def _losses(protocol: Protocol, records: Records, file: Path) -> None:
    title = "Training loss against the step, mean over the seeds, at the best rate and decay"
    _grid(protocol, records, _curve("loss"), file, "test", title, yscale="log", xlabel="step", ylabel="training loss")


def _curve(field: str) -> _Draw:
    def draw(panel: Any, name: str, found: list[Record], style: Any) -> None:
        curves = [r["curves"] for r in found if not r["diverged"]]
        if curves:
            values = np.array([curve[field] for curve in curves], float)
            panel.plot(curves[0]["step"], values.mean(0), label=name, **style)

    return draw


def _changes(protocol: Protocol, records: Records, file: Path) -> None:
    title = "Effective step size: root mean square of the parameters' change in a step, mean over the seeds"
    _grid(protocol, records, _curve("change"), file, "test", title, yscale="log", xlabel="step", ylabel="change")


def _adaptivity(protocol: Protocol, records: Records, file: Path) -> None:
    """Of the first task; a task with more steps stretches the transitions."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    names = [named(a, "model") for a in ADAPTIVITIES]
    for name in [name for name in names if name in protocol.optimizers]:
        if found := _finished(protocol, records, protocol.tasks[0], name, "test"):
            panel.plot(found[0]["curves"]["step"], found[0]["curves"]["adaptivity"], label=name)
    panel.set(xlabel="step", ylabel="adaptivity", title="Adaptivity over time", ylim=(0, 1))
    panel.grid(alpha=0.3)
    if panel.lines:
        panel.legend(fontsize="x-small")
    figure.savefig(file, dpi=80)
    pyplot.close(figure)
