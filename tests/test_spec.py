"""The rule in NumPy: its properties, its hyperparameters and its errors.

Its numbers are judged by the golden vectors: in test_golden.py, and beside every backend in test_trajectories.py.
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ada2ms.core import DEFAULTS, Ada2MS, Hyperparameters, Linear
from ada2ms.core.hyperparameters import check

Array = NDArray[Any]
EPSILON = float(np.finfo(np.float64).eps)
SHAPES = st.lists(st.sampled_from([(), (0,), (1,), (3,), (2, 2), (2, 0, 2), (1, 2, 1, 2)]), min_size=1, max_size=4)
OPTIONS = st.fixed_dictionaries(
    {
        "b1": st.sampled_from([0.0, 0.5, 0.9, 0.999]),
        "b2": st.sampled_from([0.0, 0.5, 0.99, 0.9999]),
        "weight_decay": st.sampled_from([0.0, 0.5]),
        "adaptivity": st.sampled_from([0.0, 0.25, 0.3, 0.5, 1.0, Linear(1.0, 0.0, 2)]),
        "scope": st.sampled_from(["model", "tensor"]),
    }
)
SEEDS = st.integers(0, 2**32 - 1)
STEPS = 4
seeded = settings(derandomize=True, deadline=None)


def drawn(shapes: Sequence[tuple[int, ...]], seed: int, zeros: float = 0.0) -> tuple[list[Array], list[list[Array]]]:
    """Parameters, and gradients from 1e-3 to 1e3 with a share of zeros, for `STEPS` steps."""
    rng = np.random.default_rng(seed)

    def gradient(shape: tuple[int, ...]) -> Array:
        g = rng.choice([-1, 1], shape) * 10 ** rng.uniform(-3, 3, shape)
        return np.asarray(np.where(rng.random(shape) < zeros, 0, g))

    params = [np.asarray(rng.uniform(-0.1, 0.1, shape)) for shape in shapes]
    return params, [[gradient(shape) for shape in shapes] for _ in range(STEPS)]


def train(params: Sequence[Array], gradients: Sequence[Sequence[Array | None]], **options: Any) -> Ada2MS:
    optimizer = Ada2MS([p.copy() for p in params], **{"lr": 0.01, **options})
    for row in gradients:
        optimizer.step(row)
    return optimizer


def results(optimizer: Ada2MS) -> list[Array]:
    return [p for group in optimizer.groups for p in group.params]


def everything(optimizer: Ada2MS) -> list[Any]:
    """Parameters, state and counts."""
    return [optimizer.skipped, *(copy.deepcopy(vars(group)) for group in optimizer.groups)]


def assert_same_trajectory(
    left: Sequence[Array], right: Sequence[Array], initial: Sequence[Array], roundings: int
) -> None:
    """Within `roundings` epsilons per step of the largest parameter or update: each rounds in its own size."""
    for a, b, p in zip(left, right, initial, strict=True):
        size = max(np.max(np.abs(p), initial=0), np.max(np.abs(b - p), initial=0))
        np.testing.assert_allclose(a, b, rtol=0, atol=roundings * STEPS * EPSILON * size)


# Properties.


@seeded
@given(SHAPES, OPTIONS, SEEDS, st.integers(-60, 60))
def test_scale_of_the_gradients_does_not_matter(shapes: Any, options: Any, seed: int, exponent: int) -> None:
    """Without eps. A power of two scales all exactly but the powers, which round to an epsilon or so each."""
    params, gradients = drawn(shapes, seed)
    scaled = [[g * 2.0**exponent for g in row] for row in gradients]
    left, right = (results(train(params, x, eps=0.0, **options)) for x in (scaled, gradients))
    assert_same_trajectory(left, right, params, roundings=8)


@seeded
@given(SHAPES, OPTIONS, SEEDS)
def test_order_of_the_parameters_does_not_matter(shapes: Any, options: Any, seed: int) -> None:
    """Up to the order in which squares are added: an epsilon for each of a few tensors."""
    params, gradients = drawn(shapes, seed, zeros=0.2)
    order = np.random.default_rng(seed).permutation(len(params))
    left = results(train([params[i] for i in order], [[row[i] for i in order] for row in gradients], **options))
    right = [results(train(params, gradients, **options))[i] for i in order]
    assert_same_trajectory(left, right, [params[i] for i in order], roundings=8)


@seeded
@given(SHAPES, OPTIONS, SEEDS)
def test_grouping_of_the_parameters_does_not_matter(shapes: Any, options: Any, seed: int) -> None:
    """Not in the last digit."""
    params, gradients = drawn(shapes, seed, zeros=0.2)
    cut = int(np.random.default_rng(seed).integers(len(params) + 1))
    grouped = Ada2MS(
        [{"params": [p.copy() for p in part]} for part in (params[:cut], params[cut:])], lr=0.01, **options
    )
    for row in gradients:
        grouped.step(row)
    for left, right in zip(results(grouped), results(train(params, gradients, **options)), strict=True):
        np.testing.assert_array_equal(left, right)


@seeded
@given(SHAPES, OPTIONS, SEEDS)
def test_shape_of_the_parameters_does_not_matter(shapes: Any, options: Any, seed: int) -> None:
    params, gradients = drawn(shapes, seed, zeros=0.2)
    flat = [p.ravel() for p in params]
    left = results(train(flat, [[g.ravel() for g in row] for row in gradients], **options))
    right = [p.ravel() for p in results(train(params, gradients, **options))]
    assert_same_trajectory(left, right, flat, roundings=8)


@seeded
@given(SHAPES, OPTIONS, SEEDS)
def test_s_is_the_mean_of_v(shapes: Any, options: Any, seed: int) -> None:
    """With every gradient present: the average is linear. A few epsilons a step, all terms being positive."""
    params, gradients = drawn(shapes, seed, zeros=0.2)
    (group,) = train(params, gradients, **options).groups
    averaged = [v.ravel() for v in group.exp_avg_sq]
    averaged = [np.concatenate(averaged)] if options["scope"] == "model" else averaged
    means = [v.mean() if v.size else 0.0 for v in averaged]
    np.testing.assert_allclose(group.global_exp_avg_sq, means, rtol=8 * STEPS * EPSILON)


@seeded
@given(SHAPES, OPTIONS, SEEDS, st.sampled_from([0.0, 1e-8]), st.sampled_from([0.3, 0.9, 1.0]))
def test_zeros_empties_and_scalars_stay_finite(shapes: Any, options: Any, seed: int, eps: float, zeros: float) -> None:
    """And without a warning of NumPy's."""
    params, gradients = drawn(shapes, seed, zeros)
    optimizer = train(params, gradients, eps=eps, **options)
    (group,) = optimizer.groups
    assert all(np.all(np.isfinite(x)) for x in [*group.params, *group.exp_avg, *group.exp_avg_sq])
    if zeros == 1.0:
        decayed = [p * (1 - 0.01 * options["weight_decay"]) ** STEPS for p in params]
        assert_same_trajectory(group.params, decayed, params, roundings=1)


