"""The optimizer's state to and from other frameworks; `ada2ms.core.state` says what it consists of."""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from ada2ms.core import state as core
from ada2ms.core.hyperparameters import from_arguments
from ada2ms.core.state import (
    Axes,
    Entry,
    Extra,
    Extras,
    Fitted,
    Group,
    Names,
    Receipt,
    Report,
    State,
    StateError,
    Target,
    Transfer,
    check_verify,
    from_portable,
    in_state,
    only_count,
    optimizer_problems,
    plain_hyperparameters,
    portable_extras,
    to_portable,
    without_moments,
)
from ada2ms.tf.groups import Hyper
from ada2ms.tf.models import (
    Model,
    Variable,
    beside_optimizer,
    model_paths,
    trainable_variables_of,
    unknown_variables,
    variables_by_path,
    without_any_moments,
)
from ada2ms.tf.optimizer import Ada2MS
from ada2ms.tf.receipt import Gradients, verification


def export_state(
    model: Model,
    optimizer: keras.optimizers.Optimizer,
    *,
    names: Names = None,
    axes: Axes = None,
    extras: Extras = None,
    values: bool = True,
    receipt: Receipt | None = None,
) -> State:
    """The state of an optimizer, to go on from in any framework.

    Args:
        model: the model, or its trainable variables. A variable's name here is its path, `"sequential/dense/kernel"`.
        optimizer: `Ada2MS`, `keras.optimizers.AdamW` or `Adam`, built; or a `LossScaleOptimizer` of one.
        names: what the state is to call a variable, for each path here, as a mapping or a function; those left out keep
            their paths. One that is cut, as the gates of an LSTM, has several names.
        axes: for a path here, how an array of the state is to be transposed to have this layout, or a function that
            cuts an array here; as in `import_state`.
        extras: what the state is to call a variable that the optimizer has no moments of, for each path here: running
            statistics, which `plain_layers` gives, or values of frozen layers. They are in `State.extras`, where you
            may put others.
        values: whether the variables' values are to travel too, and extras.
        receipt: the steps since an earlier state, for `verify` of `import_state`.

    Returns:
        A state with copies of everything. Its `notes` say what the optimizer keeps besides and no state holds.

    Raises:
        StateError: listing everything that cannot be exported.
    """
    wrapper, optimizer = optimizer, _inner(optimizer)
    if not optimizer.built:
        raise StateError("The optimizer does not fit", ["it is not built: it has no state yet"])
    ours = isinstance(optimizer, Ada2MS)
    variables = variables_by_path(model, optimizer)
    steps = _numpy(optimizer._steps) if ours else np.full(len(optimizer._momentums), int(_numpy(optimizer.iterations)))
    entries = {
        path: Entry(
            exp_avg=_numpy(optimizer._momentums[i]),
            exp_avg_sq=_numpy(optimizer._velocities[i]),
            step=int(steps[i]),
            global_exp_avg_sq=_own_global(optimizer, i),
            param=_numpy(variable) if values else None,
            compensation=None if (kept := _compensation(optimizer, i)) is None else _numpy(kept),
        )
        for path, (i, variable) in variables.items()
    }
    entries, renamed = to_portable(entries, names, axes, model_paths(model))
    notes = _left_behind(model, wrapper, optimizer)
    beside = beside_optimizer(model, optimizer) if values else {}
    found = portable_extras({path: _numpy(v) for path, v in beside.items() if path in (extras or {})}, extras, axes)
    left = [path for path in without_any_moments(model, optimizer) if values and path not in (extras or {})]
    notes += without_moments(left, imported=False)
    choices: dict[str, Any] = {"max_norm": _max_norm(optimizer)}
    if ours:
        choices |= {name: getattr(optimizer, name) for name in ("scope", "nonfinite", "compensated")}
        choices["skipped"] = int(_numpy(optimizer._skipped))
    return State(
        entries,
        _groups(optimizer, variables, renamed),
        **choices,
        source=f"keras {keras.__version__} on {keras.backend.backend()}: {type(optimizer).__name__}",
        notes=notes,
        extras=found,
        receipt=None if receipt is None else receipt.copy(),
    )


