"""What the study of the default has found: tables (Markdown and CSV) and a picture."""

import statistics
from pathlib import Path
from typing import Any, Final

import matplotlib

from ada2ms.compare import study
from ada2ms.compare.protocol import Record, Records
from ada2ms.compare.report import write_csv
from ada2ms.compare.study import CHOICES, ENOUGH, YARDSTICK, Scores, Study

COLUMNS: Final = (
    "task",
    "optimizer",
    "rate",
    "decay",
    "validation",
    "test",
    "standard error",
    "seeds",
    "diverged",
    "below the best",
    "unit",
    "loss",
)


def write(protocol: Study, records: Records, folder: Path) -> list[Path]:
    """Writes `table.md`, `table.csv` and `default.png` of the seeds that are whole; returns the files.

    With fewer than two whole seeds there is nothing to write.
    """
    if len(protocol.whole(records)) < 2:
        return []
    rows = table_rows(protocol, records)
    files = [folder / name for name in ("table.md", "table.csv", "default.png")]
    files[0].write_text(markdown(protocol, records, rows))
    write_csv(files[1], COLUMNS, rows)
    _picture(protocol, records, rows, files[2])
    return files


def table_rows(protocol: Study, records: Records) -> list[dict[str, Any]]:
    """A row for each task and optimizer; the last three columns are the candidates' alone. Accuracies are fractions."""
    scores = protocol.scores(records)
    lost = study.losses(scores)
    rows = []
    for task in protocol.tasks:
        best = max(statistics.mean(scores[task][name]) for name in CHOICES)
        for name in protocol.optimizers:
            runs = _records(protocol, records, task, name)
            tests = [r for r in runs if r["run"]["stage"] == "test"]
            found = scores[task][name]
            row = {
                "task": task,
                "optimizer": name,
                "rate": tests[0]["run"]["rate"],
                "decay": tests[0]["run"]["decay"],
                "validation": statistics.mean(r["validation"]["accuracy"] for r in tests),
                "test": statistics.mean(found),
                "standard error": statistics.stdev(found) / len(found) ** 0.5,
                "seeds": len(found),
                "diverged": sum(r["diverged"] for r in runs),
            }
            if name in CHOICES:
                row |= {
                    "below the best": best - row["test"],
                    "unit": study.unit(scores[task]),
                    "loss": lost[task][name],
                }
            rows.append(row)
    return rows


def markdown(protocol: Study, records: Records, rows: list[dict[str, Any]]) -> str:
    """The tables and the choice, in Markdown."""
    scores, seeds = protocol.scores(records), protocol.whole(records)
    lines = [
        "# The default adaptivity: tables",
        "",
        f"Test accuracy in per cent, mean ± standard error over {len(seeds)} seeds ({seeds[0]} to {seeds[-1]}), at the",
        "peak learning rate / weight decay that were best on the validation split.",
        "",
        f"| task | {' | '.join(protocol.optimizers)} |",
        "| --- |" + " --- |" * len(protocol.optimizers),
    ]
    of = {(row["task"], row["optimizer"]): row for row in rows}
    for task in protocol.tasks:
        cells = [_accuracy(of[task, name]) for name in protocol.optimizers]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    lines += [
        "",
        "Loss: how far a candidate is below the best candidate of the task, in units of the task.",
        "",
        f"| task | unit, points | {' | '.join(CHOICES)} |",
        "| --- |" + " --- |" * (len(CHOICES) + 1),
    ]
    lost, worst = study.losses(scores), study.worst(scores)
    for task in protocol.tasks:
        cells = [f"{lost[task][name]:.1f}" for name in CHOICES]
        lines.append(f"| {task} | {100 * study.unit(scores[task]):.2f} | {' | '.join(cells)} |")
    lines.append(f"| **worst** | | {' | '.join(f'**{worst[name]:.1f}**' for name in CHOICES)} |")
    lines += ["", *_choice(protocol, scores, len(seeds)), "", *_against_yardstick(protocol, scores)]
    return "\n".join(lines) + "\n"


