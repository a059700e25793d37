"""What torch checks of every optimizer of its own, over the inputs that torch's test tools give for AdamW.

Every check runs over AdamW too: what it passes, with options that both have (all but amsgrad), Ada2MS must pass.
"""

import functools
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch_generic_support import adamw, inputs, linear, same

from ada2ms.torch import Ada2MS
from support import place, require_device

pytestmark = pytest.mark.slow  # importing torch's test tools takes 10 s

COUNTS = ("step", "global_step", "skipped")
OptimizerClass = type[Optimizer]


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[AdamW, Ada2MS], ids=["AdamW", "Ada2MS"])
def optimizer_class(request: pytest.FixtureRequest) -> OptimizerClass:
    return request.param


def test_errors(optimizer_class: OptimizerClass) -> None:
    from torch.testing._internal.common_optimizers import OptimizerErrorEnum

    cases = adamw().optim_error_inputs_func(device="cpu", dtype=torch.float32)
    assert len(cases) >= 10
    for case in cases:
        given = case.optimizer_error_input
        assert case.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
        params = [nn.Parameter(torch.randn(1, 1))] if given.params is None else given.params
        expected = pytest.warns if issubclass(case.error_type, Warning) else pytest.raises
        with expected(case.error_type, match=case.error_regex):
            optimizer_class(params, **given.kwargs)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("with_scheduler", [False, True])
def test_goes_in_the_right_direction(
    optimizer_class: OptimizerClass, device: str, contiguous: bool, with_scheduler: bool
) -> None:
    require_device("torch", device)
    schedulers = adamw().scheduler_inputs if with_scheduler else [[]]
    for options in inputs(place("torch", device), "foreach", "fused"):
        if optimizer_class is AdamW and options["fused"] and not contiguous:
            continue  # torch's own is wrong on CPUs, and raises on CUDA, where strides differ; ours is tested
        for makers in schedulers:
            params, loss = linear(place("torch", device), contiguous=contiguous)
            optimizer = optimizer_class(params, **options)
            lr_schedulers = [make(optimizer) for make in makers]
            first = loss(optimizer).item()
            for _ in range(20):
                value = optimizer.step(functools.partial(loss, optimizer))
                for scheduler in lr_schedulers:
                    plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                    scheduler.step(*([value.detach()] if plateau else []))
            last = loss(optimizer).item()
            assert last > first if options.get("maximize") else last < first


@pytest.mark.parametrize("irrelevant", ["weight_decay", "lr"])
def test_options_of_a_group(optimizer_class: OptimizerClass, device: str, irrelevant: str) -> None:
    """One group without decay; one group that (almost) no learning rate leaves where it is."""
    require_device("torch", device)
    for options in inputs(place("torch", device), "foreach", "fused"):
        (weight, bias), loss = linear(place("torch", device))
        frozen = nn.Parameter(torch.randn(2, device=weight.device))
        before = frozen.detach().clone()
        if irrelevant == "lr":
            rest = {key: value for key, value in options.items() if key != "lr"}
            groups = [{"params": [weight, bias], "lr": options.get("lr", 1e-3)}, {"params": [frozen]}]
            optimizer = optimizer_class(groups, **{**rest, "lr": 1e-28})
        else:
            groups = [{"params": [weight], **options}, {"params": [bias, frozen], **options, "weight_decay": 0.0}]
            optimizer = optimizer_class(groups)
        first = loss(optimizer).item()
        for _ in range(20):
            loss(optimizer)
            frozen.grad = torch.rand_like(frozen) if irrelevant == "lr" else torch.zeros_like(frozen)
            optimizer.step()
        last = loss(optimizer).item()
        assert last > first if options.get("maximize") else last < first
        torch.testing.assert_close(frozen.detach(), before)


