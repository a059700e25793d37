"""An Optax transformation that is recorded: what its compiled program reads of a step, in which order."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]
from jax.experimental import io_callback

from ada2ms.core.trace import Parameter, TraceError
from ada2ms.core.trace.model import positions
from ada2ms.jax import sketches, sketches_cpu
from ada2ms.jax.host import call
from ada2ms.jax.injected import counts, injected
from ada2ms.jax.names import by_path
from ada2ms.jax.order import counted_after, in_one_order, may_ask
from ada2ms.jax.trace import NEW_VALUE, Recorder


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
                return _in_order(recorder, params, updates, update, state)
        new_updates, new_state = update(state)

        def send(_: Any) -> None:
            mean = getattr(optimizer, "_use_grad_mean", True)
            whole = jax.tree.map(
                lambda acc, g: acc + (g - acc) / (state.mini_step + 1) if mean else acc + g, state.acc_grads, updates
            )
            _Traced(recorder, params, whole, state).send(new_updates, new_state)

        with in_one_order():
            jax.lax.cond(new_state.gradient_step != state.gradient_step, send, lambda _: None, 0)
        return new_updates, new_state

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def _in_order(recorder: Recorder, params: Any, gradients: Any, update: Callable[[Any], Any], state: Any) -> Any:
    """What an update gives, recorded in an order that needs no copies.

    New parameters are written over the old; unless these have been read before, they are copied first.
    """
    traced = _Traced(recorder, params, gradients, state)
    new_updates, new_state = update(counted_after(state, *traced.read))
    traced.send(new_updates, new_state)
    return new_updates, new_state


class _Traced:
    """What a program records of a step: first of what is there before, then of what the step does."""

    def __init__(self, recorder: Recorder, params: Any, gradients: Any, state: Any) -> None:
        self._recorder = recorder
        self._counts = counts(state)
        trees = {"gradient": gradients} if params is None else {"value": params, "gradient": gradients}
        self._before = {what: self._known(tree) for what, tree in trees.items()}
        self._in_cpp = params is not None and sketches_cpu.is_available(self._before.values())
        self._rows = {what: self._sums(arrays) for what, arrays in self._before.items()}
        self.read: list[Any] = [*self._rows.values()]  # known when all that is there before has been read
        self._is_full: Any = None
        if recorder.keeps_entries and may_ask():
            wanted = io_callback(recorder.wants_full, np.bool_(False), ordered=True)
            self._is_full = jax.lax.cond(wanted, self._send_entries, lambda: False)
            self.read.append(self._is_full)

    def _sums(self, arrays: Mapping[str, Any]) -> jax.Array:
        return (sketches_cpu.sums if self._in_cpp else sketches.sums)(arrays, self._recorder.parameters)

    def _send_entries(self) -> bool:
        full = {what: self._entries(arrays) for what, arrays in self._before.items()}
        call(self._recorder.take_entries, full)
        return True

    def send(self, updates: Any, state: Any) -> None:
        """Takes it all to the host.

        What C++ reads has to be an array, which an update is not: it is computed where it is added to a parameter. So
        it reads the new value, as the user is going to compute it, and the program computes it once.

        Args:
            updates: of the optimizer.
            state: after the step.
        """
        recorder = self._recorder
        recorder.outputs.mark()
        what, arrays = "update", self._known(updates)
        if self._in_cpp:
            values = self._before["value"]
            what, arrays = NEW_VALUE, {name: optax.apply_updates(values[name], x) for name, x in arrays.items()}
        rows = jnp.stack([*self._rows.values(), self._sums(arrays)])
        labels, hyper = injected(state, [p.own for p in recorder.parameters])
        missing = {p.own for p in recorder.parameters} - set(self._before["gradient"])
        take = partial(recorder.take, missing, labels, [*self._rows, what])

        def with_entries() -> None:
            call(take, rows, hyper, self._counts, {what: self._entries(arrays)})

        def without() -> None:
            call(take, rows, hyper, self._counts)

        if self._is_full is None:
            without()
        else:
            jax.lax.cond(self._is_full, with_entries, without)

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


def _entries(x: Any, parameter: Parameter, limit: int) -> jax.Array:
    """As `ada2ms.core.trace.model.sample`."""
    x = parameter.of(x, jnp)
    if parameter.axes is not None:
        x = x.transpose(np.argsort(parameter.axes))
    if jnp.iscomplexobj(x):
        x = jnp.stack([x.real, x.imag], -1)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    kept: jax.Array = x if x.size <= limit else x.reshape(-1)[positions(x.size, limit)]
    return kept
