"""The rule in NumPy: clipping, and parameters of 16 bits that keep what rounding loses.

Its numbers are judged by the golden vectors: in test_golden.py, and beside every backend in test_trajectories.py.
"""

import math
from typing import Any

import numpy as np
import pytest
from test_spec import STEPS, drawn, results, train

from ada2ms.core import Ada2MS
from ada2ms.core.hyperparameters import DEFAULT_COMPENSATED, DEFAULT_MAX_NORM, check
from ada2ms.core.spec import BFLOAT16, lost, rounded, widen

SCOPES = pytest.mark.parametrize("scope", ["model", "tensor"])


# Clipping.


@SCOPES
@pytest.mark.parametrize("max_norm", [1e-3, 3.0, 1e6, math.inf])
def test_max_norm_is_the_clip_by_the_global_norm_before_the_rule(max_norm: float, scope: str) -> None:
    """Clipped by hand. To some roundings: of one factor in place of each square."""
    params, gradients = drawn([(3, 2), (4,), ()], seed=1)
    factors = [min(1.0, max_norm / np.sqrt(sum(np.sum(g * g) for g in row))) for row in gradients]
    by_hand = [[g * c for g in row] for row, c in zip(gradients, factors, strict=True)]
    left, right = train(params, gradients, max_norm=max_norm, scope=scope), train(params, by_hand, scope=scope)
    for a, b, p in zip(results(left), results(right), params, strict=True):
        np.testing.assert_allclose(a - p, b - p, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(left.groups[0].global_exp_avg_sq, right.groups[0].global_exp_avg_sq, rtol=1e-13)


@SCOPES
def test_a_max_norm_that_does_not_bind_changes_nothing(scope: str) -> None:
    """Not in the last digit; at the norm itself, and with gradients of zeros, too."""
    params = [np.ones(2), np.ones(1)]
    rows = [[np.array([2.0, 3.0]), np.array([6.0])], [np.zeros(2), np.zeros(1)], [np.array([3.0, 2.0]), None]]
    plain = results(train(params, rows, scope=scope))
    for max_norm in (7.0, 1e300, math.inf):
        for a, b in zip(results(train(params, rows, scope=scope, max_norm=max_norm)), plain, strict=True):
            np.testing.assert_array_equal(a, b)
    (group,) = train(params, rows, scope=scope, max_norm=6.99).groups
    np.testing.assert_array_less(group.exp_avg[0], train(params, rows, scope=scope).groups[0].exp_avg[0])


@SCOPES
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_infinite_max_norm_is_none(value: float, scope: str) -> None:
    """Also where the norm is no number: it is what asks for the norm alone."""
    params, row = [np.ones(2), np.ones(2)], [np.array([value, 1.0]), np.ones(2)]
    with np.errstate(invalid="ignore"):
        found, plain = (results(train(params, [row], scope=scope, max_norm=x)) for x in (math.inf, None))
    for a, b in zip(found, plain, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("value", "others"), [(np.nan, np.nan), (np.inf, 0.0)])
def test_gradients_that_are_not_finite_and_max_norm(value: float, others: float) -> None:
    """The factor is NaN for a NaN and 0 for an infinity, as of a clip before the step."""
    params, row = [np.ones(2), np.ones(2)], [np.array([value, 1.0]), np.ones(2)]
    with np.errstate(invalid="ignore"):
        assert all(np.isnan(p).all() for p in results(train(params, [row], max_norm=1.0)))
        (group,) = train(params, [row], max_norm=1.0, scope="tensor").groups
    np.testing.assert_array_equal(group.exp_avg[0], [np.nan, others])
    np.testing.assert_array_equal(group.exp_avg[1], [others, others])
    skipping = train(params, [row], max_norm=1.0, nonfinite="skip")
    assert skipping.skipped == 1
    np.testing.assert_array_equal(results(skipping), 1)


@pytest.mark.parametrize("value", [0, 0.0, -1e-9, float("nan"), -math.inf])
def test_max_norm_out_of_range(value: float) -> None:
    with pytest.raises(
        ValueError, match=rf"Invalid max_norm: {value} \(max_norm must be a number in \(0, inf\] or None"
    ):
        Ada2MS([], max_norm=value)
    with pytest.raises(
        ValueError, match=rf"Invalid max_norm: {value} \(global_clipnorm must be a number in \(0, inf\]"
    ):
        check("max_norm", value, "global_clipnorm")


@pytest.mark.parametrize("value", ["1", True, 1j, [0.5], {}, lambda count: 1.0])
def test_max_norm_of_the_wrong_kind(value: Any) -> None:
    with pytest.raises(TypeError, match=r"Invalid max_norm: .* \(max_norm must be a number in \(0, inf\] or None"):
        Ada2MS([], max_norm=value)


def test_defaults_and_what_is_allowed() -> None:
    assert (DEFAULT_MAX_NORM, DEFAULT_COMPENSATED) == (None, False)
    for max_norm in (None, 1, 1.0, 5e-324, math.inf, np.float16(1), np.array([2.0])):
        Ada2MS([], max_norm=max_norm)
    for compensated in (False, True, np.True_):
        Ada2MS([], compensated=compensated)


# Parameters of 16 bits.


def test_bfloat16_is_rounded_to_nearest_even() -> None:
    """Against what is exact: every tie goes to the even neighbour, and what is beside it to the nearer one."""
    bits = np.arange(0x7F80, dtype=np.uint16)  # every positive finite value, with 0 and what is subnormal
    values = widen(bits)
    above = np.append(values[1:].astype(np.float64), 2.0**128)
    middle = ((values.astype(np.float64) + above) / 2).astype(np.float32)  # exact: one more bit
    for sign in (0, 0x8000):
        factor = np.float32(-1 if sign else 1)
        np.testing.assert_array_equal(rounded(factor * values, BFLOAT16), bits | sign)
        np.testing.assert_array_equal(rounded(factor * middle, BFLOAT16), (bits + (bits & 1)) | sign)
        np.testing.assert_array_equal(
            rounded(factor * np.nextafter(middle, 0, dtype=np.float32), BFLOAT16), bits | sign
        )
        up = np.nextafter(middle, np.float32(np.inf))
        np.testing.assert_array_equal(rounded(factor * up, BFLOAT16), (bits + 1) | sign)
    np.testing.assert_array_equal(rounded(np.array([np.inf, -np.inf]), BFLOAT16), [0x7F80, 0xFF80])
    for nan in (np.nan, -np.nan, np.uint32(0x7F800001).view(np.float32), np.uint32(0xFFFFFFFF).view(np.float32)):
        assert np.isnan(widen(rounded(np.asarray(nan), BFLOAT16)))


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16])
def test_what_rounding_loses_is_kept(dtype: Any) -> None:
    """Updates and decay of a thousandth of a unit in the last place: plainly they are lost, here they add up."""
    p = rounded(np.linspace(0.5, 2, 41, dtype=np.float32), dtype)
    options = {"lr": 2.0**-14, "weight_decay": 0.5, "eps": 0.0}
    steps = 200
    rows = [[np.ones(41)]] * steps
    plain, compensated = (train([p], rows, **options, compensated=x).groups[0] for x in (False, True))
    wide = train([widen(p)], rows, **options).groups[0].params[0]
    moved = np.abs(wide - widen(p))
    digits = 2.0**-16 if dtype == BFLOAT16 else 2.0**-22  # of the largest values, at each step
    found = widen(compensated.params[0]) + widen(compensated.compensation[0])
    np.testing.assert_allclose(found, wide, rtol=0, atol=2 * digits * steps)
    assert np.median(np.abs(widen(plain.params[0]) - wide) / moved) > 0.4
    assert np.median(np.abs(found - wide) / moved) < 0.05
    assert compensated.compensation[0].dtype == dtype
    assert plain.compensation == [None]


