"""What Keras saves of an optimizer, in `.keras` files among others: its variables, by their order.

That order is another one once a quantized model has been saved and loaded: in each layer, the scales that gradients
overwrite come first. So what is saved has them last; where there are none, the order is the variables' own. The norm
of the last gradients is for people to read and is not saved, so that files are the same with `global_clipnorm` and
without. What was saved without compensations is loaded with compensations of 0.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from keras import ops

if TYPE_CHECKING:
    from ada2ms.tf.optimizer import Ada2MS

Variable = Any  # a keras.Variable, or the backend's own
Saved = tuple[Variable, list[int] | None]  # a variable, and the order of its entries if it is another in what is saved


def save(optimizer: "Ada2MS", store: Any) -> None:
    """Puts the state into a store of Keras, whose keys are numbers."""
    for i, (variable, order) in enumerate(_as_saved(optimizer)):
        store[str(i)] = variable.numpy() if order is None else variable.numpy()[order]


def load(optimizer: "Ada2MS", store: Any) -> bool:
    """Takes the state from a store of Keras; False if that has other variables, and nothing has changed.

    Raises:
        ValueError: a shape is another; nothing has changed.
    """
    saved = _as_saved(optimizer)
    compensations = [v for v in optimizer._compensations or () if v is not None] if optimizer.built else []
    if compensations and len(saved) - len(compensations) == len(store.keys()):  # of `compensated=False`
        saved = [(v, order) for v, order in saved if all(v is not x for x in compensations)]
    else:
        compensations = []
    is_older = len(saved) != len(store.keys())
    if is_older:
        saved = _with_all_slots(optimizer)
        if len(saved) != len(store.keys()):
            return False
    arrays = [np.asarray(store[str(i)]) for i in range(len(saved))]
    if misfits := _misfits(saved, arrays):
        if is_older:
            return False
        raise ValueError(f"The state does not fit optimizer {optimizer.name!r}: {misfits[0]}")
    for (variable, order), array in zip(saved, arrays, strict=True):
        if variable is not None:
            variable.assign(array if order is None else array[np.argsort(order)])
    for variable in compensations:
        variable.assign(ops.zeros(variable.shape, variable.dtype))
    return True


def _misfits(saved: list[Saved], arrays: list[Any]) -> list[str]:
    """What is wrong with the shapes."""
    return [
        f"{v.path!r} has shape {tuple(v.shape)}; in what was saved it is {array.shape}"
        for (v, _), array in zip(saved, arrays, strict=True)
        if v is not None and tuple(v.shape) != array.shape
    ]


def _as_saved(optimizer: "Ada2MS") -> list[Saved]:
    """The variables in the order of a file; with the order of its entries, where one has an entry for each variable."""
    if not optimizer.built:
        return [(v, None) for v in optimizer.variables]
    order = sorted(range(len(optimizer._numel)), key=lambda i: i not in optimizer._updated)
    accumulators = optimizer._accumulated_gradients if optimizer.gradient_accumulation_steps else []
    moved = {id(old): accumulators[i] for old, i in zip(accumulators, order, strict=False)}
    per_variable = {id(optimizer._steps)}
    if optimizer.scope == "tensor":
        per_variable.add(id(optimizer._global_velocity))
    return [(moved.get(id(v), v), order if id(v) in per_variable else None) for v in _variables(optimizer)]


def _variables(optimizer: "Ada2MS") -> list[Variable]:
    """Those that are saved."""
    return [v for v in optimizer.variables if v is not getattr(optimizer, "_gradient_norm", None)]


def _with_all_slots(optimizer: "Ada2MS") -> list[Saved]:
    """The variables in the order of files from when overwritten variables had slots too; None for those."""
    if not optimizer.built:
        return []
    slots = [slot for pair in zip(optimizer._momentums, optimizer._velocities, strict=True) for slot in pair]
    kept = {id(slot) for slot in slots if slot is not None}
    variables = _variables(optimizer)
    first = next((i for i, v in enumerate(variables) if id(v) in kept), 0)
    return [(v, None) for v in (*variables[:first], *slots, *variables[first + len(kept) :])]
