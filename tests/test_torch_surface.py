"""Around the step: schedulers, changes by the user, meta and fake tensors, and what must not wait for a device."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import lr_scheduler
from torch.utils._pytree import tree_leaves
from torch_support import Operations, Waits, shared_numbers

from ada2ms import core
from ada2ms.torch import Ada2MS

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=20),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=20),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 20),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 20),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=9),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)], o
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.05, 2),
}


def parameter(device: str = "cpu") -> nn.Parameter:
    return nn.Parameter(torch.linspace(1, 2, 3, dtype=torch.float64, device=device))


def gradient(step: int) -> Tensor:
    return torch.sin(torch.arange(3, dtype=torch.float64) + step)


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")  # torch 2.6's SequentialLR
@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_learning_rate_schedulers(name: str, tensor: bool) -> None:
    """At adaptivity 1, with the scheduler that AdamW has (some change betas too), learning rates and parameters are
    AdamW's; with the learning rate in a tensor too, which schedulers write to. Half-way, both are loaded elsewhere.
    """
    trained = []
    for make in (Ada2MS, torch.optim.AdamW):
        p = parameter()
        options: Any = {"adaptivity": 1} if make is Ada2MS else {}

        def new(p: nn.Parameter, make: Any = make, options: Any = options) -> tuple[Any, Any]:
            optimizer = make([p], lr=torch.tensor(0.1, dtype=torch.float64) if tensor else 0.1, **options)
            return optimizer, SCHEDULERS[name](optimizer)

        optimizer, scheduler = new(p)
        rates = []
        for step in range(8):
            if step == 4:
                saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
                optimizer, scheduler = new(p)
                scheduler.load_state_dict(saved[1])
                optimizer.load_state_dict(saved[0])
            p.grad = gradient(step)
            optimizer.step()
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            lr = optimizer.param_groups[0]["lr"]  # in torch 2.6, some schedulers replace a tensor by a number
            rates.append((float(lr), type(lr)))
        trained.append((p.detach(), rates))
    assert trained[0][1] == trained[1][1]
    assert trained[0][1][-1][0] != 0.1
    torch.testing.assert_close(trained[0][0], trained[1][0], rtol=1e-13, atol=0)


@pytest.mark.parametrize("bad", [1.5, -0.1, float("nan"), "half", None, True, torch.tensor(1.5), lambda count: 2.0])
def test_an_adaptivity_that_is_changed_for_a_bad_one(bad: Any) -> None:
    """An error at the next step, before anything has changed, in the group before it too; then it may be mended."""
    params = [parameter(), parameter()]
    optimizer = Ada2MS([{"params": params[:1]}, {"params": params[1:]}])
    for p in params:
        p.grad = gradient(0)
    optimizer.step()
    optimizer.param_groups[1]["adaptivity"] = bad
    before = copy.deepcopy((params, [optimizer.state[p] for p in params], optimizer.param_groups[0]))
    with pytest.raises((TypeError, ValueError), match="Invalid adaptivity"):
        optimizer.step()
    after = (params, [optimizer.state[p] for p in params], optimizer.param_groups[0])
    for x, y in zip(tree_leaves(before), tree_leaves(after), strict=True):
        assert torch.equal(x, y) if isinstance(x, Tensor) else x == y
    optimizer.param_groups[1]["adaptivity"] = 0.25
    optimizer.step()
    assert shared_numbers(optimizer, 1)["global_step"] == 2


def test_a_closure_has_gradients_whatever_is_around_it() -> None:
    p = parameter()
    optimizer = Ada2MS([p])

    def closure() -> float:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss.item()

    before = p.square().sum().item()
    with torch.no_grad():
        assert optimizer.step(closure) == before
        assert not torch.is_grad_enabled()
    assert p.square().sum() < before


def test_differentiable_through_a_model() -> None:
    """Steps of a `functional_call`: the derivative of the loss by the learning rate, against a finite difference."""
    model = nn.Linear(3, 1).double()
    x = torch.linspace(-1, 2, 6, dtype=torch.float64).reshape(2, 3)
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}

    def loss_after(lr: Tensor) -> Tensor:
        params = {name: p.clone().requires_grad_() for name, p in initial.items()}
        params = {name: p.clone() for name, p in params.items()}  # no leaves, as in meta-learning
        optimizer = Ada2MS(list(params.values()), lr=lr, differentiable=True)

        def loss() -> Tensor:
            return torch.func.functional_call(model, params, (x,)).square().sum()

        for _ in range(3):
            for p, g in zip(
                params.values(), torch.autograd.grad(loss(), list(params.values()), create_graph=True), strict=True
            ):
                p.grad = g
            optimizer.step()
        return loss()

    assert torch.autograd.gradcheck(loss_after, torch.tensor(0.1, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize(
    "options", [{}, {"foreach": True}, {"foreach": False, "scope": "tensor", "max_norm": 1.0}], ids=str
)
def test_on_the_meta_device_a_step_has_only_shapes(options: dict[str, Any]) -> None:
    """As AdamW's, where tools count memory so: the state is made, of the right shapes."""
    p = parameter("meta")
    p.grad = torch.empty_like(p)
    optimizer = Ada2MS([p], **options)
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].is_meta
    assert optimizer.state[p]["exp_avg"].shape == p.shape


