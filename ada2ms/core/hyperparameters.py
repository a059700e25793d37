"""Hyperparameters: defaults, validation, and names in every framework, for all backends."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import numpy as np

Scope = Literal["model", "tensor"]
Nonfinite = Literal["propagate", "skip"]
Framework = Literal["torch", "keras", "optax"]
# A function of the count of completed updates. `Any`, because the count and the value are of whichever framework the
# schedule runs in.
Schedule = Callable[[Any], Any]
Scheduled = float | Schedule


@dataclass(frozen=True)
class Hyperparameters:
    """The hyperparameters of one parameter group; their defaults are those of every backend.

    Attributes:
        lr: learning rate, at least 0; or a schedule: a function of the count of completed updates.
        b1: decay rate of the first moment, in [0, 1).
        b2: decay rate of both second moments, in [0, 1).
        eps: added to the denominator, after bias correction and outside the root; at least 0.
        weight_decay: decoupled weight decay, scaled by lr; at least 0.
        adaptivity: 1 is AdamW, 0 is momentum SGD normalised by one number; in [0, 1]; or a schedule.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is allowed.
    """

    lr: Scheduled = 1e-3
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-2
    adaptivity: Scheduled = 0.9

    def __post_init__(self) -> None:
        for field, value in list(vars(self).items()):
            check(field, value)
            if not callable(value):  # Python numbers: NumPy's scalars would compute in their own precision
                object.__setattr__(self, field, as_float(value))


@dataclass(frozen=True)
class _Range:
    """What is allowed for a number.

    Attributes:
        noun: what the error calls it. The words are those of torch.optim, so that code that matches on its messages
            keeps working.
        upper: the upper limit; the lower one is 0.
        closed: whether the upper limit itself is allowed.
        zero: whether 0 is.
        schedule: whether a schedule is.
        none: whether None is.
    """

    noun: str
    upper: float = math.inf
    closed: bool = False
    zero: bool = True
    schedule: bool = False
    none: bool = False

    def __contains__(self, number: float) -> bool:
        return 0.0 < number < self.upper or (self.zero and number == 0.0) or (self.closed and number == self.upper)

    def __str__(self) -> str:
        return f"a number in {'[' if self.zero else '('}0, {self.upper:g}{']' if self.closed else ')'}"


_RANGES: Final[dict[str, _Range]] = {
    "lr": _Range("learning rate", schedule=True),
    "b1": _Range("beta parameter at index 0", upper=1.0),
    "b2": _Range("beta parameter at index 1", upper=1.0),
    "eps": _Range("epsilon value"),
    "weight_decay": _Range("weight_decay value"),
    "adaptivity": _Range("adaptivity", upper=1.0, closed=True, schedule=True),
    "max_norm": _Range("max_norm", closed=True, zero=False, none=True),
    "lr_scale": _Range("lr_scale"),
}
_CHOICES: Final[dict[str, tuple[Any, ...]]] = {
    "scope": get_args(Scope),
    "nonfinite": get_args(Nonfinite),
    "compensated": (False, True),
}


def check(field: str, value: Any, argument: str | None = None, *, schedule: bool | None = None) -> None:
    """Raises unless `value` is allowed for `field`.

    Args:
        field: the name used here, which decides what is allowed: a field of `Hyperparameters`; "scope", "nonfinite",
            "max_norm" or "compensated"; or "lr_scale", of a `Group`.
        value: a number (or anything that `float` takes: a NumPy scalar, a one-element tensor), a schedule, or a choice.
        argument: the framework's name for the argument, as the error should give it; by default `field`.
        schedule: whether a callable is allowed too; by default as in the rule (for `lr` and `adaptivity`).

    Raises:
        TypeError: the value is of the wrong kind.
        ValueError: the value is outside the allowed range.
    """
    argument = argument or field
    if field in _CHOICES:
        if value not in _CHOICES[field]:
            raise ValueError(f"Invalid {argument}: {value!r} ({argument} must be one of {_CHOICES[field]})")
        return
    range_ = _RANGES[field]
    schedule = range_.schedule if schedule is None else schedule
    if (schedule and callable(value)) or (range_.none and value is None):
        return
    error: type[Exception] = ValueError
    try:
        if as_float(value) in range_:
            return
    except OverflowError:  # an integer above every float
        pass
    except (TypeError, ValueError, RuntimeError):
        error = TypeError
    allowed = f"{range_}{' or a schedule' if schedule else ''}{' or None' if range_.none else ''}"
    raise error(f"Invalid {range_.noun}: {value!r} ({argument} must be {allowed})")


def as_float(value: Any) -> float:
    """A number as a Python float: a NumPy scalar, an array or a tensor of one element.

    Raises:
        TypeError, ValueError, RuntimeError, OverflowError: it is none.
    """
    if isinstance(value, np.ndarray):
        value = value.item()
    if isinstance(value, (str, bytes, bool, np.bool_)):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def value_at(scheduled: Any, count: Any) -> Any:
    """The value of a number or schedule for the update that follows `count` completed ones."""
    return scheduled(count) if callable(scheduled) else scheduled


DEFAULTS: Final = Hyperparameters()
DEFAULT_SCOPE: Final[Scope] = "model"
DEFAULT_NONFINITE: Final[Nonfinite] = "propagate"
DEFAULT_MAX_NORM: Final[float | None] = None
DEFAULT_COMPENSATED: Final[bool] = False

# The rule's name: that of the argument in each framework. "betas[0]" is the first of the tuple `betas`.
NAMES: Final[dict[str, dict[Framework, str]]] = {
    name: {"torch": torch, "keras": keras, "optax": optax}
    for name, torch, keras, optax in (
        ("lr", "lr", "learning_rate", "learning_rate"),
        ("b1", "betas[0]", "beta_1", "b1"),
        ("b2", "betas[1]", "beta_2", "b2"),
        ("eps", "eps", "epsilon", "eps"),
        ("weight_decay", "weight_decay", "weight_decay", "weight_decay"),
        ("adaptivity", "adaptivity", "adaptivity", "adaptivity"),
        ("scope", "scope", "scope", "scope"),
        ("nonfinite", "nonfinite", "nonfinite", "nonfinite"),
        ("max_norm", "max_norm", "global_clipnorm", "max_norm"),
        ("compensated", "compensated", "compensated", "compensated"),
    )
}


def to_arguments(values: Mapping[str, Any], framework: Framework) -> dict[str, Any]:
    """Values by the rule's names as arguments of a framework; a tuple is left out unless all of it is there."""
    arguments: dict[str, Any] = {}
    tuples: dict[str, list[str]] = {}
    for name, names in NAMES.items():
        argument, indexed, _ = names[framework].partition("[")
        if indexed:
            tuples.setdefault(argument, []).append(name)
        elif name in values:
            arguments[argument] = values[name]
    for argument, names_of in tuples.items():
        if all(name in values for name in names_of):
            arguments[argument] = tuple(values[name] for name in names_of)
    return arguments


def from_arguments(arguments: Mapping[str, Any], framework: Framework) -> dict[str, Any]:
    """Arguments of a framework by the rule's names; what is no hyperparameter is left out."""
    values: dict[str, Any] = {}
    for name, names in NAMES.items():
        argument, indexed, index = names[framework].partition("[")
        if argument in arguments:
            value = arguments[argument]
            values[name] = value[int(index[:-1])] if indexed else value
    return values
