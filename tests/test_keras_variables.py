"""Optimizers whose variables are not the model's: fewer, in another order, of another type, or of another model.

Beside keras.optimizers.AdamW, which shows what Keras makes of each.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops
from keras_support import BACKEND, numpy, small, state

from ada2ms.core import State
from ada2ms.tf import Ada2MS, export_state, import_state

pytestmark = [
    pytest.mark.keras,
    pytest.mark.skipif(
        not hasattr(keras.optimizers.Optimizer, "_overwrite_variable_with_gradient"),
        reason="Keras 3.5 restores neither float8 nor partly frozen models, with AdamW either",
    ),
    pytest.mark.filterwarnings("ignore:Layer InputLayer does not have a `quantize` method"),
]
SUBJECTS = pytest.mark.parametrize("subject", [keras.optimizers.AdamW, Ada2MS])
X = np.random.default_rng(0).normal(size=(16, 6)).astype("float32")
Y = np.sin(X[:, :1])


@keras.saving.register_keras_serializable("test_variables")
class Overwriting(layers.Layer):  # type: ignore[misc]
    """A layer with a variable that its gradient overwrites, between others."""

    def build(self, shape: Any) -> None:
        self.before = self.add_weight(shape=(shape[-1],), name="before", initializer="ones")
        self.scale = self.add_weight(shape=(), name="scale", initializer="ones", overwrite_with_gradient=True)
        self.after = self.add_weight(shape=(2, shape[-1]), name="after", initializer="ones")

    def call(self, x: Any) -> Any:
        return x * self.before * (1 + self.scale) + ops.sum(self.after, 0)


def network(*more: Any) -> Any:
    keras.utils.set_random_seed(0)
    inner = [layers.Dense(4, "tanh", name="first"), *more, layers.Dense(3, "tanh", name="second")]
    return keras.Sequential([keras.Input((6,)), *inner, layers.Dense(1, name="third")], name="net")


def compiled(model: Any, optimizer: Any, *, eagerly: bool = True) -> Any:
    model.compile(optimizer, "mse", run_eagerly=eagerly)
    train(model)
    return model


def train(model: Any) -> Any:
    return [float(model.train_on_batch(X[i : i + 4], Y[i : i + 4])) for i in (0, 4, 8, 12)]


def float8(optimizer: Any) -> Any:
    model = network()
    model.quantize("float8")
    return compiled(model, optimizer, eagerly=False)  # Keras' float8 layers fail in TensorFlow's eager mode


def lora(optimizer: Any) -> Any:
    model = network()
    model.layers[1].enable_lora(2)
    return compiled(model, optimizer)


def frozen(optimizer: Any) -> Any:
    model = network()
    model.layers[0].trainable = False
    return compiled(model, optimizer)


def frozen_later(optimizer: Any) -> Any:
    """After the optimizer was built: with one that knows all variables."""
    model = compiled(network(), optimizer)
    model.layers[0].trainable = False
    model.compile(optimizer, "mse", run_eagerly=True)
    if BACKEND != "jax":  # where Keras asks for gradients of all variables
        train(model)
    return model


def thawed_later(optimizer: Any) -> Any:
    model = frozen(optimizer)
    model.layers[0].trainable = True
    return model


def overwriting(optimizer: Any) -> Any:
    return compiled(network(Overwriting(name="own")), optimizer)


SITUATIONS: dict[str, Callable[[Any], Any]] = {
    "float8": float8,
    "lora": lora,
    "frozen": frozen,
    "frozen later": frozen_later,
    "thawed later": thawed_later,
    "overwriting": overwriting,
}
OTHER_COUNT = ("frozen later", "thawed later")  # the optimizer of the loaded model knows as many as are trainable


def exported(model: Any) -> State:
    return export_state(model, model.optimizer, names=lambda path: path.removeprefix("net/"))


def assert_same_state(left: State, right: State) -> None:
    assert set(left.parameters) == set(right.parameters)
    for name, entry in left.parameters.items():
        other = right.parameters[name]
        assert (entry.step, entry.global_exp_avg_sq) == (other.step, other.global_exp_avg_sq), name
        for slot in ("exp_avg", "exp_avg_sq"):
            np.testing.assert_array_equal(getattr(entry, slot), getattr(other, slot), err_msg=f"{slot} of {name}")
    assert [(g.global_exp_avg_sq, g.global_step) for g in left.groups] == [
        (g.global_exp_avg_sq, g.global_step) for g in right.groups
    ]


@pytest.mark.parametrize(
    ("subject", "options", "situation"),
    [
        pytest.param(subject, options, situation, marks=[pytest.mark.slow] if options and BACKEND != "torch" else [])
        for situation in SITUATIONS
        for subject in (keras.optimizers.AdamW, Ada2MS)
        for options in ({}, {"scope": "tensor"}, {"gradient_accumulation_steps": 3})
        if (subject is Ada2MS or "scope" not in options)
        # Which variables there are does not depend on the backend, and torch is the fastest to see them all.
        and (BACKEND == "torch" or (subject is Ada2MS and (situation == "float8" or not options)))
    ],
)
def test_saved_and_loaded(subject: Any, options: dict[str, Any], situation: str, tmp_path: Path) -> None:
    """As with AdamW, which however does not load a float8 model whose gradients are being accumulated."""
    model = SITUATIONS[situation](subject(0.0625, **options))
    model.save(tmp_path / "model.keras")
    if situation in OTHER_COUNT:
        with pytest.warns(UserWarning, match=r"Skipping variable loading for optimizer"):
            keras.saving.load_model(tmp_path / "model.keras")
        return
    if subject is not Ada2MS and situation == "float8" and options:
        with pytest.raises(ValueError, match="could not be loaded"):
            keras.saving.load_model(tmp_path / "model.keras")
        return
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_same_state(exported(loaded), exported(model))
    if situation != "lora":  # which Keras merges into the kernel, and starts again
        assert train(loaded) == train(model)
        assert_same_state(exported(loaded), exported(model))


@pytest.mark.parametrize("subject", [keras.optimizers.AdamW, Ada2MS] if BACKEND == "torch" else [Ada2MS])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_exported_and_imported(subject: Any, situation: str) -> None:
    """Into a like model; the state has all that the optimizer updates, whether or not it is trained now."""
    model = SITUATIONS[situation](subject(0.0625))
    state = exported(model)
    known = [v for v in model.optimizer._trainable_variables if not v.overwrite_with_gradient]
    assert set(state.parameters) == {v.path.removeprefix("net/") for v in known}
    assert all(entry.exp_avg.any() for entry in state.parameters.values())
    unknown = [
        v.path for v in model.trainable_variables if all(v is not w for w in model.optimizer._trainable_variables)
    ]
    assert bool(unknown) == (situation == "thawed later")
    moments = [v.path for v in known]
    without = [v.path for v in model.weights if v.path not in [*moments, *unknown]]
    assert bool(without) == (situation in ("float8", "lora", "frozen", "overwriting"))
    notes = [f"{path!r} is not among the variables that the optimizer was built with" for path in unknown]
    values = [f"the value of {path!r} is not in this state: the optimizer has no moments of it" for path in without]
    assert state.notes == notes + values

    other = SITUATIONS[situation](subject(0.0625))
    report = import_state(other, other.optimizer, state, names=lambda path: path.removeprefix("net/"))
    stay = [note.replace("is not in this state", "stays as it was here") for note in values]
    assert report.notes == state.notes + notes + stay
    assert_same_state(exported(other), state)


def test_a_float8_model_trains_as_its_wide_variables_do() -> None:
    """The mean is of what the optimizer updates: neither the scales nor their histories are in it."""
    model = float8(Ada2MS(0.0625))
    optimizer = model.optimizer
    velocities = [numpy(v) for v in optimizer._velocities if v is not None]
    assert len(velocities) == 6
    mean = sum(v.sum() for v in velocities) / sum(v.size for v in velocities)
    assert small(optimizer, "global_velocity") == pytest.approx(mean, rel=1e-5)
    assert sorted(small(optimizer, "steps")) == [0] * 18 + [4] * 6


def test_a_state_of_other_shapes_changes_nothing(tmp_path: Path) -> None:
    """Of as many variables; AdamW's is half loaded by then."""
    model = compiled(network(), Ada2MS(0.0625))
    model.save_weights(tmp_path / "model.weights.h5")
    other = compiled(network(), Ada2MS(0.0625, scope="tensor"))
    before = state(other.optimizer)
    with pytest.raises(ValueError, match=r"global_velocity' has shape \(6,\); in what was saved it is \(\)"):
        other.load_weights(tmp_path / "model.weights.h5")
    for x, y in zip(before.values(), state(other.optimizer).values(), strict=True):
        np.testing.assert_array_equal(x, y)
