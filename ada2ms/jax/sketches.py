"""Sketches of arrays within a compiled program; `ada2ms.core.trace.sketch` says what they are."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from ada2ms.core.trace import Parameter
from ada2ms.core.trace.sketch import MIXING, SUMS, WIDTH

_LONGEST: Final = 16384  # entries of a row whose products are summed in one dimension
_SHORT: Final = 1024  # into how many of them longer ones are divided, since one running sum loses too much
_SMALL: Final = 16384  # entries of arrays that are stacked with others of their shape, which keeps programs short


def sums(arrays: Mapping[str, Any], parameters: Sequence[Parameter]) -> jax.Array:
    """Squares and signed sums of arrays of which parameters are, or are parts.

    Args:
        arrays: by name; left out where there is none.
        parameters: in the order of the sums.

    Returns:
        (parameters, WIDTH), float32 or wider; NaN for what is missing.
    """
    groups: dict[Any, list[int]] = {}
    for i, p in enumerate(parameters):
        groups.setdefault(_kind(arrays[p.own], p) or i if p.own in arrays else None, []).append(i)
    rows = [jnp.zeros((0, WIDTH))]
    for kind, members in groups.items():
        if kind is None:
            rows.append(jnp.full((len(members), WIDTH), jnp.nan))
        else:
            rows.append(_rows([arrays[parameters[i].own] for i in members], parameters[members[0]]))
    order = np.argsort([i for members in groups.values() for i in members])
    return jnp.concatenate(rows)[order]


def sketch(x: Any, parameter: Parameter) -> jax.Array:
    """The sketch of an array, float32 or wider, of shape (WIDTH,); NaN for what is missing."""
    row = sums({parameter.own: x}, [parameter])[0]
    return row.at[0].set(jnp.sqrt(row[0]))


def _kind(x: Any, parameter: Parameter) -> Any:
    """What small arrays have in common that are sketched together; None for others."""
    kind = jax.typeof(x)
    if parameter.part is not None or not 0 < kind.size <= _SMALL:
        return None
    return kind.shape, kind.dtype, kind.sharding, parameter.axes


def _rows(arrays: Sequence[Any], parameter: Parameter) -> jax.Array:
    """(arrays, WIDTH): squares and sums of arrays of one kind.

    Axes are summed as they are, without a change of shape, so that a sharded array stays where it is.
    """
    if len(arrays) == 1:
        return _row(arrays[0], parameter)[None]
    return jax.vmap(lambda x: _row(x, parameter))(jnp.stack(arrays))


def _row(x: Any, parameter: Parameter) -> jax.Array:
    # Without the barrier, XLA shares x*x with an optimizer's, and stores all of it for that.
    x = jax.lax.optimization_barrier(jnp.asarray(x))  # type: ignore[no-untyped-call]
    x = parameter.of(x, jnp)
    order = list(range(x.ndim)) if parameter.axes is None else list(parameter.axes)
    if jnp.iscomplexobj(x):
        order.append(x.ndim)
        x = jnp.stack([x.real, x.imag], -1)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.concatenate([jnp.sum(jnp.square(wide))[None], _signed_sums(wide, order)])


def _signed_sums(x: jax.Array, order: Sequence[int]) -> jax.Array:
    """(SUMS,): products of the trailing axes with their signs, and the sums of these along the leading ones."""
    if x.ndim == 1 and x.size > _LONGEST:
        rows = -(-x.size // _SHORT)
        signs = _axis_signs(order[0], rows * _SHORT).astype(x.dtype).reshape(rows, _SHORT, SUMS)
        x = jnp.pad(x, (0, rows * _SHORT - x.size)).reshape(rows, _SHORT)
        return jnp.einsum("rc,rck->rk", x, signs, precision="highest").sum(0)
    cut = _cut(x.shape)
    each = [_axis_signs(axis, size).astype(x.dtype) for axis, size in zip(order, x.shape, strict=True)]
    rows_, columns = _product(each[:cut], x.dtype), _product(each[cut:], x.dtype)
    along = tuple(range(cut, x.ndim)), tuple(range(x.ndim - cut))
    sums = jax.lax.dot_general(x, columns, (along, ((), ())), precision="highest")
    return jnp.sum(sums * rows_, axis=tuple(range(cut)))


def _cut(shape: Sequence[int]) -> int:
    """The first of the trailing axes: those that together are nearest to the leading ones, and not too long."""
    sizes = [math.prod(shape[i:]) for i in range(len(shape) + 1)]
    fitting = [i for i in range(len(shape) + 1) if sizes[i] <= _LONGEST]
    return min(fitting, key=lambda i: math.prod(shape[:i]) + sizes[i])


def _product(each: Sequence[jax.Array], dtype: Any) -> jax.Array:
    """The signs of several axes together: (*their sizes, SUMS)."""
    product = jnp.ones(SUMS, dtype)
    for signs in reversed(each):
        product = signs.reshape(-1, *[1] * (product.ndim - 1), SUMS) * product
    return product


def _axis_signs(axis: int, size: int) -> jax.Array:
    """As `ada2ms.core.trace.sketch.axis_signs`, but (size, SUMS); computed by the program, which would else hold them
    as constants.
    """
    x = jnp.arange(size, dtype=jnp.uint32) + np.uint32(0x9E3779B9 * (axis + 1) & 0xFFFFFFFF)
    for shift, factor in MIXING:
        x = x ^ (x >> np.uint32(shift))
        x = x * np.uint32(factor)
    bits: jax.Array = x[:, None] >> np.arange(8, 8 + SUMS, dtype=np.uint32) & np.uint32(1)
    return 1 - 2 * bits.astype(jnp.int32)
