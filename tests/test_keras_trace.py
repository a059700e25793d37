"""Traces of Keras, on the backend of this process: in `fit` and in loops of one's own, with any optimizer."""

import math
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

from ada2ms.core import Group, Linear
from ada2ms.core.trace import Trace, TraceError, native
from ada2ms.core.trace.model import fingerprint
from ada2ms.core.trace.sketch import resolution, sketch
from ada2ms.tf import Ada2MS, Recorder, plain_layers
from support import slow

pytestmark = pytest.mark.keras

STEPS = 4
X = np.random.default_rng(1).normal(size=(8 * STEPS, 5)).astype(np.float32)
Y = np.random.default_rng(2).normal(size=(8 * STEPS, 2)).astype(np.float32)


def network() -> keras.Model:
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((5,)), keras.layers.Dense(6, "tanh"), keras.layers.Dense(2)])


OPTIMIZERS: dict[str, Any] = {
    "AdamW": lambda: keras.optimizers.AdamW(0.01),
    "SGD": lambda: keras.optimizers.SGD(0.01, momentum=0.9),
    "Ada2MS": lambda: Ada2MS(0.01, adaptivity=0.5),
}


class Witness(keras.callbacks.Callback):  # type: ignore[misc]
    """Values after each step of a run without a recorder."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[list[Any]] = []

    def on_train_begin(self, logs: Any = None) -> None:
        self.on_train_batch_end(-1)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        variables = getattr(self.model, "trainable_variables", [])
        if keras.backend.backend() == "jax" and batch >= 0:
            self.model.jax_state_sync()
        self.values.append([np.array(ops.convert_to_numpy(v)) for v in variables])


@pytest.mark.parametrize("name", ["Ada2MS", *slow("AdamW", "SGD")])
def test_fit_is_recorded(name: str, tmp_path: Path) -> None:
    """Values and updates are those of a run without; losses and batches those that were fed."""
    model = network()
    model.compile(optimizer=OPTIMIZERS[name](), loss="mse", run_eagerly=True)
    witness = Witness()
    model.fit(X, Y, batch_size=8, shuffle=False, verbose=0, callbacks=[witness])

    model = network()
    model.compile(optimizer=OPTIMIZERS[name](), loss="mse", run_eagerly=True)
    own = set(vars(model.optimizer))
    with Recorder(tmp_path / "run", model, full=2, flush=3, **plain_layers(model)) as recorder:
        model.fit(X, Y, batch_size=8, shuffle=False, verbose=0, callbacks=[recorder])
    assert "apply" not in vars(model.optimizer)
    assert "compute_loss" not in vars(model)
    assert set(vars(model.optimizer)) >= own
    for v, value in zip(model.trainable_variables, witness.values[-1], strict=True):
        assert np.array_equal(ops.convert_to_numpy(v), value)
    trace = Trace.load(tmp_path / "run")
    assert trace.complete
    assert [p.name for p in trace.parameters] == ["0.dense.kernel", "0.dense.bias", "1.dense.kernel", "1.dense.bias"]
    assert trace.about["optimizer"].endswith(name)
    assert [step.number for step in trace.steps] == [1, 2, 3, 4]
    model = network()
    for i, step in enumerate(trace.steps):
        for k, (before, after) in enumerate(zip(witness.values[i], witness.values[i + 1], strict=True)):
            assert close(step.sketches["value"][k], sketch(before))
            assert close(step.sketches["update"][k], sketch(after - before))
            if i < 2:
                assert np.array_equal(step.full["update"][trace.parameters[k].name], after - before)
        x, y = X[8 * i : 8 * i + 8], Y[8 * i : 8 * i + 8]
        assert step.batches == [[fingerprint(x), fingerprint(y)]]
        for v, value in zip(model.trainable_variables, witness.values[i], strict=True):
            v.assign(value)
        assert step.loss == pytest.approx(float(np.mean((ops.convert_to_numpy(model(x)) - y) ** 2)), rel=1e-5)
        assert step.hyper[0]["lr"] == pytest.approx(0.01)
        last = ops.convert_to_numpy(model(x)) - y  # the gradient of the last bias, by hand
        assert np.allclose(step.sketches["gradient"][3], sketch(last.sum(0) * 2 / y.size), rtol=1e-4, atol=1e-6)


def test_an_optimizer_with_several_counts_is_recorded(tmp_path: Path) -> None:
    """Groups that differ in b2 have counts of their own; the hyperparameters are the optimizer's own."""
    model = network()
    adaptivity = Linear(1.0, 0.0, steps=STEPS)
    optimizer = Ada2MS(0.01, adaptivity=adaptivity, groups=[Group("kernel", b2=0.9)], global_clipnorm=1.0)
    model.compile(optimizer=optimizer, loss="mse", run_eagerly=True)
    with Recorder(tmp_path / "run", model, **plain_layers(model)) as recorder:
        model.fit(X, Y, batch_size=8, shuffle=False, verbose=0, callbacks=[recorder])
    assert [step.hyper[0]["adaptivity"] for step in Trace.load(tmp_path / "run").steps] == [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("how", ["clipnorm", "global_clipnorm", "clipvalue"])
def test_gradients_are_recorded_as_the_optimizer_clips_them(how: str, tmp_path: Path) -> None:
    """So SGD at a rate of 1 moves by them; and a port that clips before its optimizer has the same gradients."""
    gradients = {}
    for bound in (1e-2, 1e6):
        model = network()
        model.compile(optimizer=keras.optimizers.SGD(1.0, **{how: bound}), loss="mse", run_eagerly=True)
        with Recorder(tmp_path / "run", model, **plain_layers(model)) as recorder:
            model.fit(X[:8], Y[:8], batch_size=8, verbose=0, callbacks=[recorder])
        found = Trace.load(tmp_path / "run").steps[0].full
        for name, gradient in found["gradient"].items():
            assert np.allclose(found["update"][name], -gradient, rtol=1e-3, atol=2e-7)
        gradients[bound] = found["gradient"]
    for name, gradient in gradients[1e-2].items():
        assert np.abs(gradient).max() < np.abs(gradients[1e6][name]).max()


def close(actual: Any, expected: Any) -> bool:
    return bool(np.abs(actual - expected).max() <= 2 * resolution("float32") * expected[0])


def test_a_loop_of_ones_own_is_recorded_with_what_is_accumulated_and_missing(tmp_path: Path) -> None:
    model = network()
    optimizer = keras.optimizers.SGD(0.5, gradient_accumulation_steps=2)
    optimizer.build(model.trainable_variables)
    grads = [[np.full(v.shape, i + 1.0, np.float32) for v in model.trainable_variables] for i in range(4)]
    with Recorder(tmp_path / "run", model, optimizer) as recorder:
        for i, each in enumerate(grads):
            recorder.batch(X[i])
            recorder.loss(float(i))
            optimizer.apply([ops.convert_to_tensor(g) for g in each], model.trainable_variables)
    trace = Trace.load(tmp_path / "run")
    assert [step.loss for step in trace.steps] == [0.5, 2.5]
    assert [len(step.batches) for step in trace.steps] == [2, 2]
    for step, mean in zip(trace.steps, (1.5, 3.5), strict=True):
        for k, v in enumerate(model.trainable_variables):
            assert close(step.sketches["gradient"][k], sketch(np.full(v.shape, mean, np.float32)))
            assert step.sketches["update"][k][0] == pytest.approx(0.5 * mean * np.sqrt(np.prod(v.shape)), rel=1e-4)


def test_a_loss_scale_is_taken_out(tmp_path: Path) -> None:
    model = network()
    inner = keras.optimizers.SGD(1.0)
    optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=4.0)
    optimizer.build(model.trainable_variables)
    with Recorder(tmp_path / "run", model, optimizer):
        if keras.backend.backend() == "jax":
            with pytest.raises(TraceError, match="LossScaleOptimizer on JAX"):
                optimizer.apply([ops.ones(v.shape) * 4.0 for v in model.trainable_variables])
            return
        optimizer.apply([ops.ones(v.shape) * 4.0 for v in model.trainable_variables])
    trace = Trace.load(tmp_path / "run")
    assert close(trace.steps[0].sketches["gradient"][0], sketch(np.ones((5, 6), np.float32)))


