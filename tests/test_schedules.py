"""Schedules of the adaptivity: the same values with the counts of every framework, eager, compiled and vectorised."""

import json
import math
import os
import pickle
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest

from ada2ms.core import AdaptivitySchedule, Constant, Cosine, Exponential, Linear
from ada2ms.core.schedules import KINDS, from_dict

SCHEDULES = [
    Constant(0.3),
    Linear(1.0, 0.0, 10),
    Linear(0.2, 0.9, 7),
    Linear(0.5, 0.1, 1),
    Cosine(1.0, 0.0, 10),
    Cosine(0.1, 0.8, 7),
    Exponential(1.0, 0.0, 10),
    Exponential(0.9, 0.2, 2.5),
    Linear(0.0, 1.0, 3 * 10**9),  # beyond 32 bits
]
COUNTS = [0, 1, 2, 3, 6, 7, 8, 9, 10, 11, 100, 10**6]
Evaluate = Callable[[AdaptivitySchedule, list[int]], tuple[Any, str]]  # values, and the dtype they were computed in


def exact(schedule: AdaptivitySchedule, count: int) -> float:
    """The definition in the module's docstring, in 50 digits."""
    with mpmath.workdps(50):
        f = {name: mpmath.mpf(value) for name, value in schedule.to_dict().items() if name != "schedule"}
        if isinstance(schedule, Constant):
            return float(f["value"])
        if isinstance(schedule, Exponential):
            return float(f["end"] + (f["start"] - f["end"]) * mpmath.power(2, -count / f["half_life"]))
        left = max(f["steps"] - count, mpmath.mpf(0)) / f["steps"]
        left = (1 - mpmath.cos(mpmath.pi * left)) / 2 if isinstance(schedule, Cosine) else left
        return float(f["end"] + (f["start"] - f["end"]) * left)


def assert_exact(schedule: AdaptivitySchedule, counts: list[int], values: Any, dtype: str) -> None:
    """Within 4 epsilons, absolute: values are at most 1, and made by some four roundings of numbers of at most 1.

    (The argument of the cosine is at most pi, and so rounded more coarsely, but enters by its square or less.)
    """
    wanted = [exact(schedule, count) for count in counts]
    got = np.array([float(value) for value in values])
    np.testing.assert_allclose(got, wanted, rtol=0, atol=4 * np.finfo(dtype).eps)
    assert np.all((got >= 0) & (got <= 1))


def python(kind: Any, dtype: str) -> Evaluate:
    return lambda schedule, counts: ([schedule(kind(count)) for count in counts], dtype)


def numpy_array(dtype: Any) -> Evaluate:
    return lambda schedule, counts: (
        schedule(np.array(counts, dtype)),
        "float32" if dtype is np.float32 else "float64",
    )


def torch_counts(dtype: str, *, batched: str = "") -> Evaluate:
    def evaluate(schedule: AdaptivitySchedule, counts: list[int]) -> tuple[Any, str]:
        import torch

        given = torch.tensor(counts, dtype=getattr(torch, dtype))
        computed = "float64" if dtype == "float64" else "float32"  # integers take torch's default dtype
        if batched == "vmap":
            return torch.vmap(schedule)(given), computed
        if batched == "compile":
            torch._dynamo.reset()  # since torch 2.6 compiles the same code for eight schedules and then no more
            return torch.compile(schedule, backend="eager", fullgraph=True)(given), computed
        values = [schedule(count) for count in given]
        assert all(value.dtype == getattr(torch, computed) and value.shape == () for value in values)
        return values, computed

    return evaluate


def jax_counts(dtype: str, *, transform: str = "", x64: bool = False) -> Evaluate:
    def evaluate(schedule: AdaptivitySchedule, counts: list[int]) -> tuple[Any, str]:
        import jax
        import jax.numpy as jnp

        with jax.enable_x64(x64):
            given = jnp.array(counts, dtype)
            if transform == "vmap":
                values = list(jax.vmap(schedule)(given))
            else:
                call = jax.jit(schedule) if transform == "jit" else schedule
                values = [call(count) for count in given]
            computed = "float64" if dtype.endswith("64") else "float32"  # JAX divides int32 in float32
            assert all(value.dtype == computed for value in values)
            return values, computed

    return evaluate


def tensorflow_counts(dtype: str, *, compiled: bool = False, variable: bool = False) -> Evaluate:
    def evaluate(schedule: AdaptivitySchedule, counts: list[int]) -> tuple[Any, str]:
        import tensorflow as tf

        make = tf.Variable if variable else tf.constant
        call = tf.function(schedule) if compiled else schedule
        values = [call(make(count, dtype=dtype)) for count in counts]
        computed = "float32" if dtype == "float32" else "float64"  # TensorFlow divides integers in float64
        assert all(value.dtype == computed for value in values)
        return values, computed

    return evaluate


def keras_counts(dtype: str, *, variable: bool = False) -> Evaluate:
    """Counts of whichever backend Keras runs on, or Keras' own variables."""

    def evaluate(schedule: AdaptivitySchedule, counts: list[int]) -> tuple[Any, str]:
        import keras

        def make(count: int) -> Any:
            if variable:
                return keras.Variable(count, dtype=dtype, trainable=False)
            return keras.ops.convert_to_tensor(count, dtype=dtype)

        return [schedule(make(count)) for count in counts], "float32"

    return evaluate


