"""The study of the default: its protocol and its rule are what docs/default.md says, and its report is right."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compare_support import finish

from ada2ms.cli import main
from ada2ms.compare import data, runner, study, verdict
from ada2ms.compare.optimizers import named
from ada2ms.compare.protocol import EVERY_TASK, TASKS, Run
from ada2ms.compare.study import CHOICES, Study
from ada2ms.compare.train import train
from ada2ms.core import DEFAULTS

RESULTS = Path(__file__).parents[1] / "docs" / "comparison" / "default"
TASK = "glyphs, ViT"
HALF, THREE_QUARTERS, NINE_TENTHS = CHOICES


def test_the_protocol_is_what_the_page_says() -> None:
    protocol = Study()
    records = finish(protocol, lambda run: 0.5)
    assert len(records) == protocol.total() == 784
    for task in protocol.tasks:
        for name in protocol.optimizers:
            runs = protocol.chosen(task, name, records)
            coarse = [(r, s) for r in (9.49e-4, 3e-3, 9.49e-3, 3e-2, 9.49e-2) for s in (0, 1)]
            fine = [(r, s) for r in (5.34e-4, 1.69e-3) for s in (0, 1)]  # among equals the first is best
            assert [(r.rate, r.seed) for r in runs if r.stage == "rate"] == coarse + fine
            assert {r.decay for r in runs if r.stage == "rate"} == {0.1}
            assert [(r.decay, r.seed) for r in runs if r.stage == "decay"] == [
                (d, s) for d in (0.01, 1.0) for s in (0, 1)
            ]
            assert [r.seed for r in runs if r.stage == "test"] == list(range(11, 21))
    assert {name: protocol.steps[name] // TASKS[name.removesuffix(", long")].steps for name in protocol.tasks} == {
        name: 4 if name.endswith("long") else 1 for name in protocol.tasks
    }
    assert len(protocol.tasks) == 7


def test_the_best_by_the_mean_of_both_seeds_is_tested() -> None:
    """One seed alone prefers another rate, and another decay."""
    protocol = replace(Study(), tasks=(TASK,), optimizers=(HALF,))
    wanted = {
        ("rate", 9.49e-3, 0.1): (0.6, 0.6),
        ("rate", 3e-2, 0.1): (0.9, 0.2),
        ("rate", 5.34e-3, 0.1): (0.5, 0.8),
        ("decay", 5.34e-3, 0.01): (0.9, 0.1),
        ("decay", 5.34e-3, 1.0): (0.7, 0.7),
    }
    records = finish(protocol, lambda run: wanted.get((run.stage, run.rate, run.decay), (0.1,) * 99)[run.seed])
    tested = {(r["run"]["rate"], r["run"]["decay"]) for r in records.values() if r["run"]["stage"] == "test"}
    assert tested == {(5.34e-3, 1.0)}
    rates = {r["run"]["rate"] for r in records.values() if r["run"]["stage"] == "rate"}
    assert {5.34e-3, 1.69e-2} < rates  # a quarter of a decade to both sides of 9.49e-3


def test_a_longer_task_is_trained_longer_and_no_curves_are_kept() -> None:
    digits = data.load_digits(0.1)
    run = Run("test", "digits, ResNet-20, long", NINE_TENTHS, 3e-3, 0.1, 11)
    found = train(run, study.SMOKE, digits)
    assert "curves" not in found
    assert 0 <= found["test"]["accuracy"] <= 1
    assert EVERY_TASK[run.task].steps == 1200


def scores(**means: tuple[float, float, float]) -> dict[str, dict[str, list[float]]]:
    """Accuracies of ten seeds around each candidate's mean, by task.

    The difference of the first two has a standard error of 0.01, the others have more.
    """
    wave = np.sqrt(0.9) * np.array([1, -1] * 5)  # of sample deviation 1
    noise = [0.01 * np.sqrt(10) * wave, 0 * wave, -0.02 * np.sqrt(10) * wave]
    return {
        task: {name: (mean + n).tolist() for name, mean, n in zip(CHOICES, values, noise, strict=True)}
        for task, values in means.items()
    }


def test_the_unit_is_the_least_standard_error_of_a_difference() -> None:
    found = scores(a=(0.5, 0.6, 0.7))["a"]
    assert study.unit(found) == pytest.approx(0.01)
    found[NINE_TENTHS][0] = 0.0  # one that diverged makes its own differences uncertain, and not the unit
    assert study.unit(found) == pytest.approx(0.01)
    assert study.unit({name: [0.5, 0.5] for name in CHOICES}) == 0.002


def test_the_loss_is_the_distance_from_the_best_candidate() -> None:
    found = scores(a=(0.50, 0.53, 0.52), b=(0.60, 0.56, 0.60))
    found["a"][study.YARDSTICK] = found["b"][study.YARDSTICK] = [1.0] * 10  # has no part in it
    lost = study.losses(found)
    assert lost["a"] == pytest.approx({HALF: 3, THREE_QUARTERS: 0, NINE_TENTHS: 1})
    assert lost["b"] == pytest.approx({HALF: 0, THREE_QUARTERS: 4, NINE_TENTHS: 0})
    assert study.worst(found) == pytest.approx({HALF: 3, THREE_QUARTERS: 4, NINE_TENTHS: 1})


@pytest.mark.parametrize(
    ("means", "chosen"),
    [
        ({"a": (0.5, 0.5, 0.5)}, HALF),
        ({"a": (0.5, 0.5, 0.519)}, HALF),  # within two units
        ({"a": (0.5, 0.5, 0.521)}, NINE_TENTHS),
        ({"a": (0.5, 0.51, 0.521)}, THREE_QUARTERS),  # equal to the best, and simpler
        ({"a": (0.5, 0.54, 0.53), "b": (0.54, 0.53, 0.5)}, THREE_QUARTERS),  # the least of the worst
        ({"a": (0.53, 0.5, 0.5), "b": (0.5, 0.5, 0.5)}, HALF),
    ],
)
def test_the_choice(means: dict[str, Any], chosen: str) -> None:
    assert study.choice(scores(**means)) == chosen


def test_stability_is_certain_where_there_is_no_doubt() -> None:
    assert study.stability(scores(a=(0.5, 0.5, 0.9)), 50) == {HALF: 0, THREE_QUARTERS: 0, NINE_TENTHS: 1}
    doubtful = study.stability(scores(a=(0.5, 0.5, 0.52)), 200)
    assert sum(doubtful.values()) == pytest.approx(1)
    assert 0.1 < doubtful[NINE_TENTHS] < 0.9


def test_only_whole_seeds_count(tmp_path: Path) -> None:
    protocol = replace(Study(), tasks=(TASK, "text, transformer"))

    def accuracy(run: Run) -> float:
        return 0.5 + run.seed / 1000 + 0.1 * (run.optimizer == NINE_TENTHS)

    records = finish(protocol, accuracy, protocol.total() - 4 * 8 - 1)  # a run less than six whole seeds
    assert protocol.whole(records) == [11, 12, 13, 14, 15]
    assert {len(s) for task in protocol.scores(records).values() for s in task.values()} == {5}
    assert f"Chosen: **{NINE_TENTHS}**." in verdict.markdown(protocol, records, verdict.table_rows(protocol, records))
    fewer = finish(protocol, accuracy, protocol.total() - 5 * 8 - 1)
    table = verdict.markdown(protocol, fewer, verdict.table_rows(protocol, fewer))
    assert "Nothing is chosen: 4 seeds are whole, and 5 are needed." in table
    least = finish(protocol, accuracy, protocol.total() - 8 * 8 - 1)
    assert verdict.write(protocol, least, tmp_path) == []  # one


@pytest.mark.slow
def test_it_goes_on_where_it_was_and_reports(tmp_path: Path) -> None:
    protocol = replace(study.SMOKE, tasks=("text, transformer",))
    with pytest.raises(StoppedError):
        runner.compare(protocol, tmp_path, workers=1, progress=stop_at(5))
    before = (tmp_path / "runs.jsonl").read_text()
    records = runner.compare(protocol, tmp_path, workers=1)
    assert (tmp_path / "runs.jsonl").read_text().startswith(before)
    assert len(records) == protocol.total() == 4 * 8
    files = verdict.write(protocol, records, tmp_path)
    assert [file.name for file in files] == ["table.md", "table.csv", "default.png"]
    assert files[2].read_bytes()[:4] == b"\x89PNG"
    assert len(files[1].read_text().splitlines()) == 1 + 4
    with pytest.raises(runner.CompareError, match="another comparison: its tasks, steps differ"):
        runner.compare(study.SMOKE, tmp_path)


class StoppedError(Exception):
    pass


def stop_at(count: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done == count:
            raise StoppedError

    return progress


@pytest.mark.parametrize(
    "option", [["--tasks", "digits"], ["--optimizers", "AdamW"], ["--seeds", "2"], ["--cifar", "anywhere"]]
)
def test_the_protocol_is_fixed(option: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--default", "--out", str(tmp_path / "out"), *option]) == 2
    assert f"{option[0]} does not go with --default" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_page_shows_the_records() -> None:
    """What docs/comparison/default holds is what its records give, and the default is what the rule chooses."""
    records = runner.load(RESULTS)
    protocol = Study()
    plan = json.loads((RESULTS / "plan.json").read_text())["protocol"]
    assert plan == json.loads(json.dumps(protocol.as_data()))
    chosen = [
        run.key for t in protocol.tasks for name in protocol.optimizers for run in protocol.chosen(t, name, records)
    ]
    assert sorted(records) == sorted(chosen)
    assert len(records) == protocol.total()
    table = (RESULTS / "table.md").read_text()
    assert table == verdict.markdown(protocol, records, verdict.table_rows(protocol, records))
    page = (RESULTS.parents[1] / "default.md").read_text()
    assert all(line in page for line in table.splitlines() if line.startswith("|"))
    assert named(DEFAULTS.adaptivity, "model") == study.choice(protocol.scores(records))  # type: ignore[arg-type]