def test_what_cannot_be_recorded_is_said(tmp_path: Path) -> None:
    model = network()
    with pytest.raises(TraceError, match="has no optimizer"):
        Recorder(tmp_path / "run", model)
    model.compile(optimizer="sgd", loss="mse", run_eagerly=keras.backend.backend() == "torch")
    with pytest.raises(TraceError, match="no parameter 'x'"):
        Recorder(tmp_path / "run", model, names={"x": "y"})
    with Recorder(tmp_path / "run", model) as recorder:
        if keras.backend.backend() == "torch":
            model.fit(X, Y, verbose=0, callbacks=[recorder])
        else:
            with pytest.raises(TraceError, match=r"run_eagerly=True"):
                model.fit(X, Y, verbose=0, callbacks=[recorder])


def test_each_group_has_its_own_hyperparameters(tmp_path: Path) -> None:
    """Groups of Ada2MS, what decays in no optimizer, and factors of the learning rate."""
    groups = [Group("dense_head", lr_scale=0.5, b1=0.5)]
    made = {"Ada2MS": Ada2MS(0.25, weight_decay=0.125, groups=groups), "AdamW": keras.optimizers.AdamW(0.25)}
    found = {}
    for name, optimizer in made.items():
        keras.utils.set_random_seed(0)
        layers = [keras.Input((5,)), keras.layers.Dense(3), keras.layers.Dense(2, name="dense_head")]
        model = keras.Sequential(layers)
        optimizer.exclude_from_weight_decay(var_names=["bias"])
        model.compile(optimizer, loss="mse", run_eagerly=True)
        with Recorder(tmp_path / name, model) as recorder:
            model.fit(X[:8], Y[:8], batch_size=8, verbose=0, callbacks=[recorder])
        trace = Trace.load(tmp_path / name)
        found[name] = [trace.steps[0].hyper[p.group] for p in trace.parameters]
    told = [(h["lr"], h["b1"], h["weight_decay"]) for h in found["Ada2MS"]]
    assert told == [(0.25, 0.9, 0.125), (0.25, 0.9, 0.0), (0.125, 0.5, 0.125), (0.125, 0.5, 0.0)]
    assert [h["weight_decay"] for h in found["AdamW"]] == [0.004, 0.0, 0.004, 0.0]


