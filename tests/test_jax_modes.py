"""The Optax transformations in JAX' stricter modes, at the edge of what is differentiable, and inside optax.contrib."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax_support import EPSILON, assert_close, assert_equal, train, tree

from ada2ms.core import Linear
from ada2ms.jax import ada2ms
from support import slow

pytestmark = pytest.mark.slow  # each compiles programs of its own

MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no promotion of ranks": lambda: jax.numpy_rank_promotion("raise"),
    "no promotion of types": lambda: jax.numpy_dtype_promotion("strict"),
    "no NaN": lambda: jax.debug_nans(True),
    "internal checks": lambda: jax.enable_checks(True),
}
OPTIONS: list[dict[str, Any]] = [
    {"nonfinite": "skip", "eps": 0.0, "weight_decay": lambda k: 0.1},
    {"adaptivity": 0.3, "scope": "tensor", "mu_dtype": "bfloat16", "nu_dtype": "float16"},
    {"adaptivity": Linear(1.0, 0.0, 9), "mask": {"empty": True, "matrix": True, "scalar": False, "vector": False}},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_modes(options: dict[str, Any]) -> None:
    """All at once, compiled and not, with leaves of several types, and with zeros, where NaN would come from."""
    optimizer = ada2ms(0.1, **options)
    types = {"empty": jnp.float32, "matrix": jnp.bfloat16, "scalar": jnp.float16, "vector": jnp.float32}
    params, gradients = ({name: x.astype(types[name]) for name, x in tree(i).items()} for i in range(2))
    steps = [jax.tree.map(jnp.zeros_like, gradients), gradients]
    expected = train(optimizer, params, steps)
    with ExitStack() as stack:
        for mode in MODES.values():
            stack.enter_context(mode())
        assert_equal(train(optimizer, params, steps), expected)
        train(optimizer, params, steps, wrap=lambda f: f)


def test_a_compiled_step_moves_nothing_between_host_and_device() -> None:
    optimizer = ada2ms(optax.linear_schedule(0.1, 0.0, 9), adaptivity=Linear(1.0, 0.0, 9), nonfinite="skip")
    update, params, gradients = jax.jit(optimizer.update), tree(0), tree(1)
    with jax.transfer_guard("disallow"):
        state = jax.jit(optimizer.init)(params)
        for _ in range(2):
            _, state = update(gradients, state, params)
    assert state.count == 2


def test_integer_leaves_are_moved_by_whole_numbers() -> None:
    """As by optax.adamw: the update is a fraction, and `optax.apply_updates` rounds the sum."""
    params = {"float": jnp.ones(3), "integer": jnp.arange(3) * 10}
    for adaptivity in (0.5, 1.0):
        optimizer = ada2ms(3.5, adaptivity=adaptivity, weight_decay=0.0)
        after, state = train(optimizer, params, [params])
        assert_equal(jax.tree.map(jnp.zeros_like, state), optimizer.init(params))
        assert after["integer"].dtype == params["integer"].dtype
    assert_equal(after["integer"], train(optax.adamw(3.5, weight_decay=0.0), params, [params])[0]["integer"])


@pytest.mark.parametrize("adaptivity", [0.3, 1.0, *slow(0.0, 0.5)])
def test_derivatives_where_gradients_are_zero(adaptivity: float) -> None:
    """They are those of the rule, against differences; optax.adamw gives NaN there, unless eps_root hides the zero."""

    def update(g: jax.Array) -> jax.Array:
        optimizer = ada2ms(0.1, adaptivity=adaptivity, eps=0.01)
        state = optimizer.init(g)
        _, state = optimizer.update(g, state, g)
        return optimizer.update(g, state, jnp.zeros_like(g))[0]

    for x64 in (True, False):  # in float32 the power is another one
        with jax.enable_x64(x64):
            derivatives = jax.jit(jax.jacobian(update))
            found = derivatives(jnp.array([0.0, 1.0, 2.0]))
            assert np.all(np.isfinite(found))
            assert np.all(np.isfinite(derivatives(jnp.zeros(3))))
    with jax.enable_x64(True):
        step = 1e-30  # so small that |g|^a, which is not differentiable, is nothing beside eps
        above, below = (jax.jit(update)(jnp.array([sign * step, 1.0, 2.0])) for sign in (1, -1))
        np.testing.assert_allclose(found[:, 0], (above - below) / (2 * step), rtol=1e-5, atol=1e-7)
    assert found[0, 0] < -0.01


def test_checkpoint() -> None:
    def f(rate: Any, adaptivity: Any) -> Any:
        params, _ = train(ada2ms(rate, adaptivity=adaptivity), jnp.ones(3), [jnp.arange(1.0, 4.0)] * 2, lambda f: f)
        return jnp.sum(params**2)

    point = jnp.float32(0.1), jnp.float32(0.3)
    plain, again = (jax.jit(jax.grad(g, (0, 1)))(*point) for g in (f, jax.checkpoint(f)))
    assert_close(again, plain, 8 * EPSILON)


# Wrappers for which only the rule is inside: at adaptivity 1 they do with it what they do with optax.adamw.

WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "schedule_free": lambda o: optax.contrib.schedule_free(o, 0.1, b1=0.9),
    "mechanize": lambda o: optax.contrib.mechanize(o, s_init=0.1),
    "reduce_on_plateau": lambda o: optax.chain(o, optax.contrib.reduce_on_plateau(patience=1, cooldown=0)),
    "sam": lambda o: optax.contrib.sam(o, optax.chain(optax.contrib.normalize(), optax.sgd(0.05)), sync_period=2),
    "flatten": optax.flatten,
    "ema": lambda o: optax.chain(o, optax.ema(0.9)),
    "conditionally_transform": lambda o: optax.conditionally_transform(o, lambda step, **_: step % 2 == 0),
    "MultiSteps": lambda o: optax.MultiSteps(o, 2, should_skip_update_fn=optax.skip_not_finite),
    "named_chain": lambda o: optax.named_chain(("clip", optax.adaptive_grad_clip(0.5)), ("o", o)),
    "with_extra_args_support": optax.with_extra_args_support,
}
OFTEN = ("schedule_free", "flatten", "MultiSteps", "with_extra_args_support")  # what people use, or compiles in no time


@pytest.mark.parametrize("wrapper", [*OFTEN, *slow(*(name for name in WRAPPERS if name not in OFTEN))])
def test_wrappers_do_as_with_adamw(wrapper: str) -> None:
    """Within the 1e-5 that Optax' own bias correction is off by, and what a learned rate makes of it."""
    outcomes = []
    for make in (lambda: ada2ms(0.1, weight_decay=0.1, adaptivity=1.0), lambda: optax.adamw(0.1, weight_decay=0.1)):
        optimizer = WRAPPERS[wrapper](make())
        params = {name: x for name, x in tree(0).items() if name in ("matrix", "vector")}
        state = optimizer.init(params)
        extra = {"value": jnp.float32(1.0)} if wrapper == "reduce_on_plateau" else {}
        update = jax.jit(optimizer.update)
        for i in range(1, 7):
            gradients = {name: x for name, x in tree(i).items() if name in params}
            updates, state = update(gradients, state, params, **extra)
            params = optax.apply_updates(params, updates)
        outcomes.append(params)
    assert_close(*outcomes, 1e-4, 1e-4)
    assert not np.allclose(outcomes[0]["matrix"], tree(0)["matrix"])
