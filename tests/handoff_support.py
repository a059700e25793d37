"""What the tests of the hand-off share."""

from itertools import permutations
from typing import Any

import numpy as np
import pytest

from ada2ms.core import State

FRAMEWORKS = ("torch", "jax", "keras")
LR = 2.0**-7  # exact in float32, in which Keras keeps it


def marked(*frameworks: str) -> Any:
    return pytest.param(
        *frameworks, marks=[pytest.mark.keras] if "keras" in frameworks else [], id="-".join(frameworks)
    )


PAIRS = [marked(*pair) for pair in permutations(FRAMEWORKS, 2)]


def assert_equal_states(left: State, right: State) -> None:
    for name, entry in left.parameters.items():
        other = right.parameters[name]
        assert (entry.step, entry.global_exp_avg_sq) == (other.step, other.global_exp_avg_sq)
        assert entry.slots().keys() == other.slots().keys()
        for slot, array in entry.slots().items():
            assert np.array_equal(array, getattr(other, slot)), f"{name}: {slot}"
