"""Groups by name: which parameters are in them, and with which hyperparameters."""

import json
import pickle
from typing import Any

import numpy as np
import pytest

from ada2ms import core
from ada2ms.core import NO_DECAY, Group, Hyperparameters, golden
from ada2ms.core.groups import assign, check_groups, exactly
from support import factors, hyperparameters, named_groups

NAMES = ["embed.weight", "fc.weight", "fc.bias", "norm.scale", "temperature"]
NDIMS = [2, 2, 1, 1, 0]


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([], [None] * 5),
        ([NO_DECAY], [None, None, 0, 0, 0]),
        ([Group("embed"), NO_DECAY], [0, None, 1, 1, 1]),
        ([NO_DECAY, Group("fc")], [None, 1, 0, 0, 0]),  # the first match wins
        ([Group("fc"), Group("fc.bias|scale")], [None, 0, 0, 1, None]),
        ([Group("weight$", max_ndim=2), Group("^(norm|temp)", max_ndim=0)], [0, 0, None, None, 1]),
        ([Group("")], [0] * 5),
        ([Group(""), NO_DECAY], [0] * 5),
        ([Group("^fc\\.bias$"), Group("(?i)EMBED")], [1, None, 0, None, None]),
    ],
)
def test_the_first_match_wins(groups: list[Group], expected: list[int | None]) -> None:
    assert list(assign(groups, NAMES, NDIMS)) == expected


def test_a_group_without_parameters_is_an_error() -> None:
    """But for one that matches every name, and where there are no parameters."""
    with pytest.raises(
        ValueError,
        match=r"Invalid groups\[1\]: Group\('bais', lr_scale=2.0\) has no .*none of 'embed.weight', 'fc.weight'",
    ):
        assign([NO_DECAY, Group("bais", lr_scale=2)], NAMES, NDIMS)
    with pytest.raises(ValueError, match=r"Invalid groups\[1\]: .*groups before it have all that it matches"):
        assign([Group("fc"), Group("fc.bias")], NAMES, NDIMS)
    with pytest.raises(ValueError, match=r"it matches none of 'a0', .*'a7' \.\.\.\)"):
        assign([Group("b")], [f"a{i}" for i in range(9)], [1] * 9)
    assert assign([NO_DECAY], ["a"], [2]) == (None,)
    assert assign([Group("bias"), NO_DECAY], [], []) == ()


def test_hyperparameters_of_a_group() -> None:
    hyper = Hyperparameters(lr=0.5, weight_decay=0.1)
    assert Group("").of(hyper) == hyper
    assert Group("", lr_scale=1).of(hyper) == hyper
    own = {"weight_decay": 0.0, "adaptivity": core.Linear(1, 0, 9), "b1": 0.5, "b2": 0.75, "eps": 1e-3}
    assert Group("", lr_scale=0.5, **own).of(hyper) == Hyperparameters(lr=0.25, **own)
    assert Group("", lr_scale=0.5, **own).hyper() == own
    assert NO_DECAY.of(hyper) == Hyperparameters(lr=0.5, weight_decay=0.0)
    scheduled = Group("", lr_scale=0.5).of(Hyperparameters(lr=lambda count: 0.1 * count))
    assert callable(scheduled.lr)
    assert scheduled.lr(3) == 0.1 * 3 * 0.5


GROUPS = [
    NO_DECAY,
    Group("bias"),
    Group("a|b", max_ndim=0, lr_scale=0.1, weight_decay=0.5, adaptivity=0, b1=0, b2=0.5, eps=0),
    *(Group("a", adaptivity=x) for x in (core.Linear(1, 0, 9), core.Cosine(0, 1, 5), core.Exponential(1, 0, 2.5))),
]


@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_groups_are_plain_data(group: Group) -> None:
    data = json.loads(json.dumps(group.to_dict()))
    assert Group.from_dict(data) == group
    assert pickle.loads(pickle.dumps(group)) == group
    assert eval(repr(group), {**vars(core)}) == group
    assert hash(group) == hash(Group.from_dict(data))
    assert len(set(GROUPS)) == len(GROUPS)


