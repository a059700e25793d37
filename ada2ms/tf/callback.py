"""What there is to watch while Ada2MS trains."""

import math
from itertools import cycle
from typing import Any

import keras
import numpy as np
from keras import ops

from ada2ms.core import measurements as names
from ada2ms.core.coefficients import bias_correction
from ada2ms.core.hyperparameters import value_at
from ada2ms.tf.measurements import measure
from ada2ms.tf.optimizer import Ada2MS
from ada2ms.tf.paths import path_of
from ada2ms.tf.step import b2_of_moments, of_moment


class Ada2MSLogger(keras.callbacks.Callback):  # type: ignore[misc]
    """Callback that adds the state of an `Ada2MS` optimizer to the logs of each epoch.

    From there it reaches `History`, `CSVLogger`, `TensorBoard` and the like:

    - `adaptivity`: the one that the next update will use.
    - `global_velocity`: the bias-corrected global second moment; with `scope="tensor"` its mean over variables,
      and of several, of groups that differ in b2, their mean.
    - `effective_step`: `learning_rate / (sqrt(global_velocity) + epsilon)`, what `momentum` is multiplied by for an
      entry whose own second moment is the global one; at adaptivity 0, for every entry.
    - `gradient_norm`: the norm of the gradients of the epoch's last update, before clipping and also if that update was
      skipped; there if the optimizer was built with `global_clipnorm`, which may be infinite.

    All but the first are NaN before the first update. With groups, `adaptivity` and the hyperparameters that the others
    use are the optimizer's own.

    Args:
        layers: whether the logs get all numbers of `measure`, too, `update_ratios` of each variable among them, of the
            epoch's last update: False, True, or a regular expression that is searched in the variables' paths.

    Raises:
        TypeError: at the start of training, where the model's optimizer is neither Ada2MS nor a LossScaleOptimizer of
            one.
        ValueError: `layers` is no regular expression; or, at the start of training, is found in no variable's path.

    Example:
    >>> history = model.fit(x, y, epochs=10, callbacks=[Ada2MSLogger()])
    >>> history.history["adaptivity"]
    """

    def __init__(self, layers: bool | str = False) -> None:
        super().__init__()
        if not isinstance(layers, (bool, str)):
            raise TypeError(f"Invalid layers: {layers!r} (must be True, False or a regular expression)")
        self.layers = layers
        self._matching([])

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Makes sure that there is something to log."""
        self._optimizer()
        self._matching(self.model.trainable_variables)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Adds to the logs."""
        optimizer = self._optimizer()
        model = optimizer.scope == "model"
        moments, counts = optimizer._global_velocity, optimizer._global_step if model else optimizer._steps
        b2s = np.ravel(b2_of_moments(optimizer))
        s_hat = [
            s / bias_correction(b2, int(count))
            for s, count, b2 in zip(_numbers(moments), _numbers(counts), cycle(b2s))
            if count > 0
        ]
        mean = float(np.mean(s_hat)) if s_hat else math.nan
        # d = v_hat^(a/2) * s_hat^((1-a)/2) + eps, of an entry whose v_hat is s_hat
        d = math.sqrt(mean) + optimizer.epsilon
        adaptivity = value_at(optimizer.adaptivity, ops.cast(of_moment(optimizer._global_step, 0), "float32"))
        if logs is not None:
            logs["adaptivity"] = _numbers(adaptivity)[0]
            logs["global_velocity"] = mean
            logs["effective_step"] = _numbers(optimizer.learning_rate)[0] / d if d else math.inf
            if optimizer._gradient_norm is not None:
                steps = sum(_numbers(optimizer._steps)) + _numbers(optimizer._skipped)[0]
                logs["gradient_norm"] = _numbers(optimizer._gradient_norm)[0] if steps else math.nan
            if self.layers is not False:
                logs.update(measure(optimizer, self.model, match="" if self.layers is True else self.layers, wait=True))

    def _matching(self, variables: list[Any]) -> None:
        """Raises unless `layers` chooses some of these variables, if there are any yet."""
        if isinstance(self.layers, str):
            names.matching([path_of(v) for v in variables], self.layers, "layers")

    def _optimizer(self) -> Ada2MS:
        optimizer = self.model.optimizer
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        if not isinstance(optimizer, Ada2MS):
            raise TypeError(f"Ada2MSLogger logs an Ada2MS optimizer, not {optimizer!r}")
        return optimizer


def _numbers(x: Any) -> list[float]:
    return [float(value) for value in np.ravel(ops.convert_to_numpy(x))]
