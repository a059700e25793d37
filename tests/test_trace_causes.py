"""Causes that people meet, beside those of the table in the docs: what is said of them, and what must not be."""

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trace_training
from trace_faults import other, trace
from trace_margins import untold

from ada2ms.core.trace import Trace, Verdict, diff
from ada2ms.core.trace.model import Step, fingerprint, flattened
from ada2ms.core.trace.sketch import sketch
from ada2ms.core.trace.writer import Writer

LR, NAMES = trace_training.LR, trace_training.NAMES
WITHIN = {"data": {"within": True}}  # other rounding


def groups(kind: str, **options: Any) -> Callable[[Any], Any]:
    """An optimizer of torch without decay on biases and normalisations."""

    def made(net: Any) -> Any:
        matrices = [p for p in net.parameters() if p.ndim > 1]
        rest = [p for p in net.parameters() if p.ndim < 2]
        parts = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        return getattr(torch.optim, kind)(parts, **{"lr": LR, **options})

    return made


@dataclass
class Case:
    """A fault of B.

    Attributes:
        name: for people.
        stage, cause: of the verdict; the cause is a part of the sentence.
        b, a: options of the scripts.
        untold: whether B does not tell its hyperparameters.
        without: what the verdict must not say.
        step: of the verdict.
    """

    name: str
    stage: str
    cause: str
    b: dict[str, Any]
    a: dict[str, Any] = field(default_factory=dict)
    untold: bool = False
    without: tuple[str, ...] = ()
    step: int = 1

    def __str__(self) -> str:
        return self.name

    def verdict(self) -> Verdict:
        a, b = trace("torch", self.a), trace("torch", {**WITHIN, **self.b})
        return diff(a, untold(b) if self.untold else b)


def halves(net: Any, *_: Any) -> None:
    """Only the layers behind the first have gradients."""
    for name, p in net.named_parameters():
        if name.startswith(("0.", "1.")):
            p.grad = None


def summed(_: Any, logits: Any, labels: Any) -> Any:
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")


def forgetful(net: Any) -> Any:
    return torch.optim.AdamW([p for name, p in net.named_parameters() if name != "1.weight"], lr=LR, weight_decay=1e-2)


def to_bfloat16(net: Any) -> None:
    for p in net.parameters():
        p.data = p.data.bfloat16().float()


