"""Sums of squares, once for each step and over all replicas; the one place that is not Keras' public API.

What is global must be computed after clipping, accumulation and unscaling, and with TensorFlow's distribution
strategies from gradients that are summed over replicas. Two hooks of Keras' optimizers are called then and there:
`_backend_update_step` on every backend, and, from within it, `_distributed_tf_update_step` on TensorFlow. Keras' own
optimizers (Nadam and others) override them for the same reason. In a third, `_clip_gradients`, Keras would clip by the
norm of all gradients, on each replica by that of its own; here the step does, by the sums that it has.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from ada2ms.core.hyperparameters import as_float, check

Tensor = Any  # of whichever backend Keras runs on
Variable = Any  # a keras.Variable, or the backend's own

_HOOKS = (
    "_backend_update_step",
    "_clip_gradients",
    *(["_distributed_tf_update_step"] if keras.backend.backend() == "tensorflow" else []),
)
_MISSING = [hook for hook in _HOOKS if not hasattr(keras.optimizers.Optimizer, hook)]
if _MISSING:
    raise ImportError(
        f"ada2ms.tf does not fit Keras {keras.__version__}, whose optimizers have no {', '.join(_MISSING)}",
        name="keras",
    )


class Sums(NamedTuple):
    """sum(g*g) of each gradient, in one vector, and of all."""

    each: Tensor
    total: Tensor


class Reducing(keras.optimizers.Optimizer):  # type: ignore[misc]
    """An optimizer whose step needs sums over all variables: `_step` is called once, with these."""

    _global_velocity: Variable  # with TensorFlow's strategies a variable that every replica has
    _dtype: str  # of the sums
    _global_clipnorm: float | None
    _clips_in_step = False  # true within `apply`

    @property
    def global_clipnorm(self) -> float | None:
        """As given; it may be replaced at any time, like `adaptivity`."""
        return self._global_clipnorm

    @global_clipnorm.setter
    def global_clipnorm(self, global_clipnorm: float | None) -> None:
        if isinstance(global_clipnorm, bool) or global_clipnorm != 0:  # which in Keras is None
            check("max_norm", global_clipnorm, "global_clipnorm")
        self._global_clipnorm = None if global_clipnorm is None else as_float(global_clipnorm)

    def _max_norm(self) -> float | None:
        """The norm that the step clips by: in Keras, other ways of clipping, if set by attributes, go before it."""
        return (self.global_clipnorm or None) if not (self.clipnorm and self.clipnorm > 0) else None

    def apply(self, grads: Sequence[Tensor | None], trainable_variables: Sequence[Variable] | None = None) -> None:
        """As in every Keras optimizer."""
        self._clips_in_step = True
        try:
            super().apply(grads, trainable_variables)
        finally:
            self._clips_in_step = False

    def _clip_gradients(self, grads: list[Tensor]) -> list[Tensor]:
        """Clips as Keras does; within `apply` not by the norm of all gradients, which is left to the step."""
        in_step = self._clips_in_step and self._max_norm() is not None
        clipped: list[Tensor] = grads if in_step else super()._clip_gradients(grads)
        return clipped

    def _step(self, grads: Sequence[Tensor], variables: Sequence[Variable], learning_rate: Tensor, sums: Sums) -> None:
        raise NotImplementedError

    def update_step(self, gradient: Tensor, variable: Variable, learning_rate: Tensor) -> None:
        """Not used: what a variable's update is depends on the gradients of all variables."""
        raise NotImplementedError(f"{type(self).__name__} updates all variables of a step together: call `apply`")

    def _backend_update_step(
        self, grads: list[Tensor], trainable_variables: list[Variable], learning_rate: Tensor
    ) -> None:
        if keras.backend.backend() == "tensorflow":
            super()._backend_update_step(grads, trainable_variables, learning_rate)
        else:
            sums = sums_of_squares(grads, trainable_variables, self._dtype)
            self._step(grads, trainable_variables, learning_rate, sums)

    def _distributed_tf_update_step(
        self, distribution: Any, grads_and_vars: list[tuple[Tensor, Variable]], learning_rate: Tensor
    ) -> None:
        def on_each_replica(_: Variable, *args: Any) -> None:
            self._step(*args)

        grads, variables = zip(*grads_and_vars, strict=True)
        # One replica's sums serve all, since their own could differ in the last digit, and replicas would drift apart.
        local = [distribution.experimental_local_results(g)[0] for g in grads]
        args = (list(grads), list(variables), learning_rate, sums_of_squares(local, variables, self._dtype))
        distribution.extended.update(self._global_velocity.value, on_each_replica, args=args, group=False)


def sums_of_squares(grads: Sequence[Tensor], variables: Sequence[Variable], dtype: str) -> Sums:
    """The sums, of gradients that are already reduced; shapes are those of the variables."""
    if keras.backend.backend() == "torch":
        import torch

        each = torch.stack([torch.square(g).sum(dtype=getattr(torch, dtype)) for g in grads])
    else:
        squares = [ops.square(ops.cast(g, dtype)) for g in grads]
        if keras.backend.backend() == "tensorflow":
            each = _sums_by_rows(squares, [math.prod(v.shape) for v in variables])
        else:
            each = ops.stack([ops.sum(x) for x in squares])
    return Sums(each, ops.sum(each))


def _sums_by_rows(tensors: list[Tensor], numel: list[int]) -> Tensor:
    """The sum of each, in one vector, for TensorFlow, whose XLA adds one number after the other on a CPU.

    It adds in parallel over rows, unless the sum of a sum follows, which it makes one sum; hence a mean over rows.
    Without XLA this is about as fast as tf.nn.l2_loss.
    """
    rows = [math.gcd(n, 32) for n in numel]
    means = [ops.mean(ops.reshape(x, (r, n // r)), axis=0) for x, n, r in zip(tensors, numel, rows, strict=True)]
    return ops.stack([ops.sum(x) for x in means]) * ops.convert_to_tensor(rows, tensors[0].dtype)
