"""What there is to watch while Ada2MS trains."""

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from ada2ms.core.coefficients import bias_correction
from ada2ms.core.hyperparameters import value_at
from ada2ms.tf.optimizer import Ada2MS


class Ada2MSLogger(keras.callbacks.Callback):  # type: ignore[misc]
    """Callback that adds the state of an `Ada2MS` optimizer to the logs of each epoch.

    From there it reaches `History`, `CSVLogger`, `TensorBoard` and the like:

    - `adaptivity`: the one that the next update will use.
    - `global_velocity`: the bias-corrected global second moment; with `scope="tensor"` its mean over variables.
    - `effective_step`: `learning_rate / (sqrt(global_velocity) + epsilon)`, what `momentum` is multiplied by for an
      entry whose own second moment is the global one; at adaptivity 0, for every entry.

    The last two are NaN before the first update.

    Raises:
        TypeError: at the start of training, where the model's optimizer is neither Ada2MS nor a LossScaleOptimizer of
            one.

    Example:
    >>> history = model.fit(x, y, epochs=10, callbacks=[Ada2MSLogger()])
    >>> history.history["adaptivity"]
    """

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Makes sure that there is something to log."""
        self._optimizer()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Adds to the logs."""
        optimizer = self._optimizer()
        counts = optimizer._global_step if optimizer.scope == "model" else optimizer._steps
        s_hat = [
            s / bias_correction(optimizer.beta_2, int(count))
            for s, count in zip(_numbers(optimizer._global_velocity), _numbers(counts), strict=True)
            if count > 0
        ]
        mean = float(np.mean(s_hat)) if s_hat else math.nan
        # d = v_hat^(a/2) * s_hat^((1-a)/2) + eps, of an entry whose v_hat is s_hat
        d = math.sqrt(mean) + optimizer.epsilon
        adaptivity = value_at(optimizer.adaptivity, ops.cast(optimizer._global_step, "float32"))
        if logs is not None:
            logs["adaptivity"] = _numbers(adaptivity)[0]
            logs["global_velocity"] = mean
            logs["effective_step"] = _numbers(optimizer.learning_rate)[0] / d if d else math.inf

    def _optimizer(self) -> Ada2MS:
        optimizer = self.model.optimizer
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        if not isinstance(optimizer, Ada2MS):
            raise TypeError(f"Ada2MSLogger logs an Ada2MS optimizer, not {optimizer!r}")
        return optimizer


def _numbers(x: Any) -> list[float]:
    return [float(value) for value in np.ravel(ops.convert_to_numpy(x))]
