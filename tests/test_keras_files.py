"""Files and pickles that the version before wrote, and where the next ones look for the class."""

import importlib.util
import pickle
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from keras_support import BACKEND, numpy, small

import ada2ms.tf
import ada2ms.tf.reduce
from ada2ms import core
from ada2ms.tf import Ada2MS

pytestmark = pytest.mark.keras

DATA = Path(__file__).with_name("data")  # never written again: later versions must read what is there
X = np.random.default_rng(0).normal(size=(20, 3)).astype("float32")
# The weights in the file, and after five more batches by the version that wrote it, whose configurations had no
# exclusions from weight decay.
WEIGHTS = [
    [-0.1095442, 1.0271461, -0.4768236, -0.3922868, 0.2198428, -0.1812468],
    [-0.0866007, -0.0514210, 0.4200107, 0.8103074, -0.0798505],
]
WEIGHTS_LATER = [
    [0.0140748, 1.1132008, -0.3700572, -0.2824527, 0.2767888, -0.1680437],
    [-0.0668890, 0.0324565, 0.3135736, 0.9020694, -0.0335495],
]
OVERWRITING = [
    [0.3756480, 0.5539118, 0.5772860, 6.8814769],
    [0.4256848, 0.4132088, 0.3666952, 0.4256848, 0.4132088, 0.3666952],
]


def weights(model: Any) -> Any:
    return np.concatenate([w.ravel() for w in model.get_weights()])


def test_a_model_goes_on() -> None:
    if "quantization_config" not in keras.layers.Dense(1).get_config():
        pytest.skip("the file is of Keras 3.15, whose layers have arguments that older ones do not know")
    model = keras.saving.load_model(DATA / "keras-model-1.keras")
    optimizer = model.optimizer
    assert (optimizer.name, optimizer.scope, optimizer.nonfinite) == ("mine", "tensor", "skip")
    assert optimizer.adaptivity == core.Cosine(1.0, 0.0, steps=8)
    assert isinstance(optimizer._learning_rate, keras.optimizers.schedules.PolynomialDecay)
    assert (small(optimizer, "iteration"), small(optimizer, "global_step"), small(optimizer, "skipped")) == (5, 2, 0)
    assert small(optimizer, "steps").tolist() == [2, 2, 2, 2]
    np.testing.assert_allclose(weights(model), np.concatenate(WEIGHTS), rtol=0, atol=1e-7)
    for i in range(5):
        model.train_on_batch(X[4 * i :][:4], X[4 * i :][:4, :1])
    np.testing.assert_allclose(weights(model), np.concatenate(WEIGHTS_LATER), rtol=0, atol=2e-6)


class Overwriting(keras.layers.Layer):  # type: ignore[misc]
    """A layer with a variable that its gradient overwrites, between others."""

    def build(self, shape: Any) -> None:
        self.before = self.add_weight(shape=(shape[-1],), name="before", initializer="ones")
        self.scale = self.add_weight(shape=(), name="scale", initializer="ones")
        self.scale.overwrite_with_gradient = True
        self.after = self.add_weight(shape=(2, shape[-1]), name="after", initializer="ones")

    def call(self, x: Any) -> Any:
        return x * self.before * (1 + self.scale) + ops.sum(self.after, 0)


def overwriting(scope: Any = "tensor") -> Any:
    model = keras.Sequential([keras.Input((3,)), Overwriting(name="own")])
    # 0.5 was the default of the version that wrote the file.
    optimizer = Ada2MS(0.125, adaptivity=0.5, scope=scope, gradient_accumulation_steps=2)
    model.compile(optimizer, "mse", run_eagerly=True)
    model.optimizer.build(model.trainable_variables)
    return model


def test_weights_from_when_overwritten_variables_had_slots() -> None:
    """Their slots are passed over. A state of other shapes is none of ours, as Keras says by its warning."""
    model = overwriting()
    model.load_weights(DATA / "keras-overwriting-1.weights.h5")
    assert (small(model.optimizer, "iteration"), small(model.optimizer, "global_step")) == (5, 2)
    assert small(model.optimizer, "steps").tolist() == [2, 0, 2]
    for i in range(5):
        model.train_on_batch(X[4 * i :][:4], X[4 * i :][:4, :1])
    np.testing.assert_allclose(weights(model), np.concatenate(OVERWRITING), rtol=0, atol=2e-6)
    other = overwriting("model")
    with pytest.warns(UserWarning, match="Skipping variable loading"):
        other.load_weights(DATA / "keras-overwriting-1.weights.h5")
    assert small(other.optimizer, "iteration") == 0


def test_an_optimizer_is_unpickled() -> None:
    optimizer = pickle.loads((DATA / "keras-optimizer-1.pickle").read_bytes())
    expected = Ada2MS(0.5, 0.75, 0.875, 2.0**-20, 0.25, core.Linear(1.0, 0.0, steps=4), "tensor", "skip", name="mine")
    assert type(optimizer) is Ada2MS
    assert optimizer.get_config() == expected.get_config()


def test_the_class_is_found_at_its_public_name() -> None:
    assert (Ada2MS.__module__, Ada2MS.__qualname__) == ("ada2ms.tf", "Ada2MS")
    assert b"ada2ms.tf.optimizer" not in pickle.dumps(Ada2MS())
    assert keras.saving.serialize_keras_object(Ada2MS())["module"] == "ada2ms.tf"
    before = {**keras.saving.serialize_keras_object(Ada2MS(0.25)), "module": "ada2ms.tf.optimizer"}
    assert keras.saving.deserialize_keras_object(before).get_config()["learning_rate"] == 0.25


def test_a_variable_alone_is_not_updated() -> None:
    """By the method that Keras' optimizers have for it, whose arguments are those of theirs."""
    optimizer, variable = Ada2MS(), keras.Variable(np.ones(2))
    optimizer.build([variable])
    with pytest.raises(NotImplementedError, match="Ada2MS updates all variables of a step together: call `apply`"):
        optimizer.update_step(np.ones(2), variable, 0.1)
    np.testing.assert_array_equal(numpy(variable), np.ones(2))


HOOKS = ["_backend_update_step", "_clip_gradients"]
HOOKS += ["_distributed_tf_update_step"] if BACKEND == "tensorflow" else []


@pytest.mark.parametrize("hook", HOOKS)
def test_a_keras_without_the_hooks_is_refused(hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each variable would be updated by a mean of its own."""

    class Optimizer:
        pass

    for name in HOOKS:
        if name != hook:
            setattr(Optimizer, name, None)
    monkeypatch.setattr(keras.optimizers, "Optimizer", Optimizer)
    spec = importlib.util.spec_from_file_location("reduce_on_another_keras", ada2ms.tf.reduce.__file__)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=rf"does not fit Keras .*, whose optimizers have no {hook}$"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
