"""The rule, its hyperparameters, its schedules and its golden vectors; NumPy only."""

from ada2ms.core.hyperparameters import DEFAULTS, Hyperparameters
from ada2ms.core.schedules import AdaptivitySchedule, Constant, Cosine, Exponential, Linear
from ada2ms.core.spec import Ada2MS
from ada2ms.core.state import State, StateError

__all__ = [
    "DEFAULTS",
    "Ada2MS",
    "AdaptivitySchedule",
    "Constant",
    "Cosine",
    "Exponential",
    "Hyperparameters",
    "Linear",
    "State",
    "StateError",
]
