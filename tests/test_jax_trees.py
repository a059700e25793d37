"""Parameters, gradients and states as other tools make them: beside what optax.adamw does with them."""

import pickle
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax_support import EPSILON, assert_close, assert_equal, train, tree

from ada2ms.core.state import StateError
from ada2ms.jax import ScaleByAda2MSState, ada2ms, export_state, import_state, scale_by_ada2ms
from support import slow

# Optax' own bias correction is off by 1e-5 in float32.
AS_ADAMW = {"rtol": 1e-5, "atol": 1e-5}


# Leaves that are no arrays and have no gradient

STRANGE = {
    "function": jax.nn.relu,
    "string": "relu",
    "key": jax.random.key(0),
    "dtype": jnp.float32,
    "object": object(),
    "integers": np.arange(3),
    "tree": {"a": [1, "b"]},
}


def wide(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.ndim > 1, tree)


MASKS = {"everywhere": None, "function": wide, "tree": {**wide(tree(0)), "leaf": False}, "prefix": True}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("leaf", STRANGE)
def test_leaves_without_a_gradient_may_be_anything(leaf: str, mask: str) -> None:
    """As where a model of Equinox is given whole, with its activation functions, and `init` what trains of it.

    With a function for a mask, optax.adamw takes the part that trains alone.
    """
    options = {"weight_decay": 0.1, "mask": MASKS[mask]}
    params = {True: {**tree(0), "leaf": STRANGE[leaf]}, False: {**tree(0), "leaf": None}}
    ours, theirs = ada2ms(0.1, adaptivity=1.0, **options), optax.adamw(0.1, **options)
    state, adamw = ours.init(params[False]), theirs.init(params[False])
    for i in (1, 2):
        gradients = {**tree(i), "leaf": None}
        found, state = ours.update(gradients, state, params[True])
        expected, adamw = theirs.update(gradients, adamw, params[mask != "function"])
        assert_close(found, expected, **AS_ADAMW)


@pytest.mark.parametrize("leaf", STRANGE)
def test_without_decay_they_may_be_anything_too(leaf: str) -> None:
    params, gradients = {**tree(0), "leaf": STRANGE[leaf]}, {**tree(1), "leaf": None}
    for make in (ada2ms, lambda rate, weight_decay: scale_by_ada2ms()):
        optimizer = make(0.1, weight_decay=0.0)
        updates, _ = optimizer.update(gradients, optimizer.init({**tree(0), "leaf": None}), params)
        assert updates.pop("leaf") is None
        assert_equal(updates, optimizer.update(tree(1), optimizer.init(tree(0)), tree(0))[0])


def test_a_gradient_without_moments_is_an_error() -> None:
    optimizer = ada2ms()
    with pytest.raises(ValueError, match=r"Invalid updates: a gradient for a leaf that was None in init"):
        optimizer.update(tree(1), optimizer.init({**tree(0), "matrix": None}), tree(0))


# Masks


@pytest.mark.parametrize(
    "decays", [lambda x: x.dtype == jnp.bfloat16, lambda x: x.dtype != jnp.bfloat16, lambda x: x.ndim]
)
def test_a_mask_is_given_the_parameters_as_they_are(decays: Any) -> None:
    params = {"w": jnp.ones((2, 2), jnp.bfloat16), "norm": jnp.ones(3), "scale": jnp.ones([], jnp.float16)}
    seen = []

    def mask(tree: Any) -> Any:
        seen.append(tree)
        return jax.tree.map(lambda x: bool(decays(x)), tree)

    found, _ = train(ada2ms(0.1, adaptivity=1.0, weight_decay=0.5, mask=mask), params, [params], lambda f: f)
    assert all(x is params[name] for given in seen for name, x in given.items())
    expected, _ = train(optax.adamw(0.1, weight_decay=0.5, mask=mask), params, [params])
    for name, p in found.items():
        np.testing.assert_allclose(
            p.astype(float), expected[name].astype(float), rtol=2 * jnp.finfo(p.dtype).eps + 1e-5
        )
    plain, _ = train(ada2ms(0.1, adaptivity=1.0, weight_decay=0.0), params, [params])
    assert {n for n in params if not np.array_equal(plain[n], found[n])} == {n for n in params if decays(params[n])}


