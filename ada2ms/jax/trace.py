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
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]
from jax.experimental import io_callback

from ada2ms.core.state import Axes, Extras, Names
from ada2ms.core.trace import Parameter, Step, TraceError, Writer
from ada2ms.core.trace.model import Observed, empty_sketches, flattened, moving, observed, positions, resolve
from ada2ms.core.trace.writer import DEFAULT_ENTRIES, DEFAULT_FLUSH, DEFAULT_FULL
from ada2ms.jax.injected import injected
from ada2ms.jax.names import by_path
from ada2ms.jax.order import comes_from_counts, counted_after, in_one_order
from ada2ms.jax.sketches import sketches

Hyper = Mapping[str, float | Callable[[int], Any]]
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
            and the like: numbers, or schedules of the count of completed updates. Where leaves have others (masks,
            `optax.multi_transform`, groups): a function that gives them for a leaf's name. With `max_norm`, gradients
            are recorded as Ada2MS clips them.
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
        self._about = _about(optimizer)
        start = by_path(statistics)
        self._statistics = moving({name: (x.shape, jnp.dtype(x.dtype).name) for name, x in start.items()}, extras, axes)
        self._start = self._observed(start)
        self._groups: list[tuple[dict[str, Any], str]] | None = None  # what each was told, and its label in a state
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
            io_callback(self._take_batch, None, arrays, ordered=True)
        else:
            _wait()  # a step that was dispatched before is not the step that comes
            self._take_batch(arrays)

    def loss(self, loss: Any) -> None:
        """Notes the loss of the step that comes; or, if a step has had none, of the last. Within `jit` as `batch`."""
        if _is_traced(loss):
            io_callback(self._take_loss, None, loss, ordered=True)
        else:
            _wait()
            self._take_loss(loss)

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
        self._closed = True
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
        return np.bool_(not self._closed and self._writer.count < self._writer.full)

    def take(
        self,
        missing: Collection[str],
        labels: Mapping[str, str],
        tensors: Sequence[str],
        rows: Any,
        hyper: Any,
        full: Any = None,
    ) -> None:
        """Adds a step; called by the compiled program.

        Args:
            missing: names of leaves without a gradient.
            labels: of leaves whose hyperparameters an optimizer's state has apart from others'.
            tensors: those that are sketched, values, gradients and updates.
            rows: their sketches, (tensors, parameters, WIDTH), with squares of the norms.
            hyper: what states hold, by label.
            full: entries of the arrays.
        """
        if self._closed:
            return
        self._begin(labels)
        count = self._writer.count
        step = Step(0, empty_sketches(len(self.parameters)), np.zeros(len(self.parameters), bool))
        for what, found in zip(tensors, np.array(rows, np.float64), strict=True):
            with np.errstate(invalid="ignore"):
                found[:, 0] = np.sqrt(found[:, 0])
            step.sketches[what] = found
        step.missing = np.array([p.own in missing for p in self.parameters], bool)
        for told, label in self._groups or ():
            given = {name: value(count) if callable(value) else value for name, value in told.items()}
            seen = {_NAMES.get(name, name): float(np.real(value)) for name, value in hyper.get(label, {}).items()}
            numbers = {name: float(x) for name, x in {**given, **seen}.items()}
            step.hyper.append({name: x for name, x in numbers.items() if math.isfinite(x)})
        for what, arrays in (full or {}).items():
            step.full[what] = {name: np.array(x) for name, x in arrays.items()}
        step.clip_gradient(min((x["max_norm"] for x in step.hyper if "max_norm" in x), default=math.inf))
        if self._writer.is_due:  # before, since the loss of this one may come after it
            self._writer.flush()
        self._writer.add(step)

    def _begin(self, labels: Mapping[str, str]) -> None:
        """Writes what the trace is of, in the first step: which leaves have hyperparameters of their own."""
        if self._groups is not None:
            return
        groups: list[tuple[dict[str, Any], str]] = []
        for i, p in enumerate(self.parameters):
            group = self._told[p.own], labels.get(p.own, "")
            groups += [group] if group not in groups else []
            self.parameters[i] = replace(p, group=groups.index(group))
        self._groups = groups
        self._writer.begin(self._about, self.parameters, self._statistics or None, self._start)


