"""`measure` in Keras, on each of its backends: against the rule in NumPy, and what a step has changed."""

from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from keras_support import BACKEND
from measurements_support import EVERY_RUN, EVERY_RUN_COMPILED, RUNS, Run, compare

from ada2ms import core
from ada2ms.core.hyperparameters import to_arguments
from ada2ms.core.measurements import OF_MODEL, PREFIX, RATIOS
from ada2ms.tf import Ada2MS, Ada2MSLogger, measure
from support import settings

pytestmark = [pytest.mark.keras, pytest.mark.filterwarnings("ignore:Gradients do not exist for variables")]


def trained(run: Run) -> tuple[list[Any], Ada2MS]:
    hyper = run.hyper
    if callable(hyper["lr"]):
        rate = hyper["lr"]
        hyper["lr"] = keras.optimizers.schedules.PolynomialDecay(rate.start, rate.steps, rate.end)
    given = to_arguments({**vars(core.DEFAULTS), "max_norm": np.inf, **hyper}, "keras")
    optimizer = Ada2MS(**given, groups=run.groups)
    variables = [keras.Variable(p, dtype="float64", name=name) for name, p in run.params().items()]
    for gradients in run.gradients():
        optimizer.apply([None if g is None else ops.convert_to_tensor(g) for g in gradients.values()], variables)
    return variables, optimizer


@(EVERY_RUN_COMPILED if BACKEND == "jax" else EVERY_RUN)
def test_it_is_what_the_rule_did(name: str) -> None:
    with settings("keras", "float64", "cpu"):
        variables, optimizer = trained(RUNS[name])
        measured = measure(optimizer, variables, wait=True)
        assert {n: float(ops.convert_to_numpy(x)) for n, x in measure(optimizer).items()} == {
            PREFIX + n: measured[PREFIX + n] for n in OF_MODEL
        }
    # Keras computes float64 partly in float32 but on TensorFlow.
    compare(measured, RUNS[name], 1e-9 if BACKEND == "tensorflow" else 1e-5)


def model() -> Any:
    net = keras.Sequential([keras.layers.Dense(3, name="first"), keras.layers.Dense(1, name="last")])
    net.build((None, 2))
    return net


def fit(net: Any, *callbacks: Any) -> dict[str, list[float]]:
    x = np.random.default_rng(0).normal(size=(16, 2)).astype("float32")
    history = net.fit(x, x[:, :1], batch_size=8, epochs=2, shuffle=False, verbose=0, callbacks=[*callbacks])
    found: dict[str, list[float]] = history.history
    return found


def test_the_logger_has_them_if_asked() -> None:
    net = model()
    inner = Ada2MS(0.01, compensated=True)
    net.compile(optimizer=keras.optimizers.LossScaleOptimizer(inner, initial_scale=2.0), loss="mse")
    found = fit(net, Ada2MSLogger(layers="kernel$"))
    paths = [v.path for v in net.trainable_variables if v.path.endswith("kernel")]
    assert [n for n in found if n.startswith(PREFIX + RATIOS)] == [f"{PREFIX}{RATIOS}/{path}" for path in paths]
    assert found[PREFIX + "updates"] == [2.0, 4.0]
    last = measure(net.optimizer, net, match="kernel$", wait=True)
    assert {n: x[-1] for n, x in found.items() if n.startswith(PREFIX)} == last
    assert found["global_velocity"] == pytest.approx(found[PREFIX + "global_second_moment"], rel=1e-6)
    assert found["effective_step"] == pytest.approx(found[PREFIX + "effective_step"], rel=1e-6)


def test_the_logger_without_is_as_it_was() -> None:
    net = model()
    net.compile(optimizer=Ada2MS(0.01), loss="mse")
    assert [*fit(net, Ada2MSLogger())] == ["loss", "adaptivity", "global_velocity", "effective_step"]


def test_before_the_first_update() -> None:
    net, optimizer = model(), Ada2MS(0.01, adaptivity=core.Linear(1.0, 0.0, 10))
    for built in (False, True):
        if built:
            optimizer.build(net.trainable_variables)
        found = measure(optimizer, net, wait=True)
        known = {n.removeprefix(PREFIX): x for n, x in found.items() if x == x}
        assert known == pytest.approx({"updates": 0.0, "skipped": 0.0, "lr": 0.01, "adaptivity": 1.0})
        assert len(found) == len(OF_MODEL) - 1 + 2 * 4


def test_errors_name_the_argument() -> None:
    net, optimizer = model(), Ada2MS(0.01)
    optimizer.build(net.trainable_variables)
    with pytest.raises(TypeError, match="Invalid optimizer: of type AdamW"):
        measure(keras.optimizers.AdamW())
    with pytest.raises(ValueError, match="Invalid model: it has no variable of the optimizer"):
        measure(optimizer, model())
    with pytest.raises(ValueError, match="Invalid match: 'weight'"):
        measure(optimizer, net, match="weight")
    with pytest.raises(TypeError, match="Invalid layers: 3"):
        Ada2MSLogger(layers=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Invalid layers: '\(' \(layers must be a regular expression"):
        Ada2MSLogger(layers="(")
    net.compile(optimizer=optimizer, loss="mse")
    epochs: list[int] = []
    counting = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: epochs.append(epoch))
    with pytest.raises(ValueError, match="Invalid layers: 'weight'"):
        fit(net, Ada2MSLogger(layers="weight"), counting)
    assert not epochs
