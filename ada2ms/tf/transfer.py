"""The optimizer's state to and from other frameworks; `ada2ms.core.state` says what it consists of."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import keras
import numpy as np
from keras import ops

from ada2ms.core import state as core
from ada2ms.core.hyperparameters import from_arguments
from ada2ms.core.state import (
    Axes,
    Entry,
    Fitted,
    Group,
    Names,
    Report,
    State,
    StateError,
    Target,
    from_portable,
    in_state,
    only_count,
    optimizer_problems,
    plain_hyperparameters,
    to_portable,
    without_moments,
)
from ada2ms.tf.optimizer import Ada2MS

Variable = Any
Model: TypeAlias = keras.Model | Sequence[Variable]


def export_state(
    model: Model,
    optimizer: keras.optimizers.Optimizer,
    *,
    names: Names = None,
    axes: Axes = None,
    values: bool = True,
) -> State:
    """The state of an optimizer, to go on from in any framework.

    Args:
        model: the model, or its trainable variables. A variable's name here is its path, `"sequential/dense/kernel"`.
        optimizer: `Ada2MS`, `keras.optimizers.AdamW` or `Adam`, built; or a `LossScaleOptimizer` of one.
        names: what the state is to call a variable, for each path here, as a mapping or a function; those left out keep
            their paths.
        axes: for a path here, how an array of the state is to be transposed to have this layout; as in `import_state`.
        values: whether the variables' values are to travel too.

    Returns:
        A state with copies of everything. Its `notes` say what the optimizer keeps besides and no state holds.

    Raises:
        StateError: listing everything that cannot be exported.
    """
    wrapper, optimizer = optimizer, _inner(optimizer)
    if not optimizer.built:
        raise StateError("The optimizer does not fit", ["it is not built: it has no state yet"])
    ours = isinstance(optimizer, Ada2MS)
    k = int(_numpy(optimizer._global_step if ours else optimizer.iterations))
    entries = {
        path: Entry(
            exp_avg=_numpy(optimizer._momentums[i]),
            exp_avg_sq=_numpy(optimizer._velocities[i]),
            step=int(_numpy(optimizer._steps)[i]) if ours else k,
            global_exp_avg_sq=_own_global(optimizer, i),
            param=_numpy(variable) if values else None,
        )
        for path, (i, variable) in _variables(model, optimizer).items()
    }
    entries, renamed = to_portable(entries, names, axes, _paths(model))
    group = Group(in_state(renamed, renamed), _hyperparameters(optimizer))
    source = f"keras {keras.__version__} on {keras.backend.backend()}: {type(optimizer).__name__}"
    notes = _left_behind(model, wrapper, optimizer)
    notes += without_moments(_without_moments(model, optimizer) if values else [], imported=False)
    if not ours:
        return State(entries, [group], source=source, notes=notes)
    group.global_step = k
    if optimizer.scope == "model":
        group.global_exp_avg_sq = float(_numpy(optimizer._global_velocity))
    choices = {"scope": optimizer.scope, "nonfinite": optimizer.nonfinite}
    return State(entries, [group], **choices, skipped=int(_numpy(optimizer._skipped)), source=source, notes=notes)


def import_state(
    model: Model,
    optimizer: keras.optimizers.Optimizer,
    state: State,
    *,
    names: Names = None,
    axes: Axes = None,
    values: bool = True,
    cast: bool = False,
) -> Report:
    """Gives an optimizer, and the variables, a state of any framework; hyperparameters stay as they are.

    It goes on as a new one would, whatever it was used for: gradients that it has accumulated are dropped, moving
    averages of the variables (`use_ema`) start from the variables' values, and a `LossScaleOptimizer` from its
    `initial_scale`. `iterations`, which learning-rate schedules are given, becomes the number of updates, with those
    that were skipped (of micro-steps, with `gradient_accumulation_steps`).

    Args:
        model: the model, or its trainable variables. A variable's name here is its path, `"sequential/dense/kernel"`.
        optimizer: `Ada2MS`, `keras.optimizers.AdamW` or `Adam`, or a `LossScaleOptimizer` of one; it is built if it is
            not yet.
        state: of `export_state`, in this framework or another, or of a file.
        names: what the state calls a variable, for each path here, as a mapping or a function; those left out have the
            same name.
        axes: for a path here, how the state's array is transposed to have this layout: (1, 0) for the kernel of a Dense
            that is a weight of (outputs, inputs) in the state.
        values: whether the variables' values come from the state too.
        cast: whether values may be rounded to the types here.

    Returns:
        What went where, and in its `notes` what did not; to be printed.

    Raises:
        StateError: listing everything that is missing, superfluous, or of a wrong shape or type; nothing has changed.
    """
    wrapper, optimizer = optimizer, _inner(optimizer)
    optimizer.build(list(model.trainable_variables if isinstance(model, keras.Model) else model))
    variables = _variables(model, optimizer)
    fitted = from_portable(
        state,
        {path: _target(optimizer, i, v) for path, (i, v) in variables.items()},
        names=names,
        axes=axes,
        scope=optimizer.scope if isinstance(optimizer, Ada2MS) else None,
        values=values,
        cast=cast,
        others=_paths(model),
    )
    calls = _assign_counts(optimizer, fitted, variables)
    for path, (i, variable) in variables.items():
        entry = fitted.entries[path]
        _assign(optimizer._momentums[i], entry.exp_avg)
        _assign(optimizer._velocities[i], entry.exp_avg_sq)
        if entry.param is not None:
            _assign(variable, entry.param)
    fitted.report.notes += [*_unknown(model, optimizer), *_restart(wrapper, optimizer)]
    fitted.report.notes += without_moments(_without_moments(model, optimizer) if values else [], imported=True)
    _assign(optimizer._iterations, np.array(calls * (optimizer.gradient_accumulation_steps or 1)))
    return fitted.report


def arguments(state: State) -> dict[str, Any]:
    """The arguments for `Ada2MS` that continue a state: those of its hyperparameters that it knows.

    Raises:
        StateError: the state has groups that differ.
    """
    return core.arguments(state, "keras")


def _inner(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)  # of a LossScaleOptimizer
    problems = optimizer_problems(
        type(optimizer).__name__,
        known=isinstance(optimizer, (Ada2MS, keras.optimizers.Adam)),  # AdamW is an Adam
        amsgrad=bool(getattr(optimizer, "amsgrad", False)),
    )
    if problems:
        raise StateError("The optimizer does not fit", problems)
    return optimizer


def _hyperparameters(optimizer: keras.optimizers.Optimizer) -> dict[str, Any]:
    """Those that are plain data, by the rule's names."""
    given = {name: getattr(optimizer, name, None) for name in ("beta_1", "beta_2", "epsilon", "adaptivity")}
    given["weight_decay"] = optimizer.weight_decay or 0.0  # None is how Keras says so
    learning_rate = optimizer.get_config()["learning_rate"]
    given["learning_rate"] = learning_rate if isinstance(learning_rate, float) else None
    return plain_hyperparameters(from_arguments(given, "keras"))