def test_a_mask_is_given_none_for_what_has_no_moments() -> None:
    """As that of optax.adamw is: `leaf.ndim > 1` goes for all leaves of a model that is given whole."""
    params, trained, gradients = ({"w": jnp.ones(2), "kind": kind} for kind in ("norm", None, None))

    def mask(tree: Any) -> Any:
        return {"w": tree["kind"] is None, "kind": False}

    ours, theirs = (make(0.1, weight_decay=1.0, mask=mask) for make in (ada2ms, optax.adamw))
    found, _ = ours.update(gradients, ours.init(trained), params)
    assert_close(found, theirs.update(gradients, theirs.init(trained), params)[0], **AS_ADAMW)
    np.testing.assert_allclose(found["w"], -0.2, rtol=1e-5)


def test_a_key_is_no_parameter() -> None:
    with pytest.raises(TypeError, match=r"Invalid params: \['key'\] is a PRNG key \(must be None in init\)"):
        ada2ms().init({"w": jnp.ones(2), "key": jax.random.key(0)})


# What update is given


@pytest.mark.parametrize("weight_decay", [0, 0.0, np.float32(0)])
def test_without_decay_no_parameters_are_needed(weight_decay: Any) -> None:
    """As in loops that were written for optax.adam, such as those of dynamax."""

    def fit(optimizer: Any, params: Any) -> Any:
        def step(carry: Any, batch: Any) -> Any:
            params, state = carry
            loss, gradients = jax.value_and_grad(lambda p: jnp.mean((batch @ p["w"] + p["b"] - 1) ** 2))(params)
            updates, state = optimizer.update(gradients, state)
            return (optax.apply_updates(params, updates), state), loss

        batches = jnp.asarray(np.random.default_rng(0).normal(size=(20, 8, 3)), jnp.float32)
        return jax.lax.scan(step, (params, optimizer.init(params)), batches)

    params = {"w": jnp.ones(3), "b": jnp.zeros([])}
    (found, _), losses = fit(ada2ms(0.05, adaptivity=1.0, weight_decay=weight_decay), params)
    (expected, _), others = fit(optax.adam(0.05), params)
    assert_close((found, losses), (expected, others), 1e-4, 1e-5)
    with pytest.raises(ValueError, match="Invalid params: None"):
        ada2ms(weight_decay=lambda k: 0.0).update(params, ada2ms().init(params))


@pytest.mark.parametrize("field", [name for name in ScaleByAda2MSState._fields if name not in ("mu", "nu")])
@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_numbers_of_another_shape_are_an_error(scope: Any, field: str) -> None:
    """And not broadcast; as where fields of a state are put back in another order."""
    optimizer = ada2ms(scope=scope)
    state = optimizer.init(tree(0))
    wrong = jnp.zeros([2, *getattr(state, field).shape], getattr(state, field).dtype)
    with pytest.raises(ValueError, match=rf"Invalid state: {field} of shape \(2,"):
        optimizer.update(tree(1), state._replace(**{field: wrong}), tree(0))


@pytest.mark.parametrize("field", ["mu", "nu"])
def test_moments_of_another_shape_are_an_error(field: str) -> None:
    optimizer = ada2ms()
    state = optimizer.init(tree(0))
    wrong = state._replace(**{field: {**getattr(state, field), "vector": jnp.zeros(1)}})
    with pytest.raises(ValueError, match=rf"Invalid state: {field}\['vector'\] of shape \(1,\) \(must be \(5,\)"):
        optimizer.update(tree(1), wrong, tree(0))


@pytest.mark.parametrize("made", [optax.adamw(1e-3), optax.chain(ada2ms())])
def test_a_state_of_another_optimizer_is_an_error(made: Any) -> None:
    with pytest.raises(TypeError, match=r"Invalid state: tuple \(must be the ScaleByAda2MSState of .*optax\.chain"):
        ada2ms().update(tree(1), made.init(tree(0)), tree(0))


# States that come back from files


