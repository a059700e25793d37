"""The numbers that parameters share (s, k, skipped steps): whatever people do to groups and state, there is one each.

What a run should be is told by runs without the treatment, by the NumPy rule, and by AdamW.
"""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch_support import saved_and_loaded, shared_numbers

from ada2ms import core
from ada2ms.torch import Ada2MS, export_state, import_state

KEYS = ("global_exp_avg_sq", "global_step", "skipped")
BEFORE = Path(__file__).parent / "data" / "torch-state-in-groups.pt"  # of the version that had s and k in the groups


def parameters(n: int = 4) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(i + 2, generator=generator)) for i in range(n)]


def train(optimizer: torch.optim.Optimizer, steps: range, params: list[nn.Parameter] | None = None) -> None:
    """Gradients that depend on the step and the parameter's size, for these parameters, or all."""
    for step in steps:
        optimizer.zero_grad()
        for p in params or [p for group in optimizer.param_groups for p in group["params"]]:
            generator = torch.Generator().manual_seed(100 * step + p.numel())
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        optimizer.step()


def assert_tied(optimizer: Ada2MS, *indices: int) -> None:
    """One tensor for all parameters of these groups (by default all), and nothing of it in the groups."""
    groups = [optimizer.param_groups[i] for i in indices] if indices else optimizer.param_groups
    states = [optimizer.state[p] for group in groups for p in group["params"] if optimizer.state.get(p)]
    for key in KEYS:
        assert len({id(state[key]) for state in states}) == 1
    assert not any(key in group for group in optimizer.param_groups for key in KEYS)


def assert_equal(left: Ada2MS, right: Ada2MS) -> None:
    """Parameters and state, bit for bit."""
    for p, q in zip(*([p for g in o.param_groups for p in g["params"]] for o in (left, right)), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)
        torch.testing.assert_close(left.state[p], right.state[q], rtol=0, atol=0)


def halves(params: list[nn.Parameter], **options: Any) -> list[dict[str, Any]]:
    return [{"params": params[:2], **options}, {"params": params[2:], **options}]


def uninterrupted(steps: int, **options: Any) -> Ada2MS:
    optimizer = Ada2MS(halves(parameters()), **options)
    train(optimizer, range(steps))
    return optimizer


