"""What weight decay leaves out, after its model or its optimizer has been saved, copied and configured again."""

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops
from keras_support import BACKEND, numpy, only_on_tensorflow

from ada2ms.tf import Ada2MS
from ada2ms.tf.exclusions import Exclusions

pytestmark = pytest.mark.keras

X = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")


@keras.saving.register_keras_serializable("test_exclusions")
class Block(layers.Layer):  # type: ignore[misc]
    """A layer within which Keras names the layers."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.first, self.norm, self.second = layers.Dense(3), layers.LayerNormalization(), layers.Dense(3)

    def build(self, shape: Any) -> None:
        for layer in (self.first, self.norm, self.second):
            layer.build((None, 3))
        self.gain = self.add_weight(shape=(3,), name="gain", initializer="ones")

    def call(self, x: Any) -> Any:
        return self.second(self.norm(self.first(x))) * self.gain


@keras.saving.register_keras_serializable("test_exclusions")
class Model(keras.Model):  # type: ignore[misc]
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.inner, self.last = Block(), layers.Dense(1)

    def call(self, x: Any) -> Any:
        return self.last(self.inner(x))


def sequential() -> Any:
    return keras.Sequential([keras.Input((3,)), layers.Dense(3), layers.Dense(3), layers.Dense(1)])


def unbuilt() -> Any:
    return keras.Sequential([layers.Dense(3), layers.Dense(1)])


def functional() -> Any:
    x = keras.Input((3,))
    inner = keras.Sequential([keras.Input((3,)), layers.Dense(3), layers.LayerNormalization()])
    return keras.Model(x, layers.Dense(1)(inner(layers.Dense(3)(x))))


MODELS = {"sequential": sequential, "unbuilt": unbuilt, "functional": functional, "class": Model}
WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "plain": lambda x: x,
    "loss scale": lambda x: keras.optimizers.LossScaleOptimizer(x, initial_scale=1.0),
    "members": lambda x: keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(x)),
}


def made(kind: str = "sequential", how: str = "var_list", wrapper: str = "plain") -> Any:
    """A model that has been trained, whose optimizer leaves every second variable out, or every bias and gain."""
    if wrapper == "members" and not hasattr(keras.optimizers, "MultiOptimizer"):
        pytest.skip("this Keras has no MultiOptimizer")
    model, optimizer = MODELS[kind](), Ada2MS(0.125, weight_decay=0.5)
    model(X)
    given = {
        "var_list": {"var_list": model.trainable_variables[::2]},
        "var_names": {"var_names": ["bias", "^gain$"]},
        "paths": {"var_names": [f"^{v.path}$" for v in model.trainable_variables[1::2]]},
    }[how]
    optimizer.exclude_from_weight_decay(**given)
    model.compile(WRAPPERS[wrapper](optimizer), "mse", run_eagerly=True)
    model.train_on_batch(X, X[:, :1])
    return model


def decays(optimizer: Any, variables: list[Any]) -> list[bool]:
    """Which variables a step without a gradient makes smaller."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    for v in variables:
        v.assign(np.ones(v.shape))
    optimizer.apply([ops.zeros(v.shape) for v in variables], variables)
    found = [numpy(v).ravel()[0] < 0.98 for v in variables]
    assert all(np.isin(numpy(v), np.array([0.9375, 1.0], "float32")).all() for v in variables)
    return found


def trained_on(model: Any) -> list[Any]:
    model.train_on_batch(X, X[:, :1])
    return [numpy(v) for v in model.variables]


def expected(model: Any, how: str) -> list[bool]:
    """Whether each variable decays."""
    variables = model.trainable_variables
    if how == "var_names":
        return ["bias" not in v.path and v.name != "gain" for v in variables]
    return [bool(i % 2) == (how == "var_list") for i in range(len(variables))]


@pytest.mark.parametrize(
    ("kind", "how", "wrapper"),
    [
        *(
            pytest.param("class", "var_list", wrapper, marks=[pytest.mark.slow] if seldom else [])
            for wrapper in WRAPPERS
            for seldom in [BACKEND != "torch" and wrapper != "plain"]
        ),
        ("unbuilt", "paths", "plain"),
        # Paths do not depend on the backend, and torch is the fastest to see them all.
        *((kind, how, "plain") for kind in MODELS for how in ("var_list", "var_names", "paths") if BACKEND == "torch"),
    ],
)
def test_a_saved_model_goes_on_as_before(kind: str, how: str, wrapper: str, tmp_path: Path) -> None:
    """Also where Keras numbers its layers anew: the first of them is now called what the second was."""
    keras.backend.clear_session()
    model = made(kind, how, wrapper)
    wanted = expected(model, how)
    model.save(tmp_path / "model.keras")
    keras.backend.clear_session()
    layers.Dense(1).build((1, 1))
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    assert all(np.array_equal(x, y) for x, y in zip(trained_on(loaded), trained_on(model), strict=True))
    for m in (model, loaded):
        optimizer = m.optimizer.optimizers[0] if wrapper == "members" else m.optimizer
        freeze_state(getattr(optimizer, "inner_optimizer", optimizer))
        assert decays(optimizer, m.trainable_variables) == wanted


def freeze_state(optimizer: Any) -> None:
    """No update from what there was before: decay is all that a step does."""
    for v in optimizer._momentums:
        v.assign(np.zeros(v.shape))


