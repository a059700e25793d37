"""The picture of a run, from what was measured and from a trace."""

import json
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import trace_training

from ada2ms.cli import main
from ada2ms.core.measurements import PREFIX, RATIOS
from ada2ms.core.trace import Trace
from ada2ms.core.trace.measured import measured
from ada2ms.inside import draw

MIDDLE = (255, 255, 191)  # of the colours, at a ratio of 1e-3


def records(n: int, ratio: float, **more: Any) -> list[dict[str, Any]]:
    layers = {f"{PREFIX}{RATIOS}/{i}.weight": ratio for i in range(3)}
    return [{f"{PREFIX}updates": i + 1, **layers, **more} for i in range(n)]


def pixels(path: Path) -> Any:
    """The colours of a picture, one each row."""
    image = matplotlib.image.imread(path)
    return np.round(255 * image[..., :3]).astype(int).reshape(-1, 3)


def share(path: Path, colour: tuple[int, int, int]) -> float:
    return float(np.mean(np.all(np.abs(pixels(path) - colour) <= 2, axis=1)))


@pytest.mark.parametrize("n", [1, 30, 1000])
def test_a_ratio_has_its_colour(n: int, tmp_path: Path) -> None:
    draw(records(n, 1e-3), tmp_path / "middle.png")
    draw(records(n, 1e-2, loss=1.0), tmp_path / "large.png", title="large")
    draw(records(n, float("nan")), tmp_path / "none.png")
    assert share(tmp_path / "middle.png", MIDDLE) > 0.3
    assert share(tmp_path / "large.png", MIDDLE) < 0.05
    assert share(tmp_path / "none.png", (217, 217, 217)) > 0.3  # grey


def test_the_numbers_of_the_model_stand_above(tmp_path: Path) -> None:
    draw(records(20, 1e-3), tmp_path / "alone.png")
    more = {f"{PREFIX}{name}": 0.5 for name in ("gradient_norm", "global_second_moment", "adaptivity", "lr")}
    draw(records(20, 1e-3, **more), tmp_path / "more.png")
    heights = [len(matplotlib.image.imread(tmp_path / f"{name}.png")) for name in ("alone", "more")]
    assert heights[1] == heights[0] + 3 * 120  # of an inch each; a learning rate that is always the same is left out


def test_records_without_ratios_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Invalid records: none has ada2ms/update_ratios/\.\.\. \(must be measured"):
        draw([{f"{PREFIX}updates": 1.0}], tmp_path / "x.png")
    with pytest.raises(ValueError, match="Invalid records"):
        draw([], tmp_path / "x.png")


def test_of_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A ratio of norms is that of the entries, where these are recorded; a sketch's norm is right within a factor."""
    path = tmp_path / "run.trace"
    trace_training.train_torch(path)
    trace = Trace.load(path)
    found = measured(trace)
    assert [record[f"{PREFIX}updates"] for record in found] == [step.number for step in trace.steps]
    whole = next(step for step in trace.steps if step.full)
    record = found[trace.steps.index(whole)]
    for p in trace.parameters:
        update, value = (np.linalg.norm(whole.full[what][p.name]) for what in ("update", "value"))
        assert 0.4 < record[f"{PREFIX}{RATIOS}/{p.name}"] / (update / value) < 2.5
    gradients = np.sqrt(sum(np.sum(x**2) for x in whole.full["gradient"].values()))
    assert record[f"{PREFIX}gradient_norm"] == pytest.approx(float(gradients), rel=1e-5)
    assert record[f"{PREFIX}lr"] == trace_training.LR
    picture = tmp_path / "run.png"
    assert main(["trace", "show", str(path), "--picture", str(picture)]) == 0
    assert capsys.readouterr().out.endswith(f"Picture: {picture}\n")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["trace", "show", str(path), "--picture", str(picture), "--json"]) == 0
    json.loads(capsys.readouterr().out)
    assert main(["trace", "show", str(path), "--picture", str(tmp_path / "run.unknown")]) == 2
    assert "unknown" in capsys.readouterr().err
