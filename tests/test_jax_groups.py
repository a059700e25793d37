"""`groups` of the Optax transformations: leaves with hyperparameters of their own, and one global second moment.

The golden vectors with groups (test_trajectories.py) say what they compute; here is what is JAX' own.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax_support import EPSILON, assert_close, assert_equal, train
from jax_support import tree as larger_tree

from ada2ms import core
from ada2ms.core import NO_DECAY, Group
from ada2ms.jax import ada2ms, scale_by_ada2ms
from support import slow

SHAPES = {"matrix": (3, 4), "scale": (4,), "vector": (5,)}


def tree(seed: int, dtype: Any = np.float32) -> dict[str, Any]:
    return larger_tree(seed, dtype, SHAPES)


GRADIENTS = [tree(i) for i in range(1, 6)]
EVERYTHING = [
    Group("^matrix$", lr_scale=0.5, b1=0.8, b2=0.9, eps=1e-3, adaptivity=core.Linear(1.0, 0.0, 9)),
    Group("vec", weight_decay=0.0, adaptivity=1.0, b2=0.9),
]


@pytest.mark.parametrize("scope", ["model", *slow("tensor")])
def test_every_hyperparameter_follows_the_numpy_rule(scope: Any) -> None:
    """In float64, compiled, with scheduled rates, missing gradients and a skipped step; within 1e-12 of the updates."""
    with jax.enable_x64(True):
        initial = tree(0, np.float64)
        steps = [tree(i, np.float64) for i in range(1, 13)]
        steps[3]["vector"] = None
        steps[5]["scale"] = steps[5]["scale"].at[2].set(jnp.inf)
        own = core.Hyperparameters(lr=lambda k: 0.1 / (1 + k), weight_decay=0.1, adaptivity=0.3)
        given = [{"params": [np.array(initial["matrix"])], **vars(EVERYTHING[0].of(own))}]
        given += [{"params": [np.array(initial["scale"])], **vars(own)}]
        given += [{"params": [np.array(initial["vector"])], **vars(EVERYTHING[1].of(own))}]
        choices = {"scope": scope, "nonfinite": "skip", "max_norm": 3.0}
        numpy = core.Ada2MS(given, **choices)
        for g in steps:
            numpy.step([None if x is None else np.asarray(x) for x in g.values()])
        optimizer = ada2ms(lambda k: 0.1 / (1 + k), weight_decay=0.1, adaptivity=0.3, groups=EVERYTHING, **choices)
        params, state = train(optimizer, initial, steps)
        for group, x, y in zip(numpy.groups, initial.values(), params.values(), strict=True):
            np.testing.assert_allclose(np.asarray(y) - x, group.params[0] - np.asarray(x), rtol=1e-12, atol=1e-14)
        found = np.ravel(state.s)
        np.testing.assert_allclose(found, [g.global_exp_avg_sq[0] for g in numpy.groups], rtol=1e-12)
        assert state.s.shape == ((3, 1) if scope == "model" else (3,))
        assert (state.count, state.skipped) == (11, 1)


def test_decay_groups_are_the_mask_and_adamw() -> None:
    """One mean over all, so that groups that differ in decay alone change nothing but that; torch's habit."""
    params = tree(0)
    mask = jax.tree.map(lambda p: p.ndim > 1, params)
    options = {"weight_decay": 0.5, "adaptivity": 0.3}
    by_groups, state = train(ada2ms(0.1, groups=[NO_DECAY], **options), params, GRADIENTS)
    by_mask, masked = train(ada2ms(0.1, mask=mask, **options), params, GRADIENTS)
    assert_equal((by_groups, state), (by_mask, masked))
    options["adaptivity"] = 1.0
    ours, _ = train(ada2ms(0.1, groups=[NO_DECAY], **options), params, GRADIENTS)
    theirs, _ = train(optax.adamw(0.1, weight_decay=0.5, mask=mask), params, GRADIENTS)
    assert_close(ours, theirs, 1e-5, 1e-5)


def test_a_mask_and_groups() -> None:
    """A leaf decays where the mask has it, by the decay of its group, which may be a schedule nowhere else."""
    params = tree(0)
    groups = [Group("matrix", weight_decay=0.3), Group("vector", weight_decay=0.2)]
    mask = {"matrix": True, "scale": True, "vector": False}
    zeros = jax.tree.map(jnp.zeros_like, params)
    after, _ = train(ada2ms(0.1, weight_decay=0.1, groups=groups, mask=mask), params, [zeros])
    factors = {"matrix": 1 - 0.1 * 0.3, "scale": 1 - 0.1 * 0.1, "vector": 1.0}
    assert_close(after, {name: p * factors[name] for name, p in params.items()}, 2 * EPSILON)


