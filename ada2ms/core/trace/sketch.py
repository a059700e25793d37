"""Sketches: what tells two tensors apart, and estimates how far, without keeping either.

A sketch of a tensor x is its norm and 8 sums of its entries with signs. The sign of an entry in a sum is the product of
a sign for each of its indices, a bit of an integer hash of the axis and the index. So the same tensor has the same sums
in every framework, whatever the order of its axes in memory and however it is divided among devices, whose partial
sums add up; and no random generator is involved.

The sums are linear in x. Of two tensors x and y, each difference of sums squared is on average |x - y|^2, and so is
their mean, within a factor of about 2 (Alon, Matias and Szegedy 1996). What a sum itself loses to rounding is the
sketch's resolution, relative to the norm of what was summed.
"""

import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
SUMS: Final = 8
WIDTH: Final = 1 + SUMS  # a sketch: the norm, then the sums
MIXING: Final = ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1))  # shifts and factors of a bijection of 32 bits
BLOCK: Final = 1024  # entries that are summed in the tensor's own precision, before their sum joins those in float64
# Of the norm, in units of the precision in which was summed: what sums of a block lose, measured at 1 to 10.
RESOLUTION: Final = 16.0


class Codes(NamedTuple):
    """The signs of a tensor's entries, as a matrix of its leading axes by its trailing ones.

    Bit k of a code is set where the sign in sum k is -1. An entry's code is the exclusive or of its row's and column's.

    Attributes:
        rows: uint8, one for each of the leading indices.
        columns: uint8, one for each of the trailing indices.
    """

    rows: Array
    columns: Array


class Signs(NamedTuple):
    """The same as numbers 1 and -1, whose products are an entry's signs.

    Attributes:
        rows: int8 of shape (SUMS, product of the leading sizes).
        columns: int8 of shape (SUMS, product of the trailing sizes).
    """

    rows: Array
    columns: Array


def axis_codes(axis: int, start: int, stop: int) -> Array:
    """Codes along an axis of the neutral layout, for the indices from `start` to `stop`: uint8, (stop - start,)."""
    x = np.arange(start, stop, dtype=np.uint64).astype(np.uint32) + np.uint32(0x9E3779B9 * (axis + 1) & 0xFFFFFFFF)
    for shift, factor in MIXING:
        x ^= x >> np.uint32(shift)
        x *= np.uint32(factor)
    return (x >> np.uint32(8)).astype(np.uint8)  # of the hash the bits from 8 to 8 + SUMS


def axis_signs(axis: int, start: int, stop: int) -> Array:
    """Signs along an axis of the neutral layout, for the indices from `start` to `stop`: int8, (SUMS, stop - start)."""
    return signs_of(axis_codes(axis, start, stop))


def signs_of(codes: Array) -> Array:
    """The signs that are coded: int8, (SUMS, number of codes)."""
    bits = codes >> np.arange(SUMS, dtype=np.uint8)[:, None] & np.uint8(1)
    return np.where(bits, -1, 1).astype(np.int8)


def codes(
    shape: Sequence[int],
    axes: Sequence[int] | None = None,
    *,
    offset: Sequence[int] | None = None,
    is_complex: bool = False,
) -> Codes:
    """The codes of a tensor in a framework's layout.

    Args:
        shape: of the tensor, or of the part of it that is here.
        axes: for each axis here, which axis of the neutral layout it is; by default the same.
        offset: where the part begins along each axis; by default at 0.
        is_complex: whether entries are complex; then they are pairs of reals along a new last axis.
    """
    order = list(range(len(shape))) if axes is None else list(axes)
    begin = [0] * len(shape) if offset is None else list(offset)
    each = [axis_codes(k, b, b + n) for k, b, n in zip(order, begin, shape, strict=True)]
    if is_complex:
        each.append(axis_codes(len(shape), 0, 2))
    sizes = [len(x) for x in each]
    # As few codes as possible; of a vector all in the rows, along which is summed first.
    cut = min(range(len(sizes), -1, -1), key=lambda i: math.prod(sizes[:i]) + math.prod(sizes[i:]))
    return Codes(_product(each[:cut]), _product(each[cut:]))


def signs(
    shape: Sequence[int],
    axes: Sequence[int] | None = None,
    *,
    offset: Sequence[int] | None = None,
    is_complex: bool = False,
) -> Signs:
    """The signs of a tensor in a framework's layout; see `codes`."""
    found = codes(shape, axes, offset=offset, is_complex=is_complex)
    return Signs(signs_of(found.rows), signs_of(found.columns))


def _product(each: Sequence[Array]) -> Array:
    """The codes of several axes together, the last running fastest."""
    product = np.zeros(1, np.uint8)
    for x in each:
        product = (product[:, None] ^ x[None, :]).reshape(-1)
    return product


def sketch(array: Any, axes: Sequence[int] | None = None) -> Array:
    """The sketch of an array, as float64 of shape (WIDTH,); all NaN or infinite where an entry is.

    Args:
        array: of numbers, in a framework's layout. 16 bits are summed in float32.
        axes: for each axis here, which axis of the neutral layout it is.
    """
    array = np.asarray(array)
    found = signs(array.shape, axes, is_complex=np.iscomplexobj(array))
    x = reals(array)
    x = x.astype(np.result_type(x, np.float32), copy=False).reshape(found.rows.shape[1], found.columns.shape[1])
    rows, partial, squares = found.rows.astype(x.dtype), np.zeros(found.columns.shape), 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        for begin in range(0, len(x), BLOCK):
            some = x[begin : begin + BLOCK]
            partial += rows[:, begin : begin + BLOCK] @ some
            squares += float(np.einsum("ij,ij->", some, some, dtype=np.float64))
        return np.array([math.sqrt(squares), *(partial * found.columns).sum(1)])


def reals(array: Array) -> Array:
    """Complex entries as pairs of reals along a new last axis; integers and booleans as float64; contiguous."""
    if array.dtype.kind not in "fcV" and array.dtype.name != "bfloat16":
        array = array.astype(np.float64)
    array = np.ascontiguousarray(array).reshape(array.shape)
    return array[..., None].view(array.real.dtype) if np.iscomplexobj(array) else array


def distance(a: Array, b: Array) -> Array:
    """Estimates |x - y| from the sketches of x and y, along the last axis: within a factor of about 2."""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.asarray(np.sqrt(np.mean(np.square(a[..., 1:] - b[..., 1:]), axis=-1)))


def change(before: Array, after: Array) -> Array:
    """The sketches of what was added, from those of before and after; their norms are estimates, as by `distance`."""
    with np.errstate(invalid="ignore", over="ignore"):
        sums = after[..., 1:] - before[..., 1:]
    return np.concatenate([distance(before, after)[..., None], sums], axis=-1)


def resolution(dtype: str) -> float:
    """What a sketch of a tensor of this type, by its name, loses of the norm by its own rounding."""
    return RESOLUTION * float(np.finfo(np.float64 if dtype in ("float64", "complex128") else np.float32).eps)


def precision(dtype: str) -> float:
    """Half the distance of 1 to the next number of a type, by its name: what rounding to it loses, relatively."""
    known = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float64": 2.0**-53, "complex128": 2.0**-53}
    return known.get(dtype, 2.0**-24)
