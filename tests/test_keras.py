"""The Keras optimizer, on the backend that KERAS_BACKEND names: arguments, state, what Keras does around the rule."""

import copy
import json
import pickle
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

from ada2ms import core
from ada2ms.core.hyperparameters import DEFAULTS
from ada2ms.tf import Ada2MS

pytestmark = pytest.mark.keras

BACKEND = keras.backend.backend()
SHAPES = ((3, 4), (4,), (), (0,))
# What separates two orders of the same float32 operations: a few roundings a step, of updates a tenth of the values.
CLOSE = {"rtol": 2e-6, "atol": 2e-7}
only_on_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="about TensorFlow alone")
needs_sparse_gradients = pytest.mark.skipif(BACKEND == "torch", reason="Keras has no sparse gradients on torch")


def arrays(seed: int, shapes: Any = SHAPES) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [np.asarray(rng.normal(size=shape), "float32") for shape in shapes]


def variables(values: list[Any], dtype: str = "float32") -> list[Any]:
    return [keras.Variable(x, dtype=dtype, name=f"v{i}") for i, x in enumerate(values)]


def numpy(x: Any) -> Any:
    return np.array(ops.convert_to_numpy(ops.cast(x, "float64" if "float64" in str(x.dtype) else "float32")))


def apply(optimizer: Any, gradients: list[Any], targets: list[Any]) -> None:
    dense = [ops.convert_to_tensor(g) if isinstance(g, np.ndarray) else g for g in gradients]
    optimizer.apply(dense, targets)


def state(optimizer: Any) -> dict[str, Any]:
    return {f"{i} {v.path}": numpy(v) for i, v in enumerate(optimizer.variables)}


def small(optimizer: Any, name: str) -> Any:
    return next(numpy(v) for v in optimizer.variables if v.path.endswith("/" + name))


def by_core(values: list[Any], rows: list[list[Any]], **hyper: Any) -> list[Any]:
    params = [x.copy() for x in values]
    optimizer = core.Ada2MS(params, **hyper)
    for row in rows:
        optimizer.step(row)
    return params


def by_keras(values: list[Any], rows: list[list[Any]], **arguments: Any) -> list[Any]:
    targets = variables(values)
    optimizer = Ada2MS(**arguments)
    for row in rows:
        apply(optimizer, row, targets)
    return [numpy(v) for v in targets]


def assert_close(left: list[Any], right: list[Any], **bound: float) -> None:
    for x, y in zip(left, right, strict=True):
        np.testing.assert_allclose(x, y, **(bound or CLOSE))


