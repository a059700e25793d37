"""What people change in mid-run: types, the default dtype, the scope; live groups saved; repeated parameters."""

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_support import saved_and_loaded, shared_numbers

from ada2ms import core
from ada2ms.torch import Ada2MS, export_state, import_state
from support import needs_compiler

IMPLEMENTATIONS = [{"foreach": False}, {"foreach": True}, pytest.param({"fused": True}, marks=needs_compiler)]


@pytest.fixture(params=[torch.bfloat16, torch.float16])
def narrow_default(request: pytest.FixtureRequest) -> Any:
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)) for n in (3, 50)]


def train(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for i, p in enumerate(params):
            p.grad = (10.0**i * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p.dtype)
        optimizer.step()


def counts(optimizer: Ada2MS, p: Tensor) -> list[float]:
    assert all(optimizer.state[p][key].dtype in (torch.float32, torch.float64) for key in ("step", "global_step"))
    return [float(optimizer.state[p][key]) for key in ("step", "global_step")]


@pytest.mark.parametrize("source", ["AdamW", "Ada2MS", "numbers", "import_state", "nothing"])
def test_counts_under_a_narrow_default_dtype(source: str, narrow_default: torch.dtype) -> None:
    """Which stand still at 256 in bfloat16, and at 2048 in float16."""
    params = parameters()
    n = 301 if narrow_default == torch.bfloat16 else 2101
    first = (torch.optim.AdamW if source in ("AdamW", "import_state") else Ada2MS)(params)
    train(params, first, range(1))
    for state in first.state.values():
        for key in ("step", "global_step"):
            if key in state:
                state[key].fill_(n)
    optimizer = Ada2MS(params)
    if source == "import_state":
        import_state(
            dict(zip("ab", params, strict=True)), optimizer, export_state(dict(zip("ab", params, strict=True)), first)
        )
    elif source != "nothing":
        saved = first.state_dict()
        if source == "numbers":
            for state in saved["state"].values():
                state |= {key: float(state[key]) for key in ("step", "global_step", "global_exp_avg_sq", "skipped")}
        optimizer.load_state_dict(saved)
    train(params, optimizer, range(2))
    assert counts(optimizer, params[0]) == [2 + (source != "nothing") * n] * 2


@pytest.mark.parametrize("number", [False, True])
def test_a_float64_s_keeps_its_digits(number: bool, narrow_default: torch.dtype) -> None:
    params = parameters(torch.float64)
    optimizer = Ada2MS(params)
    train(params, optimizer, range(3))
    s = float(shared_numbers(optimizer)["global_exp_avg_sq"])
    saved = optimizer.state_dict()
    if number:
        saved = json.loads(json.dumps(saved, default=lambda x: x.tolist()))
        saved["state"] = {
            int(i): {
                k: x if not isinstance(x, list) else torch.tensor(x, dtype=torch.float64) for k, x in state.items()
            }
            for i, state in saved["state"].items()
        }
    other = Ada2MS(params)
    other.load_state_dict(copy.deepcopy(saved))
    assert float(shared_numbers(other)["global_exp_avg_sq"]) == s
    named = dict(zip("ab", params, strict=True))
    import_state(named, other, export_state(named, optimizer))
    assert float(shared_numbers(other)["global_exp_avg_sq"]) == s


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("part", [False, True])
def test_a_state_dict_that_was_cast(dtype: torch.dtype, part: bool) -> None:
    """To 16 bits as a whole, it goes on counting; in part, the exact copies are the model's."""
    params = parameters()
    optimizer = Ada2MS(params)
    train(params, optimizer, range(3))
    for state in optimizer.state.values():
        state["global_step"].fill_(301)
    exact = float(shared_numbers(optimizer)["global_exp_avg_sq"])
    saved = copy.deepcopy(optimizer.state_dict())
    for i, state in saved["state"].items():
        if i == 0 or not part:
            saved["state"][i] = {key: x.to(dtype) for key, x in state.items()}
    optimizer.load_state_dict(saved)
    before = float(saved["state"][int(part)]["global_step"])
    train(params, optimizer, range(3, 5))
    assert counts(optimizer, params[0])[1] == before + 2
    if part:
        saved["state"][0].pop("global_step")
        other = Ada2MS(params)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert float(saved["state"][1]["global_exp_avg_sq"]) == exact
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("options", IMPLEMENTATIONS, ids=str)
@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("when", [0, 2])
def test_a_model_that_becomes_double(when: int, scope: Any, options: dict[str, Any]) -> None:
    """In mid-run or before the first step: from there on it is trained in float64, as one that always was."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    params = list(model.parameters())
    optimizer = Ada2MS(params, scope=scope, lr=0.1, **options)
    train(params, optimizer, range(when))
    double = copy.deepcopy(model).double()
    reference = Ada2MS(double.parameters(), scope=scope, lr=0.1, **options)
    if when:
        reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    model.double()
    train(params, optimizer, range(when, 5))
    train(list(double.parameters()), reference, range(when, 5))
    for p, q in zip(params, double.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-14, atol=0)
        for key, x in optimizer.state[p].items():
            assert x.dtype == reference.state[q][key].dtype, key
        assert optimizer.state[p]["exp_avg_sq"].dtype == optimizer.state[p]["global_exp_avg_sq"].dtype == torch.float64


def test_a_layer_that_changes_its_type() -> None:
    """One layer to bfloat16 and back: its state stays float32, and the rest as it is."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    optimizer = Ada2MS(model.parameters())
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float32):
        model[1].to(dtype)
        train(list(model.parameters()), optimizer, range(2))
        wide = torch.promote_types(dtype, torch.float32)
        assert {optimizer.state[p]["exp_avg"].dtype for p in model[1].parameters()} == {wide}
        assert {optimizer.state[p]["exp_avg"].dtype for p in model[0].parameters()} == {torch.float32}
        assert shared_numbers(optimizer)["global_exp_avg_sq"].dtype == wide
    assert shared_numbers(optimizer)["global_step"] == 8


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("way", ["live", "state dict", "state dict without scope", "unpickled"])
@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_a_scope_that_is_changed(scope: Any, way: str, groups: int) -> None:
    """Each tensor's s is then the mean of its v, and the model's the mean of theirs, by their entries: what they would
    be after the same steps with the other scope, as long as every gradient is there.
    """
    other = "tensor" if scope == "model" else "model"
    runs: list[tuple[list[nn.Parameter], Any]] = []
    for start in (scope, other):
        params = parameters(torch.float64)
        given: Any = [{"params": [p]} for p in params] if groups == 2 else params
        optimizer = Ada2MS(given, scope=start, lr=0.1)
        train(params, optimizer, range(4))
        runs.append((params, optimizer))
    (params, optimizer), (references, reference) = runs
    with torch.no_grad():
        for p, q in zip(params, references, strict=True):
            p.copy_(q)
    given = [{"params": [p]} for p in params] if groups == 2 else params
    if way == "live":
        for group in optimizer.param_groups:
            group["scope"] = other
    elif way == "unpickled":
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer = Ada2MS(given, scope=other, lr=0.1)
        for group in saved["param_groups"]:
            group["scope"] = other
        optimizer.load_state_dict(saved)
        optimizer.__setstate__(optimizer.__getstate__())
    else:
        saved = copy.deepcopy(optimizer.state_dict())
        for group in saved["param_groups"]:
            group["scope"] = other
            if way.endswith("without scope"):
                del group["scope"]
        optimizer = Ada2MS(given, scope=other, lr=0.1)
        optimizer.load_state_dict(saved)
    with torch.no_grad():  # v does not depend on the scope
        train(params, optimizer, range(4, 6))
    train(references, reference, range(4, 6))
    for p, q in zip(params, references, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=0)
    for p, q in zip(params, references, strict=True):
        torch.testing.assert_close(optimizer.state[p], reference.state[q], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["scope", "nonfinite", "max_norm"])
