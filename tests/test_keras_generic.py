"""What Keras documents of its optimizers, seen in keras.optimizers.AdamW and in Ada2MS side by side.

Most wheels of Keras come without its own tests (those of 3.12.4 and 3.15.1 have them: see test_keras_suite.py); these
are checks of the same behaviours, and of some more, which neither know nor care what an update is. What AdamW fails is
marked with the cause.
"""

from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from keras_support import (
    BACKEND,
    BOTH,
    ONES,
    START,
    UNEVEN,
    Make,
    adamw_fails,
    after,
    apply,
    assert_close,
    needs_sparse_gradients,
    numpy,
    slots,
    variable,
)

pytestmark = [pytest.mark.keras, BOTH]


# Calls, and what they refuse


def test_every_call_counts(make: Make) -> None:
    optimizer, target = make(), variable()
    assert int(optimizer.iterations) == 0
    optimizer.apply_gradients([(ops.convert_to_tensor(ONES), target)])
    assert int(optimizer.iterations) == 1
    apply(optimizer, [ONES], [target])
    optimizer.apply([ops.convert_to_tensor(ONES)])  # of the variables it knows
    assert int(optimizer.iterations) == 3
    optimizer.apply([])  # nothing to do
    assert int(optimizer.iterations) == 3


def test_missing_gradients(make: Make) -> None:
    with pytest.raises(ValueError, match="No gradients provided for any variable"):
        make().apply([None], [variable()])
    first, second = variable(), variable()
    with pytest.warns(UserWarning, match="Gradients do not exist for variables"):
        apply(make(), [None, ONES], [first, second])
    assert np.array_equal(numpy(first), START)
    assert not np.array_equal(numpy(second), START)


