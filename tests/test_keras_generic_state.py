"""What Keras documents of its optimizers' state, configuration and life in a model; see test_keras_generic.py."""

import json
import pickle
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from keras_support import (
    BACKEND,
    BOTH,
    ONES,
    START,
    UNEVEN,
    Make,
    adamw_fails,
    after,
    apply,
    assert_close,
    numpy,
    only_on_tensorflow,
    slots,
    variable,
)

pytestmark = [pytest.mark.keras, BOTH]


# State and configuration


def test_state(make: Make) -> None:
    first, second, target = make(), make(), variable()
    apply(first, [UNEVEN], [target])
    assert all(v.path and v.trainable is False for v in first.variables)
    with pytest.raises(ValueError, match="not yet been built"):
        second.set_weights(first.variables)
    copy = variable(numpy(target))
    second.build([copy])
    with pytest.raises(ValueError, match="not compatible"):
        second.set_weights([np.zeros(7)] * len(first.variables))
    second.set_weights(first.variables)
    for optimizer, v in ((first, target), (second, copy)):
        apply(optimizer, [ONES], [v])
    assert np.array_equal(numpy(copy), numpy(target))

    store: dict[str, Any] = {}
    first.save_own_variables(store)
    third, other = make(), variable(numpy(target))
    with pytest.warns(UserWarning, match="Skipping variable loading"):
        third.load_own_variables(store)
    third.build([other])
    third.load_own_variables(store)
    for optimizer, v in ((first, target), (third, other)):
        apply(optimizer, [ONES], [v])
    assert np.array_equal(numpy(other), numpy(target))


def test_without_state(make: Make) -> None:
    optimizer, target = make(), variable()
    with pytest.raises(ValueError, match="not supported" if BACKEND == "tensorflow" else "must be built"):
        optimizer.stateless_apply([], [], [])
    if BACKEND == "tensorflow":
        return
    optimizer.build([target])
    state, values = [v.value for v in optimizer.variables], [target.value]
    with pytest.raises(ValueError, match="optimizer_variables"):
        optimizer.stateless_apply(state[1:], [ops.convert_to_tensor(UNEVEN)], values)
    with pytest.raises(ValueError, match="trainable variables"):
        optimizer.stateless_apply(state, [ops.convert_to_tensor(UNEVEN)], [])
    for g in (UNEVEN, ONES):
        values, state = optimizer.stateless_apply(state, [ops.convert_to_tensor(g)], values)
    assert_close([numpy(values[0])], [after(make(), UNEVEN, ONES)])


def test_without_state_variables_are_taken_too(make: Make) -> None:
    if BACKEND == "tensorflow":
        pytest.skip("Keras has no stateless_apply on TensorFlow")
    optimizer, target = make(), variable()
    optimizer.build([target])
    values, _ = optimizer.stateless_apply(optimizer.variables, [ops.convert_to_tensor(UNEVEN)], [target])
    assert_close([numpy(values[0])], [after(make(), UNEVEN)])


def test_without_state_nothing_given_changes(make: Make, request: pytest.FixtureRequest) -> None:
    if BACKEND == "tensorflow":
        pytest.skip("Keras has no stateless_apply on TensorFlow")
    if BACKEND == "torch":
        adamw_fails(request, "writes to the tensors that it is given, on torch")
    optimizer, target = make(), variable()
    optimizer.build([target])
    state = [v.value for v in optimizer.variables]
    before = [numpy(x) for x in state]
    optimizer.stateless_apply(state, [ops.convert_to_tensor(UNEVEN)], [target.value])
    assert all(np.array_equal(numpy(x), old) for x, old in zip(state, before, strict=True))
    assert np.array_equal(numpy(target), START)


def test_configuration(make: Make) -> None:
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)
    given = make(schedule, weight_decay=0.3, beta_1=0.5, clipvalue=2.0, use_ema=True, name="mine")
    config = json.loads(json.dumps(keras.optimizers.serialize(given)))
    for restored in (
        keras.optimizers.deserialize(config),
        keras.optimizers.get(config),
        type(given).from_config(given.get_config()),
        pickle.loads(pickle.dumps(given)),
    ):
        assert type(restored) is type(given)
        assert restored.get_config() == given.get_config()
        assert restored.name == "mine"


def test_each_has_a_name(make: Make) -> None:
    first, second = make(), make()
    # Older Keras always calls its own adamw.
    assert first.name != second.name or isinstance(first, keras.optimizers.AdamW)
    assert make(name="mine").name == "mine"


