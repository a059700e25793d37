"""The Keras optimizer in Keras' own training loop, and what is saved in the middle of it."""

import copy
import pickle
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

from ada2ms import core
from ada2ms.tf import Ada2MS, Ada2MSLogger

pytestmark = pytest.mark.keras

BACKEND = keras.backend.backend()
X = np.random.default_rng(0).normal(size=(32, 6)).astype("float32")
Y = np.sin(X[:, :1])
# Rewritten graphs round differently in the last digit, in each of the 8 updates of about 0.01 of values near 1.
CLOSE = {"rtol": 2e-5, "atol": 2e-6}
# Every way of running `fit` that the backend has.
WAYS: dict[str, dict[str, Any]] = {
    "tensorflow": {"eager": {"run_eagerly": True}, "graph": {"jit_compile": False}, "xla": {"jit_compile": True}},
    "jax": {"eager": {"run_eagerly": True}, "xla": {"jit_compile": True}},
    "torch": {"eager": {"jit_compile": False}},
}[BACKEND]
# What takes long, and other tests come close to.
slow = pytest.mark.slow
SELDOM = (("jax", "eager"), ("tensorflow", "graph"))  # eager code is nothing but slow on JAX; XLA starts from the graph
EACH_WAY = [pytest.param(way, marks=[slow] if (BACKEND, way) in SELDOM else []) for way in WAYS]


def network(policy: Any = None) -> Any:
    layers = [keras.layers.Dense(8, "tanh", dtype=policy), keras.layers.Dense(1, dtype=policy)]
    model = keras.Sequential([keras.Input(X.shape[1:]), *layers])
    rng = np.random.default_rng(1)  # the same weights in every precision, unlike Keras' initializers
    model.set_weights([rng.normal(size=w.shape).astype("float32") / 2 for w in model.weights])
    return model


def train(model: Any, epochs: int = 2, **options: Any) -> Any:
    return model.fit(X, Y, batch_size=8, epochs=epochs, shuffle=False, verbose=0, **options).history


def fitted(optimizer: Any, policy: Any = None, epochs: int = 2, **compile_options: Any) -> Any:
    model = network(policy)
    model.compile(optimizer=optimizer, loss="mse", **compile_options)
    model.history_ = train(model, epochs)
    return model


def by_core(steps: int, **hyper: Any) -> list[Any]:
    """Weights after steps with gradients worked out by hand."""
    w1, b1, w2, b2 = params = [w.astype("float64") for w in network().get_weights()]
    optimizer = core.Ada2MS(params, **hyper)
    for i in range(steps):
        x, y = (a[8 * i % 32 : 8 * i % 32 + 8].astype("float64") for a in (X, Y))
        h = np.tanh(x @ w1 + b1)
        error = 2 * (h @ w2 + b2 - y) / y.size
        inner = error @ w2.T * (1 - h * h)
        optimizer.step([x.T @ inner, inner.sum(0), h.T @ error, error.sum(0)])
    return params


def assert_close(left: list[Any], right: list[Any]) -> None:
    for x, y in zip(left, right, strict=True):
        np.testing.assert_allclose(x, y, **CLOSE)


def assert_equal(left: list[Any], right: list[Any]) -> None:
    for x, y in zip(left, right, strict=True):
        np.testing.assert_array_equal(x, y)


def state(model: Any) -> list[Any]:
    return [*model.get_weights(), *(np.array(ops.convert_to_numpy(v)) for v in model.optimizer.variables)]


@pytest.mark.parametrize("way", EACH_WAY)
def test_fit_follows_the_rule(way: str) -> None:
    adaptivity = core.Cosine(1.0, 0.0, steps=6)
    model = fitted(Ada2MS(0.01, adaptivity=adaptivity), **WAYS[way])
    assert_close(model.get_weights(), by_core(8, lr=0.01, adaptivity=adaptivity))


def test_fit_follows_the_rule_of_scope_tensor() -> None:
    model = fitted(Ada2MS(0.01, scope="tensor"))
    assert_close(model.get_weights(), by_core(8, lr=0.01, scope="tensor"))


@pytest.mark.skipif(BACKEND == "torch", reason="Keras has no steps_per_execution on torch")
def test_several_steps_in_one_execution() -> None:
    model = fitted(Ada2MS(0.01), steps_per_execution=4)
    assert_close(model.get_weights(), by_core(8, lr=0.01))


def test_a_learning_rate_schedule() -> None:
    schedule = keras.optimizers.schedules.PolynomialDecay(0.02, 10, 0.0)
    model = fitted(Ada2MS(schedule))
    assert_close(model.get_weights(), by_core(8, lr=lambda k: 0.02 * (1 - k / 10)))


