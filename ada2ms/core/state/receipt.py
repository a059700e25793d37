"""Steps that led to a state: what an import needs to make them once more, by the optimizer that is to go on."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ada2ms.core.hyperparameters import check
from ada2ms.core.state.errors import StateError

if TYPE_CHECKING:  # states hold receipts, and receipts states
    from ada2ms.core.state.model import State

Array = NDArray[Any]


@dataclass
class Step:
    """What one step was made of.

    Attributes:
        gradients: by the state's names and in its layout; what had none is not there.
        batch: the SHA-256 of the bytes of its batch, in hexadecimal digits; "" if they were not given.
        lr: the learning rate, if it is scheduled outside of the optimizer; else None.
    """

    gradients: dict[str, Array]
    batch: str = ""
    lr: float | None = None


@dataclass
class Receipt:
    """An earlier state and the steps made since, from which an import can tell that it goes on as the run would have.

    It holds a copy of the model's values and moments, and one more array of their size for each step: begin it a few
    steps before the hand-off, or make a new one now and then.

    Attributes:
        start: the state that the steps began from, with values; its notes and extras are left out.
        steps: in their order.

    Raises:
        StateError: the state has no values.
    """

    start: "State"
    steps: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.start = replace(self.start, notes=[], extras={}, receipt=None)
        if absent := [name for name, entry in self.start.parameters.items() if entry.param is None]:
            raise StateError(
                "Not a state that steps can be replayed from", [f"{name!r} has no value" for name in absent]
            )

    def add(self, gradients: Mapping[str, Array], *, batch: bytes | None = None, lr: float | None = None) -> None:
        """Records a step.

        Args:
            gradients: of `export_gradients`: those that the optimizer is given.
            batch: the bytes of the data that they are of. Only their SHA-256 is kept, for people to compare.
            lr: the optimizer's learning rate in this step, if it is scheduled outside of the optimizer, as in torch
                (there that of the parameters that no group matches); groups keep their factors of it.

        Raises:
            StateError: gradients are of no parameter of the state, or of other shapes; nothing is recorded.
        """
        found = _of_parameters(gradients, self.start)
        problems: list[str] = []
        for name, g in found.items():
            entry = self.start.parameters.get(name)
            if entry is None:
                problems.append(f"{name!r} is no parameter of the receipt's state")
            elif entry.exp_avg.shape != g.shape:
                problems.append(f"{name!r}: the gradient has {g.shape}, the receipt's state {entry.exp_avg.shape}")
        if lr is not None:
            try:
                check("lr", lr, schedule=False)
            except (TypeError, ValueError) as error:
                problems.append(str(error))
        if batch is not None and not isinstance(batch, bytes):
            problems.append(f"Invalid batch: {type(batch).__name__} (must be bytes)")
        if problems:
            raise StateError("Not a step of the receipt", problems)
        digest = "" if batch is None else hashlib.sha256(batch).hexdigest()
        self.steps.append(Step(found, digest, None if lr is None else float(lr)))

    def copy(self) -> "Receipt":
        """With a list of its own, so that later steps are not in it."""
        return Receipt(self.start, list(self.steps))


def _of_parameters(gradients: Mapping[str, Array], state: "State") -> dict[str, Array]:
    """Gradients by the state's parameters, some of which may be one tensor of several parts in scope "tensor"."""
    found = dict(gradients)
    for name in state.parameters:
        parts = name.split("+")
        if name not in found and len(parts) > 1 and set(parts) <= found.keys():
            found[name] = np.stack([found.pop(part) for part in parts])
    return found


def unlike(start: "State", state: "State") -> list[str]:
    """Which parameters of a state are others than those of an earlier one."""
    names = dict.fromkeys([*state.parameters, *start.parameters])
    shapes = [{name: x.exp_avg.shape for name, x in each.parameters.items()} for each in (start, state)]
    return [
        f"{name!r} is {shapes[0].get(name, 'not there')} in its start, and {shapes[1].get(name, 'not there')} here"
        for name in names
        if shapes[0].get(name) != shapes[1].get(name)
    ]
