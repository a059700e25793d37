"""The Optax transformations: what the rule leaves to this framework. (The rule itself: test_trajectories.py.)"""

import doctest
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax_support import EPSILON, SHAPES, assert_close, assert_equal, train, tree

from ada2ms import core
from ada2ms.jax import ada2ms, scale_by_ada2ms
from ada2ms.jax import optimizer as optimizer_module
from ada2ms.jax.kernels.power import power
from support import slow

# The rule, against independent implementations


@pytest.mark.parametrize("x64", [True, False])
def test_adaptivity_1_is_optax_adamw(x64: bool) -> None:
    """In float32 Optax' own bias correction, 1 - b2**t, is off by 1e-5 of itself at first, its root by half that."""
    with jax.enable_x64(x64):
        dtype = np.float64 if x64 else np.float32
        gradients = [tree(i, dtype) for i in range(1, 20)]
        ours, state = train(ada2ms(0.1, weight_decay=0.1, adaptivity=1.0), tree(0, dtype), gradients)
        theirs, adamw = train(optax.adamw(0.1, weight_decay=0.1), tree(0, dtype), gradients)
        assert_close(ours, theirs, *((1e-12, 1e-14) if x64 else (1e-5, 1e-5)))
        for name in ("mu", "nu"):
            found, expected = optax.tree.get(state, name), optax.tree.get(adamw, name)
            assert_close(found, expected, 1e-13 if x64 else 8 * EPSILON, 1e-14 if x64 else EPSILON)


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("adaptivity", [core.Cosine(1.0, 0.1, 10), *slow(0.5)])
def test_whole_surface_follows_the_numpy_rule(scope: Any, adaptivity: Any) -> None:
    """With missing and non-finite gradients and schedules of everything, in float64: within 1e-12 of the updates."""
    with jax.enable_x64(True):
        initial = tree(0, np.float64)
        steps = [dict(tree(i, np.float64)) for i in range(1, 25)]
        for i in range(0, 24, 3):
            steps[i]["matrix"] = None
        steps[4] = dict.fromkeys(SHAPES)
        steps[7]["vector"] = steps[7]["vector"].at[2].set(jnp.inf)
        options = {"weight_decay": 0.1, "scope": scope, "nonfinite": "skip", "adaptivity": adaptivity}

        numpy = core.Ada2MS([np.array(x) for x in initial.values()], lr=lambda k: 0.1 / (1 + k), **options)
        for g in steps:
            numpy.step([None if x is None else np.asarray(x) for x in g.values()])
        params, state = train(ada2ms(lambda k: 0.1 / (1 + k), **options), initial, steps)

        for p, x, y in zip(numpy.groups[0].params, initial.values(), params.values(), strict=True):
            np.testing.assert_allclose(np.asarray(y) - x, p - np.asarray(x), rtol=1e-12, atol=1e-14)
        assert state.count == numpy.groups[0].global_step == 22
        assert list(state.steps) == numpy.groups[0].step == [22, 14, 22, 22]
        assert state.skipped == numpy.skipped == 1
        np.testing.assert_allclose(np.atleast_1d(state.s), numpy.groups[0].global_exp_avg_sq, rtol=1e-12)


def test_adaptivity_0_is_momentum_sgd_normalised_by_one_number() -> None:
    gradients = [tree(i) for i in range(1, 6)]
    ours = scale_by_ada2ms(adaptivity=0.0)
    state = ours.init(gradients[0])
    for g in gradients:
        directions, state = jax.jit(ours.update)(g, state)
    ratios = np.concatenate(
        [np.asarray(u / m).ravel() for u, m in zip(directions.values(), state.mu.values(), strict=True)]
    )
    np.testing.assert_allclose(ratios, ratios[0], rtol=4 * EPSILON)


def test_alias_is_a_chain_of_its_parts() -> None:
    gradients = [tree(i) for i in range(1, 10)]
    schedule = optax.linear_schedule(0.1, 0.0, 20)
    chain = optax.chain(
        scale_by_ada2ms(0.8, 0.95, 1e-6),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(schedule),
    )
    alias = ada2ms(schedule, 0.8, 0.95, 1e-6, weight_decay=0.1)
    assert_close(train(alias, tree(0), gradients)[0], train(chain, tree(0), gradients)[0], 4 * EPSILON, 4 * EPSILON)


