"""Arrays on their way from a compiled program to the host, where there may be one processor."""

import math
import os
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from ada2ms.core.trace import native

# Bytes that JAX hands over at once. What is more is copied by another thread, and where there is none, since the only
# one waits for the host, the host waits for ever.
_MOST: Final = 100_000


def call(function: Callable[..., Any], *arguments: Any) -> None:
    """Calls the host in order, whenever the program is run, with arrays that may be waited for."""
    whole, pieces = in_pieces(function, *arguments)
    io_callback(whole, None, *pieces, ordered=True)


def in_pieces(function: Callable[..., Any], *arguments: Any) -> tuple[Callable[..., Any], list[jax.Array]]:
    """A function and what it is to be called with, which together is the function of the arguments.

    Args:
        function: of the host.
        arguments: trees of arrays, which are in pieces where the process may use one processor alone.
    """
    leaves, structure = jax.tree.flatten(arguments)
    each = [_pieces(jnp.asarray(x)) for x in leaves]
    shapes = [jnp.shape(x) for x in leaves]

    def whole(*given: Any) -> Any:
        left = iter(given)
        parts = [[next(left) for _ in pieces] for pieces in each]
        arrays = [x[0] if len(x) == 1 else np.concatenate(x).reshape(s) for x, s in zip(parts, shapes, strict=True)]
        return function(*jax.tree.unflatten(structure, arrays))

    return whole, [piece for pieces in each for piece in pieces]


def _pieces(x: jax.Array) -> list[jax.Array]:
    is_alone = native.cores() == 1 or os.environ.get("NPROC") == "1"  # which JAX takes for their number
    if not is_alone or x.nbytes <= _MOST:
        return [x]
    most = _MOST // x.dtype.itemsize
    flat = x.reshape(-1)
    return [flat[i * most : (i + 1) * most] for i in range(math.ceil(x.size / most))]
