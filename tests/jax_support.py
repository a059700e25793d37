"""What the tests of the Optax transformations share."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

squares_are_summed_at_once = pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="on a CPU, the compiler of older JAX stores all squares before it sums them"
)
EPSILON = float(np.finfo(np.float32).eps)
SHAPES = {"empty": (0, 2), "matrix": (3, 4), "scalar": (), "vector": (5,)}  # sorted, as JAX sorts a dict


def tree(seed: int, dtype: Any = np.float32, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, Any]:
    """Normally distributed leaves."""
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def apply(params: Any, updates: Any) -> Any:
    """As the docstring of `ada2ms` has it, for gradients that may be None."""
    updates = jax.tree.map(lambda p, u: jnp.zeros_like(p) if u is None else u, params, updates)
    return optax.apply_updates(params, updates)


def train(
    optimizer: Any, params: Any, gradients: Sequence[Any], wrap: Callable[[Any], Any] = jax.jit
) -> tuple[Any, Any]:
    """Parameters and state after one step for each of the gradients."""

    def step(params: Any, state: Any, g: Any) -> Any:
        updates, state = optimizer.update(g, state, params)
        return apply(params, updates), state

    state, step = optimizer.init(params), wrap(step)
    for g in gradients:
        params, state = step(params, state, g)
    return params, state


def assert_close(actual: Any, expected: Any, rtol: float, atol: float = 0.0) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


def assert_equal(actual: Any, expected: Any) -> None:
    assert_close(actual, expected, 0.0)