@pytest.mark.parametrize("options", [{}, *slow({"scope": "tensor", "max_norm": 1.0, "nonfinite": "skip"})])
@pytest.mark.parametrize("disabled", [False, True])
def test_eager_is_jitted(options: dict[str, Any], disabled: bool) -> None:
    """Up to fused multiplications and additions: a rounding each. As well where `jax.disable_jit` lets nothing jit."""
    params, *gradients = ({"a": tree(i)["vector"]} for i in range(5))
    optimizer = ada2ms(0.1, adaptivity=0.3, **options)
    with jax.disable_jit(disabled):
        eager = train(optimizer, params, gradients, wrap=lambda f: f)
    assert_close(train(optimizer, params, gradients), eager, 8 * EPSILON, 8 * EPSILON)


# Powers


def test_power_is_within_two_and_a_half_epsilons() -> None:
    """Against double precision, over all normal float32 numbers. The polynomials are off by 0.3 and 0.4 of an epsilon;
    the rest is roundings: of r, of the polynomials and of their product.
    """
    rng = np.random.default_rng(0)
    x = (2.0 ** np.concatenate([rng.uniform(-126, 128, 200_000), rng.normal(size=50_000) * 1e-3])).astype(np.float32)
    for h in [0.0, 1e-30, 1e-3, 0.25, 0.4999, 0.5, *rng.uniform(0, 0.5, 10)]:
        exact = x.astype(np.float64) ** float(np.float32(h))
        error = np.abs(np.asarray(jax.jit(power)(x, jnp.float32(h)), np.float64) / exact - 1)
        assert np.max(error) <= 2.5 * EPSILON, h


def test_power_where_there_is_no_logarithm() -> None:
    x = jnp.array([0.0, jnp.inf, jnp.nan], jnp.float32)
    np.testing.assert_array_equal(power(x, jnp.float32(0.3)), [0, np.inf, np.nan])
    np.testing.assert_array_equal(power(x[:1], jnp.float32(0)), [1])  # 0^0


def test_power_has_the_derivatives_of_a_power() -> None:
    for argnum in (0, 1):
        for order in (jax.grad, lambda f, n: jax.grad(jax.grad(f, n), n)):
            found, expected = (order(f, argnum)(jnp.float32(3.0), jnp.float32(0.3)) for f in (power, jnp.power))
            np.testing.assert_allclose(found, expected, rtol=8 * EPSILON)


# Schedules, masks


def test_schedules_are_given_the_count_of_completed_updates() -> None:
    seen: dict[str, list[int]] = {"learning_rate": [], "weight_decay": [], "adaptivity": []}

    def schedule(name: str, value: float) -> Callable[[Any], float]:
        def at(count: Any) -> float:
            seen[name].append(int(count))
            return value

        return at

    values = {"learning_rate": 0.1, "weight_decay": 0.2, "adaptivity": 0.3}
    scheduled = ada2ms(**{name: schedule(name, value) for name, value in values.items()})
    initial, *gradients = ({"a": tree(i)["vector"]} for i in range(4))
    gradients.insert(1, {"a": None})  # moves nothing
    params, _ = train(scheduled, initial, gradients, wrap=lambda f: f)
    assert seen == {name: [0, 1, 2] for name in values}
    assert_equal(params, train(ada2ms(**values), initial, gradients, wrap=lambda f: f)[0])


@pytest.mark.parametrize(
    "schedules",
    [
        (core.Cosine(1.0, 0.2, 8), lambda k: 0.2 + optax.cosine_decay_schedule(0.8, 8)(k)),
        *slow(
            (core.Linear(1.0, 0.2, 8), optax.linear_schedule(1.0, 0.2, 8)),
            (core.Exponential(1.0, 0.2, 8), lambda k: 0.2 + optax.exponential_decay(0.8, 8, 0.5)(k)),
        ),
    ],
)
def test_schedules_of_core_and_of_optax(schedules: tuple[Any, Any]) -> None:
    gradients = [tree(i) for i in range(1, 12)]
    ours, theirs = (train(ada2ms(0.1, adaptivity=a), tree(0), gradients)[0] for a in schedules)
    assert_close(ours, theirs, 8 * EPSILON, 16 * EPSILON)


