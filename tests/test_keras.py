"""The Keras optimizer, on the backend that KERAS_BACKEND names: its arguments, and its configuration."""

import copy
import functools
import json
import pickle
from typing import Any

import keras
import numpy as np
import pytest
from keras_support import ADAPTIVITIES, apply, arrays, assert_close, by_core, numpy, variables

from ada2ms import core
from ada2ms.core.hyperparameters import DEFAULTS
from ada2ms.tf import Ada2MS

pytestmark = pytest.mark.keras


# Arguments


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *[("learning_rate", -1.0), ("beta_1", 1.0), ("beta_2", -0.1), ("epsilon", -1e-8), ("weight_decay", -0.1)],
        *[("adaptivity", 1.5), ("adaptivity", float("nan")), ("scope", "layer"), ("nonfinite", "ignore")],
        *[("scope", None), ("nonfinite", ["skip"]), ("weight_decay", None), ("learning_rate", float("inf"))],
    ],
)
def test_a_bad_value_is_named(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=argument) as error:
        Ada2MS(**{argument: value})
    assert repr(value) in str(error.value)


NUMBERS = ["learning_rate", "beta_1", "beta_2", "epsilon", "weight_decay", "adaptivity"]


@pytest.mark.parametrize("argument", NUMBERS)
def test_a_value_of_the_wrong_kind_is_named(argument: str) -> None:
    with pytest.raises(TypeError, match=rf"'0.1' \({argument} must be a number in \[0, "):
        Ada2MS(**{argument: "0.1"})


def test_the_adaptivity_is_replaced() -> None:
    values, rows = arrays(0), [arrays(i) for i in range(1, 5)]
    optimizer, targets = Ada2MS(0.1, adaptivity=1), variables(values)
    given = (1.0, 0.0, core.Linear(1.0, 0.0, steps=4), 0.3)
    for row, adaptivity in zip(rows, given, strict=True):
        optimizer.adaptivity = adaptivity
        assert optimizer.adaptivity == adaptivity
        apply(optimizer, row, targets)
    by_count = (1.0, 0.0, 0.5, 0.3)
    assert_close([numpy(v) for v in targets], by_core(values, rows, lr=0.1, adaptivity=lambda k: by_count[k]))
    for bad, error in ((1.5, ValueError), ("0.5", TypeError)):
        with pytest.raises(error, match="adaptivity"):
            optimizer.adaptivity = bad
    assert optimizer.adaptivity == 0.3
    assert optimizer.get_config()["adaptivity"] == 0.3


def test_an_unknown_argument_is_refused() -> None:
    with pytest.raises(ValueError, match="amsgrad"):
        Ada2MS(amsgrad=True)


def test_defaults_are_the_rules() -> None:
    config = Ada2MS().get_config()
    names = {"lr": "learning_rate", "b1": "beta_1", "b2": "beta_2", "eps": "epsilon"}
    for field, value in vars(DEFAULTS).items():
        assert config[names.get(field, field)] == pytest.approx(value, rel=1e-7)  # learning_rate is kept in float32
    assert (config["scope"], config["nonfinite"]) == ("model", "propagate")


def test_a_whole_number_is_a_learning_rate() -> None:
    assert Ada2MS(learning_rate=1).get_config()["learning_rate"] == 1.0


def test_keras_2_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    import ada2ms.tf

    monkeypatch.setattr(keras, "__version__", "2.15.0")
    spec = importlib.util.spec_from_file_location("ada2ms_on_keras_2", ada2ms.tf.__file__)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=r"needs Keras 3, not Keras 2\.15\.0"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


# The configuration, and what is restored from it


@pytest.mark.parametrize("how", ["from_config", "saving"])
@pytest.mark.parametrize("kind", ADAPTIVITIES)
def test_the_configuration_is_kept(kind: str, how: str) -> None:
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 10)
    given = Ada2MS(
        schedule, 0.8, 0.9, 1e-6, 0.1, ADAPTIVITIES[kind], "tensor", "skip", clipnorm=1.0, name="mine", use_ema=True
    )
    if how == "from_config":
        config = given.get_config()
        before = copy.deepcopy(config)
        restored = Ada2MS.from_config(config)
        assert config["adaptivity"] == before["adaptivity"]
    else:
        data = json.loads(json.dumps(keras.saving.serialize_keras_object(given)))
        restored = keras.saving.deserialize_keras_object(data)
    assert isinstance(restored, Ada2MS)
    assert restored.get_config() == given.get_config()

    values, rows = arrays(0), [arrays(i) for i in (1, 2, 3)]
    finals = []
    for optimizer in (given, restored):
        targets = variables(values)
        for row in rows:
            apply(optimizer, row, targets)
        finals.append([numpy(v) for v in targets])
    for left, right in zip(*finals, strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("name", ["ada2ms", "Ada2MS"])
def test_by_name(name: str) -> None:
    assert isinstance(keras.optimizers.get(name), Ada2MS)
    config = {"class_name": name, "config": {"learning_rate": 0.5, "adaptivity": 0.25}}
    assert keras.optimizers.get(config).adaptivity == 0.25
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(optimizer=name, loss="mse")
    assert isinstance(model.optimizer, Ada2MS)


def test_the_other_name() -> None:
    import ada2ms.keras
    import ada2ms.tf

    assert ada2ms.keras.Ada2MS is Ada2MS
    assert keras.saving.get_registered_name(ada2ms.keras.Ada2MS) == "ada2ms>Ada2MS"
    assert all(getattr(ada2ms.keras, name) is getattr(ada2ms.tf, name) for name in ada2ms.tf.__all__)


def test_the_example_of_the_docstring() -> None:
    import doctest

    (test,) = doctest.DocTestFinder(recurse=False).find(Ada2MS, "Ada2MS", globs={})
    assert len(test.examples) > 4
    assert doctest.DocTestRunner().run(test).failed == 0


def test_copies() -> None:
    given = Ada2MS(0.01, adaptivity=core.Linear(1.0, 0.0, steps=4), scope="tensor")
    for copied in (pickle.loads(pickle.dumps(given)), copy.deepcopy(given)):
        assert copied is not given
        assert copied.get_config() == given.get_config()


def test_a_function_that_keras_cannot_save_is_named() -> None:
    optimizer = Ada2MS(adaptivity=functools.partial(core.Linear(1.0, 0.0, steps=4)))  # good enough to train with
    apply(optimizer, arrays(1), variables(arrays(0)))
    with pytest.raises(TypeError, match=r"functools.partial\(Linear"):
        optimizer.get_config()
