"""`param_groups`: parameters by name in torch's own groups; and states with groups, to torch and from it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch_support import assert_same, shared_numbers

from ada2ms import core
from ada2ms.core import NO_DECAY, Group, State, StateError, golden
from ada2ms.torch import Ada2MS, arguments, checkpoint, export_state, import_state, param_groups
from support import factors, has_one_group, named_groups


class Net(nn.Module):
    """An embedding that is tied to the head, a frozen layer, a normalisation and a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 4)
        self.frozen = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embed.weight
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.norm(self.frozen(self.embed(x))))
        return result


TOKENS = torch.arange(7)
GROUPS = [
    Group("embed", lr_scale=0.1, adaptivity=core.Linear(1, 0, 9)),
    Group(r"norm\.weight$", b2=0.9, eps=1e-6),
    NO_DECAY,
]


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        net(TOKENS).square().sum().mul(1 + step).backward()
        optimizer.step()


def names_of(net: nn.Module, groups: list[dict[str, Any]]) -> list[list[str]]:
    called = {p: name for name, p in net.named_parameters()}
    return [[called[p] for p in group["params"]] for group in groups]


def test_every_parameter_is_in_one_group() -> None:
    """The first that matches; tied ones once, frozen ones too; the rest first, without a key of its own."""
    net = Net()
    groups = param_groups(net, GROUPS, 0.01, (0.8, 0.99))
    assert names_of(net, groups) == [
        ["frozen.weight"],
        ["embed.weight"],
        ["norm.weight"],
        ["frozen.bias", "norm.bias", "head.bias"],
    ]
    own: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.99)}
    assert [{k: x for k, x in group.items() if k != "params"} for group in groups] == [
        own,
        {**own, "lr": 0.001, "adaptivity": core.Linear(1, 0, 9)},
        {**own, "betas": (0.8, 0.9), "eps": 1e-6},
        {**own, "weight_decay": 0.0},
    ]
    assert param_groups(dict(net.named_parameters()), GROUPS, 0.01, (0.8, 0.99)) == groups
    assert [sorted(group) for group in param_groups(net, [NO_DECAY])] == [["params"], ["params", "weight_decay"]]
    twice = {"first": net.norm.weight, "second": net.norm.weight}
    assert [len(group["params"]) for group in param_groups(twice, [Group("first", eps=0.1)])] == [1]
    assert names_of(net, param_groups(net, [])) == [[name for name, _ in net.named_parameters()]]


def test_groups_are_those_of_the_rule() -> None:
    """Two steps of all implementations against the rule in NumPy, which has the groups as they are here."""
    net = Net().double()
    optimizer = Ada2MS(param_groups(net, GROUPS, 0.01, (0.9, 0.999)), lr=0.5)  # what the groups have is theirs
    hyper = core.Hyperparameters(lr=0.01)
    params = [group["params"] for group in optimizer.param_groups]
    own = [hyper, *(group.of(hyper) for group in GROUPS)]
    arrays = [[p.detach().numpy().copy() for p in some] for some in params]
    rule = core.Ada2MS([{"params": xs, **vars(h)} for xs, h in zip(arrays, own, strict=True)])
    for step in range(3):
        train(net, optimizer, range(step, step + 1))
        rule.step([None if p.grad is None else p.grad.numpy() for some in params for p in some])
    for p, x in zip((p for some in params for p in some), (x for some in arrays for x in some), strict=True):
        np.testing.assert_allclose(p.detach().numpy(), x, rtol=1e-13)


def test_no_decay_is_what_people_write() -> None:
    """As two lists of parameters by their dimensions."""
    nets = [Net(), Net()]
    params = list(nets[1].parameters())
    by_hand: Any = [
        {"params": [p for p in params if p.ndim > 1]},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizers = [Ada2MS(param_groups(nets[0], [NO_DECAY]), weight_decay=0.3), Ada2MS(by_hand, weight_decay=0.3)]
    for net, optimizer in zip(nets, optimizers, strict=True):
        train(net, optimizer, range(3))
    assert_same(list(nets[0].parameters()), list(nets[1].parameters()), 0)


@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)], ids=str)
def test_schedulers_keep_the_factor(lr: Any) -> None:
    net = Net()
    optimizer = Ada2MS(param_groups(net, [Group("embed", lr_scale=0.1)], lr))
    scheduler = lr_scheduler.LinearLR(optimizer, 1.0, 0.2, total_iters=4)
    for step in range(3):
        train(net, optimizer, range(step, step + 1))
        scheduler.step()
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        assert rates[1] == pytest.approx(0.1 * rates[0])
    assert rates[0] == pytest.approx(0.004)