@seeded
@given(SHAPES, OPTIONS, SEEDS)
def test_lr_0_changes_no_parameter(shapes: Any, options: Any, seed: int) -> None:
    params, gradients = drawn(shapes, seed, zeros=0.2)
    optimizer = train(params, gradients, lr=0.0, **options)
    for left, right in zip(results(optimizer), params, strict=True):
        np.testing.assert_array_equal(left, right)
    assert optimizer.groups[0].step == [STEPS] * len(params)


@seeded
@given(SHAPES, SEEDS, st.floats(0, 1))
def test_interpolation_is_geometric(shapes: Any, seed: int, a: float) -> None:
    """The first update, without eps, is the weighted geometric mean of those at adaptivity 1 and 0."""
    params, gradients = drawn(shapes, seed)
    zeros = [np.zeros_like(p) for p in params]
    u, one, zero = (results(train(zeros, gradients[:1], eps=0.0, adaptivity=x)) for x in (a, 1.0, 0.0))
    for between, adaptive, normalised in zip(u, one, zero, strict=True):
        np.testing.assert_allclose(np.abs(between), np.abs(adaptive) ** a * np.abs(normalised) ** (1 - a), rtol=1e-13)


def test_no_parameters() -> None:
    Ada2MS([]).step([])
    Ada2MS([{"params": []}, {"params": []}]).step([])


