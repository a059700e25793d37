"""What Keras saves of an optimizer, in `.keras` files among others: its variables, by their order.

That order is another one once a quantized model has been saved and loaded: in each layer, the scales that gradients
overwrite come first. So what is saved has them last; where there are none, the order is the variables' own.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ada2ms.tf.optimizer import Ada2MS

Variable = Any  # a keras.Variable, or the backend's own


def save(optimizer: "Ada2MS", store: Any) -> None:
    """Puts the state into a store of Keras, whose keys are numbers."""
    for i, (variable, order) in enumerate(_as_saved(optimizer)):
        store[str(i)] = variable.numpy() if order is None else variable.numpy()[order]


def load(optimizer: "Ada2MS", store: Any) -> bool:
    """Takes the state from a store of Keras; False if that has another number of variables, and nothing has changed.

    Raises:
        ValueError: a shape is another; nothing has changed.
    """
    saved = _as_saved(optimizer)
    if len(saved) != len(store.keys()):
        return False
    arrays = [np.asarray(store[str(i)]) for i in range(len(saved))]
    for (variable, _), array in zip(saved, arrays, strict=True):
        if tuple(variable.shape) != array.shape:
            shapes = f"shape {tuple(variable.shape)}; in what was saved it is {array.shape}"
            raise ValueError(f"The state does not fit optimizer {optimizer.name!r}: {variable.path!r} has {shapes}")
    for (variable, order), array in zip(saved, arrays, strict=True):
        variable.assign(array if order is None else array[np.argsort(order)])
    return True


def _as_saved(optimizer: "Ada2MS") -> list[tuple[Variable, list[int] | None]]:
    """The variables in the order of a file; with the order of its entries, where one has an entry for each variable."""
    if not optimizer.built:
        return [(v, None) for v in optimizer.variables]
    order = sorted(range(len(optimizer._numel)), key=lambda i: i not in optimizer._updated)
    accumulators = optimizer._accumulated_gradients if optimizer.gradient_accumulation_steps else []
    moved = {id(old): accumulators[i] for old, i in zip(accumulators, order, strict=False)}
    per_variable = {id(optimizer._steps)}
    if optimizer.scope == "tensor":
        per_variable.add(id(optimizer._global_velocity))
    return [(moved.get(id(v), v), order if id(v) in per_variable else None) for v in optimizer.variables]
