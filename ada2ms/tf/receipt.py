"""Recorded steps: their gradients to other frameworks, and steps of other frameworks made by this one's optimizer."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import keras
from keras import ops

from ada2ms.core.state import (
    Axes,
    Extras,
    Names,
    RecordedStep,
    Replay,
    State,
    StateError,
    Step,
    Target,
    Transfer,
    Verification,
    portable_gradients,
    verified,
)
from ada2ms.tf.dtypes import to_dense
from ada2ms.tf.models import Model, Variable, model_paths, trainable_variables_of, variables_of
from ada2ms.tf.optimizer import Ada2MS

Gradients = Callable[[Any, Step], Sequence[Any]] | None


def export_gradients(
    model: Model, gradients: Sequence[Any], *, names: Names = None, axes: Axes = None, extras: Extras = None
) -> dict[str, Any]:
    """Gradients that the optimizer is given, for `Receipt.add`.

    Args:
        model: the model, or its trainable variables.
        gradients: one for each trainable variable, in their order, or None, as `optimizer.apply` is given them.
        names: as for `export_state`.
        axes: as there.
        extras: is not used; for `**plain_layers(model)`.

    Returns:
        Arrays by the state's names and in its layout; what has no gradient is not there.

    Raises:
        StateError: there are more or fewer gradients than variables, or names or axes do not fit.
    """
    del extras
    found = {path: g for path, g in _of_variables(model, gradients).items() if g is not None}
    return portable_gradients(found, names, axes, model_paths(model))


def verification(
    model: Model,
    optimizer: keras.optimizers.Optimizer,
    state: State,
    verify: int,
    targets: Mapping[str, Target],
    transfer: Transfer,
    gradients: Gradients,
) -> Verification | None:
    """What the steps of a state's receipt show of an optimizer; None if that is not wanted."""
    replay: Replay | str = partial(_replay, model, optimizer, transfer=transfer, gradients=gradients)
    if not isinstance(optimizer, Ada2MS):
        replay = f"{type(optimizer).__name__} makes other steps than Ada2MS"
    elif optimizer.gradient_accumulation_steps:
        replay = f"the optimizer accumulates gradients of {optimizer.gradient_accumulation_steps} steps"
    others = model_paths(model)
    return verified(state, verify, replay, targets, transfer, others=others, with_gradients=gradients is not None)


def _replay(
    model: Model,
    optimizer: keras.optimizers.Optimizer,
    start: State,
    steps: Sequence[RecordedStep],
    *,
    transfer: Transfer,
    gradients: Gradients,
) -> State:
    """What comes out of recorded steps, after which all variables of model and optimizer have the values that they had.

    Args:
        model: the model, or its trainable variables.
        optimizer: that makes the steps.
        start: the earlier state.
        steps: in their order.
        transfer: into model and optimizer, and out of them.
        gradients: computes those of the model here, to be compared with the recorded ones.

    Raises:
        StateError: the steps cannot be made.
        StepLostError: of `gradients`.
    """
    with _restored([*optimizer.variables, *variables_of(model)]):
        transfer.into(model, optimizer, start)
        variables = {v.path: v for v in variables_of(model)}
        for recorded in steps:
            if recorded.step.lr is not None:
                _set_rate(optimizer, recorded.step.lr)
            if gradients is not None:
                recorded.compare(_of_variables(model, gradients(model, recorded.step)))
            given = [variables[path] for path in recorded.gradients]
            values = [
                ops.convert_to_tensor(g, v.dtype) for v, g in zip(given, recorded.gradients.values(), strict=True)
            ]
            optimizer.apply(values, given)
        return transfer.out_of(model, optimizer)


@contextmanager
def _restored(variables: Iterable[Variable]) -> Iterator[None]:
    """Gives variables the values back that they have, whatever happens."""
    kept = [(v, ops.copy(ops.convert_to_tensor(v))) for v in variables]
    try:
        yield
    finally:
        for v, value in kept:
            v.assign(value)


def _set_rate(optimizer: keras.optimizers.Optimizer, lr: float) -> None:
    try:
        optimizer.learning_rate = lr
    except TypeError:  # of a schedule
        reason = "learning rates are recorded, and the optimizer has a schedule of its own here"
        raise StateError("The steps cannot be made", [reason]) from None


def _of_variables(model: Model, gradients: Sequence[Any]) -> dict[str, Any]:
    """Gradients as arrays, by the paths of the variables that they are of."""
    variables = trainable_variables_of(model)
    if len(variables) != len(gradients):
        problem = f"there are {len(gradients)} gradients (must be {len(variables)}, one for each trainable variable)"
        raise StateError("The gradients do not fit", [problem])
    return {
        v.path: None if g is None else ops.convert_to_numpy(to_dense(g))
        for v, g in zip(variables, gradients, strict=True)
    }