def test_gradients_of_another_precision(make: Make) -> None:
    target, optimizer = variable(), make()
    for g in (UNEVEN, ONES):
        optimizer.apply([ops.convert_to_tensor(g.astype("float64"))], [target])
    assert str(numpy(target).dtype) == "float32"
    assert_close([numpy(target)], [after(make(), UNEVEN, ONES)])


def test_by_name(make: Make) -> None:
    optimizer = make()
    assert keras.optimizers.get(optimizer) is optimizer
    assert isinstance(
        optimizer, keras.optimizers.get("adamw" if "Adam" in type(optimizer).__name__ else "ada2ms").__class__
    )


@only_on_tensorflow
def test_variables_of_tensorflow_in_a_function(make: Make) -> None:
    import tensorflow as tf

    optimizer, target = make(), tf.Variable(START)
    optimizer.build([target])
    step = tf.function(lambda g: optimizer.apply([g], [target]))
    for g in (UNEVEN, ONES):
        step(tf.constant(g))
    assert_close([target.numpy()], [after(make(), UNEVEN, ONES)])


@only_on_tensorflow
def test_a_tensorflow_checkpoint(make: Make, tmp_path: Any) -> None:
    import tensorflow as tf

    optimizer, target = make(), variable()
    apply(optimizer, [UNEVEN], [target])
    checkpoint = tf.train.Checkpoint(optimizer=optimizer, target=target.value)
    path = checkpoint.save(str(tmp_path / "checkpoint"))
    found = []
    for _ in range(2):
        checkpoint.restore(path).assert_existing_objects_matched()
        apply(optimizer, [ONES], [target])
        found.append(numpy(target))
    assert np.array_equal(*found)


# In a model


def test_averages_in_fit(make: Make, request: pytest.FixtureRequest) -> None:
    """After `fit` the model has the averages, also after a second one."""
    if BACKEND == "jax":
        reason = "Keras: a fit ends with variable and average in one buffer, which the next fit gives away twice"
        raises = (TypeError, RuntimeError)  # of JAX, of its older versions
        request.applymarker(pytest.mark.xfail(strict=True, raises=raises, reason=reason))
    layer = keras.layers.Dense(1, kernel_initializer="ones", use_bias=False)
    model = keras.Sequential([keras.Input((2,)), layer])
    model.compile(optimizer=make(use_ema=True, ema_momentum=0.5), loss="mse")
    for _ in range(2):
        model.fit(START, np.zeros((2, 1), "float32"), batch_size=1, verbose=0)
        assert_close([numpy(layer.kernel)], slots(model.optimizer, "average"))


def layered() -> Any:
    layers = [keras.layers.Dense(2, "tanh"), keras.layers.Dense(1)]
    return keras.Sequential([keras.Input((2,)), *layers])


def test_a_layer_is_frozen(make: Make) -> None:
    """With the optimizer of before, which knows its variables still."""
    model = layered()
    model.compile(optimizer=make(), loss="mse")
    model.fit(START, ONES[:, :1], verbose=0)
    model.layers[0].trainable = False
    model.compile(optimizer=model.optimizer, loss="mse")
    if BACKEND == "jax":
        with pytest.raises(ValueError, match="corresponding 1:1 to the trainable variables"):
            model.fit(START, ONES[:, :1], verbose=0)
        return
    before = model.get_weights()
    model.fit(START, ONES[:, :1], verbose=0)
    changed = [not np.array_equal(w, old) for w, old in zip(model.get_weights(), before, strict=True)]
    assert changed == [False, False, True, True]
    model.layers[0].trainable = True
    model.compile(optimizer=model.optimizer, loss="mse")
    model.fit(START, ONES[:, :1], verbose=0)
    assert not any(np.array_equal(w, old) for w, old in zip(model.get_weights(), before, strict=True))


@pytest.mark.filterwarnings("ignore:The model does not have any trainable weights")
def test_nothing_to_train(make: Make) -> None:
    model = layered()
    model.trainable = False
    model.compile(optimizer=make(), loss="mse")
    before = model.get_weights()
    model.fit(START, ONES[:, :1], verbose=0)
    assert all(np.array_equal(w, old) for w, old in zip(model.get_weights(), before, strict=True))


def test_members_of_a_multi_optimizer(make: Make) -> None:
    if not hasattr(keras.optimizers, "MultiOptimizer"):
        pytest.skip("this Keras has no MultiOptimizer")
    members = make(0.1), make(0.2)
    optimizer = keras.optimizers.MultiOptimizer(lambda v: members[v.name == "second"])
    first, second = variable(name="first"), variable(name="second")
    optimizer.build([first, second])
    apply(optimizer, [UNEVEN, ONES], [first, second])
    assert_close([numpy(first), numpy(second)], [after(make(0.1), UNEVEN), after(make(0.2), ONES)])
