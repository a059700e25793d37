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
from keras_support import BACKEND, apply, arrays, assert_close, by_core, numpy, small, state, variables

from ada2ms import core
from ada2ms.core import State
from ada2ms.tf import Ada2MS, export_state, import_state

pytestmark = [
    pytest.mark.keras,
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
        (subject, options, situation)
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
    assert [note.partition("'")[2].partition("'")[0] for note in state.notes] == unknown

    other = SITUATIONS[situation](subject(0.0625))
    report = import_state(other, other.optimizer, state, names=lambda path: path.removeprefix("net/"))
    assert report.notes == state.notes * 2
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