def test_a_group_made_from_anothers_dict() -> None:
    params = parameters()
    optimizer = Ada2MS(params[:2])
    for i in range(2, 4):
        optimizer.add_param_group({**optimizer.param_groups[0], "params": params[i : i + 1]})
    train(optimizer, range(5))
    assert_tied(optimizer)
    assert shared_numbers(optimizer)["global_step"] == 5
    for p, q in zip(params, (p for g in uninterrupted(5).param_groups for p in g["params"]), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


def test_a_schedule_runs_once_for_many_groups() -> None:
    given: list[int] = []
    optimizer = Ada2MS([{"params": [p]} for p in parameters()], adaptivity=lambda k: given.append(k) or 0.5)
    train(optimizer, range(3))
    assert given == [k for k in range(3) for _ in range(4)]


@pytest.mark.parametrize("cut", ["one into two", "two into one", "two into others"])
def test_groups_that_are_cut_otherwise_in_a_checkpoint(cut: str) -> None:
    params = parameters()
    first = Ada2MS(params if cut == "one into two" else halves(params), lr=0.1)
    train(first, range(3))
    saved = copy.deepcopy(first.state_dict())
    group = saved["param_groups"][0]
    sizes = {"one into two": [[0, 1], [2, 3]], "two into one": [[0, 1, 2, 3]], "two into others": [[0], [1, 2, 3]]}[cut]
    saved["param_groups"] = [{**group, "params": indices} for indices in sizes]
    copies = copy.deepcopy(params)
    resumed = Ada2MS([{"params": [copies[i] for i in indices]} for indices in sizes])
    resumed.load_state_dict(saved)
    train(resumed, range(3, 6))
    assert_tied(resumed)
    assert_equal(resumed, uninterrupted(6, lr=0.1))


@pytest.mark.parametrize("cut", ["in two", "into one"])
def test_groups_that_are_cut_or_joined_in_use(cut: str) -> None:
    optimizer = Ada2MS(halves(parameters()) if cut == "into one" else parameters(), lr=0.1)
    train(optimizer, range(3))
    if cut == "into one":
        optimizer.param_groups[0]["params"] += optimizer.param_groups.pop()["params"]
    else:
        group = optimizer.param_groups[0]
        optimizer.param_groups.append({**group, "params": [group["params"].pop() for _ in range(2)][::-1]})
    train(optimizer, range(3, 6))
    assert_tied(optimizer)
    assert_equal(optimizer, uninterrupted(6, lr=0.1))


def test_groups_are_the_callers_own() -> None:
    """A list of groups, or those of another optimizer, make a new optimizer, and stay as they are."""
    groups: Any = halves(parameters())
    before = [dict(group) for group in groups]
    used = Ada2MS(groups, lr=0.1)
    train(used, range(3))
    assert groups == before
    fresh = Ada2MS(groups, lr=0.1)
    assert not fresh.state
    again = Ada2MS(used.param_groups)
    train(again, range(1))
    assert shared_numbers(again)["global_step"] == 1
    assert shared_numbers(used)["global_step"] == 3


@pytest.mark.parametrize("which", ["all", "each", "one"])
@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_state_that_is_cleared(scope: Any, which: str) -> None:
    """Without any, the optimizer is a new one; a parameter that starts anew takes the model's s and k."""
    optimizer = Ada2MS(halves(parameters()), lr=0.1, scope=scope, adaptivity=core.Linear(1, 0, 9))
    params = [p for group in optimizer.param_groups for p in group["params"]]
    train(optimizer, range(3))
    fresh = Ada2MS(halves(copy.deepcopy(params)), lr=0.1, scope=scope, adaptivity=core.Linear(1, 0, 9))
    if which == "one":
        optimizer.state[params[1]].clear()
        train(optimizer, range(3, 4))
        assert_tied_counts(optimizer, [4, 1, 4, 4], 4)
        return
    if which == "all":
        optimizer.state.clear()
    for p in params if which == "each" else ():
        del optimizer.state[p]
    for o in (optimizer, fresh):
        train(o, range(3, 6))
    assert_equal(optimizer, fresh)


def assert_tied_counts(optimizer: Ada2MS, steps: list[int], k: int) -> None:
    states = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
    assert [int(state["step"]) for state in states] == steps
    assert len({id(state["global_step"]) for state in states}) == 1
    assert int(states[0]["global_step"]) == k


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("b2", [0.999, 0.9])
def test_a_group_that_starts_later(b2: float, tensor: bool) -> None:
    """It takes s and k of those with its b2, be that a number or a float32 tensor; else the model's s_hat and k."""
    params = parameters()
    optimizer = Ada2MS(params[:2])
    train(optimizer, range(5))
    s_hat = float(shared_numbers(optimizer)["global_exp_avg_sq"]) / (1 - 0.999**5)
    betas: Any = (torch.tensor(0.9), torch.tensor(b2)) if tensor else (0.9, b2)
    optimizer.add_param_group({"params": params[2:], "betas": betas})
    train(optimizer, range(5, 6))
    mean = float(torch.cat([p.grad for p in params]).square().mean())
    if b2 == 0.999:
        assert_tied(optimizer)
    for i, beta in enumerate((0.999, b2)):
        shared = shared_numbers(optimizer, i)
        expected = beta * s_hat * (1 - beta**5) + (1 - beta) * mean
        assert float(shared["global_exp_avg_sq"]) == pytest.approx(expected, rel=1e-5)
        assert shared["global_step"] == 6


def test_a_group_without_gradients_counts_the_steps_of_the_model() -> None:
    """As in the rule: its own s, of its own b2, from the model's first step; and across a checkpoint."""
    params = [nn.Parameter(p.detach().double()) for p in parameters()]
    groups: Any = [{"params": params[:2]}, {"params": params[2:], "betas": (0.9, 0.8)}]
    arrays = [p.detach().numpy().copy() for p in params]
    rule = core.Ada2MS([{"params": arrays[:2]}, {"params": arrays[2:], "b2": 0.8}], lr=0.1)
    optimizer = Ada2MS(groups, lr=0.1)
    for step in range(6):
        if step == 2:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = Ada2MS(groups, lr=0.1)
            optimizer.load_state_dict(saved)
        train(optimizer, range(step, step + 1), params if step >= 4 else params[:2])
        rule.step([None if p.grad is None else p.grad.numpy() for p in params])
    for p, x in zip(params, arrays, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), x, rtol=1e-13)


