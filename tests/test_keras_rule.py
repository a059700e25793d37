"""The Keras optimizer against the rule: values, missing gradients, weight decay, precision."""

from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from keras_support import (
    ADAPTIVITIES,
    BACKEND,
    apply,
    arrays,
    assert_close,
    by_core,
    by_keras,
    numpy,
    small,
    state,
    variables,
)

from ada2ms import core
from ada2ms.tf import Ada2MS

pytestmark = pytest.mark.keras


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


@pytest.mark.parametrize("adaptivity", [0.0, 0.3, 0.5, 1.0])
def test_squares_that_underflow(adaptivity: float) -> None:
    """What is left of the denominator is epsilon."""
    values, rows = [np.zeros(2, "float32")] * 2, [[np.array([1e-24, -3e-24], "float32"), np.zeros(2, "float32")]] * 2
    found = by_keras(values, rows, adaptivity=adaptivity)
    assert_close(found, by_core(values, rows, adaptivity=adaptivity), rtol=2e-6, atol=0)
    assert (found[0] != 0).all()


@pytest.mark.skipif(BACKEND != "jax", reason="other backends have no power of their own")
def test_the_power_on_jax() -> None:
    """Within the bound of `ada2ms.core.power` when compiled, and with derivatives, which its bits have none of."""
    import jax
    import jax.numpy as jnp

    from ada2ms.tf.kernels.power import power

    x = (2.0 ** np.random.default_rng(0).uniform(-126, 128, 100_000)).astype("float32")
    for h in (1e-3, 0.15, 0.4):
        found = np.asarray(jax.jit(power)(x, jnp.float32(h)), "float64")
        assert np.max(np.abs(found / x.astype("float64") ** float(np.float32(h)) - 1)) <= 2.5 * 2.0**-23
    for n in (0, 1):
        found, expected = (jax.grad(f, n)(jnp.float32(3.0), jnp.float32(0.3)) for f in (power, jnp.power))
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.skipif(BACKEND != "jax", reason="about what XLA makes of it")
def test_skipping_makes_no_sum_for_each_variable() -> None:
    """Of 40 variables of 4: 2.3 times the operations, which are 3.8 where XLA sums all sums for each variable anew."""
    import jax

    flops = []
    for arguments in ({}, {"nonfinite": "skip"}):
        targets, optimizer = variables(arrays(0, [(2, 2)] * 40)), Ada2MS(**arguments)
        optimizer.build(targets)
        values, found = [v.value for v in targets], [v.value for v in optimizer.variables]
        compiled = jax.jit(optimizer.stateless_apply).lower(found, values, values).compile()
        analysis = compiled.cost_analysis()
        flops.append((analysis[0] if isinstance(analysis, list) else analysis)["flops"])  # a list in older JAX
    assert flops[1] < 3 * flops[0]


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
    assert_close(by_keras(arrays(0), [zeros], weight_decay=0.0), arrays(0), rtol=0)


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


@pytest.mark.parametrize("dtype", ["float16", pytest.param("bfloat16", marks=pytest.mark.slow)])
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


def skip_without_float64() -> None:
    if BACKEND == "jax":
        import jax

        if not jax.config.jax_enable_x64:
            pytest.skip("JAX has no float64 unless told at start; tests/test_trajectories.py tells it")


@pytest.mark.parametrize("epsilon", [0.0, 1e-8])
def test_zeros_give_no_nan_in_float64(epsilon: float) -> None:
    """Also where Keras' own precision is float32, in which the smallest numbers of float64 are 0."""
    skip_without_float64()
    target = keras.Variable(np.ones(2), dtype="float64")
    Ada2MS(epsilon=epsilon, weight_decay=0.0).apply([ops.zeros(2)], [target])
    np.testing.assert_array_equal(numpy(target), np.ones(2))


def test_float64_variables() -> None:
    skip_without_float64()
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
