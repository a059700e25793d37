"""`measure` in torch: against the rule in NumPy, and what a step has changed; and what it must not do."""

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from measurements_support import EVERY_RUN, RUNS, SHAPES, Run, compare
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch_support import Operations, Waits, assert_same, give_gradients, parameters

from ada2ms import core
from ada2ms.core.hyperparameters import to_arguments, value_at
from ada2ms.core.measurements import OF_MODEL, PREFIX
from ada2ms.torch import Ada2MS, measure, param_groups


def trained(run: Run, **options: Any) -> tuple[dict[str, Tensor], Ada2MS]:
    """Parameters and optimizer after a run, whose learning rate is set before every step, as a scheduler does."""
    params: dict[str, Tensor] = {n: nn.Parameter(torch.tensor(p)) for n, p in run.params().items()}
    hyper = run.hyper
    rate = hyper["lr"]
    given = to_arguments({**vars(core.DEFAULTS), **hyper, "lr": value_at(rate, 0)}, "torch")
    groups = param_groups(params, run.groups, given["lr"], given["betas"])
    optimizer = Ada2MS(groups, **given, **options)
    for step, gradients in enumerate(run.gradients()):
        for group, first in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] = first["lr"] * value_at(rate, step) / value_at(rate, 0)
        for name, g in gradients.items():
            params[name].grad = None if g is None else torch.tensor(g)
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("options", [{}, {"capturable": True}], ids=str)
@EVERY_RUN
def test_it_is_what_the_rule_did(name: str, options: dict[str, Any]) -> None:
    params, optimizer = trained(RUNS[name], **options)
    compare(measure(optimizer, params, wait=True), RUNS[name], 1e-9)


