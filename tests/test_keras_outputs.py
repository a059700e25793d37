"""Outputs of layers in traces of Keras, on the backend of this process."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

from ada2ms.core.trace import Trace, TraceError
from ada2ms.core.trace.outputs import MODEL, activation, apart
from ada2ms.tf import Recorder, plain_layers
from support import slow

pytestmark = pytest.mark.keras

STEPS = 5
X = np.random.default_rng(1).normal(size=(8 * STEPS, 5)).astype(np.float32)
Y = np.random.default_rng(2).normal(size=(8 * STEPS, 2)).astype(np.float32)
BACKEND = keras.backend.backend()


def network(remat: bool = False) -> keras.Model:
    keras.utils.set_random_seed(0)
    with keras.RematScope("full") if remat else nullcontext():
        dense = keras.layers.Dense(6, "tanh")
    layers = [keras.Input((5,)), dense, keras.layers.Dropout(0.0, name="drop"), keras.layers.Dense(2)]
    return keras.Sequential(layers)


NAMES = ["0.dense", "drop", "1.dense", MODEL]


def train(path: Path, model: keras.Model, x: Any = X, y: Any = Y, **options: Any) -> Trace:
    model.compile(optimizer="sgd", loss="mse", run_eagerly=True)
    given = {"outputs": True, **plain_layers(model), **options}
    fit = {"validation_data": (x[:8] + 1, y[:8])} if given.pop("validates", False) else {}
    with Recorder(path, model, **given) as recorder:
        model.fit(x, y, batch_size=8, shuffle=False, verbose=0, callbacks=[recorder], epochs=2 if fit else 1, **fit)
    return Trace.load(path)


def names(trace: Trace, i: int = 0) -> list[str]:
    return [each.name for each in trace.steps[i].outputs]


def agree(found: Any, x: Any) -> bool:
    d = apart(found, activation(np.asarray(x, np.float32)), same_layout=True, same_order=True)
    return d is not None and d < 1e-6


@pytest.mark.parametrize("validates", [False, *slow(True)])
def test_what_layers_are_given_and_give_is_recorded(validates: bool, tmp_path: Path) -> None:
    """As NumPy computes it. Of a layer with an activation function what goes into that. Layers have their `call` again,
    and the run is that without outputs; validation is no forward pass of a step."""
    model, other = network(), network()
    kernels = [ops.convert_to_numpy(v) for v in model.trainable_variables]
    trace = train(tmp_path / "a", model, validates=validates, full=7 if validates else 3)
    train(tmp_path / "b", other, outputs=False, validates=validates)
    for v, w in zip(model.trainable_variables, other.trainable_variables, strict=True):
        assert np.array_equal(ops.convert_to_numpy(v), ops.convert_to_numpy(w))
    assert [len(step.outputs) for step in trace.steps][:7] == ([4] * 7 if validates else [4, 4, 4, 0, 0])
    assert all(names(trace, i) == NAMES for i in range(3))
    assert not any({"call", "activation"} & set(vars(layer)) - {"activation"} for layer in model._flatten_layers())
    assert keras.layers.deserialize(keras.layers.serialize(model.layers[0])).activation is keras.activations.tanh
    h = X[:8] @ kernels[0] + kernels[1]
    out = np.tanh(h) @ kernels[2] + kernels[3]
    by_name = {each.name: each for each in trace.steps[0].outputs}
    for name, before, after in (("0.dense", X[:8], h), ("drop", np.tanh(h), np.tanh(h)), ("1.dense", np.tanh(h), out)):
        assert agree(by_name[name].inputs[0], before), name
        assert agree(by_name[name].arrays[0], after), name
    assert agree(by_name[MODEL].arrays[0], out)


class Modeless(keras.Model):  # type: ignore[misc]
    """A model that is not told whether it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = keras.layers.Dense(2)

    def call(self, x: Any) -> Any:
        return self.inner(x)