@pytest.mark.parametrize("as_function", [True, False])
def test_mask_is_that_of_optax(as_function: bool) -> None:
    params = {"layer": tree(0), "other": tree(1)}
    gradients = [{"layer": tree(i), "other": tree(-i + 50)} for i in range(2, 7)]

    def wide(tree: Any) -> Any:
        return jax.tree.map(lambda p: p.ndim > 1, tree)

    for mask in (wide if as_function else wide(params), {"layer": True, "other": False}):
        masked, _ = train(ada2ms(0.1, weight_decay=0.5, mask=mask), params, gradients)
        chain = optax.chain(scale_by_ada2ms(), optax.add_decayed_weights(0.5, mask), optax.scale_by_learning_rate(0.1))
        assert_close(masked, train(chain, params, gradients)[0], 4 * EPSILON, 4 * EPSILON)
        gradients = [{**g, "layer": {**g["layer"], "vector": None}} for g in gradients]  # and once more with None


# Missing gradients, missing leaves, nothing at all


def test_a_missing_gradient_leaves_its_leaf_alone_and_out_of_the_mean() -> None:
    present = {name: shape for name, shape in SHAPES.items() if name != "matrix"}
    optimizer = ada2ms(0.1, adaptivity=0.4)
    with_none, state = train(optimizer, tree(0), [{**tree(i), "matrix": None} for i in range(1, 4)])
    gradients = [{name: x for name, x in tree(i).items() if name in present} for i in range(1, 4)]
    without, other = train(optimizer, {name: tree(0)[name] for name in present}, gradients)
    assert_equal({name: with_none[name] for name in present}, without)
    assert_equal(state.s, other.s)
    assert_equal(with_none["matrix"], tree(0)["matrix"])
    assert not np.any(state.mu["matrix"])
    assert list(state.steps) == [3, 0, 3, 3]


def test_an_update_is_none_where_the_gradient_is() -> None:
    optimizer = ada2ms()
    updates, _ = optimizer.update({**tree(1), "matrix": None}, optimizer.init(tree(0)), tree(0))
    assert updates["matrix"] is None
    with pytest.raises(TypeError):  # hence the advice in the docstring
        optax.apply_updates(tree(0), updates)


def test_without_any_gradient_nothing_moves() -> None:
    params, state = train(ada2ms(0.1), tree(0), [tree(1)])
    nothing = dict.fromkeys(SHAPES)
    updates, after = ada2ms(0.1).update(nothing, state, params)
    assert updates == nothing
    assert_equal(after, state)


@pytest.mark.parametrize("params", [{}, [], None, {"a": None}, {"a": jnp.zeros([0])}, [jnp.float32(1), None]])
def test_trees_without_leaves_or_entries(params: Any) -> None:
    for scope in ("model", "tensor"):
        after, state = train(ada2ms(0.1, scope=scope, weight_decay=0.0), params, [params] * 2)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((after, state)))
        assert jax.tree.structure(after) == jax.tree.structure(params)


@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("adaptivity", [0.0, 0.3, 0.5, 1.0, optax.linear_schedule(1.0, 0.0, 2)])
def test_zero_gradients_move_nothing(adaptivity: Any, eps: float) -> None:
    zeros = jax.tree.map(jnp.zeros_like, tree(0))
    params, state = train(ada2ms(0.1, eps=eps, adaptivity=adaptivity, weight_decay=0.0), tree(0), [zeros] * 4)
    assert_equal(params, tree(0))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))


def test_learning_rate_0_moves_nothing() -> None:
    assert_equal(train(ada2ms(0.0), tree(0), [tree(1), tree(2)])[0], tree(0))


# Precision


@pytest.mark.parametrize("dtype", [jnp.bfloat16, *slow(jnp.float16)])
def test_16_bits_compute_in_float32_and_round_once(dtype: Any) -> None:
    params, gradients = tree(0, dtype), [tree(i, dtype) for i in range(1, 9)]
    optimizer = ada2ms(0.1, weight_decay=0.1)
    state = optimizer.init(params)
    wide = optimizer.init(jax.tree.map(lambda x: x.astype(jnp.float32), params))
    assert_equal(state, wide)
    for g in gradients:
        updates, state = jax.jit(optimizer.update)(g, state, params)
        g32, p32 = (jax.tree.map(lambda x: x.astype(jnp.float32), x) for x in (g, params))
        updates32, wide = jax.jit(optimizer.update)(g32, wide, p32)
        assert_close(state, wide, 2 * EPSILON, EPSILON)
        # One rounding, and perhaps to the other side for the last bit of the float32 value
        ulp = float(jnp.finfo(dtype).eps)
        assert_close(updates, jax.tree.map(lambda x: x.astype(dtype), updates32), ulp)
        params = optax.apply_updates(params, updates)


