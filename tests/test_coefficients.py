"""The coefficients of a step, in every array library, against 50 digits."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import mpmath
import numpy as np
import pytest

from ada2ms.core.coefficients import (
    LARGEST_SCALE,
    PowerKind,
    bias_correction,
    by_roots,
    coefficients,
    denom_can_be_zero,
    denom_scale,
    power_kind,
)

COUNTS = [1, 2, 1000, 2**24 - 1, 2**31]
BETAS = [0.0, 1e-300, 0.5, 0.9, 0.999, 0.9999, 1 - 2**-53]
ADAPTIVITIES = [0.0, 1e-9, 0.25, 0.5, 0.7, 1.0]
SUBNORMAL = 1e-310


@dataclass
class Library:
    """How an array library is used, and how exact its numbers are."""

    array: Callable[[Any], Any]
    functions: dict[str, Any]
    epsilon: float

    def many(self, function: Callable[..., Any], *arguments: Any) -> list[float]:
        return [float(x) for x in np.asarray(function(*arguments), np.float64).reshape(-1)]


def python() -> Library:
    return Library(lambda x: x, {"power": pow, "expm1": math.expm1, "log": math.log}, 2**-52)


def numpy(dtype: str) -> Library:
    return Library(
        lambda x: np.asarray(x, dtype),
        {"power": np.power, "expm1": np.expm1, "log": np.log},
        float(np.finfo(dtype).eps),
    )


def torch() -> Library:
    import torch

    return Library(
        lambda x: torch.tensor(x, dtype=torch.float32),
        {"power": torch.pow, "expm1": torch.expm1, "log": torch.log},
        2**-23,
    )


def jax() -> Library:
    import jax.numpy as jnp

    return Library(
        lambda x: jnp.asarray(x, jnp.float32),
        {"power": jnp.power, "expm1": jnp.expm1, "log": jnp.log},
        2**-23,
    )


def keras() -> Library:
    from keras import ops

    return Library(
        lambda x: ops.convert_to_tensor(x, "float32"),
        {"power": ops.power, "expm1": ops.expm1, "log": ops.log},
        2**-23,
    )


LIBRARIES = {
    "python": python,
    "numpy-float64": lambda: numpy("float64"),
    "numpy-float32": lambda: numpy("float32"),
    "torch": torch,
    "jax": jax,
    "keras": keras,
}
everywhere = pytest.mark.parametrize(
    "library", [pytest.param(name, marks=pytest.mark.keras if name == "keras" else ()) for name in LIBRARIES]
)


def exact_correction(beta: float, count: int) -> mpmath.mpf:
    with mpmath.workdps(50):
        return 1 - mpmath.mpf(beta) ** count


def exact_power(x: Any, exponent: Any) -> mpmath.mpf:
    return mpmath.mpf(1) if exponent == 0 else mpmath.power(x, exponent)


def relative_error(found: Any, exact: mpmath.mpf) -> float:
    if hasattr(found, "detach"):
        found = found.detach()
    found = float(np.asarray(found, np.float64))
    if exact == 0:
        return abs(found)
    with mpmath.workdps(50):
        return float(abs(mpmath.mpf(found) / exact - 1))


@everywhere
def test_bias_correction_keeps_its_digits(library: str) -> None:
    """Three epsilons: the count, the logarithm's product and expm1 are rounded once each."""
    lib = LIBRARIES[library]()
    for beta, count in product(BETAS, COUNTS):
        found = bias_correction(beta, lib.array(float(count)), lib.functions["expm1"])
        assert relative_error(found, exact_correction(beta, count)) <= 3 * lib.epsilon, (beta, count)


@everywhere
def test_bias_correction_by_a_beta_that_the_host_does_not_know(library: str) -> None:
    """As exact as the given beta is. 0 has the logarithm -inf, or none in plain Python, where it is a known number."""
    lib = LIBRARIES[library]()
    for beta in (0.0, 0.5, 0.9):
        given = lib.array(beta)
        with np.errstate(divide="ignore"):
            found = bias_correction(given, lib.array(3.0), lib.functions["expm1"], lib.functions["log"])
        held = float(np.asarray(given))
        assert relative_error(found, exact_correction(held, 3)) <= 4 * lib.epsilon


@everywhere
def test_denom_scale(library: str) -> None:
    """The powers of float32 numbers near 1e30 are off by some epsilons of their own."""
    lib = LIBRARIES[library]()
    for adaptivity, s_hat, (beta2, count) in product(
        ADAPTIVITIES, [0.0, 1e-30, 0.3, 1e30], [(0.0, 1), (0.9999, 1), (0.9999, 2**31)]
    ):
        s = lib.array(s_hat)
        correction = exact_correction(beta2, count)
        with mpmath.workdps(50):
            held, a = mpmath.mpf(float(np.asarray(s))), mpmath.mpf(adaptivity)
            exact = exact_power(held, (1 - a) / 2) / exact_power(correction, a / 2)
        found = denom_scale(adaptivity, s, lib.array(float(correction)), lib.functions["power"])
        assert relative_error(found, exact) <= 16 * lib.epsilon, (adaptivity, s_hat, beta2, count)


@everywhere
def test_at_zero_the_correction_and_at_one_the_global_moment_say_nothing(library: str) -> None:
    lib = LIBRARIES[library]()
    power = lib.functions["power"]
    assert float(denom_scale(0.0, lib.array(4.0), None, power)) == 2
    assert float(denom_scale(1.0, None, lib.array(0.25), power)) == 2
    assert float(denom_scale(1, lib.array(math.nan), lib.array(0.25), power)) == 2


