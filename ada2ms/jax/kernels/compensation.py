"""Parameters of 16 bits that keep what their rounding loses."""

from typing import Any

import jax
import jax.numpy as jnp


def compensated(param: jax.Array, new: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(update, compensation) that bring a parameter to a new value.

    `optax.apply_updates` rounds parameter + update to the parameter's type. That sum is the new value, rounded; but
    where the new value is less than 2^-12 of the parameter, float32 may not have the update for that. The parameter is
    then as near as there is one for, and the compensation holds the rest: their sum is the new value in any case.

    Args:
        param: in float16 or bfloat16.
        new: its new value in float32, of which the type of the parameter holds the first digits.

    Returns:
        The update, in float32; and what rounding loses, in the type of the parameter: 0 where the new value is not
        finite in that type.
    """
    old = param.astype(jnp.float32)
    rounded = rounded_to(new, param.dtype)
    update = jnp.where(rounded == old, 0, rounded - old)  # infinity less infinity is no number
    rounded = rounded_to(old + update, param.dtype)
    lost = jnp.where(jnp.isfinite(rounded), new - rounded, 0)
    return update, rounded_to(lost, param.dtype).astype(param.dtype)


def rounded_to(x: jax.Array, dtype: Any) -> jax.Array:
    """float32 numbers rounded to bfloat16 or float16, ties to even, and still in float32.

    A conversion there and back does not do: on a GPU, XLA leaves out both.
    """
    info = jnp.finfo(dtype)  # type: ignore[no-untyped-call]
    result = jax.lax.reduce_precision(x, info.nexp, info.nmant)
    if info.nexp == 8:  # as many as float32 has
        return result
    # What `reduce_precision` makes 0: the numbers below the smallest normal one, which are multiples of the smallest.
    smallest = float(info.smallest_subnormal)
    multiples = jax.lax.round(x * (1 / smallest), jax.lax.RoundingMethod.TO_NEAREST_EVEN)
    return jnp.where(jnp.abs(x) < info.tiny, multiples * smallest, result)
