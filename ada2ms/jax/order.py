"""In which order a compiled program computes, where in another it would need much memory, or copy what it has."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from ada2ms.core.trace import TraceError

_LARGE: Final = 16384  # entries of arrays that are worth it
_ARITHMETIC = ("add", "sub", "mul", "div", "neg", "abs", "sign", "square", "sqrt", "rsqrt", "pow", "integer_pow")
_FUNCTIONS = (
    "exp",
    "exp2",
    "expm1",
    "log",
    "log1p",
    "tanh",
    "logistic",
    "erf",
    "max",
    "min",
    "clamp",
    "floor",
    "round",
)
_CHOICES = ("select_n", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor", "not", "is_finite")
_BITS = ("shift_left", "shift_right_logical", "shift_right_arithmetic", "bitcast_convert_type", "nextafter")
_FORMS = ("convert_element_type", "broadcast_in_dim", "reshape", "squeeze", "slice", "copy", "optimization_barrier")
_COMPLEX = ("complex", "real", "imag", "conj")
_ENTRYWISE: Final = frozenset((*_ARITHMETIC, *_FUNCTIONS, *_CHOICES, *_BITS, *_FORMS, *_COMPLEX))
_CALLS: Final = {"jit": "jaxpr", "pjit": "jaxpr", "custom_jvp_call": "call_jaxpr"}


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


def counted_after(state: Any, *numbers: jax.Array) -> Any:
    """An optimizer's state as it is, whose counts of steps a compiled program has when it knows the numbers.

    So all that comes from a count, such as corrections of bias and learning rates, waits for the numbers, and with it
    the parameters. A barrier would be removed too early to have this effect; and arrays that are themselves changed,
    if only by adding 0, make other code, which is rounded in another way.
    """
    zero = _zero(*numbers)
    return jax.tree.map(lambda x: x + zero.astype(x.dtype) if _is_count(x) else x, state)


def computed_after(x: Any, number: jax.Array) -> Any:
    """An array as it is, which a program for a CPU computes after it knows the number, in one piece.

    Division is expensive to the compiler, which has a quotient computed once, and all that it comes from as part of it.
    """
    if not _is_large(x):
        return x
    one = jnp.ones_like(x) + _zero(number).astype(x.dtype)
    return x / jax.lax.select(x > 0, jnp.ones_like(x), one)  # by a scalar it would be a multiplication


def comes_from_counts(update: Callable[[Any], Any], state: Any) -> bool:
    """Whether all large updates come from counts in the state, and what comes from these is computed entry by entry.

    Then updates may be computed twice, once of what `counted_after` gives, at the price of entrywise operations.

    Args:
        update: gives updates and a state for a state.
        state: of an optimizer.
    """
    leaves, structure = jax.tree.flatten(state)
    places = [i for i, x in enumerate(leaves) if _is_count(x)]

    def of_counts(counts: list[jax.Array]) -> list[jax.Array]:
        given = dict(zip(places, counts, strict=True))
        updates, _ = update(jax.tree.unflatten(structure, [given.get(i, x) for i, x in enumerate(leaves)]))
        return [x for x in jax.tree.leaves(updates) if _is_large(x)]

    if not places:
        return False
    jaxpr = jax.make_jaxpr(of_counts)([leaves[i] for i in places]).jaxpr
    return not jaxpr.effects and all(_reached(jaxpr, [True] * len(places)) or [False])


def _is_count(x: Any) -> bool:
    return isinstance(x, jax.core.Tracer) and x.ndim == 0 and bool(jnp.issubdtype(x.dtype, jnp.integer))


def _is_large(x: Any) -> bool:
    return isinstance(x, jax.core.Tracer) and x.size > _LARGE and bool(jnp.issubdtype(x.dtype, jnp.floating))


def _reached(jaxpr: Any, arguments: Sequence[bool]) -> list[bool] | None:
    """Which results come from the arguments that are marked; None if they are not computed entry by entry."""
    marked = {v for v, is_marked in zip(jaxpr.invars, arguments, strict=True) if is_marked}
    for equation in jaxpr.eqns:
        given = [not hasattr(v, "val") and v in marked for v in equation.invars]
        if not any(given):
            continue
        name, found = equation.primitive.name, [True] * len(equation.outvars)
        if name in _CALLS:
            inner = _reached(equation.params[_CALLS[name]].jaxpr, given)
            if inner is None:
                return None
            found = inner
        elif name not in _ENTRYWISE:
            return None
        marked |= {v for v, is_marked in zip(equation.outvars, found, strict=True) if is_marked}
    return [not hasattr(v, "val") and v in marked for v in jaxpr.outvars]


def _zero(*numbers: jax.Array) -> jax.Array:
    """0, once the numbers are known: 32 bits have at most 32 ones, less than 64."""
    total = jnp.stack([x.astype(jnp.float32).sum() for x in numbers]).sum()
    return jax.lax.population_count(jax.lax.bitcast_convert_type(total, jnp.uint32)) >> np.uint32(6)
