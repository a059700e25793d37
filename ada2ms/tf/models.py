"""The variables of a model, and which of them an optimizer has moments of."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import keras

from ada2ms.core.state import StateError

Variable = Any
Model: TypeAlias = keras.Model | Sequence[Variable]


def variables_of(model: Model) -> Sequence[Variable]:
    """All of a model's, or those that are given in its place."""
    found: Sequence[Variable] = model.variables if isinstance(model, keras.Model) else model
    return found


def trainable_variables_of(model: Model) -> Sequence[Variable]:
    """Those of a model that are trained, or those that are given in its place."""
    found: Sequence[Variable] = model.trainable_variables if isinstance(model, keras.Model) else model
    return found


def variables_by_path(model: Model, optimizer: keras.optimizers.Optimizer) -> dict[str, tuple[int, Variable]]:
    """By path: index in the optimizer, and variable, of all that it updates, whether or not they are frozen by now."""
    index = {id(v): i for i, v in enumerate(optimizer._trainable_variables) if optimizer._momentums[i] is not None}
    found: dict[str, tuple[int, Variable]] = {}
    for v in variables_of(model):
        if id(v) in index:
            if v.path in found:
                raise StateError("The model does not fit", [f"two variables have the path {v.path!r}"])
            found[v.path] = index[id(v)], v
    if len(found) < len(index):
        absent = [v.path for v in optimizer._trainable_variables if id(v) in index and v.path not in found]
        raise StateError("The optimizer does not fit", [f"{path!r} is not in the model" for path in absent])
    return found


def unknown_variables(model: Model, optimizer: keras.optimizers.Optimizer) -> list[str]:
    """Notes of variables that are trained, or given, and of which this optimizer has nothing."""
    known = {id(v) for v in optimizer._trainable_variables}
    unknown = [v.path for v in trainable_variables_of(model) if id(v) not in known]
    return [f"{path!r} is not among the variables that the optimizer was built with" for path in unknown]


def beside_optimizer(model: Model, optimizer: keras.optimizers.Optimizer) -> dict[str, Variable]:
    """By path: the variables of a model that the optimizer has no moments of."""
    own = {id(v) for v, m in zip(optimizer._trainable_variables, optimizer._momentums, strict=True) if m is not None}
    return {v.path: v for v in variables_of(model) if id(v) not in own}


def without_any_moments(model: Model, optimizer: keras.optimizers.Optimizer) -> list[str]:
    """Paths of weights that are not in a state: frozen, statistics or overwritten; without `unknown_variables`."""
    moments = {id(v): m for v, m in zip(optimizer._trainable_variables, optimizer._momentums, strict=True)}
    if not isinstance(model, keras.Model):
        return [v.path for v in model if id(v) in moments and moments[id(v)] is None]
    trained = {id(v) for v in model.trainable_variables}
    return [v.path for v in model.weights if moments.get(id(v)) is None and (id(v) in moments or id(v) not in trained)]


def model_paths(model: Model) -> list[str]:
    return [v.path for v in variables_of(model)]
