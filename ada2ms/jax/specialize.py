"""`jax.jit` for the parts of a step, so that a step that the user has not jitted is fast too."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

F = TypeVar("F", bound=Callable[..., Any])
_CONSTANTS = (bool, int, float, str, tuple, np.dtype, type, type(None))


def specialized(f: F) -> F:
    """Compiles a function of keyword arguments, for which numbers, choices, types and plain tuples are constants.

    An eager update is then a few compiled calls for each leaf, instead of tens of operations. Under the user's own jit
    it makes no difference: the function's operations are inlined into what is traced. Numbers that change from step to
    step, or from one optimizer to the next, belong in a list or a named tuple: as constants, each new one would be
    compiled for.
    """

    @functools.partial(jax.jit, static_argnums=0, inline=True)
    def compiled(constants: tuple[tuple[str, Any], ...], arrays: dict[str, Any]) -> Any:
        return f(**dict(constants), **arrays)

    @functools.wraps(f)
    def call(**arguments: Any) -> Any:
        constants = tuple((name, x) for name, x in arguments.items() if _is_constant(x))
        others = {name: x for name, x in arguments.items() if not _is_constant(x)}
        if jax.config.jax_disable_jit:  # type: ignore[attr-defined]  # then nothing makes arrays of numbers in lists
            others = jax.tree.map(jnp.asarray, others)
        return compiled(constants, others)

    return cast(F, call)


def _is_constant(x: Any) -> bool:
    return isinstance(x, _CONSTANTS) and not hasattr(x, "_fields")