SGD = {"made": groups("SGD", momentum=0.9)}
ADAM = {"made": groups("AdamW", betas=(0.9, 0.95))}
CASES = [
    Case(
        "momentum 0.99, not told",
        "update",
        "other things: momentum: 0.9 against 0.99",
        {"made": groups("SGD", momentum=0.99)},
        SGD,
        untold=True,
        without=("weight decay", "catalogue's"),
    ),
    Case(
        "Nesterov, not told",
        "update",
        "other things: Nesterov's momentum: no against yes",
        {"made": groups("SGD", momentum=0.9, nesterov=True)},
        SGD,
        untold=True,
        without=("weight decay", "place"),
    ),
    Case(
        "b2 of 0.999 in groups, not told",
        "update",
        "other things: b2: 0.95 against 0.999",
        {"made": groups("AdamW")},
        ADAM,
        untold=True,
        without=("weight_decay", "masks"),
    ),
    Case(
        "eps of 1e-6 in groups, not told",
        "update",
        "other things: eps: 1e-08 against 1e-06",
        {"made": groups("AdamW", betas=(0.9, 0.95), eps=1e-6)},
        ADAM,
        untold=True,
        without=("weight_decay",),
    ),
    Case(
        "NAdam in groups, not told",
        "update",
        "Nesterov's momentum: no against by NAdam's schedule",
        {"made": groups("NAdam", betas=(0.9, 0.95), decoupled_weight_decay=True)},
        ADAM,
        untold=True,
        without=("catalogue's",),
    ),
    Case(
        "RMSprop of alpha 0.9, not told",
        "update",
        "other things: b2: 0.99 against 0.9",
        {"optimizer": other("RMSprop", alpha=0.9)},
        {"optimizer": other("RMSprop")},
        untold=True,
        without=("weight decay", "place"),
    ),
    Case(
        "twice the rate in groups, not told",
        "update",
        "rate that updates show is 0.01 in A and 0.02 in B",
        {"made": groups("AdamW", betas=(0.9, 0.95), lr=2 * LR)},
        ADAM,
        untold=True,
        without=("in B; ",),
    ),
    Case(
        "SGD for AdamW",
        "update",
        "the family: Adam against SGD with momentum",
        {"made": groups("SGD")},
        ADAM,
        without=("weight decay:",),
    ),
    Case(
        "a sum, and clipping in A alone",
        "forward",
        "the loss of B is 8 times that of A, gradients are",
        {"reduction": "sum"},
        {"clip": 0.5},
        without=("the loss\n", "only the loss"),
    ),
    Case(
        "a sum, and clipping in both",
        "forward",
        "both are clipped to the norm 0.1, and a factor before that does not show (the batch's 8 samples)",
        {"loss": summed, "clip": 0.1},
        {"clip": 0.1},
    ),
    Case(
        "detached, and gradients missing",
        "gradient",
        "0.dense.kernel, 0.dense.bias, 1.norm.scale, 1.norm.bias have no gradient in B",
        {"before": halves},
        without=("agree;", "bias agree"),
    ),
    Case(
        "frozen, and clipping in both",
        "gradient",
        "0.dense.kernel have no gradient in B; the other gradients of B are",
        {"frozen": ("0.dense.kernel",), "clip": 0.1},
        {"clip": 0.1},
        without=("those of A to 0.1",),
    ),
    Case(
        "a parameter that is given to no optimizer",
        "forward",
        "1.norm.scale is in A's optimizer alone",
        {"made": forgetful},
        step=2,
    ),
    Case(
        "weights rounded to bfloat16",
        "start",
        "of B are those of the other run, rounded to bfloat16",
        {"start": to_bfloat16},
    ),
    Case("parameters in bfloat16", "start", "are float32 in A and bfloat16 in B", {"dtype": "bfloat16", "data": {}}),
    Case(
        "a constant rate", "hyperparameters", "lr of B stays at 0.01 where that of A moves", {}, {"schedule": "warmup"}
    ),
    Case(
        "clipping by value, and by norm in A",
        "gradient",
        "of B are clipped to 0.01 entry by entry",
        {"before": lambda net, _: torch.nn.utils.clip_grad_value_(net.parameters(), 0.01)},
        {"clip": 0.5},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_said_of_a_fault(case: Case) -> None:
    found = case.verdict()
    assert (found.outcome, found.stage, found.step) == ("parted", case.stage, case.step), found
    assert case.cause in found.cause, found
    for words in case.without:
        assert words not in f"{found.cause}\n{' '.join(found.agrees)}\n{' '.join(found.look)}\n", found


def test_a_loss_that_differs_by_little_points_to_the_forward_pass() -> None:
    """Such as by another epsilon, or GELU by tanh: a loss is a mean, and shows less of it than gradients do."""
    a = copy.deepcopy(trace("torch", {}))
    b, c = copy.deepcopy(a), copy.deepcopy(a)
    for x in (a, b, c):
        x.steps[0].full["update"] = {}  # of which nothing is to be found out
    for k, x in enumerate((b, c)):
        for j, name in enumerate(NAMES):
            x.steps[0].full["gradient"][name] *= np.float32(1 + 1e-3 * (j + 1))
            x.steps[0].sketches["gradient"][x.index[name]] *= 1 + 1e-3 * (j + 1)
        assert x.steps[0].loss is not None
        x.steps[0].loss *= 1 + 1.2e-6 * (1 - k)
    found = diff(a, b)
    assert (found.stage, found.kind) == ("forward", "everything"), found
    assert "all gradients differ, and the loss by little (1.2e-06)" in found.cause
    assert any("epsilon" in sentence and "GELU" in sentence for sentence in found.look)
    found = diff(a, c)
    assert (found.stage, found.cause) == ("gradient", "all gradients differ, and the loss does not"), found


def test_weights_of_another_layer_are_named() -> None:
    a = trace("torch", {})
    b = copy.deepcopy(a)
    one, two = NAMES[4], "4.dense.kernel"
    for x in (a := copy.deepcopy(a), b):
        x.parameters.append(replace(x.parameters[x.index[one]], name=two, own="4.weight"))
        for step in x.steps:
            step.sketches = {what: np.concatenate([s, s[-1:]]) for what, s in step.sketches.items()}
            step.missing = np.append(step.missing, False)
            step.full = {}
    row = a.steps[0].sketches["value"]
    row[a.index[two]] = np.random.default_rng(0).normal(size=row.shape[1])
    row[a.index[two], 0] = np.linalg.norm(row[a.index[two], 1:])
    exchanged = b.steps[0].sketches["value"]
    exchanged[b.index[one]], exchanged[b.index[two]] = row[a.index[two]], row[a.index[one]]
    found = diff(a, b)
    assert (found.stage, found.kind) == ("start", "exchanged"), found
    assert f"{one} of B is {two} of A, {two} of B is {one} of A" in found.cause


def told(trace: Trace, batches: list[Any]) -> Trace:
    """With these arrays as the batches of its steps."""
    steps: list[Step] = []
    for step, batch in zip(trace.steps, batches, strict=True):
        steps.append(replace(step, batches=[[fingerprint(batch)]] if batch is not None else []))
    return replace(trace, steps=steps)


def test_data_that_are_scaled_repeated_or_told_too_late_are_named() -> None:
    a = trace("torch", {})
    images = [np.random.default_rng(k).normal(size=(8, 3, 4, 4)).astype(np.float32) for k in range(len(a.steps))]
    last = [x.transpose(0, 2, 3, 1) / np.float32(255) for x in images]
    found = diff(told(a, images), told(a, last))
    assert "array 1 of the batch is multiplied by 0.00392157 in B" in found.cause, found
    normal = [(x - np.float32(0.45)) / np.float32(0.22) for x in images]
    for b in (normal, [x.transpose(0, 2, 3, 1) for x in normal]):
        found = diff(
            told(a, [np.tile(x, (4, 1, 1, 1)) for x in images]), told(a, [np.tile(x, (4, 1, 1, 1)) for x in b])
        )
        assert found.cause == "array 1 of the batch is 4.54545 times that of A - 2.04545 in B", found
    again = [*images[:4], *images[:4]]
    found = diff(told(a, images), told(a, again))
    assert (found.step, found.kind) == (5, "repeated"), found
    assert "the batch of B is that of its step 1 again" in found.cause
    found = diff(told(a, images), told(a, [None, *images[:-1]]))
    assert found.kind == "shifted", found
    assert "whether batch() is called before the step in both" in found.look[0]


def test_other_data_of_a_later_step_are_told_beside_what_is_first() -> None:
    a, b = trace("torch", {}), trace("torch", {"activation": "relu"})
    images = [np.random.default_rng(k).normal(size=(8, 3)) for k in range(len(a.steps))]
    found = diff(told(a, images), told(b, [*images[:3], *images[4:], images[3]]))
    assert found.stage == "forward", found
    assert any(sentence.startswith("at step 4, in the stage 'data'") for sentence in found.also), found
    found = diff(told(a, images), told(b, images))
    assert not found.also, found
    found = diff(a, trace("torch", {"activation": "relu", "clamp": 0.2}))
    assert any(sentence.startswith("at step 2, in the stage 'value'") for sentence in found.also), found


def test_a_warmup_from_another_number_is_named() -> None:
    a, b = (trace("torch", {"schedule": "warmup", "steps": 8}) for _ in range(2))
    smooth = [0.9 ** (k * k / 9) for k in range(20)]
    for rates, words in (
        (
            ([0.1, 0.2, 0.3, 0.4, 0.5, 0.4, 0.3, 0.2], [0.0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.3, 0.2]),
            "lr of A is 1 step ahead",
        ),
        ((smooth[:8], smooth[:16:2]), "lr of B moves 2 times where that of A moves once"),
        ((smooth[:16:2], smooth[:8]), "lr of A moves 2 times where that of B moves once"),
    ):
        traces = []
        for x, lrs in zip((a, b), rates, strict=True):
            steps = [replace(s, hyper=[{**s.hyper[0], "lr": lr}]) for s, lr in zip(x.steps, lrs, strict=True)]
            traces.append(replace(x, steps=[replace(s, full={}) for s in steps]))
        found = diff(*traces)
        assert found.stage == "hyperparameters", found
        assert words in found.cause


def noisy(a: Trace, size: float, names: Collection[str] = NAMES) -> Trace:
    """With gradients in the first step that differ without direction."""
    rng, b = np.random.default_rng(0), copy.deepcopy(a)
    for name in names:
        x = b.steps[0].full["gradient"][name]
        noise = rng.normal(size=x.shape)
        noise -= (noise * x).sum() / np.square(x).sum() * x
        x += (size * np.linalg.norm(x) / np.linalg.norm(noise) * noise).astype(np.float32)
        b.steps[0].sketches["gradient"][b.index[name]] = sketch(x)
    return b


def test_differences_without_direction_are_no_arithmetic_where_the_loss_is_another() -> None:
    a = copy.deepcopy(trace("torch", {}))
    a.steps[0].full["update"] = {}
    b, c = noisy(a, 5e-3), noisy(a, 5e-3)
    assert a.steps[0].loss is not None
    b.steps[0].loss, c.steps[0].loss = a.steps[0].loss * (1 + 1e-4), -a.steps[0].loss
    found = diff(a, b)
    assert found.kind == "precision", found
    assert any(sentence.startswith("or what the forward pass computes") for sentence in found.look), found
    assert diff(a, c).cause == "loss and all gradients differ", diff(a, c)


def test_a_factor_of_one_is_none() -> None:
    a = copy.deepcopy(trace("torch", {}))
    a.steps[0].full["update"] = {}
    found = diff(a, noisy(a, 3e-6, NAMES[:1]))
    assert found.outcome == "parted", found
    assert "times those of A" not in found.cause


def test_where_there_are_no_steps_it_is_said_what_was_forgotten() -> None:
    a = trace("torch", {})
    for framework, words in (("torch", "within `with`"), ("jax", "the one that `recorded` returns")):
        found = diff(a, replace(a, steps=[], about={"framework": framework}))
        assert (found.status, found.cause) == (2, "there are no steps in B")
        assert words in found.look[-1]


def test_batches_are_dictionaries_too_and_of_numbers() -> None:
    x, y = np.ones((2, 3)), np.arange(2)
    assert [*flattened([{"y": y, "x": x, "z": None}, (x, [y])])] == [x, y, x, y]
    assert [*flattened([[1, 2], 3])] == [[1, 2], 3]
    with pytest.raises(TypeError, match=r"Invalid batch: \['a', 'b'\].*arrays of numbers"):
        fingerprint(["a", "b"])


def test_a_trace_has_one_recorder(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "x.trace")
    with pytest.raises(FileExistsError, match="is being written by another recorder"):
        Writer(tmp_path / "x.trace")
    writer.close()
    Writer(tmp_path / "x.trace").close()
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        Writer(tmp_path / "none" / "x.trace")


def test_arrays_that_one_run_alone_was_told_are_no_other_data() -> None:
    """Such as labels alone, by a `train_step` of Keras that gives no inputs to `compute_loss`; weights are."""
    a = trace("torch", {})
    x, y, weights = a.steps[0].batches[0][0], a.steps[0].batches[0][1], fingerprint(np.ones(8, np.float32))

    def of(*each: list[float]) -> Trace:
        return replace(a, steps=[replace(a.steps[0], batches=[[*each]])])

    for one, two in ((of(x, y), of(y)), (of(x), of(x, y))):
        found = diff(one, two)
        assert found.outcome == "only rounding", found
        assert any("those of both are the same" in note for note in found.notes)
    for two in (of(x, y, weights), of(weights)):
        assert diff(of(x, y), two).kind == "arrays", diff(of(x, y), two)
