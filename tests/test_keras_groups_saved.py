"""Keras optimizers with groups: configurations, files, and what is found again after a model was saved and loaded."""

import json
import warnings
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from keras_support import BACKEND, arrays, halving, state
from test_keras_fit import X, Y, train

from ada2ms import core
from ada2ms.core import Cosine, Group
from ada2ms.tf import Ada2MS

pytestmark = pytest.mark.keras


SCHEDULED = [
    Group("kernel", adaptivity=Cosine(1.0, 0.25, 8), weight_decay=0.5, b2=0.9),
    Group("", max_ndim=1, adaptivity=halving, lr_scale=0.5),
]


def network(name: str | None = None) -> Any:
    layers = [keras.layers.Dense(8, "tanh"), keras.layers.Dense(1)]
    return keras.Sequential([keras.Input(X.shape[1:]), *layers], name=name)


def compiled(model: Any, **arguments: Any) -> Any:
    model.compile(Ada2MS(0.01, **arguments), "mse")
    return model


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("how", ["from_config", "saving", "json"])
def test_the_configuration_is_kept(how: str, built: bool) -> None:
    given = Ada2MS(0.1, groups=SCHEDULED, compensated=True)
    with keras.name_scope("layer"):
        targets = [keras.Variable(x, name=n) for n, x in zip(("kernel", "bias", "scale"), arrays(0), strict=False)]
    if built:
        given.build(targets)
    if how == "saving":
        restored = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(given))
    else:
        config = given.get_config()
        before = json.dumps(config)
        restored = Ada2MS.from_config(json.loads(before) if how == "json" else config)
        assert json.dumps(config) == before
    assert restored.groups == given.groups == tuple(SCHEDULED)
    assert restored.compensated
    assert restored.get_config() == given.get_config()
    restored.build(targets)
    if built:
        assert restored._grouping == given._grouping
    assert "groups" not in Ada2MS().get_config()


@pytest.mark.parametrize("how", ["keras", pytest.param("weights", marks=pytest.mark.slow)])
def test_saved_and_loaded(how: str, tmp_path: Path) -> None:
    """The path of a layer of a Sequential is another one in what was loaded."""
    model = compiled(network(), groups=SCHEDULED)
    train(model, epochs=1)
    if how == "keras":
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
    else:
        model.save_weights(tmp_path / "model.weights.h5")
        loaded = compiled(network(), groups=SCHEDULED)
        loaded.optimizer.build(loaded.trainable_variables)
        loaded.load_weights(tmp_path / "model.weights.h5")
    for _ in range(2):
        for x, y in zip(contents(model), contents(loaded), strict=True):
            np.testing.assert_array_equal(x, y)
        train(model, epochs=1)
        train(loaded, epochs=1)


def contents(model: Any) -> list[Any]:
    return [*model.get_weights(), *state(model.optimizer).values()]


def test_a_group_of_one_of_several_layers_is_found_again(tmp_path: Path) -> None:
    """Although the names that Keras has given to its layers, and so the paths, are others in what was loaded."""
    model = network()
    first = model.layers[0].kernel.path
    compiled(model, groups=[Group(core.groups.exactly([first]), weight_decay=5.0)])
    train(model, epochs=1)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.layers[0].kernel.path != first
    assert loaded.optimizer._grouping.members == model.optimizer._grouping.members == (0, None, None, None)
    train(model, epochs=1)
    train(loaded, epochs=1)
    for x, y in zip(contents(model), contents(loaded), strict=True):
        np.testing.assert_array_equal(x, y)


def test_layers_are_frozen_and_thawed() -> None:
    """An optimizer that is made anew from a configuration, of other variables: names say which are in which group."""
    names = ("one", "two", "three")
    model = keras.Sequential([keras.Input((6,)), *(keras.layers.Dense(6, name=name) for name in names)])
    model.layers[2].trainable = False
    optimizer = Ada2MS(groups=[Group("two", lr_scale=0.5), Group("one/kernel", b2=0.5)])
    optimizer.build(model.trainable_variables)
    assert optimizer._grouping.members == (1, None, 0, 0)
    model.layers[0].trainable, model.layers[2].trainable = False, True
    other = Ada2MS.from_config(optimizer.get_config())
    with pytest.warns(UserWarning, match=r"have no variables any more: \[Group\('one/kernel'"):
        other.build(model.trainable_variables)
    assert other._grouping.members == (0, 0, None, None)
    assert len(other._grouping.moments) == 1