@pytest.mark.parametrize("edit", ["apart", "together", "all", "of one parameter's group"])
def test_betas_that_are_changed_in_mid_run(edit: str) -> None:
    """As in the rule, where every group goes on from the s that it has; before and after a checkpoint."""
    params = [nn.Parameter(p.detach().double()) for p in parameters()]
    b2s = [0.99, 0.9, 0.99]
    cuts = [slice(0, 1), slice(1, 2), slice(2, 4)]
    changed = {"apart": {2: 0.8}, "together": {0: 0.9}, "all": {0: 0.8, 1: 0.8, 2: 0.8}}.get(edit, {1: 0.7})
    arrays = [p.detach().numpy().copy() for p in params]
    rule = core.Ada2MS([{"params": arrays[c], "b2": b} for c, b in zip(cuts, b2s, strict=True)], lr=0.1)
    optimizer = Ada2MS([{"params": params[c], "betas": (0.9, b)} for c, b in zip(cuts, b2s, strict=True)], lr=0.1)
    for step in range(8):
        if step == 3:
            for i, b2 in changed.items():
                optimizer.param_groups[i]["betas"] = (0.9, b2)
                rule.groups[i].hyper = core.Hyperparameters(**{**vars(rule.groups[i].hyper), "b2": b2})
        if step == 6:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(optimizer, range(step, step + 1))
        rule.step([p.grad.numpy() for p in params])
    for p, x in zip(params, arrays, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), x, rtol=1e-12)
    for i, group in enumerate(rule.groups):
        shared = shared_numbers(optimizer, i)
        assert float(shared["global_exp_avg_sq"]) == pytest.approx(group.global_exp_avg_sq[0], rel=1e-12)
        assert shared["global_step"] == 8


WAYS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "torch.save": lambda x: saved_and_loaded(x, weights_only=False),
}


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("way", WAYS)
def test_copies_are_tied(way: str, scope: Any) -> None:
    optimizer = uninterrupted(3, scope=scope, nonfinite="skip")
    other = WAYS[way](optimizer)
    for o in (optimizer, other):
        train(o, range(3, 6))
    assert_equal(optimizer, other)
    if scope == "model":
        assert_tied(other)
    assert shared_numbers(other)["global_step"] is not shared_numbers(optimizer)["global_step"]


@pytest.mark.parametrize("untie", ["clone", "numbers", "float64"])
@pytest.mark.parametrize("live", [False, True])
def test_state_whose_copies_are_apart(untie: str, live: bool) -> None:
    """As helpers that move state, JSON and NumPy leave it, in the optimizer or in a state dict: tied again."""
    optimizer = uninterrupted(3)
    given: Any = {"state": optimizer.state} if live else optimizer.state_dict()
    for state in given["state"].values():
        for key, x in state.items():
            if untie == "clone":
                state[key] = x.clone()
            elif key in ("step", *KEYS):
                state[key] = float(x) if untie == "numbers" else x.double()
    if not live:
        optimizer.load_state_dict(given)
    train(optimizer, range(3, 6))
    assert_tied(optimizer)
    for p, q in zip((p for group in optimizer.param_groups for p in group["params"]), parameters_after(6), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=0)
    assert shared_numbers(optimizer)["global_step"] == 6


def test_copies_that_disagree() -> None:
    """Of a checkpoint that is older for some parameters: the most steps are the model's."""
    optimizer = uninterrupted(5)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0] |= {"global_step": torch.tensor(1.0), "global_exp_avg_sq": torch.tensor(0.0)}
    del saved["state"][3]
    other = Ada2MS(halves(parameters()))
    other.load_state_dict(saved)
    assert shared_numbers(other)["global_step"] == 5
    assert shared_numbers(other)["global_exp_avg_sq"] == shared_numbers(optimizer)["global_exp_avg_sq"]
    train(other, range(5, 6))
    assert_tied(other)
    assert shared_numbers(other)["global_step"] == 6


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_files_of_the_version_before(scope: Any) -> None:
    """State dicts with s and k in the groups, and whole optimizers that were pickled: on as that version went on."""
    found = torch.load(BEFORE, weights_only=True)[scope]
    for how in ("state dict", "pickle"):
        if how == "pickle":
            optimizer = pickle.loads(found["pickle"])
            params = [p for group in optimizer.param_groups for p in group["params"]]
        else:
            params = [nn.Parameter(p.clone()) for p in found["params"]]
            groups: Any = [{"params": params[:1]}, {"params": params[1:2], "betas": (0.9, 0.9)}, {"params": params[2:]}]
            optimizer = Ada2MS(groups, scope=scope)
            optimizer.load_state_dict(found["optimizer"])
        assert_tied(optimizer, 0, 2) if scope == "model" else None
        assert [int(shared_numbers(optimizer, i)[key]) for i in range(3) for key in KEYS[1:]] == [3, 1] * 3
        for step in range(4, 7):
            for i, p in enumerate(params):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
            optimizer.step()
        for p, q in zip(params, found["after"], strict=True):
            torch.testing.assert_close(p.detach(), q, rtol=1e-6, atol=1e-8)


