"""`global_clipnorm` by the sum that a Keras step takes anyway: what it equals and costs, and the norm in the logs."""

import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from keras.src.optimizers.base_optimizer import clip_by_global_norm
from keras_support import (
    BACKEND,
    apply,
    arrays,
    assert_close,
    by_core,
    needs_sparse_gradients,
    numpy,
    small,
    state,
    variables,
)
from test_keras_around import sparse
from test_keras_fit import EACH_WAY, WAYS, X, Y, network, train
from test_keras_fit import by_core as fit_by_core

from ada2ms import core
from ada2ms.tf import Ada2MS, Ada2MSLogger, export_state, import_state

pytestmark = pytest.mark.keras

# Norms from about 1 to 12, so that 3 clips some of the steps and not others.
ROWS = [[np.float32(size) * g for g in arrays(i)] for i, size in enumerate((0.3, 3.0, 0.9, 2.0, 0.5), start=1)]
NORMS = [float(np.sqrt(sum((g.astype("float64") ** 2).sum() for g in row))) for row in ROWS]
# One factor for the gradient, and a sum of squares that it multiplies twice: three roundings more than in clipping
# first, each of half an epsilon of an update of a tenth, in each of 5 steps.
CLOSE = {"rtol": 3e-6, "atol": 3e-7}


def moved(rows: list[list[Any]], **arguments: Any) -> list[Any]:
    """Variables and state after these gradients."""
    targets, optimizer = variables(arrays(0)), Ada2MS(0.1, **arguments)
    for row in rows:
        apply(optimizer, row, targets)
    slots = [v for v in optimizer.variables if v.path.endswith(("momentum", "velocity", "steps", "skipped"))]
    return [numpy(v) for v in (*targets, *slots)]


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("adaptivity", [0.0, 0.3, 0.5, 1.0])
def test_is_keras_own_clipping_and_the_rule(adaptivity: float, scope: str) -> None:
    """And the rule's `max_norm`, of which Keras knows nothing."""
    assert min(NORMS) < 2 < 3 < max(NORMS)
    clipped = [[numpy(g) for g in clip_by_global_norm([ops.convert_to_tensor(g) for g in row], 3.0)] for row in ROWS]
    options: dict[str, Any] = {"adaptivity": adaptivity, "scope": scope}
    found = moved(ROWS, global_clipnorm=3.0, **options)
    assert_close(found, moved(clipped, **options), **CLOSE)
    assert_close(found[:4], by_core(arrays(0), ROWS, lr=0.1, max_norm=3.0, **options), **CLOSE)
    assert not np.allclose(found[0], moved(ROWS, **options)[0], rtol=1e-3)


def test_is_optax_own_clipping_and_adamw() -> None:
    """At adaptivity 1, an optimizer and a clipping that are neither ours nor Keras'."""
    jax = pytest.importorskip("jax")
    optax = pytest.importorskip("optax")
    optimizer = optax.chain(optax.clip_by_global_norm(3.0), optax.adamw(0.1, b2=0.9, weight_decay=0.1))
    params = [jax.numpy.asarray(x) for x in arrays(0)]
    around = optimizer.init(params)
    for row in ROWS:
        updates, around = optimizer.update([jax.numpy.asarray(g) for g in row], around, params)
        params = optax.apply_updates(params, updates)
    found = moved(ROWS, adaptivity=1.0, beta_2=0.9, weight_decay=0.1, global_clipnorm=3.0)
    assert_close(found[:4], [np.asarray(x) for x in params], rtol=5e-6, atol=5e-7)


@pytest.mark.parametrize("size", [1e-24, 1e-10, 1e17])
def test_gradients_of_all_sizes(size: float) -> None:
    """Squares of the factor, and of gradients, may be too small for a float where what they make is not."""
    rows = [[np.float32(size) * g for g in arrays(i)] for i in (1, 2)]
    bound = {1e-24: 1e-24, 1e-10: 1.0, 1e17: 0.5}[size]
    found = moved(rows, global_clipnorm=bound, epsilon=1e-30)
    if size == 1e-24:  # the sum of squares is 0 in float32, and the norm with it
        assert_close(found, moved(rows, epsilon=1e-30), rtol=0)
    else:
        assert_close(found[:4], by_core(arrays(0), rows, lr=0.1, max_norm=bound, eps=1e-30), **CLOSE)


def test_no_gradient_but_zeros() -> None:
    zeros = [np.zeros_like(g) for g in ROWS[0]]
    found = moved([zeros, ROWS[1]], global_clipnorm=3.0)
    assert_close(found[:4], by_core(arrays(0), [zeros, ROWS[1]], lr=0.1, max_norm=3.0), **CLOSE)


