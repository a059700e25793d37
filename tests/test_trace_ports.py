"""Correct ports: two transformers in torch, flax.nnx and Keras, and a small network in other arithmetic, differ by
rounding only; and where their parameters are packed in one framework, nothing is left out."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import trace_faults
from trace_faults import adamw, other
from trace_faults_more import groups, one_hot
from trace_models import trace

from ada2ms.core.trace import Trace, diff, judge
from ada2ms.core.trace.pair import Pair

PORTS = [
    ("torch", "nnx", "vit", "AdamW"),
    ("torch", "nnx", "gpt", "Ada2MS"),
    ("nnx", "torch", "gpt", "AdamW"),
    ("nnx", "torch", "vit", "Ada2MS"),
    ("torch", "keras", "vit", "Ada2MS at 1"),
    ("keras", "torch", "gpt", "Ada2MS"),
    ("keras", "nnx", "vit", "Ada2MS"),
    ("nnx", "keras", "gpt", "Ada2MS at 1"),
]


def marked() -> list[Any]:
    marks = [[pytest.mark.keras] * ("keras" in port[:2]) + [pytest.mark.slow] for port in PORTS]
    return [pytest.param(*port, marks=each, id=" ".join(port)) for port, each in zip(PORTS, marks, strict=True)]


def check(a: Trace, b: Trace) -> None:
    for found in (diff(a, b), diff(b, a)):
        assert (found.outcome, found.status) == ("only rounding", 0), found
        assert not any("not compared:" in note for note in found.notes), found


@pytest.mark.parametrize(("a", "b", "kind", "optimizer"), marked())
def test_a_transformers_port_differs_by_rounding_only(a: str, b: str, kind: str, optimizer: str) -> None:
    x, y = trace(a, kind, optimizer), trace(b, kind, optimizer)
    check(x, y)
    assert judge(x).status == judge(y).status == 0
    assert any(name.endswith("attention.query.kernel") for name in x.index)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_threads_and_seeds_change_nothing(seed: int) -> None:
    check(trace("torch", "gpt", "AdamW", seed=seed, threads=1), trace("torch", "gpt", "AdamW", seed=seed, threads=2))


WITHIN = {"data": {"within": True}}
RIGHT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "float64 and float32": ({}, {"dtype": "float64"}),
    "bfloat16": ({"dtype": "bfloat16"}, {"dtype": "bfloat16", **WITHIN}),
    "bfloat16 of Ada2MS": (
        {"dtype": "bfloat16", "optimizer": other("Ada2MS")},
        {"dtype": "bfloat16", "optimizer": other("Ada2MS"), **WITHIN},
    ),
    "labels as one-hot": ({}, {"told": one_hot}),
    "one group and many": ({}, {"made": groups()}),
    "groups in both": (
        {"made": groups(2.0, decay_of_biases=0.0, layerwise=0.8)},
        {"made": groups(2.0, decay_of_biases=0.0, layerwise=0.8), **WITHIN},
    ),
    "accumulated": ({}, {"accumulate": 2}),
    "a frozen bias in both": ({"frozen": ("2.dense.bias",)}, {"frozen": ("2.dense.bias",), **WITHIN}),
    "a clamp in both": ({"clamp": 0.3}, {"clamp": 0.3, **WITHIN}),
    "clipped in both": ({"clip": 0.5}, {"clip": 0.5, **WITHIN}),
    "clipped in both under autocast": ({"autocast": True, "clip": 0.5}, {"autocast": True, "clip": 0.5, **WITHIN}),
    "an AMSGrad in both": ({"optimizer": adamw(amsgrad=True)}, {"optimizer": adamw(amsgrad=True), **WITHIN}),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_differs_by_rounding_only(name: str) -> None:
    a, b = (trace_faults.trace("torch", given) for given in RIGHT[name])
    check(a, b)


def test_each_group_is_judged_by_its_own_hyperparameters() -> None:
    """A run with groups is acquitted; one whose head does not do what it was told is convicted, with its name."""
    a = copy.deepcopy(trace_faults.trace("torch", {"made": groups(2.0, decay_of_biases=0.0, layerwise=0.8)}))
    assert judge(a).outcome == "only rounding", judge(a)
    for step in a.steps:
        for name in ("3.dense.kernel", "3.dense.bias"):
            if step.full:
                step.full["update"][name] = step.full["update"][name] * 1.5
    found = judge(a)
    assert (found.outcome, found.step) == ("parted", 1), found
    assert "the updates of 3.dense.kernel, 3.dense.bias are 1.5 of the rule's" in found.cause


def test_a_long_trace_is_compared_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed grows with the number of steps, and not with its square; progress is told of each."""
    a, b = (trace_faults.trace("torch", given) for given in ({}, WITHIN))
    calls: list[str] = []
    apart = Pair.apart

    def counted(self: Pair, what: str, i: int) -> Any:
        calls.append(what)
        return apart(self, what, i)

    monkeypatch.setattr(Pair, "apart", counted)
    counts = []
    for steps in (100, 200):
        told: list[tuple[int, int]] = []
        x, y = (replace(t, steps=t.steps[4:5] * steps) for t in (a, b))
        calls.clear()
        found = diff(x, y, progress=lambda done, every, told=told: told.append((done, every)))  # type: ignore[misc]
        assert found.outcome == "only rounding", found
        assert told == [(i, steps) for i in range(1, steps + 1)]
        counts.append(len(calls))
    assert counts[1] <= 2 * counts[0]
