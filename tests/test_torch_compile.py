"""torch.compile of step: the numbers of the step that is not compiled, and one compilation for a whole schedule."""

from typing import Any

import pytest
import torch
from torch import nn
from torch_support import shared_numbers

from ada2ms import core
from ada2ms.torch import Ada2MS
from support import place, require_device

# Torch's compiler itself: what it imports, and what it says when it compiles.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script.*` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Skipping serialization of skipfiles_inline_module_allowlist:UserWarning"),
]
STEPS = 8


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def train(compile_with: str | None, device: str, dtype: torch.dtype, **options: Any) -> tuple[list[Any], int]:
    """Parameters and state after a few steps; how many graphs were compiled. The learning rate changes every step."""
    torch.manual_seed(0)
    kind: Any = {"device": device, "dtype": dtype}
    params = [nn.Parameter(torch.randn(shape, **kind)) for shape in ((3, 4), (), (5,), (0,), (2, 1500))]
    lr = torch.tensor(0.1, **kind)
    optimizer = Ada2MS([{"params": params[:2]}, {"params": params[2:], "betas": (0.9, 0.9)}], lr=lr, **options)
    for group in optimizer.param_groups:
        group["foreach"] = options.get("capturable", False)
    step = torch.compile(optimizer.step, backend=compile_with) if compile_with else optimizer.step
    torch._dynamo.utils.counters.clear()
    for i in range(STEPS):
        for p in params:
            p.grad = torch.randn_like(p)
        if i == 2 and options.get("nonfinite") == "skip":
            params[0].grad[0, 0] = torch.nan
        for group in optimizer.param_groups:
            group["lr"].fill_(0.1 / (i + 1))
        step()
    state = [optimizer.state[p][key] for p in params for key in ("step", "exp_avg", "exp_avg_sq")]
    keys = ("global_exp_avg_sq", "global_step", "skipped")
    shared = [shared_numbers(optimizer, i)[key] for i in range(2) for key in keys]
    norm = [] if options.get("max_norm") is None or optimizer.grad_norm is None else [optimizer.grad_norm]
    return [*params, *state, *shared, *norm], torch._dynamo.utils.counters["stats"]["unique_graphs"]


OPTIONS = [
    {"adaptivity": 0.0},
    {"adaptivity": 0.3, "capturable": True},
    {"adaptivity": core.Linear(1, 0, 5)},
    {"adaptivity": core.Cosine(1, 0, 5), "capturable": True},
    {"adaptivity": core.Exponential(1, 0, 2.0), "scope": "tensor"},
    {"adaptivity": 0.5, "nonfinite": "skip"},
    {"adaptivity": 0.3, "max_norm": 0.5, "nonfinite": "skip"},
]
OPTIONS_SLOW = [
    {"adaptivity": 0.5, "max_norm": 0.5, "capturable": True},
    {"adaptivity": 0.5, "max_norm": 0.5, "scope": "tensor"},
]


@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("options", "backend"),
    [(options, "eager") for options in OPTIONS]
    + [pytest.param(options, "eager", marks=pytest.mark.slow) for options in OPTIONS_SLOW]
    + [pytest.param(options, "inductor", marks=pytest.mark.slow) for options in (OPTIONS[3], *OPTIONS[5:])],
    ids=str,
)
def test_compiled_step(options: dict[str, Any], dtype: torch.dtype, backend: str, device: str) -> None:
    """Within 4 roundings a step, relative to each tensor: a compiler contracts and reorders operations."""
    require_device("torch", device)
    torch._dynamo.reset()
    compiled, graphs = train(backend, place("torch", device), dtype, **options)
    expected, none = train(None, place("torch", device), dtype, **options)
    assert (graphs, none) == (1, 0)
    assert len(compiled) == len(expected) == 26 + ("max_norm" in options)
    for left, right in zip(compiled, expected, strict=True):
        if left.numel():
            assert (left - right).abs().max() <= 4 * STEPS * torch.finfo(dtype).eps * right.abs().max().clamp(min=1e-6)


def test_without_max_norm_nothing_is_compiled_for_the_norm() -> None:
    """The program has no result and no operation of clipping; with `max_norm` its result is the square of the norm."""
    found: list[Any] = []

    def kept(module: Any, _: Any) -> Any:
        found.append(module.graph)
        return module

    for max_norm in (None, 1.0):
        torch._dynamo.reset()
        p = nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        optimizer = Ada2MS([p], max_norm=max_norm)
        torch.compile(optimizer.step, backend=kept)()
        assert (optimizer.grad_norm is None) == (max_norm is None)
    results = [next(node for node in graph.nodes if node.op == "output").args[0] for graph in found]
    assert [len(result) for result in results] == [0, 1]
    plain, clipping = ([node.target for node in graph.nodes if node.op.startswith("call")] for graph in found)
    assert "reciprocal" not in plain
    assert len([target for target in clipping if target == "reciprocal"]) == 1
    assert len(plain) < len(clipping)


def test_forward_backward_and_step_in_one_function() -> None:
    """Compiled together, with `max_norm`: the numbers of the same function that is not compiled."""
    trained = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
        optimizer = Ada2MS(net.parameters(), lr=torch.tensor(0.1, dtype=torch.float64), max_norm=0.1)

        def whole(x: torch.Tensor, net: Any = net, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()

        run = torch.compile(whole, backend="eager") if compiled else whole
        norms = []
        for _ in range(3):
            run(torch.linspace(-1, 2, 20, dtype=torch.float64).reshape(4, 5))
            norms.append(optimizer.grad_norm)
        assert all(norm is not None and norm > 0.1 for norm in norms)
        trained.append([*net.parameters(), *norms])
    torch.testing.assert_close(*trained, rtol=1e-12, atol=1e-14)
