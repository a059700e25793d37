"""`compensated`: 16-bit variables of Keras that do not lose small updates."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from keras_support import BACKEND, apply, arrays, by_keras, numpy, state, variables
from test_keras_clipping import hand_made
from test_keras_fit import X, Y, network

from ada2ms import core
from ada2ms.core import spec
from ada2ms.tf import Ada2MS
from ada2ms.tf.drive import compiled_apply
from ada2ms.tf.kernels.rounding import rounded

pytestmark = pytest.mark.keras

UNITS = {"float16": 2.0**-11, "bfloat16": 2.0**-8}  # half a unit in the last place, relative to a value
DTYPES = pytest.mark.parametrize("dtype", UNITS)


def to_core(x: Any, dtype: str) -> Any:
    """Values of 16 bits as the NumPy rule has them."""
    return np.asarray(
        spec.rounded(np.asarray(x, "float32"), np.dtype(np.float16) if dtype == "float16" else spec.BFLOAT16)
    )


def compiled(function: Any) -> Any:
    """As XLA makes it, where the backend has XLA."""
    if BACKEND == "jax":
        import jax

        return jax.jit(function)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=True)
    return function


def compensations(optimizer: Any) -> list[Any]:
    return [numpy(v) for v in optimizer.variables if v.path.endswith("compensation")]


# Rounding


@DTYPES
@pytest.mark.parametrize("how", [lambda f: f, compiled], ids=["eager", "compiled"])
def test_rounds_to_nearest_even(dtype: str, how: Any) -> None:
    """As NumPy does, or the specification for bfloat16: drawn bits, ties, what is small, large, or not finite. XLA may
    take what is below 2^-126, which float32 cannot hold normally, for 0."""
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, "uint32")
    normal = bits[(bits & 0x7F800000) != 0].view("float32")
    sixteen = spec.widen(to_core(normal[np.isfinite(normal)], dtype))
    with np.errstate(over="ignore", invalid="ignore"):
        ties = (sixteen.astype("float64") * (1 + UNITS[dtype])).astype("float32")
        small = np.ldexp(
            np.float32(1) + normal.view("uint32") % 977 / np.float32(977), -26 + np.arange(normal.size) % 14
        )
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.99, 65520, -65536, 3.4e38], "float32")
    for x in (normal, ties[np.abs(ties) > 2.0**-120], small.astype("float32"), special):
        found = numpy(how(lambda x: rounded(x, dtype))(ops.convert_to_tensor(x)))
        expected = spec.widen(to_core(x, dtype))
        large = ~(np.abs(expected) < 2.0**-126)
        np.testing.assert_array_equal(found[large], expected[large])


@DTYPES
def test_a_compiler_keeps_the_rounding(dtype: str) -> None:
    """`xla_allow_excess_precision` lets XLA take a cast to 16 bits and back for nothing."""
    x = np.random.default_rng(0).normal(size=1000).astype("float32")
    lost = compiled(lambda x: x - rounded(x, dtype))(ops.convert_to_tensor(x))
    np.testing.assert_array_equal(numpy(lost), x - spec.widen(to_core(x, dtype)))


# The rule


@DTYPES
@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_follows_the_rule(dtype: str, scope: Any) -> None:
    """What a variable and its compensation hold together, to the last bit of the compensation in each step."""
    values = [spec.widen(to_core(x, dtype)) for x in arrays(0)]
    rows = [arrays(i) for i in range(1, 9)]
    options: dict[str, Any] = {"weight_decay": 0.1, "scope": scope, "compensated": True}
    targets, optimizer = variables(values, dtype), Ada2MS(2.0**-9, **options)
    params = [to_core(x, dtype) for x in values]
    rule = core.Ada2MS(params, lr=2.0**-9, **options)
    for row in rows:
        apply(optimizer, row, targets)
        rule.step(row)
    assert {str(keras.backend.standardize_dtype(v.dtype)) for v in optimizer._compensations} == {dtype}
    for v, c, p, expected in zip(targets, compensations(optimizer), params, rule.groups[0].compensation, strict=True):
        assert keras.backend.standardize_dtype(v.dtype) == dtype
        assert expected is not None
        bound = 2 * len(rows) * UNITS[dtype] ** 2 * 4  # of values up to 4, a rounding of what a rounding loses
        np.testing.assert_allclose(numpy(v) + c, spec.widen(p) + spec.widen(expected), rtol=0, atol=bound)
        assert np.all(np.abs(c) <= UNITS[dtype] * np.abs(numpy(v)) * (1 + UNITS[dtype]))


TWINS: dict[str, dict[str, Any]] = {"float32": {}, "plain": {}, "compensated": {"compensated": True}}


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_a_16_bit_network_follows_its_float32_twin(dtype: str) -> None:
    """In 1000 steps, none of which moves a weight by half a unit in its last place, as neither does decay. Gradients
    are worked out by hand at each network's own weights. Without compensation all of the way is left (in float16 0.997
    of it), with compensation 0.04 of it (0.003), which is what rounding to 16 bits makes of weights."""
    weights, distance = {}, {}
    for name, options in TWINS.items():
        params = [np.asarray(w, "float32") for w in network().get_weights()]
        start = np.concatenate([np.ravel(spec.widen(to_core(p, dtype))) for p in params])
        targets = variables([spec.widen(to_core(p, dtype)) for p in params], "float32" if name == "float32" else dtype)
        optimizer = Ada2MS(2.0**-17, weight_decay=8.0, **options)
        optimizer.build(targets)
        update = compiled_apply(optimizer, targets)
        for _ in range(1000):
            gradients = hand_made([numpy(v).astype("float64") for v in targets])(0)
            update([ops.convert_to_tensor(g.astype("float32")) for g in gradients], targets)
        weights[name] = np.concatenate([np.ravel(numpy(v)) for v in targets])
        distance[name] = np.linalg.norm(weights[name] - weights["float32"])
    moved = np.linalg.norm(weights["float32"] - start)
    assert moved > 0.05 * np.linalg.norm(start)
    assert distance["plain"] > 0.9 * moved
    assert distance["compensated"] < 0.1 * moved


@pytest.mark.slow
def test_a_network_of_a_16_bit_policy_follows_its_float32_twin() -> None:
    """The same in `fit`, with gradients of 16 bits: a tenth of the way is what these leave."""
    tiled = {"x": np.tile(X[:8], (1000, 1)), "y": np.tile(Y[:8], (1000, 1))}
    found = []
    for policy, compensated in (("float32", False), ("bfloat16", False), ("bfloat16", True)):
        model = network(policy)
        start = [spec.widen(to_core(w, "bfloat16")) for w in model.get_weights()]
        model.set_weights(start)
        model.compile(Ada2MS(2.0**-17, weight_decay=8.0, compensated=compensated), "mse")
        model.fit(**tiled, batch_size=8, shuffle=False, verbose=0)
        found.append(np.concatenate([np.ravel(w.astype("float32")) for w in model.get_weights()]))
    twin, plain, ours = found
    moved = np.linalg.norm(twin - np.concatenate([np.ravel(w) for w in start]))
    assert np.linalg.norm(plain - twin) > 0.9 * moved
    assert np.linalg.norm(ours - twin) < 0.1 * moved


@DTYPES
def test_what_is_not_finite_has_a_compensation_of_0(dtype: str) -> None:
    targets, optimizer = variables([np.ones(4, "float32")], dtype), Ada2MS(2.0**-12, compensated=True)
    apply(optimizer, [np.array([1.0, 2.0, 3.0, 4.0], "float32")], targets)
    assert np.all(compensations(optimizer)[0] != 0)
    apply(optimizer, [np.array([1.0, np.nan, 1.0, 1.0], "float32")], targets)
    assert np.isnan(numpy(targets[0])).all()  # by the global second moment
    np.testing.assert_array_equal(compensations(optimizer)[0], 0)
    targets, optimizer = variables([np.array([1.0, np.inf], "float32")], dtype), Ada2MS(0.01, compensated=True)
    apply(optimizer, [np.ones(2, "float32")], targets)
    assert numpy(targets[0])[1] == np.inf
    assert compensations(optimizer)[0][1] == 0


@DTYPES
def test_a_skipped_step_leaves_both_alone(dtype: str) -> None:
    """Where the compensation is half a unit too, whose sum with its variable could be rounded the other way."""
    odd = 1 + 2 * UNITS[dtype]
    targets, optimizer = variables([np.array([odd, 1.0], "float32")], dtype), Ada2MS(compensated=True, nonfinite="skip")
    optimizer.build(targets)
    half = ops.cast(ops.convert_to_tensor([UNITS[dtype], -UNITS[dtype] / 2]), dtype)
    optimizer._compensations[0].assign(half)
    before = numpy(targets[0]), compensations(optimizer)[0]
    apply(optimizer, [np.array([1.0, np.inf], "float32")], targets)
    np.testing.assert_array_equal(before, (numpy(targets[0]), compensations(optimizer)[0]))


# What Keras does around it


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2},
        {"use_ema": True, "ema_overwrite_frequency": 3},
        {"loss_scale_factor": 4.0, "global_clipnorm": 0.5, "nonfinite": "skip"},
    ],
)
def test_with_what_keras_does_around_it(options: dict[str, Any]) -> None:
    """Many small updates arrive, where without compensation none does."""
    found = []
    for dtype, compensated in (("float32", False), ("bfloat16", True), ("bfloat16", False)):
        targets = variables([np.linspace(1, 2, 8, dtype="float32")], "float32" if dtype == "float32" else dtype)
        start = numpy(targets[0])
        optimizer = Ada2MS(2.0**-12, weight_decay=0.5, compensated=compensated, **options)
        for _ in range(24):
            apply(optimizer, [np.ones(8, "float32")], targets)
        found.append(numpy(targets[0]) + (compensations(optimizer)[0] if compensated else 0) - start)
    wide, ours, plain = (np.linalg.norm(x) for x in found)
    if "use_ema" in options:  # the averages, which overwrite the variables, are Keras' own, in 16 bits
        assert np.isfinite(ours)
    else:
        assert plain < 0.3 * wide
        assert np.linalg.norm(found[1] - found[0]) < 0.1 * wide


def test_only_16_bit_variables_have_compensations() -> None:
    values, rows = arrays(0), [arrays(1)]
    for x, y in zip(by_keras(values, rows, compensated=True), by_keras(values, rows), strict=True):
        np.testing.assert_array_equal(x, y)
    mixed = [
        keras.Variable(x, dtype=dtype, name=dtype) for x, dtype in zip(values, ("float32", "bfloat16"), strict=False)
    ]
    mixed.append(keras.Variable(np.ones(2), dtype="bfloat16", name="overwritten"))
    mixed[2].overwrite_with_gradient = True
    for compensated in (True, False):
        optimizer = Ada2MS(compensated=compensated)
        optimizer.build(mixed)
        names = [v.path.rpartition("/")[2] for v in optimizer.variables]
        assert [name for name in names if "compensation" in name] == ["bfloat16_compensation"] * compensated
        assert optimizer.compensated is compensated
    network_of_32 = network("mixed_bfloat16")
    network_of_32.compile(Ada2MS(compensated=True), "mse")
    network_of_32.train_on_batch(X, Y)
    assert compensations(network_of_32.optimizer) == []


@pytest.mark.parametrize("value", ["yes", None, 2, "True"])
def test_a_bad_value_is_named(value: Any) -> None:
    with pytest.raises(ValueError, match=r"Invalid compensated: .* \(compensated must be one of \(False, True\)\)"):
        Ada2MS(compensated=value)


# Saving


def fitted(compensated: bool, steps: int = 3) -> Any:
    model = network("bfloat16")
    model.compile(Ada2MS(2.0**-12, compensated=compensated), "mse")
    for _ in range(steps):
        model.train_on_batch(X, Y)
    if not steps:
        model.optimizer.build(model.trainable_variables)
    return model


def contents(model: Any) -> list[Any]:
    return [np.asarray(w, "float32") for w in model.get_weights()] + list(state(model.optimizer).values())


@pytest.mark.parametrize("how", ["keras", pytest.param("weights", marks=pytest.mark.slow)])
def test_saved_and_loaded(how: str, tmp_path: Path) -> None:
    model = fitted(True)
    if how == "keras":
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        assert loaded.optimizer.compensated
    else:
        model.save_weights(tmp_path / "model.weights.h5")
        loaded = fitted(True, 1)
        loaded.load_weights(tmp_path / "model.weights.h5")
    assert len(compensations(loaded.optimizer)) == 4
    assert any(np.any(c != 0) for c in compensations(loaded.optimizer))
    for _ in range(2):
        for x, y in zip(contents(model), contents(loaded), strict=True):
            np.testing.assert_array_equal(x, y)
        model.train_on_batch(X, Y)
        loaded.train_on_batch(X, Y)


def test_weights_without_compensations(tmp_path: Path) -> None:
    """They start from 0. The other way round, what compensations hold would be lost, and Keras refuses the state."""
    plain, ours = fitted(False), fitted(True)
    plain.save_weights(tmp_path / "plain.weights.h5")
    ours.save_weights(tmp_path / "ours.weights.h5")
    ours.load_weights(tmp_path / "plain.weights.h5")
    for x, y in zip(contents(ours), contents(plain), strict=False):
        np.testing.assert_array_equal(x, y)
    assert all(np.all(c == 0) for c in compensations(ours.optimizer))
    with pytest.warns(UserWarning, match="Skipping variable loading"):
        plain.load_weights(tmp_path / "ours.weights.h5")


@pytest.mark.skipif(BACKEND != "tensorflow", reason="about TensorFlow alone")
def test_a_tensorflow_checkpoint(tmp_path: Path) -> None:
    import tensorflow as tf

    model = fitted(True)
    before = state(model.optimizer)
    path = tf.train.Checkpoint(optimizer=model.optimizer).save(str(tmp_path / "checkpoint"))
    model.train_on_batch(X, Y)
    tf.train.Checkpoint(optimizer=model.optimizer).restore(path).assert_existing_objects_matched()
    for name, x in state(model.optimizer).items():
        np.testing.assert_array_equal(x, before[name], err_msg=name)
