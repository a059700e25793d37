"""Ada2MS as a Keras optimizer, on each of Keras' backends: arguments, state, and what is saved. See `step.py`."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from ada2ms.core.groups import Group, check_groups
from ada2ms.core.hyperparameters import (
    DEFAULT_COMPENSATED,
    DEFAULT_MAX_NORM,
    DEFAULT_NONFINITE,
    DEFAULT_SCOPE,
    DEFAULTS,
    Nonfinite,
    Scope,
    check,
)
from ada2ms.tf import config as plain
from ada2ms.tf import saving
from ada2ms.tf.dtypes import compute_dtype, is_16_bit, to_dense
from ada2ms.tf.exclusions import Exclusions
from ada2ms.tf.groups import Grouping
from ada2ms.tf.paths import path_of
from ada2ms.tf.reduce import Reducing, Sums
from ada2ms.tf.step import take_step

Tensor = Any  # of whichever backend Keras runs on
Variable = Any  # a keras.Variable, or the backend's own


@keras.saving.register_keras_serializable(package="ada2ms")
class Ada2MS(Reducing):
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
            `keras.saving.register_keras_serializable`. Defaults to `0.9`.
        scope: `"model"`: one global second moment, of all variables that this optimizer updates (within a
            `MultiOptimizer`, those of this member). `"tensor"`: one for each variable. Defaults to `"model"`.
        nonfinite: `"propagate"`, or `"skip"`: a step with a gradient that is not finite changes neither variables nor
            state; it counts in the optimizer's variable `skipped` and, as all calls of `apply` do, in `iterations`.
            Defaults to `"propagate"`.
        global_clipnorm: None; or a number above 0, which may be infinite: gradients whose norm, over all variables of
            this optimizer, is larger are scaled down to it, before all of the rule. It is the norm of the gradients
            that the rule is given, which the step has anyway: after unscaling and accumulation, and of all replicas
            together. `Ada2MSLogger` logs it. 0 is None, as in Keras. Defaults to `None`.
        name, clipnorm, clipvalue: as in every Keras optimizer. Clipping comes before all of the rule.
        use_ema, ema_momentum, ema_overwrite_frequency, loss_scale_factor, gradient_accumulation_steps: as in every
            Keras optimizer.
        compensated: whether variables of float16 and bfloat16 keep what their rounding loses, in a state `compensation`
            of their own type, so that small updates add up. Others ignore it. Defaults to `False`.
        groups: `ada2ms.core.Group`s: variables with hyperparameters of their own. A group's `match` is searched in a
            variable's path, `"encoder/dense/kernel"`; a variable is in the first group that matches. All groups share
            one mean of squares; those with another `b2` have a `global_velocity` of theirs. Variables that are excluded
            from weight decay have none in any group. Defaults to `None`.

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
        global_clipnorm: float | None = DEFAULT_MAX_NORM,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        ema_overwrite_frequency: int | None = None,
        loss_scale_factor: float | None = None,
        gradient_accumulation_steps: int | None = None,
        name: str | None = None,
        *,
        compensated: bool = DEFAULT_COMPENSATED,
        groups: Sequence[Group] | None = None,
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
        check("compensated", compensated)
        self._compensated = bool(compensated)
        self._grouping = Grouping(check_groups(groups))
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

    @property
    def compensated(self) -> bool:
        """As given; the state's shape depends on it."""
        return self._compensated

    @property
    def groups(self) -> tuple[Group, ...]:
        """As given; the state's shape depends on them."""
        return self._grouping.groups

    def build(self, variables: list[Variable]) -> None:
        """Creates the state: two slots for each variable, of its shape, and four small variables for all of them.

        With `compensated` there is a third slot for each 16-bit variable, and with `global_clipnorm` a fifth small
        variable: the norm of the last step's gradients before clipping.

        Variables that their gradients overwrite, such as the scales of a float8 layer, have no slots, as in Keras' own
        optimizers.
        """
        if self.built:
            return
        updated = tuple(i for i, v in enumerate(variables) if not getattr(v, "overwrite_with_gradient", False))
        self._grouping = self._grouping.built(updated, variables, self.beta_2)  # may refuse, and nothing has changed
        super().build(variables)
        self._updated = updated
        self._find_excluded()
        momentums: list[Variable | None] = [None] * len(variables)
        velocities = momentums.copy()
        for i in self._updated:
            momentums[i] = self.add_variable_from_reference(variables[i], name="momentum")
            velocities[i] = self.add_variable_from_reference(variables[i], name="velocity")
        # At once: TensorFlow's checkpoints refuse lists of an object whose entries have been replaced.
        self._momentums, self._velocities = momentums, velocities

        def add(name: str, dtype: str, shape: tuple[int, ...] = ()) -> Variable:
            return self.add_variable(shape, dtype=dtype, aggregation="only_first_replica", name=name)

        n = len(variables)
        self._numel = tuple(math.prod(v.shape) for v in variables)
        dtypes = {compute_dtype(variables[i].dtype) for i in self._updated}
        self._dtype = "float64" if "float64" in dtypes else "float32"
        several = (len(self._grouping.moments),) if len(self._grouping.moments) > 1 and self.scope == "model" else ()
        self._global_velocity = add("global_velocity", self._dtype, several if self.scope == "model" else (n,))
        self._global_step = add("global_step", "int", several)
        self._steps = add("steps", "int", (n,))
        self._skipped = add("skipped", "int")
        self._compensations = self._build_compensations() if self.compensated else None
        self._gradient_norm = None if self._max_norm() is None else add("gradient_norm", self._dtype)

    def _build_compensations(self) -> list[Variable | None]:
        half = [i in self._updated and is_16_bit(v.dtype) for i, v in enumerate(self._trainable_variables)]
        return [
            self.add_variable_from_reference(v, name="compensation") if is_half else None
            for v, is_half in zip(self._trainable_variables, half, strict=True)
        ]

    def apply(self, grads: Sequence[Tensor | None], trainable_variables: Sequence[Variable] | None = None) -> None:
        """Updates the variables by gradients of their shapes; None leaves a variable and its state alone.

        Sparse gradients are made dense and 16-bit ones float32 first, so that Keras' own unscaling, accumulation and
        clipping neither take repeated rows apart nor overflow.
        """
        super().apply([None if g is None else to_dense(g) for g in grads], trainable_variables)

    def _step(self, grads: Sequence[Tensor], variables: Sequence[Variable], learning_rate: Tensor, sums: Sums) -> None:
        take_step(self, grads, variables, learning_rate, sums)

    def _apply_weight_decay(self, variables: list[Variable]) -> None:
        """Does nothing: decay is part of the update, in its precision, and skipped with it."""

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
        """Excludes variables from weight decay, and no others: a further call replaces what was excluded.

        Unlike in `keras.optimizers.AdamW`, what is excluded is part of the configuration: it is still excluded in a
        model that has been saved and loaded, and by an optimizer that `from_config` makes. A training step that is
        compiled keeps what was excluded when it was.

        Args:
            var_list: variables.
            var_names: regular expressions; variables are excluded whose path (`"encoder/dense/bias"`) or name
                (`"bias"`) any of them matches somewhere. The same on every backend, unlike in `keras.optimizers.AdamW`.

        Raises:
            TypeError, ValueError: naming the argument.
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
            if doubtful := self._exclusions.in_doubt(paths):
                warnings.warn(
                    f"{self.name}: weight decay was to exclude {doubtful}, which in this optimizer's variables are "
                    f"nowhere, or could be several; excluded are {[paths[i] for i in sorted(found)]}. If that is not "
                    "what you want, call exclude_from_weight_decay again, with variables of now",
                    stacklevel=2,
                )
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
        if dtype is not None and is_16_bit(dtype) and not str(kwargs.get("name")).endswith(("average", "compensation")):
            dtype = "float32"
        return super().add_variable(shape, initializer, dtype, *args, **kwargs)

    def save_own_variables(self, store: Any) -> None:
        """Puts the state into a store of Keras; see `saving.py`."""
        saving.save(self, store)

    def load_own_variables(self, store: Any) -> None:
        """Takes the state from a store of Keras; warns, as every Keras optimizer does, if it has other variables.

        Raises:
            ValueError: a shape is another; nothing has changed.
        """
        if not saving.load(self, store):
            super().load_own_variables(store)

    def get_config(self) -> dict[str, Any]:
        """The arguments, as plain data that `from_config` takes.

        Warns if paths are all that it has of `var_list` of `exclude_from_weight_decay`, since the optimizer is not
        built, and these are paths that Keras may change when it loads a model.
        """
        if not self.built and self._excluded_keys and (paths := self._exclusions.numbered()):
            warnings.warn(
                f"{self.name}: not built, and so weight decay may not find again what var_list of "
                f"exclude_from_weight_decay has: {paths}, by names that Keras gives anew when it loads a model. Build "
                "the optimizer first, optimizer.build(model.trainable_variables), or use var_names",
                stacklevel=2,
            )
        exclusions = {"exclude_from_weight_decay": self._exclusions.to_config()} if self._exclusions else {}
        return {
            **super().get_config(),
            **exclusions,
            **plain.grouping_to_config(self._grouping),
            **({"compensated": True} if self.compensated else {}),
            "beta_1": self.beta_1,
            "beta_2": self.beta_2,
            "epsilon": self.epsilon,
            "adaptivity": plain.adaptivity_to_config(self.adaptivity),
            "scope": self.scope,
            "nonfinite": self.nonfinite,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> "Ada2MS":
        """The optimizer that `get_config` described."""
        config = dict(config)
        if "adaptivity" in config:
            config["adaptivity"] = plain.adaptivity_from_config(config["adaptivity"], custom_objects)
        if "groups" in config:
            config["groups"] = plain.groups_from_config(config["groups"], custom_objects)
        exclusions, grouped = config.pop("exclude_from_weight_decay", None), config.pop("grouped", None)
        optimizer: Ada2MS = super().from_config(config, custom_objects=custom_objects)
        optimizer._grouping = plain.grouping_from_config(optimizer.groups, grouped)
        if exclusions:
            optimizer._exclusions, optimizer._excluded_keys = Exclusions.from_config(exclusions), None
        return optimizer


Ada2MS.__module__ = "ada2ms.tf"  # where pickles and `.keras` files look for it

# For compile(optimizer="ada2ms"); the class's own name too, since Keras' optimizers go by both.
keras.saving.get_custom_objects().update({"ada2ms": Ada2MS, "Ada2MS": Ada2MS})