def test_what_is_refused() -> None:
    net = Net()
    for groups, options, message in (
        ([Group("embed", lr_scale=0.1)], {}, r"Invalid lr: None \(must be the optimizer's, since groups\[0\]"),
        ([NO_DECAY, Group("embed", b1=0.8)], {}, r"Invalid betas: None \(must be the optimizer's, since groups\[1\]"),
        ([Group("emebd", weight_decay=0.0)], {}, r"Invalid groups\[0\]: Group\('emebd', .* has no parameter"),
        ([Group(r"head\.weight")], {}, r"Invalid groups\[0\]: .* \(it matches none of"),  # the tied one's other name
        ([NO_DECAY], {"lr": -1.0}, "Invalid learning rate: -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            param_groups(net, groups, **options)  # type: ignore[arg-type]
    for wrong in (NO_DECAY, [{"weight_decay": 0.0}], "bias"):
        with pytest.raises(TypeError, match=r"Invalid groups: .* \(must be a sequence of ada2ms\.core\.Group"):
            param_groups(net, wrong)  # type: ignore[arg-type]
    assert len(param_groups(net, [Group("embed", b1=0.8, b2=0.9)])[1]["betas"]) == 2


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        (0.9, r"Invalid betas: 0\.9 \(betas must be a pair"),
        ((0.9,), r"Invalid betas: \(0\.9,\) \(betas must be a pair"),
        ("ab", r"Invalid betas: 'ab' \(betas must be a pair"),
        ((0.9, 2.0), r"Invalid beta parameter at index 1: 2\.0 \(betas\[1\] must be"),
    ],
)
def test_betas_are_those_of_an_optimizer(betas: Any, message: str) -> None:
    for groups in ([NO_DECAY], [Group("embed", b1=0.8)]):
        with pytest.raises(ValueError, match=message):
            param_groups(Net(), groups, betas=betas)


def test_a_model_is_a_module_or_parameters_by_name() -> None:
    """And has shapes: a lazy layer's weight would pass for a vector."""
    net = Net()
    for wrong in (net.named_parameters(), list(net.parameters()), None, dict(net.named_modules())):
        for use in (
            lambda wrong: param_groups(wrong, [NO_DECAY]),
            lambda wrong: export_state(wrong, Ada2MS(net.parameters())),
            lambda wrong: import_state(wrong, Ada2MS(net.parameters()), State({}, [])),
        ):
            with pytest.raises(TypeError, match=r"Invalid model: .* \(must be a torch\.nn\.Module, or a mapping"):
                use(wrong)
    lazy = nn.Sequential(nn.Linear(2, 3), nn.LazyLinear(4))
    with pytest.raises(ValueError, match=r"Invalid model: '1\.weight' has no shape yet"):
        param_groups(lazy, [NO_DECAY])
    lazy(torch.ones(1, 2))
    assert names_of(lazy, param_groups(lazy, [NO_DECAY])) == [["0.weight", "1.weight"], ["0.bias", "1.bias"]]


