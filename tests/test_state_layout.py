"""Arrays of a framework that are several of the state's: cut and joined exactly, or refused with the reason."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from state_support import entry, fit, target

from ada2ms.core import State, StateError
from ada2ms.core.state import Entry, Group, Target, arguments, to_portable

Array = Any
PARTS = ("query", "key", "value")
NAMES: dict[str, Any] = {"packed": PARTS}


def heads(array: Array) -> list[Array]:
    """(inputs, 3 * 2 heads * 2 features) as three of (inputs, heads, features)."""
    return [x.reshape(-1, 2, 2) for x in np.split(array, 3, axis=1)]


AXES: dict[str, Any] = {"packed": heads}


def state(entries: dict[str, Entry], **options: Any) -> State:
    own = any(x.global_exp_avg_sq is not None for x in entries.values())
    group = Group(list(entries), {}, None if own else 0.5, 3)
    return State(entries, [group], scope="tensor" if own else "model", **options)


def assert_equal(left: Entry, right: Entry) -> None:
    assert (left.step, left.global_exp_avg_sq) == (right.step, right.global_exp_avg_sq)
    for slot, array in left.slots().items():
        assert np.array_equal(array, right.slots()[slot])
        assert array.dtype == right.slots()[slot].dtype


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64"])
def test_an_array_is_cut_and_joined(dtype: str) -> None:
    packed = entry((5, 12), dtype)
    parts, renamed = to_portable({"packed": packed, "bias": entry((2,))}, NAMES, AXES)
    assert renamed == {"packed": PARTS, "bias": "bias"}
    for i, name in enumerate(PARTS):
        for slot, array in packed.slots().items():
            assert np.array_equal(parts[name].slots()[slot], array[:, 4 * i : 4 * i + 4].reshape(5, 2, 2))
        assert parts[name].step == packed.step
    found = fit(state(parts), {"bias": target((2,)), "packed": target((5, 12), dtype)}, names=NAMES, axes=AXES)
    assert_equal(found.entries["packed"], packed)
    assert "packed  <-  query + key + value  (5, 12)" in str(found.report)


def test_one_array_may_have_another_shape() -> None:
    axes: dict[str, Any] = {"a": lambda x: [x.reshape(2, 6).T]}
    parts, _ = to_portable({"a": entry((3, 4))}, {"a": "b"}, axes)
    assert parts["b"].exp_avg.shape == (6, 2)
    found = fit(state(parts), {"a": target((3, 4))}, names={"a": "b"}, axes=axes)
    assert_equal(found.entries["a"], entry((3, 4)))


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (None, r"'packed': consists of \['query', 'key', 'value'\] in the state: its axes must be a function"),
        ((1, 0), "'packed': consists of"),
        (lambda x: np.split(x, 5), r"'packed': the function cannot cut an array of \(5, 12\)|5 arrays"),
        (lambda x: [y.reshape(-1, 7) for y in np.split(x, 3, 1)], r"'packed': the function cannot cut .*\(5, 12\)"),
        (lambda x: np.split(x, 2, axis=1), "into 2 arrays .must be 3"),
        (lambda x: [x[:, :4], x[:, :4], x[:, 8:]], "does not give every entry once"),
        (lambda x: [x[:, :4], x[:, 4:8], x[:, 8:11]], "does not give every entry once"),
        (lambda x: [y * 2 for y in np.split(x, 3, axis=1)], "does not give every entry once"),
    ],
)
def test_what_is_no_layout_is_refused(axes: Any, message: str) -> None:
    given = None if axes is None else {"packed": axes}
    for move in (
        lambda: to_portable({"packed": entry((5, 12))}, NAMES, given),
        lambda: fit(
            state({name: entry((5, 2, 2)) for name in PARTS}), {"packed": target((5, 12))}, names=NAMES, axes=given
        ),
    ):
        with pytest.raises(StateError, match=message) as caught:
            move()
        assert len(caught.value.problems) == 1


def misfit(change: Callable[[dict[str, Entry]], Any]) -> str:
    entries = {name: entry((5, 2, 2), seed=i) for i, name in enumerate(PARTS)}
    change(entries)
    with pytest.raises(StateError) as caught:
        fit(state(entries), {"packed": target((5, 12))}, names=NAMES, axes=AXES)
    assert len(caught.value.problems) == 1
    return caught.value.problems[0]


def test_parts_that_do_not_fit_are_named() -> None:
    called = "'packed' (in the state 'query + key + value')"
    assert misfit(lambda x: x.pop("key")) == f"missing: {called}, of which the state has no ['key']"
    other_heads = misfit(lambda x: x.update(key=entry((5, 4, 1))))
    assert other_heads == f"shape: {called} has (5, 12), of which (5, 2, 2) for 'key'; in the state (5, 4, 1)"
    counts = misfit(lambda x: setattr(x["value"], "step", 9))
    assert counts.startswith(f"counts: {called} consists of parts with different counts of updates: [3, 3, 9]")
    assert "only some of its parts have a value" in misfit(lambda x: setattr(x["query"], "param", None))


def test_compensations_are_joined_with_their_values() -> None:
    parts = {name: entry((5, 2, 2), seed=i) for i, name in enumerate(PARTS)}
    for i, x in enumerate(parts.values()):
        x.param = x.param.astype(np.float16).astype(np.float32)
        x.compensation = np.full((5, 2, 2), 2.0**-20 * (i + 1), np.float32)
    dtypes = {"param": "float16", "compensation": "float16", "exp_avg": "float32", "exp_avg_sq": "float32"}
    whole = State(parts, [Group(list(parts), {}, 0.5, 3)], compensated=True)
    found = fit(whole, {"packed": Target((5, 12), dtypes)}, names=NAMES, axes=AXES).entries["packed"]
    assert np.array_equal(found.compensation[0], np.repeat([2.0**-20, 2.0**-19, 3 * 2.0**-20], 4))
    back, _ = to_portable({"packed": found}, NAMES, AXES)
    for name in PARTS:
        assert_equal(back[name], parts[name])
    parts["key"].compensation = None
    with pytest.raises(StateError, match="only some of its parts have a value, or a compensation"):
        fit(whole, {"packed": target((5, 12))}, names=NAMES, axes=AXES)


def test_arguments_name_the_parameter_that_has_the_parts() -> None:
    parts = {name: entry((5, 2, 2), seed=i) for i, name in enumerate((*PARTS, "a", "b", "c", "d"))}
    groups = [
        Group(list(PARTS), {"weight_decay": 0.0}, 0.5, 3),
        Group(["a", "b", "c", "d"], {"weight_decay": 0.1}, 0.5, 3),
    ]
    found = arguments(State(parts, groups), "torch", NAMES)
    assert [group.match for group in found["groups"]] == [r"\A(?:packed)\Z"]


def test_parts_in_groups_that_differ_are_refused() -> None:
    parts = {name: entry((5, 2, 2), seed=i) for i, name in enumerate(PARTS)}
    groups = [Group(["query"], {"lr": 0.1}, 0.5, 3), Group(["key", "value"], {"lr": 0.2}, 0.5, 3)]
    targets = {"packed": target((5, 12))}
    with pytest.raises(StateError, match=r"groups: 'packed' .* consists of parts whose groups differ"):
        fit(State(parts, groups), targets, names=NAMES, axes=AXES)
    groups[0].hyper["lr"] = 0.2
    assert fit(State(parts, groups), targets, names=NAMES, axes=AXES).groups == [(0.5, 3)]


def test_a_tensor_with_a_global_second_moment_of_its_own_stays_one() -> None:
    """Whatever the order is in which its parts are packed; but to have them one by one would be another optimizer."""
    packed = entry((5, 12), global_exp_avg_sq=0.25)
    parts, renamed = to_portable({"packed": packed}, NAMES, AXES)
    assert list(parts) == [renamed["packed"]] == ["key+query+value"]
    assert parts["key+query+value"].exp_avg.shape == (3, 5, 2, 2)
    found = fit(state(parts), {"packed": target((5, 12))}, names=NAMES, axes=AXES, scope="tensor")
    assert_equal(found.entries["packed"], packed)

    other: dict[str, Any] = {
        "names": {"w": PARTS[::-1]},
        "axes": {"w": lambda x: [y.T.reshape(-1, 2, 2) for y in np.split(x, 3)]},
    }
    there = fit(state(parts), {"w": target((12, 5))}, scope="tensor", **other).entries
    assert np.array_equal(there["w"].exp_avg, np.concatenate(np.split(packed.exp_avg.T, 3)[::-1]))
    back, _ = to_portable(there, **other)
    assert_equal(back["key+query+value"], parts["key+query+value"])

    apart = {name: target((5, 2, 2)) for name in PARTS}
    with pytest.raises(
        StateError, match=r"scope: 'query' is but a part of the tensor 'key\+query\+value', and with scope"
    ):
        fit(state(parts), apart, scope="tensor")
    own = {name: entry((5, 2, 2), global_exp_avg_sq=0.25) for name in PARTS}
    with pytest.raises(
        StateError, match=r"scope: 'packed' .* consists of several tensors, and with scope='tensor' each"
    ):
        fit(state(own), {"packed": target((5, 12))}, names=NAMES, axes=AXES, scope="tensor")
    with pytest.raises(StateError, match="different shapes, and with scope='tensor' are one tensor"):
        to_portable({"a": entry((4,), global_exp_avg_sq=0.1)}, {"a": ("b", "c")}, {"a": lambda x: [x[:1], x[1:]]})


def test_a_warm_start_takes_the_mean_of_what_is_one_tensor_here() -> None:
    """A state of AdamW has no global second moment: it starts from v, as it is when the parts are joined."""
    parts = {name: replace(entry((5, 2, 2), seed=i), step=4) for i, name in enumerate(PARTS)}
    adam = State(parts, [Group(list(parts))])
    found = fit(adam, {"packed": target((5, 12))}, names=NAMES, axes=AXES, scope="tensor")
    v = np.stack([x.exp_avg_sq for x in parts.values()]).astype(np.float64)
    assert found.entries["packed"].global_exp_avg_sq == pytest.approx(v.mean(), rel=1e-15)


def test_layers_explain_names_that_do_not_match() -> None:
    two = {f"0.lstm.i.{name}": entry((4,)) for name in ("input_bias", "recurrent_bias")}
    with pytest.raises(
        StateError, match=r"biases: of '0.lstm.i.bias' two in the state, one here; where two that .*freeze"
    ):
        fit(state(two), {"0.lstm.i.bias": target((4,))})
    with pytest.raises(StateError, match=r"biases: of '0.lstm.i.bias' one in the state, two here"):
        fit(state({"0.lstm.i.bias": entry((4,))}), {name: target((4,)) for name in two})
    with pytest.raises(StateError, match="layers: the first that differs is 1: 'gru' in the state, 'lstm' here"):
        fit(
            state({"0.norm.scale": entry((4,)), "1.gru.r.kernel": entry((4, 4)), "2.norm.scale": entry((4,))}),
            {"0.norm.scale": target((4,)), "1.lstm.i.kernel": target((4, 4)), "2.dense.bias": target((4,))},
        )
