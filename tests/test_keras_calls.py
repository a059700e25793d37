"""Calls, resets and types that Keras' optimizers meet, beside keras.optimizers.AdamW where it has an answer."""

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops
from keras_support import BACKEND, apply, arrays, assert_close, by_core, numpy, small, state, variables

from ada2ms import core
from ada2ms.tf import Ada2MS, export_state, import_state

pytestmark = pytest.mark.keras
SUBJECTS = pytest.mark.parametrize("subject", [keras.optimizers.AdamW, Ada2MS])
X = np.random.default_rng(0).normal(size=(16, 6)).astype("float32")
Y = np.sin(X[:, :1])


def network() -> Any:
    keras.utils.set_random_seed(0)
    inner = [layers.Dense(4, "tanh"), layers.Dense(3, "tanh")]
    return keras.Sequential([keras.Input((6,)), *inner, layers.Dense(1)])


def compiled(model: Any, optimizer: Any) -> Any:
    model.compile(optimizer, "mse", run_eagerly=True)
    for i in (0, 4, 8, 12):
        model.train_on_batch(X[i : i + 4], Y[i : i + 4])
    return model


# In the optimizer's own calls


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("order", [(2, 0, 1), (1, 0), (2,)])
def test_gradients_come_in_any_order(scope: Any, order: tuple[int, ...]) -> None:
    values, rows = arrays(0)[:3], [arrays(i)[:3] for i in (1, 2, 3)]
    targets, optimizer = variables(values), Ada2MS(0.1, scope=scope)
    optimizer.build(targets)
    for row in rows:
        apply(optimizer, [row[i] for i in order], [targets[i] for i in order])
    given = [[g if i in order else None for i, g in enumerate(row)] for row in rows]
    assert_close([numpy(v) for v in targets], by_core(values, given, lr=0.1, scope=scope))


def test_a_variable_given_twice_is_updated_twice() -> None:
    """One after the other, of one count, as by AdamW on TensorFlow and JAX."""
    values, rows = arrays(0)[:2], [arrays(i)[:2] for i in (1, 2, 3)]
    targets, optimizer = variables(values), Ada2MS(0.1, adaptivity=1.0, weight_decay=0.0, epsilon=1e-30)
    optimizer.build(targets)
    for g, h in rows:
        apply(optimizer, [g, h, -2 * g], [*targets, targets[0]])
    theta, m, v = values[0].astype("float64"), 0.0, 0.0
    for t, (g, _) in enumerate(rows, start=1):
        for x in (g.astype("float64"), -2.0 * g):
            m, v = 0.9 * m + 0.1 * x, 0.999 * v + 0.001 * x * x
            theta = theta - 0.1 * (m / (1 - 0.9**t)) / np.sqrt(v / (1 - 0.999**t))
    assert_close([numpy(targets[0])], [theta])


def test_the_mean_of_a_variable_given_twice_moves_once() -> None:
    """In scope "tensor"; by the mean of both."""
    found = []
    for given in ([0, 1], [0, 1, 0], [1, 0, 0]):
        targets, optimizer = variables(arrays(0)[:2]), Ada2MS(scope="tensor")
        optimizer.build(targets)
        for i in range(3):
            row = arrays(i + 1)
            apply(optimizer, [row[j] for j in given], [targets[j] for j in given])
        found.append(small(optimizer, "global_velocity"))
    assert_close(found[1:], found[:1] * 2, rtol=1e-6)


@SUBJECTS
def test_a_second_model_is_refused(subject: Any) -> None:
    first, second = network(), network()
    optimizer = subject(0.0625)
    compiled(first, optimizer)
    if BACKEND == "jax":  # where Keras takes variables by their order, and the state goes on
        compiled(second, optimizer)
        assert int(optimizer.iterations) == 8
        return
    with pytest.raises(ValueError, match="Unknown variable"):
        compiled(second, optimizer)