def test_one_cycle_takes_a_rate_for_each_group() -> None:
    """As the docstring says; one rate for all would be every group's."""
    optimizer = Ada2MS(param_groups(Net(), [Group("embed", lr_scale=0.1)], 0.01))
    rates = [group["lr"] for group in optimizer.param_groups]
    scheduler = lr_scheduler.OneCycleLR(optimizer, rates, total_steps=9)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
        assert optimizer.param_groups[1]["lr"] == pytest.approx(0.1 * optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("case", [case for case in golden.load() if not has_one_group(case)], ids=lambda case: case.id)
def test_golden_vectors_by_names(case: golden.Case) -> None:
    """Those whose learning rates are in a constant proportion, as groups by name; by what has no name they are replayed
    in tests/test_trajectories.py.
    """
    if case.compensated or factors(case) is None:
        pytest.skip("tests/test_trajectories.py replays it")
    count = sum(len(group.params) for group in case.groups)
    names = [f"p{i}" for i in range(count)]
    base, groups = named_groups(case, names)
    given = [p for group in case.groups for p in group.params]
    named = {name: torch.tensor(p).requires_grad_() for name, p in zip(names, given, strict=True)}
    betas = base.pop("b1"), base.pop("b2")
    rates = case.groups[0].lr
    made = param_groups(named, groups, 1.0, betas)
    optimizer = Ada2MS(made, **base, scope=case.scope, nonfinite=case.nonfinite, max_norm=case.max_norm)
    scales = [group["lr"] for group in optimizer.param_groups]
    for i, gradients in enumerate(case.gradients):
        for group, scale in zip(optimizer.param_groups, scales, strict=True):
            group["lr"] = rates[i] * scale
        for p, g in zip(named.values(), gradients, strict=True):
            p.grad = None if g is None else torch.tensor(g)
        optimizer.step()
        for at in case.expected:
            expected = [x for group in at.groups for x in group.params]
            for p, x, p0 in zip(named.values(), expected, given, strict=True) if at.step == i + 1 else ():
                error = np.abs((p.detach().numpy() - p0) - (x - p0)).max(initial=0)
                assert error <= 1e-12 * np.abs(x - p0).max(initial=0) + 1e-16 * np.abs(p0).max(initial=0)


# States with groups.


def as_the_trainer(net: nn.Module, decay: float = 0.1) -> list[dict[str, Any]]:
    """The groups that Hugging Face's Trainer makes: parameters that decay, and biases and normalisations, which do not;
    trainable ones, without names.
    """
    skipped = {
        f"{path}.{name}" for path, x in net.named_modules() if isinstance(x, nn.LayerNorm) for name in ("weight",)
    }
    decays = [name for name, p in net.named_parameters() if "bias" not in name and name not in skipped]
    trainable = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in trainable if name in decays], "weight_decay": decay},
        {"params": [p for name, p in trainable if name not in decays], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("file", [False, True])
def test_the_trainers_groups_go_round(file: bool, tmp_path: Path) -> None:
    """To a state and back into an optimizer of its arguments, with the same groups; sums are in another order."""
    net, other = Net().double(), Net().double()
    optimizer = Ada2MS(as_the_trainer(net), lr=0.01, max_norm=0.5, scope="model", adaptivity=0.25)
    train(net, optimizer, range(3))
    state = export_state(net, optimizer)
    assert state.max_norm == 0.5
    if file:
        state.save(tmp_path / "state.safetensors")
        state = State.load(tmp_path / "state.safetensors")
    options = arguments(state)
    groups = options.pop("groups")
    assert [group.weight_decay for group in groups] == [0.1]  # three parameters do not decay, and one does
    assert (options["weight_decay"], options["max_norm"], options["adaptivity"]) == (0.0, 0.5, 0.25)
    for p in other.frozen.parameters():
        p.requires_grad_(False)
    named = {name: p for name, p in other.named_parameters() if p.requires_grad}
    resumed = Ada2MS(param_groups(named, groups, options["lr"], options["betas"]), **options)
    import_state(other, resumed, state)
    for some, o in ((net, optimizer), (other, resumed)):
        train(some, o, range(3, 6))
    assert_same(list(net.parameters()), list(other.parameters()), 1e-13)
    by_decay = {
        group["weight_decay"]: set(names)
        for group, names in zip(resumed.param_groups, names_of(other, resumed.param_groups), strict=True)
    }
    assert by_decay == {0.0: {"norm.weight", "norm.bias", "head.bias"}, 0.1: {"embed.weight"}}


def test_groups_of_every_hyperparameter_go_round() -> None:
    """Learning rates as factors; betas, whose s go with them; schedules of the adaptivity."""
    net, other = Net(), Net()
    optimizer = Ada2MS(param_groups(net, GROUPS, 0.01, (0.9, 0.99)), weight_decay=0.2)
    train(net, optimizer, range(3))
    state = export_state(net, optimizer)
    options = arguments(state)
    resumed = Ada2MS(param_groups(other, options.pop("groups"), options["lr"], options["betas"]), **options)
    import_state(other, resumed, state)
    assert {tuple(sorted(names)) for names in names_of(other, resumed.param_groups)} == {
        tuple(sorted(names)) for names in names_of(net, optimizer.param_groups)
    }
    for some, o in ((net, optimizer), (other, resumed)):
        train(some, o, range(3, 6))
    assert_same(list(net.parameters()), list(other.parameters()), 1e-6)  # 0.01 * 0.1 is divided by 0.01
    assert shared_numbers(resumed)["global_step"] == 6


def test_groups_under_other_names() -> None:
    """Through `names`, as `import_state` has them; of a function the names cannot be told."""
    net = Net()
    optimizer = Ada2MS(as_the_trainer(net), lr=0.01)
    train(net, optimizer, range(1))
    state = export_state(net, optimizer, names=lambda name: f"model/{name.replace('.', '/')}")
    names = {name: f"model/{name.replace('.', '/')}" for name, p in net.named_parameters() if p.requires_grad}
    options = arguments(state, names)
    trainable = {name: p for name, p in net.named_parameters() if p.requires_grad}
    made = param_groups(trainable, options["groups"])
    assert {tuple(names) for names in names_of(net, made)} == {
        ("embed.weight",),
        ("norm.weight", "norm.bias", "head.bias"),
    }
    with pytest.raises(StateError, match="names is a function"):
        arguments(state, lambda name: f"model/{name.replace('.', '/')}")


def test_a_checkpoint_of_a_state_with_groups(tmp_path: Path) -> None:
    """As a state dict that torch loads: `max_norm` only where it is on, and no factor of a learning rate."""
    net = Net()
    for max_norm in (None, 0.5):
        optimizer = Ada2MS(param_groups(net, GROUPS, 0.01, (0.9, 0.99)), max_norm=max_norm)
        train(net, optimizer, range(2))
        state = export_state(net, optimizer)
        state.groups[0].hyper["lr_scale"] = 0.1  # as Keras and Optax say it
        checkpoint.write(state, tmp_path / "state.pt")
        saved = torch.load(tmp_path / "state.pt", weights_only=True)["optimizer"]
        assert [group.get("max_norm") for group in saved["param_groups"]] == [max_norm] * 4
        assert all(("max_norm" in group) == (max_norm is not None) for group in saved["param_groups"])
        assert not any("lr_scale" in group for group in saved["param_groups"])
        named = [p for group in optimizer.param_groups for p in group["params"]]
        again = Ada2MS([{"params": group["params"]} for group in optimizer.param_groups])
        again.load_state_dict(saved)
        assert [again.state[p]["exp_avg"].equal(optimizer.state[p]["exp_avg"]) for p in named if p.requires_grad] == [
            True
        ] * 4
        assert again.param_groups[0].get("max_norm") == max_norm
