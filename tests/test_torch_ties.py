"""Which parameters share s and k, after what people do to groups, state and state dicts: as the rule has it, and as a
run without the treatment.
"""

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch_support import KEYS, K, S, pair, parameter, shared, train

from ada2ms import core
from ada2ms.torch import Ada2MS, export_state


def as_the_rule(b2s: tuple[float, ...], edit: Callable[[Ada2MS, Any], None], *, tensors: bool = False) -> None:
    """Three steps, a treatment of both, three steps: parameters and s as `core.Ada2MS` has them."""
    params = [parameter(n) for n in (3, 4, 5)[: len(b2s)]]
    arrays = [p.detach().numpy().copy() for p in params]
    rule = core.Ada2MS([{"params": [x], "b2": b2} for x, b2 in zip(arrays, b2s, strict=True)], lr=0.1)
    betas: list[Any] = [(0.9, b2) for b2 in b2s]
    if tensors:
        betas = [tuple(torch.tensor(x, dtype=torch.float64) for x in some) for some in betas]
    groups = [{"params": [p], "betas": b} for p, b in zip(params, betas, strict=True)]
    optimizer = Ada2MS(groups, lr=0.1, foreach=False)
    for step in range(6):
        if step == 3:
            edit(optimizer, rule)
        train(optimizer, range(step, step + 1), params)
        rule.step([p.grad.numpy() for p in params])
    for p, x, group in zip(params, arrays, rule.groups, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), x, rtol=1e-12)
        assert shared(optimizer, p)[0] == pytest.approx(group.global_exp_avg_sq[0], rel=1e-12)


def set_b2(rule: Any, i: int, b2: float) -> None:
    rule.groups[i].hyper = core.Hyperparameters(**{**vars(rule.groups[i].hyper), "b2": b2})


@pytest.mark.parametrize("i", [0, 1])
def test_a_b2_tensor_that_is_written_to(i: int) -> None:
    def edit(optimizer: Ada2MS, rule: Any) -> None:
        optimizer.param_groups[i]["betas"][1].fill_(0.9)
        set_b2(rule, i, 0.9)

    as_the_rule((0.999, 0.999), edit, tensors=True)


@pytest.mark.parametrize("b2s", [(0.999, 0.9), (0.9, 0.999)])
def test_groups_in_another_order(b2s: tuple[float, float]) -> None:
    """With others' b2 in their place: each goes on from its own s."""

    def edit(optimizer: Ada2MS, rule: Any) -> None:
        optimizer.param_groups.reverse()

    as_the_rule(b2s, edit)


def test_b2s_that_meet_and_part() -> None:
    def edit(optimizer: Ada2MS, rule: Any) -> None:
        for i, b2 in enumerate((0.8, 0.8, 0.7)):
            optimizer.param_groups[i]["betas"] = (0.9, b2)
            set_b2(rule, i, b2)

    as_the_rule((0.999, 0.9, 0.9), edit)


def no_state(optimizer: Ada2MS) -> None:
    optimizer.state.clear()


def new_state(optimizer: Ada2MS) -> None:
    optimizer.state = defaultdict(dict)


