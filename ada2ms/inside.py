"""The picture of what `measure` has measured in a run, in whichever framework: layers down, steps across."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ada2ms._extras import require_all
from ada2ms.core.measurements import PREFIX, RATIOS

Record = Mapping[str, Any]
_ABOVE: Final = {"gradient_norm": "gradient norm", "global_second_moment": "s", "adaptivity": "adaptivity", "lr": "lr"}
_LOGARITHMIC: Final = ("gradient_norm", "global_second_moment")
_MOST_RECORDS, _MOST_NAMES = 400, 60  # columns that are drawn, and names that are readable beside the rows


def draw(records: Sequence[Record], path: str | Path, *, prefix: str = PREFIX, title: str = "") -> None:
    """Draws log10 of each parameter's ratio of update to weight over a run, and above it what the model has of these:
    the gradient's norm, s, adaptivity, and the learning rate if it changes.

    Args:
        records: what `measure` returned, in the order of the run, each with what else you log. Numbers may be tensors
            of one element, which are waited for. Long runs are drawn by 400 of their records.
        path: of the picture; its suffix says of which kind it is.
        prefix: the one that `measure` was given.
        title: what stands above.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no ratio in the records.
        OSError, ValueError: the file cannot be written, or is of a kind that matplotlib does not know.
    """
    require_all("The picture", ("matplotlib",), "demo")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    layers = list(dict.fromkeys(key for record in records for key in record if key.startswith(f"{prefix}{RATIOS}/")))
    if not layers:
        raise ValueError(
            f"Invalid records: none has {prefix}{RATIOS}/... (must be measured with the model's parameters)"
        )
    records = [records[i] for i in sorted({*np.linspace(0, len(records) - 1, _MOST_RECORDS).round().astype(int)})]
    lines = {what: _column(records, prefix + what) for what in _ABOVE}
    lines = {what: x for what, x in lines.items() if not np.all(np.isnan(x)) and (what != "lr" or np.ptp(x) > 0)}
    heights = [1.0] * len(lines) + [1.2 + 0.18 * min(len(layers), _MOST_NAMES)]
    figure, axes = plt.subplots(
        len(heights),
        1,
        figsize=(9, sum(heights) + 0.8),
        sharex=True,
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    *above, panel = axes[:, 0]
    for axis, (what, values) in zip(above, lines.items(), strict=True):
        axis.plot(values, color="0.2", linewidth=1.2, marker="." if len(records) == 1 else None)
        axis.set_ylabel(_ABOVE[what], rotation=0, ha="right", va="center")
        axis.set_yscale("log" if what in _LOGARITHMIC and np.any(values > 0) else "linear")
    with np.errstate(divide="ignore", invalid="ignore"):
        image = np.log10(np.array([_column(records, layer) for layer in layers]))
    shown = panel.imshow(
        image,
        aspect="auto",
        cmap=matplotlib.colormaps["RdYlBu_r"].with_extremes(bad="0.85"),
        vmin=-5,  # -3, about which updates of most networks are, is in the middle
        vmax=-1,
        interpolation="nearest",
    )
    names = [layer.removeprefix(f"{prefix}{RATIOS}/") for layer in layers]
    rows = range(0, len(names), math.ceil(len(names) / _MOST_NAMES))
    panel.set_yticks([*rows], [names[i] for i in rows], fontsize=7)
    updates = _column(records, prefix + "updates")
    ticks = sorted({int(i) for i in np.linspace(0, len(records) - 1, min(len(records), 10))})
    panel.set_xticks(ticks, [str(i + 1 if np.isnan(updates[i]) else int(updates[i])) for i in ticks])
    panel.set_xlabel("update")
    figure.colorbar(shown, ax=panel, label=r"$\log_{10}$(|update| / |weight|)", extend="both")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _column(records: Sequence[Record], key: str) -> NDArray[Any]:
    """A number of each record; NaN where there is none."""
    return np.array([float(record.get(key, math.nan)) for record in records])
