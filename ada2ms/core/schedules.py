"""Schedules of the adaptivity that mean the same in every framework.

Each is a function of the count of completed updates: `schedule(0)` is used for the first update. The count may be a
Python or NumPy number, or a tensor of torch, Keras or JAX; traced and compiled code included. A schedule compares equal
by value, pickles, and turns into plain data and back: `from_dict(schedule.to_dict()) == schedule`.

    Linear     end + (start - end) * left                       left = max(steps - count, 0) / steps
    Cosine     end + (start - end) * (1 - cos(pi*left)) / 2
    Exponential  end + (start - end) * 2 ** (-count / half_life)    never ends: no horizon to choose
"""

import math
import sys
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from typing import Any, ClassVar, Final

import numpy as np

from ada2ms.core.hyperparameters import check


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
            whole = field.name == "steps"
            kind: Any = Integral if whole else Real
            if field.name in ("value", "start", "end"):
                check("adaptivity", value, argument, schedule=False)
            else:
                message = f"Invalid {argument}: {value!r} (must be {'an integer' if whole else 'a number'} above 0)"
                if not isinstance(value, kind) or isinstance(value, bool):
                    raise TypeError(message)
                if not 0 < value <= sys.float_info.max:
                    raise ValueError(message)
            # Python numbers, whatever numbers were given (NumPy's, a tensor's): the fields are plain data.
            object.__setattr__(self, field.name, int(value) if whole else float(value))


@dataclass(frozen=True)
class Constant(AdaptivitySchedule):
    """The same adaptivity, `value`, for every update."""

    value: float
    kind: ClassVar[str] = "constant"

    def __call__(self, count: Any) -> Any:
        return self.value + 0 * (count / 1)  # of the count's own kind, as from the other schedules


@dataclass(frozen=True)
class Linear(AdaptivitySchedule):
    """From `start` to `end` in a straight line over `steps` updates, then `end`."""

    start: float
    end: float
    steps: int
    kind: ClassVar[str] = "linear"

    def __call__(self, count: Any) -> Any:
        return self.end + (self.start - self.end) * _left(count, self.steps)


@dataclass(frozen=True)
class Cosine(AdaptivitySchedule):
    """From `start` to `end` along half a cosine over `steps` updates, then `end`."""

    start: float
    end: float
    steps: int
    kind: ClassVar[str] = "cosine"

    def __call__(self, count: Any) -> Any:
        return self.end + (self.start - self.end) * ((1 - _cos(math.pi * _left(count, self.steps))) / 2)


@dataclass(frozen=True)
class Exponential(AdaptivitySchedule):
    """From `start` towards `end`, halving the distance every `half_life` updates."""

    start: float
    end: float
    half_life: float
    kind: ClassVar[str] = "exponential"

    def __call__(self, count: Any) -> Any:
        return self.end + (self.start - self.end) * 0.5 ** (count / 1 / self.half_life)  # an integer count: see _left


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
    total = float(steps)  # JAX takes no Python integer above its own
    ahead = total - count / 1  # the division makes an integer count a float in every framework
    return (ahead + abs(ahead)) / (2 * total)  # exactly `ahead`, or exactly 0


# Where each framework keeps its cosine; what made the count is already imported, so nothing is imported here.
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
    return sys.modules[_COSINES[framework]].cos(x) if framework in _COSINES else np.cos(x)