# Precision, schedules, gradients that are missing or not finite.


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_precision(dtype: str) -> None:
    """16 bits are computed in 32: 300**2 overflows float16, and its state would not move by (1 - b2)*g*g."""
    params, g = np.ones(3, dtype), np.array([300, -1e-3, 0], dtype)
    single = "float64" if dtype == "float64" else "float32"
    (group,) = train([params], [[g]] * 3).groups
    (wide,) = train([params.astype(single)], [[g.astype(single)]] * 3).groups
    assert group.params[0].dtype == dtype
    assert group.exp_avg[0].dtype == group.exp_avg_sq[0].dtype == single
    for left, right in ((group.exp_avg, wide.exp_avg), (group.exp_avg_sq, wide.exp_avg_sq)):
        np.testing.assert_array_equal(left, right)
    assert group.global_exp_avg_sq == wide.global_exp_avg_sq
    # Each of three steps rounds the parameter, about 1, to its own dtype.
    np.testing.assert_allclose(group.params[0], wide.params[0].astype(dtype), rtol=0, atol=3 * np.finfo(dtype).eps)


def test_schedules_count_completed_updates() -> None:
    """From 0, and not the steps that change nothing."""
    seen: dict[str, list[int]] = {"lr": [], "adaptivity": []}

    def schedule(name: str) -> Any:
        return lambda count: seen[name].append(count) or 0.1

    g = np.ones(2)
    rows = [[g], [None], [g * np.nan], [g], [g]]
    optimizer = train([g], rows, nonfinite="skip", lr=schedule("lr"), adaptivity=schedule("adaptivity"))
    assert seen == {"lr": [0, 1, 2], "adaptivity": [0, 1, 2]}
    assert (optimizer.skipped, optimizer.groups[0].global_step, optimizer.groups[0].step) == (1, 3, [3])


@pytest.mark.parametrize(("scope", "reached"), [("model", [True, True]), ("tensor", [True, False])])
def test_a_nan_propagates_unless_steps_are_skipped(scope: str, reached: list[bool]) -> None:
    """With one s for the model, to every parameter."""
    params, rows = [np.ones(2), np.ones(2)], [[np.array([np.nan, 1.0]), np.ones(2)]]
    for p, expected in zip(results(train(params, rows, scope=scope)), reached, strict=True):
        assert np.isnan(p).tolist() == [expected] * 2
    optimizer = train(params, rows, scope=scope, nonfinite="skip")
    assert optimizer.skipped == 1
    for p in results(optimizer):
        np.testing.assert_array_equal(p, 1)


# Hyperparameters and errors.

OUTSIDE = {
    "lr": [-1e-9, float("nan"), float("inf"), 10**400],
    "b1": [-0.1, 1.0, float("nan")],
    "b2": [-0.1, 1.0, float("nan")],
    "eps": [-1e-9, float("nan"), float("inf")],
    "weight_decay": [-1e-9, float("nan"), float("inf")],
    "adaptivity": [-1e-9, 1.0000001, float("nan")],
}
RANGES = {"b1": r"\[0, 1\)", "b2": r"\[0, 1\)", "adaptivity": r"\[0, 1\]"}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in OUTSIDE.items() for value in values])
def test_values_out_of_range(field: str, value: float) -> None:
    """The error names argument, value and range; by the framework's name where it has its own."""
    allowed = rf"must be a number in {RANGES.get(field, r'.0, inf.')}"
    with pytest.raises(ValueError, match=rf"Invalid .*: {value} \({field} {allowed}"):
        Hyperparameters(**{field: value})
    with pytest.raises(ValueError, match=rf"Invalid .*: {value} \(its_name {allowed}"):
        check(field, value, "its_name")


@pytest.mark.parametrize("field", OUTSIDE)
@pytest.mark.parametrize("value", [None, "0.5", b"0", True, 1j, [0.5], {}])
def test_values_of_the_wrong_kind(field: str, value: Any) -> None:
    with pytest.raises(TypeError, match=r"Invalid .*\(.* must be a number in"):
        Hyperparameters(**{field: value})


@pytest.mark.parametrize("field", OUTSIDE)
def test_schedules_are_for_lr_and_adaptivity(field: str) -> None:
    if field in ("lr", "adaptivity"):
        Hyperparameters(**{field: lambda count: 0.5})
        with pytest.raises(TypeError, match=rf"{field} must be a number"):
            check(field, lambda count: 0.5, schedule=False)
    else:
        with pytest.raises(TypeError, match=rf"{field} must be a number"):
            Hyperparameters(**{field: lambda count: 0.5})


