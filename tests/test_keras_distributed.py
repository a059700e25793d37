"""The Keras optimizer on several devices, by TensorFlow's and Keras' own engines, each in processes of its own.

Every case trains a small text classifier on one device and on several, and fails unless the weights agree and the
copies of all variables on the devices are identical. By hand: `python tests/test_keras_distributed.py mirrored`.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.slow

BATCH, STEPS, TOKENS = 16, 6, 11
# Sums over devices are taken in another order: a rounding of the gradients in each step, which an update passes on
# relative to the learning rate 0.01; entries whose gradients nearly cancel pass on more of it.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"scope": "tensor", "adaptivity": 0.0},
    {"nonfinite": "skip", "adaptivity": 0.25},
    {"clipnorm": 0.5, "weight_decay": 0.1},
    {"global_clipnorm": 0.25},  # which Keras takes of each device apart, and the rule of all gradients together
]
CASES = {"mirrored": "tensorflow", "custom_loop": "tensorflow", "data_parallel": "jax", "model_parallel": "jax"}


def data() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    x = rng.integers(0, TOKENS, (BATCH * STEPS, 5)).astype("int32")  # few tokens: rows of the Embedding repeat
    return x, (x.sum(1, keepdims=True) % 2).astype("float32")


def compiled(options: dict[str, Any]) -> Any:
    import keras

    from ada2ms.tf import Ada2MS

    layers = [keras.layers.Embedding(TOKENS, 4), keras.layers.Flatten(), keras.layers.Dense(8, "tanh")]
    model = keras.Sequential([keras.Input((5,), dtype="int32"), *layers, keras.layers.Dense(1)])
    rng = np.random.default_rng(1)
    model.set_weights([rng.normal(size=w.shape).astype("float32") / 2 for w in model.weights])
    model.compile(optimizer=Ada2MS(0.01, **options), loss="mse")
    return model


def fitted(options: dict[str, Any]) -> Any:
    model = compiled(options)
    model.fit(*data(), batch_size=BATCH, epochs=1, shuffle=False, verbose=0)
    return model


def state(model: Any) -> list[Any]:
    import keras

    return [np.array(keras.ops.convert_to_numpy(v)) for v in [*model.variables, *model.optimizer.variables]]


def assert_same(left: list[Any], right: list[Any]) -> None:
    assert len(left) == len(right)
    for x, y in zip(left, right, strict=True):
        np.testing.assert_allclose(x, y, **CLOSE)


def assert_identical_copies(model: Any) -> None:
    copies = 0
    for v in [*model.trainable_variables, *model.optimizer.variables]:
        values = [np.array(x) for x in v.value.values]
        copies += len(values)
        for x in values[1:]:
            np.testing.assert_array_equal(x, values[0], err_msg=v.path)
    assert copies == 2 * (len(model.trainable_variables) + len(model.optimizer.variables))


def assert_identical_shards(model: Any) -> None:
    """Of JAX' arrays: devices that hold the same part of a variable hold the same numbers."""
    for v in [*model.trainable_variables, *model.optimizer.variables]:
        shards = v.value.addressable_shards
        assert len(shards) == 4
        parts: dict[str, Any] = {}
        for shard in shards:
            x = np.asarray(shard.data)
            np.testing.assert_array_equal(x, parts.setdefault(str(shard.index), x), err_msg=v.path)


def two_tensorflow_devices() -> Any:
    import tensorflow as tf

    two = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], two)
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def mirrored() -> None:
    strategy = two_tensorflow_devices()
    for options in OPTIONS:
        with strategy.scope():
            model = compiled(options)
        model.fit(*data(), batch_size=BATCH, epochs=1, shuffle=False, verbose=0)
        assert_identical_copies(model)
        if "clipnorm" not in options:  # Keras clips each device's gradients apart, before they are summed
            assert_same(state(model), state(fitted(options)))


def replicas(strategy: Any, values: list[Any]) -> Any:
    """A value for each device."""
    return strategy.experimental_distribute_values_from_function(lambda c: values[c.replica_id_in_sync_group])


def training_step(strategy: Any, model: Any) -> Any:
    """A custom training step, of gradients that add up over devices to those of the whole batch."""
    import tensorflow as tf

    with strategy.scope():
        model.optimizer.build(model.trainable_variables)  # within tf.function, no Keras optimizer can be built

    def replica(x: Any, y: Any) -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum((model(x, training=True) - y) ** 2) / BATCH
        weights = model.trainable_variables
        model.optimizer.apply(tape.gradient(loss, weights), weights)

    return tf.function(lambda x, y: strategy.run(replica, args=(x, y)))