@pytest.mark.parametrize("tensor_lr", [0.01, 0.0])
def test_a_learning_rate_in_a_tensor(optimizer_class: OptimizerClass, device: str, tensor_lr: float) -> None:
    """As the number, also when it is changed in place; and it is not written to."""
    require_device("torch", device)
    for options in inputs(place("torch", device), "fused"):
        trained = []
        for lr in (torch.tensor(tensor_lr), tensor_lr):
            params, loss = linear(place("torch", device), dtype=torch.float64)
            optimizer = optimizer_class(params, **{**options, "lr": lr})
            for step in range(6):
                optimizer.step(functools.partial(loss, optimizer))
                if step == 3:
                    if isinstance(lr, Tensor):
                        lr.mul_(0.5)
                    else:
                        optimizer.param_groups[0]["lr"] *= 0.5
            trained.append(params)
            assert float(lr) == pytest.approx(tensor_lr * (0.5 if isinstance(lr, Tensor) else 1))
        torch.testing.assert_close(trained[0], trained[1], rtol=1e-6, atol=1e-6)  # the tensor is float32


def test_complex_is_pairs_of_reals(optimizer_class: OptimizerClass, device: str) -> None:
    """Complex parameters, one real one among them, against the same numbers as reals."""
    require_device("torch", device)
    where = place("torch", device)
    for options in inputs(where, "foreach"):
        complexes = [nn.Parameter(torch.randn(10, 5, dtype=torch.complex64, device=where)) for _ in range(2)]
        complexes.append(nn.Parameter(torch.randn(10, 5, device=where)))
        reals = [nn.Parameter((torch.view_as_real(p) if p.is_complex() else p).detach().clone()) for p in complexes]
        left, right = optimizer_class(complexes, **options), optimizer_class(reals, **options)
        for _ in range(3):
            for p, q in zip(complexes, reals, strict=True):
                p.grad = torch.randn_like(p)
                q.grad = (torch.view_as_real(p.grad) if p.is_complex() else p.grad).clone()
            left.step()
            right.step()
            for p, q in zip(complexes, reals, strict=True):
                torch.testing.assert_close(torch.view_as_real(p) if p.is_complex() else p, q)


@pytest.mark.parametrize("implementation", ["foreach", "fused"])
@pytest.mark.parametrize("default_dtype", [torch.float32, torch.float64])
def test_implementations_agree(
    optimizer_class: OptimizerClass, device: str, implementation: str, default_dtype: torch.dtype
) -> None:
    """Parameters and state, with a 0-d parameter, an empty one, and a step without gradients on the way."""
    require_device("torch", device)
    where = place("torch", device)
    torch.set_default_dtype(default_dtype)
    try:
        for options in inputs(where):
            runs = []
            for flag in (False, True):
                torch.manual_seed(1)
                kind: Any = {"device": where, "dtype": torch.float64}
                model = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1), nn.Sigmoid()).to(**kind)
                scalar, empty = nn.Parameter(torch.ones((), **kind)), nn.Parameter(torch.ones(0, 2, **kind))
                params = [*model.parameters(), scalar, empty]
                optimizer = optimizer_class(params, **options, **{implementation: flag})
                for step in range(7):
                    optimizer.zero_grad()
                    if step != 3:
                        model(torch.linspace(0.1, 0.6, 6, **kind).reshape(3, 2)).sum().backward()
                        scalar.grad, empty.grad = torch.ones_like(scalar), torch.ones_like(empty)
                    optimizer.step()
                expected = torch.float32 if flag and implementation == "fused" else default_dtype
                assert all(optimizer.state[p]["step"].dtype == expected for p in params)
                runs.append((params, [dict(optimizer.state[p]) for p in params]))
            for states in (runs[0][1], runs[1][1]):
                for state in states:  # counts have another dtype, and on CUDA another device, with fused
                    state.update({key: float(x) for key, x in state.items() if key in COUNTS})
            torch.testing.assert_close(runs[0], runs[1])
    finally:
        torch.set_default_dtype(torch.float32)


def test_nothing_happens_without_gradients(optimizer_class: OptimizerClass, device: str) -> None:
    require_device("torch", device)
    where = place("torch", device)
    for options in inputs(where, "foreach", "fused", "differentiable"):
        params = [torch.randn(2, 3, device=where) for _ in range(2)]
        before = deepcopy(params)
        optimizer_class(params, **options).step(lambda: torch.ones(1))
        torch.testing.assert_close(params, before, rtol=0, atol=0)


