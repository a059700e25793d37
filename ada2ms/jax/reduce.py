"""Sums of squared gradients, sharded or not."""

from typing import Any

import jax
import jax.numpy as jnp

from ada2ms.jax.dtypes import compute_dtype, to_reals
from ada2ms.jax.sharding import axes_of, axis_size, check_axes, varying
from ada2ms.jax.specialize import specialized


def sums_of_squares(gradients: list[Any], dtype: Any, axis_name: Any) -> tuple[list[jax.Array], list[Any]]:
    """For each gradient the sum of its squares, and the number of reals in it, over all devices; zeros for None.

    Numbers of reals are floats; arrays where shapes are symbolic, as in `jax.export`.
    """
    check_axes(axis_name)
    axes = axes_of(axis_name)
    sums, numel = [], []
    for g in gradients:
        if g is None:
            sums.append(jnp.zeros([], dtype))
            numel.append(0.0)
            continue
        g = jnp.asarray(g)
        sums.append(_sum_of_squares(gradient=g, dtype=dtype))
        numel.append(_numel(g, dtype))
        if axes:
            shards = axis_size(tuple(axis for axis in axes if axis in varying(g)))
            sums[-1] /= axis_size(axes) / shards  # the copies that the sum over all axes has of each shard
            numel[-1] *= shards
    if axes:  # one sum over devices, for all leaves
        sums = list(jax.lax.psum(jnp.stack(sums), axes))  # type: ignore[no-untyped-call]
    return sums, numel


def mean(total: jax.Array, numel: Any) -> jax.Array:
    """A sum by a number of reals; 0 if there are none."""
    if isinstance(numel, float):
        return total / numel if numel else total
    return total / jnp.maximum(numel, 1)


@specialized
def _sum_of_squares(*, gradient: jax.Array, dtype: Any) -> jax.Array:
    # Without the barrier, XLA shares g*g with the update of v, and stores all of it for that.
    g = jax.lax.optimization_barrier(gradient)  # type: ignore[no-untyped-call]
    g = to_reals(g, jnp.iscomplexobj(g))
    return jnp.sum(jnp.square(g.astype(compute_dtype(g)))).astype(dtype)


def _numel(g: jax.Array, dtype: Any) -> Any:
    reals: Any = g.size * (2 if jnp.iscomplexobj(g) else 1)
    return float(reals) if isinstance(reals, int) else jnp.asarray(reals).astype(dtype)