def _accuracy(row: dict[str, Any]) -> str:
    mean = f"{100 * row['test']:.2f} ± {100 * row['standard error']:.2f}"
    return f"{mean} ({row['rate']:g} / {row['decay']:g})"


def _choice(protocol: Study, scores: Scores, seeds: int) -> list[str]:
    """The choice, and what it would be otherwise, which decides nothing."""
    if seeds < ENOUGH:
        return [f"Nothing is chosen: {seeds} seeds are whole, and {ENOUGH} are needed."]
    lines = [f"Chosen: **{study.choice(scores)}**.", ""]
    drawn = ", ".join(f"{name} {100 * share:.0f} %" for name, share in study.stability(scores).items())
    lines.append(f"Chosen if the seeds are drawn anew from these (2000 times): {drawn}.")
    lines.append("")
    if len(protocol.tasks) > 1:
        without = {task: study.choice({t: s for t, s in scores.items() if t != task}) for task in protocol.tasks}
        lines.append(
            "Chosen without one of the tasks: " + "; ".join(f"{t}: {name}" for t, name in without.items()) + "."
        )
    return lines


def _against_yardstick(protocol: Study, scores: Scores) -> list[str]:
    lines = [
        f"How much higher than {YARDSTICK}'s test accuracy, in points, seed by seed: mean ± standard error. It decides",
        "nothing.",
        "",
        f"| task | {' | '.join(CHOICES)} |",
        "| --- |" + " --- |" * len(CHOICES),
    ]
    for task in protocol.tasks:
        cells = []
        for name in CHOICES:
            apart = [100 * (x - y) for x, y in zip(scores[task][name], scores[task][YARDSTICK], strict=True)]
            cells.append(f"{statistics.mean(apart):+.2f} ± {statistics.stdev(apart) / len(apart) ** 0.5:.2f}")
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return lines


def _records(protocol: Study, records: Records, task: str, optimizer: str) -> list[Record]:
    return [records[run.key] for run in protocol.chosen(task, optimizer, records) if run.key in records]


def _picture(protocol: Study, records: Records, rows: list[dict[str, Any]], file: Path) -> None:
    """For each task, above: test accuracy against adaptivity, AdamW at 1; below: the search of the learning rate."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [*(name for name in CHOICES if name in protocol.optimizers), YARDSTICK]
    places = [1.0 if name == YARDSTICK else float(name.split()[1]) for name in names]
    of = {(row["task"], row["optimizer"]): row for row in rows}
    columns = len(protocol.tasks)
    figure, panels = pyplot.subplots(2, columns, figsize=(2.9 * columns, 6), squeeze=False, layout="constrained")
    for task, above, below in zip(protocol.tasks, *panels, strict=True):
        means = [100 * of[task, name]["test"] for name in names]
        errors = [100 * of[task, name]["standard error"] for name in names]
        above.plot(places, means, color="0.8")
        for i, name in enumerate(names):
            color = "black" if name == YARDSTICK else f"C{i}"
            above.errorbar(places[i], means[i], errors[i], color=color, marker="o", capsize=3, label=name)
            below.plot(*_search(protocol, records, task, name), "o-", color=color, markersize=3, label=name)
        above.set(title=task, xlabel="adaptivity", xticks=places)
        below.set(xlabel="peak learning rate", xscale="log")
        for panel in (above, below):
            panel.grid(alpha=0.3)
    panels[0, 0].set_ylabel("test accuracy, per cent")
    panels[1, 0].set_ylabel("validation accuracy, per cent")
    panels[1, 0].legend(fontsize="x-small")
    figure.savefig(file, dpi=80)
    pyplot.close(figure)


def _search(protocol: Study, records: Records, task: str, optimizer: str) -> tuple[list[float], list[float]]:
    """The rates that were tried, in order, and the mean accuracy of each on the validation split in per cent."""
    found: dict[float, list[float]] = {}
    for record in _records(protocol, records, task, optimizer):
        if record["run"]["stage"] == "rate":
            found.setdefault(record["run"]["rate"], []).append(100 * record["validation"]["accuracy"])
    rates = sorted(found)
    return rates, [statistics.mean(found[rate]) for rate in rates]
