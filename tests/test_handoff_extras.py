"""What is no part of an optimizer's state, and travels with it: statistics, values of frozen layers, what users add."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from state_support import entry, fit, target

from ada2ms.core import State, StateError
from ada2ms.core.state import Group


def torch_model() -> Any:
    from torch import nn

    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=None), nn.Linear(4, 2))


def test_what_travels_and_what_does_not(tmp_path: Path) -> None:
    """Through a file, with a frozen layer, and with an array that only the user knows."""
    import torch

    from ada2ms.torch import Ada2MS, export_state, import_state, plain_layers

    def made(seed: int) -> tuple[Any, Any, dict[str, Any]]:
        torch.manual_seed(seed)
        model = torch_model()
        mappings: dict[str, Any] = dict(plain_layers(model))
        mappings["extras"] |= {name: mappings["names"][name] for name in ("0.weight", "0.bias")}
        model[0].requires_grad_(False)
        model(torch.randn(5, 3))
        return model, Ada2MS([p for p in model.parameters() if p.requires_grad]), mappings

    (one, optimizer, mappings), (two, other, _) = made(0), made(1)
    state = export_state(one, optimizer, **mappings)
    assert sorted(state.extras) == ["0.dense.bias", "0.dense.kernel", "1.norm.batches", "1.norm.mean", "1.norm.var"]
    assert np.array_equal(state.extras["0.dense.kernel"], one[0].weight.detach().numpy().T)
    assert state.notes == []
    state.extras["batches seen"] = np.array(7)
    state.save(tmp_path / "run.safetensors")
    loaded = State.load(tmp_path / "run.safetensors")
    report = import_state(two, other, loaded, **mappings)
    assert report.notes == ["the extra 'batches seen' goes nowhere: nothing here is called so"]
    assert ("1.running_mean", "1.norm.mean") in report.extras
    assert "1.running_var  <-  1.norm.var  (extra)" in str(report)
    for name, x in one.state_dict().items():
        assert torch.equal(x, two.state_dict()[name]), name

    third, other, _ = made(2)
    before = {name: x.clone() for name, x in third.state_dict().items()}
    report = import_state(third, other, loaded, **{**mappings, "extras": None})
    kept = ["0.weight", "0.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"]
    assert all(torch.equal(third.state_dict()[name], before[name]) for name in kept)
    assert len([note for note in report.notes if "goes nowhere" in note]) == 6
    assert len([note for note in report.notes if "stays as it was here" in note]) == 2
    import_state(third, other, loaded, **mappings, values=False)
    assert all(torch.equal(third.state_dict()[name], before[name]) for name in kept)


def test_extras_that_do_not_fit_are_in_the_one_error() -> None:
    from ada2ms.core.state import Extra

    state = State({"a": entry((2,))}, [Group(["a"], {}, 0.5, 3)])
    state.extras = {"mean": np.zeros(3), "var": np.full(2, 1 / 3)}
    options = {"extras": {"m": "mean", "v": "var", "absent": "mean", "n": "count"}}
    beside = {"m": Extra((2,), "float64"), "v": Extra((2,), "float32"), "n": Extra((), "int64")}
    with pytest.raises(StateError) as caught:
        fit(state, {"a": target((3,))}, beside=beside, **options)
    assert caught.value.problems == [
        "shape: 'a' has (3,); in the state (2,)",
        "shape: the extra 'm' (in the state 'mean') has (2,); in the state (3,)",
        "type: the extra 'v' is float32, which does not hold its float64 values (cast=True rounds them)",
    ]
    state.extras["mean"] = np.zeros(2)
    found = fit(state, {"a": target((2,))}, beside=beside, cast=True, **options)
    assert found.report.extras == [("m", "mean"), ("v", "var")]
    assert found.report.notes == ["'n' stays as it was here: the state has no extra 'count'"]


def test_a_tree_without_statistics_says_that_they_do_not_travel() -> None:
    pytest.importorskip("flax", reason="flax is not installed")
    from flax import nnx

    from ada2ms.jax import ada2ms, export_state, import_state, plain_layers

    model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    params, mappings = nnx.state(model, nnx.Param), plain_layers(model)
    assert mappings["extras"] == {"layers/1/mean": "1.norm.mean", "layers/1/var": "1.norm.var"}
    state = export_state(params, ada2ms().init(params), **mappings)
    assert state.notes == [
        f"the extra 'layers/1/{name}' is not in this state: no leaf is called so" for name in ("mean", "var")
    ]
    full = export_state(nnx.state(model, (nnx.Param, nnx.BatchStat)), ada2ms().init(params), **mappings)
    assert full.notes == []
    *_, report = import_state(params, ada2ms().init(params), full, **mappings)
    assert [note.split(":")[0] for note in report.notes] == [
        f"the extra '1.norm.{name}' goes nowhere" for name in ("mean", "var")
    ]
