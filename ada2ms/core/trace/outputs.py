"""Outputs of a forward pass: what a trace keeps of activations, and how far apart those of two runs are.

Frameworks differ in the order of axes (channels first or last, time before samples), and runs in the order of samples,
so of each array sums are kept that depend on one of these orders alone, beside the sketches of the whole.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, Final

import numpy as np

from ada2ms.core.state import Names
from ada2ms.core.trace.sketch import SUMS, Array, reals, signs

MODEL: Final = "(model)"  # what the output of the whole model is called
_CHUNK: Final = 2**21  # entries that are summed at once, in float64


@dataclass(frozen=True)
class Activation:
    """What is left of an array.

    Attributes:
        dtype: by name.
        shape: in the framework's order of axes.
        total: the sum of all entries, and of their squares.
        samples: signed sums over samples (the first axis that is not of size 1) of each one's sum, and then of each
            one's sum of squares: what does not depend on the order within samples. Empty where it is not known.
        pooled: signed sums over the places within a sample of the sum over samples, and then of that of squares: what
            does not depend on the order of samples.
        sketches: signed sums of all entries, for each of `orders`. Empty where they are not known.
    """

    dtype: str
    shape: list[int]
    total: list[float]
    samples: list[float] = field(default_factory=list)
    pooled: list[float] = field(default_factory=list)
    sketches: list[list[float]] = field(default_factory=list)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape without axes of size 1."""
        return tuple(n for n in self.shape if n != 1) or (1,)

    @property
    def norm(self) -> float:
        """Of all entries; NaN or infinite where one is."""
        return math.sqrt(self.total[1]) if self.total[1] >= 0 else math.nan

    @property
    def is_floating(self) -> bool:
        """Whether it holds numbers that rounding changes."""
        return self.dtype.startswith(("float", "bfloat", "complex"))


@dataclass(frozen=True)
class Output:
    """An output of the forward pass.

    Attributes:
        name: neutral; of a second one by this name in a step "name (2)".
        arrays: the output.
        inputs: what the module was given, where it is known.
        training: whether the module was in training mode, where it is known.
        composed: whether the module consists of others, which are recorded before it.
    """

    name: str
    arrays: list[Activation]
    inputs: list[Activation] = field(default_factory=list)
    training: bool | None = None
    composed: bool = False

    def data(self) -> dict[str, Any]:
        """What a file has of it."""
        return asdict(self)

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> "Output":
        """From what a file has of it."""
        each = {what: [Activation(**x) for x in data[what]] for what in ("arrays", "inputs")}
        return cls(**{**data, **each})


def orders(dimensions: int) -> list[tuple[int, ...]]:
    """In which orders of axes an array is sketched, each as the place of every axis: its own; with the second axis
    last, as of channels; and with the first two exchanged, as of samples and time."""
    own = tuple(range(dimensions))
    if dimensions < 3:
        return [own]
    return [own, (0, dimensions - 1, *range(1, dimensions - 1)), (1, 0, *own[2:])]