@pytest.mark.parametrize("way", EACH_WAY)
def test_a_bad_batch_is_skipped(way: str) -> None:
    model = network()
    model.compile(optimizer=Ada2MS(0.01, nonfinite="skip"), loss="mse", **WAYS[way])
    model.train_on_batch(X[:8], Y[:8])
    before = model.get_weights()
    model.train_on_batch(X[:8] * np.float32(np.nan), Y[:8])
    assert_equal(model.get_weights(), before)
    for i in (8, 16):
        model.train_on_batch(X[i : i + 8], Y[i : i + 8])
    assert_close(model.get_weights(), by_core(3, lr=0.01))


@pytest.mark.parametrize(
    "policy", ["mixed_float16", *(pytest.param(p, marks=slow) for p in ("mixed_bfloat16", "float16", "bfloat16"))]
)
def test_16_bit_policies(policy: str) -> None:
    model = fitted(Ada2MS(0.01), policy, epochs=4)
    assert model.history_["loss"][-1] < model.history_["loss"][0]
    unit = 2.0 ** (-8 if "bfloat16" in policy else -11)
    for x, y in zip(model.get_weights(), by_core(16, lr=0.01), strict=True):
        # Gradients, and with pure policies the weights, are rounded to `unit` in each of 16 updates of at most 0.02.
        np.testing.assert_allclose(x.astype("float64"), y, atol=16 * unit * (1 if policy[0] != "m" else 0.5))


def test_loss_scale_optimizer() -> None:
    # A scale of 2^10 leaves every gradient finite, and is exact.
    optimizer = keras.optimizers.LossScaleOptimizer(Ada2MS(0.01), initial_scale=2.0**10)
    model = fitted(optimizer)
    assert_close(model.get_weights(), by_core(8, lr=0.01))


@slow
def test_accumulation() -> None:
    model = fitted(Ada2MS(0.01, gradient_accumulation_steps=2), epochs=1)
    halves = network()
    halves.compile(optimizer=Ada2MS(0.01), loss="mse")
    for i in (0, 16):  # the mean of the gradients of two batches is the gradient of both together
        halves.train_on_batch(X[i : i + 16], Y[i : i + 16])
    assert_close(model.get_weights(), halves.get_weights())


@slow
def test_moving_averages_of_the_weights() -> None:
    model = fitted(Ada2MS(0.01, use_ema=True, ema_momentum=0.5), epochs=1)
    averages = by_core(1, lr=0.01)
    for steps in (2, 3, 4):
        averages = [0.5 * a + 0.5 * w for a, w in zip(averages, by_core(steps, lr=0.01), strict=True)]
    assert_close(model.get_weights(), averages)


@slow
def test_weights_overwritten_by_their_averages() -> None:
    options = {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2}
    model, by_hand = network(), network()
    model.compile(optimizer=Ada2MS(0.01, **options), loss="mse")
    by_hand.compile(optimizer=Ada2MS(0.01), loss="mse")
    averages: list[Any] = []
    for i in range(5):
        batch = X[8 * i % 32 :][:8], Y[8 * i % 32 :][:8]
        model.train_on_batch(*batch)
        by_hand.train_on_batch(*batch)
        weights = by_hand.get_weights()
        averages = [(a + w) / 2 for a, w in zip(averages or weights, weights, strict=True)]
        if i % 2:
            by_hand.set_weights(averages)
        assert_close(model.get_weights(), by_hand.get_weights())


def text_classifier() -> Any:
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Embedding(5, 3), keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(1)]
    return keras.Sequential([keras.Input((7,), dtype="int32"), *layers])


@pytest.mark.parametrize(
    ("way", "arguments"),
    [
        *(pytest.param(way, {}, marks=slow if way != max(WAYS) else []) for way in WAYS),
        *(pytest.param(max(WAYS), x, marks=slow) for x in ({"loss_scale_factor": 8.0}, {"global_clipnorm": 0.1})),
    ],
)
def test_an_embedding_of_repeated_tokens(way: str, arguments: Any) -> None:
    tokens = np.random.default_rng(0).integers(0, 5, (32, 7)).astype("int32")
    model = text_classifier()
    model.compile(optimizer=Ada2MS(0.01, **arguments), loss="mse", **WAYS[way])
    model.fit(tokens, Y, batch_size=8, epochs=2, shuffle=False, verbose=0)

    table, kernel, bias = params = [w.astype("float64") for w in text_classifier().get_weights()]
    optimizer = core.Ada2MS(params, lr=0.01)
    for i in range(8):
        batch, y = tokens[8 * i % 32 :][:8], Y[8 * i % 32 :][:8].astype("float64")
        h = table[batch].mean(1)
        error = 2 * (h @ kernel + bias - y) / y.size
        g = np.zeros_like(table)
        np.add.at(g, batch, (error @ kernel.T / 7)[:, None, :])
        gradients = [g, h.T @ error, error.sum(0)]
        norm = np.sqrt(sum((x * x).sum() for x in gradients))
        limit = arguments.get("global_clipnorm", np.inf)
        optimizer.step([x * min(1.0, limit / norm) for x in gradients])
    assert_close(model.get_weights(), params)


