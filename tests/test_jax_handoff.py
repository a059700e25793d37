"""The JAX end of the hand-off: groups, `max_norm`, and parameters of 16 bits that keep what their rounding loses.

Between frameworks: test_handoff_groups.py.
"""

import pickle
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax_support import EPSILON, assert_close, assert_equal, train
from jax_support import tree as larger_tree

from ada2ms import core
from ada2ms.core import NO_DECAY, Group, State, StateError
from ada2ms.core.state import Entry
from ada2ms.core.state import Group as StateGroup
from ada2ms.jax import CompensatedAda2MSState, ScaleByAda2MSState, ada2ms, arguments, export_state, import_state
from support import slow

SHAPES = {"matrix": (3, 4), "scale": (4,), "vector": (5,)}


def tree(seed: int, dtype: Any = np.float32) -> dict[str, Any]:
    return larger_tree(seed, dtype, SHAPES)


GRADIENTS = [tree(i) for i in range(1, 6)]
OPTIONS: dict[str, dict[str, Any]] = {
    "decay groups": {"groups": [NO_DECAY], "max_norm": 2.0},
    "of everything": {
        "groups": [
            Group("^matrix$", lr_scale=0.5, b1=0.8, b2=0.9, eps=1e-3, adaptivity=core.Linear(1.0, 0.0, 9)),
            Group("vec", weight_decay=0.0, adaptivity=1.0),
        ],
        "nonfinite": "skip",
    },
    "each its own": {"groups": [Group("matrix", b2=0.9), Group("vector", b2=0.5, b1=0.5)], "scope": "tensor"},
}


@pytest.mark.parametrize("made", OPTIONS)
def test_a_run_with_groups_goes_on(made: str, tmp_path: Path) -> None:
    """By a file and by `arguments`, which say all that made the optimizer; the next step is the one of a run in one
    piece, to what s loses as a Python float."""
    options = {"learning_rate": 0.1, "weight_decay": 0.1, "adaptivity": 0.3, **OPTIONS[made]}
    optimizer = ada2ms(**options)
    params, opt_state = train(optimizer, tree(0), GRADIENTS)
    export_state(params, opt_state, options=options).save(tmp_path / "state")
    state = State.load(tmp_path / "state")
    given = {name: p.shape for name, p in params.items()}
    assert {name: entry.exp_avg.shape for name, entry in state.parameters.items()} == given
    again = ada2ms(**arguments(state))
    new, restored, report = import_state(tree(9), again.init(tree(9)), state)
    assert_equal(new, params)
    assert_close(restored, opt_state, EPSILON)
    assert report.notes == []
    found, expected = again.update(tree(8), restored, new), optimizer.update(tree(8), opt_state, params)
    assert_close(found, expected, 8 * EPSILON, EPSILON)


def test_what_is_recorded_of_groups() -> None:
    groups = [Group("matrix", lr_scale=0.5, b2=0.9, adaptivity=lambda k: 0.5), NO_DECAY]
    options = {"learning_rate": 0.1, "groups": groups, "max_norm": 2.0, "adaptivity": 0.3, "b2": 0.99}
    params, opt_state = train(ada2ms(**options), tree(0), GRADIENTS)
    state = export_state(params, opt_state, options=options)
    assert (state.max_norm, state.compensated) == (2.0, False)
    assert [group.params for group in state.groups] == [["matrix"], ["scale", "vector"]]
    # A schedule of a framework's own is not plain data, and left out.
    assert state.groups[0].hyper == {"lr": 0.05, "lr_scale": 0.5, "b2": 0.9, "weight_decay": 0.01}
    assert state.groups[1].hyper == {"lr": 0.1, "b2": 0.99, "adaptivity": 0.3, "weight_decay": 0.0}
    assert [group.global_step for group in state.groups] == [5, 5]
    found = [group.global_exp_avg_sq for group in state.groups]
    np.testing.assert_array_equal(found, np.float64([opt_state.s[0, 0], opt_state.s[1, 0]]))
    with pytest.raises(StateError, match=r"group 0: .*of another group adaptivity"):
        arguments(state)