def _own_global(optimizer: keras.optimizers.Optimizer, i: int) -> float | None:
    """A variable's own global second moment, in scope "tensor"."""
    if not isinstance(optimizer, Ada2MS) or optimizer.scope != "tensor":
        return None
    return float(_numpy(optimizer._global_velocity)[i])


def _target(optimizer: keras.optimizers.Optimizer, i: int, variable: Variable) -> Target:
    slots = {"param": variable, "exp_avg": optimizer._momentums[i], "exp_avg_sq": optimizer._velocities[i]}
    return Target(tuple(variable.shape), {slot: keras.backend.standardize_dtype(v.dtype) for slot, v in slots.items()})


def _assign_counts(
    optimizer: keras.optimizers.Optimizer, fitted: Fitted, variables: dict[str, tuple[int, Variable]]
) -> int:
    """Assigns counts and global second moments; the number of steps that there have been.

    Raises:
        StateError: an optimizer with one count is given several; nothing has changed.
    """
    if not isinstance(optimizer, Ada2MS):
        return only_count(fitted.entries.values(), type(optimizer).__name__)
    s, k = fitted.groups[0]
    n = len(optimizer._momentums)
    steps, own = np.zeros(n, int), np.zeros(n)
    for path, (i, _) in variables.items():
        entry = fitted.entries[path]
        steps[i], own[i] = entry.step, entry.global_exp_avg_sq or 0.0
    _assign(optimizer._global_step, np.array(k))
    _assign(optimizer._steps, steps)
    _assign(optimizer._global_velocity, own if optimizer.scope == "tensor" else np.array(s or 0.0))
    _assign(optimizer._skipped, np.array(fitted.skipped))
    return k + fitted.skipped


