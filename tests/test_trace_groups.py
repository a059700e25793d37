"""Many groups of parameters: what is said of them is short, what differs in the same is one difference, and what nobody
told is found group by group."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from trace_faults import trace
from trace_faults_more import groups
from trace_training import LR

from ada2ms.core.trace import Trace, Verdict, diff, judge
from ada2ms.core.trace.verdict import joined

WITHIN = {"data": {"within": True}}


def layered(times: float = 1.0, *, eps: float = 1e-8, biases: float = 0.0, layerwise: float = 0.8) -> Any:
    """A group for each parameter, with a learning rate that falls from layer to layer."""

    def make(net: Any) -> Any:
        made = groups(decay_of_biases=biases, layerwise=layerwise)(net).param_groups
        return torch.optim.AdamW([{**g, "lr": times * g["lr"], "eps": eps} for g in made], lr=LR)

    return make


def untold(given: dict[str, Any]) -> Trace:
    found = trace("torch", given)
    return replace(found, steps=[replace(step, hyper=[]) for step in found.steps])


def test_groups_that_nobody_told_are_found_and_said_once() -> None:
    a, b = untold({"made": layered()}), untold({**WITHIN, "made": layered()})
    for found in (diff(a, b), judge(a)):
        assert (found.outcome, found.status) == ("only rounding", 0), found
        rules = [line for line in str(found).splitlines() if "are those of Adam" in line]
        assert 1 <= sum(line.count("weight_decay 0.01") for line in rules) <= 1, found
    assert sum("no learning rate was told" in sentence for sentence in judge(a).evidence) >= 3


UNTOLD: list[tuple[dict[str, Any], str, str]] = [
    ({"times": 2.0}, "the learning rate that updates show is 2 times as large in B as in A, in every group", "lr"),
    ({"eps": 1e-3}, "the optimizers compute other things: eps: 1e-08 against 0.001", "changed"),
    (
        {"biases": 0.01},
        "0.dense.bias, 1.norm.scale, 1.norm.bias, 2.dense.bias and 1 more go by another rule in B: weight_decay: 0 "
        "against 0.01",
        "some updates",
    ),
]


@pytest.mark.parametrize(("change", "cause", "kind"), UNTOLD, ids=[kind for _, _, kind in UNTOLD])
def test_what_differs_in_all_groups_is_one_difference(change: dict[str, Any], cause: str, kind: str) -> None:
    found = diff(untold({"made": layered()}), untold({**WITHIN, "made": layered(**change)}))
    assert (found.stage, found.step, found.kind) == ("update", 1, kind), found
    assert found.cause == cause


def test_other_rates_of_each_group_are_said_of_the_first_and_counted() -> None:
    """Told or not; and JSON has all parameters."""
    for found in (
        diff(untold({"made": layered()}), untold({**WITHIN, "made": layered(layerwise=0.5)})),
        diff(trace("torch", {"made": layered()}), trace("torch", {**WITHIN, "made": layered(layerwise=0.5)})),
    ):
        assert found.stage in ("update", "hyperparameters"), found
        assert len(found.parameters) == 6, "the head's is equal"
        assert max(map(len, str(found).splitlines())) < 500, found


def test_of_many_sentences_the_first_are_printed_and_json_has_all() -> None:
    found = joined([Verdict("parted", f"cause {i}", "update", 1, evidence=[f"size {i}", "common"]) for i in range(30)])
    assert found is not None
    assert found.cause == "cause 0; cause 1; cause 2; cause 3 and 26 more"
    assert [f"cause {i}" for i in range(30)] == found.data()["evidence"][:30]
    assert found.evidence.count("common") == 1
    assert "and 53 more (--json has all)" in str(found)
    assert len(str(found).splitlines()) == 10


def test_what_nobody_told_is_no_fault_of_the_optimizer() -> None:
    """A weight decay of which nothing was recorded is told of; one that was recorded otherwise is a fault."""
    assert judge(untold({})).outcome == "only rounding", judge(untold({}))
    assert "weight_decay 0.01" in str(judge(untold({})))
    a = trace("torch", {})
    wrong = [replace(step, hyper=[{**hyper, "weight_decay": 0.1} for hyper in step.hyper]) for step in a.steps]
    found = judge(replace(a, steps=wrong))
    assert (found.outcome, found.kind) == ("parted", "changed"), found
    assert "weight_decay: 0.1 against 0.01" in found.cause
