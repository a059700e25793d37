"""Parts of a framework's array that are parameters of their own elsewhere, such as a packed projection's three kernels.

A part is a choice of entries, by the function that cuts the array. Most parts are evenly spaced along each of their
axes, and then no list of positions is kept.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ada2ms.core.state.layout import Layout

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Part:
    """Where the entries of a part are in the flattened array.

    Attributes:
        shape: of the part, in the neutral layout.
        offset: where the first entry is.
        strides: how far apart its entries are along each axis; None if not evenly.
        places: of every entry, if they are not evenly spaced; None if they are.
    """

    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...] | None
    places: Array | None

    @classmethod
    def of(cls, positions: Array) -> "Part":
        """The part whose entries are at these positions, an array of the part's shape."""
        shape = positions.shape
        offset = int(positions.flat[0]) if positions.size else 0
        strides = tuple(
            int(positions[tuple(int(k == axis) for k in range(len(shape)))]) - offset if n > 1 and positions.size else 0
            for axis, n in enumerate(shape)
        )
        even = cls(shape, offset, strides, None)
        return even if np.array_equal(even.positions(np), positions) else cls(shape, offset, None, positions)

    def positions(self, numpy: Any) -> Any:
        """Of every entry, as an array of the part's shape.

        Args:
            numpy: the library that makes it: NumPy, or what has its functions.
        """
        if self.strides is None:
            return self.places
        found = numpy.full(self.shape, self.offset)
        for axis, (n, stride) in enumerate(zip(self.shape, self.strides, strict=True)):
            along = [1] * len(self.shape)
            along[axis] = n
            found = found + (stride * numpy.arange(n)).reshape(along)
        return found

    def take(self, array: Any, numpy: Any = np) -> Any:
        """The part of an array of NumPy, or of a library that has its functions and indexing."""
        if prod(self.shape) == 0:
            return array.reshape(-1)[:0].reshape(self.shape)
        return array.reshape(-1)[self.positions(numpy)]


def cut(layout: Layout) -> list[tuple[str, Part]]:
    """The parts of an array, by their names, of which the layout's function cuts it."""
    axes: Callable[[Array], Any] = layout.axes  # type: ignore[assignment]
    positions = axes(np.arange(prod(layout.shape)).reshape(layout.shape))
    return [(name, Part.of(np.asarray(x))) for name, x in zip(layout.names, positions, strict=True)]