# Arguments


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *[("learning_rate", -1.0), ("beta_1", 1.0), ("beta_2", -0.1), ("epsilon", -1e-8), ("weight_decay", -0.1)],
        *[("adaptivity", 1.5), ("adaptivity", float("nan")), ("scope", "layer"), ("nonfinite", "ignore")],
    ],
)
def test_a_bad_value_is_named(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=argument) as error:
        Ada2MS(**{argument: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("argument", ["learning_rate", "beta_1", "epsilon", "weight_decay", "adaptivity"])
def test_a_value_of_the_wrong_kind_is_named(argument: str) -> None:
    with pytest.raises(TypeError, match=argument):
        Ada2MS(**{argument: "0.1"})


def test_an_unknown_argument_is_refused() -> None:
    with pytest.raises(ValueError, match="amsgrad"):
        Ada2MS(amsgrad=True)


def test_defaults_are_the_rules() -> None:
    config = Ada2MS().get_config()
    names = {"lr": "learning_rate", "b1": "beta_1", "b2": "beta_2", "eps": "epsilon"}
    for field, value in vars(DEFAULTS).items():
        assert config[names.get(field, field)] == pytest.approx(value, rel=1e-7)  # learning_rate is kept in float32
    assert (config["scope"], config["nonfinite"]) == ("model", "propagate")


def test_a_whole_number_is_a_learning_rate() -> None:
    assert Ada2MS(learning_rate=1).get_config()["learning_rate"] == 1.0


def test_keras_2_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    import ada2ms.tf

    monkeypatch.setattr(keras, "__version__", "2.15.0")
    spec = importlib.util.spec_from_file_location("ada2ms_on_keras_2", ada2ms.tf.__file__)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=r"needs Keras 3, not Keras 2\.15\.0"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


# The configuration, and what is restored from it


@keras.saving.register_keras_serializable(package="test_keras")
def halving(count: Any) -> Any:
    return 0.5 ** (count + 1)


ADAPTIVITIES = {
    "number": 0.3,
    "constant": core.Constant(0.3),
    "linear": core.Linear(1.0, 0.0, steps=4),
    "cosine": core.Cosine(1.0, 0.2, steps=4),
    "exponential": core.Exponential(0.0, 1.0, half_life=2.0),
    "keras schedule": keras.optimizers.schedules.PolynomialDecay(1.0, 4, 0.0),
    "function": halving,
}


@pytest.mark.parametrize("how", ["from_config", "saving"])
@pytest.mark.parametrize("kind", ADAPTIVITIES)
def test_the_configuration_is_kept(kind: str, how: str) -> None:
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 10)
    given = Ada2MS(
        schedule, 0.8, 0.9, 1e-6, 0.1, ADAPTIVITIES[kind], "tensor", "skip", clipnorm=1.0, name="mine", use_ema=True
    )
    if how == "from_config":
        config = given.get_config()
        before = copy.deepcopy(config)
        restored = Ada2MS.from_config(config)
        assert config["adaptivity"] == before["adaptivity"]
    else:
        data = json.loads(json.dumps(keras.saving.serialize_keras_object(given)))
        restored = keras.saving.deserialize_keras_object(data)
    assert isinstance(restored, Ada2MS)
    assert restored.get_config() == given.get_config()

    values, rows = arrays(0), [arrays(i) for i in (1, 2, 3)]
    finals = []
    for optimizer in (given, restored):
        targets = variables(values)
        for row in rows:
            apply(optimizer, row, targets)
        finals.append([numpy(v) for v in targets])
    for left, right in zip(*finals, strict=True):
        np.testing.assert_array_equal(left, right)


def test_by_name() -> None:
    assert isinstance(keras.optimizers.get("ada2ms"), Ada2MS)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(optimizer="ada2ms", loss="mse")
    assert isinstance(model.optimizer, Ada2MS)


def test_pickle() -> None:
    given = Ada2MS(0.01, adaptivity=core.Linear(1.0, 0.0, steps=4), scope="tensor")
    assert pickle.loads(pickle.dumps(given)).get_config() == given.get_config()


# The rule


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("kind", ADAPTIVITIES)
def test_follows_the_rule(kind: str, scope: str) -> None:
    values, rows = arrays(0), [arrays(i) for i in range(1, 6)]
    adaptivity: Any = ADAPTIVITIES[kind]
    if kind == "keras schedule":
        adaptivity = core.Linear(1.0, 0.0, steps=4)  # the same, by another
    expected = by_core(values, rows, lr=0.1, adaptivity=adaptivity, scope=scope)
    assert_close(by_keras(values, rows, learning_rate=0.1, adaptivity=ADAPTIVITIES[kind], scope=scope), expected)


def test_the_adaptivity_counts_completed_updates() -> None:
    counts: list[float] = []

    def record(count: Any) -> float:
        counts.append(float(count))
        return 0.5

    optimizer, targets = Ada2MS(adaptivity=record, nonfinite="skip"), variables(arrays(0))
    bad = [x * np.float32(np.nan) for x in arrays(1)]
    for row in (arrays(1), bad, arrays(2), arrays(3)):
        apply(optimizer, row, targets)
    assert counts == [0, 1, 1, 2]
    assert int(numpy(optimizer.iterations)) == 4
    assert small(optimizer, "global_step") == 3


def test_a_missing_gradient_leaves_its_variable_alone() -> None:
    values = arrays(0)
    rows = [[None if (i + j) % 3 == 0 else g for j, g in enumerate(arrays(i))] for i in range(1, 7)]
    targets, optimizer = variables(values), Ada2MS(0.1, weight_decay=0.1)
    for row in rows:
        before = [numpy(v) for v in targets]
        with pytest.warns(UserWarning, match="Gradients do not exist"):
            apply(optimizer, row, targets)
        for g, v, old in zip(row, targets, before, strict=True):
            assert g is not None or np.array_equal(numpy(v), old)
    assert_close([numpy(v) for v in targets], by_core(values, rows, lr=0.1, weight_decay=0.1))
    assert small(optimizer, "steps").tolist() == [4, 4, 4, 4]
    assert small(optimizer, "global_step") == 6


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_skipped_step_changes_nothing(scope: str, bad: float) -> None:
    values, (first, second) = arrays(0), (arrays(1), arrays(2))
    spoilt = [g.copy() for g in second]
    spoilt[0][1, 2] = bad
    targets = variables(values)
    optimizer = Ada2MS(0.1, weight_decay=0.5, scope=scope, nonfinite="skip")
    apply(optimizer, first, targets)
    before, weights = state(optimizer), [numpy(v) for v in targets]
    apply(optimizer, spoilt, targets)
    changed = {name.rpartition("/")[2] for name, x in state(optimizer).items() if not np.array_equal(x, before[name])}
    assert changed == {"iteration", "skipped"}
    assert small(optimizer, "skipped") == 1
    assert all(np.array_equal(numpy(v), x) for v, x in zip(targets, weights, strict=True))
    apply(optimizer, second, targets)
    expected = by_core(values, [first, second], lr=0.1, weight_decay=0.5, scope=scope)
    assert_close([numpy(v) for v in targets], expected)


def test_without_skipping_the_rule_is_unguarded() -> None:
    row = arrays(1)
    row[0][0, 0] = np.nan
    after = by_keras(arrays(0), [row], adaptivity=0.5)
    assert all(np.isnan(x).all() for x in after)


@pytest.mark.parametrize("adaptivity", [0.0, 0.25, 0.5, 1.0, core.Linear(0.0, 1.0, steps=2)])
@pytest.mark.parametrize("epsilon", [0.0, 1e-46, 1e-8])
def test_zeros_give_no_nan(adaptivity: Any, epsilon: float) -> None:
    values = arrays(0)
    rows = [[np.zeros_like(x) for x in values]] * 2 + [[*arrays(1)[:1], *(np.zeros_like(x) for x in values[1:])]]
    options = {"adaptivity": adaptivity, "weight_decay": 0.0}
    after = by_keras(values, rows[:2], epsilon=epsilon, **options)
    assert all(np.array_equal(x, y) for x, y in zip(after, values, strict=True))
    after = by_keras(values, rows, epsilon=epsilon, **options)
    assert_close(after, by_core(values, rows, eps=epsilon, **options))


def test_no_variables_and_no_gradients() -> None:
    optimizer = Ada2MS()
    optimizer.build([])
    optimizer.apply([], [])
    with pytest.raises(ValueError, match="No gradients"):
        Ada2MS().apply([None], variables(arrays(0)[:1]))


# Weight decay


@pytest.mark.parametrize(
    ("names", "decayed"),
    [
        (["bias"], [True, False, True]),
        (["encoder/"], [False, False, True]),
        (["^kernel$"], [False, True, False]),
        ([r"head/.*kernel"], [True, True, False]),
        (["kernel", "bias"], [False, False, False]),
    ],
)
def test_exclusion_by_path_or_name(names: list[str], decayed: list[bool]) -> None:
    targets = []
    for scope, name in (("encoder", "kernel"), ("encoder", "bias"), ("head", "kernel")):
        with keras.name_scope(scope):
            targets.append(keras.Variable([1.0, 2.0], name=name))
    optimizer = Ada2MS(0.1, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=names)
    apply(optimizer, [np.zeros(2, "float32")] * 3, targets)
    after = [numpy(v) / [1.0, 2.0] for v in targets]
    assert_close(after, [np.full(2, 0.95 if decay else 1.0) for decay in decayed])


def test_exclusion_of_variables_and_no_decay() -> None:
    zeros = [np.zeros_like(x) for x in arrays(0)]
    targets, optimizer = variables(arrays(0)), Ada2MS(0.1, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_list=targets)
    apply(optimizer, zeros, targets)
    assert_close([numpy(v) for v in targets], arrays(0), rtol=0)
    assert_close(by_keras(arrays(0), [zeros], weight_decay=None), arrays(0), rtol=0)


# Precision


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_variables(dtype: str) -> None:
    values, rows = arrays(0), [[x * 300 for x in arrays(i)] for i in range(1, 9)]  # 300^2 is no float16
    targets, optimizer = variables(values, dtype), Ada2MS(0.1, gradient_accumulation_steps=None)
    for row in rows:
        optimizer.apply([ops.cast(g, dtype) for g in row], targets)
    assert {str(v.dtype) for v in optimizer.variables if v.path.endswith(("momentum", "velocity"))} == {"float32"}
    assert str(targets[0].dtype) == dtype
    # One rounding of values up to 4 in each step, and the gradients' own.
    bound = len(rows) * 4 * {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    assert_close([numpy(v) for v in targets], by_core(values, rows, lr=0.1), rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "arguments", [{"gradient_accumulation_steps": 2}, {"global_clipnorm": 1.0}, {"use_ema": True}, {"clipnorm": 1.0}]
)
def test_16_bit_variables_with_what_keras_does_first(dtype: str, arguments: dict[str, Any]) -> None:
    values, rows = arrays(0), [[x * 300 for x in arrays(i)] for i in (1, 2)]
    targets, optimizer = variables(values, dtype), Ada2MS(0.1, **arguments)
    for row in rows:
        optimizer.apply([ops.cast(g, dtype) for g in row], targets)
    assert all(np.isfinite(numpy(v)).all() for v in targets)
    assert not np.array_equal(numpy(targets[0]), numpy(variables(values, dtype)[0]))


def test_float64_variables() -> None:
    if BACKEND == "jax":
        import jax

        if not jax.config.jax_enable_x64:
            pytest.skip("JAX has no float64 unless told at start; tests/test_trajectories.py tells it")
    values, rows = arrays(0), [arrays(i) for i in range(1, 6)]
    targets, optimizer = variables(values, "float64"), Ada2MS(0.125, adaptivity=core.Linear(1.0, 0.0, steps=3))
    for row in rows:
        optimizer.apply([ops.convert_to_tensor(g.astype("float64")) for g in row], targets)
    floats = {v.path.rpartition("/")[2]: str(v.dtype) for v in optimizer.variables if "float" in str(v.dtype)}
    assert set(floats.values()) - {floats["learning_rate"]} == {"float64"}
    values64, rows64 = ([x.astype("float64") for x in row] for row in (values, rows[0]))
    rows64 = [[x.astype("float64") for x in row] for row in rows]
    expected = by_core(values64, rows64, lr=0.125, adaptivity=core.Linear(1.0, 0.0, steps=3))
    assert_close([numpy(v) for v in targets], expected, rtol=1e-13, atol=1e-13)


# What Keras does around the rule


def test_clipping_comes_first() -> None:
    values, rows = arrays(0), [[x * 3 for x in arrays(i)] for i in (1, 2, 3)]
    clipped = [[np.clip(g, -0.5, 0.5) for g in row] for row in rows]
    assert_close(by_keras(values, rows, clipvalue=0.5), by_core(values, clipped))
    normed = [[g / max(1.0, float(np.linalg.norm(g))) for g in row] for row in rows]
    assert_close(by_keras(values, rows, clipnorm=1.0), by_core(values, normed))
    norms = [float(np.sqrt(sum((g.astype("float64") ** 2).sum() for g in row))) for row in rows]
    globally = [[g / np.float32(max(1.0, norm)) for g in row] for row, norm in zip(rows, norms, strict=True)]
    assert_close(by_keras(values, rows, global_clipnorm=1.0), by_core(values, globally))


def test_the_loss_scale_is_taken_out() -> None:
    values, rows = arrays(0), [arrays(i) for i in (1, 2, 3)]
    scaled = [[g * 1024 for g in row] for row in rows]
    assert_close(by_keras(values, scaled, loss_scale_factor=1024.0), by_core(values, rows))


def test_accumulated_gradients_are_averaged() -> None:
    values, rows = arrays(0), [arrays(i) for i in range(1, 7)]
    means = [[(g + h) / 2 for g, h in zip(*rows[i : i + 2], strict=True)] for i in (0, 2, 4)]
    targets, optimizer = variables(values), Ada2MS(0.1, adaptivity=core.Linear(1, 0, 3), gradient_accumulation_steps=2)
    for i, row in enumerate(rows):
        before = [numpy(v) for v in targets]
        apply(optimizer, row, targets)
        assert i % 2 or all(np.array_equal(numpy(v), x) for v, x in zip(targets, before, strict=True))
    assert_close([numpy(v) for v in targets], by_core(values, means, lr=0.1, adaptivity=core.Linear(1, 0, 3)))
    assert small(optimizer, "global_step") == 3


def test_moving_averages_of_the_variables() -> None:
    values, rows = arrays(0), [arrays(i) for i in (1, 2)]
    targets, optimizer = variables(values), Ada2MS(0.1, use_ema=True, ema_momentum=0.75)
    for row in rows:
        apply(optimizer, row, targets)
    first, second = (by_core(values, rows[:n], lr=0.1) for n in (1, 2))
    averages = [0.75 * x + 0.25 * y for x, y in zip(first, second, strict=True)]
    optimizer.finalize_variable_values(targets)
    assert_close([numpy(v) for v in targets], averages)


def test_variables_overwritten_by_their_gradients() -> None:
    values, row = arrays(0), arrays(1)
    targets = variables(values)
    targets[1].overwrite_with_gradient = True
    optimizer = Ada2MS(0.1)
    apply(optimizer, row, targets)
    rest = [0, 2, 3]
    expected = by_core([values[i] for i in rest], [[row[i] for i in rest]], lr=0.1)
    assert_close([numpy(targets[i]) for i in rest], expected)
    np.testing.assert_array_equal(numpy(targets[1]), row[1])
    assert small(optimizer, "steps").tolist() == [1, 0, 1, 1]


def test_constraints_come_last() -> None:
    target = keras.Variable([-1.0, 1.0])
    target.constraint = keras.constraints.NonNeg()
    apply(Ada2MS(), [np.zeros(2, "float32")], [target])
    assert numpy(target)[0] == 0


def test_members_of_a_multi_optimizer_have_means_of_their_own() -> None:
    if not hasattr(keras.optimizers, "MultiOptimizer"):
        pytest.skip("this Keras has no MultiOptimizer")
    values, rows = arrays(0)[:3], [arrays(i)[:3] for i in (1, 2)]
    targets, members = variables(values), (Ada2MS(0.1), Ada2MS(0.2, adaptivity=0.0))
    optimizer = keras.optimizers.MultiOptimizer(lambda v: members[v.name == "v2"])
    optimizer.build(targets)
    for row in rows:
        apply(optimizer, row, targets)
    expected = by_core(values[:2], [row[:2] for row in rows], lr=0.1)
    expected += by_core(values[2:], [row[2:] for row in rows], lr=0.2, adaptivity=0.0)
    assert_close([numpy(v) for v in targets], expected)


# Sparse gradients


def sparse(rows: Any, indices: list[int], shape: tuple[int, ...]) -> Any:
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.IndexedSlices(tf.constant(rows), tf.constant(indices), tf.constant(shape))
    import jax.experimental.sparse

    return jax.experimental.sparse.BCOO((rows, np.array(indices)[:, None]), shape=shape)


@needs_sparse_gradients
@pytest.mark.parametrize(
    "arguments", [{}, {"loss_scale_factor": 4.0}, {"clipnorm": 0.5}, {"gradient_accumulation_steps": 2}]
)
def test_repeated_rows_of_a_sparse_gradient_are_summed(arguments: dict[str, Any]) -> None:
    value, rows = arrays(0, [(5, 3)])[0], arrays(1, [(4, 3)])[0]
    dense = np.zeros_like(value)
    np.add.at(dense, [4, 1, 4, 4], rows)
    finals = []
    for gradient in (dense, sparse(rows, [4, 1, 4, 4], (5, 3))):
        targets, optimizer = variables([value]), Ada2MS(0.1, **arguments)
        for _ in range(4):
            apply(optimizer, [gradient], targets)
        finals.append([numpy(v) for v in targets])
    assert_close(*finals)


# What a state is saved with


def test_the_state_is_restored_by_its_weights() -> None:
    values, rows = arrays(0), [arrays(i) for i in (1, 2, 3)]
    targets, optimizer = variables(values), Ada2MS(0.1, scope="tensor")
    for row in rows[:2]:
        apply(optimizer, row, targets)
    other, copies = Ada2MS(0.1, scope="tensor"), variables([numpy(v) for v in targets])
    other.build(copies)
    other.set_weights([numpy(v) for v in optimizer.variables])
    for o, t in ((optimizer, targets), (other, copies)):
        apply(o, rows[2], t)
    for v, w in zip(targets, copies, strict=True):
        np.testing.assert_array_equal(numpy(v), numpy(w))


@only_on_tensorflow
def test_a_tensorflow_checkpoint_restores_the_state(tmp_path: Any) -> None:
    import tensorflow as tf

    targets, optimizer = variables(arrays(0)), Ada2MS(0.1)
    apply(optimizer, arrays(1), targets)
    before = state(optimizer)
    path = tf.train.Checkpoint(optimizer=optimizer).save(str(tmp_path / "checkpoint"))
    apply(optimizer, arrays(2), targets)
    tf.train.Checkpoint(optimizer=optimizer).restore(path).assert_existing_objects_matched()
    for name, x in state(optimizer).items():
        np.testing.assert_array_equal(x, before[name], err_msg=name)


@only_on_tensorflow
def test_variables_of_tensorflow_itself() -> None:
    import tensorflow as tf

    values, rows = arrays(0), [arrays(i) for i in (1, 2)]
    targets, optimizer = [tf.Variable(x, name=f"v{i}") for i, x in enumerate(values)], Ada2MS(0.1)
    optimizer.exclude_from_weight_decay(var_names=["v1"])
    for row in rows:
        optimizer.apply_gradients(zip([tf.constant(g) for g in row], targets, strict=True))
    expected = by_core(values, rows, lr=0.1)
    expected[1] = by_core(values, rows, lr=0.1, weight_decay=0.0)[1]
    assert_close([v.numpy() for v in targets], expected)