def test_compensation_is_for_16_bits_alone() -> None:
    params, gradients = drawn([(3,), (2, 2)], seed=2)
    for dtype in (np.float32, np.float64):
        given = [p.astype(dtype) for p in params]
        left, right = (train(given, gradients, compensated=x).groups[0] for x in (False, True))
        assert right.compensation == [None, None]
        for a, b in zip(left.params, right.params, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_compensation_of_what_is_not_finite_is_0(dtype: Any, value: float) -> None:
    """And of what rounding takes to infinity."""
    p = rounded(np.array([1.0, value], np.float32), dtype)
    (group,) = train([p], [[np.array([0.1, 0.1])]] * 3, compensated=True).groups
    np.testing.assert_array_equal(widen(group.compensation[0][1:]), 0)
    assert np.isnan(value) or widen(group.params[0])[1] == value
    new = np.array([65519.0, 65520.0, -1e5, 3.4e38], np.float32)
    theta = rounded(new, np.dtype(np.float16))
    np.testing.assert_array_equal(theta, [65504, np.inf, -np.inf, np.inf])
    np.testing.assert_array_equal(lost(new, widen(theta)), [15, 0, 0, 0])


def test_a_skipped_step_leaves_the_compensation() -> None:
    optimizer = train([np.ones(3, np.float16)], [[np.ones(3)]] * STEPS, compensated=True, nonfinite="skip", lr=1e-4)
    before = [x.copy() for x in (optimizer.groups[0].params[0], optimizer.groups[0].compensation[0])]
    optimizer.step([np.array([1, np.nan, 1])])
    for a, b in zip(before, (optimizer.groups[0].params[0], optimizer.groups[0].compensation[0]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.any(before[1] != 0)
