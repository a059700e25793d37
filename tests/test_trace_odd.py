"""Odd runs: what is not finite, gradients of zeros, other types, one number for a model. None gets a wrong cause."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from trace_faults import other, trace
from trace_margins import untold

from ada2ms.core.trace import Trace, diff, judge
from ada2ms.torch import Recorder

WITHIN = {"data": {"within": True}}


def infinite(*wheres: tuple[int, int]) -> Callable[[Any, int], None]:
    """Gradients of layers, each at a step, that hold an infinite entry."""

    def before(net: Any, i: int) -> None:
        for layer, step in wheres:
            if i == step:
                net[layer].weight.grad.view(-1)[0] = float("inf")

    return before


def lost_from(step: int) -> Callable[[Any, Any, Any], Any]:
    """A loss that is NaN from a step on, counted from 0."""
    count = 0

    def loss(net: Any, logits: Any, ys: Any) -> Any:
        nonlocal count
        count += 1
        return functional.cross_entropy(logits, ys) * (float("nan") if count > step else 1.0)

    return loss


def test_runs_that_are_lost_together_are_compared_until_then() -> None:
    a, b = trace("torch", {"loss": lost_from(3)}), trace("torch", {**WITHIN, "loss": lost_from(3)})
    found = diff(a, b)
    assert found.outcome == "only rounding", found
    assert found.cause.startswith("in 3 steps nothing differs")
    assert "in 5 steps no gradient is finite, neither in A nor in B: of these nothing is compared" in found.notes
    a, b = trace("torch", {"loss": lost_from(0)}), trace("torch", {**WITHIN, "loss": lost_from(0)})
    found = diff(a, b)
    assert (found.outcome, found.cause) == (
        "cannot tell",
        "no gradient is finite, neither in A nor in B, in any step",
    )
    assert judge(a).status == 2
    one = diff(trace("torch", {}), trace("torch", {**WITHIN, "loss": lost_from(3)}))
    assert (one.stage, one.step, one.cause) == ("forward", 4, "the loss of B is not finite")


NOT_FINITE: list[tuple[Any, Any, str]] = [
    (infinite(), infinite((3, 2)), "gradients of 3.dense.kernel in B are not finite"),
    (infinite((3, 2)), infinite(), "gradients of 3.dense.kernel in A are not finite"),
    (
        infinite((0, 2)),
        infinite((3, 2)),
        "gradients of 0.dense.kernel in A are not finite; gradients of 3.dense.kernel in B are not finite",
    ),
    (infinite((0, 2), (3, 2)), infinite((0, 2)), "gradients of 3.dense.kernel in A are not finite"),
    (infinite((0, 5)), infinite((0, 5)), ""),
]


@pytest.mark.parametrize(("a", "b", "cause"), NOT_FINITE, ids=[cause or "both" for _, _, cause in NOT_FINITE])
def test_one_gradient_that_is_not_finite_is_named(a: Any, b: Any, cause: str) -> None:
    """Though all others are, and the loss is; and what follows from it, such as the update, is not held against B."""
    found = diff(trace("torch", {"before": a}), trace("torch", {**WITHIN, "before": b}))
    if not cause:
        assert found.outcome == "only rounding", found
        return
    assert (found.stage, found.kind, found.step, found.cause) == ("gradient", "not finite", 3, cause), found
    assert found.also == []


def scaled(bad: int | None) -> Trace:
    """With a fused optimizer, which leaves out a step by itself whose gradients are not finite."""
    before = infinite() if bad is None else infinite((0, bad))
    fused: Any = lambda params: torch.optim.AdamW(params, lr=0.01, fused=True)  # noqa: E731
    return trace("torch", {"scaler": lambda: torch.amp.GradScaler("cpu"), "before": before, "optimizer": fused})


def test_a_step_that_a_fused_optimizer_leaves_out_is_named() -> None:
    a, b = scaled(None), scaled(2)
    assert [step.skipped for step in b.steps[:4]] == [False, False, True, False]
    for found, who in ((diff(a, b), "B"), (diff(b, a), "A")):
        assert (found.stage, found.step) == ("gradient", 3), found
        assert found.cause == f"gradients of 0.dense.kernel in {who} are not finite"
        assert f"{who} leaves out this step" in found.evidence
    assert diff(b, scaled(2)).outcome == "only rounding"


def test_gradients_of_zeros_do_not_agree_with_others() -> None:
    def nothing(net: Any, logits: Any, ys: Any) -> Any:
        return 0 * functional.cross_entropy(logits, ys)

    found = diff(trace("torch", {}), trace("torch", {**WITHIN, "loss": nothing}))
    assert (found.stage, found.kind) == ("forward", "loss"), found
    assert "agree" not in found.cause
    assert any("are 0 in B alone" in sentence for sentence in found.also)
    both = diff(trace("torch", {"loss": nothing}), trace("torch", {**WITHIN, "loss": nothing}))
    assert both.outcome == "only rounding", both


def test_a_loss_that_differs_is_not_said_to_agree() -> None:
    """A sum where gradients are clipped: both are said."""
    found = diff(trace("torch", {}), trace("torch", {**WITHIN, "reduction": "sum", "clip": 0.05}))
    assert (found.stage, found.step) == ("forward", 1), found
    assert "the loss of B is 8 times that of A" in found.cause
    assert "B's are clipped to the norm 0.05" in found.cause
    assert not any("the loss" in sentence for sentence in found.agrees)


def test_another_type_of_parameters_is_said() -> None:
    """As the verdict; or, where it is said that 16 bits are meant, as a note on what is compared."""
    runs = trace("torch", {}), trace("torch", {"dtype": "bfloat16"})
    found, meant = diff(*runs), diff(*runs, arithmetic="bfloat16")
    assert (found.outcome, found.kind, found.step) == ("parted", "types", 1), found
    assert "are float32 in A and bfloat16 in B" in found.cause
    assert not any("parameters are" in note for note in found.notes), found
    assert any("parameters are float32 in A and bfloat16 in B" in note for note in meant.notes), meant
    same = diff(trace("torch", {"dtype": "bfloat16"}), trace("torch", {**WITHIN, "dtype": "bfloat16"}))
    assert not any("parameters are" in note for note in same.notes), same


@pytest.mark.parametrize("at", [2, 5, 7])
def test_a_state_that_is_lost_is_named_at_whichever_step(at: int) -> None:
    """By the size of the update, of which torch's recorder has an estimate: Adam's first step is lr in each entry."""
    a, b = (trace("torch", {"full": 0, **more}) for more in ({}, {**WITHIN, "reset_at": at}))
    for found, who in ((diff(a, b), "B"), (diff(b, a), "A")):
        assert (found.stage, found.step) == ("update", at + 1), found
        assert found.cause.startswith(f"the update of {who} is that of an optimizer's first step"), found
    slower = diff(a, trace("torch", {**WITHIN, "full": 0, "optimizer": other("Weakened")}))
    assert (slower.stage, slower.kind) == ("update", "factor"), slower


def test_the_end_of_a_schedule_in_float32_is_the_same_schedule() -> None:
    """Of which the last steps have no digit right, since 1 is added to a cosine near -1."""
    a, b = (replace(trace("torch", {**more}), about={}) for more in ({"full": 0}, {"full": 0, **WITHIN}))
    angles = np.pi * np.linspace(0.9, 0.9999, len(a.steps))
    for t, cosine in ((a, np.cos(angles)), (b, np.cos(angles.astype(np.float32)))):
        t.steps = [replace(s, hyper=[{**s.hyper[0], "lr": float(c + 1)}]) for s, c in zip(t.steps, cosine, strict=True)]
    apart = [abs(x.hyper[0]["lr"] / y.hyper[0]["lr"] - 1) for x, y in zip(a.steps, b.steps, strict=True)]
    assert max(apart) > 1e-4
    assert diff(a, b).outcome == "only rounding", diff(a, b)
    b.steps = [replace(s, hyper=[{**s.hyper[0], "lr": s.hyper[0]["lr"] + 1e-6}]) for s in b.steps]
    assert diff(a, b).stage == "hyperparameters", diff(a, b)


def test_the_gradients_of_one_number_always_have_one_factor(tmp_path: Path) -> None:
    """So it does not follow that losses are reduced in another way."""
    traces = []
    for name, activation in (("a", torch.tanh), ("b", torch.sigmoid)):
        w = torch.nn.Parameter(torch.tensor(0.5))
        optimizer = torch.optim.SGD([w], lr=0.1)
        with Recorder(tmp_path / name, {"w": w}, optimizer) as recorder:
            x = torch.linspace(-1, 2, 8)
            loss = (activation(w * x) - x.square()).square().mean()
            recorder.loss(loss)
            loss.backward()
            optimizer.step()
        traces.append(Trace.load(tmp_path / name))
    found = diff(*traces)
    assert (found.stage, found.kind) == ("forward", "factors"), found
    assert "reduction" not in found.cause


def test_first_steps_of_momentum_are_not_those_of_radam() -> None:
    """Nobody told optimizer and rates, and RAdam's first steps are those of SGD, but for a factor of each."""

    def unknown(**given: Any) -> Trace:
        run = untold(trace("torch", {"optimizer": other("SGD", **given)}))
        return replace(run, about={**run.about, "optimizer": ""})

    a = unknown(momentum=0.9)
    assert diff(a, unknown(momentum=0.8)).cause == "the optimizers compute other things: momentum: 0.9 against 0.8"
    decaying = diff(a, unknown(momentum=0.9, weight_decay=0.01))
    assert "weight_decay: 0 against 0.01" in decaying.cause
    assert "B's updates are those of SGD with momentum, weight decay in the gradient" in " ".join(decaying.evidence)