@pytest.mark.filterwarnings("ignore:ada2ms. not built:UserWarning")
@pytest.mark.parametrize("how", ["var_list", "var_names"])
@pytest.mark.parametrize("built", [False, True])
def test_a_configuration_keeps_them(built: bool, how: str) -> None:
    model = sequential()
    variables = model.trainable_variables
    given = Ada2MS(0.125, weight_decay=0.5, name="ada2ms")
    given.exclude_from_weight_decay(**{how: variables[::2] if how == "var_list" else ["dense.*/kernel"]})
    if built:
        given.build(variables)
    wanted = [False, True] * 3
    copies = [
        Ada2MS.from_config(given.get_config()),
        Ada2MS.from_config(json.loads(json.dumps(Ada2MS.from_config(given.get_config()).get_config()))),
        keras.saving.deserialize_keras_object(json.loads(json.dumps(keras.saving.serialize_keras_object(given)))),
    ]
    if not built:  # a built one alone is not copied with its state, as no optimizer of Keras is
        copies += [copy.deepcopy(given), pickle.loads(pickle.dumps(given))]
    for optimizer in copies:
        assert optimizer.get_config() == given.get_config()
        assert decays(optimizer, variables) == wanted
    # And another instance of the model, whose layers are called otherwise.
    other = sequential()
    if built or how == "var_names":
        assert decays(Ada2MS.from_config(given.get_config()), other.trainable_variables) == wanted
    clone = keras.models.clone_model(model)
    assert decays(Ada2MS.from_config(given.get_config()), clone.trainable_variables) == wanted
    assert decays(given, variables) == wanted


def test_nothing_excluded_is_no_part_of_the_configuration() -> None:
    optimizer = Ada2MS()
    assert "exclude_from_weight_decay" not in optimizer.get_config()
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    assert optimizer.get_config()["exclude_from_weight_decay"] == {"var_names": ["bias"]}
    optimizer.exclude_from_weight_decay()
    optimizer.build(sequential().trainable_variables)
    assert "exclude_from_weight_decay" not in optimizer.get_config()


def test_they_are_replaced_at_any_time() -> None:
    model = made()
    variables = model.trainable_variables
    freeze_state(model.optimizer)
    model.optimizer.exclude_from_weight_decay(var_names=["kernel"])
    assert decays(model.optimizer, variables) == [False, True] * 3
    model.optimizer.exclude_from_weight_decay(var_list=variables[:1])
    assert decays(model.optimizer, variables) == [False] + [True] * 5
    model.optimizer.exclude_from_weight_decay()
    assert all(decays(model.optimizer, variables))


def test_two_variables_of_one_path() -> None:
    """The one that was given is excluded, also by the configuration of an optimizer that has seen both."""
    pair = [keras.Variable(np.ones(2), name="bias") for _ in range(2)]
    optimizer = Ada2MS(0.125, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_list=pair[1:])
    assert decays(optimizer, pair) == [True, False]
    assert decays(Ada2MS.from_config(optimizer.get_config()), pair) == [True, False]


def test_fewer_variables_than_before() -> None:
    """As of a model whose first layers are frozen for the second training."""
    model = made()
    config = model.optimizer.get_config()
    rest = model.trainable_variables[2:]
    optimizer = Ada2MS.from_config(config)
    assert decays(optimizer, rest) == [False, True] * 2
    assert decays(Ada2MS.from_config(optimizer.get_config()), rest) == [False, True] * 2
    assert decays(Ada2MS.from_config(config), rest[::-1]) == [True, False] * 2
    assert decays(Ada2MS.from_config(config), model.trainable_variables[::-1]) == [True, False] * 3


def test_paths_of_one_model_are_found_in_another() -> None:
    paths = ["net/dense/kernel", "net/dense/bias", "net/dense_1/kernel", "net/dense_1/bias"]
    by_list = Exclusions(var_list=("net/dense/bias", "net/dense_1/bias")).built(paths, {1, 3})
    without_scope = [path.removeprefix("net/") for path in paths]
    renumbered = [path.replace("dense_1", "dense_9").replace("dense/", "dense_1/") for path in paths]
    for there in (paths, without_scope, renumbered):
        assert by_list.found(there) == {1, 3}
        assert by_list.built(there, {1, 3}) is by_list
    assert by_list.found(paths[::-1]) == {0, 2}
    # The same paths in the order of the other layer first, which but for numbers is the same order too.
    assert Exclusions(var_list=("net/dense/bias",)).built(paths, {1}).found(paths[2:] + paths[:2]) == {3}
    assert by_list.found(without_scope[2:]) == {1}
    assert by_list.found(["dense_1/bias", "dense_1/kernel", "other/bias"]) == {0}  # another model
    assert Exclusions(var_list=("bias",)).found(["dense/bias", "bias"]) == {1}
    # What no pattern matched before is not matched for want of the scope.
    assert Exclusions(("^dense/",)).built(paths, set()).found(without_scope) == set()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [({"var_names": "bias"}, TypeError), ({"var_list": "bias"}, TypeError), ({"var_names": ["("]}, ValueError)],
)
def test_bad_exclusions_are_named(arguments: dict[str, Any], error: type[Exception]) -> None:
    optimizer = Ada2MS()
    with pytest.raises(error, match=rf"{next(iter(arguments))}: '"):
        optimizer.exclude_from_weight_decay(**arguments)
    assert "exclude_from_weight_decay" not in optimizer.get_config()


@only_on_tensorflow
def test_variables_of_tensorflow_itself() -> None:
    import tensorflow as tf

    pair = [tf.Variable(tf.ones(2), name=name) for name in ("kernel", "bias")]
    optimizer = Ada2MS(0.125, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_list=pair[1:])
    for given in (optimizer, Ada2MS.from_config(optimizer.get_config())):
        for v in pair:
            v.assign(tf.ones(2))
        given.apply([tf.zeros(2)] * 2, pair)
        assert [float(v[0]) for v in pair] == [0.9375, 1.0]
