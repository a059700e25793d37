"""What Optax keeps around the optimizer, when its state is handed over: counts that follow, and what stays behind."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax_support import EPSILON, assert_close, assert_equal, train, tree

from ada2ms.jax import ada2ms, export_state, import_state, scale_by_ada2ms
from support import slow

RATE = optax.linear_schedule(0.1, 0.0, 10)
pytestmark = pytest.mark.slow  # each compiles programs of its own

BROKEN = {**tree(7), "vector": tree(7)["vector"].at[1].set(jnp.nan)}
LABELS = {"empty": "x", "matrix": "x", "scalar": "y", "vector": "x"}

# Optimizers of which all counts follow from the count of updates
FOLLOW = {
    "inject_hyperparams": lambda: optax.inject_hyperparams(ada2ms)(RATE, adaptivity=optax.linear_schedule(1, 0, 9)),
    "inject_hyperparams, adamw": lambda: optax.inject_hyperparams(optax.adamw)(RATE),
    "scale_by_schedule": lambda: optax.chain(scale_by_ada2ms(), optax.scale_by_schedule(lambda k: -RATE(k))),
    "scale_by_learning_rate": lambda: optax.chain(scale_by_ada2ms(), optax.scale_by_learning_rate(RATE)),
    "adamw": lambda: optax.adamw(RATE),
    "add_decayed_weights": lambda: optax.chain(
        ada2ms(0.1, weight_decay=0.0), optax.add_decayed_weights(lambda k: -RATE(k))
    ),
    "masked decay": lambda: optax.chain(
        ada2ms(0.1, weight_decay=0.0),
        optax.add_decayed_weights(
            lambda k: -RATE(k), {"empty": True, "matrix": True, "scalar": False, "vector": False}
        ),
    ),
    "partition": lambda: optax.partition({"x": ada2ms(RATE), "y": optax.sgd(RATE)}, LABELS),
    "partition after": lambda: optax.chain(
        scale_by_ada2ms(),
        optax.partition({"x": optax.scale_by_learning_rate(RATE), "y": optax.scale_by_learning_rate(0.1)}, LABELS),
    ),
    "named_chain": lambda: optax.named_chain(("one", ada2ms(RATE)), ("two", optax.scale_by_schedule(RATE))),
    "skipped steps": lambda: optax.inject_hyperparams(ada2ms, static_args=("nonfinite",))(RATE, nonfinite="skip"),
}

if tuple(map(int, optax.__version__.split(".")[:3])) < (0, 2, 7):  # where a decay's schedule stays at its beginning
    del FOLLOW["add_decayed_weights"], FOLLOW["masked decay"]
SELDOM = ("inject_hyperparams, adamw", "scale_by_learning_rate", "masked decay", "partition after")


@pytest.mark.parametrize(
    "made", [*(name for name in FOLLOW if name not in SELDOM), *slow(*(name for name in SELDOM if name in FOLLOW))]
)
def test_counts_that_follow_are_moved(made: str) -> None:
    """After a hand-off to a fresh optimizer the states are what they were, and so is the next step."""
    optimizer = FOLLOW[made]()
    gradients = [tree(i) for i in range(1, 6)]
    if made == "skipped steps":
        gradients[2] = BROKEN
    params, state = train(optimizer, tree(0), gradients)
    exported = export_state(params, state)
    said = (
        ["the value of 'scalar' is not in this state: the optimizer has no moments of it"]
        if made == "partition"
        else []
    )
    assert exported.notes == said
    new, restored, report = import_state(tree(9), optimizer.init(tree(9)), exported)
    assert report.notes == said + [x.replace("is not in this state", "stays as it was here") for x in said]
    assert_close(_without_rates(restored), _without_rates(state), 4 * EPSILON)  # s goes through a Python float
    expected, found = (optimizer.update(tree(8), s, p)[0] for s, p in ((state, params), (restored, new)))
    assert_close(found, expected, 8 * EPSILON, EPSILON)


def _without_rates(state: Any) -> Any:
    """`inject_hyperparams` keeps what its schedules were last; they are computed anew in each step."""
    return state._replace(hyperparams=None) if hasattr(state, "hyperparams") else state


def test_multi_steps() -> None:
    """Its count follows, what it has accumulated does not, and is named on both sides."""
    optimizer = optax.MultiSteps(optax.inject_hyperparams(ada2ms)(RATE), 2)
    params, state = train(optimizer, tree(0), [tree(i) for i in range(1, 8)])
    assert (state.gradient_step, state.mini_step) == (3, 1)
    exported = export_state(params, state)
    fresh = optimizer.init(tree(9))
    new, restored, report = import_state(tree(9), fresh, exported)
    assert restored.gradient_step == restored.inner_opt_state.count == 3
    assert (restored.mini_step, new.keys()) == (0, params.keys())
    assert_equal(restored.acc_grads, fresh.acc_grads)
    for field in (".mini_step", ".acc_grads"):
        assert f"Not exported: {field} of MultiStepsState" in exported.notes
        assert f"Not exported: {field} of MultiStepsState" in report.notes
        assert f"Not imported, and as it was in opt_state: {field} of MultiStepsState" in report.notes
        assert field in str(report)
    assert len(report.notes) == 4
    # From one that accumulates into one that does not
    _, restored, report = import_state(tree(9), ada2ms().init(tree(9)), exported)
    assert (restored.count, len(report.notes)) == (3, 2)


class Counter(NamedTuple):
    count: Any


def counting() -> optax.GradientTransformation:
    """Of somebody else: of what it counts nothing is known."""
    return optax.GradientTransformation(
        lambda params: Counter(jnp.zeros([], jnp.int32)), lambda u, state, params=None: (u, Counter(state.count + 2))
    )


class Plain(NamedTuple):
    total: Any
    parts: dict[str, Any]


def in_dictionaries() -> optax.GradientTransformation:
    return optax.GradientTransformation(
        lambda params: {"seen": jnp.zeros([]), "more": Plain(jnp.zeros([]), {"one": jnp.zeros([])})},
        lambda u, state, params=None: (u, jax.tree.map(lambda x: x + 1, state)),
    )


STAY = {
    "ema": (lambda o: optax.chain(o, optax.ema(0.9)), ["[1].count of EmaState", "[1].ema of EmaState"]),
    "trace": (lambda o: optax.chain(optax.trace(0.9), o), ["[0].trace of TraceState"]),
    "apply_if_finite": (
        lambda o: optax.apply_if_finite(o, 5),
        [f".{name} of ApplyIfFiniteState" for name in ("notfinite_count", "last_finite", "total_notfinite")],
    ),
    "apply_every": (
        lambda o: optax.chain(o, optax.apply_every(3)),
        ["[1].count of ApplyEvery", "[1].grad_acc of ApplyEvery"],
    ),
    "conditionally_transform": (
        lambda o: optax.conditionally_transform(o, lambda step, **_: step % 2 == 0),
        [".step of ConditionallyTransformState"],
    ),
    "a schedule around MultiSteps": (
        lambda o: optax.chain(optax.MultiSteps(o, 2).gradient_transformation(), optax.scale_by_schedule(RATE)),
        ["[0].mini_step of MultiStepsState", "[0].acc_grads of MultiStepsState", "[1].count of ScaleByScheduleState"],
    ),
    "MultiSteps beside": (
        lambda o: optax.chain(
            o,
            optax.MultiSteps(optax.sgd(RATE, momentum=0.9), 2).gradient_transformation(),
            optax.scale_by_schedule(RATE),
        ),
        [
            *(f"[1].{name} of MultiStepsState" for name in ("mini_step", "gradient_step")),
            "[1].inner_opt_state[0].trace of TraceState",
            "[1].inner_opt_state[1].count of ScaleByScheduleState",
            "[1].acc_grads of MultiStepsState",
        ],
    ),
    "a condition beside": (
        lambda o: optax.chain(
            optax.conditionally_mask(optax.scale_by_schedule(RATE), lambda step, **_: step % 2 == 0), o
        ),
        ["[0].step of ConditionallyMaskState", "[0].inner_state.count of ScaleByScheduleState"],
    ),
    "a schedule around a condition": (
        lambda o: optax.chain(
            optax.conditionally_mask(o, lambda step, **_: step % 2 == 0), optax.scale_by_schedule(RATE)
        ),
        ["[0].step of ConditionallyMaskState", "[1].count of ScaleByScheduleState"],
    ),
    "noise": (
        lambda o: optax.chain(optax.add_noise(0.1, 0.5, 0), o),
        ["[0].rng_key of AddNoiseState"],
    ),
    "somebody else's": (lambda o: optax.chain(o, counting()), ["[1].count of Counter"]),
    "dictionaries": (
        lambda o: optax.named_chain(("ours", o), ("other", in_dictionaries())),
        ["['other']['more'].total of Plain", "['other']['more'].parts of Plain", "['other']['seen']"],
    ),
}


@pytest.mark.parametrize("made", STAY)
def test_what_stays_behind_is_named(made: str) -> None:
    """All of it, on both sides; and it stays as it is where it is imported, whether that is fresh or in use."""
    wrap, named = STAY[made]
    optimizer = wrap(ada2ms(0.1))
    params, state = train(optimizer, tree(0), [tree(i) for i in range(1, 5)])
    exported = export_state(params, state)
    assert exported.notes == [f"Not exported: {name}" for name in named]
    used = train(optimizer, tree(9), [tree(10)])
    for target in ((tree(9), optimizer.init(tree(9))), used):
        _, restored, report = import_state(*target, exported)
        assert report.notes == exported.notes + [f"Not imported, and as it was in opt_state: {name}" for name in named]
        paths = [(jax.tree_util.keystr(p), x) for p, x in jax.tree_util.tree_flatten_with_path(restored)[0]]
        before = {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_flatten_with_path(target[1])[0]}
        for name in named:
            kept = {path: x for path, x in paths if path.startswith(name.partition(" of ")[0])}
            assert kept
            assert all(x is before[path] for path, x in kept.items())


BESIDE = {
    "partition": lambda: optax.partition(
        {"a": ada2ms(0.1), "b": optax.sgd(0.1)}, {"w": "a", "frozen": "b", "scale": "b"}
    ),
    "masked": lambda: optax.masked(ada2ms(0.1), {"w": True, "frozen": False, "scale": False}),
    "masked adamw": lambda: optax.masked(optax.adamw(0.1), {"w": True, "frozen": False, "scale": False}),
}


@pytest.mark.parametrize("made", BESIDE)
def test_values_without_moments_are_named(made: str) -> None:
    """On both sides: a run that goes on without them is another run."""
    params: Any = {"w": jnp.array([1.0, 2.0]), "frozen": jnp.array([9.0]), "scale": np.ones(2, np.float32)}
    optimizer = BESIDE[made]()
    exported = export_state(params, optimizer.init(params))
    why = "the optimizer has no moments of it"
    there = [f"the value of {name!r} is not in this state: {why}" for name in ("frozen", "scale")]
    here = [f"the value of {name!r} stays as it was here: {why}" for name in ("frozen", "scale")]
    assert exported.notes == there
    other = jax.tree.map(jnp.zeros_like, params)
    restored, _, report = import_state(other, optimizer.init(other), exported)
    assert report.notes == there + here
    assert [name for name in params if np.array_equal(restored[name], params[name])] == ["w"]
    assert export_state(params, optimizer.init(params), values=False).notes == []
    assert import_state(other, optimizer.init(other), exported, values=False)[2].notes == there