def loop(model: Any, optimizer: Any) -> Any:
    """A training step of a user's own, compiled where the backend compiles, for batches of any length on TensorFlow."""
    weights = model.trainable_variables
    if BACKEND == "tensorflow":
        import tensorflow as tf

        @tf.function(input_signature=[tf.TensorSpec((None, 6)), tf.TensorSpec((None, 1))], jit_compile=True)
        def step(x: Any, y: Any) -> None:
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
            optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))

    elif BACKEND == "torch":

        def step(x: Any, y: Any) -> None:
            model.zero_grad()
            ops.mean((model(x, training=True) - y) ** 2).backward()
            optimizer.apply([v.value.grad for v in weights], weights)

    else:
        import jax

        optimizer.build(weights)

        def loss(values: Any, others: Any, x: Any, y: Any) -> Any:
            predictions, _ = model.stateless_call(values, others, x, training=True)
            return ops.mean((predictions - y) ** 2)

        @jax.jit
        def update(values: Any, others: Any, state: Any, x: Any, y: Any) -> Any:
            return optimizer.stateless_apply(state, jax.grad(loss)(values, others, x, y), values)

        def step(x: Any, y: Any) -> None:
            targets = [*weights, *optimizer.variables]
            others = [v.value for v in model.non_trainable_variables]
            found = update([v.value for v in weights], others, [v.value for v in optimizer.variables], x, y)
            for v, x in zip(targets, [*found[0], *found[1]], strict=True):
                v.assign(x)

    return step


def test_a_training_loop_of_ones_own() -> None:
    model = network()
    step = loop(model, Ada2MS(0.01, adaptivity=0.3))
    for i in range(8):
        step(*(ops.convert_to_tensor(a[8 * i % 32 :][:8]) for a in (X, Y)))
    assert_close(model.get_weights(), by_core(8, lr=0.01, adaptivity=0.3))


@pytest.mark.parametrize("way", EACH_WAY)
def test_the_adaptivity_is_replaced_between_epochs(way: str) -> None:
    model = fitted(Ada2MS(0.01, adaptivity=1.0), epochs=1, **WAYS[way])
    model.optimizer.adaptivity = 0.25
    model.make_train_function(force=True)
    train(model, epochs=1)
    assert_close(model.get_weights(), by_core(8, lr=0.01, adaptivity=lambda k: 1.0 if k < 4 else 0.25))


def test_stateless_apply_under_jit() -> None:
    if BACKEND != "jax":
        pytest.skip("JAX alone trains without state")
    import jax

    targets = [keras.Variable(x) for x in (X[0], X[1:3])]
    optimizer = Ada2MS(0.01, nonfinite="skip", adaptivity=core.Linear(1.0, 0.0, steps=2))
    optimizer.build(targets)
    apply = jax.jit(optimizer.stateless_apply)
    values, variables = [v.value for v in targets], [v.value for v in optimizer.variables]
    params = [X[0].copy(), X[1:3].copy()]
    rule = core.Ada2MS(params, lr=0.01, nonfinite="skip", adaptivity=core.Linear(1.0, 0.0, steps=2))
    for scale in (1.0, np.nan, 2.0, 3.0):
        gradients = [np.float32(scale) * X[4], np.float32(scale) * X[5:7]]
        values, variables = apply(variables, gradients, values)
        rule.step(gradients)
    assert_close(values, params)


# Callbacks


def test_callbacks_that_change_the_learning_rate() -> None:
    model = network()
    model.compile(optimizer=Ada2MS(0.01), loss="mse")
    halve = keras.callbacks.LearningRateScheduler(lambda epoch, lr: 0.01 * 0.5**epoch)
    train(model, callbacks=[halve])
    assert_close(model.get_weights(), by_core(8, lr=lambda k: 0.01 if k < 4 else 0.005))
    plateau = keras.callbacks.ReduceLROnPlateau(monitor="loss", min_delta=10.0, patience=1, factor=0.5)
    stop = keras.callbacks.EarlyStopping(monitor="loss", min_delta=10.0, patience=2, restore_best_weights=True)
    history = train(model, epochs=9, callbacks=[plateau, stop])
    assert len(history["loss"]) == 3
    assert float(ops.convert_to_numpy(model.optimizer.learning_rate)) == pytest.approx(0.005 / 4)