# What Keras does around it


AROUND: dict[str, tuple[dict[str, Any], float]] = {
    "loss scale": ({"loss_scale_factor": 256.0}, 256.0),
    "averages": ({"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2}, 1.0),
    "skip": ({"nonfinite": "skip"}, 1.0),
    "skip of tensors": ({"nonfinite": "skip", "scope": "tensor"}, 1.0),
}


@pytest.mark.parametrize("around", AROUND)
def test_with_what_keras_does_around_it(around: str) -> None:
    """As if gradients had been clipped before they are scaled."""
    options, scale = AROUND[around]
    bad = [np.full_like(g, np.nan) for g in ROWS[0]] if "skip" in around else ROWS[0]
    scaled = [[np.float32(scale) * g for g in row] for row in (*ROWS[:2], bad, *ROWS[2:])]
    factors = [np.float32(scale * min(1.0, 3.0 / norm)) for norm in (*NORMS[:2], NORMS[0], *NORMS[2:])]
    clipped = [[c * g for g in row] for c, row in zip(factors, (*ROWS[:2], bad, *ROWS[2:]), strict=True)]
    assert_close(moved(scaled, global_clipnorm=3.0, **options), moved(clipped, **options), **CLOSE)


def test_accumulated_gradients_are_clipped_together() -> None:
    rows = [*ROWS, ROWS[0]]
    means = [[(g + h) / 2 for g, h in zip(*rows[i : i + 2], strict=True)] for i in (0, 2, 4)]
    found = moved(rows, global_clipnorm=1.5, gradient_accumulation_steps=2)
    assert_close(found[:4], by_core(arrays(0), means, lr=0.1, max_norm=1.5), **CLOSE)


def test_loss_scale_optimizer() -> None:
    optimizer = keras.optimizers.LossScaleOptimizer(Ada2MS(0.01, global_clipnorm=0.25), initial_scale=2.0**10)
    model = network()
    model.compile(optimizer=optimizer, loss="mse")
    train(model)
    assert_close(model.get_weights(), fit_by_core(8, lr=0.01, max_norm=0.25), rtol=2e-5, atol=2e-6)


@needs_sparse_gradients
def test_repeated_rows_of_a_sparse_gradient() -> None:
    """Are summed before the norm is taken."""
    value, rows = arrays(0, [(5, 3)])[0], arrays(1, [(4, 3)])[0]
    dense = np.zeros_like(value)
    np.add.at(dense, [4, 1, 4, 4], rows)
    targets, optimizer = variables([value]), Ada2MS(0.1, global_clipnorm=0.5, weight_decay=0.0)
    apply(optimizer, [sparse(rows, [4, 1, 4, 4], (5, 3))], targets)
    assert_close([numpy(targets[0])], by_core([value], [[dense]], lr=0.1, weight_decay=0.0, max_norm=0.5))


@pytest.mark.parametrize("way", EACH_WAY)
def test_in_fit(way: str) -> None:
    model = network()
    model.compile(optimizer=Ada2MS(0.01, global_clipnorm=0.25, nonfinite="skip"), loss="mse", **WAYS[way])
    train(model)
    assert_close(model.get_weights(), fit_by_core(8, lr=0.01, max_norm=0.25), rtol=2e-5, atol=2e-6)


# The argument


def test_one_way_of_clipping() -> None:
    for other in ("clipnorm", "clipvalue"):
        with pytest.raises(ValueError, match="Only one of `clipnorm`, `clipvalue` and `global_clipnorm` can be set"):
            Ada2MS(global_clipnorm=1.0, **{other: 1.0})


@pytest.mark.parametrize(("value", "error"), [(-1.0, ValueError), (float("nan"), ValueError), ("1", TypeError)])
def test_a_bad_value_is_named(value: Any, error: type[Exception]) -> None:
    optimizer = Ada2MS(global_clipnorm=2)
    for action in (lambda: Ada2MS(global_clipnorm=value), lambda: setattr(optimizer, "global_clipnorm", value)):
        with pytest.raises(error, match=r"\(global_clipnorm must be a number in \(0, inf\] or None\)"):
            action()
    assert optimizer.get_config()["global_clipnorm"] == optimizer.global_clipnorm == 2.0


def test_zero_is_none_as_in_keras() -> None:
    assert_close(moved(ROWS, global_clipnorm=0), moved(ROWS), rtol=0)
    assert_close(moved(ROWS, global_clipnorm=float("inf")), moved(ROWS), **CLOSE)
    huge = [[np.full_like(g, 1e30) for g in ROWS[0]]]  # whose squares overflow
    assert_close(moved(huge, global_clipnorm=float("inf")), moved(huge), rtol=0)


def test_gradients_alone_are_clipped_as_by_keras() -> None:
    """By the method that Keras' own tests call, whatever went before; a step that fails leaves no trace."""
    optimizer, targets = Ada2MS(0.1, global_clipnorm=3.0), variables(arrays(0))
    gradients = [ops.convert_to_tensor(g) for g in ROWS[1]]
    expected = [numpy(g) for g in clip_by_global_norm(gradients, 3.0)]
    for _ in range(2):
        assert_close([numpy(g) for g in optimizer._clip_gradients(gradients)], expected, rtol=0)
        apply(optimizer, ROWS[0], targets)
        with pytest.raises(ValueError, match="No gradients"):
            optimizer.apply([None] * 4, targets)


def test_is_replaced() -> None:
    targets, optimizer = variables(arrays(0)), Ada2MS(0.1)
    expected = [x.copy() for x in arrays(0)]
    rule = core.Ada2MS(expected, lr=0.1)
    for row, bound in zip(ROWS, (None, 1.0, 0.25, None, 2.0), strict=True):
        optimizer.global_clipnorm = rule.max_norm = bound
        apply(optimizer, row, targets)
        rule.step(row)
    assert_close([numpy(v) for v in targets], expected, **CLOSE)
    optimizer.clipnorm = 1e-3  # which in Keras goes first
    before = numpy(targets[0])
    apply(optimizer, ROWS[1], targets)
    assert optimizer._max_norm() is None
    assert not np.array_equal(numpy(targets[0]), before)


def test_is_replaced_between_epochs() -> None:
    model = network()
    model.compile(optimizer=Ada2MS(0.01), loss="mse")
    train(model, epochs=1)
    model.optimizer.global_clipnorm = 0.25
    model.make_train_function(force=True)
    train(model, epochs=1)
    params = fit_by_core(0)
    rule = core.Ada2MS(params, lr=0.01)
    step = hand_made(params)
    for i in range(8):
        rule.max_norm = None if i < 4 else 0.25
        rule.step(step(i))
    assert_close(model.get_weights(), params, rtol=2e-5, atol=2e-6)


def hand_made(params: list[Any]) -> Callable[[int], list[Any]]:
    """The network's gradients at these weights, of the i-th batch."""

    def gradients(i: int) -> list[Any]:
        w1, b1, w2, b2 = params
        x, y = (a[8 * i % 32 : 8 * i % 32 + 8].astype("float64") for a in (X, Y))
        h = np.tanh(x @ w1 + b1)
        error = 2 * (h @ w2 + b2 - y) / y.size
        inner = error @ w2.T * (1 - h * h)
        return [x.T @ inner, inner.sum(0), h.T @ error, error.sum(0)]

    return gradients


# The norm, for people


@pytest.mark.parametrize("bound", [0.25, float("inf")])
def test_the_logger_has_the_norm_before_clipping(bound: float) -> None:
    model = network()
    model.compile(optimizer=Ada2MS(0.01, global_clipnorm=bound, gradient_accumulation_steps=4), loss="mse")
    history = train(model, epochs=2, callbacks=[Ada2MSLogger()])
    params = fit_by_core(0)
    rule, step = core.Ada2MS(params, lr=0.01, max_norm=bound), hand_made(params)
    norms = []
    for _ in range(2):
        mean = [np.mean(g, axis=0) for g in zip(*(step(i) for i in range(4)), strict=True)]
        norms.append(np.sqrt(sum((g**2).sum() for g in mean)))
        rule.step(mean)
    assert history["gradient_norm"] == pytest.approx(norms, rel=1e-5)


def test_without_clipping_there_is_no_norm() -> None:
    model = network()
    model.compile(optimizer=Ada2MS(0.01), loss="mse")
    assert "gradient_norm" not in train(model, epochs=1, callbacks=[Ada2MSLogger()])
    assert [v.path.rpartition("/")[2] for v in model.optimizer.variables][-1] == "skipped"


def test_the_norm_of_a_skipped_step() -> None:
    targets, optimizer = variables(arrays(0)), Ada2MS(0.1, global_clipnorm=1.0, nonfinite="skip")
    apply(optimizer, ROWS[0], targets)
    before = state(optimizer)
    assert small(optimizer, "gradient_norm") == pytest.approx(NORMS[0], rel=1e-6)
    apply(optimizer, [np.full_like(g, np.inf) for g in ROWS[0]], targets)
    changed = {name.rpartition("/")[2] for name, x in state(optimizer).items() if not np.array_equal(x, before[name])}
    assert changed == {"iteration", "skipped", "gradient_norm"}
    assert small(optimizer, "gradient_norm") == np.inf
    import_state(targets, optimizer, export_state(targets, optimizer))
    assert small(optimizer, "gradient_norm") == 0


@pytest.mark.parametrize("pair", [(None, 1.0), (1.0, None), (1.0, 1.0)])
def test_files_are_the_same_with_clipping_and_without(pair: tuple[Any, Any], tmp_path: Any) -> None:
    """The norm is no state."""
    models = []
    for bound in pair:
        model = network()
        model.compile(optimizer=Ada2MS(0.01, global_clipnorm=bound), loss="mse")
        model.optimizer.build(model.trainable_variables)
        models.append(model)
    train(models[0])
    models[0].save_weights(tmp_path / "model.weights.h5")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        models[1].load_weights(tmp_path / "model.weights.h5")
    left, right = ([*m.get_weights(), *state(m.optimizer).values()] for m in models)
    n = len(left) if pair[0] is None else -1 if pair[1] else len(right)
    for x, y in zip(left[:n], right[:n], strict=False):
        np.testing.assert_array_equal(x, y)
    assert int(small(models[1].optimizer, "global_step")) == 8


# What it costs


SIZES = [(64, 64), (64, 96), (4096,)]


@pytest.mark.skipif(BACKEND != "jax", reason="about what XLA makes of it")
@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_xla_passes_over_nothing_once_more(scope: Any) -> None:
    """Bytes and sums of the compiled step; Keras' own clipping reads and writes every gradient again."""
    import jax

    def cost(**arguments: Any) -> tuple[float, int]:
        targets, optimizer = variables(arrays(0, SIZES)), Ada2MS(scope=scope, **arguments)
        optimizer.build(targets)
        values, found = [v.value for v in targets], [v.value for v in optimizer.variables]
        compiled = jax.jit(optimizer.stateless_apply).lower(found, values, values).compile()
        analysis = compiled.cost_analysis()
        bytes_ = (analysis[0] if isinstance(analysis, list) else analysis)["bytes accessed"]
        return bytes_, compiled.as_text().count(" reduce(")

    (plain, sums), (clipped, sums_of_clipped) = cost(), cost(global_clipnorm=1.0)
    largest = 4 * max(np.prod(shape) for shape in SIZES)
    assert clipped - plain < 0.05 * largest
    assert sums_of_clipped == sums


@pytest.mark.skipif(BACKEND != "tensorflow", reason="about TensorFlow's graphs")
def test_the_graph_has_no_operation_more_on_whole_tensors() -> None:
    import tensorflow as tf

    def operations(**arguments: Any) -> list[str]:
        targets, optimizer = variables(arrays(0, SIZES)), Ada2MS(**arguments)
        optimizer.build(targets)
        values = [tf.constant(x) for x in arrays(1, SIZES)]
        graph = tf.function(lambda gradients: optimizer.apply(gradients, targets)).get_concrete_function(values).graph
        sizes = [op.outputs[0].shape.num_elements() for op in graph.get_operations() if op.outputs]
        return sorted(
            op.type
            for op, n in zip((op for op in graph.get_operations() if op.outputs), sizes, strict=True)
            if n is not None and n >= 4096
        )

    assert operations(global_clipnorm=1.0) == operations()


@pytest.mark.skipif(BACKEND != "torch", reason="about torch's operations")
def test_torch_scales_gradients_once() -> None:
    """There is no operation for b1*m + w*g of lists, so one product more; Keras' own clipping takes the sums too."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.found: dict[str, int] = {}

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            first = args[0] if args else None
            first = first[0] if isinstance(first, (list, tuple)) and first else first
            if getattr(first, "numel", lambda: 0)() >= 4096:
                self.found[str(func)] = self.found.get(str(func), 0) + 1
            return func(*args, **(kwargs or {}))

    def operations(**arguments: Any) -> dict[str, int]:
        targets, optimizer = variables(arrays(0, SIZES)), Ada2MS(**arguments)
        optimizer.build(targets)
        values = [ops.convert_to_tensor(x) for x in arrays(1, SIZES)]
        with Counting() as counting:
            optimizer.apply(values, targets)
        return counting.found

    plain, clipped = operations(), operations(global_clipnorm=1.0)
    product = "aten._foreach_mul.Tensor"
    assert clipped.pop(product) == plain.get(product, 0) + 1
    plain.pop(product, None)
    assert clipped == plain
