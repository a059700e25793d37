"""`groups` of the Keras optimizer: variables with hyperparameters of their own, found by their paths."""

from typing import Any

import keras
import numpy as np
import pytest
from keras_support import BACKEND, apply, arrays, assert_close, numpy, small, state, variables

from ada2ms import core
from ada2ms.core import NO_DECAY, Group, Linear
from ada2ms.tf import Ada2MS

pytestmark = pytest.mark.keras

# Of the variables v0 of (3, 4), v1 of (4,), v2 of () and v3 of (0,).
GROUPS = [
    Group("v0", lr_scale=0.5, weight_decay=0.5, adaptivity=Linear(1, 0, 4)),
    Group("v[12]", b1=0.8, eps=1e-3, adaptivity=1.0),
]
ROWS = [arrays(i) for i in range(1, 6)]


def by_core(groups: list[tuple[list[int], dict[str, Any]]], rows: list[list[Any]], **choices: Any) -> list[Any]:
    """The rule with groups of the variables of these indices; the result in the variables' order."""
    values = [x.copy() for x in arrays(0)]
    rule = core.Ada2MS([{"params": [values[i] for i in own], **hyper} for own, hyper in groups], **choices)
    order = [i for own, _ in groups for i in own]
    for row in rows:
        rule.step([row[i] for i in order])
    return values


def moved(rows: list[list[Any]], **arguments: Any) -> tuple[Any, list[Any]]:
    targets, optimizer = variables(arrays(0)), Ada2MS(0.1, **arguments)
    for row in rows:
        apply(optimizer, row, targets)
    return optimizer, [numpy(v) for v in targets]


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("choices", [{}, {"nonfinite": "skip", "max_norm": 2.0}], ids=["plain", "all"])
def test_follows_the_rule(scope: str, choices: dict[str, Any]) -> None:
    """The golden vectors have more groups; these have a bad step between, and two groups of the same b2."""
    rows = [*ROWS[:2], [np.full_like(g, np.nan) for g in ROWS[0]], *ROWS[2:]] if choices else ROWS
    groups = [
        ([0], {"lr": 0.05, "weight_decay": 0.5, "adaptivity": Linear(1, 0, 4)}),
        ([1, 2], {"lr": 0.1, "b1": 0.8, "eps": 1e-3, "adaptivity": 1.0}),
        ([3], {"lr": 0.1}),
    ]
    renamed = {"global_clipnorm" if name == "max_norm" else name: value for name, value in choices.items()}
    optimizer, found = moved(rows, groups=GROUPS, scope=scope, **renamed)
    assert_close(found, by_core(groups, rows, scope=scope, **choices), rtol=4e-6, atol=4e-7)
    assert small(optimizer, "global_velocity").shape == (() if scope == "model" else (4,))


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_each_b2_has_a_moment_of_its_own(scope: str) -> None:
    """Fed by the one mean of all; groups of the same b2 share it, and a b2 of 0 has no memory."""
    rows = [[None if (i, j) == (1, 0) else g for j, g in enumerate(row)] for i, row in enumerate(ROWS)]
    groups = [Group("v0", b2=0.5), Group("v1", b2=0.0, adaptivity=0.25), Group("v2", b2=0.5, weight_decay=0.0)]
    numbers = [([0], {"b2": 0.5}), ([1], {"b2": 0.0, "adaptivity": 0.25}), ([2], {"b2": 0.5, "weight_decay": 0.0})]
    expected = by_core([(own, {"lr": 0.1, **h}) for own, h in [*numbers, ([3], {})]], rows, scope=scope)
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        optimizer, found = moved(rows, groups=groups, scope=scope)
    assert_close(found, expected, rtol=4e-6, atol=4e-7)
    s, k = small(optimizer, "global_velocity"), small(optimizer, "global_step")
    if scope == "model":
        squares = [sum(float((g**2).sum()) for g in row if g is not None) for row in rows]
        means = [x / sum(g.size for g in row if g is not None) for x, row in zip(squares, rows, strict=True)]
        by_b2 = [sum((1 - b2) * b2 ** (4 - i) * mean for i, mean in enumerate(means)) for b2 in (0.999, 0.5, 0.0)]
        np.testing.assert_allclose(s, by_b2, rtol=1e-5)
        assert k.tolist() == [5, 5, 5]
    else:
        assert (s.shape, k.shape, int(k)) == ((4,), (), 5)


