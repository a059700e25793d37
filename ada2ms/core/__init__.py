"""The rule, its hyperparameters, groups and schedules and its golden vectors; NumPy only."""

from ada2ms.core.groups import NO_DECAY, Group
from ada2ms.core.hyperparameters import DEFAULTS, Hyperparameters
from ada2ms.core.schedules import AdaptivitySchedule, Constant, Cosine, Exponential, Linear
from ada2ms.core.spec import Ada2MS
from ada2ms.core.state import Receipt, State, StateError

__all__ = [
    "DEFAULTS",
    "NO_DECAY",
    "Ada2MS",
    "AdaptivitySchedule",
    "Constant",
    "Cosine",
    "Exponential",
    "Group",
    "Hyperparameters",
    "Linear",
    "Receipt",
    "State",
    "StateError",
]