@SUBJECTS
def test_built_twice(subject: Any) -> None:
    """The second time nothing happens, whatever the variables."""
    targets, optimizer = variables(arrays(0)), subject(0.1)
    optimizer.build(targets)
    apply(optimizer, arrays(1), targets)
    before = state(optimizer)
    optimizer.build(targets)
    optimizer.build(targets[:1])
    for x, y in zip(before.values(), state(optimizer).values(), strict=True):
        np.testing.assert_array_equal(x, y)
    apply(optimizer, arrays(1), targets)


@SUBJECTS
def test_a_state_that_is_reset_by_hand(subject: Any) -> None:
    """All of it is in `variables`: from zeros it is as new."""
    found = []
    for calls in (0, 3):
        targets, optimizer = variables(arrays(0)), subject(0.1)
        optimizer.build(targets)
        for i in range(calls):
            apply(optimizer, arrays(i), targets)
        for v in optimizer.variables:
            if not v.path.endswith("learning_rate"):
                v.assign(np.zeros(v.shape))
        for v, x in zip(targets, arrays(0), strict=True):
            v.assign(x)
        apply(optimizer, arrays(7), targets)
        found.append([*map(numpy, targets), *state(optimizer).values()])
    for x, y in zip(*found, strict=True):
        np.testing.assert_array_equal(x, y)


def test_the_scope_is_fixed_once_it_has_a_state() -> None:
    optimizer = Ada2MS(0.1)
    optimizer.scope = "tensor"
    targets = variables(arrays(0))
    apply(optimizer, arrays(1), targets)
    optimizer.scope = "tensor"
    with pytest.raises(ValueError, match=r"scope: 'model' \(this optimizer is built"):
        optimizer.scope = "model"
    with pytest.raises(ValueError, match=r"Invalid scope: 'layer'"):
        optimizer.scope = "layer"  # type: ignore[assignment]
    assert optimizer.scope == "tensor"
    apply(optimizer, arrays(2), targets)
    assert_close([numpy(v) for v in targets], by_core(arrays(0), [arrays(1), arrays(2)], lr=0.1, scope="tensor"))


def test_what_is_done_with_bad_gradients_is_replaced() -> None:
    optimizer, targets = Ada2MS(0.1), variables(arrays(0))
    apply(optimizer, arrays(1), targets)
    optimizer.nonfinite = "skip"
    before = [numpy(v) for v in targets]
    apply(optimizer, [np.full_like(g, np.inf) for g in arrays(2)], targets)
    for v, x in zip(targets, before, strict=True):
        np.testing.assert_array_equal(numpy(v), x)
    with pytest.raises(ValueError, match="nonfinite"):
        optimizer.nonfinite = "Skip"  # type: ignore[assignment]
    assert optimizer.nonfinite == "skip"


# Types

FLOATX = ["float16", "bfloat16", *(["float64"] if BACKEND != "jax" else [])]  # of which JAX makes float32


@pytest.mark.parametrize("floatx", FLOATX)
@pytest.mark.parametrize("how", ["steps", "import", "weights"])
def test_counts_and_means_are_wide_under_any_floatx(floatx: str, how: str) -> None:
    """Past 256, where a bfloat16 stands still, and with a mean that no 16 bits hold."""
    keras.config.set_floatx(floatx)
    try:
        targets, optimizer = variables(arrays(0)), Ada2MS(0.125)
        optimizer.build(targets)
        mean = 0.1 + 2.0**-20
        if how == "weights":
            weights = [numpy(v) for v in optimizer.variables]
            names = [v.path.rpartition("/")[2] for v in optimizer.variables]
            for name, x in {
                "steps": np.full(4, 2049),
                "global_step": np.array(2049),
                "iteration": np.array(2049),
            }.items():
                weights[names.index(name)] = x
            weights[names.index("global_velocity")] = np.array(mean)
            optimizer.set_weights(weights)
        else:
            given = export_state(targets, optimizer)
            for entry in given.parameters.values():
                entry.step = 2049 if how == "import" else 2048
            given.groups[0].global_step = entry.step
            given.groups[0].global_exp_avg_sq = mean
            import_state(targets, optimizer, given)
        if how == "steps":
            apply(optimizer, [0 * g for g in arrays(1)], targets)
            mean *= 0.999
    finally:
        keras.config.set_floatx("float32")
    assert small(optimizer, "steps").tolist() == [2049] * 4
    assert (small(optimizer, "global_step"), small(optimizer, "iteration")) == (2049, 2049)
    assert small(optimizer, "global_velocity") == pytest.approx(mean, rel=1e-7)
    assert {str(numpy(v).dtype) for v in optimizer._velocities} == {"float32"}


