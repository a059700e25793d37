"""x^h in float32 from sums, products and bits alone, which compilers turn into vector instructions as they are."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.polynomial import Chebyshev, Polynomial

# Adding this to a small float32 rounds it to an integer, which is then in the lowest bits of the sum.
_ROUNDS = np.float32(1.5 * 2.0**23)
_ROOT = np.float32(math.sqrt(0.5)).view(np.int32)
_SMALLEST = np.float32(2.0**-126)  # normal number; subnormal ones count as 0, since compilers may flush them


def _coefficients(function: Callable[[Any], Any], degree: int, domain: list[float]) -> list[float]:
    """The polynomial through Chebyshev nodes, as Python floats, which do not promote float32 arrays."""
    polynomial = Chebyshev.interpolate(function, degree, domain).convert(kind=Polynomial)
    return [float(c) for c in polynomial.coef]


# log2(1 + t) / t, which makes log2(1 + t) right to 1e-7, and 2^t, to 5e-8 of itself. (A series in (x - 1) / (x + 1)
# needs fewer terms, but XLA stores a quotient that is used twice.)
_LOG2 = _coefficients(lambda t: np.log1p(t) / (t * math.log(2)), 7, [math.sqrt(0.5) - 1, math.sqrt(2) - 1])
_EXP2 = _coefficients(np.exp2, 6, [-0.75, 0.75])


def power(x: Any, h: Any, bitcast: Callable[[Any, Any], Any], where: Callable[[Any, Any, Any], Any]) -> Any:
    """x^h for x >= 0 and one h in [0, 0.5], where 0^0 = 1.

    The relative error is at most 2.5 float32 epsilons, 3e-7, whatever the size of x; that of exp(h*log(x)) grows with
    the logarithm. Not differentiable: operations on bits have no derivative.

    Args:
        x: float32, any shape, an array of NumPy or of a framework with NumPy's operators and `astype`.
        h: float32, scalar.
        bitcast: the bits of an array as numbers of another type, `np.int32` or `np.float32`.
        where: as NumPy's.
    """
    # x = 2^e * (1 + t), with 1 + t between the roots of 1/2 and 2
    bits = bitcast(x, np.int32)
    e = (bits - _ROOT) >> 23
    t = bitcast(bits - (e << 23), np.float32) - 1
    e = e.astype(np.float32)
    # h*log2(x) = n + r, with n an integer. The upper 16 bits of h times e is exact, and so is that minus n.
    upper = bitcast(bitcast(h, np.int32) & -256, np.float32)
    n = bitcast(upper * e + _ROUNDS, np.int32) - _ROUNDS.view(np.int32)
    r = (upper * e - n.astype(np.float32)) + (h - upper) * e + t * _polynomial(t, [h * c for c in _LOG2])
    result = _polynomial(r, _EXP2) * bitcast((n + 127) << 23, np.float32)
    result = where(x < _SMALLEST, (h == 0).astype(np.float32), result)
    return where(x < np.inf, result, x + h)  # infinite or NaN


def _polynomial(x: Any, coefficients: list[Any]) -> Any:
    """Estrin's scheme: it evaluates pairs of terms independently, where each of Horner's steps waits for the last."""
    terms = coefficients
    while len(terms) > 1:
        pairs = [a + b * x for a, b in zip(terms[::2], terms[1::2], strict=False)]
        terms = pairs + terms[2 * len(pairs) :]
        x = x * x
    return terms[0]
