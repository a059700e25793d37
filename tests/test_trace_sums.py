"""Gradients that are sums and pieces of what is known, in traces that are changed by hand."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import trace_faults

from ada2ms.core.dialects import Dialect
from ada2ms.core.trace import Trace, diff
from ada2ms.core.trace.explain import decaying, fit
from ada2ms.core.trace.model import Parameter
from ada2ms.core.trace.pair import Pair
from ada2ms.core.trace.series import Series
from ada2ms.core.trace.sketch import sketch

NAME = "3.dense.kernel"


def changed(trace: Trace, gradient: np.ndarray) -> Trace:
    """With another gradient of one parameter in the first step."""
    found = copy.deepcopy(trace)
    found.steps[0].full["gradient"][NAME] = gradient
    found.steps[0].sketches["gradient"][found.index[NAME]] = sketch(gradient)
    return found


def test_a_parameter_that_is_two_elsewhere_is_named() -> None:
    """Such as an embedding that is also the head: its gradient is the sum of both, one of them transposed."""
    a = trace_faults.trace("torch", {})
    whole = a.steps[0].full["gradient"][NAME]
    part = np.random.default_rng(0).normal(size=whole.shape).astype(np.float32)
    b = changed(a, whole - part)
    b.parameters.append(replace(a.parameters[a.index[NAME]], name="4.head.kernel", own="head", shape=part.T.shape))
    for step in b.steps:
        step.sketches = {what: np.concatenate([x, x[-1:]]) for what, x in step.sketches.items()}
        step.missing = np.append(step.missing, False)
    b.steps[0].full["gradient"]["4.head.kernel"] = np.ascontiguousarray(part.T)
    for found, who in ((diff(a, b), "A"), (diff(b, a), "B")):
        assert (found.stage, found.kind) == ("gradient", "tied"), found
        other = "B" if who == "A" else "A"
        sentence = f"the gradient of {NAME} in {who} is the sum of those of {NAME} and 4.head.kernel in {other}"
        assert found.cause == sentence


def test_where_a_difference_is_in_one_row_alone_it_is_said() -> None:
    """Such as that of an embedding's padding_idx."""
    a = trace_faults.trace("torch", {})
    gradient = a.steps[0].full["gradient"][NAME].copy()
    gradient[5] = 0
    found = diff(a, changed(a, gradient))
    assert found.kind == "some gradients", found
    assert f"in {NAME} the difference is at 5 along axis 0 alone" in found.evidence
    gradient[:] = np.random.default_rng(1).normal(size=gradient.shape)
    assert not any("along axis" in sentence for sentence in diff(a, changed(a, gradient)).evidence)


def test_a_gradient_of_nothing_but_rounding_does_not_pass_for_16_bits() -> None:
    """Such as that of a key's bias in attention: a few units of the last place, of which few bits are set."""
    a = trace_faults.trace("torch", {})
    units = np.random.default_rng(2).integers(-8, 9, a.steps[0].full["gradient"][NAME].shape)
    for scale, name in ((2.0**-30, "float32"), (2.0**-3, "bfloat16")):
        b = changed(a, (units * scale).astype(np.float32))
        assert Pair(b, b).yardstick.name == name


def test_a_factor_is_told_by_what_is_exact() -> None:
    """Small updates of large values are rounded too coarsely to say by what factor all updates are off the rule."""
    rng = np.random.default_rng(0)
    run = []
    for name, size, value in (("scale", 8, 1000.0), ("bias", 8, 0.0)):
        before, gradient = np.full(size, value, np.float32), rng.normal(size=size).astype(np.float32)
        after = before - np.float32(0.01) * gradient
        moved = after.astype(np.float64) - before.astype(np.float64)
        parameter = Parameter(name, name, (size,), "float32")
        means = {"model": [1.0], "tensor": [1.0]}
        run.append(Series(parameter, [before], [gradient.astype(np.float64)], [moved], [{"lr": 0.01}], means=means))
    found = fit(Dialect(family="sgd", changed=(("weight_decay", 0.0), ("momentum", 0.0))), run, free=True)
    assert found.fits, found
    assert abs(found.factor - 1) < 1e-6