def test_a_state_with_a_b2_of_its_own_needs_no_options() -> None:
    """It says itself which leaves have which s; and each leaf takes that of its group in whatever comes."""
    groups = [Group("matrix", b2=0.9)]
    params, opt_state = train(ada2ms(0.1, groups=groups), tree(0), GRADIENTS)
    state = export_state(params, opt_state)
    assert [group.params for group in state.groups] == [["matrix"], ["scale", "vector"]]
    fresh = ada2ms(0.1, groups=groups).init(tree(9))
    _, restored, _ = import_state(tree(9), fresh, state)
    assert_equal(restored, opt_state)
    # One of AdamW starts with the mean of its second moments, in all
    adamw = train(optax.adamw(0.1), tree(0), GRADIENTS)
    _, restored, _ = import_state(tree(9), fresh, export_state(*adamw))
    nu = np.concatenate([np.ravel(x) for x in optax.tree.get(adamw[1], "nu").values()])
    np.testing.assert_allclose(restored.s, np.full((3, 1), np.mean(nu)), rtol=8 * EPSILON)
    # Where all have one b2, different numbers are an error, as before there were groups
    with pytest.raises(StateError, match="groups: 2 global second moments in the state"):
        import_state(tree(9), ada2ms(0.1).init(tree(9)), state)


def test_counts_that_differ_are_an_error() -> None:
    """A group that is added later in torch counts from then on; here there is one count for all."""
    entries = {name: Entry(np.zeros(shape, "f4"), np.zeros(shape, "f4"), 3) for name, shape in SHAPES.items()}
    groups = [StateGroup(["matrix"], {}, 0.5, 7), StateGroup(["scale", "vector"], {}, 0.25, 3)]
    fresh = ada2ms(groups=[Group("matrix", b2=0.9)]).init(tree(0))
    with pytest.raises(StateError, match=r"one count of updates here; the state's groups have \[3, 7\]"):
        import_state(tree(0), fresh, State(entries, groups), values=False)


def test_arguments_by_the_names_here() -> None:
    """`names` as `import_state` takes it; a function cannot be inverted."""
    names = {"matrix": "0.weight", "vector": "0.bias"}
    options = {"learning_rate": 0.1, "weight_decay": 0.1, "groups": [NO_DECAY]}
    params, opt_state = train(ada2ms(**options), tree(0), GRADIENTS)
    state = export_state(params, opt_state, options=options, names=names)
    assert state.groups[1].params == ["scale", "0.bias"]
    found = arguments(state, names)
    (group,) = found.pop("groups")  # the smaller one
    assert [name for name in SHAPES if group.matches(name, 1)] == ["matrix"]
    assert (group.weight_decay, found["weight_decay"]) == (0.1, 0.0)
    _, restored, _ = import_state(tree(9), ada2ms(**arguments(state, names)).init(tree(9)), state, names=names)
    assert_equal(restored, opt_state)
    with pytest.raises(StateError, match="names is a function"):
        arguments(state, lambda name: names.get(name, name))


# 16 bits


def narrow(x: Any, dtype: Any = jnp.bfloat16) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), x)


def run_in_16_bits(dtype: Any = jnp.bfloat16) -> Any:
    return train(ada2ms(1e-3, compensated=True), narrow(tree(0), dtype), [narrow(g, dtype) for g in GRADIENTS])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, *slow(jnp.float16)])