def _variables(model: Model, optimizer: keras.optimizers.Optimizer) -> dict[str, tuple[int, Variable]]:
    """By path: index in the optimizer, and variable, of all that it updates, whether or not they are frozen by now."""
    given = model.variables if isinstance(model, keras.Model) else model
    index = {id(v): i for i, v in enumerate(optimizer._trainable_variables) if optimizer._momentums[i] is not None}
    found: dict[str, tuple[int, Variable]] = {}
    for v in given:
        if id(v) in index:
            if v.path in found:
                raise StateError("The model does not fit", [f"two variables have the path {v.path!r}"])
            found[v.path] = index[id(v)], v
    if len(found) < len(index):
        absent = [v.path for v in optimizer._trainable_variables if id(v) in index and v.path not in found]
        raise StateError("The optimizer does not fit", [f"{path!r} is not in the model" for path in absent])
    return found


def _unknown(model: Model, optimizer: keras.optimizers.Optimizer) -> list[str]:
    """Notes of variables that are trained, or given, and of which this optimizer has nothing."""
    known = {id(v) for v in optimizer._trainable_variables}
    given = model.trainable_variables if isinstance(model, keras.Model) else model
    unknown = [v.path for v in given if id(v) not in known]
    return [f"{path!r} is not among the variables that the optimizer was built with" for path in unknown]


def _without_moments(model: Model, optimizer: keras.optimizers.Optimizer) -> list[str]:
    """Paths of weights that are not in a state: frozen, statistics, or overwritten; but for those of `_unknown`."""
    moments = {id(v): m for v, m in zip(optimizer._trainable_variables, optimizer._momentums, strict=True)}
    if not isinstance(model, keras.Model):
        return [v.path for v in model if id(v) in moments and moments[id(v)] is None]
    trained = {id(v) for v in model.trainable_variables}
    return [v.path for v in model.weights if moments.get(id(v)) is None and (id(v) in moments or id(v) not in trained)]


def _left_behind(model: Model, wrapper: keras.optimizers.Optimizer, optimizer: keras.optimizers.Optimizer) -> list[str]:
    """Notes of what an export does not take along."""
    notes = _unknown(model, optimizer)
    if waiting := _accumulated(optimizer):
        gradients = f"gradients of {waiting} of {optimizer.gradient_accumulation_steps} steps"
        notes.append(f"{gradients}, accumulated for the next update, are not in this state")
    if optimizer.use_ema:
        notes.append("the moving averages of the variables (use_ema) are not in this state")
    if wrapper is not optimizer and wrapper.built:
        notes.append(f"the loss scale, {float(_numpy(wrapper.dynamic_scale))}, is not in this state")
    return notes


def _restart(wrapper: keras.optimizers.Optimizer, optimizer: keras.optimizers.Optimizer) -> list[str]:
    """Sets what Keras keeps around the state as it is in a new optimizer; notes of what that has changed."""
    notes = []
    if optimizer.gradient_accumulation_steps:
        if waiting := _accumulated(optimizer):
            notes.append(f"gradients of {waiting} of {optimizer.gradient_accumulation_steps} steps were dropped here")
        for v in optimizer._accumulated_gradients:
            _assign(v, np.zeros(v.shape))
    if optimizer.use_ema:
        notes.append("the moving averages of the variables (use_ema) start from the variables' values")
        pairs = zip(optimizer._model_variables_moving_average, optimizer._trainable_variables, strict=True)
        for average, variable in pairs:
            if average is not None:  # a variable that its gradients overwrite has none
                _assign(average, _numpy(variable))  # a copy, since JAX cannot donate a buffer that two variables share
    if wrapper is not optimizer and wrapper.built:
        notes.append(f"the loss scale starts from {wrapper.initial_scale}; here it was {_numpy(wrapper.dynamic_scale)}")
        _assign(wrapper.dynamic_scale, np.array(wrapper.initial_scale))
        _assign(wrapper.step_counter, np.array(0))
    return notes


def _accumulated(optimizer: keras.optimizers.Optimizer) -> int:
    """Calls of `apply` since the last update, whose gradients wait for the next."""
    return int(_numpy(optimizer._iterations)) % (optimizer.gradient_accumulation_steps or 1)


def _paths(model: Model) -> list[str]:
    return [v.path for v in (model.variables if isinstance(model, keras.Model) else model)]


def _numpy(variable: Variable) -> Any:
    dtype = keras.backend.standardize_dtype(variable.dtype)
    value = ops.convert_to_tensor(variable)
    return np.array(ops.convert_to_numpy(ops.cast(value, "float32") if dtype in ("float16", "bfloat16") else value))


def _assign(variable: Variable, array: Any) -> None:
    variable.assign(ops.convert_to_tensor(array, variable.dtype))