def test_neither_building_nor_validation_is_a_forward_pass(tmp_path: Path) -> None:
    """Though Keras' building on torch has values, and validation comes before the second step."""
    keras.utils.set_random_seed(0)
    model = Modeless()
    model(X[:1])
    trace = train(tmp_path / "a", model, X[:8], Y[:8], validates=True)
    assert [names(trace, i) for i in range(2)] == [["0.dense", MODEL]] * 2
    assert all(agree(step.outputs[1].inputs[0], X[:8]) for step in trace.steps)


def test_a_loop_of_ones_own(tmp_path: Path) -> None:
    """Calls with training=True count, and those of layers that were never called so; the rest is evaluation."""
    model = network()
    optimizer = keras.optimizers.SGD(0.1)
    with Recorder(tmp_path / "a", model, optimizer, outputs=True, **plain_layers(model)) as recorder:
        for _ in range(2):
            model(X[:8])
            h = model(X[:8], training=True)
            head = model.layers[-1](ops.tanh(ops.convert_to_tensor(X[:8]) @ ops.ones((5, 6))))
            model(X[:8] + 1, training=False)
            recorder.output("logits", {"b": h, "a": X[:2]})
            gradients = [ops.ones(v.shape) for v in model.trainable_variables]
            optimizer.apply(gradients, model.trainable_variables)
    assert head.shape == (8, 2)
    trace = Trace.load(tmp_path / "a")
    for i in range(2):
        assert names(trace, i) == ["logits", *NAMES, "1.dense (2)"]
    assert [x.shape for x in trace.steps[0].outputs[0].arrays] == [[2, 5], [8, 2]]
    assert all(each.arrays[0].norm > 0 for each in trace.steps[0].outputs)


@(pytest.mark.slow if BACKEND == "jax" else lambda test: test)  # which compiles each operation
def test_recurrent_attentive_and_nested_layers(tmp_path: Path) -> None:
    """Each has the name of its parameters; cells, which are called for each time step, have none."""
    keras.utils.set_random_seed(0)
    given = keras.Input((4, 6))
    h = keras.layers.LSTM(6, return_sequences=True)(given)
    h = keras.layers.MultiHeadAttention(2, 3)(h, h)
    inner = keras.Sequential([keras.layers.Dense(6, "relu")], name="inner")
    model = keras.Model(given, keras.layers.GlobalAveragePooling1D()(inner(h)))
    x = X[:, :1, None] * np.ones((1, 4, 6), np.float32)
    trace = train(tmp_path / "a", model, x, np.zeros((len(x), 6), np.float32))
    assert [each.name for each in trace.steps[0].outputs if each.composed] == ["1.attention", "inner", MODEL]
    found = names(trace)
    assert [name for name in found if name.startswith(("0.", "1.", "2.", "inner", "("))] == [
        "0.lstm",
        "1.attention.query",
        "1.attention.key",
        "1.attention.value",
        "1.attention.out",
        "1.attention",
        "2.dense",
        "inner",
        MODEL,
    ]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(keras, "RematScope"), reason="this Keras has no RematScope")
def test_layers_that_are_computed_again(tmp_path: Path) -> None:
    """Under a RematScope; on JAX such a layer is a program, whose output no one sees from outside."""
    found = names(train(tmp_path / "a", network(remat=True)))
    assert [name for name in found if not name.endswith(")") or name == MODEL] == (
        NAMES[1:] if BACKEND == "jax" else NAMES
    )


def test_what_is_refused(tmp_path: Path) -> None:
    model = network()
    with pytest.raises(ValueError, match="Invalid outputs: True"):
        Recorder(tmp_path / "a", model, keras.optimizers.SGD(0.1), outputs=True, full=0)
    optimizer = keras.optimizers.SGD(0.1)
    with Recorder(tmp_path / "a", model, optimizer, outputs=True) as recorder:
        with pytest.raises(TypeError, match="must be a tensor, or a tuple"):
            recorder.output("h", "text")
        with pytest.raises(TraceError, match="No layer of the model was called before this step"):
            optimizer.apply([ops.ones(v.shape) for v in model.trainable_variables], model.trainable_variables)
