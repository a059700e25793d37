"""Every layer of the table: the forward pass is the same after a hand-off, and so is the trajectory."""

import os
from functools import cache
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from handoff_models import Twin, in_mid_run
from handoff_rows import ROWS

from ada2ms.core import State

Array = Any


@cache
def twin(row: str, framework: str) -> Twin:
    """One for all tests; whatever it has been used for, a state replaces it all."""
    return Twin(framework, ROWS[row])


def trained(row: str, framework: str, state: State, batches: range) -> State:
    using = twin(row, framework)
    using.import_state(state)
    for seed in batches:
        using.step(*ROWS[row].data(seed))
    return using.export_state()


@cache
def alone(row: str, framework: str) -> tuple[State, State, State]:
    """At the beginning, after 2 steps and after 4."""
    begin = in_mid_run(twin(row, framework).export_state())
    middle = trained(row, framework, begin, range(2))
    return begin, middle, trained(row, framework, middle, range(2, 4))


# Rows that between them cut, join, stack and order arrays in every way; the others are for `make slow`.
QUICK = (
    "attention",
    "transformer encoder layer",
    "LSTM, 2 layers in both directions",
    "GRU, two biases",
    "GRU, one bias",
)


def case(row: str, *pair: str) -> Any:
    """What JAX would compile for Keras again, and every row on a second backend of Keras, are for `make slow`."""
    marks = [pytest.mark.keras] if "keras" in pair else []
    elsewhere = os.environ["KERAS_BACKEND"] != "tensorflow" and row not in (
        "transformer encoder layer",
        "GRU, two biases",
    )
    jax_as_well = "jax" in pair and "torch" in ROWS[row].build
    if row not in QUICK or ("keras" in pair and (elsewhere or jax_as_well)):
        marks.append(pytest.mark.slow)
    return pytest.param(row, *pair, id=f"{row}: {'-'.join(pair)}", marks=marks)


CASES = [case(row, *pair) for row in ROWS for pair in permutations(ROWS[row].build, 2)]


@pytest.mark.parametrize(("row", "first", "second"), CASES)
def test_every_layer(row: str, first: str, second: str) -> None:
    begin, middle, end = alone(row, first)
    one, other = twin(row, first), twin(row, second)
    report = other.import_state(middle)
    assert {name for _, names, _, _ in report.rows for name in names.split(" + ")} == set(begin.parameters)
    one.import_state(middle)
    x, _ = ROWS[row].data(9)
    assert np.ptp(other(x)) > 0.1
    exact = other.dtype == "float64"  # else to some dozen roundings of numbers of about 1
    np.testing.assert_allclose(other(x), one(x), rtol=0, atol=1e-12 if exact else 1e-5)
    found = trained(row, second, middle, range(2, 4))
    for name, entry in end.parameters.items():
        for slot, array in entry.slots().items():
            np.testing.assert_allclose(
                found.parameters[name].slots()[slot], array, rtol=0, atol=1e-9 if exact else 1e-5, err_msg=name
            )
            assert np.abs(array - middle.parameters[name].slots()[slot]).max() > 1e-7, name