def test_plain_data_has_what_is_given() -> None:
    assert NO_DECAY.to_dict() == {"match": "", "max_ndim": 1, "weight_decay": 0.0}
    found = Group("a", lr_scale=np.float32(0.5), b1=np.array([0.5]), max_ndim=np.int64(2))
    assert found.to_dict() == {"match": "a", "max_ndim": 2, "lr_scale": 0.5, "b1": 0.5}
    assert all(type(x) in (str, int, float) for x in found.to_dict().values())
    with pytest.raises(TypeError, match=r"plain data holds the schedules of ada2ms\.core"):
        Group("a", adaptivity=lambda count: 0.5).to_dict()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"match": "("}, ValueError, r"Invalid match: '\(' \(match must be a regular expression; here: "),
        ({"match": None}, TypeError, r"Invalid match: None \(match must be a regular expression, a string\)"),
        ({"max_ndim": -1}, ValueError, r"Invalid max_ndim: -1 \(max_ndim must be an integer of at least 0, or None"),
        ({"max_ndim": 1.0}, TypeError, r"Invalid max_ndim: 1.0"),
        ({"max_ndim": True}, TypeError, r"Invalid max_ndim: True"),
        ({"lr_scale": -1}, ValueError, r"Invalid lr_scale: -1 \(lr_scale must be a number in \[0, inf\)"),
        ({"lr_scale": None}, TypeError, r"Invalid lr_scale: None"),
        ({"lr_scale": lambda count: 1.0}, TypeError, r"Invalid lr_scale"),
        ({"weight_decay": -1}, ValueError, r"Invalid weight_decay value: -1"),
        ({"adaptivity": 2}, ValueError, r"Invalid adaptivity: 2 \(adaptivity must be a number in \[0, 1\] or a sch"),
        ({"b1": 1}, ValueError, r"Invalid beta parameter at index 0: 1"),
        ({"b2": "0.5"}, TypeError, r"Invalid beta parameter at index 1: '0.5'"),
        ({"eps": float("nan")}, ValueError, r"Invalid epsilon value: nan"),
        ({"lr": 0.1}, TypeError, r"'lr'"),
        ({"scope": "tensor"}, TypeError, r"'scope'"),
        ({"adaptivity": {"schedule": "sine"}}, ValueError, r"Invalid schedule: 'sine'"),
    ],
)
def test_errors_name_argument_value_and_what_is_allowed(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Group.from_dict({"match": "a", **options})
    with pytest.raises(TypeError):
        Group("a", 1)  # type: ignore[misc]  # max_ndim by position


def test_what_is_given_as_groups() -> None:
    assert check_groups(None) == check_groups([]) == ()
    assert check_groups(iter([NO_DECAY])) == (NO_DECAY,)
    for wrong in (NO_DECAY, 1, "ab", [NO_DECAY, {"match": "a"}], [Group]):
        with pytest.raises(TypeError, match=r"Invalid groups: .* \(must be a sequence of ada2ms.core.Group, or None\)"):
            check_groups(wrong)  # type: ignore[arg-type]


def test_decay_by_groups_is_decay_by_hand() -> None:
    """The rule in NumPy over groups made of names, against the same by hand; one s for both groups."""
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(3, 2)), "b": rng.normal(size=3)}
    gradients = [[rng.normal(size=p.shape) for p in params.values()] for _ in range(3)]
    hyper = Hyperparameters(lr=0.1, weight_decay=0.5)
    found = assign([NO_DECAY], list(params), [p.ndim for p in params.values()])
    each = [hyper if i is None else NO_DECAY.of(hyper) for i in found]
    by_name = core.Ada2MS([{"params": [p.copy()], **vars(h)} for p, h in zip(params.values(), each, strict=True)])
    by_hand = core.Ada2MS(
        [{"params": [params["w"].copy()]}, {"params": [params["b"].copy()], "weight_decay": 0}],
        lr=0.1,
        weight_decay=0.5,
    )
    for row in gradients:
        by_name.step(row)
        by_hand.step(row)
    for a, b in zip(by_name.groups, by_hand.groups, strict=True):
        np.testing.assert_array_equal(a.params[0], b.params[0])
        assert a.global_exp_avg_sq == b.global_exp_avg_sq


def test_a_match_of_just_some_names() -> None:
    names = ["a.b", "a+b", "axb", "a", "a.b.c", "a.b\n", ""]
    for own in (["a.b"], ["a", "a+b"], [""], ["a.b\n", "axb"], []):
        found = [name for name in names if Group(exactly(own)).matches(name, 2)]
        assert found == [name for name in names if name in own]


@pytest.mark.parametrize("case", [case for case in golden.load() if factors(case)], ids=lambda case: case.id)
def test_the_groups_of_golden_cases_said_by_name(case: golden.Case) -> None:
    """What the replays of frameworks without parameter groups make of them has each parameter's hyperparameters."""
    expected = [(group.lr, hyperparameters(group)) for group in case.groups for _ in group.params]
    names = [f"tensor-{i}" for i in range(len(expected))]
    base, groups = named_groups(case, names)
    found = assign(groups, names, [p.ndim for group in case.groups for p in group.params])
    for step, rate in enumerate(case.groups[0].lr):
        hyper = Hyperparameters(lr=rate, **base)
        for index, (lr, own) in zip(found, expected, strict=True):
            made = hyper if index is None else groups[index].of(hyper)
            assert {**vars(made), "lr": 0.0} == {**own, "lr": 0.0}
            np.testing.assert_allclose(made.lr, lr[step], rtol=1e-15)


def test_most_golden_cases_can_be_said_by_name() -> None:
    assert {case.id.rpartition("-")[0] for case in golden.load() if not factors(case)} == {
        "groups/rates",
        "missing/rates",
    }