@pytest.mark.parametrize("reset", [no_state, new_state])
@pytest.mark.parametrize("empty", ["from the start", "later"])
@pytest.mark.parametrize("first", [True, False])
def test_a_reset_beside_an_empty_group(first: bool, empty: str, reset: Any) -> None:
    p, q = parameter(3), parameter(50)
    groups: Any = [{"params": [q] if empty == "later" else []}, {"params": [p]}]
    optimizer = Ada2MS(groups if first else groups[::-1], adaptivity=0.0)
    train(optimizer, range(9))
    optimizer.param_groups[0 if first else 1]["params"].clear()
    reset(optimizer)
    new = copy.deepcopy(p)
    fresh = Ada2MS([new], adaptivity=0.0)
    for o in (optimizer, fresh):
        train(o, range(2), scale=0.01)
    torch.testing.assert_close(p, new, rtol=0, atol=0)
    torch.testing.assert_close(optimizer.state[p], fresh.state[new], rtol=0, atol=0)


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("how", ["moved", "merged", "new dict"])
def test_parameters_that_come_to_a_group_of_another_b2(how: str, where: int) -> None:
    """The group goes on with its own s, wherever in its list they are put; a new group with that of its b2."""
    p, q, r = parameter(3), parameter(4), parameter(2)
    optimizer = Ada2MS([{"params": [p, q]}, {"params": [r], "betas": (0.9, 0.9)}])
    train(optimizer, range(5))
    s = shared(optimizer, r)[0]
    first, second = optimizer.param_groups
    some = [first["params"].pop()] if how == "moved" else first["params"]
    second["params"][where:where] = some
    if how != "moved":
        optimizer.param_groups.pop(0)
    if how == "new dict":
        optimizer.param_groups[0] = dict(second)
    train(optimizer, range(5, 6))
    params = [x for group in optimizer.param_groups for x in group["params"]]
    mean = float(torch.cat([x.grad for x in params]).square().mean())
    assert shared(optimizer, r) == (pytest.approx(0.9 * s + 0.1 * mean), 6)
    assert optimizer.state[q][S] is optimizer.state[r][S]
    assert (optimizer.state[p][S] is optimizer.state[r][S]) == (how != "moved")


@pytest.mark.parametrize("b2", [0.999, 0.99])
def test_a_group_that_was_away(b2: float) -> None:
    """It takes the model's k, and its s_hat."""
    p, q, optimizer = pair(b2, adaptivity=core.Linear(1, 0, 20))
    train(optimizer, range(3))
    group = optimizer.param_groups.pop()
    train(optimizer, range(3, 8))
    s_hat = shared(optimizer, p)[0] / (1 - 0.999**8)
    optimizer.param_groups.append(group)
    train(optimizer, range(8, 9))
    mean = float(torch.cat([p.grad, q.grad]).square().mean())
    assert shared(optimizer, q) == (pytest.approx(b2 * s_hat * (1 - b2**8) + (1 - b2) * mean), 9)
    assert shared(optimizer, p)[1] == 9


def test_parts_of_two_checkpoints() -> None:
    p, q, optimizer = pair()
    train(optimizer, range(4))
    early = copy.deepcopy(optimizer.state_dict())
    train(optimizer, range(4, 10))
    late = optimizer.state_dict()
    late["state"][1] = early["state"][1]
    other = Ada2MS([{"params": [p]}, {"params": [q]}])
    other.load_state_dict(late)
    train(other, range(10, 11))
    assert shared(other, p)[1] == shared(other, q)[1] == 11