def test_without_waiting_the_numbers_are_the_same() -> None:
    params, optimizer = trained(RUNS["tensor"], capturable=True)
    left = measure(optimizer, params)
    right = measure(optimizer, params, wait=True)
    assert {name: float(x) for name, x in left.items() if not name.endswith("empty")} == {
        name: x for name, x in right.items() if not name.endswith("empty")
    }
    kept = {name: float(x) for name, x in left.items()}
    optimizer.step()
    assert all(float(x) == kept[name] or math.isnan(kept[name]) for name, x in left.items())


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"adaptivity": 0.0},
        {"nonfinite": "skip", "adaptivity": core.Cosine(1, 0, 5)},
        {"capturable": True, "adaptivity": core.Linear(1, 0, 5)},
        {"max_norm": 1.0, "eps": 0.0},
        {"lr": True},
    ],
    ids=str,
)
def test_nothing_waits_for_the_device(options: dict[str, Any], scope: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA, seen by fake tensors. Counts that are on the host are numbers here, since a fake one cannot be read."""
    options = dict(options)
    tensor = options.pop("lr", False)
    with FakeTensorMode():
        kind: Any = {"device": "cuda"}
        params = {str(i): nn.Parameter(torch.ones(shape, **kind)) for i, shape in enumerate(((3, 4), (), (5,), (0,)))}
        groups = [{"params": [params["0"]]}, {"params": [params[n] for n in "123"], "betas": (0.8, 0.9)}]
        optimizer = Ada2MS(groups, scope=scope, **options)
        if tensor:
            for group in optimizer.param_groups:
                group.update(lr=torch.ones((), **kind), capturable=True)
        for p in params.values():
            p.grad = torch.ones_like(p)
        optimizer.step()
        if not optimizer.param_groups[0]["capturable"] and "nonfinite" not in options:
            for state in optimizer.state.values():
                state.update(step=1.0, global_step=1.0)
            monkeypatch.setattr("ada2ms.torch.measurements.known_to_host", lambda group, t: isinstance(t, float))
        with Waits() as waits:
            measured = measure(optimizer, params)
    assert waits.operations > 20
    assert waits.found == []
    assert {x.device.type for name, x in measured.items() if "/" in name[7:] and isinstance(x, Tensor)} == {"cuda"}


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_without_a_model_no_parameter_is_read(scope: Any) -> None:
    counts = []
    for tensors in (3, 30):
        params = [nn.Parameter(torch.ones(3, 4)) for _ in range(tensors)]
        optimizer = Ada2MS(params, scope=scope, capturable=True)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        with Operations() as operations:
            measured = measure(optimizer)
        assert [*measured] == [PREFIX + name for name in OF_MODEL]
        counts.append(operations.found)
    assert counts[0] == counts[1]
    assert len(counts[0]) < 40


@pytest.mark.parametrize("options", [{}, {"compensated": True, "capturable": True}], ids=str)
def test_a_run_that_is_measured_is_the_run_that_is_not(options: dict[str, Any]) -> None:
    runs = []
    for measured in (False, True):
        params = parameters(dtype=torch.bfloat16)
        optimizer = Ada2MS(params, lr=0.1, **options)
        for step in range(3):
            give_gradients(params, step, missing=True)
            optimizer.step()
            if measured:
                before = copy.deepcopy(optimizer.state_dict())
                measure(optimizer, {str(i): p for i, p in enumerate(params)}, wait=True)
                assert str(optimizer.state_dict()) == str(before)
        runs.append(params)
    assert_same(*runs, bound=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.complex128])
def test_types(dtype: torch.dtype) -> None:
    """By what the last step has changed, which in float32 is rounded in the size of the parameter."""
    params = parameters(dtype=torch.float64)
    if dtype.is_complex:
        params = [nn.Parameter(torch.complex(p.detach(), p.detach().flip(0) if p.ndim else p.detach())) for p in params]
    params = [nn.Parameter(p.detach().to(dtype)) for p in params]
    optimizer = Ada2MS(params, lr=0.1, weight_decay=0.1)
    for step in range(3):
        before = [p.detach().clone() for p in params]
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, dtype=dtype, generator=torch.Generator().manual_seed(10 * step + i))
        optimizer.step()
    measured = measure(optimizer, {str(i): p for i, p in enumerate(params)}, match="[0124]", wait=True)
    for i in (0, 1, 2, 4):
        p = params[i].detach()
        real = float((p - before[i]).norm() / p.norm())
        assert measured[f"{PREFIX}update_ratios/{i}"] == pytest.approx(real, rel=1e-5 if p.itemsize < 16 else 1e-11)


def test_gradients_whose_squares_are_nothing_in_float32() -> None:
    """Then v is 0, and the update is lr*m_hat/eps."""
    p = nn.Parameter(torch.ones(5))
    optimizer = Ada2MS([p], lr=0.5, eps=1e-3)
    p.grad = torch.full((5,), 1e-30)
    optimizer.step()
    assert measure(optimizer, {"p": p}, wait=True)[f"{PREFIX}effective_steps/p"] == pytest.approx(500.0, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_measured_before_they_are_rounded(dtype: torch.dtype) -> None:
    """As float32 would be that starts from the same values; with a compensation both go on alike."""
    start = torch.randn(40, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = []
    for p in (nn.Parameter(start.clone()), nn.Parameter(start.float())):
        optimizer = Ada2MS([p], lr=1e-4, weight_decay=0.1, compensated=True)
        for step in range(3):
            p.grad = torch.randn(40, generator=torch.Generator().manual_seed(step)).to(dtype).to(p.dtype)
            optimizer.step()
        found.append(measure(optimizer, {"p": p}, wait=True))
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert found[0][f"{PREFIX}update_ratios/p"] == pytest.approx(1e-4, rel=0.3)


def test_before_the_first_update_and_of_what_had_none() -> None:
    model = nn.Linear(3, 2)
    optimizer = Ada2MS(model.parameters(), lr=0.1, adaptivity=core.Linear(1.0, 0.0, 10))
    found = measure(optimizer, model, wait=True)
    known = {name.removeprefix(PREFIX): x for name, x in found.items() if not math.isnan(x)}
    assert known == {"updates": 0.0, "skipped": 0.0, "lr": 0.1, "adaptivity": 1.0}
    model.weight.grad = torch.ones(2, 3)
    optimizer.step()
    found = measure(optimizer, model, wait=True)
    assert [name for name, x in found.items() if math.isnan(x)] == [
        f"{PREFIX}effective_steps/bias",
        f"{PREFIX}update_ratios/bias",
    ]


@pytest.mark.parametrize("capturable", [False, True])
def test_a_first_step_that_is_skipped_updates_nothing(capturable: bool) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = Ada2MS([p], nonfinite="skip", capturable=capturable, adaptivity=1.0)  # which does not use s
    p.grad = torch.full((3,), math.inf)
    optimizer.step()
    found = measure(optimizer, {"p": p}, wait=True)
    assert found[PREFIX + "skipped"] == 1
    assert found[PREFIX + "gradient_norm"] == math.inf
    assert all(math.isnan(found[PREFIX + name]) for name in ("global_second_moment", "effective_step"))
    assert math.isnan(found[f"{PREFIX}update_ratios/p"])


def test_names_prefix_and_wrappers() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].bias.requires_grad_(False)
    optimizer = Ada2MS([p for p in model.parameters() if p.requires_grad])
    wrapped = SimpleNamespace(optimizer=SimpleNamespace(optim=optimizer))
    found = measure(wrapped, model, match="weight$", prefix="g/")
    assert [name for name in found if "ratios" in name] == ["g/update_ratios/0.weight", "g/update_ratios/1.weight"]
    assert "g/update_ratios/1.bias" not in measure(optimizer, model, prefix="g/")


def test_errors_name_the_argument() -> None:
    model = nn.Linear(2, 2)
    optimizer = Ada2MS(model.parameters())
    with pytest.raises(TypeError, match=r"Invalid optimizer: of type AdamW \(must be Ada2MS, or wrap one\)"):
        measure(torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match="Invalid model: it has no parameter of the optimizer"):
        measure(optimizer, nn.Linear(2, 2))
    with pytest.raises(TypeError, match="Invalid model: of type list"):
        measure(optimizer, [*model.parameters()])  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"Invalid match: 'x' .*of 'weight', 'bias'\)"):
        measure(optimizer, model, match="x")
    with pytest.raises(ValueError, match=r"Invalid match: '\(' .*here: "):
        measure(optimizer, model, match="(")
    model.weight._fsdp_flattened = True
    with pytest.raises(ValueError, match="Invalid model: its parameters are shards of FullyShardedDataParallel"):
        measure(optimizer, model)
    measure(optimizer)


def test_names_of_shapes() -> None:
    assert [*SHAPES] == sorted(SHAPES)  # as JAX sorts them