def test_layers_that_keras_has_named_change_places() -> None:
    """Paths of before that are now those of others cannot be told from layers that were numbered anew."""
    layers = [keras.layers.Dense(6) for _ in range(3)]
    model = keras.Sequential([keras.Input((6,)), *layers])
    layers[2].trainable = False
    optimizer = Ada2MS(groups=[Group(core.groups.exactly([layers[1].kernel.path]), lr_scale=0.5)])
    optimizer.build(model.trainable_variables)
    layers[0].trainable, layers[2].trainable = False, True
    other = Ada2MS.from_config(optimizer.get_config())
    with pytest.warns(UserWarning, match="their paths are now others' paths"):
        other.build(model.trainable_variables)
    again = Ada2MS.from_config(optimizer.get_config())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.build(optimizer._trainable_variables)
    assert again._grouping == optimizer._grouping


def test_another_layout_of_moments_is_refused(tmp_path: Path) -> None:
    model = compiled(network(), groups=[Group("kernel", b2=0.9)])
    train(model, epochs=1)
    model.save_weights(tmp_path / "model.weights.h5")
    other = compiled(network())
    other.optimizer.build(other.trainable_variables)
    with pytest.raises(ValueError, match=r"global_velocity' has shape \(\); in what was saved it is \(2,\)"):
        other.load_weights(tmp_path / "model.weights.h5")


def test_a_cloned_model() -> None:
    model = compiled(network(), groups=SCHEDULED)
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    clone.compile(Ada2MS.from_config(model.optimizer.get_config()), "mse")
    for m in (model, clone):
        train(m, epochs=1)
    for x, y in zip(contents(model), contents(clone), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="about TensorFlow alone")
def test_a_tensorflow_checkpoint_and_variables(tmp_path: Path) -> None:
    import tensorflow as tf

    targets = [tf.Variable(x, name=f"v{i}") for i, x in enumerate(arrays(0))]
    optimizer = Ada2MS(0.1, groups=[Group("v0", b2=0.5)])
    step = tf.function(lambda: optimizer.apply([tf.ones_like(v) for v in targets], targets))
    optimizer.build(targets)
    step()
    before = state(optimizer)
    path = tf.train.Checkpoint(optimizer=optimizer).save(str(tmp_path / "checkpoint"))
    step()
    tf.train.Checkpoint(optimizer=optimizer).restore(path).assert_existing_objects_matched()
    for name, x in state(optimizer).items():
        np.testing.assert_array_equal(x, before[name], err_msg=name)


def test_fit_with_groups() -> None:
    """In the backend's own training step, with everything at once."""
    model = compiled(network(), groups=SCHEDULED, global_clipnorm=0.5, nonfinite="skip")
    start = [w.astype("float64") for w in model.get_weights()]
    train(model, epochs=2)
    kernels, biases = start[::2], start[1::2]
    choices: dict[str, Any] = {"max_norm": 0.5, "nonfinite": "skip", "lr": 0.01}
    rule = core.Ada2MS(
        [
            {"params": kernels, "adaptivity": Cosine(1.0, 0.25, 8), "weight_decay": 0.5, "b2": 0.9},
            {"params": biases, "adaptivity": lambda k: 0.5 ** (k + 1), "lr": 0.005},
        ],
        **choices,
    )
    for i in range(8):
        x, y = (a[8 * i % 32 : 8 * i % 32 + 8].astype("float64") for a in (X, Y))
        h = np.tanh(x @ kernels[0] + biases[0])
        error = 2 * (h @ kernels[1] + biases[1] - y) / y.size
        inner = error @ kernels[1].T * (1 - h * h)
        rule.step([x.T @ inner, h.T @ error, inner.sum(0), error.sum(0)])
    expected = [kernels[0], biases[0], kernels[1], biases[1]]
    for x, y in zip(model.get_weights(), expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6)
    assert ops.convert_to_numpy(model.optimizer._global_step).tolist() == [8, 8]