def test_the_first_match_and_dimensions() -> None:
    """A group has what groups before it have not; `NO_DECAY` has vectors and numbers."""
    zeros = [[np.zeros_like(x) for x in arrays(0)]]
    _, found = moved(zeros, weight_decay=1.0, groups=[Group("1$", weight_decay=2.0), NO_DECAY])
    factors = [after.ravel()[:1] / before.ravel()[:1] for after, before in zip(found, arrays(0), strict=True)]
    np.testing.assert_allclose(np.concatenate(factors), [0.9, 0.8, 1.0], rtol=1e-6)


def test_exclusion_from_weight_decay_goes_before_groups() -> None:
    targets, optimizer = variables(arrays(0)), Ada2MS(0.1, weight_decay=0.0, groups=[Group("v", weight_decay=1.0)])
    optimizer.exclude_from_weight_decay(var_names=["v1"], var_list=[targets[2]])
    apply(optimizer, [np.zeros_like(x) for x in arrays(0)], targets)
    factors = [numpy(v).ravel()[:1] / x.ravel()[:1] for v, x in zip(targets, arrays(0), strict=True)]
    np.testing.assert_allclose(np.concatenate(factors), [0.9, 1.0, 1.0], rtol=1e-6)


def test_groups_that_change_nothing() -> None:
    """Numbers and state are those of an optimizer without groups."""
    optimizer, found = moved(ROWS, groups=[Group("v0", lr_scale=1.0, b2=0.999), Group("v1", weight_decay=0.01)])
    other, expected = moved(ROWS)
    for x, y in zip([*found, *state(optimizer).values()], [*expected, *state(other).values()], strict=True):
        np.testing.assert_array_equal(x, y)


def test_learning_rates_change() -> None:
    optimizer, targets = Ada2MS(0.5, groups=[Group("v0", lr_scale=0.25)]), variables(arrays(0))
    rates = (0.5, 0.25, 0.0, 0.125, 1.0)
    for rate, row in zip(rates, ROWS, strict=True):
        optimizer.learning_rate = rate
        apply(optimizer, row, targets)
    groups = [([0], {"lr": lambda k: rates[k] / 4}), ([1, 2, 3], {"lr": lambda k: rates[k]})]
    assert_close([numpy(v) for v in targets], by_core(groups, ROWS))
    schedule = keras.optimizers.schedules.PolynomialDecay(0.1, 10, 0.0)
    targets, optimizer = variables(arrays(0)), Ada2MS(schedule, groups=[Group("v0", lr_scale=0.5)])
    for row in ROWS:
        apply(optimizer, row, targets)
    groups = [([0], {"lr": lambda k: 0.05 * (1 - k / 10)}), ([1, 2, 3], {"lr": lambda k: 0.1 * (1 - k / 10)})]
    assert_close([numpy(v) for v in targets], by_core(groups, ROWS))


def test_own_hyperparameters_change() -> None:
    """What a group does not have of its own is the optimizer's of now."""
    optimizer, targets = Ada2MS(0.1, groups=[Group("v0", weight_decay=0.5)], adaptivity=1.0), variables(arrays(0))
    for row, adaptivity in zip(ROWS, (1.0, 0.0, 0.5, 0.25, 0.75), strict=True):
        optimizer.adaptivity = adaptivity
        apply(optimizer, row, targets)
    by_count = (1.0, 0.0, 0.5, 0.25, 0.75)
    own = {"lr": 0.1, "adaptivity": lambda k: by_count[k]}
    assert_close([numpy(v) for v in targets], by_core([([0], {**own, "weight_decay": 0.5}), ([1, 2, 3], own)], ROWS))


@pytest.mark.parametrize(
    "arguments",
    [{"gradient_accumulation_steps": 2}, {"loss_scale_factor": 2.0}, {"use_ema": True, "ema_momentum": 0.5}],
)
def test_with_what_keras_does_around_it(arguments: dict[str, Any]) -> None:
    rows, scale = [row for row in ROWS[:3] for _ in range(arguments.get("gradient_accumulation_steps", 1))], 1.0
    scale = arguments.get("loss_scale_factor", 1.0)
    rows = [[np.float32(scale) * g for g in row] for row in rows]
    optimizer, found = moved(rows, groups=[Group("v0", b2=0.5, lr_scale=0.5)], **arguments)
    assert_close(found, by_core([([0], {"lr": 0.05, "b2": 0.5}), ([1, 2, 3], {"lr": 0.1})], ROWS[:3]))
    assert small(optimizer, "global_step").tolist() == [3, 3]