def keras_symbolic(schedule: AdaptivitySchedule, counts: list[int]) -> tuple[Any, str]:
    """Inside a Keras graph."""
    import keras

    given = keras.Input(())
    model = keras.Model(given, schedule(given))
    return model(np.array(counts, "float32")), "float32"


def marked(way: str) -> Any:
    """Ways of TensorFlow, whose import takes long, run where Keras has loaded it."""
    here = way.startswith("keras") or (way.startswith("tensorflow") and os.environ["KERAS_BACKEND"] == "tensorflow")
    return pytest.param(way, marks=[pytest.mark.keras] if here else [])


WAYS = {
    "python int": python(int, "float64"),
    "python float": python(float, "float64"),
    "numpy int32": python(np.int32, "float64"),
    "numpy float32": python(np.float32, "float32"),
    "numpy float64": python(np.float64, "float64"),
    "numpy array of int64": numpy_array(np.int64),
    "numpy array of float32": numpy_array(np.float32),
    "torch int64": torch_counts("int64"),
    "torch float32": torch_counts("float32"),
    "torch float64": torch_counts("float64"),
    "torch vmap": torch_counts("float64", batched="vmap"),
    "torch compile": torch_counts("float64", batched="compile"),
    "jax int32": jax_counts("int32"),
    "jax float32": jax_counts("float32"),
    "jax int32 in x64": jax_counts("int32", x64=True),
    "jax float64": jax_counts("float64", x64=True),
    "jax jit": jax_counts("int32", transform="jit"),
    "jax jit in x64": jax_counts("int64", transform="jit", x64=True),
    "jax vmap": jax_counts("int32", transform="vmap"),
    "tensorflow int32": tensorflow_counts("int32"),
    "tensorflow int64": tensorflow_counts("int64"),
    "tensorflow float32": tensorflow_counts("float32"),
    "tensorflow float64": tensorflow_counts("float64"),
    "tensorflow variable": tensorflow_counts("int64", variable=True),
    "tensorflow function": tensorflow_counts("int64", compiled=True),
    "keras int32": keras_counts("int32"),
    "keras float32": keras_counts("float32"),
    "keras variable of int32": keras_counts("int32", variable=True),
    "keras variable of float32": keras_counts("float32", variable=True),
    "keras symbolic": keras_symbolic,
}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("way", [marked(way) for way in WAYS])
def test_values(way: str, schedule: AdaptivitySchedule) -> None:
    """At the start, between, at the end and beyond: all ways agree with 50 digits, and so with each other."""
    values, dtype = WAYS[way](schedule, COUNTS)
    assert_exact(schedule, COUNTS, values, dtype)


@pytest.mark.parametrize("kind", [Linear, Cosine])
def test_ends_are_met(kind: Any) -> None:
    """In the last digit, and kept."""
    schedule = kind(0.9, 0.3, 10)
    assert schedule(0) == pytest.approx(0.9, rel=1e-15)
    assert [schedule(count) for count in (10, 11, 1000)] == [0.3] * 3
    assert [kind(1.0, 0.0, 10)(count) for count in (0, 10, 11)] == [1, 0, 0]
    assert [kind(0.0, 1.0, 10)(count) for count in (0, 10, 11)] == [0, 1, 1]


def test_exponential_halves_the_distance() -> None:
    schedule = Exponential(1.0, 0.5, 3)
    assert [schedule(count) for count in (0, 3, 6, 9)] == [1, 0.75, 0.625, 0.5625]
    assert schedule(10**9) == 0.5


# Plain data.


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_plain_data_and_back(schedule: AdaptivitySchedule) -> None:
    data = json.loads(json.dumps(schedule.to_dict()))
    assert data["schedule"] == schedule.kind
    for back in (from_dict(data), pickle.loads(pickle.dumps(schedule))):
        assert back == schedule
        assert type(back) is type(schedule)
        assert hash(back) == hash(schedule)


def test_equality_is_by_kind_and_value() -> None:
    assert Linear(1, 0, 10) == Linear(1.0, 0.0, 10) != Linear(1, 0, 11)
    assert Linear(1, 0, 10) != Cosine(1, 0, 10)
    assert set(KINDS) == {"constant", "linear", "cosine", "exponential"}


@pytest.mark.parametrize("kind", [int, np.int64, np.float32, np.float64, np.asarray])
def test_numbers_of_any_kind_become_pythons(kind: Any) -> None:
    schedule = Linear(kind(1), kind(0), np.int64(10))
    assert schedule == Linear(1.0, 0.0, 10)
    assert [type(value) for value in schedule.to_dict().values()] == [str, float, float, int]


NUMBERS = [getattr(np, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)]
NUMBERS += [int, float, np.float16, np.float32, np.float64, np.longdouble, np.asarray, np.atleast_1d]