@pytest.mark.parametrize("floatx", FLOATX)
def test_a_model_of_another_floatx_follows_the_rule(floatx: str) -> None:
    keras.config.set_floatx(floatx)
    try:
        value, rows = arrays(0)[0], [arrays(i)[0] for i in (1, 2, 3)]
        target = keras.Variable(value, dtype=floatx)
        optimizer = Ada2MS(0.125)
        for g in rows:
            optimizer.apply([ops.cast(ops.convert_to_tensor(g), floatx)], [target])
    finally:
        keras.config.set_floatx("float32")
    unit = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float64": 1e-12}[floatx]
    expected = by_core([value.astype("float64")], [[g.astype("float64")] for g in rows], lr=0.125)
    np.testing.assert_allclose(numpy(target), expected[0], rtol=4 * unit, atol=4 * unit)


@pytest.mark.skipif(BACKEND != "torch", reason="the types of variables change on torch alone, whose modules models are")
@pytest.mark.parametrize("calls", [0, 2])
@pytest.mark.parametrize("dtype", ["double", "half"])
def test_a_model_changes_its_type(calls: int, dtype: str) -> None:
    """As with AdamW: the state stays float32, and variables that are wider are not rounded to it."""
    found = []
    options: dict[str, Any] = {"epsilon": 1e-30, "weight_decay": 0.25}
    for optimizer in (keras.optimizers.AdamW(0.0625, **options), Ada2MS(0.0625, adaptivity=1.0, **options)):
        model = network()
        model.compile(optimizer, "mse", run_eagerly=True)
        for _ in range(calls):
            model.train_on_batch(X, Y)
        getattr(model, dtype)()
        before = [v.value.detach().double().numpy() for v in model.trainable_variables]
        for _ in range(2):
            model.train_on_batch(X, Y)
        after = [v.value.detach().double().numpy() for v in model.trainable_variables]
        assert {str(v.value.dtype) for v in model.trainable_variables} == {
            {"double": "torch.float64", "half": "torch.float16"}[dtype]
        }
        found.append([y - x for x, y in zip(before, after, strict=True)])
        narrow = all(np.array_equal(x, x.astype("float32")) for x in after)
        assert narrow == (dtype != "double")
    unit = {"double": 1e-6, "half": 2.0**-10}[dtype]
    assert_close(*found, rtol=1e-4, atol=2 * unit)


def test_schedules_and_counts_in_a_configuration_of_the_state() -> None:
    """A schedule of the adaptivity goes on from the count that is loaded, whichever way that came."""
    targets, optimizer = variables(arrays(0)), Ada2MS(0.1, adaptivity=core.Linear(1.0, 0.0, steps=8))
    for i in range(3):
        apply(optimizer, arrays(i), targets)
    other, copies = Ada2MS.from_config(optimizer.get_config()), variables([numpy(v) for v in targets])
    import_state(copies, other, export_state(targets, optimizer))
    for o, t in ((optimizer, targets), (other, copies)):
        apply(o, arrays(9), t)
    for v, w in zip(targets, copies, strict=True):
        np.testing.assert_array_equal(numpy(v), numpy(w))