def recorded(optimizer: optax.GradientTransformation, recorder: Recorder) -> optax.GradientTransformationExtraArgs:
    """A transformation that does what another does and records each update; its state is the other's.

    It works under `jax.jit`, also with sharded arrays and donated buffers, in `lax.scan` and `lax.cond`, and around
    `optax.MultiSteps` (not within it, which calls its optimizer in every step): then updates are recorded, each with
    the gradient that was accumulated.

    Args:
        optimizer: any.
        recorder: takes the updates; after it is closed, the transformation goes on without it.

    Raises:
        TraceError: when it is traced, if the leaves are not those of the recorder, or under `vmap`, or within
            `shard_map` and `pmap` over several devices.
    """
    inner = optax.with_extra_args_support(optimizer)

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        def update(state: Any) -> Any:
            return inner.update(updates, state, params, **extra_args)

        if not isinstance(state, optax.MultiStepsState):
            with in_one_order():
                return _in_order(_Traced(recorder, params, updates), update, state)
        new_updates, new_state = update(state)

        def send(_: Any) -> None:
            mean = getattr(optimizer, "_use_grad_mean", True)
            whole = jax.tree.map(
                lambda acc, g: acc + (g - acc) / (state.mini_step + 1) if mean else acc + g, state.acc_grads, updates
            )
            _Traced(recorder, params, whole).send(new_updates, new_state)

        with in_one_order():
            jax.lax.cond(new_state.gradient_step != state.gradient_step, send, lambda _: None, 0)
        return new_updates, new_state

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def _in_order(traced: "_Traced", update: Callable[[Any], Any], state: Any) -> Any:
    """What an update gives, which is recorded in an order that needs little memory.

    New parameters are written over the old; unless these have been sketched before, they are copied first. And for its
    sketch an update has to be an array, which it is not otherwise, since it is computed where it is added to a
    parameter. A CPU takes longer to get new memory than to compute what most optimizers compute. So there updates are
    computed for their sketches alone, in memory that is used for one after the other, and once more for the parameters.
    """
    is_simple = comes_from_counts(update, state)
    if is_simple and jax.default_backend() == "cpu":
        alone, its_state = update(state)
        return update(counted_after(state, *traced.send(alone, its_state, in_turn=True)))
    if is_simple:
        state = counted_after(state, *traced.read)
    new_updates, new_state = update(state)
    traced.send(new_updates, new_state)
    return new_updates, new_state


class _Traced:
    """What a program records of a step: first of what is there before, then of the updates."""

    def __init__(self, recorder: Recorder, params: Any, gradients: Any) -> None:
        self._recorder = recorder
        trees = {"gradient": gradients} if params is None else {"value": params, "gradient": gradients}
        self._found = {what: sketches(self._known(tree), recorder.parameters) for what, tree in trees.items()}
        self.read = [found.rows for found in self._found.values()]  # known when values and gradients have been read

    def send(self, updates: Any, state: Any, *, in_turn: bool = False) -> list[jax.Array]:
        """Takes it all to the host.

        Args:
            updates: of the optimizer.
            state: after the step.
            in_turn: whether these updates are computed to be recorded alone.

        Returns:
            Numbers that are known when all has been read.
        """
        recorder = self._recorder
        found = {**self._found, "update": sketches(self._known(updates), recorder.parameters, in_turn=in_turn)}
        rows = jnp.stack([each.rows for each in found.values()])
        labels, hyper = injected(state, [p.own for p in recorder.parameters])
        missing = {p.own for p in recorder.parameters} - set(found["gradient"].arrays)
        take = partial(recorder.take, missing, labels, list(found))
        if not recorder.keeps_entries:
            io_callback(take, None, rows, hyper, ordered=True)
            return [rows]
        # Those of what is computed in turn are taken in turn as well, for else all of it would have to be kept.
        taken = {"update": self._entries(found["update"].arrays)} if in_turn else {}

        def with_entries(_: Any) -> Any:
            full = {what: taken.get(what) or self._entries(each.arrays) for what, each in found.items()}
            io_callback(take, None, rows, hyper, full, ordered=True)
            return rows[0, 0, 0]

        def without(_: Any) -> Any:
            io_callback(take, None, rows, hyper, ordered=True)
            return jnp.zeros((), rows.dtype)  # what is known only when one of both has been run

        wanted = io_callback(recorder.wants_full, np.bool_(False), ordered=True)
        return [rows, jax.lax.cond(wanted, with_entries, without, 0)]

    def _entries(self, arrays: Mapping[str, Any]) -> dict[str, jax.Array]:
        each = [p for p in self._recorder.parameters if p.own in arrays]
        return {p.name: _entries(arrays[p.own], p, self._recorder.entries) for p in each}

    def _known(self, tree: Any) -> dict[str, Any]:
        """The leaves by their names, which the recorder knows."""
        leaves = by_path(tree)
        if strange := sorted(set(leaves) - {p.own for p in self._recorder.parameters}):
            raise TraceError(
                f"The recorder does not know these leaves: {strange} (give it the parameters of the optimizer)"
            )
        self._recorder.check({name: tuple(x.shape) for name, x in leaves.items()})
        return leaves


def _own(x: Any, parameter: Parameter) -> Any:
    return x if parameter.part is None else parameter.part.take(x, jnp)


def _entries(x: Any, parameter: Parameter, limit: int) -> jax.Array:
    """As `ada2ms.core.trace.model.sample`."""
    x = _own(x, parameter)
    if parameter.axes is not None:
        x = x.transpose(np.argsort(parameter.axes))
    if jnp.iscomplexobj(x):
        x = jnp.stack([x.real, x.imag], -1)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    kept: jax.Array = x if x.size <= limit else x.reshape(-1)[positions(x.size, limit)]
    return kept


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
