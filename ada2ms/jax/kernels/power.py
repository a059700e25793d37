"""Powers and square roots: in float32 several times faster on a CPU than XLA's own power, and differentiable at 0.

What is raised to a power here is a mean of squared gradients. Where it is 0 so is its derivative, though that of the
square root is infinite: counted as 0, the derivatives of an update are those of the rule, where the product of the two
is NaN.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ada2ms.core import power as core
from ada2ms.core.coefficients import PowerKind, by_roots


@jax.custom_jvp
@jax.jit  # traced once for all leaves of a shape
def power(x: jax.Array, h: jax.Array) -> jax.Array:
    """x^h for x >= 0 and one h in [0, 0.5], where 0^0 = 1.

    In float32 by polynomials, see `ada2ms.core.power`; in float64 it is XLA's own. Derivatives are those of x**h, but 0
    at 0.

    Args:
        x: float32 or float64, any shape.
        h: of the type of x, scalar.
    """
    if x.dtype != jnp.float32:
        return exact_power(x, h)
    result: jax.Array = core.power(x, h, jax.lax.bitcast_convert_type, jnp.where)
    return result


@power.defjvp
def _derivative_of_power(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    x, h = primals
    zero = x < jnp.finfo(x.dtype).tiny  # type: ignore[no-untyped-call]
    _, tangent = jax.jvp(jnp.power, (jnp.where(zero, 1, x), h), tangents)
    return power(x, h), jnp.where(zero, 0, tangent)


def exact_power(x: jax.Array, h: jax.Array) -> jax.Array:
    """x^h by XLA's own power, which is more exact, and slow: for a few numbers."""
    return jnp.where(x == 0, (h == 0).astype(x.dtype), jnp.power(jnp.where(x == 0, 1, x), h))


@jax.custom_jvp
def sqrt(x: jax.Array) -> jax.Array:
    """The square root for x >= 0; its derivative is 0 at 0."""
    return jnp.sqrt(x)


@sqrt.defjvp
def _derivative_of_sqrt(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (tangent,) = primals, tangents
    return sqrt(x), tangent / (2 * jnp.where(x == 0, jnp.inf, sqrt(x)))


def denom_power(v: jax.Array, exponent: Any, kind: PowerKind) -> Any:
    """v^exponent, where 0^0 = 1; by square roots where `kind` says so."""
    if kind is PowerKind.POWER:
        return power(v, jnp.asarray(exponent, v.dtype))
    return 1.0 if kind is PowerKind.ONE else sqrt(v) if kind is PowerKind.SQRT else sqrt(sqrt(v))


def scale_power(x: jax.Array, h: Any) -> Any:
    """x^h for the few numbers that the denominator is scaled by."""
    return by_roots(x, h, sqrt, lambda x, h: exact_power(x, jnp.asarray(h, x.dtype)))