def test_in_a_multi_optimizer() -> None:
    """Each member has groups of its own, among its own variables."""
    if not hasattr(keras.optimizers, "MultiOptimizer"):
        pytest.skip("this Keras has no MultiOptimizer")
    targets = variables(arrays(0)[:3])
    members = (Ada2MS(0.1, groups=[Group("v1", weight_decay=0.5)]), Ada2MS(0.2))
    optimizer = keras.optimizers.MultiOptimizer(lambda v: members[v.name == "v2"])
    optimizer.build(targets)
    for row in ROWS:
        apply(optimizer, row[:3], targets)
    values = [x.copy() for x in arrays(0)[:3]]
    first = core.Ada2MS([{"params": values[:1]}, {"params": values[1:2], "weight_decay": 0.5}], lr=0.1)
    second = core.Ada2MS(values[2:], lr=0.2)
    for row in ROWS:
        first.step(row[:2])
        second.step(row[2:3])
    assert_close([numpy(v) for v in targets], values)


def test_overwritten_variables_are_in_no_group() -> None:
    targets = variables(arrays(0))
    targets[0].overwrite_with_gradient = True
    with pytest.raises(ValueError, match=r"Invalid groups\[0\]"):
        Ada2MS(groups=[Group("v0", b2=0.5)]).build(targets)
    optimizer = Ada2MS(0.1, groups=[Group("v1", b2=0.5)])
    apply(optimizer, ROWS[0], targets)
    np.testing.assert_array_equal(numpy(targets[0]), ROWS[0][0])
    assert small(optimizer, "steps").tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        ([{"match": "v0"}], TypeError, r"Invalid groups: \[{'match': 'v0'}\]"),
        (Group("v0"), TypeError, "must be a sequence of ada2ms.core.Group"),
        ([Group("dense")], ValueError, r"Invalid groups\[0\]: .*matches none of 'v0', 'v1'"),
        ([Group("v"), Group("v1")], ValueError, r"Invalid groups\[1\]: .*groups before it have all"),
    ],
)
def test_bad_groups_are_named(groups: Any, error: type[Exception], message: str) -> None:
    targets, made = variables(arrays(0)), []

    def make() -> None:
        made.append(Ada2MS(groups=groups))
        made[0].build(targets)

    with pytest.raises(error, match=message):
        make()
    assert not any(optimizer.built for optimizer in made)
    for v, x in zip(targets, arrays(0), strict=True):
        np.testing.assert_array_equal(numpy(v), x)


# Cost


@pytest.mark.skipif(BACKEND != "jax", reason="about what JAX is given")
def test_groups_cost_little() -> None:
    """Of 30 variables: without groups none of it, and with three groups a few numbers more, and no tensor."""
    import jax

    shapes = [(8, 8), (8,), (8, 8)] * 10

    def program(**arguments: Any) -> Any:
        targets = variables(arrays(0, shapes))
        optimizer = Ada2MS(adaptivity=0.5, **arguments)  # one way to a power, as the groups
        optimizer.build(targets)
        values, found = [v.value for v in targets], [v.value for v in optimizer.variables]
        return jax.make_jaxpr(optimizer.stateless_apply)(found, values, values)

    def whole(jaxpr: Any) -> list[str]:
        return sorted(e.primitive.name for e in jaxpr.eqns if e.outvars and len(e.outvars[0].aval.shape) == 2)

    plain, same = program(), program(groups=[Group("v", lr_scale=1.0)])
    assert str(plain) == str(same)
    groups = [Group("v1$", lr_scale=0.5, weight_decay=0.0), Group("v[2-5]$", adaptivity=0.5, b1=0.8)]
    three = program(groups=groups)
    assert whole(three) == whole(plain)
    added = len(three.eqns) - len(plain.eqns)
    # A step size and an epsilon for every variable in each of two groups more, two operations each, of which XLA drops
    # those that are not used; and what a group computes once.
    assert 0 < added < 2 * (4 * len(shapes) + 30)
