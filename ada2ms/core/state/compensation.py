"""Values of parameters of 16 bits that keep what rounding loses: two numbers in the framework that stand for one."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ada2ms.core.spec import BFLOAT16, lost, rounded, widen
from ada2ms.core.state.model import Array, Entry


def fitted_value(entry: Entry, dtypes: Mapping[str, str]) -> tuple[Entry, bool]:
    """An entry whose value is in as many numbers as the target has for it, and whether they hold it exactly.

    A target without a compensation gets param + compensation. One with a compensation, for an entry that has none or
    that is of another type, gets the nearest number of its type, and what is left.

    Args:
        entry: of a state; without a value its compensation stays as it is, or is 0 if it has none.
        dtypes: the names of the types of what the target keeps, with "compensation" if it keeps one.
    """
    kept = "compensation" in dtypes
    if entry.compensation is None and not kept:
        return entry, True
    if entry.param is None:
        zeros = np.zeros(entry.exp_avg.shape, np.float32)
        rest = zeros if entry.compensation is None else entry.compensation
        return replace(entry, compensation=rest if kept else None), True
    if not kept:
        return replace(entry, param=whole(entry), compensation=None), True
    dtype = BFLOAT16 if dtypes["param"] == "bfloat16" else np.dtype(dtypes["param"])
    value = whole(entry)
    param = widen(rounded(value, dtype))
    rest = widen(rounded(lost(value, param), dtype))
    if entry.compensation is not None:
        keeps = _divides(entry.param, entry.compensation, value, param, dtype)
        param, rest = np.where(keeps, entry.param, param), np.where(keeps, entry.compensation, rest)
    if _equal(param, entry.param) and entry.compensation is not None and _equal(rest, entry.compensation):
        return entry, True  # with the signs of its zeros
    return replace(entry, param=param, compensation=rest), _equal(param.astype(np.float64) + rest, value)


def _divides(given: Array, left: Array, value: Array, nearest: Array, dtype: np.dtype[Any]) -> Any:
    """Where numbers of this type are no less near the value than the nearest, and hold it with what is left of it.

    What rounding left of a value may have been rounded to half a unit itself: then another number is as near, and the
    model's would change.
    """
    fits = (widen(rounded(given, dtype)) == given) & (widen(rounded(left, dtype)) == left)
    with np.errstate(invalid="ignore"):  # of infinities
        exact = value.astype(np.float64)
        return fits & (np.abs(exact - given) <= np.abs(exact - nearest))


def whole(entry: Entry) -> Any:
    """Param + compensation, as one number: of float32 if that holds it, which it does after a step."""
    if entry.param is None or entry.compensation is None:
        return entry.param
    value = entry.param.astype(np.float64) + entry.compensation
    narrow = value.astype(np.float32)
    return narrow if _equal(narrow, value) else value


def _equal(left: Array, right: Array) -> bool:
    return np.array_equal(left, right, equal_nan=True)