def test_decay_of_a_group_alone_needs_the_parameters() -> None:
    params = tree(0)
    optimizer = ada2ms(weight_decay=0.0, groups=[Group("matrix", weight_decay=0.1)])
    with pytest.raises(ValueError, match="Invalid params: None"):
        optimizer.update(params, optimizer.init(params))
    without = ada2ms(groups=[NO_DECAY], weight_decay=0.0)
    without.update(params, without.init(params))


def test_a_factor_of_the_learning_rate() -> None:
    """Of a number, a schedule, and a traced one."""
    groups = [Group("matrix", lr_scale=0.1), Group("scale", lr_scale=0.0)]
    rate = optax.linear_schedule(0.1, 0.0, 9)
    for lr, make in ((0.1, ada2ms), (rate, ada2ms), (0.1, optax.inject_hyperparams(ada2ms))):
        optimizer = make(lr, weight_decay=0.0, adaptivity=0.3, groups=groups)
        plain = make(lr, weight_decay=0.0, adaptivity=0.3)
        found, _ = jax.jit(optimizer.update)(GRADIENTS[0], optimizer.init(tree(0)), tree(0))
        expected, _ = jax.jit(plain.update)(GRADIENTS[0], plain.init(tree(0)), tree(0))
        assert_close(found["matrix"], 0.1 * expected["matrix"], 4 * EPSILON)
        assert_equal(found["scale"], jnp.zeros(4))
        assert_equal(found["vector"], expected["vector"])


# Names


class Named(NamedTuple):
    value: Any
    inner: Any


def test_names_are_those_of_the_hand_off() -> None:
    """Paths as text; the first group that matches a name has it, and a group that has no leaf is an error."""
    params = {"layers": [{"w": jnp.ones((2, 2))}, {"w": jnp.ones((2, 2))}], "named": Named(jnp.ones(2), None)}
    groups = [Group(r"^layers/1/w$", lr_scale=0.0), Group("w", lr_scale=2.0), Group("named/value", lr_scale=3.0)]
    optimizer = ada2ms(1.0, weight_decay=0.0, groups=groups)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    expected, _ = ada2ms(1.0, weight_decay=0.0).update(params, ada2ms().init(params), params)
    assert_equal(updates["layers"][1]["w"], jnp.zeros((2, 2)))
    assert_close(updates["layers"][0]["w"], 2 * expected["layers"][0]["w"], EPSILON)
    assert_close(updates["named"].value, 3 * expected["named"].value, EPSILON)
    for match in ("bias", "^layers$"):
        with pytest.raises(ValueError, match=r"Invalid groups\[0\]: .*has no parameter.*'layers/0/w'"):
            ada2ms(groups=[Group(match)]).init(params)


def test_a_model_of_flax() -> None:
    """Its arrays are in boxes, which are no part of a name, in the parameters, the gradients and the state alike."""
    nnx = pytest.importorskip("flax.nnx")

    class Network(nnx.Module):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            self.hidden = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
            self.out = nnx.Linear(4, 2, rngs=nnx.Rngs(1))

    def trained(**options: Any) -> Any:
        model = Network()
        optimizer = nnx.Optimizer(model, ada2ms(0.1, weight_decay=0.5, **options), wrt=nnx.Param)
        gradients = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
        for _ in range(2):
            optimizer.update(model, gradients)
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    frozen = Group("^out/kernel$", lr_scale=0.0, b2=0.9)
    found, expected = trained(groups=[frozen, NO_DECAY]), trained()
    assert_equal(found["out"]["kernel"], nnx.to_pure_dict(nnx.state(Network(), nnx.Param))["out"]["kernel"])
    assert_equal(found["hidden"]["kernel"], expected["hidden"]["kernel"])
    assert np.all(found["hidden"]["bias"] != expected["hidden"]["bias"])


