"""Schedules of the adaptivity that mean the same in every framework.

Each is a function of the count of completed updates: `schedule(0)` is used for the first update. The count may be a
Python or NumPy number, or a tensor of torch, Keras or JAX; traced and compiled code included. A schedule compares equal
by value, pickles, and turns into plain data and back: `from_dict(schedule.to_dict()) == schedule`.

    Linear     end + (start - end) * left                       left = max(steps - count, 0) / steps
    Cosine     end + (start - end) * (1 - cos(pi*left)) / 2
    Exponential  end + (start - end) * 2 ** (-count / half_life)    never ends: no horizon to choose
"""

import math
import operator
import sys
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Final

import numpy as np

from ada2ms.core.hyperparameters import as_float, check


@dataclass(frozen=True)
class AdaptivitySchedule:
    """Base class: plain data in and out."""

    kind: ClassVar[str]

    def __call__(self, count: Any) -> Any:
        """The adaptivity, in [0, 1], for the update that follows `count` completed ones."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, str | float | int]:
        """Plain data (strings and numbers), for configs and checkpoints."""
        return {"schedule": self.kind, **asdict(self)}

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            argument = f"{type(self).__name__}.{field.name}"
            if field.name in ("value", "start", "end"):
                check("adaptivity", value, argument, schedule=False)
                number: float | int = as_float(value)
            else:
                number = _above_0(argument, value, whole=field.name == "steps")
            # Python numbers, whatever numbers were given (NumPy's, a tensor's): the fields are plain data.
            object.__setattr__(self, field.name, number)


def _above_0(argument: str, value: Any, *, whole: bool) -> float | int:
    """The value as a Python number, which compares without NumPy's types: those of 32 bits do not hold the limit."""
    message = f"Invalid {argument}: {value!r} (must be {'an integer' if whole else 'a number'} above 0)"
    try:
        number: float | int = as_float(value)
        if whole:
            number = operator.index(value.item() if isinstance(value, np.ndarray) else value)
    except OverflowError:  # an integer above every float
        raise ValueError(message) from None
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(message) from None
    if not 0 < number <= sys.float_info.max:
        raise ValueError(message)
    return number


@dataclass(frozen=True)
class Constant(AdaptivitySchedule):
    """The same adaptivity, `value`, for every update.

    Args:
        value: in [0, 1].

    Raises:
        TypeError, ValueError: naming the argument, its value and what is allowed.
    """

    value: float
    kind: ClassVar[str] = "constant"

    def __call__(self, count: Any) -> Any:
        return self.value + 0 * _floating(count)  # of the count's own kind, as from the other schedules


@dataclass(frozen=True)
class Linear(AdaptivitySchedule):
    """From `start` to `end` in a straight line over `steps` updates, then `end`.

    Args:
        start: the adaptivity of the first update, in [0, 1].
        end: that of the update after `steps` others, and of all later ones, in [0, 1].
        steps: the number of updates, at least 1.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is allowed.
    """

    start: float
    end: float
    steps: int
    kind: ClassVar[str] = "linear"

    def __call__(self, count: Any) -> Any:
        return self.end + (self.start - self.end) * _left(count, self.steps)


@dataclass(frozen=True)
class Cosine(AdaptivitySchedule):
    """From `start` to `end` along half a cosine over `steps` updates, then `end`.

    Args:
        start: the adaptivity of the first update, in [0, 1].
        end: that of the update after `steps` others, and of all later ones, in [0, 1].
        steps: the number of updates, at least 1.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is allowed.
    """

    start: float
    end: float
    steps: int
    kind: ClassVar[str] = "cosine"

    def __call__(self, count: Any) -> Any:
        return self.end + (self.start - self.end) * ((1 - _cos(math.pi * _left(count, self.steps))) / 2)


@dataclass(frozen=True)
class Exponential(AdaptivitySchedule):
    """From `start` towards `end`, halving the distance every `half_life` updates.

    Args:
        start: the adaptivity of the first update, in [0, 1].
        end: what it comes near to, in [0, 1].
        half_life: a number of updates, above 0.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is allowed.
    """

    start: float
    end: float
    half_life: float
    kind: ClassVar[str] = "exponential"

    def __call__(self, count: Any) -> Any:
        return self.end + (self.start - self.end) * 0.5 ** (_floating(count) / _clamped(self.half_life))


KINDS: Final = {kind.kind: kind for kind in (Constant, Linear, Cosine, Exponential)}


def from_dict(data: dict[str, Any]) -> AdaptivitySchedule:
    """The schedule that `to_dict` described.

    Raises:
        ValueError: an unknown schedule, or fields that are missing, superfluous or out of range.
    """
    kind = data.get("schedule")
    if kind not in KINDS:
        raise ValueError(f"Invalid schedule: {kind!r} (must be one of {tuple(KINDS)})")
    cls = KINDS[kind]
    arguments = {name: value for name, value in data.items() if name != "schedule"}
    expected = [field.name for field in fields(cls)]
    if sorted(arguments) != sorted(expected):
        raise ValueError(f"Invalid fields of a {kind} schedule: {sorted(arguments)} (must be {expected})")
    return cls(**arguments)


def _left(count: Any, steps: int) -> Any:
    """The fraction of `steps` still ahead, max(steps - count, 0) / steps, by operators that every framework has."""
    total = _clamped(steps)
    ahead = total - _floating(count)
    return (ahead + abs(ahead)) / (2 * total)  # exactly `ahead`, or exactly 0


def _clamped(horizon: float) -> float:
    """A number of updates as a float that is neither 0 nor infinite in float32, where it means the same.

    No count reaches 2**64. A horizon of 1e38 is then as good as one that is longer, and 1e-30 as one that is shorter.
    """
    return min(max(float(horizon), 1e-30), 1e38)  # a float, since JAX rejects Python integers beyond 64 bits


def _floating(count: Any) -> Any:
    """The count as a float of its own kind. (NumPy's float16 is widened: it ends at 65504.)"""
    if isinstance(count, (np.ndarray, np.generic)) and count.dtype == np.float16:
        count = count.astype(np.float32)
    return count / 1


# The module with each framework's cosine. It has been imported already, by whatever made the count.
_COSINES: Final = {
    "jax": "jax.numpy",
    "jaxlib": "jax.numpy",
    "keras": "keras.ops",
    "tensorflow": "tensorflow",
    "torch": "torch",
}


def _cos(x: Any) -> Any:
    if isinstance(x, (int, float)):
        return math.cos(x)
    framework = type(x).__module__.partition(".")[0]
    if framework not in _COSINES:
        return np.cos(x)
    package, _, module = _COSINES[framework].partition(".")
    found = sys.modules[package]  # whose parts are attributes, and in Keras 3.5 not modules of these names
    return (getattr(found, module) if module else found).cos(x)