def test_variables_that_the_optimizer_does_not_know(make: Make) -> None:
    optimizer = make()
    with pytest.raises(ValueError, match="must already be built"):
        optimizer.apply([ops.convert_to_tensor(ONES)])
    optimizer.build([variable()])
    with pytest.raises(ValueError, match="Unknown variable"):
        apply(optimizer, [ONES], [variable()])
    with pytest.raises(ValueError, match="one-to-on"):
        optimizer.apply([ops.convert_to_tensor(ONES)] * 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clipnorm": 1.0, "clipvalue": 1.0}, "Only one of"),
        ({"clipnorm": 1.0, "global_clipnorm": 1.0}, "Only one of"),
        ({"gradient_accumulation_steps": 1}, "must be an integer >= 2"),
        ({"use_ema": True, "ema_momentum": 1.5}, "ema_momentum"),
        ({"use_ema": True, "ema_overwrite_frequency": -1}, "ema_overwrite_frequency"),
        ({"momentum": 0.9}, "not recognized"),
    ],
)
def test_bad_arguments(make: Make, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_the_old_decay_is_ignored(make: Make) -> None:
    with pytest.warns(UserWarning, match="`decay` is no longer supported"):
        make(decay=0.1)


# The learning rate


def test_a_learning_rate_is_set(make: Make) -> None:
    expected = after(make(0.5), ONES)
    optimizer = make(0.25)
    optimizer.learning_rate = 0.5
    assert float(numpy(optimizer.learning_rate)) == 0.5
    assert_close([after(optimizer, ONES)], [expected])
    assert_close([after(make(lambda: 0.5), ONES)], [expected])


def test_a_whole_number_as_learning_rate(make: Make, request: pytest.FixtureRequest) -> None:
    adamw_fails(request, "takes no int")
    assert_close([after(make(1), ONES)], [after(make(1.0), ONES)])


def test_a_learning_rate_schedule_counts_calls(make: Make) -> None:
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([0, 1], [0.5, 0.25, 0.0])
    by_hand, scheduled = make(0.5), make(schedule)
    left, right = variable(), variable()
    for rate in (0.5, 0.25, 0.0):
        by_hand.learning_rate = rate
        apply(by_hand, [UNEVEN], [left])
        apply(scheduled, [UNEVEN], [right])
    assert_close([numpy(left)], [numpy(right)])
    with pytest.raises(TypeError, match="not settable"):
        scheduled.learning_rate = 0.1
    before = len(by_hand.variables)
    by_hand.learning_rate = schedule  # and the number is no longer a variable
    assert len(by_hand.variables) == before - 1


# What is done to gradients first


def test_clipping(make: Make) -> None:
    """Of two variables, by hand: the same as clipped beforehand."""
    gradients = [UNEVEN, 4 * ONES]
    norms = [np.sqrt((g**2).sum()) for g in gradients]
    globally = np.sqrt(sum(n**2 for n in norms))
    cases: list[tuple[dict[str, float], list[Any]]] = [
        ({"clipvalue": 0.75}, [np.clip(g, -0.75, 0.75) for g in gradients]),
        ({"clipnorm": 2.0}, [g * min(1, 2 / n) for g, n in zip(gradients, norms, strict=True)]),
        ({"global_clipnorm": 2.0}, [g * min(1, 2 / globally) for g in gradients]),
        ({"global_clipnorm": 100.0}, gradients),
    ]
    for arguments, clipped in cases:
        found = []
        for optimizer, first in ((make(**arguments), gradients), (make(), clipped)):
            targets = [variable(), variable()]
            apply(optimizer, [np.asarray(g, "float32") for g in first], targets)
            apply(optimizer, [0.01 * ONES, -0.01 * ONES], targets)  # too small to be clipped
            found.append([numpy(v) for v in targets])
        assert_close(*found)


def test_a_loss_scale(make: Make) -> None:
    optimizer = make(loss_scale_factor=1024.0)
    assert float(optimizer.scale_loss(1.0)) == 1024.0
    assert_close([after(optimizer, 1024 * UNEVEN, 1024 * ONES)], [after(make(), UNEVEN, ONES)])


def test_accumulation(make: Make) -> None:
    optimizer, target = make(gradient_accumulation_steps=3), variable()
    for i, (g, accumulated) in enumerate([(ONES, ONES), (UNEVEN, ONES + UNEVEN), (ONES, 0 * ONES), (ONES, ONES)]):
        apply(optimizer, [g], [target])
        assert_close(slots(optimizer, "gradient_accumulator"), [accumulated])
        assert (i < 2) == np.array_equal(numpy(target), START)
        assert int(optimizer.iterations) == (i + 1) // 3
    assert_close([numpy(target)], [after(make(), (2 * ONES + UNEVEN) / 3)])


def test_loss_scale_optimizer(make: Make) -> None:
    optimizer = keras.optimizers.LossScaleOptimizer(make(), initial_scale=4.0)
    target = variable()
    scales = []
    for g in (4 * UNEVEN, np.inf * ONES, 2 * ONES, 2 * UNEVEN):  # scaled by 4, 4, 2 and 2
        before = numpy(target)
        if BACKEND == "jax":  # where Keras has it without state only
            if not optimizer.built:
                optimizer.build([target])
            state = [v.value for v in optimizer.variables]
            (value,), state = optimizer.stateless_apply(state, [ops.convert_to_tensor(g)], [target.value])
            for v, x in zip([target, *optimizer.variables], [value, *state], strict=True):
                v.assign(x)
        else:
            apply(optimizer, [g], [target])
        assert np.isinf(g).any() == np.array_equal(numpy(target), before)
        scales.append(float(numpy(optimizer.scale_loss(ops.convert_to_tensor(1.0)))))
    assert scales == [4, 2, 2, 2]
    assert_close([numpy(target)], [after(make(), UNEVEN, ONES, UNEVEN)])


# What is done to variables besides


def test_weight_decay(make: Make) -> None:
    zeros = 0 * START
    assert_close([after(make(weight_decay=0.5), zeros)], [START * (1 - 0.1 * 0.5)])
    assert_close([after(make(weight_decay=0.0), zeros)], [START], rtol=0)
    assert_close([after(make(weight_decay=0.0), ONES)], [after(make(weight_decay=1e-30), ONES)], rtol=0)


@pytest.mark.parametrize("how", ["var_list", "var_names"])
def test_exclusion_from_weight_decay(make: Make, how: str) -> None:
    bias, kernel = variable(name="bias"), variable(name="kernel")
    optimizer = make(weight_decay=0.5)
    optimizer.exclude_from_weight_decay(**{how: [bias] if how == "var_list" else ["bias"]})
    apply(optimizer, [0 * ONES, 0 * ONES], [bias, kernel])
    assert_close([numpy(bias), numpy(kernel)], [START, START * 0.95])


def test_averages_of_the_variables(make: Make) -> None:
    gradients = [UNEVEN, ONES, -UNEVEN]
    expected, averages = [], []
    plain, optimizer = make(), make(use_ema=True, ema_momentum=0.75, ema_overwrite_frequency=3)
    left, right = variable(), variable()
    for i, g in enumerate(gradients):
        apply(plain, [g], [left])
        apply(optimizer, [g], [right])
        expected.append(numpy(left))
        averages.append(0.75 * averages[-1] + 0.25 * expected[-1] if averages else expected[-1])
        assert_close(slots(optimizer, "average"), averages[-1:])
        assert_close([numpy(right)], [averages[-1] if i == 2 else expected[-1]])  # overwritten the third time
    again = make(use_ema=True, ema_momentum=0.75)
    target = variable()
    for g in gradients:
        apply(again, [g], [target])
    again.finalize_variable_values([target])
    assert_close([numpy(target)], averages[-1:])


def test_constraints(make: Make) -> None:
    target = variable(-START)
    target.constraint = keras.constraints.NonNeg()
    apply(make(), [0 * ONES], [target])
    assert (numpy(target) == 0).all()


def test_overwriting_by_gradients(make: Make) -> None:
    first, second = variable(), variable()
    first.overwrite_with_gradient = True
    apply(make(), [UNEVEN, UNEVEN], [first, second])
    assert np.array_equal(numpy(first), UNEVEN)
    assert_close([numpy(second)], [after(make(), UNEVEN)])


def test_overwriting_by_accumulated_gradients(make: Make) -> None:
    first, second = variable(), variable()
    first.overwrite_with_gradient = True
    optimizer = make(gradient_accumulation_steps=2)
    for g in (ONES, 2 * ONES, ONES):
        apply(optimizer, [g, g], [first, second])
    assert np.array_equal(numpy(first), 2 * ONES)  # the larger of the two
    assert_close([numpy(second)], [after(make(), 1.5 * ONES)])


def test_bfloat16_variables_move(make: Make, request: pytest.FixtureRequest) -> None:
    adamw_fails(request, "bfloat16(0.999) is 1, and so its bias correction 0")
    target = variable(dtype="bfloat16")
    make().apply([ops.cast(UNEVEN, "bfloat16")], [target])
    moved = numpy(target) - START
    assert np.isfinite(moved).all()
    assert (np.sign(moved) == -np.sign(UNEVEN)).all()


def sparse(rows: Any, indices: list[int]) -> Any:
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.IndexedSlices(tf.constant(rows), tf.constant(indices), tf.constant(START.shape))
    import jax.experimental.sparse

    return jax.experimental.sparse.BCOO((rows, np.array(indices)[:, None]), shape=START.shape)


@needs_sparse_gradients
@pytest.mark.parametrize("indices", [[0, 1], [1, 1]])
def test_sparse_gradients(make: Make, indices: list[int], request: pytest.FixtureRequest) -> None:
    if indices == [1, 1] and BACKEND == "tensorflow":
        adamw_fails(request, "squares repeated rows of a sparse gradient one by one")
    dense = np.zeros_like(START)
    np.add.at(dense, indices, UNEVEN)
    assert_close([after(make(), sparse(UNEVEN, indices))], [after(make(), dense)])
