"""Golden cases as a framework runs them: in which types, with which arguments, and what is seen of the run."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from ada2ms.core import golden
from ada2ms.core.groups import Group, exactly

Array = NDArray[Any]
# The choices of an optimizer; all other hyperparameters are those of a group.
CHOICES: Final = ("scope", "nonfinite", "max_norm", "compensated")


class NotStated(Exception):  # noqa: N818  # no error of the rule, but what a framework has no words for
    """A case asks for what this framework, or this port, has no argument for."""


@dataclass
class Snapshot:
    """Parameters and state after some steps. Lists have an entry for each parameter, group after group; `k` for each
    group, and so has `s` in scope "model".
    """

    params: list[Array]
    exp_avg: list[Array]
    exp_avg_sq: list[Array]
    step: list[int]
    s: list[float]
    k: list[int]
    skipped: int
    compensation: list[Array | None] = field(default_factory=list)  # as `params`; may be left out where all are None


# Runs a case in a dtype on a device; yields a snapshot after each recorded step, and None after the steps between.
Replay = Callable[[golden.Case, str, str], Iterator[Snapshot | None]]


@dataclass(frozen=True)
class Path:
    """A way in which a framework makes a step on a device.

    Attributes:
        name: such as "foreach" or "jit".
        replay: runs golden cases that way; None if it cannot be had here.
        reason: why it cannot.
        share: which cases `ada2ms check` runs by it, if not asked for all: "all"; "cover", those that together tell
            every known wrong variant; "once", these in float32 and a few of them in float64; "few" or "none" of them.
    """

    name: str
    replay: Replay | None = None
    reason: str = ""
    share: Literal["all", "cover", "once", "few", "none"] = "cover"


@dataclass(frozen=True)
class Race:
    """A step of Ada2MS and one of the framework's own AdamW, by the same path over like parameters.

    Attributes:
        path: its name.
        ours, theirs: a step each.
        wait: returns when the device has done what was asked of it.
    """

    path: str
    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    wait: Callable[[], Any]


def precisions(case: golden.Case) -> tuple[str, ...]:
    """The types in which a case is run: beside 16 bits, which are computed in float32, in nothing wider."""
    return ("float32",) if case.compensated else ("float64", "float32")


def initial(case: golden.Case) -> list[Array]:
    """The parameters that a case begins with, group after group."""
    return [p for group in case.groups for p in group.params]


def dtypes(case: golden.Case, dtype: str) -> list[str]:
    """The type of each parameter of a case that is run in `dtype`."""
    return [own or dtype for group in case.groups for own in group.dtypes]


def recorded(case: golden.Case) -> set[int]:
    """The steps of which the case has parameters and state, counted from 1."""
    return {at.step for at in case.expected}


def expected(at: golden.Expected) -> Snapshot:
    """What a golden case expects, as a snapshot."""
    flat = {
        name: [x for group in at.groups for x in getattr(group, name)] for name in ("params", "exp_avg", "exp_avg_sq")
    }
    return Snapshot(
        **flat,
        step=[t for group in at.groups for t in group.step],
        s=[s for group in at.groups for s in group.global_exp_avg_sq],
        k=[group.global_step for group in at.groups],
        skipped=at.skipped,
        compensation=[x for group in at.groups for x in group.compensation],
    )


def choices(case: golden.Case) -> dict[str, Any]:
    """What a case asks of the whole optimizer, by the rule's names."""
    return {name: getattr(case, name) for name in CHOICES}


def hyperparameters(group: golden.CaseGroup) -> dict[str, Any]:
    """Those that stay the same through a case, by the rule's names."""
    return {name: getattr(group, name) for name in ("b1", "b2", "eps", "weight_decay", "adaptivity")}


def has_one_group(case: golden.Case) -> bool:
    """Whether the groups of a case have the same hyperparameters: a framework without groups can run it."""
    first = case.groups[0]
    return all(hyperparameters(group) == hyperparameters(first) and group.lr == first.lr for group in case.groups)


def factors(case: golden.Case) -> list[float] | None:
    """The learning rate of each group as a factor of the first group's; None if one is not the same at every step."""
    first = case.groups[0].lr
    found: list[float] = []
    for group in case.groups:
        each = {rate / base for rate, base in zip(group.lr, first, strict=True) if base} or {1.0}
        if len(each) > 1 or any(rate and not base for rate, base in zip(group.lr, first, strict=True)):
            return None
        found += each
    return found


def named_groups(case: golden.Case, names: Sequence[str]) -> tuple[dict[str, Any], tuple[Group, ...]]:
    """A case for a framework that has groups by name: the first group's hyperparameters, and the other groups.

    Args:
        case: any.
        names: of the parameters in that framework, group after group.

    Raises:
        NotStated: the groups' learning rates are no multiples of one.
    """
    scales = factors(case)
    if scales is None:
        raise NotStated("the groups' learning rates are not in a constant proportion")
    groups, remaining = [], iter(names)
    base = hyperparameters(case.groups[0])
    for group, scale in zip(case.groups, scales, strict=True):
        own = [next(remaining) for _ in group.params]
        given = {name: value for name, value in hyperparameters(group).items() if value != base[name]}
        if given or scale != 1:
            groups.append(Group(exactly(own), lr_scale=scale, **given))
    return base, tuple(groups)


def any_infinite(gradients: Sequence[Array | None]) -> bool:
    """Whether an infinity, which NumPy warns of where it becomes NaN, is among the gradients."""
    return any(g is not None and bool(np.any(np.isinf(g))) for g in gradients)