def test_gradients_of_zero_without_decay(optimizer_class: OptimizerClass, device: str) -> None:
    require_device("torch", device)
    where = place("torch", device)
    for options in inputs(where, "foreach", "fused", "differentiable"):
        p = torch.randn(5, 1, device=where)
        before = p.clone()
        p.grad = torch.zeros_like(p)
        optimizer_class([p], **{**options, "weight_decay": 0.0}).step(lambda: torch.ones(1))
        torch.testing.assert_close(p, before, rtol=0, atol=0)


def test_can_be_printed(optimizer_class: OptimizerClass) -> None:
    for options in inputs("cpu", "foreach", "fused", "differentiable"):
        text = repr(optimizer_class([nn.Parameter(torch.randn(2, 3))], **options))
        assert text.startswith(optimizer_class.__name__)
        assert "lr: " in text


def test_state_is_not_empty(optimizer_class: OptimizerClass) -> None:
    for options in inputs("cpu", "foreach", "fused"):
        params, loss = linear("cpu")
        optimizer = optimizer_class(params, **options)
        optimizer.step(functools.partial(loss, optimizer))
        assert all(len(optimizer.state[p]) > 0 for p in params)


def test_state_dict_is_deterministic(optimizer_class: OptimizerClass, device: str) -> None:
    """Two optimizers in the same state go on alike and have equal state dicts, repeated groups included."""
    require_device("torch", device)
    for options in inputs(place("torch", device), "foreach", "fused"):
        params, loss = linear(place("torch", device))
        optimizer = optimizer_class(params, **options)
        for _ in range(10):
            optimizer.step(functools.partial(loss, optimizer))
        copies = [nn.Parameter(p.detach().clone()) for p in params]
        other = optimizer_class(copies, **options)
        state_dict = deepcopy(optimizer.state_dict())
        unchanged = deepcopy(state_dict)
        other.load_state_dict(state_dict)
        for _ in range(10):
            optimizer.step(functools.partial(loss, optimizer))
            other.step(functools.partial(loss, other, *copies))
            torch.testing.assert_close(copies, params, rtol=0, atol=0)
        same(other.state_dict(), optimizer.state_dict())
        assert state_dict.keys() == unchanged.keys()
        same(state_dict["param_groups"], unchanged["param_groups"])
        other.param_groups.extend(other.param_groups)
        same(optimizer.state_dict()["param_groups"][-1], other.state_dict()["param_groups"][-1])


def test_state_dicts_from_before_an_option(optimizer_class: OptimizerClass) -> None:
    for options in inputs("cpu", "foreach", "fused"):
        params, loss = linear("cpu")
        optimizer = optimizer_class(params, **options)
        for _ in range(3):
            optimizer.step(functools.partial(loss, optimizer))
        state_dict = deepcopy(optimizer.state_dict())
        for group in state_dict["param_groups"]:
            for flag in adamw().not_og_supported_flags:
                group.pop(flag, None)
        for state in state_dict["state"].values():
            state["step"] = state["step"].item()
        optimizer.load_state_dict(state_dict)
        assert all(optimizer.state[p]["step"] == 3 for p in params)
        optimizer.step(functools.partial(loss, optimizer))
        assert all(optimizer.state[p]["step"] == 4 for p in params)


@pytest.mark.parametrize("weights_only", [True, False])
def test_saving_and_loading(optimizer_class: OptimizerClass, weights_only: bool, tmp_path: Any) -> None:
    for options in inputs("cpu", "foreach", "fused"):
        params, loss = linear("cpu")
        optimizer = optimizer_class(params, **options)
        optimizer.step(functools.partial(loss, optimizer))
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        other = optimizer_class(params, **options)
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=weights_only))
        same(other.state_dict(), optimizer.state_dict())


def test_deepcopy_keeps_public_attributes(optimizer_class: OptimizerClass) -> None:
    for options in inputs("cpu", "foreach", "fused"):
        params, loss = linear("cpu")
        optimizer = optimizer_class(params, **options)
        optimizer.step(functools.partial(loss, optimizer))
        public = {name for name in vars(optimizer) if not name.startswith("_")}
        assert {name for name in vars(deepcopy(optimizer)) if not name.startswith("_")} == public


