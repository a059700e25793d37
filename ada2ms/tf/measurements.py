"""What the last update was, for loggers; `ada2ms.core.measurements` says what the numbers are."""

import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import keras
import numpy as np
from keras import ops

from ada2ms.core import measurements as names
from ada2ms.core.coefficients import bias_correction
from ada2ms.core.hyperparameters import Scheduled
from ada2ms.tf.dtypes import cast, compute_dtype
from ada2ms.tf.kernels import Coefficients
from ada2ms.tf.kernels.ops import denom_power
from ada2ms.tf.models import Model, trainable_variables_of
from ada2ms.tf.optimizer import Ada2MS
from ada2ms.tf.paths import path_of
from ada2ms.tf.step import Moved, b2_of_moments, coefficients, correction_of_moments, of_moment

Tensor = Any  # of whichever backend Keras runs on


@overload
def measure(
    optimizer: keras.optimizers.Optimizer,
    model: Model | None = None,
    *,
    match: str = "",
    prefix: str = names.PREFIX,
    wait: Literal[True],
) -> dict[str, float]: ...


@overload
def measure(
    optimizer: keras.optimizers.Optimizer,
    model: Model | None = None,
    *,
    match: str = "",
    prefix: str = names.PREFIX,
    wait: Literal[False] = False,
) -> dict[str, Any]: ...


def measure(
    optimizer: keras.optimizers.Optimizer,
    model: Model | None = None,
    *,
    match: str = "",
    prefix: str = names.PREFIX,
    wait: bool = False,
) -> Any:
    """The last update in numbers, for any logger: `ada2ms.core.measurements` has the list.

    Call it after an update, in a loop of your own or in a callback: `Ada2MSLogger(layers=True)` does. (In `fit` on JAX,
    Keras gives variables their values at the end of an epoch.) Without a model it reads no variable of it and costs a
    few operations on single numbers. With one it makes a pass over each variable and its averages.

    A learning rate that a callback changes has the value of now; a `LearningRateSchedule` that of the last update.

    Args:
        optimizer: Ada2MS, or a LossScaleOptimizer of one.
        model: or a list of variables, of which those are measured that the optimizer updates. Their names are paths.
        match: a regular expression that is searched in the paths (`re.search`).
        prefix: what every key begins with.
        wait: whether to wait for the device and return Python numbers. If not, numbers that Python does not know are
            tensors of the backend, without dimensions.

    Returns:
        Numbers by names. `gradient_norm` is there if the optimizer was built with `global_clipnorm`, which may be
        infinite.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
    >>> import keras
    >>> from ada2ms.tf import Ada2MS, measure
    >>> variable = keras.Variable([1.0, 2.0], name="bias")
    >>> optimizer = Ada2MS(learning_rate=0.5)
    >>> optimizer.apply([keras.ops.convert_to_tensor([0.1, -0.3])], [variable])
    >>> measured = measure(optimizer, [variable], wait=True)
    >>> measured["ada2ms/lr"], [name for name in measured if name.endswith("bias")]
    (0.5, ['ada2ms/effective_steps/bias', 'ada2ms/update_ratios/bias'])
    """
    own = getattr(optimizer, "inner_optimizer", optimizer)
    if not isinstance(own, Ada2MS):
        raise TypeError(f"Invalid optimizer: of type {type(optimizer).__name__} (must be Ada2MS, or wrap one)")
    found = _of_model(own)
    if model is not None:
        found |= _of_variables(own, model, match)
    found = {prefix + name: x for name, x in found.items()}
    return _on_host(found) if wait else found


def _of_model(optimizer: Ada2MS) -> dict[str, Any]:
    """Those numbers that need no pass over a variable."""
    s_hat: Tensor | float = math.nan
    k: Tensor | float = 0.0
    skipped, norm = 0.0, None
    if optimizer.built:
        k = _number(optimizer, of_moment(ops.convert_to_tensor(optimizer._global_step), 0))
        skipped = _number(optimizer, optimizer._skipped)
        s_hat = _mean_s_hat(optimizer)
        norm = None if optimizer._gradient_norm is None else _number(optimizer, optimizer._gradient_norm)
    lr = _learning_rate(optimizer)
    # d = v_hat^(a/2) * s_hat^((1-a)/2) + eps, of an entry whose v_hat is s_hat
    d = s_hat**0.5 + optimizer.epsilon
    measured = k, skipped, lr, _adaptivity(optimizer, optimizer.adaptivity, 0), s_hat, lr / d, norm
    return {name: x for name, x in zip(names.OF_MODEL, measured, strict=True) if x is not None}


def _number(optimizer: Ada2MS, x: Any) -> Tensor:
    """A tensor of its own."""
    dtype = optimizer._dtype if optimizer.built else keras.config.floatx()
    return ops.cast(ops.stop_gradient(ops.convert_to_tensor(x)), dtype) * 1.0


def _learning_rate(optimizer: Ada2MS) -> Tensor:
    """That of the last update, if it is scheduled; else that of now."""
    schedule = getattr(optimizer, "_learning_rate", None)
    if isinstance(schedule, keras.optimizers.schedules.LearningRateSchedule):
        return _number(optimizer, schedule(ops.maximum(ops.convert_to_tensor(optimizer._iterations) - 1, 0)))
    return _number(optimizer, optimizer.learning_rate)