@pytest.mark.parametrize("x64", [False, *slow(True)])
@pytest.mark.parametrize("options", [{}, {"scope": "tensor"}, {"nonfinite": "skip", "mu_dtype": "bfloat16"}])
def test_numbers_of_a_state_may_be_those_of_python(options: dict[str, Any], x64: bool) -> None:
    """As JSON and msgpack give them back, moments of a scalar parameter among them."""
    with jax.enable_x64(x64):
        dtype = np.float64 if x64 else np.float32
        optimizer = ada2ms(0.1, adaptivity=0.3, **options)
        params, state = train(optimizer, tree(0, dtype), [tree(1, dtype), tree(2, dtype)])
        as_python = jax.tree.map(lambda x: x.item() if x.ndim == 0 else x, state)
        as_numpy = jax.tree.map(np.asarray, state)
        assert any(isinstance(x, int) for x in jax.tree.leaves(as_python))
        expected = optimizer.update(tree(3, dtype), state, params)
        for other in (as_python, as_numpy):
            found = optimizer.update(tree(3, dtype), other, params)
            assert_equal(found, expected)
            assert [jax.typeof(x) for x in jax.tree.leaves(found)] == [jax.typeof(x) for x in jax.tree.leaves(expected)]


def test_fields_are_in_the_order_in_which_dictionaries_give_them_back() -> None:
    assert list(ScaleByAda2MSState._fields) == sorted(ScaleByAda2MSState._fields)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), ada2ms(0.1, nonfinite="skip"))
    _, state = train(optimizer, tree(0), [tree(1), tree(2)])

    def as_dictionaries(x: Any) -> Any:  # as orbax restores without a target
        if isinstance(x, tuple):
            names = x._fields if hasattr(x, "_fields") else map(str, range(len(x)))
            return {name: as_dictionaries(y) for name, y in zip(names, x, strict=True)}
        return x

    restored = jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(as_dictionaries(state)))
    assert_equal(restored, state)


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_a_pickle_from_before_fields_were_in_order(scope: Any) -> None:
    """The file holds what the version before made of the next step, too. (NumPy arrays, as after `jax.device_get`.)"""
    file = Path(__file__).with_name("data") / "jax-states-before-order.pickle"
    before = pickle.loads(file.read_bytes())[scope]
    assert isinstance(before["state"], ScaleByAda2MSState)
    assert (before["state"].skipped, list(before["state"].steps)) == (1, [3, 3])
    optimizer = ada2ms(0.1, adaptivity=0.5, scope=scope, nonfinite="skip")  # 0.5 was its default
    found = jax.jit(optimizer.update)(before["gradients"], before["state"], before["params"])
    assert_close(found, jax.tree.map(jnp.asarray, (before["updates"], before["after"])), 4 * EPSILON, EPSILON)


def test_a_pickle_names_no_file_of_the_package() -> None:
    state = ada2ms().init(tree(0))
    content = pickle.dumps(state)
    assert b"ada2ms.jax" in content
    assert b"ada2ms.jax." not in content
    assert_equal(pickle.loads(content), state)


# Types of parameters


@pytest.mark.parametrize("dtype", ["float8_e5m2", *slow("float8_e4m3fn", "float8_e4m3b11fnuz")])
def test_parameters_of_8_bits(dtype: str) -> None:
    """To these no other type is promoted by itself. Optax' Adam has its moments in 8 bits, which are too few."""
    params = {"w": jnp.ones(4, dtype), "v": jnp.ones(3)}
    optimizer = ada2ms(0.25, adaptivity=1.0)
    updates, state = jax.jit(optimizer.update)(params, optimizer.init(params), params)
    theirs = optax.adamw(0.25)
    expected, _ = theirs.update(params, theirs.init(params), params)
    for name, p in params.items():
        assert updates[name].dtype == p.dtype
        ulp = float(jnp.finfo(p.dtype).eps)
        np.testing.assert_allclose(updates[name].astype(float), expected[name].astype(float), rtol=max(ulp, 0.01))
        assert state.mu[name].dtype == state.nu[name].dtype == jnp.float32
    gradients = {"w": jnp.ones(4), "v": jnp.ones(3, dtype)}
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    assert updates["w"].dtype == updates["v"].dtype == jnp.float32


