"""`max_norm` of the Optax transformations: Optax' own clip before them, without a pass over the gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax_support import EPSILON, assert_close, assert_equal, train
from jax_support import tree as larger_tree

from ada2ms import core
from ada2ms.jax import ada2ms, scale_by_ada2ms
from support import slow

SHAPES = {"matrix": (3, 4), "vector": (5,)}


def tree(seed: int, dtype: Any = np.float32) -> dict[str, Any]:
    """Of two leaves, which compile sooner than more."""
    return larger_tree(seed, dtype, SHAPES)


GRADIENTS = [tree(i) for i in range(1, 8)]
NORMS = [float(optax.tree.norm(g)) for g in GRADIENTS]
SOME = float(np.median(NORMS))  # clips half of them, each by another factor


def clipped(max_norm: Any, optimizer: Any) -> Any:
    """Optax' own."""
    return optax.chain(optax.clip_by_global_norm(max_norm), optimizer)


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("max_norm", [SOME, *slow(1e-3, 1e3)])
@pytest.mark.parametrize("adaptivity", [0.3, *slow(0.0, 0.5, 1.0, core.Linear(1.0, 0.0, 9))])
def test_is_the_clip_of_optax_before_the_rule(adaptivity: Any, max_norm: float, scope: Any) -> None:
    """Beside it are a rounding of the factor, and one for each product with it: some of each gradient and square."""
    options = {"adaptivity": adaptivity, "scope": scope, "weight_decay": 0.1}
    found, state = train(ada2ms(0.1, max_norm=max_norm, **options), tree(0), GRADIENTS)
    expected, (_, theirs) = train(clipped(max_norm, ada2ms(0.1, **options)), tree(0), GRADIENTS)
    assert_close(found, expected, 8 * EPSILON, 8 * EPSILON)
    assert_close(state, theirs, 16 * EPSILON, EPSILON * max_norm)


@pytest.mark.parametrize("x64", [True, False])
def test_adaptivity_1_is_optax_adamw_after_a_clip(x64: bool) -> None:
    """In float32 within the 1e-5 of Optax' own bias correction."""
    with jax.enable_x64(x64):
        dtype = np.float64 if x64 else np.float32
        gradients = [tree(i, dtype) for i in range(1, 20)]
        ours, _ = train(ada2ms(0.1, weight_decay=0.1, adaptivity=1.0, max_norm=SOME), tree(0, dtype), gradients)
        theirs, _ = train(clipped(SOME, optax.adamw(0.1, weight_decay=0.1)), tree(0, dtype), gradients)
        assert_close(ours, theirs, *((1e-12, 1e-14) if x64 else (1e-5, 1e-5)))


def test_the_direction_alone_is_clipped_too() -> None:
    ours, theirs = scale_by_ada2ms(max_norm=SOME), clipped(SOME, scale_by_ada2ms())
    state, other = ours.init(tree(0)), theirs.init(tree(0))
    for g in GRADIENTS:
        found, state = jax.jit(ours.update)(g, state)
        expected, other = jax.jit(theirs.update)(g, other)
        assert_close(found, expected, 16 * EPSILON, EPSILON)


@pytest.mark.parametrize("max_norm", [max(NORMS) * 1.001, *slow(1e30, np.inf)])
def test_a_max_norm_that_does_not_bind_changes_nothing(max_norm: float) -> None:
    """But which products the compiler fuses with their sums: a rounding each."""
    plain, bound = ada2ms(0.1, adaptivity=0.3), ada2ms(0.1, adaptivity=0.3, max_norm=max_norm)
    found, expected = train(bound, tree(0), GRADIENTS), train(plain, tree(0), GRADIENTS)
    assert_close(found, expected, 8 * EPSILON, EPSILON)


def test_gradients_at_the_norm_and_of_zeros() -> None:
    """3, 2 and 6 have the norm 7: a factor of 1, as where there is no norm at all to divide by."""
    params = {"a": jnp.ones(2), "b": jnp.ones(1)}
    rows = [{"a": jnp.array([3.0, 2.0]), "b": jnp.array([6.0])}, jax.tree.map(jnp.zeros_like, params)]
    with jax.debug_nans(True), jax.debug_infs(True):
        assert_equal(train(ada2ms(0.1, max_norm=7.0), params, rows), train(ada2ms(0.1), params, rows))
    _, state = train(ada2ms(0.1, b1=0.0, max_norm=3.5), params, rows[:1])
    assert_close(state.mu, {"a": jnp.array([1.5, 1.0]), "b": jnp.array([3.0])}, EPSILON)