@pytest.mark.parametrize("source", ["AdamW", "Ada2MS"])
@pytest.mark.parametrize("again", [False, True])
def test_what_a_frozen_group_gathers_after_a_load(source: str, again: bool) -> None:
    """Its s, of its own b2, is there when it thaws, and in the state dict before."""
    p, q, optimizer = pair()
    groups = [{"params": [p]}, {"params": [q], "betas": (0.9, 0.9)}]
    first = optimizer if source == "Ada2MS" else torch.optim.AdamW(groups)
    train(first, range(5), [p])
    saved = copy.deepcopy(first.state_dict())
    saved["state"].pop(1, None)
    optimizer.load_state_dict(saved)
    s, k = shared(optimizer, p)[0], 5
    if source == "Ada2MS":  # s_hat is the model's
        s *= (1 - 0.9**5) / (1 - 0.999**5)
    for step in range(5, 10):
        train(optimizer, range(step, step + 1), [p] if step < 9 else None, scale=10.0)
        s, k = 0.9 * s + 0.1 * float(torch.cat([x.grad for x in (p, q) if x.grad is not None]).square().mean()), k + 1
        if again and step == 7:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = Ada2MS(groups)
            optimizer.load_state_dict(saved)
        exported = export_state({"p": p, "q": q}, optimizer).groups[1]
        assert (exported.global_exp_avg_sq, exported.global_step) == (pytest.approx(s), k)
    assert shared(optimizer, q) == (pytest.approx(s), k)


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("steps", [1, 30])
def test_adamw_in_between(scope: Any, steps: int) -> None:
    """S and k that AdamW's state dict carries along are not of now: a start as from AdamW."""
    named = {"p": parameter(3), "q": parameter(50)}
    params = list(named.values())
    optimizer = Ada2MS(params, scope=scope)
    train(optimizer, range(20), scale=0.01)
    adamw = torch.optim.AdamW(params)
    adamw.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(adamw, range(20, 20 + steps), params[1:])
    saved, plain = copy.deepcopy(adamw.state_dict()), copy.deepcopy(adamw.state_dict())
    for state in plain["state"].values():
        for key in KEYS:
            del state[key]
    resumed, reference = Ada2MS(params, scope=scope), Ada2MS(params, scope=scope)
    resumed.load_state_dict(saved)
    reference.load_state_dict(plain)
    for p in params:
        torch.testing.assert_close(resumed.state[p], reference.state[p], rtol=0, atol=0)
        assert resumed.state[p][K] == 20 + steps
    v = torch.cat([adamw.state[p]["exp_avg_sq"] for p in params])
    assert shared(resumed, params[0])[0] == pytest.approx(float((v if scope == "model" else v[:3]).mean()))
    exported = export_state(named, adamw)
    s = exported.groups[0].global_exp_avg_sq if scope == "model" else exported.parameters["p"].global_exp_avg_sq
    assert (s, exported.groups[0].global_step) == (pytest.approx(shared(resumed, params[0])[0]), 20 + steps)


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("way", ["live", "state dict", "without scope"])
def test_a_scope_that_is_changed_where_no_two_share_a_b2(way: str, add: bool, scope: Any) -> None:
    """As in test_a_scope_that_is_changed: v's means, or the mean of the tensors' s_hat."""
    other: Any = "tensor" if scope == "model" else "model"
    p, q, optimizer = pair(0.99, scope=scope)
    train(optimizer, range(4))
    b2s = {p: 0.999, q: 0.99}
    v = {x: float(optimizer.state[x]["exp_avg_sq"].mean()) for x in b2s}
    s_hat = sum(x.numel() * v[x] / (1 - b2**4) for x, b2 in b2s.items()) / 53
    expected = {x: s_hat * (1 - b2**4) if other == "model" else v[x] for x, b2 in b2s.items()}
    if way == "live":
        for group in optimizer.param_groups:
            group["scope"] = other
    else:
        saved = copy.deepcopy(optimizer.state_dict())
        for group in saved["param_groups"]:
            group["scope"] = other
            if way == "without scope":
                del group["scope"]
        p_, q_, optimizer = pair(0.99, scope=other)
        b2s, expected = {p_: 0.999, q_: 0.99}, dict(zip((p_, q_), expected.values(), strict=True))
        optimizer.load_state_dict(saved)
    params = list(b2s)
    if add:
        optimizer.add_param_group({"params": [parameter(7)]})
    train(optimizer, range(4, 5), params)
    mean = torch.cat([x.grad for x in params]).square().mean()
    for x, b2 in b2s.items():
        now = mean if other == "model" else x.grad.square().mean()
        assert shared(optimizer, x) == (pytest.approx(b2 * expected[x] + (1 - b2) * float(now), rel=1e-12), 5)


def halved(optimizer: Ada2MS) -> None:
    for state in optimizer.state.values():
        state["exp_avg_sq"] = state["exp_avg_sq"].half().double()


def same_b2(optimizer: Ada2MS) -> None:
    for group in optimizer.param_groups:
        group["betas"] = (0.9, 0.9)
    train_equal(optimizer, 1)


def train_equal(optimizer: Ada2MS, steps: int) -> None:
    for _ in range(steps):
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            p.grad = torch.full_like(p, 1e-4)
        optimizer.step()


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("treat", [halved, same_b2])
def test_a_state_dict_of_this_scope_is_not_converted(treat: Any, scope: Any) -> None:
    """However much the numbers look like those of the other one."""
    p, q, optimizer = pair(0.99, scope=scope)
    train_equal(optimizer, 5)
    treat(optimizer)
    before = [shared(optimizer, x) for x in (p, q)]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [shared(optimizer, x) for x in (p, q)] == before


