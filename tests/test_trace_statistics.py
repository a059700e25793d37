"""Running statistics in traces: what is said of them beyond the planted faults, and of traces without any."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trace_faults import trace

from ada2ms.cli import main
from ada2ms.cli.picture import draw
from ada2ms.core.trace import Trace, diff
from ada2ms.core.trace.model import STATISTICS
from support import slow

TORCH: dict[str, Any] = {"batch_norm": {}}
WITHIN = {"data": {"within": True}}
OLD = Path(__file__).parent / "data" / "trace-before-statistics.trace"


def cut(given: Trace, steps: int) -> Trace:
    """The first steps of a trace."""
    return replace(given, steps=given.steps[:steps])


def changed(given: Trace, change: Any) -> Trace:
    """A trace with other statistics: those that `change` makes of each step's number, rows and names."""
    found = copy.deepcopy(given)
    assert found.statistics is not None
    names = [p.name for p in found.statistics]
    for step in found.steps:
        step.sketches[STATISTICS] = change(step.number, step.sketches[STATISTICS], names)
        step.full.pop(STATISTICS, None)
    return found


@pytest.mark.parametrize("steps", [*slow(1, 2), 8])
def test_a_correct_port_keeps_the_biased_variance_and_says_so(steps: int) -> None:
    """In both directions, however short the run is: torch's 0.1 is the others' 0.9."""
    a, b = cut(trace("torch", TORCH), steps), cut(trace("jax", {"keeps": 0.9}), steps)
    for found, who in ((diff(a, b), "B"), (diff(b, a), "A")):
        assert (found.outcome, found.status) == ("only rounding", 0), found
        (note,) = [note for note in found.notes if "biased" in note]
        assert note.startswith(f"running variances of {who} are (n-1)/n of the other's, n 8 of 1.norm.var")


def test_within_one_framework_an_unbiased_variance_is_a_fault() -> None:
    """No convention excuses it there, nor one that is torch's in another framework, and the other way round."""
    a, b = trace("torch", TORCH), trace("jax", {"keeps": 0.9})
    for names in (("jax", "keras"), ("torch", "torch"), ("jax", "torch")):
        x, y = (replace(t, about={**t.about, "framework": name}) for t, name in zip((a, b), names, strict=True))
        for found, factor in ((diff(x, y), "0.875"), (diff(y, x), "1.143")):
            assert (found.outcome, found.stage, found.kind) == ("parted", "statistics", "factor"), found
            assert found.cause == f"1.norm.var are those of batches {factor} times as large in B as in A"


@pytest.mark.parametrize(("steps", "words"), [(1, "move 9 times as far in B as in A"), (2, "keep 0.9 of the old")])
def test_momentum_is_named_from_the_second_step_on(steps: int, words: str) -> None:
    a, b = (cut(trace("torch", {"batch_norm": options}), steps) for options in ({}, {"momentum": 0.9}))
    found = diff(a, b)
    assert found.kind == "momentum", found
    assert words in found.cause


@pytest.mark.parametrize("keeps", [0.99, *slow(0.5, 0.999)])
def test_each_runs_momentum_is_that_which_it_has(keeps: float) -> None:
    """Also between frameworks, whose variances differ by a factor besides."""
    found = diff(trace("jax", {"keeps": keeps}), trace("torch", TORCH))
    assert found.cause == f"1.norm.mean, 1.norm.var keep {keeps:g} of the old at each step in A and 0.9 in B", found


def moved(given: Trace, keeps: float, batches: list[Any]) -> Trace:
    """A trace whose statistics are made of these batches' ones: for each step (statistics, SUMS)."""
    assert given.start is not None
    rows = [given.start.sketches[STATISTICS]]
    for batch in batches:
        norm = np.linalg.norm(batch, axis=1, keepdims=True) / 8**0.5
        rows.append(keeps * rows[-1] + (1 - keeps) * np.concatenate([norm, batch], 1))
    return changed(given, lambda number, old, names: rows[number])


def test_momentum_shows_where_all_batches_are_alike_too() -> None:
    """As when one batch is learned by heart; and it is not taken for the cause where it is not."""
    given, rng = trace("torch", TORCH), np.random.default_rng(0)
    same, others = ([rng.normal(size=(2, 8)) + 2] * 8, [rng.normal(size=(2, 8)) + 2 for _ in range(8)])
    short = [np.outer([2, 3], np.resize([1, -1], 8)) * (1 + i) for i in range(8)]  # of which two means show too little
    for batches, steps in ((same, 8), (others, 8), (short, 2)):
        found = diff(cut(moved(given, 0.9, batches), steps), cut(moved(given, 0.1, batches), steps))
        assert found.cause == "1.norm.mean, 1.norm.var keep 0.9 of the old at each step in A and 0.1 in B", found
    seen = [x + 0.02 * rng.normal(size=x.shape) for x in others]
    found = diff(moved(given, 0.9, others), moved(given, 0.9, seen))
    assert (found.kind, found.step) == ("other statistics", 1), found


def test_what_is_frozen_from_a_later_step_on_is_named_there() -> None:
    a, kept = trace("torch", TORCH), []

    def frozen(number: int, rows: Any, names: list[str]) -> Any:
        kept.append(rows if number <= 5 else kept[-1])
        return kept[-1]

    found = diff(a, changed(a, frozen))
    assert (found.stage, found.kind, found.step) == ("statistics", "frozen", 6), found
    assert found.cause == "1.norm.mean, 1.norm.var do not move in B"


