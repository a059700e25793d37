"""A user's script as type checkers see it, in JAX. Nothing here is run. (Optax has no types for mypy.)"""

from typing import Any, assert_type

import jax
import optax

from ada2ms.core import NO_DECAY, Linear, Receipt, State
from ada2ms.core.state import Report
from ada2ms.jax import (
    Recorder,
    ScaleByAda2MSState,
    ada2ms,
    arguments,
    export_gradients,
    export_state,
    import_state,
    measure,
    recorded,
    scale_by_ada2ms,
)

params: dict[str, jax.Array] = {}
optimizer: optax.GradientTransformation = ada2ms(1e-3)
own = ada2ms(
    optax.constant_schedule(1e-3),
    b1=0.9,
    adaptivity=Linear(1.0, 0.0, 10),
    groups=[NO_DECAY],
    scope="tensor",
    nonfinite="skip",
    max_norm=1.0,
)
assert_type(own, optax.GradientTransformationExtraArgs)
assert_type(scale_by_ada2ms(adaptivity=0.5), optax.GradientTransformationExtraArgs)
chain = optax.chain(optax.clip_by_global_norm(1.0), own)
opt_state = own.init(params)
updates, opt_state = own.update(params, opt_state, params)
new = optax.apply_updates(params, updates)


def inner(given: ScaleByAda2MSState) -> jax.Array:
    assert_type(given.skipped, jax.Array)
    return given.s


state = export_state(params, opt_state)
assert_type(state, State)
_, opt_state, report = import_state(params, opt_state, state, optimizer=own)
assert_type(report, Report)
assert_type(arguments(state), dict[str, Any])
Receipt(state).add(export_gradients(params))
with Recorder("run.trace", params, hyper={"lr": 1e-3}) as recorder:
    assert_type(recorder, Recorder)
    assert_type(recorded(own, recorder), optax.GradientTransformationExtraArgs)

assert_type(measure(chain, opt_state, new, wait=True), dict[str, float])
assert_type(measure(own, opt_state, gradients=params), dict[str, jax.Array])

# What is wrong is found.
ada2ms(1e-3, scope="global")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
ada2ms(1e-3, nesterov=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
