"""The Keras optimizer, on the backend that KERAS_BACKEND names: its arguments, and its configuration."""

import copy
import json
import pickle
from typing import Any

import keras
import numpy as np
import pytest
from keras_support import ADAPTIVITIES, apply, arrays, numpy, variables

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
    ],
)
def test_a_bad_value_is_named(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=argument) as error:
        Ada2MS(**{argument: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("argument", ["learning_rate", "beta_1", "epsilon", "weight_decay", "adaptivity"])
def test_a_value_of_the_wrong_kind_is_named(argument: str) -> None:
    with pytest.raises(TypeError, match=argument):
        Ada2MS(**{argument: "0.1"})


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


def test_by_name() -> None:
    assert isinstance(keras.optimizers.get("ada2ms"), Ada2MS)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(optimizer="ada2ms", loss="mse")
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


def test_pickle() -> None:
    given = Ada2MS(0.01, adaptivity=core.Linear(1.0, 0.0, steps=4), scope="tensor")
    assert pickle.loads(pickle.dumps(given)).get_config() == given.get_config()
