"""A user's script as type checkers see it, in Keras, which has no types itself. Nothing here is run."""

from typing import Any, assert_type

import keras

from ada2ms.core import NO_DECAY, Group, Linear, State
from ada2ms.core.state import Report
from ada2ms.tf import (
    Ada2MS,
    Ada2MSLogger,
    Recorder,
    arguments,
    export_gradients,
    export_state,
    import_state,
    measure,
    plain_layers,
)

optimizer: keras.optimizers.Optimizer = Ada2MS()
own = Ada2MS(
    learning_rate=1e-3,
    beta_1=0.9,
    adaptivity=Linear(1.0, 0.0, 10),
    groups=[Group("embed", lr_scale=0.1), NO_DECAY],
    scope="tensor",
    nonfinite="skip",
    global_clipnorm=1.0,
    compensated=True,
)
assert_type(own, Ada2MS)
assert_type(own.groups, tuple[Group, ...])
assert_type(own.exclude_from_weight_decay(var_names=["bias"]), None)
assert_type(own.get_config(), dict[str, Any])


def handed_over(model: keras.Model) -> None:
    state = export_state(model, own, **plain_layers(model))
    assert_type(state, State)
    assert_type(import_state(model, own, state), Report)
    assert_type(arguments(state), dict[str, Any])
    assert_type(measure(own, model, wait=True), dict[str, float])
    assert_type(measure(own), dict[str, Any])
    with Recorder("run.trace", model, own) as recorder:
        assert_type(recorder, Recorder)
    callbacks: list[keras.callbacks.Callback] = [Ada2MSLogger(), Ada2MSLogger(layers="kernel$"), recorder]
    print(callbacks, export_gradients)


# What is wrong is found.
Ada2MS(scope="global")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
Ada2MS(beta_1="fast")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
Ada2MSLogger(layers=3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