def _adaptivity(optimizer: Ada2MS, adaptivity: Scheduled, moment: int) -> Tensor | float:
    """That of the last update."""
    if not callable(adaptivity):
        return adaptivity
    k = of_moment(ops.convert_to_tensor(optimizer._global_step), moment) if optimizer.built else 0
    return _number(optimizer, adaptivity(_number(optimizer, ops.maximum(k - 1, 0))))


def _moved(optimizer: Ada2MS) -> Moved:
    """The counts of the variables, and s_hat, as the last update left them."""
    dtype, model = optimizer._dtype, optimizer.scope == "model"
    count = ops.cast(ops.maximum(ops.convert_to_tensor(optimizer._steps), 1), dtype)
    k = ops.cast(ops.maximum(ops.convert_to_tensor(optimizer._global_step), 1), dtype) if model else count
    s = ops.convert_to_tensor(optimizer._global_velocity)
    return Moved(count, s / correction_of_moments(b2_of_moments(optimizer), k))


def _mean_s_hat(optimizer: Ada2MS) -> Tensor:
    """The mean of the global second moments that have been updated; NaN if none has."""
    s_hat = ops.reshape(_moved(optimizer).s_hat, (-1,))
    counts = optimizer._global_step if optimizer.scope == "model" else optimizer._steps
    moved = ops.reshape(ops.convert_to_tensor(counts), (-1,)) > 0
    return ops.sum(ops.where(moved, s_hat, 0.0)) / ops.sum(ops.cast(moved, s_hat.dtype))


def _of_variables(optimizer: Ada2MS, model: Model, match: str) -> dict[str, Any]:
    """Those of every variable, from sums of squares."""
    variables = {id(v): v for v in trainable_variables_of(model)}
    if not optimizer.built:
        paths = names.matching([path_of(v) for v in variables.values()], match)
        return names.of_parameters(paths, [math.nan] * len(paths), [math.nan] * len(paths))
    own = [i for i in optimizer._updated if id(optimizer._trainable_variables[i]) in variables]
    if not own:
        raise ValueError("Invalid model: it has no variable of the optimizer (must be what the optimizer updates)")
    paths = [path_of(optimizer._trainable_variables[i]) for i in own]
    chosen = set(names.matching(paths, match))
    indices = [i for i, path in zip(own, paths, strict=True) if path in chosen]
    moved, lr = _moved(optimizer), _learning_rate(optimizer)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for part in optimizer._grouping.parts(optimizer, indices):
        some = [indices[i] for i in part.positions]
        adaptivity = _adaptivity(optimizer, part.hyper.adaptivity, part.moment)
        each = coefficients(optimizer, part, some, lr, adaptivity, moved, None, None)
        for position, i in enumerate(some):
            correction = bias_correction(part.hyper.b1, moved.count[i], ops.expm1)
            decays = bool(part.hyper.weight_decay) and i not in optimizer._excluded
            found[i] = _ratios(optimizer, i, each, position, correction, decays)
    return names.of_parameters(
        [path for path in paths if path in chosen], *zip(*(found[i] for i in indices), strict=True)
    )


def _ratios(
    optimizer: Ada2MS, i: int, each: Coefficients, position: int, bias_correction1: Tensor, decays: bool
) -> tuple[Tensor, Tensor]:
    """|lr*m_hat/d| / |m_hat|, and |update| / |theta|, of a variable."""
    variable = optimizer._trainable_variables[i]
    dtype = compute_dtype(variable.dtype)
    m, v, theta = (
        ops.cast(ops.stop_gradient(ops.convert_to_tensor(x)), dtype)
        for x in (optimizer._momentums[i], optimizer._velocities[i], variable)
    )
    if optimizer._compensations and optimizer._compensations[i] is not None:
        theta = theta + ops.cast(optimizer._compensations[i], dtype)
    # d = v_hat^(a/2) * s_hat^((1-a)/2) + eps, less the common factor, which the step size is less, too
    d = denom_power(v, cast(each.exponent, dtype)) + cast(each.eps[position], dtype)
    step = cast(each.step_sizes[position], dtype) * m / ops.where(d == 0, math.inf, d)
    update = step
    if decays:
        kept = cast(each.decay_factor, dtype)
        update = (step + (1 - kept) * theta) / kept
    sums = [ops.sum(ops.square(x)) for x in (step, m, update, theta)]
    has_moved = ops.convert_to_tensor(optimizer._steps)[i] > 0
    ratio = ops.where(has_moved, ops.sqrt(sums[2] / sums[3]), math.nan)
    return ops.sqrt(sums[0] / sums[1]) * cast(bias_correction1, dtype), ratio


def _on_host(found: dict[str, Any]) -> dict[str, float]:
    """Python numbers, by one transfer."""
    tensors = {name: x for name, x in found.items() if not isinstance(x, (int, float))}
    dtype = "float64" if any("float64" in str(x.dtype) for x in tensors.values()) else "float32"
    values: Sequence[float] = []
    if tensors:
        stack = ops.stack([ops.reshape(ops.cast(x, dtype), ()) for x in tensors.values()])
        values = np.array(ops.convert_to_numpy(stack)).tolist()
    read = dict(zip(tensors, values, strict=True))
    return {name: read[name] if name in read else float(x) for name, x in found.items()}
