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
    adaptivity: Scheduled = 0.5

    def __post_init__(self) -> None:
        for field, value in list(vars(self).items()):
            check(field, value)
            if not callable(value):  # Python numbers: NumPy's scalars would compute in their own precision
                object.__setattr__(self, field, as_float(value))


# field: (what the error calls it, upper limit, whether the limit itself is allowed, whether a schedule is). The lower
# limit is 0 throughout. The words are those of torch.optim, so that code that matches on its messages keeps working.
_LIMITS: Final[dict[str, tuple[str, float, bool, bool]]] = {
    "lr": ("learning rate", math.inf, False, True),
    "b1": ("beta parameter at index 0", 1.0, False, False),
    "b2": ("beta parameter at index 1", 1.0, False, False),
    "eps": ("epsilon value", math.inf, False, False),
    "weight_decay": ("weight_decay value", math.inf, False, False),
    "adaptivity": ("adaptivity", 1.0, True, True),
}
_CHOICES: Final[dict[str, tuple[str, ...]]] = {"scope": get_args(Scope), "nonfinite": get_args(Nonfinite)}


def check(field: str, value: Any, argument: str | None = None, *, schedule: bool | None = None) -> None:
    """Raises unless `value` is allowed for `field`: a field of `Hyperparameters`, "scope" or "nonfinite".

    Args:
        field: the name used here, which decides what is allowed.
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
    noun, upper, closed, schedule_allowed = _LIMITS[field]
    schedule = schedule_allowed if schedule is None else schedule
    if schedule and callable(value):
        return
    error: type[Exception] = ValueError
    try:
        number = as_float(value)
        if 0.0 <= number < upper or (closed and number == upper):
            return
    except OverflowError:  # an integer above every float
        pass
    except (TypeError, ValueError, RuntimeError):
        error = TypeError
    allowed = f"a number in [0, {upper:g}{']' if closed else ')'}" + (" or a schedule" if schedule else "")
    raise error(f"Invalid {noun}: {value!r} ({argument} must be {allowed})")


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
