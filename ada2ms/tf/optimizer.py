"""The rule on keras.ops, as a Keras optimizer for each of Keras' backends."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from ada2ms.core import schedules
from ada2ms.core.hyperparameters import DEFAULT_NONFINITE, DEFAULT_SCOPE, DEFAULTS, Nonfinite, Scope, check, value_at
from ada2ms.tf.exclusions import Exclusions, path_of

Tensor = Any  # of whichever backend Keras runs on
Variable = Any  # a keras.Variable, or the backend's own

_SMALL_EPSILON = 1e-18  # what is smaller may be lost beside a global second moment, of at most 3e38, which leaves 0/0


class Step(NamedTuple):
    """What a step computes once for all variables; lists have an entry for each variable of the optimizer."""

    finite: Tensor | None  # whether the step counts; None: it always does
    weights: Sequence[Tensor | float]  # b1, 1 - b1, b2, 1 - b2; 1, 0, 1, 0 in a step that does not count
    adaptivity: Tensor | float
    decay: Tensor  # 1 - lr * weight_decay
    # With c for what all entries of a variable have in common in v_hat^(a/2) * s_hat^((1-a)/2), so that d is
    # c * (v^(a/2) + epsilon/c):
    sizes: list[Tensor]  # lr / (1 - b1^t) / c
    epsilons: list[Tensor]  # epsilon / c


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
        weight_decay: A number, at least 0. Weight decay is decoupled, scaled by the learning rate and part of the
            update; see `exclude_from_weight_decay`. Defaults to `0.01`.
        adaptivity: A number in [0, 1]; or a schedule: one of `ada2ms.core` (Linear, Cosine, Exponential, Constant), a
            `LearningRateSchedule`, or any callable that is given the count of completed updates as a float tensor,
            0 for the first update. An update completes neither when gradients are accumulated nor when it is skipped.
            A callable of your own must be one that Keras can serialise, if the model is to be saved:
            `keras.saving.register_keras_serializable`. Defaults to `0.5`.
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
    >>> import keras
    >>> from ada2ms.core import Linear
    >>> from ada2ms.tf import Ada2MS
    >>> variable = keras.Variable([1.0, 2.0])
    >>> optimizer = Ada2MS(learning_rate=0.1, adaptivity=Linear(1.0, 0.0, steps=1000))
    >>> optimizer.apply([keras.ops.convert_to_tensor([0.1, -0.3])], [variable])
    >>> print(keras.ops.convert_to_numpy(variable).round(3))
    [0.899 2.098]

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
        weight_decay: float = DEFAULTS.weight_decay,
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
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        check("lr", learning_rate, "learning_rate")
        check("b1", beta_1, "beta_1")
        check("b2", beta_2, "beta_2")
        check("eps", epsilon, "epsilon")
        if weight_decay is None:  # as from Keras' AdamW, whose tests match on these words
            raise ValueError("Argument `weight_decay` must be a float. Received: weight_decay=None")
        check("weight_decay", weight_decay)
        super().__init__(
            learning_rate=learning_rate if callable(learning_rate) else float(learning_rate),
            weight_decay=float(weight_decay),
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
        self.adaptivity = adaptivity
        self.scope = scope
        self.nonfinite = nonfinite
        self._exclusions = Exclusions()
        self._excluded_keys: frozenset[Any] | None = frozenset()  # None: of a configuration, which has paths only

    @property
    def adaptivity(self) -> float | Callable[[Any], Any]:
        """The number or schedule given, which may be replaced by another at any time.

        Where the training step runs as it is written, as on torch, the next update uses it. Compiled steps have the one
        that they were compiled with (numbers are part of compiled code, which is what makes 0, 0.5 and 1 fast): make a
        model compile its step again by `model.make_train_function(force=True)`.
        """
        return self._adaptivity

    @adaptivity.setter
    def adaptivity(self, adaptivity: float | Callable[[Any], Any]) -> None:
        check("adaptivity", adaptivity)
        self._adaptivity = adaptivity if callable(adaptivity) else float(adaptivity)

    @property
    def scope(self) -> Scope:
        """As given; the state's shape depends on it, so it is fixed once the optimizer is built."""
        return self._scope

    @scope.setter
    def scope(self, scope: Scope) -> None:
        check("scope", scope)
        if self.built and scope != self.scope:
            reason = f"this optimizer is built, with the state of {self.scope!r}: make another, and `import_state`"
            raise ValueError(f"Invalid scope: {scope!r} ({reason})")
        self._scope = scope

    @property
    def nonfinite(self) -> Nonfinite:
        """As given; it may be replaced at any time, like `adaptivity`."""
        return self._nonfinite

    @nonfinite.setter
    def nonfinite(self, nonfinite: Nonfinite) -> None:
        check("nonfinite", nonfinite)
        self._nonfinite = nonfinite

    def build(self, variables: list[Variable]) -> None:
        """Creates the state: two slots for each variable, of its shape, and four small variables for all of them.

        Variables that their gradients overwrite, such as the scales of a float8 layer, have no slots, as in Keras' own
        optimizers.
        """
        if self.built:
            return
        super().build(variables)
        self._updated = tuple(i for i, v in enumerate(variables) if not self._overwrite_variable_with_gradient(v))
        self._find_excluded()
        self._momentums, self._velocities = [None] * len(variables), [None] * len(variables)
        for i in self._updated:
            self._momentums[i] = self.add_variable_from_reference(variables[i], name="momentum")
            self._velocities[i] = self.add_variable_from_reference(variables[i], name="velocity")

        def add(name: str, dtype: str, shape: tuple[int, ...] = ()) -> Variable:
            return self.add_variable(shape, dtype=dtype, aggregation="only_first_replica", name=name)

        n = len(variables)
        self._entries = tuple(math.prod(v.shape) for v in variables)
        dtypes = {_precision(variables[i].dtype) for i in self._updated}
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

    def update_step(self, gradient: Tensor, variable: Variable, step: Step) -> None:
        """The rule, for one variable."""
        i = self._get_variable_index(variable)
        dtype = _precision(variable.dtype)
        g, theta = ops.cast(gradient, dtype), ops.cast(variable, dtype)
        m, v = ops.convert_to_tensor(self._momentums[i]), ops.convert_to_tensor(self._velocities[i])
        b1, w1, b2, w2, a = (_cast(x, dtype) for x in (*step.weights, step.adaptivity))
        if step.finite is not None:
            g = ops.where(step.finite, g, 0.0)

        m = b1 * m + w1 * g
        # JAX would store g*g, had this and the sum of squares that in common. TensorFlow would regroup the other
        # product, but not on every device, and copies of a variable would part.
        v = b2 * v + ((w2 * g) * g if keras.backend.backend() == "jax" else w2 * ops.square(g))
        d = _power(v, a / 2) + _cast(step.epsilons[i], dtype)
        if self.epsilon < _SMALL_EPSILON:  # where nothing has moved yet, the update is 0
            d = ops.where(d == 0, math.inf, d)
        if self._decays(i):
            theta = theta * _cast(step.decay, dtype)
        theta = theta - _cast(step.sizes[i], dtype) / d * m

        self.assign(self._momentums[i], m)
        self.assign(self._velocities[i], v)
        self.assign(variable, ops.cast(theta, variable.dtype))

    def _decays(self, i: int) -> bool:
        return bool(self.weight_decay) and i not in self._excluded

    def _squares(self, gradients: list[Tensor], variables: Sequence[Variable]) -> tuple[Tensor, Tensor]:
        """sum(g*g) of each, in one vector, and of all."""
        if keras.backend.backend() == "torch":
            from ada2ms.tf import _torch

            squares = _torch.squares(gradients, self._dtype)
        else:
            each = [ops.square(ops.cast(g, self._dtype)) for g in gradients]
            if keras.backend.backend() == "tensorflow":
                squares = _sums(each, [math.prod(v.shape) for v in variables])
            else:
                squares = ops.stack([ops.sum(x) for x in each])
        return squares, ops.sum(squares)

    def _update(
        self, gradients: list[Tensor], variables: list[Variable], learning_rate: Tensor, squares: Tensor, total: Tensor
    ) -> None:
        indices = [self._get_variable_index(v) for v in variables]
        step = self._begin_step(indices, squares, total, learning_rate)
        twice = len(set(indices)) < len(indices)  # lists of tensors are updated at once, which means otherwise then
        if keras.backend.backend() != "torch" or twice:
            for g, v in zip(gradients, variables, strict=True):
                self.update_step(g, v, step)
            return
        from ada2ms.tf import _torch

        if step.finite is None or step.finite:
            _torch.update(
                [v.value for v in variables],
                gradients,
                [self._momentums[i].value for i in indices],
                [self._velocities[i].value for i in indices],
                [step.sizes[i] for i in indices],
                [step.epsilons[i] for i in indices],
                [self._decays(i) for i in indices],
                step.decay,
                beta_1=self.beta_1,
                beta_2=self.beta_2,
                guarded=self.epsilon < _SMALL_EPSILON,
                adaptivity=step.adaptivity,
            )

    def _begin_step(self, indices: list[int], squares: Tensor, total: Tensor, learning_rate: Tensor) -> Step:
        """Moves the counts and the global second moment, given which variables have a gradient, and sum(g*g)."""
        n = len(self._trainable_variables)
        present = np.zeros(n, bool)
        present[indices] = True
        # Finite where the total is; but every variable asks, and XLA makes a total once more for many, and no root.
        finite = ops.isfinite(ops.sqrt(total)) if self.nonfinite == "skip" else None

        def kept(new: Tensor, old: Any) -> Tensor:
            """The new value, or, in a step that is skipped, the old one."""
            return new if finite is None else ops.where(finite, new, old)

        # Schedules are given the count before this step.
        a = value_at(self.adaptivity, ops.cast(self._global_step, self._dtype))
        a = a if isinstance(a, float) else ops.cast(a, self._dtype)

        k, t = ops.convert_to_tensor(self._global_step), ops.convert_to_tensor(self._steps)
        new_k, new_t = k + 1, t + ops.convert_to_tensor(present.astype("int32"), t.dtype)
        counted = ops.maximum(new_t, 1)  # a variable without any update yet has nothing to correct

        s, b1, b2 = ops.convert_to_tensor(self._global_velocity), self.beta_1, self.beta_2
        if self.scope == "model":
            new_s = b2 * s + total * ((1 - b2) / max(sum(self._entries[i] for i in indices), 1))
            s_hat = new_s / self._correction(b2, new_k)
        else:
            # A variable that is given twice moves its s once, by the mean of both.
            shares = (1 - b2) / np.maximum(self._entries, 1) / np.maximum(np.bincount(indices, minlength=n), 1)
            means = squares * ops.convert_to_tensor(shares[indices].astype(self._dtype))
            if indices != list(range(n)):  # some have no gradient, or they are in another order
                means = ops.scatter(ops.convert_to_tensor(np.array(indices)[:, None]), means, (n,))
            new_s = ops.where(ops.convert_to_tensor(present), b2 * s + means, s)
            s_hat = new_s / self._correction(b2, counted)

        weights: Sequence[Tensor | float] = (b1, 1 - b1, b2, 1 - b2)
        if finite is not None:
            old = ops.convert_to_tensor([1.0, 0.0, 1.0, 0.0], self._dtype)
            weights = ops.unstack(kept(ops.convert_to_tensor(weights, self._dtype), old), 4)
        lr = ops.cast(learning_rate, self._dtype)
        c = s_hat ** ((1 - a) / 2) / self._correction(b2, counted) ** (a / 2)
        still = c == 0  # no gradient has been other than 0, or all squares were lost, and epsilon is all of d
        c = ops.where(still, ops.convert_to_tensor(float(np.finfo(self._dtype).tiny) ** 0.5, self._dtype), c)
        sizes = lr / self._correction(b1, counted) / c
        if self.epsilon < _SMALL_EPSILON:
            sizes = ops.where(still, 0, sizes)
        step = Step(
            finite,
            weights,
            adaptivity=a,
            decay=kept(1 - lr * self.weight_decay, 1),
            sizes=ops.unstack(kept(sizes, 0), n),
            epsilons=ops.unstack(kept(self.epsilon / c, 1), n),
        )
        self.assign(self._global_velocity, kept(new_s, s))
        self.assign(self._global_step, kept(new_k, k))
        self.assign(self._steps, kept(new_t, t))
        if finite is not None:
            self.assign_add(self._skipped, ops.cast(ops.logical_not(finite), self._skipped.dtype))
        return step

    def _correction(self, beta: float, count: Tensor) -> Tensor:
        """1 - beta**count, without the cancellation that costs 1 - beta**count its digits."""
        count = ops.cast(count, self._dtype)
        return -ops.expm1(count * math.log(beta)) if beta else ops.ones_like(count)

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
            self._update(grads, trainable_variables, learning_rate, *self._squares(grads, trainable_variables))

    def _distributed_tf_update_step(
        self, distribution: Any, grads_and_vars: list[tuple[Tensor, Variable]], learning_rate: Tensor
    ) -> None:
        def update(_: Variable, *args: Any) -> None:
            self._update(*args)

        grads, variables = zip(*grads_and_vars, strict=True)
        # Sums are taken once: each replica's own might differ in the last digit, and replicas drift apart.
        squares = self._squares([distribution.experimental_local_results(g)[0] for g in grads], variables)
        args = (list(grads), list(variables), learning_rate, *squares)  # of which each replica is given its own
        distribution.extended.update(self._global_velocity.value, update, args=args, group=False)

    def _apply_weight_decay(self, variables: list[Variable]) -> None:
        """Does nothing: decay is part of `update_step`, in its precision, and skipped with it."""

    def stateless_apply(
        self, optimizer_variables: list[Tensor], grads: list[Tensor], trainable_variables: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """As in every Keras optimizer. On torch, where updates are made in place, the tensors given are left alone."""
        if keras.backend.backend() == "torch":
            optimizer_variables, trainable_variables = (
                [ops.convert_to_tensor(x).detach().clone() for x in given]  # which may be variables too
                for given in (optimizer_variables, trainable_variables)
            )
        updated: tuple[list[Tensor], list[Tensor]]
        updated = super().stateless_apply(optimizer_variables, grads, trainable_variables)
        return updated

    def exclude_from_weight_decay(
        self, var_list: list[Variable] | None = None, var_names: list[str] | None = None
    ) -> None:
        """Excludes variables from weight decay; to be called before the optimizer is built.

        Args:
            var_list: variables.
            var_names: regular expressions; variables are excluded whose path (`"encoder/dense/bias"`) or name
                (`"bias"`) any of them matches somewhere. The same on every backend, unlike in `keras.optimizers.AdamW`.
        """
        self._exclusions = Exclusions.of(var_list, var_names)
        self._excluded_keys = frozenset(self._var_key(v) for v in var_list or ())
        if self.built:
            self._find_excluded()

    def _find_excluded(self) -> None:
        """Indices of the variables that are excluded, which the configuration keeps too."""
        variables = [self._trainable_variables[i] for i in self._updated]
        paths = [path_of(v) for v in variables]
        if self._excluded_keys is None:
            found = self._exclusions.found(paths)
        else:
            found = {i for i, v in enumerate(variables) if self._var_key(v) in self._excluded_keys}
            found |= self._exclusions.by_name(paths)
        self._excluded = frozenset(self._updated[i] for i in found)
        self._exclusions = self._exclusions.built(paths, found)

    def _use_weight_decay(self, variable: Variable) -> bool:
        return self._get_variable_index(variable) not in self._excluded

    def add_variable(
        self, shape: tuple[int, ...], initializer: Any = "zeros", dtype: Any = None, *args: Any, **kwargs: Any
    ) -> Variable:
        """As in every Keras optimizer, but slots of 16-bit variables are float32, which averages need to move."""
        # Moving averages of the variables (use_ema) stay as they are: Keras assigns them without a cast.
        half = dtype is not None and keras.backend.standardize_dtype(dtype) in ("float16", "bfloat16")
        if half and not str(kwargs.get("name")).endswith("average"):
            dtype = "float32"
        return super().add_variable(shape, initializer, dtype, *args, **kwargs)

    # What Keras saves, in `.keras` files among others. It numbers variables by their order, which is another one once a
    # quantized model has been saved and loaded: there, its layers' scales come first.

    def save_own_variables(self, store: Any) -> None:
        """Puts the state into a store of Keras, whose keys are numbers."""
        for i, (variable, order) in enumerate(self._as_saved()):
            store[str(i)] = variable.numpy() if order is None else variable.numpy()[order]

    def load_own_variables(self, store: Any) -> None:
        """Takes the state from a store of Keras; warns, as every Keras optimizer does, if it has other variables.

        Raises:
            ValueError: a shape is another; nothing has changed.
        """
        saved = self._as_saved()
        if len(saved) != len(store.keys()):
            super().load_own_variables(store)
            return
        arrays = [np.asarray(store[str(i)]) for i in range(len(saved))]
        for (variable, _), array in zip(saved, arrays, strict=True):
            if tuple(variable.shape) != array.shape:
                shapes = f"shape {tuple(variable.shape)}; in what was saved it is {array.shape}"
                raise ValueError(f"The state does not fit optimizer {self.name!r}: {variable.path!r} has {shapes}")
        for (variable, order), array in zip(saved, arrays, strict=True):
            variable.assign(array if order is None else array[np.argsort(order)])

    def _as_saved(self) -> list[tuple[Variable, list[int] | None]]:
        """The state's variables in order; and the order of those that have an entry for each variable.

        Where no variable is overwritten by its gradient, these are the orders that they have anyway.
        """
        if not self.built:
            return [(v, None) for v in self.variables]
        order = sorted(range(len(self._trainable_variables)), key=lambda i: i not in self._updated)
        per_variable = {id(self._steps), *([id(self._global_velocity)] if self.scope == "tensor" else [])}
        accumulators = self._accumulated_gradients if self.gradient_accumulation_steps else []
        moved = {id(old): accumulators[i] for old, i in zip(accumulators, order, strict=False)}
        return [(moved.get(id(v), v), order if id(v) in per_variable else None) for v in self.variables]

    def get_config(self) -> dict[str, Any]:
        """The arguments, as plain data that `from_config` takes."""
        adaptivity: Any = self.adaptivity
        if isinstance(adaptivity, schedules.AdaptivitySchedule):
            adaptivity = adaptivity.to_dict()
        elif callable(adaptivity):
            adaptivity = keras.saving.serialize_keras_object(adaptivity)
        exclusions = {"exclude_from_weight_decay": self._exclusions.to_config()} if self._exclusions else {}
        return {
            **super().get_config(),
            **exclusions,
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
        exclusions = config.pop("exclude_from_weight_decay", None)
        optimizer: Ada2MS = super().from_config(config, custom_objects=custom_objects)
        if exclusions:
            optimizer._exclusions, optimizer._excluded_keys = Exclusions.from_config(exclusions), None
        return optimizer


# compile(optimizer="ada2ms"), and as the class is called, since Keras' own go by both
keras.saving.get_custom_objects().update({"ada2ms": Ada2MS, "Ada2MS": Ada2MS})


def _precision(dtype: Any) -> str:
    """The precision in which a variable is updated and its state kept."""
    return "float64" if keras.backend.standardize_dtype(dtype) == "float64" else "float32"


def _cast(x: Tensor | float, dtype: str) -> Tensor | float:
    """A float stays one, which `_power` may know how to raise to, and does not widen tensors."""
    return x if isinstance(x, float) else ops.cast(x, dtype)


def _dense(gradient: Tensor) -> Tensor:
    """A dense gradient, in at least float32; repeated rows of a sparse one are summed."""
    if str(gradient.dtype) in ("torch.float32", "torch.float64"):
        return gradient  # what follows would change nothing, slowly
    if hasattr(gradient, "dense_shape"):  # tf.IndexedSlices, which keras.ops would take for a tensor of its rows
        import tensorflow as tf

        gradient = tf.convert_to_tensor(gradient)
    gradient = ops.convert_to_tensor(gradient, sparse=False)
    return ops.cast(gradient, _precision(gradient.dtype))


def _sums(tensors: list[Tensor], entries: list[int]) -> Tensor:
    """The sum of each, in one vector, for TensorFlow, whose XLA adds one number after the other on a CPU.

    Over rows it does not; but it would make one sum of two: hence a mean. Without XLA this is about as fast as
    tf.nn.l2_loss, which stores no squares, since `update_step` asks for the same squares, and they are made once.
    """
    rows = [math.gcd(n, 32) for n in entries]
    means = [ops.mean(ops.reshape(x, (r, n // r)), axis=0) for x, n, r in zip(tensors, entries, rows, strict=True)]
    return ops.stack([ops.sum(x) for x in means]) * ops.convert_to_tensor(rows, tensors[0].dtype)


def _power(x: Tensor, exponent: Tensor | float) -> Tensor:
    """x**exponent for x >= 0 and exponents in [0, 0.5], several times faster than ops.power."""
    if isinstance(exponent, float):
        if exponent == 0.0:  # adaptivity 0
            return 1.0
        if exponent == 0.25:  # adaptivity 0.5
            return ops.sqrt(ops.sqrt(x))
        if exponent == 0.5:  # adaptivity 1
            return ops.sqrt(x)
    if keras.backend.backend() == "jax" and x.dtype == "float32":
        from ada2ms.tf import _jax

        return _jax.power(x, ops.cast(exponent, "float32"))
    logarithm = ops.log(x)
    if not isinstance(exponent, float):
        logarithm = ops.maximum(logarithm, -1e30)  # finite: 0**0 = 1
    return ops.exp(exponent * logarithm)