def test_of_a_masked_or_partitioned_tree_the_names_stay() -> None:
    params = tree(0)
    groups = [Group("matrix", lr_scale=0.1)]
    mask = {"matrix": True, "scale": True, "vector": False}
    found, _ = train(optax.masked(ada2ms(0.1, groups=groups), mask), params, GRADIENTS)
    labels = {"matrix": "a", "scale": "a", "vector": "b"}
    transforms = {"a": ada2ms(0.1, groups=groups), "b": optax.identity()}
    again, _ = train(optax.partition(transforms, labels), params, GRADIENTS)
    assert_equal(found, again)
    alone = {name: params[name] for name in ("matrix", "scale")}
    steps = [{name: g[name] for name in alone} for g in GRADIENTS]
    expected, _ = train(ada2ms(0.1, groups=groups), alone, steps)
    assert_equal({name: found[name] for name in alone}, expected)


# State


def test_one_b2_leaves_the_state_as_it_is() -> None:
    """Whether it is said or not; and without groups, nothing has another layout or another program."""
    params, plain = tree(0), ada2ms().init(tree(0))
    for groups in ([], None, [NO_DECAY], [Group("matrix", b2=0.999, b1=0.5), NO_DECAY]):
        assert_equal(ada2ms(groups=groups).init(params), plain)
    for groups in ([Group("matrix", b2=0.9)], [Group("", b2=0.9)]):
        assert ada2ms(groups=groups).init(params).s.shape == (3, 1)
    assert ada2ms(groups=[Group("matrix", b2=0.9)], scope="tensor").init(params).s.shape == (3,)
    programs = [str(jax.make_jaxpr(ada2ms(groups=groups).update)(params, plain, params)) for groups in (None, [])]
    assert programs[0] == programs[1]


@pytest.mark.parametrize("wrapped", ["inject_hyperparams", "MultiSteps", "scan"])
def test_a_b2_of_its_own_under_transformations(wrapped: str) -> None:
    """The layout of the state must not depend on what JAX traces, at init or in a step."""
    options = {"learning_rate": 0.1, "adaptivity": 0.3, "groups": EVERYTHING}
    expected, plain = train(ada2ms(**options), tree(0), GRADIENTS)
    if wrapped == "scan":
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *GRADIENTS)
        optimizer = ada2ms(**options)

        def step(carry: Any, g: Any) -> Any:
            updates, state = optimizer.update(g, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        (found, state), _ = jax.lax.scan(step, (tree(0), optimizer.init(tree(0))), stacked)
    elif wrapped == "MultiSteps":
        twice = [g for g in GRADIENTS for _ in range(2)]
        found, state = train(optax.MultiSteps(ada2ms(**options), 2), tree(0), twice)
    else:
        found, state = train(optax.inject_hyperparams(ada2ms)(b2=0.999, **options), tree(0), GRADIENTS)
    assert_close(found, expected, 16 * EPSILON, 16 * EPSILON)
    # A b2 that JAX traces is one of float32, in which 1 - 0.999 is off by 1.3e-5.
    assert_close(optax.tree.get(state, "s"), plain.s, 2e-5 if wrapped == "inject_hyperparams" else 16 * EPSILON)


def test_the_direction_alone() -> None:
    """Its groups have what is in a direction; a rate and a decay are for what stands behind it."""
    groups = [Group("matrix", b1=0.8, b2=0.9, eps=1e-3, adaptivity=1.0)]
    ours = scale_by_ada2ms(groups=groups)
    state = ours.init(tree(0))
    for g in GRADIENTS:
        found, state = jax.jit(ours.update)(g, state)
    theirs = optax.scale_by_adam(0.8, 0.9, 1e-3)
    other = theirs.init(tree(0)["matrix"])
    for g in GRADIENTS:
        expected, other = theirs.update(g["matrix"], other)
    assert_close(found["matrix"], expected, 1e-5)
    for group, name in ((Group("matrix", lr_scale=0.5), "lr_scale"), (NO_DECAY, "weight_decay")):
        with pytest.raises(ValueError, match=rf"Invalid groups\[0\]: .*\({name} must be left out"):
            scale_by_ada2ms(groups=[group])


def test_errors() -> None:
    with pytest.raises(TypeError, match=r"Invalid groups: 3 \(must be a sequence of"):
        ada2ms(groups=3)  # type: ignore[arg-type]
    params, groups = tree(0), [Group("matrix", b2=0.9)]
    for made, used in ((groups, None), (None, groups)):
        with pytest.raises(ValueError, match="Invalid state: s of shape"):
            ada2ms(groups=used).update(params, ada2ms(groups=made).init(params), params)
