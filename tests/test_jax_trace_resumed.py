"""Runs in JAX that go on from a checkpoint: what a recorder is told by the optimizer's state."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ada2ms.core.trace import Trace, diff, judge, resumed
from ada2ms.jax import Recorder, ada2ms, recorded
from ada2ms.jax.injected import counts
from support import slow

STEPS, CHECKPOINT, STOP = 12, 6, 8
SCHEDULE = optax.cosine_decay_schedule(0.1, STEPS)
PARAMS = {"w": jnp.linspace(-1.0, 1.0, 24, dtype=jnp.float32).reshape(6, 4), "b": jnp.zeros(4)}


def train(path: Path, transformation: Any, start: Any, first: int, until: int, **told: Any) -> Any:
    """Steps of a linear model; gives what is there after CHECKPOINT steps."""
    saved = params, state = start
    with Recorder(path, params, **told) as recorder:
        traced = recorded(transformation, recorder)

        @jax.jit
        def step(params: Any, state: Any, x: Any, y: Any) -> Any:
            gradients = jax.grad(lambda p: jnp.mean((x @ p["w"] + p["b"] - y) ** 2))(params)
            updates, state = traced.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        for i in range(first, until):
            rng = np.random.default_rng(i)
            x, y = rng.normal(size=(8, 6)).astype(np.float32), rng.normal(size=(8, 4)).astype(np.float32)
            recorder.batch(x, y)
            params, state = step(params, state, x, y)
            saved = (params, state) if i + 1 == CHECKPOINT else saved
    return saved


@pytest.mark.parametrize("is_kept", [True, *slow(False)])
def test_a_schedule_that_was_told_goes_on_where_the_state_does(is_kept: bool, tmp_path: Path) -> None:
    optimizer = optax.sgd(SCHEDULE, momentum=0.9)
    told: Any = {"hyper": {"lr": SCHEDULE, "momentum": 0.9}, "optimizer": "optax.sgd"}
    start = PARAMS, optimizer.init(PARAMS)
    train(tmp_path / "a", optimizer, start, 0, STEPS, **told)
    params, state = train(tmp_path / "b", optimizer, start, 0, STOP, **told)
    train(tmp_path / "b2", optimizer, (params, state if is_kept else start[1]), CHECKPOINT, STEPS, **told)
    a, b, b2 = (Trace.load(tmp_path / name) for name in ("a", "b", "b2"))
    found = diff(a, resumed(b, b2))
    if is_kept:
        assert found.outcome == "only rounding", found
        assert [step.hyper[0]["lr"] for step in b2.steps] == [step.hyper[0]["lr"] for step in a.steps[CHECKPOINT:]]
        assert "the optimizer had been used before" in judge(b2).cause
    else:
        assert (found.stage, found.step) == ("hyperparameters", CHECKPOINT + 1), found
        assert judge(b2).outcome == "only rounding"


@pytest.mark.parametrize(
    "optimizer",
    [
        ada2ms(0.1),
        optax.adamw(SCHEDULE),
        optax.MultiSteps(optax.adam(0.1), 2),
        optax.inject_hyperparams(optax.sgd)(0.1),
    ],
)
def test_a_new_optimizer_has_not_begun(optimizer: Any) -> None:
    found = [int(x) for x in counts(optimizer.init(PARAMS))]
    assert found
    assert not any(found)


def test_what_nobody_told_is_no_claim(tmp_path: Path) -> None:
    """Of an optimizer without a name, whatever rule explains its updates is its own."""
    optimizer = optax.sgd(0.1, momentum=0.9)
    train(tmp_path / "a", optimizer, (PARAMS, optimizer.init(PARAMS)), 0, 3)
    found = judge(Trace.load(tmp_path / "a"))
    assert found.outcome == "only rounding"
    assert "are those of SGD with momentum" in found.cause
    train(tmp_path / "b", optimizer, (PARAMS, optimizer.init(PARAMS)), 0, 3, optimizer="optax.adamw")
    assert judge(Trace.load(tmp_path / "b")).outcome == "parted"
