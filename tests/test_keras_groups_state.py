"""States with groups, compensations and a norm to clip by: out of Keras optimizers, and into them."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras_support import apply, arrays, assert_close, numpy, small, state, variables

from ada2ms.core import Cosine, Group, State, StateError
from ada2ms.core.groups import exactly
from ada2ms.tf import Ada2MS, arguments, export_state, import_state

pytestmark = pytest.mark.keras

GROUPS = [
    Group("v0", b2=0.5, lr_scale=0.5, adaptivity=Cosine(1.0, 0.0, 8)),
    Group("v1", b1=0.5, weight_decay=0.5, eps=1e-4),
]
ROWS = [arrays(i) for i in range(1, 7)]


def used(steps: int = 3, dtype: str = "float32", **options: Any) -> tuple[list[Any], Any]:
    targets, optimizer = variables(arrays(0), dtype), Ada2MS(2.0**-7, **options)
    optimizer.build(targets)
    for row in ROWS[:steps]:
        apply(optimizer, row, targets)
    return targets, optimizer


def assert_continues(left: tuple[list[Any], Any], right: tuple[list[Any], Any]) -> None:
    """Both are the same, and after more steps too."""
    for rows in ([], ROWS[3:]):
        for row in rows:
            for targets, optimizer in (left, right):
                apply(optimizer, row, targets)
        contents = [[*without_norm(o), *map(numpy, t)] for t, o in (left, right)]
        for x, y in zip(*contents, strict=True):
            np.testing.assert_array_equal(x, y)


def without_norm(optimizer: Any) -> list[Any]:
    """The optimizer's variables but for the norm of the last gradients, which is no state."""
    return [x for name, x in state(optimizer).items() if not name.endswith("gradient_norm")]


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_groups_are_exported_and_imported(scope: Any, tmp_path: Path) -> None:
    options = {"groups": GROUPS, "scope": scope, "global_clipnorm": 2.0, "nonfinite": "skip"}
    left, right = used(**options), used(0, **options)
    given = export_state(*left)
    moments = small(left[1], "global_velocity")
    assert [group.params for group in given.groups] == [["v0"], ["v1"], ["v2", "v3"]]
    assert given.groups[0].hyper == {
        **{"lr": 2.0**-8, "lr_scale": 0.5, "b1": 0.9, "b2": 0.5, "eps": 1e-8, "weight_decay": 0.01},
        "adaptivity": Cosine(1.0, 0.0, 8),
    }
    assert (given.max_norm, given.compensated) == (2.0, False)
    if scope == "model":
        assert [g.global_exp_avg_sq for g in given.groups] == [moments[1], moments[0], moments[0]]
    if pytest.importorskip("safetensors"):
        given.save(tmp_path / "state.safetensors")
        given = State.load(tmp_path / "state.safetensors")
    import_state(*right, given)
    assert_continues(left, right)


def test_arguments_make_the_groups() -> None:
    left = used(groups=GROUPS, global_clipnorm=2.0, adaptivity=0.25)
    given = export_state(*left)
    found = arguments(given)
    assert (found["global_clipnorm"], found["adaptivity"], found["learning_rate"]) == (2.0, 0.25, 2.0**-7)
    assert [group.match for group in found["groups"]] == [exactly(["v0"]), exactly(["v1"])]
    targets = variables([np.zeros_like(x) for x in arrays(0)])
    right = targets, Ada2MS(**found)
    import_state(*right, given)
    assert_continues(left, right)


def test_arguments_name_the_variables_here() -> None:
    """A state that calls them otherwise needs `names`, as for its import."""
    names = {"v0": "a", "v1": "b", "v2": "c", "v3": "d"}
    left = used(groups=GROUPS)
    given = export_state(*left, names=names)
    right = variables([np.zeros_like(x) for x in arrays(0)]), Ada2MS(**arguments(given, names))
    import_state(*right, given, names=names)
    assert_continues(left, right)
    with pytest.raises(StateError, match="names is a function"):
        arguments(given, lambda path: names[path])
    with pytest.raises(ValueError, match="matches none of 'v0'"):
        Ada2MS(**arguments(given)).build(left[0])


@pytest.mark.parametrize("make", [Ada2MS, keras.optimizers.AdamW])
def test_exclusions_are_groups_without_decay(make: Any) -> None:
    targets, optimizer = variables(arrays(0)), make(2.0**-7, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_list=[targets[1]])
    apply(optimizer, ROWS[0], targets)
    given = export_state(targets, optimizer)
    assert [group.params for group in given.groups] == [["v0", "v2", "v3"], ["v1"]]
    assert [group.hyper["weight_decay"] for group in given.groups] == [0.5, 0.0]
    copies = variables([np.zeros_like(x) for x in arrays(0)])
    other = Ada2MS(**arguments(given))
    import_state(copies, other, given)
    assert other.groups == (Group(exactly(["v1"]), weight_decay=0.0),)
    if make is Ada2MS:
        assert_continues((targets, optimizer), (copies, other))