def test_a_missing_gradient_is_not_in_the_norm() -> None:
    rows = [{**g, "matrix": None} for g in GRADIENTS]
    present = [{name: x for name, x in g.items() if x is not None} for g in rows]
    found, _ = train(ada2ms(0.1, max_norm=1.0), tree(0), rows)
    initial = {name: x for name, x in tree(0).items() if name != "matrix"}
    expected, _ = train(clipped(1.0, ada2ms(0.1)), initial, present)
    assert_close({name: found[name] for name in expected}, expected, 8 * EPSILON, 8 * EPSILON)
    assert_equal(found["matrix"], tree(0)["matrix"])


# Precision


@pytest.mark.parametrize("options", [{}, *slow({"scope": "tensor"}), {"mu_dtype": "float32", "nu_dtype": "float32"}])
def test_complex_leaves(options: dict[str, Any]) -> None:
    gradients = [{"a": tree(i)["matrix"] + 1j * tree(i + 50)["matrix"], "b": tree(i)["vector"]} for i in range(6)]
    found, _ = train(ada2ms(0.1, max_norm=2.0, **options), gradients[0], gradients[1:])
    expected, _ = train(clipped(2.0, ada2ms(0.1, **options)), gradients[0], gradients[1:])
    assert_close(found, expected, 16 * EPSILON, 16 * EPSILON)


def test_the_norm_of_16_bits_is_one_of_float32() -> None:
    """The squares of these are infinite in float16."""
    params = {"a": jnp.ones(3, jnp.float16)}
    gradients = jax.tree.map(lambda x: x.astype(jnp.float16), {"a": jnp.full(3, 3e4)})
    _, state = train(ada2ms(0.1, b1=0.0, max_norm=1.0), params, [gradients])
    np.testing.assert_allclose(state.mu["a"], 3**-0.5, rtol=4 * EPSILON)
    np.testing.assert_allclose(state.s, 1e-3 / 3, rtol=1e-6)


# Gradients that are not finite


@pytest.mark.parametrize(("bad", "others"), [(jnp.nan, np.nan), (jnp.inf, 0.0)])
def test_gradients_that_are_not_finite(bad: float, others: float) -> None:
    """As after a clip: the factor of an infinite norm is 0, and that of a NaN is NaN."""
    row = {**tree(1), "vector": tree(1)["vector"].at[2].set(bad)}
    for scope in ("model", "tensor"):
        _, state = train(ada2ms(0.1, max_norm=1.0, scope=scope), tree(0), [row])
        np.testing.assert_array_equal(state.mu["matrix"], np.full((3, 4), others))
        assert np.isnan(state.mu["vector"][2])
    before = train(ada2ms(0.1, max_norm=1.0, nonfinite="skip"), tree(0), GRADIENTS)
    params, state = train(ada2ms(0.1, max_norm=1.0, nonfinite="skip"), tree(0), [*GRADIENTS, row])
    assert_equal((params, state._replace(skipped=before[1].skipped)), before)
    assert state.skipped == 1


def test_a_sum_that_overflows() -> None:
    """1e30 is finite, and its square is not: the factor is 0, s is not a number, and so the step is to be skipped."""
    row = {"a": jnp.full(3, 1e30)}
    params = {"a": jnp.ones(3)}
    after, state = train(ada2ms(0.1, max_norm=1.0), params, [row])
    np.testing.assert_array_equal(state.mu["a"], 0)
    assert np.all(np.isnan(after["a"]))
    assert np.isnan(state.s)
    after, state = train(ada2ms(0.1, max_norm=1.0, nonfinite="skip"), params, [row])
    assert_equal(after, params)
    assert state.skipped == 1
    expected = train(ada2ms(0.1), params, [row])
    assert np.all(np.isfinite(expected[0]["a"]))
    assert_equal(train(ada2ms(0.1, max_norm=np.inf), params, [row]), expected)  # which is no bound
    assert_equal(train(ada2ms(0.1, max_norm=jnp.array(jnp.inf)), params, [row]), expected)


# Under transformations