@pytest.mark.parametrize("wrapped", [False, pytest.param(True, marks=slow)])
def test_the_logger(wrapped: bool) -> None:
    model = network()
    optimizer = Ada2MS(0.01, adaptivity=core.Linear(1.0, 0.0, steps=16), epsilon=0.5)
    scaled = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=1.0)
    model.compile(optimizer=scaled if wrapped else optimizer, loss="mse")
    history = train(model, callbacks=[Ada2MSLogger()])
    assert history["adaptivity"] == pytest.approx([0.75, 0.5])
    squares = [np.array(ops.convert_to_numpy(v)) for v in optimizer._velocities]
    s_hat = sum(v.sum() for v in squares) / sum(v.size for v in squares) / (1 - 0.999**8)  # s is the mean of v
    assert history["global_velocity"][-1] == pytest.approx(s_hat, rel=1e-4)
    assert history["effective_step"][-1] == pytest.approx(0.01 / (s_hat**0.5 + 0.5), rel=1e-4)


def test_the_logger_of_tensors_and_of_another_optimizer() -> None:
    model = fitted(Ada2MS(scope="tensor"))
    assert all(np.isfinite(train(model, callbacks=[Ada2MSLogger()])["effective_step"]))
    model.compile(optimizer="sgd", loss="mse")
    with pytest.raises(TypeError, match="not <"):
        train(model, callbacks=[Ada2MSLogger()])


# Saving


COPIES = {"pickled": lambda model: pickle.loads(pickle.dumps(model)), "copied": copy.deepcopy}


@pytest.mark.parametrize(
    ("scope", "how"),
    [
        ("model", "keras"),
        *(pytest.param(*x, marks=slow) for x in (("tensor", "keras"), *(("model", c) for c in COPIES))),
    ],
)
def test_a_saved_model_continues_exactly(scope: Any, how: str, tmp_path: Any) -> None:
    optimizer = Ada2MS(0.01, adaptivity=core.Linear(1.0, 0.0, steps=12), scope=scope, nonfinite="skip")
    model = fitted(optimizer, epochs=1)
    if how in COPIES:
        loaded = COPIES[how](model)
    else:
        model.save(tmp_path / f"model.{how}")
        loaded = keras.saving.load_model(tmp_path / f"model.{how}")
    assert isinstance(loaded.optimizer, Ada2MS)
    assert loaded.optimizer.get_config() == optimizer.get_config()
    assert_equal(state(loaded), state(model))
    train(model)
    train(loaded)
    assert_equal(state(loaded), state(model))


@slow
def test_16_bit_models_keep_their_state(tmp_path: Any) -> None:
    model = fitted(Ada2MS(0.01), "bfloat16", epochs=1)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    train(model)
    train(loaded)
    assert_equal(state(loaded), state(model))


@slow
def test_weights_alone(tmp_path: Any) -> None:
    model = fitted(Ada2MS(0.01), epochs=1)
    model.save_weights(tmp_path / "model.weights.h5")
    other = fitted(Ada2MS(0.01), epochs=2)
    other.load_weights(tmp_path / "model.weights.h5")
    assert_equal(state(other), state(model))


def test_what_adamw_saved_is_not_taken_for_this(tmp_path: Any) -> None:
    """Keras says so, and the weights of the model are loaded all the same. `import_state` takes AdamW's state over."""
    adamw = fitted(keras.optimizers.AdamW(0.01), epochs=1)
    adamw.save_weights(tmp_path / "model.weights.h5")
    model = fitted(Ada2MS(0.01), epochs=1)
    before = state(model)[4:]
    with pytest.warns(UserWarning, match="Skipping variable loading for optimizer 'ada2"):
        model.load_weights(tmp_path / "model.weights.h5")
    assert_equal(model.get_weights(), adamw.get_weights())
    assert_equal(state(model)[4:], before)


@slow
def test_an_interrupted_fit_is_taken_up(tmp_path: Any) -> None:
    class Interruption(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            if epoch == 1:
                raise KeyboardInterrupt

    whole = fitted(Ada2MS(0.01), epochs=3)
    model = network()
    model.compile(optimizer=Ada2MS(0.01), loss="mse")
    with pytest.raises(KeyboardInterrupt):
        train(model, 3, callbacks=[keras.callbacks.BackupAndRestore(tmp_path / "backup"), Interruption()])
    again = network()
    again.compile(optimizer=Ada2MS(0.01), loss="mse")
    train(again, 3, callbacks=[keras.callbacks.BackupAndRestore(tmp_path / "backup")])
    assert_equal(state(again), state(whole))