def test_in_evaluation_mode_the_forward_pass_parts_and_frozen_statistics_are_named_with_it() -> None:
    found = diff(trace("torch", TORCH), trace("torch", {**TORCH, "start": lambda net: net[1].eval()}))
    assert (found.stage, found.step) == ("forward", 1), found
    assert found.also == ["in the stage 'statistics': 1.norm.mean, 1.norm.var do not move in B"]


def test_statistics_that_follow_from_another_forward_pass_are_no_fault_of_their_own() -> None:
    """Whether the loss was told, so that the forward pass is what parts, or not, so that the gradients are."""
    a, b = trace("torch", TORCH), trace("torch", {**TORCH, "activation": "relu"})
    inputs = trace("torch", {**TORCH, "data": {"scale": 2.0}})
    for x, y in ((a, b), (a, inputs)):
        silent = [replace(t, steps=[replace(s, loss=None, batches=[]) for s in t.steps]) for t in (x, y)]
        for found in (diff(x, y), diff(*silent)):
            assert found.outcome == "parted"
            assert not any("statistics" in text for text in (found.stage, *found.also)), found


def test_statistics_that_one_run_did_not_record_are_not_compared() -> None:
    a, b = trace("torch", TORCH), trace("torch", {**TORCH, **WITHIN})
    for found in (diff(a, replace(b, statistics=None)), diff(replace(b, statistics=None), a)):
        assert found.status == 0, found
        assert any("running statistics were recorded in" in note for note in found.notes), found
    assert b.statistics is not None
    named = [replace(p, name=f"{p.name}.of.mine") for p in b.statistics]
    found = diff(a, replace(b, statistics=named))
    assert found.status == 0, found
    assert "statistics that only A has are not compared: 1.norm.mean, 1.norm.var" in found.notes


def test_what_is_not_finite_in_one_run_alone_is_named() -> None:
    a = trace("torch", TORCH)
    found = diff(changed(a, lambda number, rows, names: rows * (np.nan if number > 3 else 1.0)), a)
    assert (found.stage, found.step, found.cause) == ("statistics", 4, "1.norm.mean, 1.norm.var are not finite in A")


def test_statistics_that_were_told_now_and_then_are_compared_there() -> None:
    """As where several steps are one compiled program. Of several batches at once momentum is not told apart."""

    def seldom(given: Trace) -> Trace:
        found = copy.deepcopy(given)
        for step in found.steps:
            if step.number not in (1, 4, 7):
                del step.sketches[STATISTICS]
        return found

    a, b, c = (trace("torch", TORCH), trace("jax", {"keeps": 0.9}), trace("jax", {"keeps": 0.1}))
    assert diff(a, seldom(b)).status == 0
    found = diff(a, seldom(c))
    assert (found.stage, found.kind) == ("statistics", "momentum"), found
    never = replace(
        a, steps=[replace(s, sketches={k: x for k, x in s.sketches.items() if k != STATISTICS}) for s in a.steps]
    )
    found = diff(a, never)
    assert found.status == 0
    assert "running statistics were told in no step of both: not compared" in found.notes


def test_a_mean_near_zero_is_judged_by_what_it_is_a_mean_of() -> None:
    """As where one normalisation follows another: what is left of the mean is rounding, beside a variance of 1."""
    a = trace("torch", TORCH)
    rng = np.random.default_rng(0)

    def noise(number: int, rows: Any, names: list[str]) -> Any:
        near = np.where(np.array([["mean" in name] for name in names]), 1e-7 * rng.normal(size=rows.shape), rows)
        return near

    x, y = changed(a, noise), changed(a, noise)
    assert diff(x, y).status == 0, diff(x, y)


def test_a_trace_of_the_version_before_is_read_and_compared() -> None:
    old = Trace.load(OLD)
    assert (len(old.steps), old.statistics, old.start) == (3, None, None)
    assert set(old.steps[0].sketches) == {"value", "gradient", "update"}
    assert diff(old, old).status == 0


def test_a_trace_shows_its_statistics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = trace("torch", TORCH)
    assert given.statistics is not None
    assert [(p.name, p.own, p.shape) for p in given.statistics] == [
        ("1.norm.mean", "1.running_mean", (16,)),
        ("1.norm.var", "1.running_var", (16,)),
    ]
    import trace_training

    path = str(trace_training.train_torch(tmp_path / "run", **TORCH))
    assert main(["trace", "show", path]) == 0
    assert "1.norm.var      (16,)  float32  from 1.running_var  statistics" in capsys.readouterr().out
    assert main(["trace", "show", path, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert list(said["statistics"]) == ["1.norm.mean", "1.norm.var"]
    assert all(row["statistics"] > 0 for row in said["rows"])


def test_statistics_have_a_panel_of_their_own_in_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Marked where they part; without statistics there is none."""
    plt = pytest.importorskip("matplotlib.pyplot")
    drawn: list[Any] = []
    monkeypatch.setattr(plt, "close", drawn.append)
    a = trace("torch", TORCH)
    for b, panels in (
        (trace("torch", {"batch_norm": {"momentum": 0.9}}), {"value": 0, "gradient": 0, "update": 0, "statistics": 2}),
        (trace("torch", {"batch_norm": {"track_running_stats": False}}), {"value": 0, "gradient": 0, "update": 0}),
    ):
        found = diff(a, b)
        assert found.stage == "statistics", found
        draw(a, b, found, tmp_path / "picture.png")
        marked = {x.get_title("left"): sum(len(y.get_offsets()) for y in x.collections) for x in drawn[-1].axes}
        assert {title: count for title, count in marked.items() if title} == panels
