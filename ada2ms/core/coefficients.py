"""What a step computes once for each tensor, before it touches an entry: stated once, for any array library.

    d = v_hat^(a/2) * s_hat^((1-a)/2) + eps  =  denom_scale * v^(a/2) + eps
    lr * m_hat / d                           =  step_size * m / d

The counts, `s_hat` and the hyperparameters may be Python numbers, NumPy arrays, or tensors of a framework, traced ones
included: the functions use operators, and what they are handed. A hyperparameter that is a Python number is one that
the host knows; only then can a root take a power's place, or a term that is 1 be left out.
"""

import math
from collections.abc import Callable
from enum import IntEnum
from typing import Any, Final, NamedTuple

# x^h for an array x >= 0 and an exponent h in [0, 0.5], where 0^0 = 1.
Power = Callable[[Any, Any], Any]


class Coefficients(NamedTuple):
    """Those of a tensor, in theta <- (1 - lr*wd) * theta - step_size * m / (denom_scale * v^(a/2) + eps)."""

    step_size: Any
    denom_scale: Any
    eps: Any


def coefficients(
    lr: Any,
    beta1: Any,
    beta2: Any,
    eps: Any,
    adaptivity: Any,
    count: Any,
    s_hat: Any,
    *,
    power: Power = pow,
    expm1: Callable[[Any], Any] = math.expm1,
    log: Callable[[Any], Any] = math.log,
    global_exponent: Any = None,
) -> Coefficients:
    """The coefficients of a tensor, or of many whose counts and `s_hat` are in arrays.

    Args:
        lr: learning rate of this step.
        beta1: decay rate of the first moment.
        beta2: decay rate of both second moments.
        eps: returned as it is.
        adaptivity: of this step, in [0, 1].
        count: t, this step included; at least 1, and floating-point if it is an array.
        s_hat: the global second moment after its bias correction.
        power: x^h for x >= 0 and h in [0, 0.5], where 0^0 = 1.
        expm1: see `bias_correction`.
        log: see `bias_correction`.
        global_exponent: see `denom_scale`.

    Returns:
        Coefficients: `denom_scale` has the shape of `s_hat` if the adaptivity is the number 0, of `count` if it is the
            number 1, and otherwise of both together.
    """
    bias_correction1 = bias_correction(beta1, count, expm1, log)
    # v_hat^0 is 1, so that at 0 there is nothing to correct.
    bias_correction2 = None if _is(0, adaptivity) else bias_correction(beta2, count, expm1, log)
    scale = denom_scale(adaptivity, s_hat, bias_correction2, power, global_exponent)
    return Coefficients(lr / bias_correction1, scale, eps)


def bias_correction(
    beta: Any, count: Any, expm1: Callable[[Any], Any] = math.expm1, log: Callable[[Any], Any] = math.log
) -> Any:
    """1 - beta^count, without the cancellation that costs 1 - beta**count its digits; 1 for beta = 0.

    Args:
        beta: in [0, 1). The logarithm of a Python number is taken in double precision, whatever the count's type.
        count: at least 1; if it is an array, of the floating-point type that the result should have.
        expm1: exp(x) - 1 of what the count is.
        log: the logarithm of what beta is, if that is no Python number.
    """
    if isinstance(beta, (int, float)):
        log = math.log if beta else lambda _: -math.inf
    return -expm1(count * log(beta))


def denom_scale(
    adaptivity: Any, s_hat: Any, bias_correction2: Any, power: Power = pow, global_exponent: Any = None
) -> Any:
    """s_hat^((1-a)/2) / bias_correction2^(a/2): what all entries of a tensor have in common in d.

    At the numbers 0 and 1 the term that is 1 is not computed: at 0 `bias_correction2` may be anything, at 1 `s_hat`.
    `global_exponent` is (1-a)/2, from a caller that has it in a higher precision than it has the adaptivity.
    """
    # d = denom_scale * v^(a/2) + eps
    if _is(0, adaptivity):
        return power(s_hat, 0.5)
    if _is(1, adaptivity):
        return 1 / power(bias_correction2, 0.5)
    exponent = (1 - adaptivity) / 2 if global_exponent is None else global_exponent
    return power(s_hat, exponent) / power(bias_correction2, adaptivity / 2)


class PowerKind(IntEnum):
    """How x^h is computed: by square roots where they say the same, since they are faster and exact."""

    ONE = 0  # h = 0: 1, also for x = 0
    SQRT = 1  # h = 1/2
    FOURTH_ROOT = 2  # h = 1/4: the square root of the square root
    POWER = 3  # any other number, and one that the host does not know


_KINDS: Final = {0.0: PowerKind.ONE, 0.5: PowerKind.SQRT, 0.25: PowerKind.FOURTH_ROOT}


def power_kind(exponent: Any) -> PowerKind:
    """How x^exponent is computed. The exponent of v is a/2: adaptivity 0, 1/2 and 1 need no power."""
    return _KINDS.get(exponent, PowerKind.POWER) if isinstance(exponent, (int, float)) else PowerKind.POWER


def by_roots(x: Any, exponent: Any, sqrt: Callable[[Any], Any], power: Power) -> Any:
    """x^exponent for x >= 0: the number 1.0, one or two square roots, or `power`, as `power_kind` says."""
    kind = power_kind(exponent)
    if kind is PowerKind.POWER:
        return power(x, exponent)
    if kind is PowerKind.ONE:
        return 1.0
    return sqrt(x) if kind is PowerKind.SQRT else sqrt(sqrt(x))


def denom_can_be_zero(eps: Any, smallest_normal: float) -> bool:
    """Whether d can be 0 where v or s is: a kernel must then divide by infinity, so that the update is 0, and not NaN.

    Args:
        eps: as it is added to d. A kernel that divides d by `denom_scale` adds eps/denom_scale: ask about that, or
            about the smallest it can be, eps/LARGEST_SCALE.
        smallest_normal: of the type in which d is computed; what is below may be flushed to 0.
    """
    return not (isinstance(eps, (int, float)) and eps >= smallest_normal)


# denom_scale is at most the square root of the largest float32 number, as s_hat is at most that number.
LARGEST_SCALE: Final = 2.0**64


def _is(number: int, adaptivity: Any) -> bool:
    """Whether the host knows that the adaptivity is this number."""
    return isinstance(adaptivity, (int, float)) and adaptivity == number
