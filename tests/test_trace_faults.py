"""Planted faults: the verdict names step, stage and cause of each, and says "only rounding" of its twin without it."""

import re
from pathlib import Path

import pytest
import trace_faults
from trace_faults import FAULTS, Fault, verdicts

from ada2ms.core.trace import causes, data, settings, starts, walk


def parameters(faults: list[Fault]) -> list[object]:
    """Each fault with its marks: those with Keras run on a backend, and what is not quick is for `make slow`."""
    found = []
    for fault in faults:
        marks = [pytest.mark.keras] * ("keras" in (fault.a, fault.b)) + [pytest.mark.slow] * (not fault.quick)
        found.append(pytest.param(fault, marks=marks, id=f"{fault.a}-{fault.b}: {fault.name}"))
    return found


@pytest.mark.parametrize("fault", parameters(FAULTS))
def test_a_fault_is_found_where_it_is(fault: Fault) -> None:
    found, twin = verdicts(fault)
    assert (found.outcome, found.stage, found.kind, found.step) == ("parted", fault.stage, fault.kind, fault.step), (
        found
    )
    assert found.status == 1
    assert fault.also in "; ".join(found.also)
    assert bool(found.also) == bool(fault.also), found
    assert found.place == fault.place, found
    assert found.look, "it proposes nothing to look at"
    assert (twin.outcome, twin.status, twin.stage) == ("only rounding", 0, ""), twin
    assert "rounding explains" in str(twin)


DETECTORS = {
    "data": (walk.data, "compare"),
    "start": (walk._Walk, "_values"),
    "value": (walk._Walk, "_values"),
    "forward": (walk._Walk, "_forward"),
    "gradient": (walk._Walk, "_forward"),
    "hyperparameters": (walk._Walk, "_hyper"),
    "update": (walk.Updates, "check"),
    "statistics": (walk.Statistics, "verdict"),
}


@pytest.mark.parametrize("fault", parameters([fault for fault in FAULTS if fault.quick]))
def test_without_its_detector_a_fault_is_not_found(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no verdict is right by accident."""
    stage = "statistics" if "statistics" in fault.kind else fault.stage
    monkeypatch.setattr(*DETECTORS[stage], lambda *_: None)
    found, _ = verdicts(fault)
    assert (found.stage, found.kind) != (fault.stage, fault.kind)


@pytest.mark.parametrize("fault", parameters([fault for fault in FAULTS if fault.quick and fault.place]))
def test_without_what_places_it_a_fault_is_found_and_not_located(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk.places, "place", lambda *_: None)
    found, _ = verdicts(fault)
    assert (found.stage, found.kind, found.place) == (fault.stage, fault.kind, "")


NAMERS: dict[str, tuple[object, str, object]] = {  # what gives a cause its name, and what says that it is not that
    "penalty": (causes.sums, "mixture", None),
    "gradient of before": (causes.sums, "mixture", None),
    "clipping by value": (causes.sums, "clipped", None),
    "clipping of each": (causes.sums, "clipped", None),
    "clipping": (causes, "_is_clipped", False),
    "precision": (causes, "_precision", None),
    "transposed": (starts, "_transposed", False),
    "lr unit": (settings, "_unit", ""),
    "scaled": (data, "alike", "other"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", [f for f in FAULTS if f.kind in NAMERS and "keras" not in (f.a, f.b)], ids=str)
def test_without_what_names_it_a_cause_has_another_name(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name, answer = NAMERS[fault.kind]
    monkeypatch.setattr(module, name, lambda *_: answer)
    found, _ = verdicts(fault)
    assert found.outcome == "parted"
    assert found.kind != fault.kind, found


def test_the_faults_are_many_and_of_every_stage_and_direction() -> None:
    assert len(FAULTS) >= 24
    assert {fault.stage for fault in FAULTS} == set(DETECTORS)
    directions = {(fault.a, fault.b) for fault in FAULTS}
    assert directions >= {("torch", "torch"), ("torch", "jax"), ("jax", "keras"), ("keras", "torch")}
    assert sum(fault.quick for fault in FAULTS) >= len(FAULTS) / 4


def test_the_table_in_the_docs_is_of_these_faults() -> None:
    """Each row with its stage and step, and with the twin's verdict."""
    text = (Path(__file__).parents[1] / "docs" / "trace-faults.md").read_text()
    rows = re.findall(r"^\| (\w+), (\w+) \| (.+?) \| (\d+) \| (\w+) \| .+ \| only rounding \|$", text, re.MULTILINE)
    expected = [(f.a, f.b, f.name, str(f.step), f.stage) for f in FAULTS]
    assert rows == expected, "run: PYTHONPATH=. python tests/trace_faults.py --write"
    assert trace_faults.DOCS.name == "trace-faults.md"