def test_a_compensation_travels(dtype: Any, tmp_path: Path) -> None:
    params, opt_state = run_in_16_bits(dtype)
    assert all(np.any(x) for x in opt_state.compensation.values())
    export_state(params, opt_state).save(tmp_path / "state")
    state = State.load(tmp_path / "state")
    assert state.compensated
    assert arguments(state) == {"scope": "model", "nonfinite": "propagate", "compensated": True}
    fresh = narrow(tree(9), dtype)
    for optimizer in (ada2ms(1e-3, compensated=True), optax.chain(optax.identity(), ada2ms(compensated=True))):
        new, restored, _ = import_state(fresh, optimizer.init(fresh), state)
        assert_equal(new, params)
        node = restored[1] if type(restored) is tuple else restored
        assert_equal(node, opt_state)
    # Into a wider parameter goes the sum
    wide, restored, _ = import_state(tree(9), ada2ms(compensated=True).init(tree(9)), state)
    assert restored.compensation == dict.fromkeys(SHAPES)
    for name, x in wide.items():
        assert x.dtype == jnp.float32
        np.testing.assert_array_equal(x, params[name].astype("f4") + opt_state.compensation[name].astype("f4"))
    # And into one that keeps nothing, what is asked to be rounded
    with pytest.raises(StateError, match=r"type: param of 'matrix' is .*16"):
        import_state(fresh, ada2ms().init(fresh), state)
    rounded, restored, _ = import_state(fresh, ada2ms().init(fresh), state, cast=True)
    assert type(restored) is ScaleByAda2MSState
    assert_equal(rounded, params)


def test_a_plain_state_into_a_compensated_optimizer() -> None:
    """The nearest number, and what is left of the value in float32; a run in float32 goes on in 16 bits."""
    params, opt_state = train(ada2ms(1e-3), tree(0), GRADIENTS)
    fresh = narrow(tree(9))
    optimizer = ada2ms(1e-3, compensated=True)
    state = export_state(params, opt_state)
    with pytest.raises(StateError, match="not even with its compensation"):  # 16 bits of 24
        import_state(fresh, optimizer.init(fresh), state)
    new, restored, _ = import_state(fresh, optimizer.init(fresh), state, cast=True)
    assert type(restored) is CompensatedAda2MSState
    for name, x in params.items():
        assert_equal(new[name], x.astype(jnp.bfloat16))
        rest = x - new[name].astype(jnp.float32)
        assert_equal(restored.compensation[name], rest.astype(jnp.bfloat16))
    # Of 16 bits that kept nothing, nothing is left
    plain = train(ada2ms(1e-3), narrow(tree(0)), [narrow(g) for g in GRADIENTS])
    new, restored, _ = import_state(fresh, optimizer.init(fresh), export_state(*plain))
    assert_equal(new, plain[0])
    assert_equal(restored.compensation, jax.tree.map(jnp.zeros_like, fresh))


# Pickles


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_a_pickle_from_before_there_was_a_compensation(scope: Any) -> None:
    """The file holds what the version before made of the next step, too."""
    file = Path(__file__).with_name("data") / "jax-states-before-compensation.pickle"
    before = pickle.loads(file.read_bytes())[scope]
    assert type(before["state"]) is ScaleByAda2MSState
    optimizer = ada2ms(0.1, adaptivity=0.5, scope=scope, nonfinite="skip")  # 0.5 was its default
    found = jax.jit(optimizer.update)(before["gradients"], before["state"], before["params"])
    assert_close(found, jax.tree.map(jnp.asarray, (before["updates"], before["after"])), 4 * EPSILON, EPSILON)


def test_checkpoints_of_flax_from_before_there_was_a_compensation() -> None:
    """Its msgpack counts and names the fields of a state."""
    serialization = pytest.importorskip("flax.serialization")
    params, state = train(ada2ms(0.1), tree(0), GRADIENTS)
    as_before = {name: getattr(state, name) for name in ("count", "mu", "nu", "s", "skipped", "steps")}
    content = serialization.msgpack_serialize(jax.device_get(as_before))
    assert_equal(serialization.from_bytes(ada2ms().init(params), content), jax.device_get(state))
    params, state = run_in_16_bits()
    fresh = ada2ms(compensated=True).init(params)
    assert_equal(serialization.from_bytes(fresh, serialization.to_bytes(state)), state)