def test_a_run_that_took_no_step_leaves_a_trace_of_none(tmp_path: Path) -> None:
    model = network()
    with Recorder(tmp_path / "run", model, keras.optimizers.SGD()):
        pass
    trace = Trace.load(tmp_path / "run")
    assert (len(trace.parameters), trace.steps, trace.complete) == (4, [], True)


def test_running_statistics_are_recorded_and_neither_seeds_nor_frozen_weights(tmp_path: Path) -> None:
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(6, trainable=False), keras.layers.BatchNormalization(momentum=0.5)]
    model = keras.Sequential([keras.Input((5,)), *layers, keras.layers.Dropout(0.5), keras.layers.Dense(2)])
    model.compile("sgd", "mse", run_eagerly=True)
    layers[1].moving_mean.assign(np.full(6, 0.5, np.float32))
    kernel, bias = (np.array(ops.convert_to_numpy(v)) for v in layers[0].variables)
    with Recorder(tmp_path / "run", model, full=1, **plain_layers(model)) as recorder:
        model.fit(X, Y, batch_size=8, shuffle=False, verbose=0, callbacks=[recorder])
    trace = Trace.load(tmp_path / "run")
    assert trace.statistics is not None
    assert trace.start is not None
    assert [(p.name, p.shape) for p in trace.statistics] == [("1.norm.mean", (6,)), ("1.norm.var", (6,))]
    mean, var = np.full(6, 0.5), np.ones(6)
    for step in [trace.start, *trace.steps]:
        if step.number:
            batch = X[8 * (step.number - 1) : 8 * step.number] @ kernel + bias
            mean, var = 0.5 * mean + 0.5 * batch.mean(0), 0.5 * var + 0.5 * batch.var(0)
        for row, x in zip(step.sketches["statistics"], (mean, var), strict=True):
            assert np.abs(row - sketch(x)).max() <= 1e-5 * np.linalg.norm(x)
        assert ("statistics" in step.full) == (step.number <= 1)
    assert np.abs(mean - 0.5).max() > 0.1, "they move"
    assert np.allclose(mean, ops.convert_to_numpy(layers[1].moving_mean), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("full", [1, 0])
def test_a_large_model_is_summed_in_cpp_where_it_is(full: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a small one is, to the resolution, the update by what was added to values; copied only for entries."""
    if native.compiled() is None:
        pytest.skip("there is no compiler of C++")

    def run(path: Path, entries: float) -> Trace:
        monkeypatch.setattr(native, "ENTRIES", entries)
        keras.utils.set_random_seed(0)
        model, optimizer = network(), keras.optimizers.SGD(0.1)
        variables = model.trainable_variables
        with Recorder(path, model, optimizer, full=full) as recorder:
            for i in range(3):
                optimizer.apply([ops.full(v.shape, i + 1.0) for v in variables], variables)
        assert len(recorder.parameters) > 1
        return Trace.load(path)

    for x, y in zip(*(run(tmp_path / f"{n}", n).steps for n in (0, math.inf)), strict=True):
        is_exact = x.number <= full
        for what in ("value", "gradient", "update"):
            size = y.sketches[what][:, :1] + (y.sketches["value"][:, :1] if what == "update" else 0)
            d = np.abs(x.sketches[what] - y.sketches[what])[:, 0 if is_exact or what != "update" else 1 :]
            assert np.all(d <= 4 * resolution("float32") * size), what
        assert sorted(x.full) == sorted(y.full) == (["gradient", "update", "value"] if is_exact else [])
