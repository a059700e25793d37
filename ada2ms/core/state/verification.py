"""Whether an optimizer goes on as the run would have: it makes recorded steps again, and comes out where they did.

The steps are elementwise but for a few sums, so they show everything of the optimizer: its code, hyperparameters, state
and counts. They do not show where arrays belong in the model: an order of gates that is wrong on the way in is wrong on
the way out, too. That shows in gradients of the model here, which are compared if they can be computed.

Bounds. Two right implementations differ by how they round, in the precision `eps` of what they compute in:

- The sum of all squares is taken in another order, and powers are not rounded correctly. Both change a step by a factor
  that is within 4096 `eps` of 1, so that much of the move is allowed: 9e-13 of it in float64, 5e-4 in float32.
- In each step a value is rounded twice, by half an `eps` of it, in either implementation. That is 2 `eps`; twice as
  much is allowed for every step. Of values of 16 bits it is the `eps` of their type. Moments have 16 times as much,
  since 1 - beta, and the factor of gradients that are clipped, are rounded as well.

Where this is more than a quarter of the move, in every tensor, nothing can be told.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from math import isfinite
from typing import Any, Final, NamedTuple

import numpy as np

from ada2ms.core.state.compensation import whole
from ada2ms.core.state.errors import StateError
from ada2ms.core.state.fit import Target, Verification, holds
from ada2ms.core.state.layout import Axes, Layout, Names, arranged, joined_name, layouts
from ada2ms.core.state.model import Array, Entry, Group, State
from ada2ms.core.state.receipt import Step

_OF_MOVE: Final = 4096.0
_OF_VALUE: Final = {"param": 4.0, "exp_avg": 64.0, "exp_avg_sq": 64.0, "global_exp_avg_sq": 64.0}  # for each step
_WORDS: Final = {
    "exp_avg": "the first moment",
    "exp_avg_sq": "the second moment",
    "global_exp_avg_sq": "the global second moment",
    "param": "the value",
}
_EPS: Final = {"bfloat16": 2.0**-7, "float16": 2.0**-10}
_UNSEEN: Final = "that arrays are where the model reads them shows only with gradients="


class RecordedStep(NamedTuple):
    """A step as a framework makes it: gradients by its names and in its layout; what has none is not there."""

    number: int
    gradients: dict[str, Array]
    step: Step

    def compare(self, found: Mapping[str, Array | None]) -> None:
        """Compares the gradients of the model here, by the framework's names, with those recorded.

        Backpropagation has half of the digits: gradients may differ by sqrt(eps) of the model's largest.

        Raises:
            StepLostError: they are others.
        """
        largest = max((float(np.abs(g).max(initial=0)) for g in self.gradients.values()), default=0.0)
        for name, g in self.gradients.items():
            here = found.get(name)
            if here is None or here.shape != g.shape:
                what = "has none" if here is None else f"has one of {here.shape}"
                raise StepLostError(
                    f"the model here {what} for {name!r} in step {self.number}, where {g.shape} is recorded"
                )
            bound = max(_precision(here), _precision(g)) ** 0.5 * largest
            error = _error(here, g)
            if not error <= bound:
                raise StepLostError(
                    f"the gradient of {name!r} of the model here differs in step {self.number} by {error:.1e} from "
                    f"that recorded (bound {bound:.1e}): another batch or model, or arrays that went to a wrong place"
                )


class Transfer(NamedTuple):
    """How a framework puts a state into a model and an optimizer, and makes one of them.

    Attributes:
        begin: `import_state`.
        end: `export_state`.
        names: for both.
        axes: for both.
        cast: for `begin`.
    """

    begin: Callable[..., Any]
    end: Callable[..., State]
    names: Names
    axes: Axes
    cast: bool

    def into(self, model: Any, optimizer: Any, state: State) -> Any:
        return self.begin(model, optimizer, state, names=self.names, axes=self.axes, cast=self.cast)

    def out_of(self, model: Any, optimizer: Any) -> State:
        return self.end(model, optimizer, names=self.names, axes=self.axes)


class StepLostError(Exception):
    """A step is not as it was recorded."""


Replay = Callable[[State, Sequence[RecordedStep]], State]


def verified(
    state: State,
    verify: int,
    replay: Replay | str,
    targets: Mapping[str, Target],
    transfer: Transfer,
    *,
    others: Collection[str] = (),
    with_gradients: bool = False,
) -> Verification | None:
    """What replaying a state's receipt shows; None if that is not wanted.

    Args:
        state: that fits.
        verify: at least how many steps there must be; all that there are will be replayed. 0: none is wanted.
        replay: puts the state into copies, makes the steps by the optimizer's own code, and exports what comes out; or
            why it cannot.
        targets: as for `from_portable`.
        transfer: of the framework.
        others: as for `from_portable`.
        with_gradients: whether the steps compare gradients of the model here.
    """
    if not verify:
        return None
    reason = replay if isinstance(replay, str) else _reason(state, verify)
    if reason or state.receipt is None or isinstance(replay, str):
        return Verification("cannot be verified", reason)
    start, recorded = state.receipt.start, state.receipt.steps
    shapes = {name: target.shape for name, target in targets.items()}
    try:
        found, _ = layouts(shapes, transfer.names, transfer.axes, others)
        steps = [RecordedStep(i, _gradients_here(step, start, found), step) for i, step in enumerate(recorded, 1)]
        after = replay(start, steps)
    except StateError as error:
        return Verification("cannot be verified", "; ".join(error.problems))
    except StepLostError as error:
        return Verification("lost", str(error))
    comparison = _Comparison(state, after, len(steps), _storage(state, targets))
    return comparison.verification("" if with_gradients else f" ({_UNSEEN})")


def check_verify(verify: Any) -> None:
    """Raises unless `verify` is a number of steps."""
    if isinstance(verify, bool) or not isinstance(verify, int):
        raise TypeError(f"Invalid verify: {verify!r} (must be an integer, at least 0)")
    if verify < 0:
        raise ValueError(f"Invalid verify: {verify!r} (must be an integer, at least 0)")


def portable_gradients(
    gradients: Mapping[str, Array], names: Names, axes: Axes, others: Collection[str] = ()
) -> dict[str, Array]:
    """Gradients of a framework by the state's names and in its layout, for a receipt.

    Args:
        gradients: by the framework's names; at least in float32.
        names: as for `to_portable`.
        axes: as there.
        others: as there.

    Raises:
        StateError: names or axes do not fit.
    """
    found, problems = layouts({name: g.shape for name, g in gradients.items()}, names, axes, others)
    if problems:
        raise StateError("The gradients cannot be exported", problems)
    moved: dict[str, Array] = {}
    for name, layout in found.items():
        parts = layout.apart({"": gradients[name]})
        moved |= {part: np.array(arrays[""]) for part, arrays in zip(layout.names, parts, strict=True)}
    return moved


def _reason(state: State, verify: int) -> str:
    """Why nothing can be verified; empty if something can."""
    if not state.has_global:
        return "the state is of an optimizer without a global second moment, whose steps are others"
    if state.receipt is None:
        return "the state has no receipt: no steps are recorded"
    if len(state.receipt.steps) < verify:
        return f"the receipt holds {len(state.receipt.steps)} of the {verify} steps that are wanted"
    if any(entry.param is None for entry in state.parameters.values()):
        return "the state has no values"
    for name, entry in [*state.receipt.start.parameters.items(), *state.parameters.items()]:
        if not all(np.isfinite(array).all() for array in entry.slots().values()):
            return f"{name!r} is not finite everywhere"
    return ""


def _gradients_here(step: Step, start: State, found: Mapping[str, Layout]) -> dict[str, Array]:
    """A step's gradients by a framework's names and in its layout."""
    own = 0.0 if start.scope == "tensor" else None
    entries = {name: Entry(g, np.zeros_like(g), 0, own) for name, g in step.gradients.items()}
    wanted = {
        name: layout
        for name, layout in found.items()
        if joined_name(layout.names) in entries or not entries.keys().isdisjoint(layout.names)
    }
    arrangement, problems = arranged(State(entries, [Group(list(entries))], scope=start.scope), wanted)
    if problems:
        raise StateError("The gradients do not fit", [f"a recorded gradient: {problem}" for problem in problems])
    return {name: entry.exp_avg for name, entry in arrangement.parameters.items()}


def _storage(state: State, targets: Mapping[str, Target]) -> dict[str, float]:
    """The precision that values and moments are kept in, by slot: the coarsest of this framework and the one before."""
    found = {
        slot: max((_EPS.get(target.dtypes[slot], 0.0) for target in targets.values()), default=0.0)
        for slot in ("param", "exp_avg", "exp_avg_sq")
    }
    values = [each.param for x in _both(state) for each in x.parameters.values() if each.param is not None]
    kept = [part for x in values for part in ((x.real, x.imag) if np.iscomplexobj(x) else (x,))]
    for dtype, eps in _EPS.items():
        if all(holds(dtype, array) for array in kept):
            found["param"] = max(found["param"], eps)
    if any(entry.compensation is not None for entry in state.parameters.values()):
        found["param"] = found["param"] ** 2  # in two numbers of 16 bits
    return found


def _both(state: State) -> list[State]:
    return [state] if state.receipt is None else [state.receipt.start, state]


class _Comparison:
    """Of a state with what the steps of its receipt have made here."""

    def __init__(self, state: State, after: State, steps: int, storage: Mapping[str, float]) -> None:
        self.state, self.after, self.steps, self.storage = state, after, steps, storage
        self.start = _both(state)[0]
        self.largest, self.told = 0.0, False  # the largest deviation, of a move; whether any could be told

    def verification(self, restriction: str) -> Verification:
        if self.state.parameters.keys() != self.after.parameters.keys():
            return Verification("cannot be verified", "parameters are cut otherwise here")
        lost = next(self._lost(), "")
        if lost:
            return Verification("lost", lost)
        if not self.told:
            reason = f"in {self.steps} steps the parameters moved hardly more than rounding may move them"
            return Verification("cannot be verified", reason)
        reason = (
            f"the optimizer here makes the {self.steps} recorded steps as they were made, up to {self.largest:.1e} of "
            f"the move{restriction}"
        )
        return Verification("proven", reason)

    def _lost(self) -> Iterator[str]:
        """What differs, causes first: moments do not depend on values."""
        if self.state.skipped != self.after.skipped:
            yield f"{self.after.skipped} steps are skipped here, {self.state.skipped} in the state"
        for name, entry in self.state.parameters.items():
            if (count := self.after.parameters[name].step) != entry.step:
                yield f"the count of {name!r} is {count} here, {entry.step} in the state"
        for slot in ("exp_avg", "exp_avg_sq"):
            for name in self.state.parameters:
                yield from self._unequal(name, slot)
        for name in self.state.parameters:
            yield from self._unequal_moments(name)
        for name in self.state.parameters:
            yield from self._unequal(name, "param")

    def _unequal(self, name: str, slot: str) -> Iterator[str]:
        start, end, here = (_array(x.parameters[name], slot) for x in (self.start, self.state, self.after))
        eps = max(_precision(x.parameters[name].exp_avg) for x in (self.start, self.state, self.after))
        eps = max(eps, *(self.storage[moment] for moment in ("exp_avg", "exp_avg_sq")))
        yield from self._outside(name, slot, (start, end, here), eps)

    def _unequal_moments(self, name: str) -> Iterator[str]:
        """Of s, and k, which are of a whole group, or of a tensor."""
        (start, _), (end, k), (here, count) = (_global_moment(x, name) for x in (self.start, self.state, self.after))
        if count != k:
            yield f"the count of steps is {count} here, {k} in the state (at {name!r})"
        eps = max(_precision(entry.exp_avg) for x in (self.state, self.after) for entry in x.parameters.values())
        yield from self._outside(name, "global_exp_avg_sq", tuple(map(np.asarray, (start, end, here))), eps)

    def _outside(self, name: str, slot: str, arrays: Sequence[Array], eps: float) -> Iterator[str]:
        start, end, here = arrays
        if not end.size:
            return
        move = float(np.abs(end - start).max())
        stored = max(eps, self.storage.get(slot, 0.0))
        scale = np.maximum(np.abs(start), np.abs(end))
        tiny = float(np.finfo(np.float32).tiny) if eps > 1e-9 else float(np.finfo(np.float64).tiny)  # flushed to 0
        bound = _OF_MOVE * eps * move + _OF_VALUE[slot] * self.steps * stored * scale + tiny
        error = np.abs(here - end)
        if slot == "param":
            self.told = self.told or float(np.max(bound)) < move / 4
        worst = int(np.argmax(np.where(np.isnan(error), np.inf, error) / bound))
        if not error.ravel()[worst] <= bound.ravel()[worst]:
            share = f"{error.ravel()[worst] / move:.1e} of its move" if move else f"{error.ravel()[worst]:.1e}"
            yield (
                f"{_WORDS[slot]} of {name!r} differs after {self.steps} steps by {share}"
                f" (bound {bound.ravel()[worst] / (move or 1.0):.1e}){self._hint(name)}"
            )
        if move and isfinite(move):
            self.largest = max(self.largest, float(error.max()) / move)

    def _hint(self, name: str) -> str:
        """Which hyperparameters differ, of those that are known: Optax knows none."""
        groups = [_group_of(x, name) for x in (self.after, self.state)]
        if not all(group.hyper for group in groups):
            return ""
        here, there = groups[0].hyper, groups[1].hyper
        here, there = {**here, "max_norm": self.after.max_norm}, {**there, "max_norm": self.state.max_norm}
        known = [x for x in here if x in there and here[x] != there[x] and x != "lr_scale"]
        differ = [f"{x} is {here[x]} here, {there[x]} in the state" for x in known]
        return f"; {', '.join(differ)}" if differ else ""


def _group_of(state: State, name: str) -> Group:
    return next(group for group in state.groups if name in group.params)


def _global_moment(state: State, name: str) -> tuple[float, int]:
    group, entry = _group_of(state, name), state.parameters[name]
    s = entry.global_exp_avg_sq if state.scope == "tensor" else group.global_exp_avg_sq
    return 0.0 if s is None else s, group.global_step


def _array(entry: Entry, slot: str) -> Array:
    array: Array = whole(entry) if slot == "param" else getattr(entry, slot)
    return array.astype(np.result_type(array, np.float64))


def _precision(array: Array) -> float:
    """The eps of an array's type; of float32 for narrower ones."""
    return float(np.finfo(np.result_type(array.dtype, np.float32)).eps)


def _error(left: Array, right: Array) -> float:
    """The largest difference; 0 where both are the same, infinities and NaN included."""
    same = (left == right) | (np.isnan(left) & np.isnan(right))
    with np.errstate(invalid="ignore"):
        return float(np.where(same, 0, np.abs(left - right)).max(initial=0))
