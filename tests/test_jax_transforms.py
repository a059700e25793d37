"""The Optax transformations inside Optax' own wrappers, and what "global" means there: docs/global.md, row by row."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax_support import EPSILON, assert_close, assert_equal, train, tree

from ada2ms.jax import ScaleByAda2MSState, ada2ms, scale_by_ada2ms


def test_tree_get_finds_the_state() -> None:
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), ada2ms(optax.constant_schedule(0.1)))
    _, state = train(optimizer, tree(0), [tree(1), tree(2)])
    for name in ScaleByAda2MSState._fields:
        assert optax.tree.get(state, name) is not None
    assert optax.tree.get(state, "count") == 2
    assert optax.tree.get(optax.tree.set(state, s=jnp.float32(7)), "s") == 7


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_tree_map_params_maps_the_moments_alone(scope: Any) -> None:
    optimizer = ada2ms(scope=scope)
    _, state = train(optimizer, tree(0), [tree(1)])
    mapped = optax.tree.map_params(optimizer, lambda x: x + 1, state)
    assert_equal(mapped, state._replace(**{n: jax.tree.map(lambda x: x + 1, getattr(state, n)) for n in ("mu", "nu")}))
    labelled = optax.tree.map_params(
        optimizer, lambda _, p: "like a parameter", state, tree(0), transform_non_params=lambda _: "not"
    )
    assert labelled.s == labelled.count == labelled.steps == labelled.skipped == "not"


def test_inject_hyperparams() -> None:
    gradients = [tree(i) for i in range(1, 5)]
    injected = optax.inject_hyperparams(ada2ms)(learning_rate=0.1, adaptivity=optax.linear_schedule(1.0, 0.0, 4))
    found, state = train(injected, tree(0), gradients)
    expected, _ = train(ada2ms(0.1, adaptivity=optax.linear_schedule(1.0, 0.0, 4)), tree(0), gradients)
    # b2 in float32 is off by half an epsilon, and 1 - b2 by 1e-5 of itself: but it cancels in v / (1 - b2^t).
    assert_close(found, expected, 1e-6, 1e-6)
    np.testing.assert_allclose(state.hyperparams["adaptivity"], 0.25)
    state.hyperparams["learning_rate"] = jnp.float32(0.0)
    updates, _ = jax.jit(injected.update)(tree(5), state, found)
    assert not any(np.any(x) for x in jax.tree.leaves(updates))


def test_inject_hyperparams_into_bfloat16_needs_a_wider_dtype() -> None:
    params = {"a": jnp.ones(3, jnp.bfloat16)}
    injected = optax.inject_hyperparams(ada2ms, hyperparam_dtype=jnp.float32)(learning_rate=0.1)
    after, _ = train(injected, params, [params] * 3)
    assert_equal(after, train(ada2ms(0.1), params, [params] * 3)[0])
    with pytest.raises(ValueError, match=r"1, dtype=bfloat16\) \(b2 must be a number in \[0, 1\)\)"):
        optax.inject_hyperparams(ada2ms)(learning_rate=0.1).init(params)


def test_apply_if_finite() -> None:
    optimizer = optax.apply_if_finite(ada2ms(0.1), 5)
    broken = {**tree(7), "vector": tree(7)["vector"].at[1].set(jnp.nan)}
    found, state = train(optimizer, tree(0), [tree(1), broken, tree(2)])
    expected = train(ada2ms(0.1), tree(0), [tree(1), tree(2)])
    assert_close((found, state.inner_state), expected, 4 * EPSILON, 4 * EPSILON)  # compiled apart: a rounding each


def test_lookahead() -> None:
    optimizer = optax.lookahead(ada2ms(0.1), sync_period=2, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(tree(0))
    state = optimizer.init(params)
    for i in (1, 2):
        updates, state = jax.jit(optimizer.update)(tree(i), state, params)
        params = optax.apply_updates(params, updates)
    fast, _ = train(ada2ms(0.1), tree(0), [tree(1), tree(2)])
    expected = jax.tree.map(lambda x, y: (x + y) / 2, tree(0), fast)
    assert_close(params.slow, expected, 4 * EPSILON, 4 * EPSILON)


# What "global" means, row by row. The first update is g / (g^2)^(a/2) / s_hat^((1-a)/2), where s_hat = mean(g^2).

GRADIENTS = {"a": jnp.array([1.0]), "b": jnp.array([100.0])}
WHOLE = (1 + 100**2) / 2
ALONE = {"learning_rate": 1.0, "weight_decay": 0.0, "adaptivity": 0.5}
LABELS = {"a": "first", "b": "second"}


def first_update(optimizer: Any, gradients: Any = GRADIENTS) -> list[float]:
    """Of leaf a, and of leaf b."""
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(GRADIENTS), GRADIENTS)
    return [float(jnp.sum(updates[name])) for name in ("a", "b")]


def by(s_hat: float) -> list[float]:
    """The first updates of both leaves at adaptivity 0.5, given a global second moment."""
    return [-(g**0.5) / s_hat**0.25 for g in (1.0, 100.0)]


def test_chain() -> None:
    np.testing.assert_allclose(first_update(ada2ms(**ALONE)), by(WHOLE), rtol=1e-5)
    np.testing.assert_allclose(by(WHOLE), [-0.119, -1.19], rtol=5e-3)  # as the page has it
    unclipped = optax.chain(scale_by_ada2ms(adaptivity=0.5), optax.scale(-1.0))
    np.testing.assert_allclose(first_update(unclipped), by(WHOLE), rtol=1e-5)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), ada2ms(**ALONE))
    _, state = optimizer.update(GRADIENTS, optimizer.init(GRADIENTS), GRADIENTS)
    np.testing.assert_allclose(optax.tree.get(state, "s"), 0.001 * 1 / 2, rtol=1e-5)  # a norm of 1, two entries


def test_masked() -> None:
    optimizer = optax.masked(ada2ms(**ALONE), {"a": False, "b": True})
    np.testing.assert_allclose(first_update(optimizer), [1.0, -1.0], rtol=1e-5)  # a passes through
    optimizer = optax.masked(ada2ms(**ALONE), {"a": True, "b": True})
    np.testing.assert_allclose(first_update(optimizer), by(WHOLE), rtol=1e-5)


@pytest.mark.parametrize("wrapper", [optax.partition, optax.multi_transform])
def test_partition(wrapper: Any) -> None:
    groups = {"first": ada2ms(**ALONE), "second": ada2ms(**ALONE), "of nothing": ada2ms(**ALONE)}
    optimizer = wrapper(groups, LABELS)
    np.testing.assert_allclose(first_update(optimizer), [-1.0, -1.0], rtol=1e-5)
    _, state = train(optimizer, GRADIENTS, [GRADIENTS] * 2)
    found = {str(path): float(s) for path, s in optax.tree_utils.tree_get_all_with_path(state, "s")}
    assert len(found) == 3
    np.testing.assert_allclose(sorted(found.values()), [0, 0.001999, 19.99], rtol=1e-5)


def test_partition_after() -> None:
    """One global second moment, and rates of their own."""
    rates = {"first": optax.scale(-1.0), "second": optax.scale(-3.0)}
    optimizer = optax.chain(scale_by_ada2ms(adaptivity=0.5), optax.partition(rates, LABELS))
    np.testing.assert_allclose(first_update(optimizer), np.multiply(by(WHOLE), [1, 3]), rtol=1e-5)


def test_frozen() -> None:
    groups = {"first": ada2ms(**ALONE), "second": optax.set_to_zero()}
    np.testing.assert_allclose(first_update(optax.partition(groups, LABELS)), [-1.0, 0.0], rtol=1e-5)
    optimizer = ada2ms(**ALONE)
    gradients = {**GRADIENTS, "b": None}
    updates, _ = optimizer.update(gradients, optimizer.init(GRADIENTS), GRADIENTS)
    np.testing.assert_allclose(updates["a"], [-1.0], rtol=1e-5)
    assert updates["b"] is None


@pytest.mark.parametrize("name", ["masked", "freeze"])
def test_frozen_behind(name: str) -> None:
    """Its gradient is counted in s, as it is not where the recipe of docs/global.md freezes it."""
    frozen = {"a": False, "b": True}
    freeze = optax.masked(optax.set_to_zero(), frozen) if name == "masked" else optax.freeze(frozen)
    found = first_update(optax.chain(ada2ms(**ALONE), freeze))
    np.testing.assert_allclose(found, [by(WHOLE)[0], 0.0], rtol=1e-5)
    recipe = optax.selective_transform(ada2ms(**ALONE), freeze_mask=frozen)
    np.testing.assert_allclose(first_update(recipe), [-1.0, 0.0], rtol=1e-5)
    for optimizer in (
        optax.chain(optax.adamw(1.0), freeze),
        optax.selective_transform(optax.adamw(1.0), freeze_mask=frozen),
    ):
        np.testing.assert_allclose(first_update(optimizer), [*first_update(optax.adamw(1.0))[:1], 0.0], rtol=1e-5)


def test_zeros_dilute() -> None:
    """By 2^(1/4) here, where half of all entries are zeros."""
    gradients = {**GRADIENTS, "b": jnp.zeros(1)}
    np.testing.assert_allclose(first_update(ada2ms(**ALONE), gradients), [-(2**0.25), 0.0], rtol=1e-5)
    before = optax.chain(optax.partition({"first": optax.identity(), "second": optax.set_to_zero()}, LABELS))
    np.testing.assert_allclose(first_update(optax.chain(before, ada2ms(**ALONE))), [-(2**0.25), 0.0], rtol=1e-5)


def test_multi_steps() -> None:
    gradients = [tree(i) for i in range(1, 7)]
    averages = [
        jax.tree.map(lambda *g: sum(g) / 3, *gradients[:3]),
        jax.tree.map(lambda *g: sum(g) / 3, *gradients[3:]),
    ]
    found, state = train(optax.MultiSteps(ada2ms(0.1), 3), tree(0), gradients)
    expected, inner = train(ada2ms(0.1), tree(0), averages)
    assert_close(found, expected, 8 * EPSILON, 8 * EPSILON)
    assert_close(optax.tree.get(state, "s"), inner.s, 8 * EPSILON)
    assert optax.tree.get(state.inner_opt_state, "count") == 2
    _, between = train(optax.MultiSteps(ada2ms(0.1), 3), tree(0), gradients[:5])
    _, one = train(ada2ms(0.1), tree(0), averages[:1])
    assert_close(optax.tree.get(between, "s"), one.s, 8 * EPSILON)


def test_every_row_of_the_page_has_its_test() -> None:
    here = Path(__file__)
    page = (here.parents[1] / "docs" / "global.md").read_text().partition("\n## JAX\n")[2]
    rows = re.findall(r"^\| .* \| .* \| (`.*`) \|$", page, re.MULTILINE)
    sources = "".join(
        here.with_name(f"test_jax{name}.py").read_text() for name in ("_traced", "_transforms", "_sharding")
    )
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert len(rows) == 15
    assert [name for name in named if f"\ndef {name}(" not in sources] == []
