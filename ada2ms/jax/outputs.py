"""Outputs of a forward pass, for traces, from wherever they are computed: also within `jit`, `grad`, `scan`, `vmap`,
`checkpoint`.

Within a compiled program they leave it by ordered callbacks of `jax.debug`, since `io_callback` is refused by
`jax.checkpoint` and `vmap` and lost in the derivative of a `scan`. These have an order of their own, apart from that of
the callback that records a step. So the step sends a mark after them, and what is between two marks is of one step,
whichever comes first. Over several devices JAX has no ordered callbacks of `jax.debug`; there outputs are of the step
that is recorded next.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from ada2ms.core.trace import Step, TraceError
from ada2ms.core.trace.model import flattened
from ada2ms.core.trace.outputs import Output, activation, numbered
from ada2ms.jax.host import in_pieces


class Outputs:
    """The outputs that compiled programs send, and the steps that they are of.

    Args:
        full: of how many steps they are kept.
    """

    def __init__(self, full: int) -> None:
        self._full = full
        self._places = 0  # in programs, in the order in which they were traced
        self._sent: list[tuple[int, Output]] = []  # since the last mark
        self._marked: list[list[Output]] = []  # of each step
        self._steps: list[Step] = []
        self.is_open = True

    @property
    def is_traced(self) -> bool:
        """Whether any program sends outputs."""
        return self._places > 0

    def send(self, name: str, arrays: Sequence[jax.Array]) -> None:
        """Sends arrays to the host when the program is run, until so many steps have been recorded.

        Raises:
            TraceError: within `shard_map` or `pmap`, where each device has an array of its own.
        """
        mesh = jax.sharding.get_abstract_mesh()
        if any(mesh.shape[axis] > 1 for axis in mesh.manual_axes):
            raise TraceError("Outputs cannot be recorded within jax.shard_map or jax.pmap: tell them outside, in jit")
        self._places += 1
        _sender(self._wanted, partial(self._take, self._places, name))(*map(jax.lax.stop_gradient, arrays))

    def mark(self) -> None:
        """Says when the program is run that all outputs of a step have been sent."""
        if self.is_traced and _is_ordered():
            jax.debug.callback(self._end, ordered=True)

    def step(self, step: Step) -> None:
        """Takes a step that is recorded, to put its outputs in when they are all there."""
        if len(self._steps) < self._full:
            self._steps.append(step)
            if not _is_ordered() and self.is_traced:
                self._end()
            self._join()

    def _wanted(self) -> Any:
        return np.bool_(self.is_open and len(self._marked) < self._full)

    def _take(self, place: int, name: str, *arrays: Any) -> None:
        if self.is_open and len(self._marked) < self._full:
            self._sent.append((place, noted(name, arrays)))

    def _end(self) -> None:
        found: list[Output] = []
        sent = self._sent if _is_ordered() else sorted(self._sent, key=lambda each: each[0])
        for _, each in sent:
            found.append(Output(numbered(each.name, found), each.arrays))
        self._sent = []
        if len(self._marked) < self._full:
            self._marked.append(found)
            self._join()

    def _join(self) -> None:
        for step, outputs in zip(self._steps, self._marked, strict=False):
            step.outputs += [each for each in outputs if not any(each is known for known in step.outputs)]


def _is_ordered() -> bool:
    return jax.device_count() == 1


def _sender(wanted: Callable[[], Any], take: Callable[..., None]) -> Callable[..., Any]:
    """A function of arrays, of samples together where it is called under `vmap` for each."""

    @jax.custom_batching.custom_vmap
    def send(*arrays: jax.Array) -> Any:
        def go(*arrays: jax.Array) -> int:
            whole, pieces = in_pieces(take, *arrays)
            jax.debug.callback(whole, *pieces, ordered=_is_ordered())
            return 0

        # Pure, since an effect would be refused as those of io_callback; nothing follows from when it is called.
        is_wanted = jax.pure_callback(wanted, np.bool_(False))
        return jax.lax.cond(is_wanted, go, lambda *_: 0, *arrays)

    @send.def_vmap
    def _(size: int, batched: list[bool], *arrays: jax.Array) -> Any:
        return _sender(wanted, take)(*arrays), False

    return send


def noted(name: str, arrays: Sequence[Any]) -> Output:
    """An output of arrays that have values."""
    return Output(name, [activation(np.asarray(x)) for x in arrays])


def arrays_of(x: Any) -> list[Any]:
    """The arrays of what a user gives."""
    found = [each for each in flattened([x]) if hasattr(each, "shape") or isinstance(each, (int, float))]
    if not found:
        raise TypeError(f"Invalid x: {type(x).__name__} (must be an array, or a tuple, list or dictionary of arrays)")
    return found
