"""What flax.nnx does to a model, and a hand-off to it: the order of its attributes, and where its arrays are."""

from typing import Any

import numpy as np
import pytest

from ada2ms.core import StateError

nnx: Any = pytest.importorskip("flax.nnx", reason="flax is not installed")


class Pair(nnx.Module):
    """Two layers of the same shapes, set in the order in which data reach them, which is not that of the alphabet."""

    def __init__(self, rngs: Any) -> None:
        self.up = nnx.Linear(2, 2, rngs=rngs)
        self.down = nnx.Linear(2, 2, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.down(self.up(x))


class Above(nnx.Module):
    def __init__(self, rngs: Any) -> None:
        self.pairs = nnx.List([Pair(rngs)])


class Stack(nnx.Module):
    """No attribute has an order here but that of a list, which stays."""

    def __init__(self, rngs: Any) -> None:
        self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs) for _ in range(11)])


def jitted(model: Any) -> Any:
    """As after a step of training."""

    @nnx.jit
    def train(model: Any) -> None:
        nnx.update(model, nnx.state(model))

    train(model)
    return model


def tree_mapped(model: Any) -> Any:
    import jax

    return jax.tree.map(lambda x: x, model)


SORTING = {
    "jit": jitted,
    "merge": lambda model: nnx.merge(*nnx.split(model)),
    "clone": nnx.clone,
    "tree.map": tree_mapped,
}


@pytest.mark.parametrize("sorting", SORTING)
def test_an_order_that_flax_has_lost_is_not_guessed(sorting: str) -> None:
    """Numbers by the alphabet would exchange the two layers, whose shapes are the same, without a word."""
    from ada2ms.jax import plain_layers

    made = Pair(nnx.Rngs(0))
    right = plain_layers(made)
    assert right["names"]["up/kernel"] == "0.dense.kernel"
    lost = SORTING[sorting](made)
    with pytest.raises(StateError, match=r"call plain_layers before") as caught:
        plain_layers(lost)
    assert caught.value.problems == ["'', Pair: down, up"]
    assert plain_layers(Pair(nnx.Rngs(1))) == right  # of a new model
    assert plain_layers(lost, names="auto")["names"]["up/kernel"] == "up.dense.kernel"
    with pytest.raises(StateError) as caught:
        plain_layers(SORTING[sorting](Above(nnx.Rngs(0))))
    assert caught.value.problems == ["'pairs/0', Pair: down, up"]


@pytest.mark.parametrize("sorting", SORTING)
def test_an_order_that_flax_has_not_lost_is_taken(sorting: str) -> None:
    from ada2ms.jax import plain_layers

    model = Stack(nnx.Rngs(0))
    names = plain_layers(model)["names"]
    assert names["layers/10/kernel"] == "10.dense.kernel"
    assert plain_layers(SORTING[sorting](model))["names"] == names


def test_attributes_that_were_set_in_the_order_of_the_alphabet() -> None:
    from ada2ms.jax import plain_layers

    class Sorted(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.a, self.b = nnx.Linear(2, 2, rngs=rngs), nnx.Linear(2, 2, rngs=rngs)

    assert plain_layers(Sorted(nnx.Rngs(0)))["names"]["b/bias"] == "1.dense.bias"


def test_a_step_after_an_import_is_not_compiled_anew() -> None:
    """Arrays that JAX has bound to no device are not bound to one by an import; those that were are on theirs."""
    import jax
    import jax.numpy as jnp

    from ada2ms.jax import ada2ms, export_state, import_state

    rule = ada2ms(1e-3)
    traced = []

    @jax.jit
    def step(params: Any, state: Any, gradients: Any) -> Any:
        traced.append(1)
        updates, state = rule.update(gradients, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    params, gradients = {"a": jnp.ones(3)}, {"a": jnp.ones(3)}
    state = rule.init(params)
    params, state = step(params, state, gradients)
    before = step._cache_size()
    moved = import_state(params, state, export_state(params, state))[:2]
    assert not any(x.committed for x in jax.tree.leaves(moved))
    moved = step(*moved, gradients)
    assert step._cache_size() == before
    bound = jax.device_put((params, state), jax.devices()[0])
    again = import_state(*bound, export_state(params, state))[:2]
    assert all(x.committed and x.sharding == y.sharding for x, y in zip(*map(jax.tree.leaves, (again, bound))))  # noqa: B905
    np.testing.assert_array_equal(again[0]["a"], params["a"])
