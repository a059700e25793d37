"""Which parameters have hyperparameters of their own, said by their names: the same in every framework.

    groups = [Group("embed", lr_scale=0.1), NO_DECAY]

A parameter is in the first group that matches it; those that no group matches have the optimizer's own
hyperparameters. All groups share one global second moment: its mean(g*g) is over every entry of the model.
"""

import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, Final, Self

from ada2ms.core.hyperparameters import Hyperparameters, Scheduled, as_float, check
from ada2ms.core.schedules import AdaptivitySchedule, from_dict


@dataclass(frozen=True, repr=False)
class Group:
    """Parameters with hyperparameters of their own, by the rule's names; what is None is as in the optimizer.

    A group compares equal by value, pickles, and turns into plain data and back: `Group.from_dict(group.to_dict())`.

    Attributes:
        match: a regular expression that is searched in a parameter's name (`re.search`); "" is found in every name.
        max_ndim: the group has only parameters of at most this many dimensions; None: of any number.
        lr_scale: factor of the optimizer's learning rate, which may be scheduled; at least 0.
        weight_decay, adaptivity, b1, b2, eps: as in `Hyperparameters`.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is allowed.
    """

    match: str
    _: KW_ONLY
    max_ndim: int | None = None
    lr_scale: float = 1.0
    weight_decay: float | None = None
    adaptivity: Scheduled | None = None
    b1: float | None = None
    b2: float | None = None
    eps: float | None = None

    def __post_init__(self) -> None:
        _check_match(self.match)
        object.__setattr__(self, "max_ndim", _max_ndim(self.max_ndim))
        for name, value in {"lr_scale": self.lr_scale, **self.hyper()}.items():
            check(name, value)
            if not callable(value):
                object.__setattr__(self, name, as_float(value))

    def __repr__(self) -> str:
        given = {name: value for name, value in vars(self).items() if value != getattr(type(self), name, None)}
        del given["match"]
        return f"Group({', '.join([repr(self.match), *(f'{name}={value!r}' for name, value in given.items())])})"

    def matches(self, name: str, ndim: int) -> bool:
        """Whether a parameter of this name and number of dimensions is one of the group's."""
        return (self.max_ndim is None or ndim <= self.max_ndim) and re.search(self.match, name) is not None

    def hyper(self) -> dict[str, Any]:
        """The hyperparameters that the group has of its own, by the rule's names; `lr_scale` is not among them."""
        own = {name: getattr(self, name) for name in ("weight_decay", "adaptivity", "b1", "b2", "eps")}
        return {name: value for name, value in own.items() if value is not None}

    def of(self, hyper: Hyperparameters) -> Hyperparameters:
        """All hyperparameters of the group, given the optimizer's."""
        lr, scale = hyper.lr, self.lr_scale
        scaled = (lambda count: lr(count) * scale) if callable(lr) else lr * scale
        return Hyperparameters(**{**vars(hyper), **self.hyper(), "lr": lr if scale == 1 else scaled})

    def to_dict(self) -> dict[str, Any]:
        """Plain data (strings, numbers, a schedule's dictionary), for configs; without what has its default.

        Raises:
            TypeError: the adaptivity is a schedule of a framework's own.
        """
        data = {field.name: value for field in fields(self) if (value := getattr(self, field.name)) != field.default}
        if isinstance(self.adaptivity, AdaptivitySchedule):
            data["adaptivity"] = self.adaptivity.to_dict()
        elif callable(self.adaptivity):
            raise TypeError(f"Invalid adaptivity: {self.adaptivity!r} (plain data holds the schedules of ada2ms.core)")
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The group that `to_dict` described.

        Raises:
            TypeError, ValueError: fields that are missing, superfluous or out of range.
        """
        schedule = data.get("adaptivity")
        return cls(**{**data, "adaptivity": from_dict(schedule) if isinstance(schedule, dict) else schedule})


def _check_match(match: Any) -> None:
    message = f"Invalid match: {match!r} (match must be a regular expression"
    if not isinstance(match, str):
        raise TypeError(f"{message}, a string)")
    try:
        re.compile(match)
    except re.error as error:
        raise ValueError(f"{message}; here: {error})") from None


def _max_ndim(value: Any) -> int | None:
    if value is None:
        return None
    message = f"Invalid max_ndim: {value!r} (max_ndim must be an integer of at least 0, or None)"
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(message) from None
    if isinstance(value, bool) or number < 0:
        raise TypeError(message) if isinstance(value, bool) else ValueError(message)
    return number


NO_DECAY: Final = Group("", max_ndim=1, weight_decay=0.0)  # biases, scales of normalisations and other vectors


def exactly(names: Iterable[str]) -> str:
    """A `match` for parameters of just these names."""
    alternatives = [re.escape(name) for name in names]
    return rf"\A(?:{'|'.join(alternatives)})\Z" if alternatives else "(?!)"


def check_groups(groups: Iterable[Group] | None) -> tuple[Group, ...]:
    """The groups as a tuple; none for None.

    Raises:
        TypeError: they are not groups.
    """
    try:
        given: tuple[Any, ...] = tuple(groups or ())
    except TypeError:
        given = (None,)  # no group either
    if not all(isinstance(group, Group) for group in given):
        raise TypeError(f"Invalid groups: {groups!r} (must be a sequence of ada2ms.core.Group, or None)")
    return given


def assign(groups: Sequence[Group], names: Sequence[str], ndims: Sequence[int]) -> tuple[int | None, ...]:
    """The index of each parameter's group, the first that matches it; None for those that no group matches.

    Args:
        groups: in the order in which they are tried.
        names: of the parameters.
        ndims: their numbers of dimensions.

    Raises:
        ValueError: a group has no parameter, since no name matches or groups before it have them all. A group that
            matches every name, as `NO_DECAY` does, may be empty; and so may any, where there is no parameter at all.
    """
    found = tuple(
        next((i for i, group in enumerate(groups) if group.matches(name, ndim)), None)
        for name, ndim in zip(names, ndims, strict=True)
    )
    for i, group in enumerate(groups):
        if names and group.match and i not in found:
            taken = any(group.matches(name, ndim) for name, ndim in zip(names, ndims, strict=True))
            reason = "groups before it have all that it matches" if taken else "it matches none of"
            raise ValueError(f"Invalid groups[{i}]: {group} has no parameter ({reason}{'' if taken else _some(names)})")
    return found


def _some(names: Sequence[str]) -> str:
    return f" {', '.join(map(repr, names[:8]))}{' ...' if len(names) > 8 else ''}"