def test_groups_that_come_to_differ(name: str) -> None:
    """In what is the optimizer's: an error that says so, before anything changes."""
    params = parameters()
    optimizer = Ada2MS([{"params": [p]} for p in params])
    train(params, optimizer, range(2))
    before = copy.deepcopy((params, optimizer.state_dict()["state"]))
    other = {"scope": "tensor", "nonfinite": "skip", "max_norm": 0.5}[name]
    optimizer.param_groups[1][name] = other
    with pytest.raises(ValueError, match=f"Invalid {name}: {other!r} of group 1 \\(must be that of group 0"):
        train(params, optimizer, range(2, 3))
    torch.testing.assert_close((params, optimizer.state_dict()["state"]), before, rtol=0, atol=0)


@pytest.mark.parametrize("steps", [0, 2])
def test_a_model_that_is_converted_by_swapping_tensors(steps: int) -> None:
    """As `Module.to` does for subclasses of tensors, and for all on request: nothing may refer to them weakly."""
    found = []
    for swap in (False, True):
        model = torch.nn.ParameterList(parameters(torch.float64))
        optimizer = Ada2MS(model.parameters(), lr=0.1)
        train(list(model), optimizer, range(steps))
        optimizer.zero_grad()
        torch.__future__.set_swap_module_params_on_conversion(swap)
        try:
            model.float()
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        train(list(model), optimizer, range(steps, 4))
        found.append((list(model), [optimizer.state[p] for p in model]))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    "adaptivity",
    [core.Constant(0.5), core.Linear(1, 0, 9), core.Cosine(1, 0, 9), core.Exponential(1, 0, 2.5)],
    ids=str,
)
def test_live_groups_are_saved_with_their_schedules(adaptivity: Any) -> None:
    """As Lightning's BaseFinetuning, SAM and torch's ZeroRedundancyOptimizer do."""
    optimizer = Ada2MS(parameters(), adaptivity=adaptivity)
    (group,) = saved_and_loaded([{k: x for k, x in group.items() if k != "params"} for group in optimizer.param_groups])
    assert group["adaptivity"] == adaptivity
    assert Ada2MS([{**group, "params": parameters()}]).param_groups[0]["adaptivity"] == adaptivity


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters:UserWarning")
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("foreach", [False, True])
def test_a_parameter_that_is_listed_twice(foreach: bool, capturable: bool) -> None:
    """At adaptivity 1, AdamW's steps: one by one in the for-loop, both of the last count with foreach."""
    trained = []
    for make in (Ada2MS, torch.optim.AdamW):
        p, q = parameters(torch.float64)
        options: Any = {"adaptivity": 1.0} if make is Ada2MS else {}
        optimizer = make([p, q, p, p], lr=0.1, foreach=foreach, **options)
        if make is Ada2MS and capturable:
            optimizer.param_groups[0]["capturable"] = True
        train([p, q], optimizer, range(5))
        trained.append([p.detach(), q.detach()])
    torch.testing.assert_close(*trained, rtol=1e-12, atol=1e-13)