@pytest.mark.parametrize("field", OUTSIDE)
@pytest.mark.parametrize("kind", [int, float, np.int8, np.float16, np.float32, np.float64, np.asarray, np.atleast_1d])
def test_limits_are_allowed(field: str, kind: Any) -> None:
    Hyperparameters(**{field: kind(0)})
    if field not in ("b1", "b2"):
        Hyperparameters(**{field: kind(1)})


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.longdouble, np.asarray, np.atleast_1d])
def test_numpys_numbers_do_not_compute_in_their_own_precision(kind: Any) -> None:
    given = {"lr": kind(0.1), "b1": kind(0.9), "b2": kind(0.99), "eps": kind(1e-3), "adaptivity": kind(0.3)}
    assert all(type(value) is float for value in vars(Hyperparameters(**given)).values())
    params, gradients = drawn([(2, 2), (3,)], seed=0)
    plain = {name: float(np.asarray(value).item()) for name, value in given.items()}
    for x, y in zip(
        results(train(params, gradients, **given)), results(train(params, gradients, **plain)), strict=True
    ):
        np.testing.assert_array_equal(x, y)


def test_defaults() -> None:
    assert vars(DEFAULTS) == {"lr": 1e-3, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 1e-2, "adaptivity": 0.9}
    optimizer = Ada2MS([])
    assert (optimizer.scope, optimizer.nonfinite, optimizer.groups[0].hyper) == ("model", "propagate", DEFAULTS)
    assert (optimizer.max_norm, optimizer.groups[0].compensated) == (None, False)


@pytest.mark.parametrize("field", ["scope", "nonfinite", "compensated"])
def test_choices(field: str) -> None:
    with pytest.raises(ValueError, match=rf"Invalid {field}: 'layer' \({field} must be one of \(['F]"):
        Ada2MS([np.ones(2)], **{field: "layer"})


@pytest.mark.parametrize(
    "params",
    [
        [1.0],
        [np.ones(2, int)],
        [np.ones(2, complex)],
        [[1.0, 2.0]],
        [np.ones(2), {"params": [np.ones(2)]}],  # neither arrays nor groups
        [{"params": [np.ones(2)]}, np.ones(2)],
        [np.broadcast_to(1.0, 2)],  # read-only
    ],
)
def test_parameters_of_the_wrong_kind(params: Any) -> None:
    with pytest.raises(
        TypeError, match=r"Invalid params: .* \(must be writeable arrays of a real floating-point dtype"
    ):
        Ada2MS(params)


def test_unknown_hyperparameter() -> None:
    with pytest.raises(TypeError, match="beta1"):
        Ada2MS([{"params": [np.ones(2)], "beta1": 0.9}])


@pytest.mark.parametrize(
    ("gradients", "error", "message"),
    [
        ([np.ones(2)], ValueError, r"shapes \[\(2,\)\] \(must be None or of \[\(2,\), \(3,\)\]"),
        ([np.ones(2), np.ones(3), None], ValueError, r"must be None or of \[\(2,\), \(3,\)\]"),
        ([np.ones(2), np.ones((3, 1))], ValueError, r"\(3, 1\)"),
        ([np.ones(2), 1.0], ValueError, r"\(\)"),
        (
            [np.ones(2), np.ones(3, complex)],
            TypeError,
            r"Invalid gradients: one is of dtype complex128 \(must be real\)",
        ),
        ([np.ones(2), np.array(["a"] * 3)], TypeError, r"Invalid gradients: one is of dtype <U1 \(must be real\)"),
    ],
)
def test_nothing_changes_after_bad_gradients(gradients: Any, error: type[Exception], message: str) -> None:
    optimizer = Ada2MS([{"params": [np.ones(2)]}, {"params": [np.ones(3)]}])
    optimizer.step([np.ones(2), np.ones(3)])
    before = everything(optimizer)
    with pytest.raises(error, match=message):
        optimizer.step(gradients)
    np.testing.assert_equal(everything(optimizer), before)


def test_gradients_may_be_lists() -> None:
    (left,), (right,) = (results(train([np.ones(2)], [[g]])) for g in ([1.0, 2.0], np.array([1.0, 2.0])))
    np.testing.assert_array_equal(left, right)
