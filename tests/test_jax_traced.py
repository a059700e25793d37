"""The Optax transformations under JAX' own: jit, scan, vmap, grad, eval_shape."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax_support import EPSILON, assert_close, assert_equal, train, tree

from ada2ms import core
from ada2ms.jax import ada2ms
from support import slow

pytestmark = pytest.mark.slow  # each compiles programs of its own


@pytest.mark.parametrize("x64", [True, False])
def test_the_second_step_compiles_nothing(x64: bool) -> None:
    with jax.enable_x64(x64):
        optimizer = ada2ms(optax.linear_schedule(0.1, 0.0, 9), adaptivity=core.Linear(1.0, 0.0, 9), nonfinite="skip")
        traces = []

        @jax.jit
        def step(params: Any, state: Any) -> Any:
            traces.append(1)
            updates, state = optimizer.update(params, state, params)
            return optax.apply_updates(params, updates), state

        params, state = tree(0), optimizer.init(tree(0))
        for _ in range(3):
            params, state = step(params, state)
        assert len(traces) == 1


def test_weak_types_do_not_reach_the_state() -> None:
    """Those of Python numbers, of which a second step would make something else, and compile anew for it."""
    params = {"a": jnp.asarray(1.0), "b": 1.0}
    optimizer = ada2ms(optax.constant_schedule(0.1))
    state = optimizer.init(params)
    _, after = jax.jit(optimizer.update)(params, state, params)
    assert [jax.typeof(x) for x in jax.tree.leaves(after)] == [jax.typeof(x) for x in jax.tree.leaves(state)]
    assert not any(jax.typeof(x).weak_type for x in jax.tree.leaves(after))


@pytest.mark.parametrize("leaf", [lambda: jnp.array(0.1), lambda: 0.1, lambda: jnp.array(0.1 + 0.2j)])
def test_weakly_typed_leaves_are_computed_in_their_own_precision(leaf: Any) -> None:
    """As by optax.adamw: what `jnp.array(0.1)` gives is as wide as any other array of float64."""
    with jax.enable_x64(True):
        params: Any = {"a": leaf()}
        gradients = [{"a": jnp.asarray(x, jnp.result_type(params["a"]))} for x in (0.3, -0.7, 0.2)]
        found, state = train(ada2ms(0.1, adaptivity=1.0, weight_decay=0.1), params, gradients)
        expected, (adam, *_) = train(optax.adamw(0.1, weight_decay=0.1), {"a": jnp.asarray(params["a"])}, gradients)
        assert state.mu["a"].dtype == adam.mu["a"].dtype
        assert state.s.dtype == jnp.float64
        np.testing.assert_allclose(found["a"], expected["a"], rtol=1e-14)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_weakly_typed_gradients_widen_nothing(dtype: Any) -> None:
    with jax.enable_x64(True):
        params = {"a": jnp.ones([], dtype)}
        optimizer = ada2ms(0.1)
        updates, state = optimizer.update({"a": jnp.array(0.1)}, optimizer.init(params), params)
        assert (updates["a"].dtype, state.mu["a"].dtype, state.s.dtype) == (dtype, jnp.float32, jnp.float32)


def test_donation_right_after_init() -> None:
    optimizer = ada2ms(0.1)

    def step(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    donating = jax.jit(step, donate_argnums=(0, 1))
    found = donating(*donating(tree(0), optimizer.init(tree(0)), tree(1)), tree(2))
    assert_close(found, train(optimizer, tree(0), [tree(1), tree(2)]), 4 * EPSILON, 4 * EPSILON)


def test_scan_is_a_loop() -> None:
    optimizer = ada2ms(0.1, adaptivity=core.Linear(1.0, 0.0, 9))
    gradients = [tree(i) for i in range(1, 8)]

    def step(carry: Any, g: Any) -> Any:
        updates, state = optimizer.update(g, carry[1], carry[0])
        return (optax.apply_updates(carry[0], updates), state), None

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *gradients)
    scanned, _ = jax.lax.scan(step, (tree(0), optimizer.init(tree(0))), stacked)
    assert_close(scanned, train(optimizer, tree(0), gradients), 8 * EPSILON, 8 * EPSILON)


@pytest.mark.parametrize("scope", ["model", *slow("tensor")])
def test_vmap_trains_models_apart(scope: Any) -> None:
    """Each member of an ensemble has its own global second moment."""
    optimizer = ada2ms(0.1, adaptivity=0.3, scope=scope, nonfinite="skip")
    members = [train(optimizer, tree(i), [tree(i + 10), tree(i + 20)]) for i in range(3)]

    def stack(trees: list[Any]) -> Any:
        return jax.tree.map(lambda *x: jnp.stack(x), *trees)

    params = stack([tree(i) for i in range(3)])
    state = jax.vmap(optimizer.init)(params)
    for first in (10, 20):
        updates, state = jax.jit(jax.vmap(optimizer.update))(stack([tree(i + first) for i in range(3)]), state, params)
        params = optax.apply_updates(params, updates)
    assert_close((params, state), stack(members), 8 * EPSILON, 8 * EPSILON)


@pytest.mark.parametrize("adaptivity", [0.3, *slow(1.0)])
def test_gradients_through_an_update(adaptivity: float) -> None:
    """Of the parameters after two steps, with respect to hyperparameters and gradients; against differences."""
    with jax.enable_x64(True):
        point = {"learning_rate": 0.1, "b1": 0.8, "b2": 0.9, "eps": 0.01, "weight_decay": 0.1, "g": jnp.arange(1.0, 4)}
        if 0 < adaptivity < 1:
            point["adaptivity"] = adaptivity

        def f(point: dict[str, Any]) -> Any:
            options = {"adaptivity": adaptivity, **point}
            g = options.pop("g")
            params, _ = train(ada2ms(**options), jnp.ones(3), [g, g**2], wrap=lambda f: f)
            return jnp.sum(jnp.sin(params))

        point = jax.tree.map(jnp.asarray, point)
        gradient = jax.jit(jax.grad(f))(point)
        f = jax.jit(f)
        for name, x in point.items():
            for i in range(x.size):
                step = np.zeros(x.size)
                step[i] = 1e-6
                above, below = (f({**point, name: x + sign * step.reshape(x.shape)}) for sign in (1, -1))
                # A central difference is off by h^2, and by the rounding of f over h.
                np.testing.assert_allclose(gradient[name].ravel()[i], (above - below) / 2e-6, rtol=1e-7, atol=1e-8)


def test_init_reads_no_values() -> None:
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree(0))
    for scope in ("model", "tensor"):
        optimizer = ada2ms(scope=scope)
        assert_equal(optimizer.init(abstract), optimizer.init(tree(0)))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), jax.eval_shape(optimizer.init, abstract)) == jax.tree.map(
            lambda x: (x.shape, x.dtype), optimizer.init(tree(0))
        )