def test_float16_gradients_whose_squares_overflow() -> None:
    params = {"a": jnp.ones(3, jnp.float16)}
    gradients = {"a": jnp.full(3, 3e4, jnp.float16)}
    after, state = train(ada2ms(0.1, weight_decay=0.0), params, [gradients] * 3)
    np.testing.assert_allclose(after["a"], 0.7, rtol=2e-3)  # three steps of 0.1, in float16
    np.testing.assert_allclose(state.s, 9e8 * (1 - 0.999**3), rtol=1e-3)


def test_bfloat16_averages_move() -> None:
    """In bfloat16 0.999 is 1: an average kept there would stand still."""
    params = {"a": jnp.ones(3, jnp.bfloat16)}
    _, state = train(ada2ms(0.1), params, [jax.tree.map(jnp.ones_like, params)] * 100)
    np.testing.assert_allclose(state.nu["a"], 1 - 0.999**100, rtol=1e-5)


def test_dtypes_of_state_and_updates() -> None:
    optimizer = ada2ms(mu_dtype=jnp.bfloat16, nu_dtype="float16")
    state = optimizer.init(tree(0))
    updates, after = jax.jit(optimizer.update)(tree(1), state, tree(0))
    for x in (state, after):
        assert {leaf.dtype for leaf in jax.tree.leaves(x.mu)} == {jnp.dtype(jnp.bfloat16)}
        assert {leaf.dtype for leaf in jax.tree.leaves(x.nu)} == {jnp.dtype(jnp.float16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(jnp.float32)}
    # Gradients in 16 bits do not make updates of float32 parameters any coarser.
    updates, _ = ada2ms().update(tree(1, jnp.bfloat16), ada2ms().init(tree(0)), tree(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(jnp.float32)}


def test_float32_and_float64_leaves_keep_their_precision() -> None:
    with jax.enable_x64(True):
        params = {"a": jnp.ones(3, jnp.float32), "b": jnp.ones(3, jnp.float64)}
        gradients = jax.tree.map(lambda p: jnp.arange(3.0, dtype=p.dtype), params)
        after, state = train(ada2ms(optax.constant_schedule(0.1)), params, [gradients] * 3)
        for x in (after, state.mu, state.nu):
            assert (x["a"].dtype, x["b"].dtype) == (jnp.float32, jnp.float64)
        assert state.s.dtype == jnp.float64
        numpy = core.Ada2MS([np.ones(3), np.ones(3)], lr=0.1)
        for _ in range(3):
            numpy.step([np.arange(3.0), np.arange(3.0)])
        np.testing.assert_allclose(after["b"], numpy.groups[0].params[1], rtol=1e-14)


@pytest.mark.parametrize("options", [{}, {"scope": "tensor"}, {"mu_dtype": "float32", "nu_dtype": "float32"}])
def test_complex_leaves_count_as_pairs_of_reals(options: dict[str, Any]) -> None:
    def pairs(x: dict[str, Any]) -> dict[str, Any]:
        return {name: jnp.stack([z.real, z.imag]) for name, z in x.items()}

    gradients = [{"a": tree(i)["matrix"] + 1j * tree(i + 50)["matrix"]} for i in range(6)]
    optimizer = ada2ms(0.1, adaptivity=0.3, **options)
    found, state = train(optimizer, gradients[0], gradients[1:])
    expected, _ = train(optimizer, pairs(gradients[0]), [pairs(g) for g in gradients[1:]])
    assert found["a"].dtype == jnp.complex64
    assert_close(pairs(found), expected, 4 * EPSILON, 4 * EPSILON)
    assert_equal(jax.tree.map(jnp.zeros_like, state), optimizer.init(gradients[0]))


# Non-finite gradients


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize(
    ("bad", "wrap"), [(jnp.nan, jax.jit), (jnp.inf, jax.jit), (1e30, jax.jit), (jnp.nan, lambda f: f)]
)
def test_skip_changes_nothing_but_a_counter(scope: Any, bad: float, wrap: Any) -> None:
    """1e30 is finite, but its square is not in float32."""
    options = {"weight_decay": 0.1, "scope": scope, "nonfinite": "skip"}
    optimizer = ada2ms(core.Linear(1.0, 0.0, 9), adaptivity=core.Linear(1.0, 0.0, 9), **options)
    good = [tree(i) for i in range(1, 6)]
    broken = {**tree(7), "vector": tree(7)["vector"].at[1].set(bad)}
    found, state = train(optimizer, tree(0), [*good[:2], broken, broken, *good[2:]], wrap)
    expected, clean = train(optimizer, tree(0), good, wrap)
    assert_equal(found, expected)
    assert_equal(state._replace(skipped=clean.skipped), clean)
    assert (int(clean.skipped), int(state.skipped)) == (0, 2)


def test_propagate_is_the_rule_unguarded() -> None:
    broken = {**tree(7), "vector": tree(7)["vector"].at[1].set(jnp.nan)}
    params, state = train(ada2ms(), tree(0), [broken])
    assert all(np.all(np.isnan(x)) for x in jax.tree.leaves(params))
    assert state.skipped == 0


# Arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": -1.0}, r"-1\.0 \(learning_rate must be a number in \[0, inf\) or a schedule\)"),
        ({"b1": 1.0}, r"1\.0 \(b1 must be a number in \[0, 1\)\)"),
        ({"b2": -0.1}, r"-0\.1 \(b2 must be"),
        ({"eps": float("nan")}, r"nan \(eps must be"),
        ({"weight_decay": -1.0}, r"-1\.0 \(weight_decay must be a number in \[0, inf\) or a schedule\)"),
        ({"adaptivity": 1.5}, r"1\.5 \(adaptivity must be a number in \[0, 1\] or a schedule\)"),
        ({"scope": "layer"}, r"'layer' \(scope must be one of"),
        ({"nonfinite": "raise"}, r"'raise' \(nonfinite must be one of"),
        ({"mu_dtype": "int32"}, r"'int32' \(mu_dtype must be"),
        ({"nu_dtype": "no such"}, r"'no such' \(nu_dtype must be"),
        ({"learning_rate": jnp.float32(-1)}, r"-1\., dtype=float32\) \(learning_rate must be"),
        ({"b2": jnp.bfloat16(0.999)}, r"1, dtype=bfloat16\) \(b2 must be"),
        ({"adaptivity": jnp.float32(1.5)}, r"1\.5, dtype=float32\) \(adaptivity must be"),
        ({"learning_rate": None}, r"None \(learning_rate must be"),
        ({"b1": "0.9"}, r"'0\.9' \(b1 must be a number in"),
        ({"b2": lambda count: 0.9}, r"\(b2 must be a number in \[0, 1\)\)"),
        ({"eps": None}, r"None \(eps must be"),
        ({"weight_decay": True}, r"True \(weight_decay must be"),
        ({"adaptivity": jnp.ones(3)}, r"dtype=float32\) \(adaptivity must be"),
        ({"axis_name": 3}, r"3 \(axis_name must be"),
        ({"axis_name": ("x", None)}, r"\('x', None\) \(axis_name must be"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    """What JAX traces is not known yet, and is taken as it is; but all else."""
    with pytest.raises((TypeError, ValueError), match=r"^Invalid .*" + message):
        ada2ms(**options)
    if next(iter(options)) not in ("learning_rate", "weight_decay"):
        with pytest.raises((TypeError, ValueError), match=message):
            scale_by_ada2ms(**options)


def test_the_alias_needs_parameters() -> None:
    with pytest.raises(ValueError, match="Invalid params: None"):
        ada2ms().update(tree(1), ada2ms().init(tree(0)))


@pytest.mark.parametrize(("made", "used"), [("model", "tensor"), ("tensor", "model")])
def test_a_state_of_the_other_scope_is_an_error(made: Any, used: Any) -> None:
    """And not one that broadcasts."""
    with pytest.raises(ValueError, match=rf"Invalid state: s of shape .* \(must be made with scope='{used}'\)"):
        ada2ms(scope=used).update(tree(1), ada2ms(scope=made).init(tree(0)), tree(0))


def test_defaults_are_those_of_every_backend() -> None:
    explicit = ada2ms(1e-3, 0.9, 0.999, 1e-8, weight_decay=1e-2, adaptivity=0.9, scope="model", nonfinite="propagate")
    gradients = [tree(i) for i in range(1, 4)]
    assert_equal(train(ada2ms(), tree(0), gradients), train(explicit, tree(0), gradients))


def test_examples_in_docstrings() -> None:
    results = doctest.testmod(optimizer_module)
    assert results.attempted > 8
    assert results.failed == 0
