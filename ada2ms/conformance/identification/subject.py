"""What is asked of an optimizer that is to be identified."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from ada2ms.core.dialects import Array, Hyper


@dataclass
class Subject:
    """An optimizer, as an experiment makes it.

    Attributes:
        name: what it is called, such as "torch.optim.AdamW".
        make: `make(params, dtype, **hyper)` returns an object with `step(gradients)` and `params`, and `lr` if the
            learning rate may be set between steps; `hyper` overrides hyperparameters by the rule's names.
        told: its hyperparameters by the rule's names, as far as it tells them.
        settable: the hyperparameters that `make` takes.
        dtypes: in which it may be tried, best first.
        mixed: whether it is known to compute a part in float32, where parameters are of float64.
        schedule: the learning rate of each step, where it is told to be scheduled.
    """

    name: str
    make: Callable[..., Any]
    told: Hyper = field(default_factory=dict)
    settable: frozenset[str] = frozenset()
    dtypes: Sequence[str] = ("float64", "float32", "bfloat16", "float16")
    mixed: bool = False
    schedule: Callable[[int], float] | None = None
    quiet: Callable[[], AbstractContextManager[Any]] = nullcontext


class CannotRunError(Exception):
    """An optimizer cannot be made, or cannot be stepped; the message says why."""


def values(params: Sequence[Any]) -> list[Array]:
    """Parameters in float64."""
    import numpy as np

    return [np.array(p, np.float64) for p in params]