def test_a_traced_max_norm() -> None:
    """`inject_hyperparams` traces it, and follows a schedule of it."""
    schedule = optax.linear_schedule(3.0, 0.5, 6)
    injected = optax.inject_hyperparams(ada2ms)(0.1, max_norm=schedule, adaptivity=0.3)
    found, state = train(injected, tree(0), GRADIENTS)
    params, plain = tree(0), ada2ms().init(tree(0))
    for k, g in enumerate(GRADIENTS):
        optimizer = ada2ms(0.1, max_norm=float(schedule(k)), adaptivity=0.3)
        updates, plain = optimizer.update(g, plain, params)
        params = optax.apply_updates(params, updates)
    assert_close(found, params, 16 * EPSILON, 16 * EPSILON)
    assert float(state.hyperparams["max_norm"]) == pytest.approx(0.5)


@pytest.mark.slow
def test_scan_vmap_and_multi_steps() -> None:
    optimizer = ada2ms(0.1, adaptivity=0.3, max_norm=SOME)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *GRADIENTS)
    members = [train(optimizer, tree(0), [g]) for g in GRADIENTS]

    def one(g: Any) -> Any:
        updates, state = optimizer.update(g, optimizer.init(g), tree(0))
        return optax.apply_updates(tree(0), updates), state

    assert_close(jax.vmap(one)(stacked), jax.tree.map(lambda *x: jnp.stack(x), *members), 8 * EPSILON, 8 * EPSILON)

    def step(carry: Any, g: Any) -> Any:
        updates, state = optimizer.update(g, carry[1], carry[0])
        return (optax.apply_updates(carry[0], updates), state), None

    scanned, _ = jax.lax.scan(step, (tree(0), optimizer.init(tree(0))), stacked)
    assert_close(scanned, train(optimizer, tree(0), GRADIENTS), 8 * EPSILON, 8 * EPSILON)

    of_two = [jax.tree.map(lambda x, y: (x + y) / 2, *GRADIENTS[i : i + 2]) for i in (0, 2, 4)]
    found, _ = train(optax.MultiSteps(optimizer, 2), tree(0), GRADIENTS[:6])
    assert_close(found, train(optimizer, tree(0), of_two)[0], 16 * EPSILON, 16 * EPSILON)


@pytest.mark.slow
def test_derivatives_by_max_norm_and_by_gradients() -> None:
    """Against differences, where it binds; and finite where all gradients are zeros."""

    def f(max_norm: Any, g: Any) -> Any:
        params, _ = train(ada2ms(0.1, b2=0.9, eps=0.1, max_norm=max_norm), jnp.ones(3), [g, g**2], wrap=lambda f: f)
        return jnp.sum(jnp.sin(params))

    with jax.enable_x64(True):
        point = jnp.float64(2.0), jnp.arange(1.0, 4)
        by_norm, by_gradient = jax.jit(jax.grad(f, (0, 1)))(*point)
        h = 1e-6  # the difference is off by h^2, and by the rounding of f over h
        np.testing.assert_allclose(by_norm, (f(2 + h, point[1]) - f(2 - h, point[1])) / (2 * h), rtol=1e-7, atol=1e-8)
        for i in range(3):
            e = np.eye(3)[i] * h
            difference = (f(2.0, point[1] + e) - f(2.0, point[1] - e)) / (2 * h)
            np.testing.assert_allclose(by_gradient[i], difference, rtol=1e-7, atol=1e-8)
        assert np.all(np.isfinite(jax.grad(f, 1)(2.0, jnp.zeros(3))))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.0, r"0.0 \(max_norm must be a number in \(0, inf\]"),
        (-1.0, "must be"),
        ("1", "must be"),
        (jnp.float32(-1.0), "must be"),
        (lambda k: 1.0, "must be"),
        (float("nan"), "must be"),
    ],
)
def test_bad_arguments(value: Any, message: str) -> None:
    for make in (ada2ms, scale_by_ada2ms):
        with pytest.raises((TypeError, ValueError), match=rf"^Invalid max_norm: .*{message}"):
            make(max_norm=value)


@pytest.mark.parametrize("name", ["learning_rate", "b1", "b2", "eps", "weight_decay", "adaptivity", "max_norm"])
def test_an_array_of_one_number_is_that_number(name: str) -> None:
    """Which `float` takes as well; its shape would go over to updates and state."""
    options = {"learning_rate": 0.1, name: 0.25}
    expected = train(ada2ms(**options), tree(0), [tree(1), tree(2)])
    found = train(ada2ms(**{**options, name: jnp.array([0.25])}), tree(0), [tree(1), tree(2)])
    assert_close(found, expected, 4 * EPSILON, 4 * EPSILON)