def custom_loop() -> None:
    import tensorflow as tf

    strategy = two_tensorflow_devices()
    x, y = (tf.constant(a) for a in data())
    for options in (*OPTIONS[:3], OPTIONS[-1]):
        with strategy.scope():
            model = compiled(options)
        train = training_step(strategy, model)
        for i in range(0, BATCH * STEPS, BATCH):
            train(*(replicas(strategy, tf.split(a[i : i + BATCH], 2)) for a in (x, y)))
        assert_identical_copies(model)
        assert_same(state(model), state(fitted(options)))
        if "nonfinite" in options:  # one device's NaN is everybody's, and nobody moves
            before = model.get_weights()
            train(replicas(strategy, [x[:8], x[8:16]]), replicas(strategy, [y[:8], y[8:16] * np.float32(np.nan)]))
            assert_identical_copies(model)
            for w, old in zip(model.get_weights(), before, strict=True):
                np.testing.assert_array_equal(w, old)


def data_parallel() -> None:
    import keras

    for options in OPTIONS:
        one = state(fitted(options))
        keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=False))
        model = fitted(options)
        keras.distribution.set_distribution(None)
        assert_identical_shards(model)
        assert_same(state(model), one)


def model_parallel() -> None:
    import keras

    mesh = keras.distribution.DeviceMesh((2, 2), ["batch", "model"])
    layout = keras.distribution.LayoutMap(mesh)
    layout[".*embeddings"] = (None, "model")
    layout[".*dense.*kernel"] = ("model", None)
    for options in OPTIONS:
        one = state(fitted(options))
        keras.distribution.set_distribution(
            keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch", auto_shard_dataset=False)
        )
        model = fitted(options)
        keras.distribution.set_distribution(None)
        kernel, slot = model.layers[0].embeddings, model.optimizer._momentums[0]
        assert kernel.value.sharding.shard_shape(kernel.shape) == (TOKENS, 2)
        assert slot.value.sharding.shard_shape(slot.shape) == (TOKENS, 2)
        assert_identical_shards(model)
        assert_same(state(model), one)


def worker() -> None:
    """One of the processes of MultiWorkerMirroredStrategy; writes its state where it is told."""
    import tensorflow as tf

    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    with strategy.scope():
        model = compiled({})
    train = training_step(strategy, model)
    rank = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    x, y = (tf.constant(a) for a in data())
    for i in range(0, BATCH * STEPS, BATCH):
        train(*(tf.split(a[i : i + BATCH], 2)[rank] for a in (x, y)))
    np.savez(os.environ["STATE"], *state(model))


def one() -> None:
    """What several must equal."""
    np.savez(os.environ["STATE"], *state(fitted({})))


def environment(backend: str) -> dict[str, str]:
    return {
        **os.environ,
        "KERAS_BACKEND": backend,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }


@pytest.mark.parametrize("case", CASES)
def test_several_devices_equal_one(case: str) -> None:
    command = [sys.executable, __file__, case]
    done = subprocess.run(command, env=environment(CASES[case]), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.endswith(f"{case}: the same\n")


def test_several_workers_equal_one(tmp_path: Path) -> None:
    sockets = [socket.create_server(("localhost", 0)) for _ in range(2)]
    addresses = [f"localhost:{s.getsockname()[1]}" for s in sockets]
    for s in sockets:
        s.close()
    processes = []
    for name in ("0", "1", "one"):
        own = {"STATE": str(tmp_path / f"{name}.npz")}
        if name != "one":
            task = {"type": "worker", "index": int(name)}
            own["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": task})
        command = [sys.executable, __file__, "one" if name == "one" else "worker"]
        environ = environment("tensorflow") | own
        processes.append(subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True))
    try:
        for process in processes:
            _, errors = process.communicate(timeout=250)
            assert process.returncode == 0, errors[-4000:]
    finally:
        for process in processes:
            process.kill()
    first, second, single = ([*np.load(tmp_path / f"{name}.npz").values()] for name in ("0", "1", "one"))
    for x, y in zip(first, second, strict=True):
        np.testing.assert_array_equal(x, y)
    assert_same(first, single)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    print(f"{sys.argv[1]}: the same")
