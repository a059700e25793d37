"""The rule on keras.ops, as a Keras optimizer for each of Keras' backends."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from ada2ms.core import schedules
from ada2ms.core.hyperparameters import DEFAULT_NONFINITE, DEFAULT_SCOPE, DEFAULTS, Nonfinite, Scope, check, value_at

Tensor = Any  # of whichever backend Keras runs on
Variable = Any  # a keras.Variable, or the backend's own


class Step(NamedTuple):
    """What a step computes once for all variables."""

    finite: Tensor | None  # whether the step counts; None: it always does
    adaptivity: Tensor | float
    momentum_correction: Tensor  # 1 - b1^t, for each variable
    scale: Tensor  # what all entries of a variable have in common in v_hat^(a/2) * s_hat^((1-a)/2), for each variable


@keras.saving.register_keras_serializable(package="ada2ms")
class Ada2MS(keras.optimizers.Optimizer):  # type: ignore[misc]
    """Optimizer that implements the Ada2MS algorithm.

    Ada2MS is AdamW at `adaptivity=1`, momentum SGD whose step is normalised by one number for the whole model at
    `adaptivity=0`, and moves between them geometrically:

        denominator = velocity_hat**(adaptivity / 2) * global_velocity_hat**((1 - adaptivity) / 2) + epsilon
        variable    = variable * (1 - learning_rate * weight_decay) - learning_rate * momentum_hat / denominator

    where `momentum` and `velocity` are Adam's averages of the gradient and of its square, `global_velocity` is the same
    average of the mean of the squared gradient over every entry of the model, and a hat marks Adam's bias correction.
    The rule, symbol by symbol, and what in it the paper says and what is this project's reading: `ada2ms.core.spec`.

    Args:
        learning_rate: A number, a `keras.optimizers.schedules.LearningRateSchedule`, or a callable without arguments.
            As in every Keras optimizer, a schedule is given `iterations` of `apply`, the first being 0, and a number is
            kept in `keras.config.floatx()`. Defaults to `0.001`.
        beta_1: A number in [0, 1), the decay rate of `momentum`. Defaults to `0.9`.
        beta_2: A number in [0, 1), the decay rate of `velocity` and `global_velocity`. Defaults to `0.999`.
        epsilon: A number, at least 0. It is added after bias correction and outside the root, as in PyTorch and Optax
            and in the paper of Adam; `keras.optimizers.AdamW` adds it before bias correction. Defaults to `1e-8`.
        weight_decay: A number, at least 0, or None. Weight decay is decoupled, scaled by the learning rate and part of
            the update; see `exclude_from_weight_decay`. Defaults to `0.01`.
        adaptivity: A number in [0, 1]; or a schedule: one of `ada2ms.core` (Linear, Cosine, Exponential, Constant), a
            `LearningRateSchedule`, or any callable that is given the count of completed updates as a float tensor,
            0 for the first update. An update completes neither when gradients are accumulated nor when it is skipped.
            Defaults to `0.5`.
        scope: `"model"`: one global second moment, of all variables that this optimizer updates (within a
            `MultiOptimizer`, those of this member). `"tensor"`: one for each variable. Defaults to `"model"`.
        nonfinite: `"propagate"`, or `"skip"`: a step with a gradient that is not finite changes neither variables nor
            state; it counts in the optimizer's variable `skipped` and, as all calls of `apply` do, in `iterations`.
            Defaults to `"propagate"`.
        name, clipnorm, clipvalue, global_clipnorm, use_ema, ema_momentum, ema_overwrite_frequency, loss_scale_factor,
            gradient_accumulation_steps: as in every Keras optimizer. Clipping comes before all of the rule.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is allowed.

    Example:
    >>> variable = keras.Variable([1.0, 2.0])
    >>> optimizer = Ada2MS(learning_rate=0.1, adaptivity=ada2ms.core.Linear(1.0, 0.0, steps=1000))
    >>> optimizer.apply([keras.ops.convert_to_tensor([0.1, -0.3])], [variable])

    State is kept in `variables`, and saved and restored with them: `momentum` and `velocity` of each variable's shape,
    `steps` (how often each variable has been updated: one whose gradient is None keeps its state and its count),
    `global_velocity`, `global_step` and `skipped`. Arithmetic and state of float16 and bfloat16 variables are float32,
    of float64 variables float64.

    Reference:

    - [Zhu, Xiao, Min, 2026](https://arxiv.org/abs/2605.20533), of which this project implements its own reading.
    """

    def __init__(
        self,
        learning_rate: float | Callable[..., Any] = DEFAULTS.lr,
        beta_1: float = DEFAULTS.b1,
        beta_2: float = DEFAULTS.b2,
        epsilon: float = DEFAULTS.eps,
        weight_decay: float | None = DEFAULTS.weight_decay,
        adaptivity: float | Callable[[Any], Any] = DEFAULTS.adaptivity,
        scope: Scope = DEFAULT_SCOPE,
        nonfinite: Nonfinite = DEFAULT_NONFINITE,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        ema_overwrite_frequency: int | None = None,
        loss_scale_factor: float | None = None,
        gradient_accumulation_steps: int | None = None,
        name: str = "ada2ms",
        **kwargs: Any,
    ) -> None:
        check("lr", learning_rate, "learning_rate")
        check("b1", beta_1, "beta_1")
        check("b2", beta_2, "beta_2")
        check("eps", epsilon, "epsilon")
        check("weight_decay", 0.0 if weight_decay is None else weight_decay)
        check("adaptivity", adaptivity)
        check("scope", scope)
        check("nonfinite", nonfinite)
        super().__init__(
            learning_rate=learning_rate if callable(learning_rate) else float(learning_rate),
            weight_decay=None if weight_decay is None else float(weight_decay),
            clipnorm=clipnorm,
            clipvalue=clipvalue,
            global_clipnorm=global_clipnorm,
            use_ema=use_ema,
            ema_momentum=ema_momentum,
            ema_overwrite_frequency=ema_overwrite_frequency,
            loss_scale_factor=loss_scale_factor,
            gradient_accumulation_steps=gradient_accumulation_steps,
            name=name,
            **kwargs,
        )
        self.beta_1 = float(beta_1)
        self.beta_2 = float(beta_2)
        self.epsilon = float(epsilon)
        self.adaptivity = adaptivity if callable(adaptivity) else float(adaptivity)
        self.scope = scope
        self.nonfinite = nonfinite
        self._excluded_names: list[str] = []

    def build(self, variables: list[Variable]) -> None:
        """Creates the state: two slots for each variable, of its shape, and four small variables for all of them."""
        if self.built:
            return
        super().build(variables)
        self._momentums, self._velocities = [], []
        for v in variables:
            self._momentums.append(self.add_variable_from_reference(v, name="momentum"))
            self._velocities.append(self.add_variable_from_reference(v, name="velocity"))

        def add(name: str, dtype: str, shape: tuple[int, ...] = ()) -> Variable:
            return self.add_variable(shape, dtype=dtype, aggregation="only_first_replica", name=name)

        n = len(variables)
        dtypes = {_precision(v.dtype) for v in variables}
        self._dtype = "float64" if "float64" in dtypes else "float32"
        self._global_velocity = add("global_velocity", self._dtype, () if self.scope == "model" else (n,))
        self._global_step = add("global_step", "int")
        self._steps = add("steps", "int", (n,))
        self._skipped = add("skipped", "int")

    def apply(self, grads: Sequence[Tensor | None], trainable_variables: Sequence[Variable] | None = None) -> None:
        """Updates the variables by gradients of their shapes; None leaves a variable and its state alone.

        Sparse gradients are made dense and 16-bit ones float32 first, so that Keras' own unscaling, accumulation and
        clipping neither take repeated rows apart nor overflow.
        """
        super().apply([None if g is None else _dense(g) for g in grads], trainable_variables)

    def update_step(self, gradient: Tensor, variable: Variable, learning_rate: Tensor, step: Step) -> None:
        """The rule, for one variable."""
        i = self._get_variable_index(variable)
        dtype = _precision(variable.dtype)
        g, theta = ops.cast(gradient, dtype), ops.cast(variable, dtype)
        m, v = ops.convert_to_tensor(self._momentums[i]), ops.convert_to_tensor(self._velocities[i])
        lr, b1, b2 = ops.cast(learning_rate, dtype), self.beta_1, self.beta_2
        wd = (self.weight_decay or 0.0) if self._use_weight_decay(self._trainable_variables[i]) else 0.0
        a = step.adaptivity if isinstance(step.adaptivity, float) else ops.cast(step.adaptivity, dtype)
        scale, momentum_correction = ops.cast(step.scale[i], dtype), ops.cast(step.momentum_correction[i], dtype)

        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * ops.square(g)
        d = _power(v, a / 2) * scale + self.epsilon
        if self.epsilon < np.finfo(dtype).tiny:  # where nothing has moved yet, the update is 0
            d = ops.where(d == 0, math.inf, d)
        theta = theta * (1 - lr * wd) - (lr / momentum_correction) / d * m

        self._assign(self._momentums[i], m, step)
        self._assign(self._velocities[i], v, step)
        self._assign(variable, ops.cast(theta, variable.dtype), step)

    def _squares(self, gradients: list[Tensor]) -> list[Tensor]:
        return [ops.sum(ops.square(ops.cast(g, self._dtype))) for g in gradients]

    def _update(
        self, gradients: list[Tensor], variables: list[Variable], learning_rate: Tensor, squares: list[Tensor]
    ) -> None:
        step = self._begin_step([self._get_variable_index(v) for v in variables], squares)
        for g, v in zip(gradients, variables, strict=True):
            self.update_step(g, v, learning_rate, step)

    def _begin_step(self, indices: list[int], squares: list[Tensor]) -> Step:
        """Moves the counts and the global second moment, given which variables have a gradient, and its sum(g*g)."""
        total = sum(squares[1:], squares[0])
        finite = ops.isfinite(total) if self.nonfinite == "skip" else None

        # Schedules are given the count before this step.
        adaptivity = value_at(self.adaptivity, ops.cast(self._global_step, self._dtype))
        if not isinstance(adaptivity, float):
            adaptivity = ops.cast(adaptivity, self._dtype)

        present = np.zeros(len(self._trainable_variables), bool)
        present[indices] = True
        k, t = ops.convert_to_tensor(self._global_step) + 1, ops.convert_to_tensor(self._steps)
        t = t + ops.convert_to_tensor(present.astype("int32"), t.dtype)
        sizes = [math.prod(self._trainable_variables[i].shape) for i in range(len(present))]

        s, b2 = ops.convert_to_tensor(self._global_velocity), self.beta_2
        counted = ops.maximum(t, 1)  # a variable without any update yet has nothing to correct
        if self.scope == "model":
            entries = sum(sizes[i] for i in indices)
            s = b2 * s + (1 - b2) * (total / max(entries, 1))
            s_hat = s / self._correction(b2, k)
        else:
            means = dict(zip(indices, squares, strict=True))
            zero = ops.zeros((), self._dtype)
            mean = ops.stack([means.get(i, zero) / max(size, 1) for i, size in enumerate(sizes)])
            s = ops.where(ops.convert_to_tensor(present), b2 * s + (1 - b2) * mean, s)
            s_hat = s / self._correction(b2, counted)

        a = adaptivity
        scale = s_hat ** ((1 - a) / 2) / self._correction(b2, counted) ** (a / 2)
        step = Step(finite, adaptivity, self._correction(self.beta_1, counted), scale)
        self._assign(self._global_velocity, s, step)
        self._assign(self._global_step, k, step)
        self._assign(self._steps, t, step)
        if finite is not None:
            skipped = ops.convert_to_tensor(self._skipped)
            self.assign(self._skipped, ops.where(finite, skipped, skipped + 1))
        return step

    def _correction(self, beta: float, count: Tensor) -> Tensor:
        """1 - beta**count, without the cancellation that costs 1 - beta**count its digits."""
        count = ops.cast(count, self._dtype)
        return -ops.expm1(count * math.log(beta)) if beta else ops.ones_like(count)

    def _assign(self, variable: Variable, value: Tensor, step: Step) -> None:
        if step.finite is not None:
            value = ops.where(step.finite, value, ops.convert_to_tensor(variable))
        self.assign(variable, value)

    # The one place that is not Keras' public API. What is global must be computed after clipping, accumulation and
    # unscaling, once per step, and with TensorFlow's distribution strategies from the gradients summed over replicas.
    # These two hooks are called then and there: the first on every backend, the second, from within the first, on
    # TensorFlow. Keras' own optimizers (Nadam and others) override them for the same reason.

    def _backend_update_step(
        self, grads: list[Tensor], trainable_variables: list[Variable], learning_rate: Tensor
    ) -> None:
        if keras.backend.backend() == "tensorflow":
            super()._backend_update_step(grads, trainable_variables, learning_rate)
        else:
            self._update(grads, trainable_variables, learning_rate, self._squares(grads))

    def _distributed_tf_update_step(
        self, distribution: Any, grads_and_vars: list[tuple[Tensor, Variable]], learning_rate: Tensor
    ) -> None:
        def update(_: Variable, *args: Any) -> None:
            self._update(*args)

        grads, variables = zip(*grads_and_vars, strict=True)
        # Sums are taken once: each replica's own might differ in the last digit, and replicas drift apart.
        squares = self._squares([distribution.experimental_local_results(g)[0] for g in grads])
        args = (list(grads), list(variables), learning_rate, squares)  # of which each replica is given its own
        distribution.extended.update(self._global_velocity.value, update, args=args, group=False)

    def _apply_weight_decay(self, variables: list[Variable]) -> None:
        """Does nothing: decay is part of `update_step`, in its precision, and skipped with it."""

    def exclude_from_weight_decay(
        self, var_list: list[Variable] | None = None, var_names: list[str] | None = None
    ) -> None:
        """Excludes variables from weight decay; to be called before the optimizer is built.

        Args:
            var_list: variables.
            var_names: regular expressions; variables are excluded whose path (`"encoder/dense/bias"`) or name
                (`"bias"`) any of them matches somewhere. The same on every backend, unlike in `keras.optimizers.AdamW`.
        """
        super().exclude_from_weight_decay(var_list, var_names)
        self._excluded_names = list(var_names or [])

    def _use_weight_decay(self, variable: Variable) -> bool:
        path = getattr(variable, "path", variable.name)  # a tf.Variable has a name only
        excluded = any(re.search(name, path) for name in self._excluded_names)
        return not excluded and bool(super()._use_weight_decay(variable))

    def add_variable(
        self, shape: tuple[int, ...], initializer: Any = "zeros", dtype: Any = None, *args: Any, **kwargs: Any
    ) -> Variable:
        """As in every Keras optimizer, but slots of 16-bit variables are float32, which averages need to move."""
        # Moving averages of the variables (use_ema) stay as they are: Keras assigns them without a cast.
        half = dtype is not None and keras.backend.standardize_dtype(dtype) in ("float16", "bfloat16")
        if half and not str(kwargs.get("name")).endswith("average"):
            dtype = "float32"
        return super().add_variable(shape, initializer, dtype, *args, **kwargs)

    def get_config(self) -> dict[str, Any]:
        """The arguments, as plain data that `from_config` takes."""
        adaptivity: Any = self.adaptivity
        if isinstance(adaptivity, schedules.AdaptivitySchedule):
            adaptivity = adaptivity.to_dict()
        elif callable(adaptivity):
            adaptivity = keras.saving.serialize_keras_object(adaptivity)
        return {
            **super().get_config(),
            "beta_1": self.beta_1,
            "beta_2": self.beta_2,
            "epsilon": self.epsilon,
            "adaptivity": adaptivity,
            "scope": self.scope,
            "nonfinite": self.nonfinite,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> "Ada2MS":
        """The optimizer that `get_config` described."""
        config = dict(config)
        adaptivity = config.get("adaptivity")
        if isinstance(adaptivity, dict) and "schedule" in adaptivity:
            config["adaptivity"] = schedules.from_dict(adaptivity)
        elif isinstance(adaptivity, dict):
            config["adaptivity"] = keras.saving.deserialize_keras_object(adaptivity, custom_objects=custom_objects)
        return super().from_config(config, custom_objects=custom_objects)  # type: ignore[no-any-return]


keras.saving.get_custom_objects()["ada2ms"] = Ada2MS  # compile(optimizer="ada2ms")


def _precision(dtype: Any) -> str:
    """The precision in which a variable is updated and its state kept."""
    return "float64" if keras.backend.standardize_dtype(dtype) == "float64" else "float32"


def _dense(gradient: Tensor) -> Tensor:
    """A dense gradient, in at least float32; repeated rows of a sparse one are summed."""
    if hasattr(gradient, "dense_shape"):  # tf.IndexedSlices, which keras.ops would take for a tensor of its rows
        import tensorflow as tf

        gradient = tf.convert_to_tensor(gradient)
    gradient = ops.convert_to_tensor(gradient, sparse=False)
    return ops.cast(gradient, _precision(gradient.dtype))


def _power(x: Tensor, exponent: Tensor | float) -> Tensor:
    """x**exponent for x >= 0 and exponents in [0, 0.5], several times faster than ops.power."""
    if not isinstance(exponent, float):
        logarithm = ops.where(x == 0, -1e30, ops.log(x))  # finite: 0**0 = 1
        return ops.exp(exponent * logarithm)
    if exponent == 0.0:  # adaptivity 0
        return 1.0
    if exponent == 0.25:  # adaptivity 0.5
        return ops.sqrt(ops.sqrt(x))
    if exponent == 0.5:  # adaptivity 1
        return ops.sqrt(x)
    return ops.exp(exponent * ops.log(x))
