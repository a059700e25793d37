"""Records what a run does, for `ada2ms trace`: any Optax transformation, in whatever surrounds it.

from ada2ms.jax import Recorder, recorded

with Recorder("run.trace", params, hyper={"lr": 1e-3}) as recorder:
    optimizer = recorded(optax.adamw(1e-3), recorder)
    ...                                    # init, jit, scan as ever: the state is that of optax.adamw
    for x, y in batches:
        recorder.batch(x, y)
        params, opt_state, loss = train_step(params, opt_state, x, y)
        recorder.loss(loss)
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]

from ada2ms.core.state import Axes, Extras, Names
from ada2ms.core.trace import Step, TraceError, Writer
from ada2ms.core.trace.model import Observed, empty_sketches, flattened, moving, observed, resolve
from ada2ms.core.trace.outputs import called
from ada2ms.core.trace.sketch import change
from ada2ms.core.trace.writer import DEFAULT_ENTRIES, DEFAULT_FLUSH, DEFAULT_FULL
from ada2ms.jax.host import call
from ada2ms.jax.names import by_path
from ada2ms.jax.outputs import Outputs, arrays_of, noted
from ada2ms.jax.sketches_cpu import unpacked

Hyper = Mapping[str, float | Callable[[int], Any]]
NEW_VALUE: Final = "new value"  # what of a tensor may be sketched in place of its update
_NAMES = {"learning_rate": "lr", "beta1": "b1", "beta2": "b2"}


class Recorder:
    """Writes a trace of a run while it goes on; a context manager, for one optimizer.

    Of every update: loss and batch, if told; hyperparameters, which Optax does not tell (but `inject_hyperparams`
    does); and of each parameter sketches of its value, of its gradient as the optimizer got it, and of the update, for
    the first steps with entries of the arrays themselves.

    Args:
        path: of the trace; one that is there is replaced.
        params: the parameters, or anything with their tree, shapes and types. A leaf's name here is its path,
            `"dense/kernel"`.
        names: the neutral name of a leaf, for each name here, as a mapping or a function; those left out keep their
            names. `plain_layers` has them, and the next two.
        axes: for a name here, how an array of the neutral layout is transposed to have this layout, or a function that
            cuts an array here into those of the neutral layout, which are then parameters of their own.
        extras: the neutral name of each leaf of `statistics`.
        statistics: what moves besides, as it is before the first step, such as `variables["batch_stats"]` or
            `nnx.state(model, nnx.BatchStat)`; then tell `recorder.statistics` after each step.
        hyper: what the optimizer was made with, by the names `lr`, `b1`, `b2`, `eps`, `weight_decay`, `adaptivity`
            and the like: numbers, or schedules of the count of completed updates, which a state from a checkpoint has.
            Where leaves have others (masks, `optax.multi_transform`, groups): a function that gives them for a leaf's
            name. With `max_norm`, gradients are recorded as Ada2MS clips them.
        optimizer: what it is called, such as "optax.adamw".
        full: of how many steps to keep entries of the arrays as well.
        entries: how many entries of each array; of larger ones a sample.
        flush: after how many steps to write; a run that is killed loses at most these.

    Raises:
        TraceError: names or axes do not fit.
        TypeError, ValueError: naming the argument, its value and what is allowed.
        FileExistsError: the path is of another kind of file.
    """

    def __init__(
        self,
        path: str | Path,
        params: Any,
        *,
        names: Names = None,
        axes: Axes = None,
        extras: Extras = None,
        statistics: Any = None,
        hyper: Hyper | Callable[[str], Hyper] | None = None,
        optimizer: str = "",
        full: int = DEFAULT_FULL,
        entries: int = DEFAULT_ENTRIES,
        flush: int = DEFAULT_FLUSH,
    ) -> None:
        leaves = by_path(params)
        shapes = {name: (tuple(x.shape), jnp.dtype(x.dtype).name, 0) for name, x in leaves.items()}
        self.parameters = resolve(shapes, names, axes)
        self._shapes = {name: shape for name, (shape, _, _) in shapes.items()}
        self._told: dict[str, dict[str, Any]] = {}
        for p in self.parameters:
            told = hyper(p.own) if callable(hyper) else hyper or {}
            self._told[p.own] = {_NAMES.get(name, name): value for name, value in told.items()}
        for own, each in self._told.items():
            for name, value in each.items():
                if not callable(value) and not isinstance(value, (int, float)):
                    where = f" of {own!r}" if callable(hyper) else ""
                    raise TypeError(f"Invalid hyper: {name!r}{where} is {value!r} (must be a number or a schedule)")
        self._writer = Writer(path if jax.process_index() == 0 else None, full=full, entries=entries, flush=flush)
        self.outputs = Outputs(full)
        self._about = _about(optimizer)
        start = by_path(statistics)
        self._statistics = moving({name: (x.shape, jnp.dtype(x.dtype).name) for name, x in start.items()}, extras, axes)
        self._start = self._observed(start)
        self._groups: list[tuple[dict[str, Any], str]] | None = None  # what each was told, and its label in a state
        self._full: dict[str, dict[str, Any]] = {}  # entries of what is there before the step that comes
        self._closed = False

    @property
    def entries(self) -> int:
        """How many entries of an array are kept."""
        return self._writer.entries

    @property
    def keeps_entries(self) -> bool:
        """Whether there are steps of which entries are kept."""
        return self._writer.full > 0

    def batch(self, *arrays: Any) -> None:
        """Notes the arrays of a batch, of the step that comes; within `jit` or `scan`, whenever it is run."""
        if _is_traced(arrays):
            call(self._take_batch, arrays)
        else:
            _wait()  # a step that was dispatched before is not the step that comes
            self._take_batch(arrays)

    def loss(self, loss: Any) -> None:
        """Notes the loss of the step that comes; or, if a step has had none, of the last. Within `jit` as `batch`."""
        if _is_traced(loss):
            call(self._take_loss, loss)
        else:
            _wait()
            self._take_loss(loss)

    def output(self, name: str, x: Any) -> None:
        """Notes an output of the forward pass of the step that comes, such as of a block, in the first `full` steps.

        It may be called wherever it is computed: in `__call__` of a module, within `jit`, `grad`, `scan`, `checkpoint`
        and `vmap` over samples. A compiled program goes on to ask the host for each whether it is wanted.

        Args:
            name: by which it is compared with that of another run; the second of a name in a step gets a number. The
                path of a module here, such as "blocks/0/norm", stands for the neutral name of its parameters.
            x: an array, or a tuple, list or dictionary of arrays.

        Raises:
            TraceError: within `shard_map` or `pmap` over several devices.
            TypeError: it has no arrays.
        """
        name = called([p.name for p in self.parameters if p.own.rpartition("/")[0] == name], None) or name
        if _is_traced(x):
            self.outputs.send(name, arrays_of(x))
        elif not self._closed and self._writer.is_full:
            _wait()
            self._writer.output(noted(name, arrays_of(x)))

    def _take_batch(self, arrays: Sequence[Any]) -> None:
        if not self._closed:
            self._writer.batch([np.asarray(x) for x in flattened(arrays)])

    def _take_loss(self, loss: Any) -> None:
        if not self._closed:
            self._writer.loss(lambda: float(loss), late=True)

    def statistics(self, statistics: Any) -> None:
        """Notes running statistics as the last step has left them; not within a compiled program."""
        _wait()
        leaves = by_path(statistics)
        if leaves.keys() != {p.own for p in self._statistics}:
            known = sorted({p.own for p in self._statistics})
            raise TraceError(f"Invalid statistics: {sorted(leaves)} (must be those of Recorder's statistics=: {known})")
        self._writer.statistics(lambda: self._observed(leaves))

    def _observed(self, leaves: Mapping[str, Any]) -> Observed:
        return observed(self._statistics, {name: np.array(x) for name, x in leaves.items()}, self.entries)

    def close(self) -> None:
        """Stops recording and writes what waits."""
        _wait()
        self._closed, self.outputs.is_open = True, False
        self._begin({})
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuses leaves of other shapes than the recorder was made with."""
        odd = [
            f"{name!r} has {x}, the recorder {self._shapes[name]}"
            for name, x in shapes.items()
            if x != self._shapes[name]
        ]
        if odd:
            raise TraceError(f"Leaves have other shapes: {'; '.join(odd)} (give it the parameters of the optimizer)")

    def wants_full(self) -> Any:
        """Whether the step that comes is to have entries of the arrays."""
        return np.bool_(not self._closed and self._writer.is_full)

    def take_entries(self, full: Any) -> None:
        """Notes entries of what is there before the step that comes; called by the compiled program."""
        if not self._closed:
            self._full = _entries(full)

    def take(
        self,
        missing: Collection[str],
        labels: Mapping[str, str],
        tensors: Sequence[str],
        rows: Any,
        hyper: Any,
        counts: Sequence[Any],
        full: Any = None,
    ) -> None:
        """Adds a step; called by the compiled program.

        Args:
            missing: names of leaves without a gradient.
            labels: of leaves whose hyperparameters an optimizer's state has apart from others'.
            tensors: those that are sketched; with NEW_VALUE the update is what was added to the value.
            rows: their sketches, (tensors, parameters, WIDTH), with squares of the norms; or as C++ gives them.
            hyper: what states hold, by label.
            counts: of completed updates, as states have them.
            full: entries of what the step did.
        """
        if self._closed:
            return
        count = max(map(int, counts), default=self._writer.count)
        self._begin(labels, is_started=count > self._writer.count)
        step = Step(0, empty_sketches(len(self.parameters)), np.zeros(len(self.parameters), bool))
        step.sketches |= _sketches(tensors, rows)
        step.full, self._full = {**self._full, **_entries(full or {})}, {}
        if NEW_VALUE in step.full:
            before, after = step.full["value"], step.full.pop(NEW_VALUE)
            step.full["update"] = {name: x - before[name] for name, x in after.items()}
        step.missing = np.array([p.own in missing for p in self.parameters], bool)
        for told, label in self._groups or ():
            given = {name: value(count) if callable(value) else value for name, value in told.items()}
            seen = {_NAMES.get(name, name): float(np.real(value)) for name, value in hyper.get(label, {}).items()}
            numbers = {name: float(x) for name, x in {**given, **seen}.items()}
            step.hyper.append({name: x for name, x in numbers.items() if math.isfinite(x)})
        step.clip_gradient(min((x["max_norm"] for x in step.hyper if "max_norm" in x), default=math.inf))
        if self._writer.is_due:  # before, since the loss of this one may come after it
            self._writer.flush()
        self._writer.add(step)
        self.outputs.step(step)

    def _begin(self, labels: Mapping[str, str], *, is_started: bool = False) -> None:
        """Writes what the trace is of, in the first step: which leaves have hyperparameters of their own."""
        if self._groups is not None:
            return
        groups: list[tuple[dict[str, Any], str]] = []
        for i, p in enumerate(self.parameters):
            group = self._told[p.own], labels.get(p.own, "")
            groups += [group] if group not in groups else []
            self.parameters[i] = replace(p, group=groups.index(group))
        self._groups = groups
        self._writer.begin(
            {**self._about, "started": is_started}, self.parameters, self._statistics or None, self._start
        )


def _sketches(tensors: Sequence[str], rows: Any) -> dict[str, Any]:
    found = dict(zip(tensors, np.array(unpacked(rows)), strict=True))
    with np.errstate(invalid="ignore"):
        for each in found.values():
            each[:, 0] = np.sqrt(each[:, 0])
    if NEW_VALUE in found:
        found["update"] = change(found["value"], found.pop(NEW_VALUE))
    return found


def _entries(full: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {what: {name: np.array(x) for name, x in arrays.items()} for what, arrays in full.items()}


def _is_traced(arrays: Any) -> bool:
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(arrays))


def _wait() -> None:
    """Until all callbacks of what was dispatched have run."""
    jax.effects_barrier()  # type: ignore[no-untyped-call]


def _about(optimizer: str) -> dict[str, Any]:
    return {
        "framework": "jax",
        "source": f"jax {jax.__version__} and optax {optax.__version__} on {jax.default_backend()}",
        "optimizer": optimizer or "an optax transformation",
        "matmul": str(jax.config.values.get("jax_default_matmul_precision") or "default"),
        "processes": jax.process_count(),
        "devices": jax.device_count(),
    }