@pytest.mark.parametrize(("size", "decay"), [(8, 0.0), (1000, 0.01)])
def test_a_decay_that_nobody_told_does_not_show_in_a_few_entries(size: int, decay: float) -> None:
    """Rounding of 8 entries lies along their values by chance."""
    values = [np.full(size, 0.5), np.full(size, 0.4)]
    signs = np.resize([1.0, -1.0], size)
    moved = [0.01 * signs - 0.01 * 0.01 * x for x in values]
    parameter = Parameter("w", "w", (size,), "bfloat16")
    means = {"model": [1.0, 1.0], "tensor": [1.0, 1.0]}
    run = [Series(parameter, list(values), [-signs, -signs], moved, [{"lr": 0.01}] * 2, means=means)]
    found = decaying(fit(Dialect(), run), run)
    assert found.fits
    assert dict(found.dialect.changed).get("weight_decay", 0.0) == decay


def test_where_both_clip_a_factor_before_it_is_told_of() -> None:
    small, clipped = (trace_faults.trace("torch", {"clip": 0.5, "scale": scale}) for scale in (0.1, 1.0))
    sentence = "the gradients of B are clipped to the norm 0.5: before that the factor is larger"
    found = diff(small, clipped)
    assert (found.stage, found.kind) == ("gradient", "factor"), found
    assert any(evidence.startswith(sentence) for evidence in found.evidence), found
    found = diff(clipped, trace_faults.trace("torch", {"clip": 0.25}))
    assert found.cause == "the gradients of B are clipped to the norm 0.25, those of A to 0.5"
    assert found.look == ["gradient clipping: the norm to which each clips"]


def test_clipping_within_what_is_recorded_is_proposed_for_optax_alone() -> None:
    clipped = trace_faults.trace("torch", {"clip": 0.5})
    for framework, expected in (("jax", True), ("torch", False)):
        found = diff(clipped, trace_faults.trace(framework, {}))
        assert found.kind == "clipping", found
        assert any("`recorded`" in sentence for sentence in found.look) == expected, found


def test_a_gradient_of_nothing_but_rounding_does_not_agree() -> None:
    """Such as that of a bias before a BatchNorm: where all others differ, everything does."""
    a, b = (copy.deepcopy(trace_faults.trace("torch", given)) for given in ({}, {"activation": "relu"}))
    for trace in (a, b):
        noise = np.full(trace.steps[0].full["gradient"]["0.dense.bias"].shape, 1e-9, np.float32)
        trace.steps[0].full["gradient"]["0.dense.bias"] = noise
        trace.steps[0].sketches["gradient"][trace.index["0.dense.bias"]] = sketch(noise)
    assert diff(a, b).cause == "loss and all gradients differ"


def test_groups_that_differ_in_the_same_are_one_difference() -> None:
    """A rule that is another one for all parameters is no matter of groups, though they are in several."""

    def made(eps: float) -> Any:
        def make(net: Any) -> Any:
            groups = [[p for p in net.parameters() if (p.ndim > 1) == wide] for wide in (True, False)]
            decays = (0.01, 0.0)
            shares = [{"params": ps, "weight_decay": wd} for ps, wd in zip(groups, decays, strict=True)]
            return torch.optim.AdamW(shares, lr=0.01, eps=eps)

        return make

    a, b = (copy.deepcopy(trace_faults.trace("torch", {"made": made(eps)})) for eps in (1e-8, 1e-3))
    for step in b.steps:
        for hyper in step.hyper:
            del hyper["eps"]
    found = diff(a, b)
    assert found.cause == "the optimizers compute other things: eps: 1e-08 against 0.001", found
    assert found.kind != "some updates"
    assert len(found.parameters) == len(a.parameters)
    assert not any("masks" in sentence for sentence in found.look)