@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_of_every_type_make_the_same_schedule(kind: Any) -> None:
    """Also those that end below the limit, with which Python's numbers must not be compared in their own type."""
    assert repr(Exponential(kind(1), kind(0), kind(3))) == "Exponential(start=1.0, end=0.0, half_life=3.0)"
    assert repr(Constant(kind(1))) == "Constant(value=1.0)"
    if "float" not in kind.__name__ and kind is not np.longdouble:
        for schedule in (Linear, Cosine):
            assert repr(schedule(kind(1), kind(0), kind(3))) == f"{schedule.__name__}(start=1.0, end=0.0, steps=3)"


@pytest.mark.parametrize("kind", NUMBERS)
def test_counts_of_every_type_meet_every_horizon(kind: Any) -> None:
    """Within the type's own precision, without a warning; horizons that a type does not hold are too long to matter."""
    value = np.asarray if kind is np.atleast_1d else kind
    for horizon in (1, 10, 10**5, 10**39, 10**308):
        for schedule in (Linear(1, 0.25, horizon), Cosine(1, 0.25, horizon), Exponential(1, 0.25, horizon)):
            for count in (0, 1, 100):
                assert float(schedule(value(count))) == pytest.approx(exact(schedule, count), abs=1e-6)
    for half_life in (1e-300, 1e-39):
        assert [float(Exponential(1, 0.25, half_life)(value(count))) for count in (0, 1)] == [1, 0.25]


@pytest.mark.parametrize("framework", [marked(framework) for framework in ("torch", "jax", "tensorflow")])
def test_float32_counts_of_frameworks_meet_every_horizon(framework: str) -> None:
    if framework == "torch":
        import torch as library
    elif framework == "jax":
        import jax.numpy as library
    else:
        import tensorflow as library
    make = library.tensor if framework == "torch" else library.asarray if framework == "jax" else library.constant
    for horizon in (10**39, 10**308):
        for schedule in (Linear(1, 0.25, horizon), Cosine(1, 0.25, horizon), Exponential(1, 0.25, horizon)):
            assert [float(schedule(make(count))) for count in (0.0, 100.0)] == [1, 1]
    assert [float(Exponential(1, 0.25, 1e-300)(make(count))) for count in (0.0, 1.0)] == [1, 0.25]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Linear(1.1, 0, 10), ValueError, r"adaptivity: 1.1 \(Linear.start must be a number in \[0, 1\]\)"),
        (lambda: Cosine(1, -0.1, 10), ValueError, r"adaptivity: -0.1 \(Cosine.end must be a number in \[0, 1\]\)"),
        (lambda: Constant(math.nan), ValueError, r"adaptivity: nan \(Constant.value must be a number in \[0, 1\]\)"),
        (lambda: Constant("1"), TypeError, r"adaptivity: '1' \(Constant.value must be a number in \[0, 1\]\)"),
        (lambda: Constant(Constant(1)), TypeError, r"Constant.value must be a number in \[0, 1\]\)"),
        (lambda: Linear(1, 0, 0), ValueError, r"Linear.steps: 0 \(must be an integer above 0\)"),
        (lambda: Linear(1, 0, 10**400), ValueError, r"Linear.steps: 1000* \(must be an integer above 0\)"),
        (lambda: Linear(1, 0, 2.5), TypeError, r"Linear.steps: 2.5 \(must be an integer above 0\)"),
        (lambda: Cosine(1, 0, True), TypeError, r"Cosine.steps: True \(must be an integer above 0\)"),
        (lambda: Exponential(1, 0, -1), ValueError, r"Exponential.half_life: -1 \(must be a number above 0\)"),
        (lambda: Exponential(1, 0, math.inf), ValueError, r"half_life: inf \(must be a number above 0\)"),
        (lambda: Exponential(1, 0, "3"), TypeError, r"half_life: '3' \(must be a number above 0\)"),
        (
            lambda: Exponential(1, 0, np.float32(math.inf)),
            ValueError,
            r"half_life: .*inf.* \(must be a number above 0\)",
        ),
        (lambda: Exponential(1, 0, 10**400), ValueError, r"half_life: 1000* \(must be a number above 0\)"),
        (lambda: Exponential(1, 0, np.True_), TypeError, r"half_life: .*True.* \(must be a number above 0\)"),
        (lambda: Exponential(1, 0, 1j), TypeError, r"half_life: 1j \(must be a number above 0\)"),
        (lambda: Linear(1, 0, np.float32(3)), TypeError, r"Linear.steps: .*3.0.* \(must be an integer above 0\)"),
        (lambda: Linear(np.True_, 0, 3), TypeError, r"Linear.start must be a number in \[0, 1\]\)"),
        (lambda: from_dict({"schedule": "step"}), ValueError, r"schedule: 'step' \(must be one of \('constant'"),
        (lambda: from_dict({}), ValueError, r"schedule: None \(must be one of \('constant'"),
        (lambda: from_dict({"schedule": "constant"}), ValueError, r"constant schedule: \[\] \(must be \['value'\]\)"),
        (lambda: from_dict({"schedule": "constant", "value": 1, "end": 0}), ValueError, r"\['end', 'value'\]"),
    ],
)
def test_errors(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
