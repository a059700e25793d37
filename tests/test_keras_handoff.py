"""States into Keras optimizers that are in use, and what is said of that which no state holds."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras_support import BACKEND, apply, arrays, assert_close, numpy, small, state, variables

from ada2ms.core import State, StateError
from ada2ms.tf import Ada2MS, export_state, import_state
from support import slow

pytestmark = pytest.mark.keras

# What is taken from AdamW and given to it does not depend on the backend, and torch is the fastest to see it.
OTHERS = [keras.optimizers.AdamW] if BACKEND == "torch" else slow(keras.optimizers.AdamW)
SUBJECTS = pytest.mark.parametrize("subject", [Ada2MS, *OTHERS])
AROUND: dict[str, dict[str, Any]] = {
    "nothing": {},
    "accumulation": {"gradient_accumulation_steps": 3},
    "averages": {"use_ema": True, "ema_momentum": 0.5},
    "both": {"gradient_accumulation_steps": 2, "use_ema": True, "ema_overwrite_frequency": 3},
}


def handed(subject: Any = Ada2MS, **options: Any) -> State:
    """A state after two updates."""
    targets, optimizer = variables(arrays(9)), subject(0.1, **options)
    for i in (1, 2):
        apply(optimizer, arrays(i), targets)
    return export_state(targets, optimizer)


def used(optimizer: Any, calls: int, scale: float = 1.0) -> tuple[Any, list[Any]]:
    """An optimizer, and its variables, after that many calls."""
    targets = variables(arrays(0))
    getattr(optimizer, "inner_optimizer", optimizer).build(targets)
    for i in range(calls):
        apply_scaled(optimizer, [np.asarray(scale * g, "float32") for g in arrays(20 + i)], targets)
    return optimizer, targets


def apply_scaled(optimizer: Any, gradients: list[Any], targets: list[Any]) -> None:
    if BACKEND == "jax" and hasattr(optimizer, "inner_optimizer"):  # which Keras has without state only, on JAX
        if not optimizer.built:
            optimizer.build(targets)
        values = [v.value for v in optimizer.variables], gradients, [v.value for v in targets]
        new, around = optimizer.stateless_apply(*values)
        for v, x in zip([*targets, *optimizer.variables], [*new, *around], strict=True):
            v.assign(x)
    else:
        apply(optimizer, gradients, targets)


@SUBJECTS
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("values", [True, False])
def test_an_optimizer_in_use_is_as_good_as_a_new_one(subject: Any, around: str, values: bool) -> None:
    given = handed()
    found = []
    for calls in (0, 4):
        optimizer, targets = used(subject(0.1, **AROUND[around]), calls)
        if not values:
            for v, x in zip(targets, arrays(0), strict=True):
                v.assign(x)
        report = import_state(targets, optimizer, given, values=values)
        dropped = [note for note in report.notes if "dropped" in note]
        assert bool(dropped) == (calls == 4 and around == "accumulation")
        assert not dropped or dropped[0].startswith("gradients of 1 of 3 steps")
        assert any("use_ema" in note for note in report.notes) == ("use_ema" in AROUND[around])
        before = list(state(optimizer).values())
        for i in range(7):
            apply(optimizer, arrays(40 + i), targets)
        optimizer.finalize_variable_values(targets)
        found.append([*before, *state(optimizer).values(), *map(numpy, targets)])
    for x, y in zip(*found, strict=True):
        np.testing.assert_array_equal(x, y)


def test_averages_start_from_the_values() -> None:
    """Not from zero, which a new optimizer would take for an average of the updates that it has not seen."""
    optimizer, targets = used(Ada2MS(0.1, use_ema=True, ema_momentum=0.75), 0)
    import_state(targets, optimizer, handed())
    before = [numpy(v) for v in targets]
    apply(optimizer, arrays(3), targets)
    expected = [0.75 * x + 0.25 * numpy(v) for x, v in zip(before, targets, strict=True)]
    optimizer.finalize_variable_values(targets)
    assert_close([numpy(v) for v in targets], expected)


@SUBJECTS
def test_the_loss_scale_starts_again(subject: Any) -> None:
    found = []
    for calls in (0, 3):
        optimizer = keras.optimizers.LossScaleOptimizer(subject(0.1), initial_scale=8.0, dynamic_growth_steps=2)
        optimizer, targets = used(optimizer, calls, scale=8.0)
        scale = float(numpy(optimizer.scale_loss(np.float32(1))))
        assert scale == (16 if calls else 8)
        notes = import_state(targets, optimizer, handed()).notes
        assert notes == ([f"the loss scale starts from 8.0; here it was {scale}"] if calls else [])
        for i in range(3):
            apply_scaled(optimizer, [np.asarray(8 * g, "float32") for g in arrays(40 + i)], targets)
        found.append([*state(optimizer).values(), *map(numpy, targets)])
    for x, y in zip(*found, strict=True):
        np.testing.assert_array_equal(x, y)


@SUBJECTS
def test_an_export_says_what_it_leaves_behind(subject: Any, tmp_path: Path) -> None:
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    inner = subject(0.1, gradient_accumulation_steps=3, use_ema=True)
    optimizer, targets = used(keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0), 5, scale=8.0)
    stranger = keras.Variable(np.ones(2), name="stranger")
    exported = export_state([*targets, stranger], optimizer)
    whole = "is not among the variables that the optimizer was built with"
    assert exported.notes == [
        f"{stranger.path!r} {whole}",
        "gradients of 2 of 3 steps, accumulated for the next update, are not in this state",
        "the moving averages of the variables (use_ema) are not in this state",
        "the loss scale, 8.0, is not in this state",
    ]
    exported.save(tmp_path / "state.safetensors")
    other, copies = used(subject(0.1), 0)
    report = import_state([*copies, stranger], other, State.load(tmp_path / "state.safetensors"))
    assert report.notes == [*exported.notes, f"{stranger.path!r} {whole}"]
    assert str(report).endswith(report.notes[-1])
    assert export_state(copies, other).notes == []


def test_a_state_that_does_not_fit_clears_nothing() -> None:
    optimizer, targets = used(Ada2MS(0.1, **AROUND["both"]), 3)
    before = state(optimizer)
    given = handed()
    given.parameters[targets[0].path].exp_avg = np.zeros((7,), "float32")
    given.parameters[targets[0].path].exp_avg_sq = np.zeros((7,), "float32")
    given.parameters[targets[0].path].param = np.zeros((7,), "float32")
    with pytest.raises(StateError, match="shape"):
        import_state(targets, optimizer, given)
    for x, y in zip(before.values(), state(optimizer).values(), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("steps", [None, 2])
def test_learning_rate_schedules_go_on_after_skipped_steps(steps: int | None) -> None:
    """As they would have without the hand-off: they count calls, of which some were skipped."""
    schedule = keras.optimizers.schedules.PolynomialDecay(0.5, 12, 0.0)
    bad = [np.full_like(g, np.nan) for g in arrays(0)]
    rows = [bad if i == 1 else arrays(i) for i in range(6) for _ in range(steps or 1)]
    options: dict[str, Any] = {"nonfinite": "skip", "gradient_accumulation_steps": steps}
    through, targets = Ada2MS(schedule, **options), variables(arrays(9))
    for row in rows[: 3 * (steps or 1)]:
        apply(through, row, targets)
    other, copies = used(Ada2MS(schedule, **options), 0)
    import_state(copies, other, export_state(targets, through))
    for row in rows[3 * (steps or 1) :]:
        apply(through, row, targets)
        apply(other, row, copies)
    assert small(other, "iteration") == len(rows)
    assert (small(other, "global_step"), small(other, "skipped")) == (5, 1)
    for v, w in zip(targets, copies, strict=True):
        np.testing.assert_array_equal(numpy(v), numpy(w))
