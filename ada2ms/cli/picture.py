"""The picture of two traces: steps across, parameters down, a panel for each kind of tensor, and one for statistics."""

from pathlib import Path

import numpy as np

from ada2ms.core.trace import Trace, Verdict
from ada2ms.core.trace.model import STATISTICS, TENSORS
from ada2ms.core.trace.pair import Pair
from ada2ms.core.trace.sketch import Array
from ada2ms.core.trace.statistics import Statistics

_PANELS = {"start": "value", "forward": "gradient", "data": "update", "hyperparameters": "update"}  # to mark stages in
_ROWS = 40  # names beside a panel; of more parameters every second, third and so on has its name
_MOST = 400  # columns that are drawn; longer runs are sampled, with the verdict's step


def draw(a: Trace, b: Trace, verdict: Verdict, path: Path) -> None:
    """Draws how far apart each tensor is at each step, relative to its norm, and marks the verdict's cells.

    Raises:
        OSError, ValueError: the file cannot be written, or is of a kind that matplotlib does not know.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    pair, statistics = Pair(a, b), Statistics(a, b)
    steps = _columns(len(pair.steps), verdict.step - 1)
    images = {what: (pair.names, [relative(pair, what, i) for i in steps]) for what in TENSORS}
    if statistics.pair.names:
        places = {number - 1: k for k, number in enumerate(statistics.numbers)}
        untold = np.full(len(statistics.pair.names), np.nan)
        told = [relative(statistics.pair, "value", places[i]) if i in places else untold for i in steps]
        images[STATISTICS] = statistics.pair.names, told
    of_stage = STATISTICS if verdict.kind == "initial statistics" else _PANELS.get(verdict.stage, verdict.stage)
    heights = [1.2 + 0.18 * min(max(len(names), 1), _ROWS) for names, _ in images.values()]
    figure, panels = plt.subplots(
        len(images), 1, figsize=(9, sum(heights)), height_ratios=heights, sharex=True, layout="constrained"
    )
    scale = LogNorm(1e-8, 1.0)
    for panel, (what, (names, rows)) in zip(panels, images.items(), strict=True):
        image = np.array(rows).reshape(len(steps), -1).T
        shown = panel.imshow(
            np.maximum(image, 1e-9), aspect="auto", norm=scale, cmap="magma", interpolation="nearest", origin="upper"
        )
        panel.set_title(what, loc="left")
        names = names or ["no shared parameters"]
        named = range(0, len(names), -(-len(names) // _ROWS))
        panel.set_yticks(named, [names[k] for k in named], fontsize=7)
        if verdict.step and what == of_stage:
            column = steps.index(verdict.step - 1)
            marked = [names.index(n) for n in verdict.parameters if n in names] or [*range(len(names))]
            panel.scatter([column] * len(marked), marked, s=30, facecolors="none", edgecolors="cyan", linewidths=1.2)
    ticks = sorted({int(k) for k in np.linspace(0, len(steps) - 1, min(len(steps), 10))})
    panels[-1].set_xticks(ticks, [str(steps[k] + 1) for k in ticks])
    panels[-1].set_xlabel("step")
    figure.colorbar(shown, ax=panels, label="difference relative to the norm")
    figure.suptitle(f"{verdict.outcome}: {verdict.stage} at step {verdict.step}" if verdict.stage else verdict.outcome)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def relative(pair: Pair, what: str, i: int) -> Array:
    """How far apart each shared parameter is at a step, relative to its norm."""
    d, norm, _ = pair.apart(what, i)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(np.where(norm > 0, d / norm, 0.0), nan=1.0, posinf=1.0)


def _columns(steps: int, marked: int) -> list[int]:
    if steps <= _MOST:
        return list(range(steps))
    return sorted({*np.linspace(0, steps - 1, _MOST).astype(int).tolist(), *([marked] if marked >= 0 else [])})