def activation(array: Any, dtype: str = "") -> Activation:
    """What a trace keeps of an array.

    Args:
        array: of numbers, as one of NumPy.
        dtype: of the framework's array, if NumPy's is another.

    Raises:
        TypeError: it holds no numbers.
    """
    array = np.asarray(array)
    if array.dtype.kind in "OSUM":
        raise TypeError(f"Invalid output: {array!r:.80} (must be arrays of numbers)")
    shape, name = list(array.shape), dtype or array.dtype.name
    x = reals(array)
    x = x.reshape([n for n in x.shape if n != 1] or [1])
    every = orders(x.ndim)
    total, by_sample, sketches = np.zeros(2), np.zeros((2, SUMS)), np.zeros((len(every), SUMS))
    pooled = np.zeros((2, math.prod(x.shape[1:])))
    step = max(1, _CHUNK // max(1, math.prod(x.shape[1:])))
    with np.errstate(invalid="ignore", over="ignore"):
        for begin in range(0, len(x), step):
            some = x[begin : begin + step].astype(np.float64)
            offset = (begin, *[0] * (x.ndim - 1))
            for k, order in enumerate(every):
                sketches[k] += _signed(some, order, offset)
            rows = some.reshape(len(some), -1)
            for k, powers in enumerate((rows, np.square(rows))):
                total[k] += powers.sum()
                by_sample[k] += _signed(powers.sum(1), (0,), (begin,))
                pooled[k] += powers.sum(0)
        by_place = [_signed(each.reshape(x.shape[1:]), tuple(range(x.ndim - 1))) for each in pooled]
    samples, places = (np.concatenate(list(each)).tolist() for each in (by_sample, by_place))
    return Activation(name, shape, total.tolist(), samples, places, sketches.tolist())


def _signed(x: Array, order: Sequence[int], offset: Sequence[int] | None = None) -> Array:
    found = signs(x.shape, order, offset=offset)
    x = x.reshape(found.rows.shape[1], found.columns.shape[1])
    return np.asarray(((found.rows.astype(np.float64) @ x) * found.columns).sum(1))


def tensors(x: Any, is_tensor: Callable[[Any], bool]) -> Iterator[Any]:
    """Those in tuples, lists, mappings by the order of their keys, and dataclasses."""
    if is_tensor(x):
        yield x
    elif isinstance(x, Mapping):
        for key in sorted(x, key=str):
            yield from tensors(x[key], is_tensor)
    elif isinstance(x, (tuple, list)):
        for each in x:
            yield from tensors(each, is_tensor)
    elif is_dataclass(x) and not isinstance(x, type):
        for each in fields(x):
            yield from tensors(getattr(x, each.name), is_tensor)


def numbered(name: str, before: Sequence[Output]) -> str:
    """The name, or with a number if there are outputs by this name before."""
    count = 1 + sum(each.name == name or each.name.startswith(f"{name} (") for each in before)
    return name if count == 1 else f"{name} ({count})"


def joined(parts: Sequence[Sequence[Output]]) -> list[Output]:
    """Of several processes, among which samples are divided, the outputs that all have: what adds up."""
    found = []
    for name in (each.name for each in parts[0]):
        every = [next((each for each in part if each.name == name), None) for part in parts]
        there = [each for each in every if each is not None]
        if len(there) == len(every):
            arrays, inputs = (
                [_added(each) for each in zip(*lists, strict=False)]
                for lists in ([x.arrays for x in there], [x.inputs for x in there])
            )
            found.append(replace(there[0], arrays=arrays, inputs=inputs))
    return found


def _added(parts: Sequence[Activation]) -> Activation:
    first = parts[0]
    if all(part == first for part in parts):
        return first  # each process has the whole
    shape = [sum(part.shape[0] for part in parts), *first.shape[1:]] if first.shape else [len(parts)]
    total, pooled = (np.sum([getattr(part, what) for part in parts], axis=0).tolist() for what in ("total", "pooled"))
    return Activation(first.dtype, shape, total, [], pooled if _are_alike(parts) else [], [])


def _are_alike(parts: Sequence[Activation]) -> bool:
    return len({tuple(part.shape[1:]) for part in parts}) == 1 and all(part.sizes[0] == part.shape[0] for part in parts)


def apart(x: Activation, y: Activation, *, same_layout: bool, same_order: bool) -> float | None:
    """How far apart two arrays are, relative to their norm; a lower bound of it where their layouts differ, or the
    order of samples. None where they have other sizes.

    Args:
        x: an array.
        y: another one.
        same_layout: whether equal shapes are of the same axes: of one framework.
        same_order: whether their samples are in one order.
    """
    if math.prod(x.shape) != math.prod(y.shape):
        return None
    norms = x.norm, y.norm
    if not all(map(math.isfinite, norms)):
        return 0.0 if not any(map(math.isfinite, norms)) else math.inf
    if max(norms) == 0:
        return 0.0
    found = list(_by_sketches(x, y, same_layout)) if same_order else []
    return min(found) if found else max(_by_sums(x, y, same_order))


def _by_sketches(x: Activation, y: Activation, same_layout: bool) -> Iterator[float]:
    """For each order of axes in which they may be the same; only that which they have, where that is known."""
    norm = max(x.norm, y.norm)
    here, there = orders(len(x.sizes)), orders(len(y.sizes))
    for i, a in enumerate(x.sketches):
        for j, b in enumerate(y.sketches):
            if (i and j) or (same_layout and i + j and x.sizes == y.sizes):
                continue
            if _ordered(x.sizes, here[i]) == _ordered(y.sizes, there[j]):
                yield _rms(a, b) / norm


def _ordered(sizes: tuple[int, ...], places: tuple[int, ...]) -> list[int]:
    return [sizes[places.index(k)] for k in range(len(sizes))]


def _by_sums(x: Activation, y: Activation, same_order: bool) -> Iterator[float]:
    """By what does not depend on some order, each at most the relative difference of the arrays.

    A sum of m terms differs at most by sqrt(m) times the norm of what these differ by (Cauchy and Schwarz), and a sum
    of squares by twice the product of the norms.
    """
    norm, size = max(x.norm, y.norm), math.prod(x.shape)
    (s, q), (t, r) = x.total, y.total
    yield abs(s - t) / (norm * math.sqrt(size))
    yield abs(q - r) / (2 * max(q, r))
    alike = x.sizes[0] == y.sizes[0]
    if alike and same_order and x.samples and y.samples:
        yield from _by_squares(x.samples, y.samples, norm, size / x.sizes[0])
    if x.sizes == y.sizes and x.pooled and y.pooled:
        yield from _by_squares(x.pooled, y.pooled, norm, x.sizes[0])


def _by_squares(x: Sequence[float], y: Sequence[float], norm: float, terms: float) -> Iterator[float]:
    yield _rms(x[:SUMS], y[:SUMS]) / (norm * math.sqrt(terms))
    squares = max(_rms(x[SUMS:]), _rms(y[SUMS:]))
    yield _rms(x[SUMS:], y[SUMS:]) / (2 * squares) if squares > 0 else 0.0


def _rms(x: Sequence[float], y: Sequence[float] | None = None) -> float:
    difference = np.asarray(x) - (0.0 if y is None else np.asarray(y))
    return float(np.sqrt(np.mean(np.square(difference))))


def called(own: Sequence[str], names: Names) -> str:
    """What the neutral names of a module's parameters, by their own, have in common, but for the last part: "1.norm" of
    "1.norm.scale". Empty if that is nothing, or if they have no other names."""
    neutral: list[str] = []
    for name in own:
        found = names(name) if callable(names) else (names or {}).get(name, name)
        neutral += [found] if isinstance(found, str) else found
    common = []
    for each in zip(*(name.split(".")[:-1] for name in neutral), strict=False):
        if len(set(each)) > 1:
            break
        common.append(each[0])
    return ".".join(common)