def test_a_subnormal_global_moment_is_not_lost() -> None:
    assert denom_scale(0.0, SUBNORMAL, None) == math.sqrt(SUBNORMAL)
    with mpmath.workdps(50):
        exact = mpmath.power(SUBNORMAL, mpmath.mpf("0.25")) / mpmath.power(mpmath.mpf(0.5), mpmath.mpf("0.25"))
    assert relative_error(denom_scale(0.5, SUBNORMAL, 0.5), exact) <= 4 * 2**-52


@everywhere
def test_coefficients_are_those_of_the_rule(library: str) -> None:
    """The update lr * m_hat / d, from m, v and the coefficients, is what the rule's formulas give."""
    lib = LIBRARIES[library]()
    m, v, lr, b1, b2, eps, t, s_hat = 0.02, 0.005, 0.1, 0.9, 0.999, 1e-3, 7, 0.03
    for adaptivity in ADAPTIVITIES:
        step_size, scale, same_eps = coefficients(
            lr, b1, b2, eps, adaptivity, lib.array(float(t)), lib.array(s_hat), **lib.functions
        )
        assert same_eps == eps
        with mpmath.workdps(50):
            a = mpmath.mpf(adaptivity)
            v_hat = mpmath.mpf(v) / exact_correction(b2, t)
            d = exact_power(v_hat, a / 2) * exact_power(mpmath.mpf(s_hat), (1 - a) / 2) + mpmath.mpf(eps)
            exact = lr * mpmath.mpf(m) / exact_correction(b1, t) / d
        found = float(step_size) * m / (float(scale) * v ** (adaptivity / 2) + eps)
        assert relative_error(found, exact) <= 16 * lib.epsilon, adaptivity


@everywhere
def test_hyperparameters_may_be_arrays(library: str) -> None:
    """What a framework traces: no branch asks for its value, and 0 and 1 are right without a special case."""
    lib = LIBRARIES[library]()
    for adaptivity in ADAPTIVITIES:
        given = [lib.array(x) for x in (0.1, 0.9, 0.99, 1e-8, adaptivity, 7.0, 0.03)]
        found = coefficients(*given, **lib.functions)
        plain = coefficients(0.1, 0.9, 0.99, 1e-8, adaptivity, 7, 0.03)
        # beta as a float32 number is off by half an epsilon, which is 50 of 1 - beta.
        for x, y in zip(found, plain, strict=True):
            assert float(x) == pytest.approx(y, rel=100 * lib.epsilon)


@everywhere
def test_many_tensors_at_once(library: str) -> None:
    if library == "python":
        pytest.skip("Python has no arrays")
    lib = LIBRARIES[library]()
    counts, s_hats = [1.0, 5.0, 1000.0], [0.0, 1e-3, 4.0]
    for adaptivity in ADAPTIVITIES:
        found = coefficients(0.1, 0.9, 0.99, 1e-8, adaptivity, lib.array(counts), lib.array(s_hats), **lib.functions)
        for i, (t, s_hat) in enumerate(zip(counts, s_hats, strict=True)):
            one = coefficients(0.1, 0.9, 0.99, 1e-8, adaptivity, t, s_hat)
            assert float(found.step_size[i]) == pytest.approx(one.step_size, rel=16 * lib.epsilon)
            assert float(found.denom_scale[i]) == pytest.approx(one.denom_scale, rel=16 * lib.epsilon)


def test_jax_traces_them_all() -> None:
    import jax
    import jax.numpy as jnp

    traced = jax.jit(lambda *x: coefficients(*x, power=jnp.power, expm1=jnp.expm1, log=jnp.log))
    given = (0.1, 0.9, 0.99, 1e-8, 0.5, 7.0, 0.03)
    for x, y in zip(traced(*given), coefficients(*given), strict=True):
        assert float(x) == pytest.approx(y, rel=1e-5)


@pytest.mark.parametrize(
    ("exponent", "kind", "value"),
    [
        (0.0, PowerKind.ONE, 1.0),
        (0, PowerKind.ONE, 1.0),
        (0.5, PowerKind.SQRT, 0.5),
        (0.25, PowerKind.FOURTH_ROOT, 0.5**0.5),
        (0.125, PowerKind.POWER, "power"),
        (np.float32(0.5), PowerKind.POWER, "power"),  # an array, for all that the host knows
    ],
)
def test_roots_take_the_place_of_powers(exponent: Any, kind: PowerKind, value: Any) -> None:
    assert power_kind(exponent) is kind
    assert by_roots(0.25, exponent, math.sqrt, lambda x, h: "power") == value


@pytest.mark.parametrize(
    ("eps", "possible"), [(1e-8, False), (2.0**-126, False), (2.0**-127, True), (0.0, True), (np.float32(1.0), True)]
)
def test_which_eps_leaves_a_denominator_of_zero(eps: Any, possible: bool) -> None:
    """One that the host does not know might."""
    assert denom_can_be_zero(eps, float(np.finfo("float32").tiny)) is possible


def test_no_scale_is_above_the_largest() -> None:
    largest = float(np.finfo("float32").max)
    for adaptivity in ADAPTIVITIES:
        for beta2 in BETAS:
            assert denom_scale(adaptivity, largest, bias_correction(beta2, 1)) <= LARGEST_SCALE