def test_fused_on_the_meta_device_is_the_error_of_torch() -> None:
    """In torch's words."""
    model, errors = nn.Linear(3, 2, device="meta"), []
    for make in (torch.optim.AdamW, Ada2MS):
        optimizer = make(model.parameters(), fused=True)
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        with pytest.raises(RuntimeError, match="`fused=True` requires all the params to be floating point") as caught:
            optimizer.step()
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


@pytest.mark.parametrize(
    "options", [{}, {"foreach": True}, {"fused": True}, {"nonfinite": "skip"}, {"max_norm": 1.0}], ids=str
)
def test_fake_tensors(options: dict[str, Any]) -> None:
    """Which torch's tools train with to foresee memory and time: a step reads no value."""
    with FakeTensorMode():
        model = nn.Linear(3, 4)
        optimizer = Ada2MS(model.parameters(), **options)
        for _ in range(2):
            model(torch.ones(2, 3)).sum().backward()
            optimizer.step()
    assert optimizer.state[model.weight]["exp_avg"].shape == (4, 3)


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(
    ("options", "adaptivity"),
    [
        ({}, 0.3),  # a schedule is given the count as a number then, which is on the host; a fake one cannot be read
        ({"nonfinite": "skip"}, core.Cosine(1, 0, 5)),
        ({"nonfinite": "skip"}, 0.0),
        ({"capturable": True}, core.Linear(1, 0, 5)),
        ({"lr": 0.1}, 0.3),
        ({"amp": True}, 0.3),
        ({"max_norm": 1.0}, 0.3),
        ({"max_norm": 1.0, "nonfinite": "skip"}, 0.0),
        ({"max_norm": 1.0, "capturable": True}, core.Linear(1, 0, 5)),
        ({"max_norm": 1.0, "amp": True}, 0.3),
    ],
    ids=str,
)
def test_a_step_waits_for_no_device(options: dict[str, Any], adaptivity: Any, foreach: bool, scope: Any) -> None:
    """On CUDA, seen by fake tensors, which need none: nothing is read from the device and nothing copied to it."""
    options = dict(options)
    amp, tensor = options.pop("amp", False), options.pop("lr", None)
    with FakeTensorMode():
        kind: Any = {"device": "cuda"}
        params = [nn.Parameter(torch.ones(shape, **kind)) for shape in ((3, 4), (), (5,), (0,))]
        groups = [{"params": params[:2]}, {"params": params[2:], "betas": (0.8, 0.9)}]
        optimizer: Any = Ada2MS(groups, adaptivity=adaptivity, foreach=foreach, scope=scope, **options)
        if tensor:
            for group in optimizer.param_groups:
                group.update(lr=torch.ones((), **kind), capturable=True)
        if amp:  # which GradScaler hands over only to a fused step
            for group in optimizer.param_groups:
                group["fused"] = True
            optimizer.grad_scale, optimizer.found_inf = torch.ones(1, **kind), torch.zeros(1, **kind)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        with Waits() as waits:
            optimizer.step()
            assert optimizer.grad_norm.device.type == "cuda"
    assert waits.operations > 5
    assert waits.found == []


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize(
    "options",
    [
        {"capturable": True},
        {"capturable": True, "adaptivity": core.Linear(1, 0, 5)},
        {"capturable": True, "max_norm": 1.0},
    ],
    ids=str,
)
def test_counts_on_the_device_cost_no_operation_for_each_tensor(options: dict[str, Any], scope: Any) -> None:
    counts = []
    for tensors in (3, 30):
        params = [nn.Parameter(torch.ones(3, 4)) for _ in range(tensors)]
        optimizer = Ada2MS(params, scope=scope, foreach=True, **options)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        with Operations() as operations:
            optimizer.step()
        counts.append(operations.found)
    assert counts[0] == counts[1]