def import_state(
    model: Model,
    optimizer: keras.optimizers.Optimizer,
    state: State,
    *,
    names: Names = None,
    axes: Axes = None,
    extras: Extras = None,
    values: bool = True,
    cast: bool = False,
    verify: int = 0,
    gradients: Gradients = None,
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
            that is a weight of (outputs, inputs) in the state. Or a function
            that cuts an array here into those of the state that `names` has for it, by indexing, transposing and
            reshaping alone: `lambda w: [x.T for x in np.split(w, 3)]`. The way back follows from it.
        extras: what the state calls a variable that the optimizer has no moments of, for each path here.
        values: whether the variables' values come from the state too, and extras.
        cast: whether values may be rounded to the types here.
        verify: how many recorded steps there must be in the state's receipt. All that are there are made once more
            beforehand, by this optimizer, and all variables get back what they had; `Report.verification` says whether
            the result is the state: whatever it says, the state is imported. A recorded learning rate is taken in place
            of that here, if this is no schedule. 0: nothing is verified.
        gradients: with `verify`, `gradients(model, step)` gives the gradients of a recorded step, one for each
            trainable variable: if they are those recorded, all arrays are where the model reads them. `step.batch`
            tells which batch that was.

    Returns:
        What went where, and in its `notes` what did not; to be printed.

    Raises:
        StateError: listing everything that is missing, superfluous, or of a wrong shape or type; nothing has changed.
    """
    check_verify(verify)
    wrapper, optimizer = optimizer, _inner(optimizer)
    optimizer.build(list(trainable_variables_of(model)))
    variables, beside = variables_by_path(model, optimizer), beside_optimizer(model, optimizer)
    targets = {path: _target(optimizer, i, v) for path, (i, v) in variables.items()}
    fitted = from_portable(
        state,
        targets,
        names=names,
        axes=axes,
        scope=optimizer.scope if isinstance(optimizer, Ada2MS) else None,
        values=values,
        cast=cast,
        groups=_moments(optimizer),
        others=model_paths(model),
        extras=extras,
        beside={path: Extra(tuple(v.shape), keras.backend.standardize_dtype(v.dtype)) for path, v in beside.items()},
    )
    transfer = Transfer(import_state, export_state, names, axes, cast)
    fitted.report.verification = verification(model, optimizer, state, verify, targets, transfer, gradients)
    calls = _assign_counts(optimizer, fitted, variables)
    for path, array in fitted.extras.items():
        _assign(beside[path], array)
    for path, (i, variable) in variables.items():
        entry = fitted.entries[path]
        _assign(optimizer._momentums[i], entry.exp_avg)
        _assign(optimizer._velocities[i], entry.exp_avg_sq)
        if entry.compensation is not None:
            _assign(_compensation(optimizer, i), entry.compensation)
        if entry.param is not None:
            _assign(variable, entry.param)
    fitted.report.notes += [*unknown_variables(model, optimizer), *_restart(wrapper, optimizer)]
    left = [path for path in without_any_moments(model, optimizer) if values and path not in fitted.extras]
    fitted.report.notes += without_moments(left, imported=True)
    _assign(optimizer._iterations, np.array(calls * (optimizer.gradient_accumulation_steps or 1)))
    return fitted.report


def arguments(state: State, names: Names = None) -> dict[str, Any]:
    """The arguments for `Ada2MS` that continue a state: those of its hyperparameters that it knows.

    Args:
        state: of any framework.
        names: what the state calls a variable, for each path here, as a mapping for `import_state`; needed where the
            state's groups differ, whose `groups` name the variables here by their paths.

    Raises:
        StateError: the state has groups that differ, and `names` is a function, or not all their hyperparameters are
            known.
    """
    return core.arguments(state, "keras", names)


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


def _groups(
    optimizer: keras.optimizers.Optimizer, variables: dict[str, tuple[int, Variable]], renamed: Mapping[str, Any]
) -> list[Group]:
    """The optimizer's groups; variables that are excluded from weight decay are in others than the rest."""
    found: dict[tuple[int | None, bool], Group] = {}
    for path, (i, variable) in variables.items():
        index = optimizer._grouping.group_of[i] if isinstance(optimizer, Ada2MS) else None
        excluded = not optimizer._use_weight_decay(variable)
        if (index, excluded) not in found:
            found[index, excluded] = _group(optimizer, i, _hyperparameters(optimizer, index, excluded))
        found[index, excluded].params += in_state(renamed, [path])
    return list(found.values()) or [Group([], _hyperparameters(optimizer, None, False))]


def _group(optimizer: keras.optimizers.Optimizer, i: int, hyper: dict[str, Any]) -> Group:
    """A group without parameters as yet, with the global second moment of this variable."""
    if not isinstance(optimizer, Ada2MS):
        return Group([], hyper)
    moment = optimizer._grouping.moment_of[i]
    k = int(np.ravel(_numpy(optimizer._global_step))[moment if _moments(optimizer) > 1 else 0])
    if optimizer.scope == "tensor":
        return Group([], hyper, global_step=k)
    return Group([], hyper, float(np.ravel(_numpy(optimizer._global_velocity))[moment]), k)


def _hyperparameters(optimizer: keras.optimizers.Optimizer, index: int | None, excluded: bool) -> dict[str, Any]:
    """Those of a group that are plain data, by the rule's names."""
    learning_rate = optimizer.get_config()["learning_rate"]
    if isinstance(optimizer, Ada2MS):
        given = Hyper.of(optimizer, index)._asdict()
        scale = given.pop("lr_scale")
    else:
        arguments = {name: getattr(optimizer, name, None) for name in ("beta_1", "beta_2", "epsilon")}
        # None is how Keras says that there is no weight decay.
        given, scale = {**from_arguments(arguments, "keras"), "weight_decay": optimizer.weight_decay or 0.0}, 1.0
    given["lr"] = learning_rate * scale if isinstance(learning_rate, float) else None
    if excluded:
        given["weight_decay"] = 0.0
    return {**plain_hyperparameters(given), **({"lr_scale": scale} if scale != 1 else {})}


def _max_norm(optimizer: keras.optimizers.Optimizer) -> float | None:
    """What gradients are clipped by, of Keras' own optimizers too."""
    clips_otherwise = optimizer.clipnorm and optimizer.clipnorm > 0
    bound = optimizer.global_clipnorm
    return None if clips_otherwise or not bound or not bound > 0 else float(bound)


def _moments(optimizer: keras.optimizers.Optimizer) -> int:
    """How many global second moments, with counts, there are, but for those of scope "tensor"."""
    several = isinstance(optimizer, Ada2MS) and optimizer.scope == "model"
    return len(optimizer._grouping.moments) if several else 1


def _compensation(optimizer: keras.optimizers.Optimizer, i: int) -> Variable | None:
    compensations = getattr(optimizer, "_compensations", None)
    return compensations[i] if compensations else None


def _own_global(optimizer: keras.optimizers.Optimizer, i: int) -> float | None:
    """A variable's own global second moment, in scope "tensor"."""
    if not isinstance(optimizer, Ada2MS) or optimizer.scope != "tensor":
        return None
    return float(_numpy(optimizer._global_velocity)[i])


def _target(optimizer: keras.optimizers.Optimizer, i: int, variable: Variable) -> Target:
    slots = {"param": variable, "exp_avg": optimizer._momentums[i], "exp_avg_sq": optimizer._velocities[i]}
    if (compensation := _compensation(optimizer, i)) is not None:
        slots["compensation"] = compensation
    dtypes = {slot: keras.backend.standardize_dtype(v.dtype) for slot, v in slots.items()}
    return Target(tuple(variable.shape), dtypes, optimizer._grouping.moment_of[i] if _moments(optimizer) > 1 else 0)


def _assign_counts(
    optimizer: keras.optimizers.Optimizer, fitted: Fitted, variables: dict[str, tuple[int, Variable]]
) -> int:
    """Assigns counts and global second moments; the number of steps that there have been.

    Raises:
        StateError: an optimizer with one count is given several; nothing has changed.
    """
    if not isinstance(optimizer, Ada2MS):
        return only_count(fitted.entries.values(), type(optimizer).__name__)
    s, k = ([float(s or 0.0) for s, _ in fitted.groups], [k for _, k in fitted.groups])
    n = len(optimizer._momentums)
    steps, own = np.zeros(n, int), np.zeros(n)
    for path, (i, _) in variables.items():
        entry = fitted.entries[path]
        steps[i], own[i] = entry.step, entry.global_exp_avg_sq or 0.0
    _assign(optimizer._global_step, np.array(k if len(k) > 1 else k[0]))
    _assign(optimizer._steps, steps)
    model = np.array(s if len(s) > 1 else s[0])
    _assign(optimizer._global_velocity, own if optimizer.scope == "tensor" else model)
    _assign(optimizer._skipped, np.array(fitted.skipped))
    return max(k) + fitted.skipped


def _left_behind(model: Model, wrapper: keras.optimizers.Optimizer, optimizer: keras.optimizers.Optimizer) -> list[str]:
    """Notes of what an export does not take along."""
    notes = unknown_variables(model, optimizer)
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
    if getattr(optimizer, "_gradient_norm", None) is not None:
        _assign(optimizer._gradient_norm, np.array(0.0))
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


def _numpy(variable: Variable) -> Any:
    dtype = keras.backend.standardize_dtype(variable.dtype)
    value = ops.convert_to_tensor(variable)
    return np.array(ops.convert_to_numpy(ops.cast(value, "float32") if dtype in ("float16", "bfloat16") else value))


def _assign(variable: Variable, array: Any) -> None:
    variable.assign(ops.convert_to_tensor(array, variable.dtype))
