"""v^h for Keras' JAX backend, where XLA's own powers, exponentials and logarithms are what is waited for."""

import jax
import jax.numpy as jnp

from ada2ms.core import power as core


@jax.custom_jvp
def power(x: jax.Array, h: jax.Array) -> jax.Array:
    """x^h for float32 x >= 0 and one float32 h in [0, 0.5]; see `ada2ms.core.power`. Has the derivatives of x**h."""
    result: jax.Array = core.power(x, h, jax.lax.bitcast_convert_type, jnp.where)
    return result


@power.defjvp
def _derivative(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    _, tangent = jax.jvp(jnp.power, primals, tangents)
    return power(*primals), tangent
