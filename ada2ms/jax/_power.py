"""Powers and roots: in float32 several times faster on a CPU than XLA's own power, and differentiable at 0.

What is raised to a power here is a mean of squared gradients. Where it is 0 so is its derivative, though that of the
root is infinite: counted as 0, the derivatives of an update are those of the rule, where the product of the two is NaN.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import bitcast_convert_type
from numpy.polynomial import Chebyshev, Polynomial

_TO_WHOLE = 1.5 * 2.0**23  # added to a small number, rounds it to a whole one, which the lowest bits of the sum are
_SMALLEST = 2.0**-126  # of the normal float32 numbers; what is below counts as 0, as XLA takes it on a CPU

# Polynomials through the Chebyshev nodes: log2(1 + t) / t, which makes log2(1 + t) right to 1e-7, and 2^t, to 5e-8 of
# itself. (A series in (x - 1) / (x + 1) needs fewer terms, but a quotient that is used twice is one that XLA stores.)
_LOG2 = Chebyshev.interpolate(lambda t: np.log1p(t) / (t * math.log(2)), 7, [math.sqrt(0.5) - 1, math.sqrt(2) - 1])
_EXP2 = Chebyshev.interpolate(np.exp2, 6, [-0.75, 0.75])


@jax.custom_jvp
def power(x: jax.Array, h: jax.Array) -> jax.Array:
    """x^h for x >= 0 and one h in [0, 0.5], where 0^0 = 1.

    In float32 the relative error is at most 2.5 epsilons, 3e-7, whatever the size of x; that of exp(h*log(x)) grows
    with the logarithm. In float64 it is XLA's own. Derivatives are those of x**h, but 0 at 0.

    Args:
        x: float32 or float64, any shape.
        h: of the type of x, scalar.
    """
    return _polynomials(x, h) if x.dtype == jnp.float32 else power_of_few(x, h)


@power.defjvp
def _derivative_of_power(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    x, h = primals
    zero = x < jnp.finfo(x.dtype).tiny  # type: ignore[no-untyped-call]
    _, tangent = jax.jvp(jnp.power, (jnp.where(zero, 1, x), h), tangents)
    return power(x, h), jnp.where(zero, 0, tangent)


def power_of_few(x: jax.Array, h: jax.Array) -> jax.Array:
    """The same by XLA's own power, which is more exact, and slow."""
    return jnp.where(x == 0, (h == 0).astype(x.dtype), jnp.power(jnp.where(x == 0, 1, x), h))


@jax.custom_jvp
def root(x: jax.Array) -> jax.Array:
    """The square root for x >= 0; its derivative is 0 at 0."""
    return jnp.sqrt(x)


@root.defjvp
def _derivative_of_root(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (tangent,) = primals, tangents
    return root(x), tangent / (2 * jnp.where(x == 0, jnp.inf, root(x)))


def _polynomials(x: jax.Array, h: jax.Array) -> jax.Array:
    """x^h in float32, by one of the logarithm and one of its inverse."""
    # x = 2^e * (1 + t), with 1 + t between the roots of 1/2 and 2
    bits = bitcast_convert_type(x, jnp.int32)
    e = (bits - np.float32(math.sqrt(0.5)).view(np.int32)) >> 23
    t = bitcast_convert_type(bits - (e << 23), jnp.float32) - 1
    e = e.astype(jnp.float32)
    # h*log2(x) = n + r, with n whole. The upper 16 bits of h times e are exact, and so is that less n.
    upper = bitcast_convert_type(bitcast_convert_type(h, jnp.int32) & -256, jnp.float32)
    n = bitcast_convert_type(upper * e + _TO_WHOLE, jnp.int32) - np.float32(_TO_WHOLE).view(np.int32)
    r = (upper * e - n.astype(jnp.float32)) + (h - upper) * e + t * _polynomial(t, _LOG2, h)
    result = _polynomial(r, _EXP2) * bitcast_convert_type((n + 127) << 23, jnp.float32)
    result = jnp.where(x < _SMALLEST, (h == 0).astype(jnp.float32), result)
    return jnp.where(x < jnp.inf, result, x + h)  # infinite or NaN


def _polynomial(x: jax.Array, approximation: Chebyshev, scale: jax.Array | float = 1.0) -> jax.Array:
    """`scale` times it, by Estrin's scheme: pairs of coefficients side by side, where Horner's waits for each."""
    coefficients = [float(c) for c in approximation.convert(kind=Polynomial).coef]
    terms = [jnp.broadcast_to(jnp.asarray(scale * c, x.dtype), x.shape) for c in coefficients]
    while len(terms) > 1:
        pairs = [a + b * x for a, b in zip(terms[::2], terms[1::2], strict=False)]
        terms = pairs + terms[2 * len(pairs) :]
        x = x * x
    return terms[0]
