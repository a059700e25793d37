"""The power from sums, products and bits, in NumPy."""

from typing import Any

import numpy as np
import pytest

from ada2ms.core.power import power

EPSILON = 2.0**-23


def by_numpy(x: Any, h: Any) -> Any:
    with np.errstate(over="ignore", invalid="ignore"):  # of what is thrown away where x is 0, infinite or NaN
        return power(x, np.float32(h), lambda a, dtype: a.view(dtype), np.where)


@pytest.mark.parametrize("h", [0.0, 1e-30, 1e-3, 0.15, 0.25, 1 / 3, 0.4999, 0.5])
def test_within_two_and_a_half_epsilons(h: float) -> None:
    """Against double precision, over all normal float32 numbers. The polynomials are off by 0.3 and 0.4 of an epsilon;
    the rest is roundings: of r, of the polynomials and of their product.
    """
    rng = np.random.default_rng(0)
    x = (2.0 ** np.concatenate([rng.uniform(-126, 128, 200_000), rng.normal(size=50_000) * 1e-3])).astype("float32")
    found = by_numpy(x, h)
    assert found.dtype == np.float32
    assert np.max(np.abs(found / x.astype("float64") ** float(np.float32(h)) - 1)) <= 2.5 * EPSILON


def test_where_there_is_no_logarithm() -> None:
    x = np.array([0.0, 1e-45, np.inf, np.nan], "float32")
    np.testing.assert_array_equal(by_numpy(x, 0.3), [0, 0, np.inf, np.nan])
    np.testing.assert_array_equal(by_numpy(x[:2], 0.0), [1, 1])  # 0^0
