"""In which order a compiled program computes, where in another it would need much memory, or copy what it has."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ada2ms.core.trace import TraceError
from ada2ms.jax.injected import is_whole_number


@contextmanager
def in_one_order() -> Iterator[None]:
    """For what calls the host in order; raises where JAX has no order, or several.

    Raises:
        TraceError: under `vmap`; or within `shard_map` or `pmap`, where each device would record steps of its own.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if any(mesh.shape[axis] > 1 for axis in mesh.manual_axes):
        raise TraceError(
            "Updates cannot be recorded within jax.shard_map or jax.pmap: call the optimizer outside, in jit"
        )
    try:
        yield
    except (NotImplementedError, ValueError) as error:
        if "IO" in str(error) and "vmap" in str(error):
            raise TraceError("Updates cannot be recorded under jax.vmap: JAX does not order callbacks there") from error
        raise


def may_ask() -> bool:
    """Whether a program may ask the host; before JAX 0.10, XLA does not compile one that is divided among devices."""
    return jax.__version_info__ >= (0, 10) or jax.device_count() == 1


def counted_after(state: Any, *numbers: Any) -> Any:
    """An optimizer's state as it is, whose counts of steps a compiled program has when it knows the numbers.

    So all that comes from a count, such as corrections of bias and learning rates, waits for the numbers, and with it
    the parameters. A barrier would be removed too early to have this effect; and arrays that are themselves changed,
    if only by adding 0, make other code, which is rounded in another way.
    """
    zero = _zero(*numbers)
    return jax.tree.map(lambda x: x + zero.astype(x.dtype) if _is_count(x) else x, state)


def _is_count(x: Any) -> bool:
    return isinstance(x, jax.core.Tracer) and is_whole_number(x)


def _zero(*numbers: Any) -> jax.Array:
    """0, once the numbers are known: 32 bits have at most 32 ones, less than 64."""
    total = jnp.stack([jnp.asarray(x, jnp.float32).sum() for x in numbers]).sum()
    return jax.lax.population_count(jax.lax.bitcast_convert_type(total, jnp.uint32)) >> np.uint32(6)