def test_a_state_without_groups_goes_into_groups() -> None:
    """Each global second moment starts from the one that there is; hyperparameters stay as they are here."""
    given = export_state(*used())
    targets, optimizer = used(0, groups=GROUPS)
    import_state(targets, optimizer, given)
    assert small(optimizer, "global_velocity").tolist() == [np.float32(given.groups[0].global_exp_avg_sq)] * 2
    assert small(optimizer, "global_step").tolist() == [3, 3]
    assert optimizer.groups == tuple(GROUPS)
    with pytest.raises(StateError, match="2 global second moments in the state"):
        import_state(*used(0), export_state(*used(groups=GROUPS)))


@pytest.mark.parametrize("with_clip", [False, True])
def test_a_torch_run_with_groups_goes_on_here_and_back(with_clip: bool) -> None:
    """With decay and without, and as many b2 as groups; each way for three steps, beside a run that stays in torch."""
    torch = pytest.importorskip("torch")
    from ada2ms import torch as on_torch

    def train(params: list[Any], optimizer: Any, rows: list[list[Any]]) -> None:
        for row in rows:
            for p, g in zip(params, row, strict=True):
                p.grad = torch.tensor(g)
            optimizer.step()

    def made(values: list[Any]) -> tuple[list[Any], Any]:
        params = [torch.tensor(x, requires_grad=True) for x in values]
        groups = [
            {"params": params[:1], "weight_decay": 0.5, "betas": (0.9, 0.99)},
            {"params": params[1:], "weight_decay": 0.0, "lr": 2.0**-8, "adaptivity": 0.25},
        ]
        return params, on_torch.Ada2MS(groups, lr=2.0**-7, **({"max_norm": 2.0} if with_clip else {}))

    names = {f"p{i}": p for i, p in enumerate(arrays(0))}
    params, optimizer = made(arrays(0))
    train(params, optimizer, ROWS[:3])
    given = on_torch.export_state(dict(zip(names, params, strict=True)), optimizer)
    here = {f"v{i}": f"p{i}" for i in range(4)}
    found = arguments(given, here)
    targets = variables([np.zeros_like(x) for x in arrays(0)])
    ours = Ada2MS(**found)
    import_state(targets, ours, given, names=here)
    train(params, optimizer, ROWS[3:])
    for row in ROWS[3:]:
        apply(ours, row, targets)
    assert_close([numpy(v) for v in targets], [p.detach().numpy() for p in params])
    assert ours.global_clipnorm == (2.0 if with_clip else None)
    back = export_state(targets, ours, names=here)
    others, second = made([np.zeros_like(x) for x in arrays(0)])
    on_torch.import_state(dict(zip(names, others, strict=True)), second, back)
    for x, y in ((params, optimizer), (others, second)):
        train(x, y, ROWS[:3])
    assert_close([p.detach().numpy() for p in others], [p.detach().numpy() for p in params])


# Values of 16 bits


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_compensations_travel(dtype: str) -> None:
    left, right = used(dtype=dtype, compensated=True), used(0, dtype, compensated=True)
    given = export_state(*left)
    assert given.compensated
    rest = given.parameters["v0"].compensation
    assert rest is not None
    assert np.any(rest != 0)
    import_state(*right, given)
    assert_continues(left, right)
    # In float32 both are one number, and from there they are two again.
    wide = used(0)
    import_state(*wide, given)
    whole = given.parameters["v0"].param + rest
    np.testing.assert_array_equal(numpy(wide[0][0]), whole)
    again = used(0, dtype, compensated=True)
    import_state(*again, export_state(*wide))
    held = again[1]._compensations[0]
    assert_close([numpy(again[0][0]) + numpy(held)], [whole], rtol=0)


def test_where_compensations_do_not_fit() -> None:
    given = export_state(*used(dtype="bfloat16", compensated=True))
    targets, optimizer = used(0, "bfloat16")
    before = [*state(optimizer).values(), *map(numpy, targets)]
    with pytest.raises(StateError, match="type: param of 'v0' is bfloat16"):
        import_state(targets, optimizer, given)
    for x, y in zip(before, [*state(optimizer).values(), *map(numpy, targets)], strict=True):
        np.testing.assert_array_equal(x, y)
    import_state(targets, optimizer, given, cast=True)
    assert small(optimizer, "global_step") == 3


def test_values_stay_and_compensations_come() -> None:
    left, right = (used(dtype="bfloat16", compensated=True) for _ in range(2))
    given = export_state(*left, values=False)
    right[1]._compensations[0].assign(np.zeros((3, 4)))
    import_state(*right, given, values=False)
    assert_continues(left, right)


def test_keras_own_clipping_travels_too() -> None:
    targets, optimizer = variables(arrays(0)), keras.optimizers.AdamW(2.0**-7, global_clipnorm=2.0)
    apply(optimizer, ROWS[0], targets)
    assert arguments(export_state(targets, optimizer))["global_clipnorm"] == 2.0
    for other in ({"clipnorm": 1.0}, {}):
        optimizer = keras.optimizers.AdamW(2.0**-7, **other)
        apply(optimizer, ROWS[0], targets)
        assert "global_clipnorm" not in arguments(export_state(targets, optimizer))
