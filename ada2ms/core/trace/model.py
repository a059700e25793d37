"""What a trace is: parameters by neutral names, and steps."""

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

import numpy as np

from ada2ms.core.state import Axes, Extras, Names
from ada2ms.core.state.layout import layouts
from ada2ms.core.trace import file
from ada2ms.core.trace.file import TraceError
from ada2ms.core.trace.outputs import Output
from ada2ms.core.trace.parts import Part, cut
from ada2ms.core.trace.sketch import SUMS, WIDTH, Array, reals, sketch

TENSORS: Final = ("value", "gradient", "update")  # of each parameter: before the step, as the optimizer got it, after
STATISTICS: Final = "statistics"  # of each of these: what the forward pass of the step left


@dataclass(frozen=True)
class Parameter:
    """A parameter that is traced.

    Attributes:
        name: neutral, by which traces are compared.
        own: the framework's.
        shape: in the neutral layout.
        dtype: by name, such as "float32".
        axes: for each axis of the framework's layout, which axis of the neutral layout it is; None if they are equal.
        group: which of the hyperparameters are its own.
        part: where it is in the framework's array, if it is but a part of it; not in the file.
    """

    name: str
    own: str
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[int, ...] | None = None
    group: int = 0
    part: Part | None = field(default=None, compare=False, repr=False)

    def data(self) -> dict[str, Any]:
        """What a file has of it."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "part"}

    def of(self, array: Any, numpy: Any = np) -> Any:
        """What of a framework's array, as one of NumPy or of a library that has its functions, is this parameter's."""
        return array if self.part is None else self.part.take(array, numpy)

    @property
    def size(self) -> int:
        """Entries, those of complex parameters counted as pairs."""
        return math.prod(self.shape) * (2 if self.dtype.startswith("complex") else 1)


@dataclass
class Step:
    """One update.

    Attributes:
        number: counted from 1.
        sketches: of each of TENSORS, (parameters, WIDTH); NaN where there is none, such as for a missing gradient. Of
            STATISTICS, (statistics, WIDTH), where they are recorded.
        missing: which parameters had no gradient.
        loss: as the user told; the mean if it was told several times.
        losses: how often it was told.
        batches: fingerprints of the arrays of each batch.
        hyper: hyperparameters of each group, by neutral names.
        skipped: whether the step was one that the optimizer left out.
        extra: other numbers, such as the scale of the loss.
        full: of each of TENSORS, entries of parameters by their names: all, or a sample of `positions`; and so of
            STATISTICS.
        outputs: of the forward pass, in the order in which they were computed; of the first steps, where they are
            recorded.
    """

    number: int
    sketches: dict[str, Array]
    missing: Array
    loss: float | None = None
    losses: int = 0
    batches: list[list[list[float]]] = field(default_factory=list)
    hyper: list[dict[str, float]] = field(default_factory=list)
    skipped: bool = False
    extra: dict[str, float] = field(default_factory=dict)
    full: dict[str, dict[str, Array]] = field(default_factory=dict)
    outputs: list[Output] = field(default_factory=list)

    def clip_gradient(self, max_norm: float, norm: float | None = None) -> None:
        """Scales what there is of the gradient as an optimizer does that clips by the norm of the whole model, so that
        it is recorded as the rule gets it, wherever a run clips.

        Args:
            max_norm: the norm to clip to; nothing is done where it is infinite.
            norm: of the gradient; by default, of what was recorded.
        """
        rows = self.sketches["gradient"]
        norm = math.sqrt(np.nansum(np.square(rows[:, 0]))) if norm is None else norm
        if norm > max_norm:
            scale = max_norm / norm
            rows *= scale
            if "gradient" in self.full:
                self.full["gradient"] = {name: x * scale for name, x in self.full["gradient"].items()}


Observed = tuple[Array, dict[str, Array]]  # sketches, and entries by name


@dataclass
class Trace:
    """A trace as it was read.

    Attributes:
        path: of the file.
        about: framework, source, optimizer, and whatever else the recorder knows of the run.
        parameters: in the optimizer's order.
        steps: as far as they were written.
        complete: whether the recorder was closed; a run that was killed leaves its trace open.
        statistics: what moves and is no parameter, such as running means; None where they were not recorded.
        start: a step that has nothing but the statistics before the first forward pass.
    """

    path: Path
    about: dict[str, Any]
    parameters: list[Parameter]
    steps: list[Step]
    complete: bool
    statistics: list[Parameter] | None = None
    start: Step | None = None

    @property
    def index(self) -> dict[str, int]:
        """The place of each parameter by its neutral name."""
        return {p.name: i for i, p in enumerate(self.parameters)}

    @classmethod
    def load(cls, path: str | Path) -> "Trace":
        """Reads a trace, also of a run that goes on or was killed: as far as it was written.

        Raises:
            FileNotFoundError: there is no such file.
            TraceError: it is no trace, of another version, or damaged.
        """
        path = Path(path)
        try:
            return cls._read(path)
        except (KeyError, TypeError, AttributeError, IndexError, json.JSONDecodeError) as error:
            reason = f"what is written in it is not what a trace has ({type(error).__name__}: {error})"
            raise TraceError(f"Cannot read {str(path)!r}: {reason}") from error

    @classmethod
    def _read(cls, path: Path) -> "Trace":
        about: dict[str, Any] | None = None
        steps: list[Step] = []
        complete = False
        for chunk in file.read(path):
            if isinstance(chunk, int):  # bytes of a flush that was cut off
                break
            content, tensors = chunk
            if about is None:
                about, before = content, tensors
                continue
            steps += _steps(content["steps"], tensors)
            complete = content["complete"]
        if about is None:
            raise TraceError(f"Cannot read {str(path)!r}: the run ended before anything of it was written")
        parameters = _parameters(about.pop("parameters"))
        if STATISTICS not in about:
            return cls(path, about, parameters, steps, complete)
        statistics, start = _parameters(about.pop(STATISTICS)), Step(0, {STATISTICS: before[STATISTICS]}, np.empty(0))
        start.full = _full(before).get(0, {})
        return cls(path, about, parameters, steps, complete, statistics, start)


def _parameters(data: list[dict[str, Any]]) -> list[Parameter]:
    return [Parameter(**{**p, "shape": tuple(p["shape"]), "axes": p["axes"] and tuple(p["axes"])}) for p in data]


def _full(tensors: dict[str, Array]) -> dict[int, dict[str, dict[str, Array]]]:
    """Entries of tensors, by step, what they are of each parameter, and its name."""
    full: dict[int, dict[str, dict[str, Array]]] = {}
    for key, array in tensors.items():
        if key.startswith("full/"):
            _, number, what, name = key.split("/", 3)
            full.setdefault(int(number), {}).setdefault(what, {})[name] = array
    return full


def _steps(contents: list[dict[str, Any]], tensors: dict[str, Array]) -> list[Step]:
    full, steps = _full(tensors), []
    for i, content in enumerate(contents):
        sketches = {what: tensors[what][i].astype(np.float64) for what in TENSORS}
        if STATISTICS in tensors and not np.isnan(tensors[STATISTICS][i]).all():  # those that were told
            sketches[STATISTICS] = tensors[STATISTICS][i]
        outputs = [Output.of(each) for each in content.pop("outputs", [])]  # which old traces have not
        full_of_step = full.get(content["number"], {})
        missing = tensors["missing"][i]
        steps.append(Step(sketches=sketches, missing=missing, full=full_of_step, outputs=outputs, **content))
    return steps


def resolve(
    shapes: Mapping[str, tuple[Sequence[int], str, int]], names: Names, axes: Axes, others: Collection[str] = ()
) -> list[Parameter]:
    """Parameters by neutral names and in the neutral layout; an array that is several in a state is several here.

    Args:
        shapes: by the framework's names: shape, dtype and group.
        names: the neutral name of each of the framework's names; those left out are the same in both.
        axes: for a framework's name, how an array of the neutral layout is transposed to have the framework's; or a
            function that cuts the framework's array into those of the neutral layout.
        others: parameters of the model that the optimizer is not over: names and axes for them are ignored.

    Raises:
        TraceError: names or axes are of parameters that do not exist, or do not fit.
    """
    found, problems = layouts(
        {own: tuple(map(int, shape)) for own, (shape, _, _) in shapes.items()}, names, axes, others
    )
    if problems:
        raise TraceError("\n  - ".join(["The parameters cannot be traced:", *problems]))
    parameters = []
    for own, (_, dtype, group) in shapes.items():
        layout = found[own]
        if callable(layout.axes):
            parameters += [Parameter(name, own, part.shape, dtype, None, group, part) for name, part in cut(layout)]
        else:
            parameters.append(Parameter(layout.names[0], own, layout.shapes()[0], dtype, layout.axes, group))
    return parameters


def moving(shapes: Mapping[str, tuple[Sequence[int], str]], extras: Extras, axes: Axes) -> list[Parameter]:
    """What moves and is no parameter, by neutral names and in the neutral layout.

    Args:
        shapes: by the framework's names: shape and dtype.
        extras: the neutral name of each of the framework's names, also of what is not in `shapes`.
        axes: as for `resolve`, also of what is not in `shapes`.

    Raises:
        TraceError: they do not fit.
    """
    names = {name: called for name, called in (extras or {}).items() if name in shapes}
    own = {name: order for name, order in (axes or {}).items() if name in shapes}
    return resolve({name: (shape, dtype, 0) for name, (shape, dtype) in shapes.items()}, names, own)


def observed(parameters: Sequence[Parameter], arrays: Mapping[str, Any], limit: int) -> Observed:
    """The sketches of arrays of NumPy, given by their own names, and entries of them by their neutral names."""
    rows = [sketch(p.of(arrays[p.own]), p.axes) for p in parameters]
    return np.array(rows).reshape(-1, WIDTH), {p.name: sample(arrays[p.own], p, limit) for p in parameters}


def positions(size: int, limit: int) -> Array:
    """Which entries of a flattened tensor a trace keeps: all up to the limit, else as many, evenly spread."""
    return np.arange(min(size, limit), dtype=np.int64) * size // max(min(size, limit), 1)


def sample(array: Any, parameter: Parameter, limit: int) -> Array:
    """Entries of a tensor in the neutral layout: the tensor if it has at most `limit`, else a flat sample.

    Args:
        array: of the framework's layout; of a part, that of which it is one.
        parameter: which it is of.
        limit: how many entries.
    """
    array = parameter.of(np.asarray(array))
    if parameter.axes is not None:
        array = array.transpose(np.argsort(parameter.axes))
    x = reals(array)
    x = x.astype(np.result_type(x, np.float32), copy=False)
    return x if x.size <= limit else x.reshape(-1)[positions(x.size, limit)]


def flattened(arrays: Iterable[Any]) -> Iterator[Any]:
    """The arrays of a batch: of dictionaries by the order of their keys, and of tuples and lists of arrays."""
    for x in arrays:
        if isinstance(x, Mapping):
            yield from flattened(x[key] for key in sorted(x, key=str))
        elif isinstance(x, (tuple, list)) and any(hasattr(y, "shape") or isinstance(y, Mapping) for y in x):
            yield from flattened(x)
        elif x is not None:
            yield x


FINGERPRINT: Final = 4 + 2 * SUMS + WIDTH  # numbers of a fingerprint


def fingerprint(array: Any) -> list[float]:
    """What is left of an array of a batch: size, samples, sum and sum of squares of all; for the sums, and the sums of
    squares, of its samples along the first axis, 8 signed sums each; and its sketch.

    So it shows whether batches are equal, are equal but for the order of axes within a sample, or hold the same numbers
    in another order.
    """
    x = np.asarray(array)
    if x.dtype.kind in "OSU":
        raise TypeError(f"Invalid batch: {array!r:.80} (must be arrays of numbers, or dictionaries or lists of them)")
    x = reals(x)
    x = x.astype(np.result_type(x, np.float32), copy=False)
    n = x.shape[0] if x.ndim else 1
    rows = x.reshape(n, math.prod(x.shape[1:]))
    with np.errstate(invalid="ignore", over="ignore"):
        sums, squares = rows.sum(1, dtype=np.float64), np.einsum("ij,ij->i", rows, rows, dtype=np.float64)
    by_sample = [*sketch(sums)[1:], *sketch(squares)[1:]]
    return [float(v) for v in (x.size, n, sums.sum(), squares.sum(), *by_sample, *sketch(x))]


def empty_sketches(count: int) -> dict[str, Array]:
    """Sketches of nothing: NaN."""
    return {what: np.full((count, WIDTH), np.nan) for what in TENSORS}
