"""Optimistix and Equinox look into functions for what they close over: they find there what they find in adamw."""

import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax_support import EPSILON, assert_close, train, tree

from ada2ms.core import Linear
from ada2ms.jax import ada2ms, scale_by_ada2ms

MAKERS: dict[str, Callable[..., Any]] = {"adamw": optax.adamw, "ada2ms": ada2ms}


def closed_over(x: Any) -> Iterator[Any]:
    """What functions close over, and the functions in it, and so on: as `equinox.internal.closure_to_pytree` looks."""
    for leaf in jax.tree.leaves(x):
        if isinstance(leaf, types.FunctionType):
            for cell in leaf.__closure__ or ():
                yield from closed_over(cell.cell_contents)
        else:
            yield leaf


ARRAYS = {
    name: jnp.float32(value) for name, value in {"learning_rate": 0.11, "b1": 0.8, "b2": 0.95, "eps": 1e-6}.items()
}


def test_arrays_among_the_options_are_found() -> None:
    options = {**ARRAYS, "weight_decay": jnp.float32(0.3), "adaptivity": jnp.float32(0.7)}
    found = [id(x) for x in closed_over(ada2ms(**options)) if isinstance(x, jax.Array)]
    assert set(found) == {id(x) for x in options.values()}
    options = {name: options[name] for name in ("b1", "b2", "eps", "adaptivity")}
    assert {id(x) for x in closed_over(scale_by_ada2ms(**options)) if isinstance(x, jax.Array)} == set(
        map(id, options.values())
    )


@pytest.mark.parametrize(
    "options", [{}, ARRAYS, {"axis_name": ("x", "y"), "mu_dtype": "bfloat16"}, {"adaptivity": Linear(1.0, 0.0, 9)}]
)
def test_all_else_is_hashed_by_value(options: dict[str, Any]) -> None:
    """So that a fresh optimizer is the same as the one before, for what is compiled once for each."""
    one, other = ([x for x in closed_over(ada2ms(**options)) if not isinstance(x, jax.Array)] for _ in range(2))
    assert len(one) > 5
    assert one == other
    assert hash(tuple(one)) == hash(tuple(other))
    for f in ada2ms(**options):
        assert type(f) is types.FunctionType  # a method would hide what it is bound to


@pytest.mark.slow
@pytest.mark.parametrize("make", MAKERS)
def test_optimistix_compiles_once_for_all_fresh_optimizers(make: str) -> None:
    optimistix = pytest.importorskip("optimistix")
    traced = []

    def loss(y: Any, args: Any) -> Any:
        traced.append(1)
        return jnp.sum((y - args) ** 2)

    def minimise(**options: Any) -> Any:
        solver = optimistix.OptaxMinimiser(MAKERS[make](**options), rtol=1e-6, atol=1e-6)
        return optimistix.minimise(loss, solver, jnp.zeros(2), jnp.array([1.0, 2.0]), max_steps=300, throw=False).value

    first = minimise(learning_rate=0.1, weight_decay=0.0)
    np.testing.assert_allclose(first, [1, 2], rtol=0.02)
    count = len(traced)
    np.testing.assert_array_equal(minimise(learning_rate=0.1, weight_decay=0.0), first)
    assert len(traced) == count
    minimise(**ARRAYS)
    count = len(traced)
    for rate in (0.05, 0.1):
        minimise(**{**ARRAYS, "learning_rate": jnp.float32(rate)})
    assert len(traced) == count


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ARRAYS, "adaptivity", "weight_decay"])
def test_optimistix_within_a_trace(name: str) -> None:
    """Hyperparameters may be traced ones: a rate that a function is given, or is differentiated by."""
    optimistix = pytest.importorskip("optimistix")

    def fit(value: Any) -> Any:
        solver = optimistix.OptaxMinimiser(ada2ms(**{"learning_rate": 0.05, name: value}), rtol=0.0, atol=0.0)
        found = optimistix.minimise(lambda y, _: jnp.sum((y - 1) ** 2), solver, jnp.zeros(2), max_steps=5, throw=False)
        return found.value

    value = {"adaptivity": 0.4, "weight_decay": 0.1}.get(name, ARRAYS.get(name))
    plain, _ = train(ada2ms(**{"learning_rate": 0.05, name: value}), jnp.zeros(2), [])
    optimizer, state = ada2ms(**{"learning_rate": 0.05, name: value}), ada2ms().init(plain)
    for _ in range(5):
        updates, state = optimizer.update(2 * (plain - 1), state, plain)
        plain = optax.apply_updates(plain, updates)
    for wrap in (jax.jit, lambda f: f):
        np.testing.assert_allclose(wrap(fit)(jnp.float32(value)), plain, rtol=16 * EPSILON)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [True, False])
def test_a_model_of_equinox_given_whole(compiled: bool) -> None:
    """Its activation functions are leaves of it; beside optax.adamw, and beside a plain tree of its arrays."""
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(3, 2, 8, 2, activation=jax.nn.gelu, key=jax.random.key(0))
    x, y = jax.random.normal(jax.random.key(1), (16, 3)), jax.random.normal(jax.random.key(2), (16, 2))

    def loss(model: Any) -> Any:
        return jnp.mean((jax.vmap(model)(x) - y) ** 2)

    def fit(optimizer: Any) -> Any:
        def step(model: Any, state: Any) -> Any:
            updates, state = optimizer.update(eqx.filter_grad(loss)(model), state, model)
            return eqx.apply_updates(model, updates), state

        trained, state = model, optimizer.init(eqx.filter(model, eqx.is_inexact_array))
        step = eqx.filter_jit(step) if compiled else step
        for _ in range(5):
            trained, state = step(trained, state)
        assert trained.activation is jax.nn.gelu
        return jax.tree.leaves(eqx.filter(trained, eqx.is_inexact_array))

    assert_close(fit(ada2ms(1e-2, adaptivity=1.0)), fit(optax.adamw(1e-2, weight_decay=1e-2)), 1e-4, 1e-5)
    decaying = jax.tree.map(lambda leaf: eqx.is_array(leaf) and leaf.ndim > 1, model)
    for mask in (decaying, lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree)):
        options = {"weight_decay": 0.5, "mask": mask}
        found = fit(ada2ms(1e-2, adaptivity=1.0, **options))
        assert_close(found, fit(optax.adamw(1e-2, weight_decay=0.5, mask=decaying)), 1e-4, 1e-5)


@pytest.mark.slow
def test_fresh_optimizers_within_filter_jit() -> None:
    eqx = pytest.importorskip("equinox")
    traced = []

    @eqx.filter_jit
    def step(optimizer: Any, params: Any, state: Any) -> Any:
        traced.append(1)
        return optimizer.update(params, state, params)[0]

    params = tree(0)
    state = ada2ms().init(params)
    for make in MAKERS.values():
        del traced[:]
        for rate in (0.1, 0.2, 0.3):
            optimizer = eqx.internal.closure_to_pytree(
                make(jnp.float32(rate), b1=jnp.float32(0.9), adaptivity=jnp.float32(0.5))
                if make is ada2ms
                else make(jnp.float32(rate))
            )
            found = step(optimizer, params, state if make is ada2ms else optimizer.init(params))
        assert len(traced) == 1
        assert np.all(np.isfinite(found["matrix"]))