@pytest.mark.parametrize("prepend", [False, True])
def test_hooks(optimizer_class: OptimizerClass, prepend: bool) -> None:
    """Hooks of one optimizer and of all, around step; around state_dict and load_state_dict, in either order."""
    params, loss = linear("cpu")
    optimizer, calls = optimizer_class(params), []

    def note(name: str) -> Callable[..., None]:
        return lambda *_: calls.append(name)

    handles = [
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
        register_optimizer_step_pre_hook(note("any pre")),
        register_optimizer_step_post_hook(note("any post")),
    ]
    optimizer.step(functools.partial(loss, optimizer))
    assert calls == ["any pre", "pre", "post", "any post"]
    for handle in handles:
        handle.remove()

    calls.clear()
    for name in ("first", "second"):
        optimizer.register_state_dict_pre_hook(note(f"{name} before state_dict"), prepend=prepend)
        optimizer.register_state_dict_post_hook(note(f"{name} after state_dict"), prepend=prepend)
        optimizer.register_load_state_dict_pre_hook(note(f"{name} before load"), prepend=prepend)
        optimizer.register_load_state_dict_post_hook(note(f"{name} after load"), prepend=prepend)
    optimizer.load_state_dict(optimizer.state_dict())
    order = ["second", "first"] if prepend else ["first", "second"]
    times = ["before state_dict", "after state_dict", "before load", "after load"]
    assert calls == [f"{name} {time}" for time in times for name in order]


def test_a_hook_may_replace_the_state_dict(optimizer_class: OptimizerClass) -> None:
    params, loss = linear("cpu")
    optimizer = optimizer_class(params)
    optimizer.step(functools.partial(loss, optimizer))
    other = optimizer_class(params)

    def double(_: Optimizer, state_dict: Any) -> Any:
        state_dict = deepcopy(state_dict)
        state_dict["param_groups"][0]["lr"] *= 2
        return state_dict

    optimizer.register_state_dict_post_hook(double)
    other.register_load_state_dict_pre_hook(double)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == 4e-3


@pytest.mark.parametrize("implementation", ["foreach", "fused"])
def test_parameters_of_several_dtypes_and_devices(
    optimizer_class: OptimizerClass, device: str, implementation: str
) -> None:
    """One group with all of them: as one tensor at a time."""
    require_device("torch", device)
    where = place("torch", device)
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    params = [torch.rand(2, 3, dtype=dtype, device=where) for dtype in dtypes]
    if implementation == "foreach" and where != "cpu":
        params += [torch.rand(2, 3, dtype=dtype) for dtype in dtypes]
    gradients = [torch.rand_like(p) for p in params]
    for options in inputs("cpu"):
        trained = []
        for flag in (False, True):
            copies = [nn.Parameter(p.clone()) for p in params]
            optimizer = optimizer_class(copies, **options, **{implementation: flag})
            for p, g in zip(copies, gradients, strict=True):
                p.grad = g.clone()
            for _ in range(7 if implementation == "foreach" else 1):
                optimizer.step()
            trained.append(copies)
        for p, q in zip(*trained, strict=True):
            rtol, atol = {torch.float16: (5e-3, 5e-5), torch.bfloat16: (8e-2, 5e-5)}.get(p.dtype, (1e-5, 1e-5))
            torch.testing.assert_close(p, q, rtol=rtol, atol=atol)  # five times torch's tolerance for one operation


def test_state_moves_with_the_parameters(optimizer_class: OptimizerClass) -> None:
    """A state dict from the CPU, loaded for parameters on the GPU: the same steps from there, counts on the CPU."""
    require_device("torch", "gpu")
    for options in inputs("cpu", "foreach", "fused"):
        params, loss = linear("cpu")
        optimizer = optimizer_class(params, **options)
        optimizer.step(functools.partial(loss, optimizer))
        moved = [nn.Parameter(p.detach().cuda()) for p in params]
        other = optimizer_class(moved, **options)
        other.load_state_dict(deepcopy(optimizer.state_dict()))
        assert other.state[moved[0]]["step"].is_cuda == bool(options.get("fused"))
        for _ in range(5):
            loss(optimizer)
            for p, q in zip(params, moved, strict=True):
                q.grad = p.grad.cuda()
            optimizer.step()
            other.step()
        torch.testing.assert_close([p.cpu() for p in moved], [p.detach() for p in params])
