"""What Keras does around the rule: clipping, scaling, accumulation, averages, sparse gradients, state."""

from typing import Any

import keras
import numpy as np
import pytest
from keras_support import (
    BACKEND,
    apply,
    arrays,
    assert_close,
    by_core,
    by_keras,
    needs_sparse_gradients,
    numpy,
    only_on_tensorflow,
    small,
    state,
    variables,
)

from ada2ms import core
from ada2ms.tf import Ada2MS, arguments, export_state

pytestmark = pytest.mark.keras


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


def test_no_weight_decay_is_handed_over_as_zero() -> None:
    """Keras' Adam says so by None, which must not become the default of whoever takes its state over."""
    targets, optimizer = variables(arrays(0)), keras.optimizers.Adam(0.125)
    assert optimizer.weight_decay is None
    apply(optimizer, arrays(1), targets)
    other = Ada2MS(**arguments(export_state(targets, optimizer)))
    assert (other.weight_decay, other.get_config()["learning_rate"]) == (0.0, 0.125)


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
