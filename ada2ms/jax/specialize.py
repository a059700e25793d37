"""Compiled functions that hold what is known, and take what is not: the same in an eager step and in a traced one."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import numpy as np

F = TypeVar("F", bound=Callable[..., Any])
_KNOWN = (bool, int, float, str, tuple, np.dtype, type, type(None))


def specialized(f: F) -> F:
    """`jax.jit` of a function of keyword arguments, in which numbers, choices, types and plain tuples are constants.

    An eager update is then a few compiled calls for each leaf, in place of tens of operations. While JAX traces, the
    function's operations are those of the caller, as if it were not compiled by itself. Numbers that are many, or
    differ from step to step, are given in a list or a named tuple: otherwise each one is compiled for.
    """

    @functools.partial(jax.jit, static_argnums=0, inline=True)
    def compiled(known: tuple[tuple[str, Any], ...], unknown: dict[str, Any]) -> Any:
        return f(**dict(known), **unknown)

    @functools.wraps(f)
    def call(**arguments: Any) -> Any:
        known = tuple((name, x) for name, x in arguments.items() if _is_known(x))
        return compiled(known, {name: x for name, x in arguments.items() if not _is_known(x)})

    return cast(F, call)


def _is_known(x: Any) -> bool:
    return isinstance(x, _KNOWN) and not hasattr(x, "_fields")