@pytest.mark.parametrize("options", [{"nonfinite": "skip"}, {"scope": "tensor"}, {"max_norm": 0.5}], ids=str)
@pytest.mark.parametrize("say", [False, True])
def test_a_group_is_added_to_what_was_loaded(options: Any, say: bool) -> None:
    p = parameter(3)
    first = Ada2MS([p], **options)
    train(first, range(3))
    optimizer = Ada2MS([p])
    optimizer.load_state_dict(copy.deepcopy(first.state_dict()))
    optimizer.add_param_group({"params": [parameter(4)], **(options if say else {})})
    train(optimizer, range(3, 5))
    assert shared(optimizer, p)[1] == 5
    with pytest.raises(ValueError, match="must be the optimizer's"):
        optimizer.add_param_group(
            {"params": [parameter(5)], "scope": "model", "nonfinite": "propagate", "max_norm": None}
        )


@pytest.mark.parametrize(
    "bad", [{"scope": "tensor"}, {"nonfinite": "skip"}, {"max_norm": 0.5}, {"adaptivity": 2.0}], ids=str
)
def test_a_state_dict_that_is_refused_changes_nothing(bad: dict[str, Any]) -> None:
    _, _, optimizer = pair()
    train(optimizer, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    saved = copy.deepcopy(before)
    saved["param_groups"][0]["lr"] = 7.0
    saved["param_groups"][1].update(bad)
    saved["state"][0]["exp_avg"].fill_(9.0)
    with pytest.raises(ValueError, match=f"Invalid {next(iter(bad))}"):
        optimizer.load_state_dict(saved)
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    torch.testing.assert_close(optimizer.state_dict()["state"], before["state"], rtol=0, atol=0)
    train(optimizer, range(2, 3))


@pytest.mark.parametrize("other", [torch.optim.SGD, torch.optim.Adamax, torch.optim.RMSprop])
def test_the_state_of_an_optimizer_of_another_kind_is_refused(other: Any) -> None:
    _, _, optimizer = pair()
    groups = [{"params": group["params"]} for group in optimizer.param_groups]
    another = other(groups, **({"momentum": 0.9} if other is torch.optim.SGD else {}))
    train(another, range(2))
    before, saved = (copy.deepcopy(x.state_dict()) for x in (optimizer, another))
    with pytest.raises(ValueError, match=r"Invalid state_dict: it has \[.*\(must be of Ada2MS, AdamW or Adam\)"):
        optimizer.load_state_dict(saved)
    assert optimizer.state_dict() == before


@pytest.mark.parametrize("b2", [0.999, 0.9])
def test_a_derivative_through_a_later_start(b2: float) -> None:
    """Of a step's gradient, while a second parameter starts in the next step; against a finite difference."""

    def run(x: Tensor) -> Tensor:
        params = [torch.ones(n, dtype=torch.float64, requires_grad=True) for n in (3, 2)]
        groups = [{"params": params[:1]}, {"params": params[1:], "betas": (0.9, b2)}]
        optimizer = Ada2MS(groups, lr=0.1, adaptivity=0.0, differentiable=True, foreach=False)
        p, q = (p.clone() for p in params)
        for group, tensor in zip(optimizer.param_groups, (p, q), strict=True):
            group["params"] = [tensor]
        p.grad = x * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
        optimizer.step()
        p.grad, q.grad = x**2 * torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64), torch.ones_like(q)
        optimizer.step()
        return p.sum() + 2 * q.sum()

    with warnings.catch_warnings(action="ignore"):  # of torch, that .grad of no leaf is read
        assert torch.autograd.gradcheck(run, torch.tensor(1.3, dtype=torch.float64, requires_grad=True))


def test_tensors_stay_the_same_where_nothing_changes() -> None:
    """When another parameter starts, and a group is added; as torch.compile and CUDA graphs want it."""
    p, _, optimizer = pair()
    train(optimizer, range(1), [p])
    before = [optimizer.state[p][key] for key in KEYS]
    train(optimizer, range(1, 2))
    optimizer.add_param_group({"params": [parameter(4)]})
    train(optimizer, range(2, 3))
    assert all(optimizer.state[p][key] is x for key, x in zip(KEYS, before, strict=True))
