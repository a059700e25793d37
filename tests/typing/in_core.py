"""A user's script as type checkers see it: schedules, groups, states, traces, conformance. Nothing here is run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, assert_type

import numpy as np
from numpy.typing import NDArray

from ada2ms.conformance import Optimizer, Report, check
from ada2ms.core import (
    DEFAULTS,
    NO_DECAY,
    Ada2MS,
    AdaptivitySchedule,
    Constant,
    Cosine,
    Exponential,
    Group,
    Hyperparameters,
    Linear,
    Receipt,
    State,
)
from ada2ms.inside import draw

schedules: list[AdaptivitySchedule] = [
    Linear(1.0, 0.0, steps=10),
    Cosine(start=1.0, end=0.0, steps=10),
    Exponential(1.0, 0.0, half_life=10.0),
    Constant(0.5),
]
assert_type(schedules[0].to_dict(), dict[str, str | float | int])
groups = [Group("embed", lr_scale=0.1, adaptivity=schedules[0]), NO_DECAY]
assert_type(groups, list[Group])
assert_type(DEFAULTS, Hyperparameters)
assert_type(Group.from_dict(groups[0].to_dict()), Group)

state = State.load("run.safetensors")
assert_type(state, State)
assert_type(state.save(Path("run.safetensors")), None)
assert_type(state.notes, list[str])
receipt = Receipt(state)
receipt.add({"w": np.zeros(3)}, batch=b"", lr=0.1)

rule = Ada2MS([np.zeros(3)], lr=0.1, adaptivity=Linear(1.0, 0.0, 10), scope="tensor", nonfinite="skip", max_norm=1.0)
assert_type(rule.step([np.ones(3)]), None)
assert_type(rule.skipped, int)


class Port:
    """Anyone's implementation."""

    def __init__(self, params: Sequence[NDArray[Any]], **hyper: Any) -> None:
        self.rule = Ada2MS(params, **hyper)

    @property
    def params(self) -> Sequence[NDArray[Any]]:
        return self.rule.groups[0].params

    def step(self, gradients: Sequence[NDArray[Any] | None]) -> None:
        self.rule.step(gradients)


port: Optimizer = Port([np.zeros(3)])
report = check(Port)
assert_type(report, Report)
assert_type(report.ok, bool)
draw([{"ada2ms/update_ratios/w": 1e-3}], "inside.png", title="run")

# What is wrong is found.
Group(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
Ada2MS([np.zeros(3)], scope="global")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
Linear(1.0, 0.0)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