def test_state_that_is_no_parameters() -> None:
    """As wrappers keep it: it comes back as it was."""
    optimizer = uninterrupted(2)
    optimizer.state["mine"] = {"x": torch.ones(2), "n": 3, "names": ["a"]}
    optimizer.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert optimizer.state["mine"]["n"] == 3
    assert torch.equal(optimizer.state["mine"]["x"], torch.ones(2))
    train(optimizer, range(2, 3))


def test_state_of_a_parameter_that_is_not_ours() -> None:
    """A wrapper that puts something beside a parameter, before its first step or later."""
    optimizer = Ada2MS(parameters())
    for p in optimizer.param_groups[0]["params"]:
        optimizer.state[p]["slow"] = p.detach().clone()
    train(optimizer, range(2))
    optimizer.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    train(optimizer, range(2, 4))
    assert all("slow" in optimizer.state[p] for p in optimizer.param_groups[0]["params"])
    for p, q in zip(optimizer.param_groups[0]["params"], parameters_after(4), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


def parameters_after(steps: int) -> list[Tensor]:
    return [p for group in uninterrupted(steps).param_groups for p in group["params"]]


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_adamw_by_either_way(scope: Any) -> None:
    """`load_state_dict` and `import_state` of AdamW's state give the same s, and k of as many steps."""
    params = dict(zip("abcd", parameters(), strict=True))
    adamw = torch.optim.AdamW(params.values())
    train(adamw, range(9))
    loaded, imported = (Ada2MS(params.values(), scope=scope) for _ in range(2))
    loaded.load_state_dict(adamw.state_dict())
    import_state(params, imported, export_state(params, adamw))
    for p in params.values():
        for key in KEYS:
            torch.testing.assert_close(loaded.state[p][key], imported.state[p][key], rtol=1e-6, atol=0)
        assert loaded.state[p]["global_step"] == 9


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_a_hand_off_before_a_parameters_first_update(scope: Any) -> None:
    """S and k travel although the second group has had no gradient."""
    params = parameters()
    named = dict(zip("abcd", params, strict=True))
    options: Any = {"scope": scope, "nonfinite": "skip"}
    groups: Any = [{"params": params[:2]}, {"params": params[2:], "betas": (0.9, 0.9)}]
    optimizer, other = Ada2MS(groups, **options), Ada2MS(groups, **options)
    train(optimizer, range(3), params[:2])
    state = export_state(named, optimizer)
    assert [group.global_step for group in state.groups] == [3, 3]
    import_state(named, other, state)
    again = export_state(named, other)
    assert [(g.global_exp_avg_sq, g.global_step) for g in again.groups] == [
        (g.global_exp_avg_sq, g.global_step) for g in state.groups
    ]


@pytest.mark.parametrize("later", ["new", "empty"])
def test_a_group_that_a_nested_distributed_checkpoint_does_not_know(later: str) -> None:
    """Or in which nothing has started: it takes the s and k of the groups with its b2."""
    sd = pytest.importorskip("torch.distributed.checkpoint.state_dict")

    def made(groups: str) -> tuple[nn.ModuleDict, Ada2MS]:
        torch.manual_seed(0)
        model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(2, 1), "c": nn.Linear(1, 1)})
        for p in model["c"].parameters():
            p.requires_grad = False
        return model, Ada2MS([{"params": model[name].parameters()} for name in groups])

    model, optimizer = made("abc" if later == "empty" else "ab")
    train(optimizer, range(6), [*model["a"].parameters(), *model["b"].parameters()])
    options = sd.StateDictOptions(strict=False)
    saved = copy.deepcopy(sd.get_optimizer_state_dict(model, optimizer, options=options))
    assert set(saved["state"]) == {"a.weight", "a.bias", "b.weight", "b.bias"}
    model, other = made("abc")
    sd.set_optimizer_state_dict(model, other, saved, options=options)
    assert shared_numbers(other)["global_step"] == 6
    assert shared_numbers(other)["global_exp_avg_sq"] == shared_numbers(optimizer)["global_exp_avg_sq"]
    train(other, range(6, 7))
    assert_tied(other)
    assert [int(other.state[p]["step"]) for p in model.parameters()] == [7] * 4 + [1] * 2
    assert shared_numbers(other, 2)["global_step"] == 7