@pytest.mark.parametrize("rate", [optax.linear_schedule(0.1, 0.0, 9), *slow(0.1)])
def test_inject_hyperparams_over_complex_leaves(rate: Any) -> None:
    """It makes hyperparameters complex there."""
    params = {"w": jnp.ones(2, jnp.complex64) * (1 - 2j), "v": jnp.ones(3)}
    options = {"learning_rate": rate, "weight_decay": 0.1}
    found, _ = train(optax.inject_hyperparams(ada2ms)(adaptivity=1.0, **options), params, [params] * 2)
    assert_close(found, train(ada2ms(adaptivity=1.0, **options), params, [params] * 2)[0], 1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Optax' own: it casts complex moments to real ones
        expected, _ = train(optax.inject_hyperparams(optax.adamw)(**options), params, [params] * 2)
    assert_close(found["v"], expected["v"], **AS_ADAMW)  # its complex leaves have one second moment for both parts
    with pytest.raises(TypeError, match=r"Invalid learning rate: .*1\.\+1\.j"):
        ada2ms(jnp.complex64(1 + 1j))


@pytest.mark.parametrize("options", [{"scope": "tensor", "adaptivity": 0.3}, *slow({}, {"nonfinite": "skip"})])
def test_export_with_symbolic_shapes(options: dict[str, Any]) -> None:
    optimizer = ada2ms(0.1, **options)
    rows, columns = jax.export.symbolic_shape("rows, columns")
    abstract = {
        "matrix": jax.ShapeDtypeStruct((rows, columns), jnp.float32),
        "vector": jax.ShapeDtypeStruct((columns,), jnp.float32),
    }
    state = jax.eval_shape(optimizer.init, abstract)
    exported = jax.export.export(jax.jit(optimizer.update))(abstract, state, abstract)
    for shape in ((3, 4), (1, 5)):
        params, gradients = (tree(i, shapes={"matrix": shape, "vector": shape[1:]}) for i in range(2))
        found = exported.call(gradients, optimizer.init(params), params)
        expected = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
        assert_close(found, expected, 8 * EPSILON, EPSILON)


# Names


class Named(NamedTuple):
    """With fields that are called as attributes of containers are."""

    value: Any
    count: Any
    raw_value: Any


def test_fields_called_as_attributes_of_containers_keep_their_names() -> None:
    params = {"layer": tree(0), "named": Named(jnp.ones(1), jnp.ones(2), jnp.ones(3))}
    state = export_state(params, ada2ms().init(params))
    assert [name for name in state.parameters if "named" in name] == ["named/value", "named/count", "named/raw_value"]
    new, _, _ = import_state(jax.tree.map(jnp.zeros_like, params), ada2ms().init(params), state)
    assert_equal(new, params)


SAME = {
    "a key with a slash": {"a/b": jnp.ones(2), "a": {"b": jnp.zeros(2)}},
    "keys of two types": OrderedDict([(1, jnp.ones(2)), ("1", jnp.zeros(2))]),
    "an index and a key": {"a": [jnp.ones(2)], "a/0": jnp.zeros(2)},
}


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("params", SAME.values(), ids=SAME)
def test_two_leaves_of_one_name_are_an_error(params: Any, scope: Any) -> None:
    opt_state = ada2ms(scope=scope).init(params)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    one = {"a": jnp.ones(2)}
    state = export_state(one, ada2ms(scope=scope).init(one))
    for transfer in (lambda: export_state(params, opt_state), lambda: import_state(params, opt_state, state)):
        with pytest.raises(StateError, match="Several leaves have one name") as caught:
            transfer()
        assert all(path in str(caught.value) for path in paths)


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("kind", ["NumPy", "Python", "mixed"])
def test_transfer_of_trees_of_other_arrays(kind: str, scope: Any) -> None:
    """Pickled checkpoints have NumPy arrays; a scalar may be a Python number."""
    optimizer = ada2ms(0.1, adaptivity=0.3, scope=scope)
    params, opt_state = train(optimizer, tree(0), [tree(1), tree(2)])

    def made(x: Any) -> Any:
        if kind == "Python" or (kind == "mixed" and x.dtype != jnp.float32):
            return x.item() if x.ndim == 0 else x
        return np.asarray(x)

    state = export_state(params, opt_state)
    others = jax.tree.map(made, (params, opt_state))
    again = export_state(*others)
    fresh = jax.tree.map(made, (tree(5), optimizer.init(tree(5))))
    new_params, new_state, report = import_state(*fresh, again)
    assert len(report.rows) == 4
    assert [type(x) for x in jax.tree.leaves((new_params, new_state))] == [type(x) for x in jax.tree.leaves(fresh)]
    assert_equal(
        jax.tree.map(jnp.asarray, again.parameters["matrix"].exp_avg), jnp.asarray(state.parameters["matrix"].exp_avg)
    )
    for x, y in zip(jax.tree.leaves((new_params, new_state)), jax.tree.leaves((params, opt_state)), strict=True):
        np.testing.assert_array_equal(x, y)
