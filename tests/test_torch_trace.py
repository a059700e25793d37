"""Traces of torch: what a recorder sees of a run, whatever the optimizer and whatever is around it."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ada2ms.core import Linear
from ada2ms.core.trace import Trace, TraceError
from ada2ms.core.trace.model import fingerprint
from ada2ms.core.trace.sketch import resolution, sketch
from ada2ms.torch import Ada2MS, Recorder, plain_layers
from ada2ms.torch.sketches import Sketcher
from ada2ms.torch.trace import named, parameters

STEPS = 5


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.LayerNorm(64), nn.Linear(64, 3))


def batches(steps: int = STEPS, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 1, 6, 6, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(steps)
    ]


def close(actual: Any, expected: Any, dtype: str = "float32") -> bool:
    """Whether two sketches agree to their resolution."""
    return bool(np.abs(actual - expected).max() <= 2 * resolution(dtype) * expected[0])


class Witness:
    """What each step got and did, as seen by the test's own eyes: by parameter, sketches by NumPy."""

    def __init__(self, net: nn.Module, axes: Any) -> None:
        self.net, self.axes, self.seen = net, axes, []

    def look(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.net.named_parameters()}

    def step(self, step: Any, scale: float = 1.0) -> None:
        before = self.look()
        grads = {n: None if p.grad is None else p.grad.clone() / scale for n, p in self.net.named_parameters()}
        step()
        self.seen.append((before, grads, self.look()))

    def check(self, trace: Trace, net_names: dict[str, str]) -> None:
        assert len(trace.steps) == len(self.seen)
        for step, (before, grads, after) in zip(trace.steps, self.seen, strict=True):
            for own, value in before.items():
                i, order = trace.index[net_names[own]], self.axes.get(own)
                expected = sketch(value.numpy(), order)
                assert close(step.sketches["value"][i], expected), own
                grad = grads[own]
                assert step.missing[i] == (grad is None)
                if grad is not None:
                    assert close(step.sketches["gradient"][i], sketch(grad.numpy(), order)), own
                update = sketch((after[own].double() - value.double()).numpy(), order)
                slack = 4 * resolution("float32") * (expected[0] + update[0])  # it is the difference of two sketches
                assert np.abs(step.sketches["update"][i][1:] - update[1:]).max() <= slack, own
                assert update[0] / 4 <= step.sketches["update"][i][0] + slack
                if step.full:
                    moved = (after[own] - value).permute(*np.argsort(order)) if order else after[own] - value
                    assert np.array_equal(step.full["update"][net_names[own]], moved.numpy())


OPTIMIZERS: dict[str, Any] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "Ada2MS": lambda p: Ada2MS(p, lr=0.01, adaptivity=Linear(1.0, 0.0, 4)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_is_recorded_as_it_was(name: str, tmp_path: Path) -> None:
    net = network()
    optimizer = OPTIMIZERS[name](net.parameters())
    mappings = plain_layers(net)
    witness = Witness(net, mappings["axes"])
    with Recorder(tmp_path / "run", net, optimizer, full=2, flush=2, **mappings) as recorder:
        losses = []
        for i, (x, y) in enumerate(batches()):
            recorder.batch(x, y)
            loss = nn.functional.cross_entropy(net(x), y)
            recorder.loss(loss)
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            if i == 3:
                net[4].bias.grad = None
            witness.step(optimizer.step)
    trace = Trace.load(tmp_path / "run")
    witness.check(trace, mappings["names"])
    assert trace.complete
    assert trace.about["optimizer"].endswith(name.split()[-1])
    assert trace.about["started"] is False
    assert [step.loss for step in trace.steps] == losses
    assert [bool(step.full) for step in trace.steps] == [True, True, False, False, False]
    assert trace.steps[1].batches == [[fingerprint(x.numpy()) for x in batches()[1]]]
    group = optimizer.param_groups[0]
    assert trace.steps[0].hyper[0]["lr"] == group["lr"]
    if name == "Ada2MS":
        assert [step.hyper[0]["adaptivity"] for step in trace.steps] == [1.0, 0.75, 0.5, 0.25, 0.0]
        s = optimizer.state[net[0].weight]["global_exp_avg_sq"]
        assert trace.steps[-1].extra["s"] == float(s) != trace.steps[0].extra["s"]
    if "betas" in group:
        assert (trace.steps[0].hyper[0]["b1"], trace.steps[0].hyper[0]["b2"]) == group["betas"]


def test_outside_the_context_nothing_is_left_of_it(tmp_path: Path) -> None:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    plain = {name: x for name, x in vars(optimizer).items() if "hooks" in name}
    before = {name: len(x) for name, x in plain.items()}
    with suppress(KeyError), Recorder(tmp_path / "run", net, optimizer):
        net(batches(1)[0][0]).sum().backward()
        optimizer.step()
        raise KeyError
    assert {name: len(x) for name, x in plain.items()} == before
    optimizer.step()
    trace = Trace.load(tmp_path / "run")
    assert trace.complete
    assert len(trace.steps) == 1
    assert optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize("fused", [False, True])
def test_with_a_grad_scaler_gradients_are_as_unscaled(fused: bool, tmp_path: Path) -> None:
    """And a step that is left out shows: by itself, or by the batches of two in one."""
    net = network()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    expected = []
    with Recorder(tmp_path / "run", net, optimizer) as recorder:
        for i, (x, y) in enumerate(batches()):
            recorder.batch(x, y)
            loss = nn.functional.cross_entropy(net(x), y) * (float("inf") if i == 2 else 1.0)
            recorder.loss(loss)
            optimizer.zero_grad()
            scale = scaler.get_scale()
            scaler.scale(loss).backward()
            expected.append({name: p.grad.clone() / scale for name, p in net.named_parameters()})
            scaler.step(optimizer)
            scaler.update()
    trace = Trace.load(tmp_path / "run")
    assert [step.skipped for step in trace.steps] == ([False, False, True, False, False] if fused else [False] * 4)
    assert [len(step.batches) for step in trace.steps] == ([1] * 5 if fused else [1, 1, 2, 1])
    for step, k in zip(trace.steps, [0, 1, 2, 3, 4] if fused else [0, 1, 3, 4], strict=True):
        if k != 2:
            for own, grad in expected[k].items():
                assert close(step.sketches["gradient"][trace.index[own]], sketch(grad.numpy())), (k, own)


def test_accumulated_batches_and_losses_belong_to_one_step(tmp_path: Path) -> None:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with Recorder(tmp_path / "run", net, optimizer) as recorder:
        for i, (x, y) in enumerate(batches(4)):
            recorder.batch(x, y)
            loss = nn.functional.cross_entropy(net(x), y) / 2
            recorder.loss(2 * loss)
            loss.backward()
            if i % 2:
                total = sketch(net[4].weight.grad.numpy())
                optimizer.step()
                optimizer.zero_grad()
    trace = Trace.load(tmp_path / "run")
    assert [(len(step.batches), step.losses) for step in trace.steps] == [(2, 2), (2, 2)]
    assert close(trace.steps[1].sketches["gradient"][trace.index["4.weight"]], total)


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("kind", ["SGD", "LBFGS", "Ada2MS"])
def test_closures_are_recorded_by_their_first_evaluation(kind: str, by_name: bool, tmp_path: Path) -> None:
    net, (x, y) = network(), batches(1)[0]
    options: dict[str, Any] = {"max_iter": 3} if kind == "LBFGS" else {}
    optimizer = (Ada2MS if kind == "Ada2MS" else getattr(torch.optim, kind))(net.parameters(), lr=0.1, **options)
    first: list[Tensor] = []
    losses = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        losses.append(loss.item())
        first.append(net[4].weight.grad.clone())
        return loss

    with Recorder(tmp_path / "run", net, optimizer):
        returned = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
    step = Trace.load(tmp_path / "run").steps[0]
    assert returned.item() == step.loss == losses[0]
    assert close(step.sketches["gradient"][4], sketch(first[0].numpy()))
    assert not step.missing.any()
    assert step.sketches["update"][4][0] > 0


def like(tensors: list[Tensor], axes: dict[str, tuple[int, ...]] | None = None) -> Sketcher:
    params = [nn.Parameter(x) for x in tensors]
    named_ = {str(i): p for i, p in enumerate(params)}
    return Sketcher(params, parameters(named_, torch.optim.SGD(params), None, axes))


def test_sketches_are_those_of_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every type and shape, in any strides; of 16 bits as they are widened."""
    rng = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn((), generator=rng),
        torch.randn(0, 3, generator=rng),
        torch.randn(4096, generator=rng),
        torch.randn(9000, 7, generator=rng, dtype=torch.float64),
        torch.randn(8, 4, 3, 3, generator=rng),
        torch.randn(6, 5, generator=rng).bfloat16(),
        torch.randn(6, 5, generator=rng).half(),
        torch.randn(6, 5, generator=rng, dtype=torch.complex64),
    ]
    monkeypatch.setattr("ada2ms.torch.sketches_plain._BLOCK", 1000)
    found = like(tensors)(tensors)
    for x, row in zip(tensors, found.numpy(), strict=True):
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        assert close(row, sketch(wide.numpy()), str(x.dtype).removeprefix("torch.")), x.dtype
    last = [x.to(memory_format=torch.channels_last) if x.ndim == 4 else x for x in tensors]
    assert torch.allclose(like(tensors)(last), found, rtol=1e-5, atol=1e-4)
    axes = {"4": (3, 2, 0, 1)}
    neutral = tensors[4].permute(2, 3, 1, 0)
    assert close(like(tensors, axes)(tensors)[4].numpy(), sketch(neutral.numpy()))


def test_precision_that_is_allowed_for_the_model_is_not_for_sketches() -> None:
    x = [torch.randn(64, 64, generator=torch.Generator().manual_seed(0))]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = like(x)(x)[0].numpy()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert close(found, sketch(x[0].numpy()))


def test_groups_and_parameters_that_come_later(tmp_path: Path) -> None:
    net = network()
    optimizer = torch.optim.AdamW([{"params": [net[4].weight], "lr": 0.5}, {"params": [net[0].weight]}], lr=0.25)
    with Recorder(tmp_path / "run", net, optimizer) as recorder:
        for i, (x, y) in enumerate(batches(2)):
            recorder.loss(0.5)
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
            if i == 0:
                optimizer.add_param_group({"params": [net[4].bias]})
    trace = Trace.load(tmp_path / "run")
    assert [(p.name, p.group) for p in trace.parameters] == [("4.weight", 0), ("0.weight", 1)]
    assert [h["lr"] for h in trace.steps[0].hyper] == [0.5, 0.25]
    assert "untraced" not in trace.steps[0].extra
    optimizer.step()
    assert len(trace.steps[1].hyper) == 3 or trace.steps[1].extra["untraced"] == 1


def test_what_cannot_be_recorded_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    net = network()
    optimizer = torch.optim.SGD([*net.parameters(), nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(TraceError, match="has 1 parameters that the model has not"):
        Recorder(tmp_path / "run", net, optimizer)
    with pytest.raises(TraceError, match="no parameter 'x'"):
        Recorder(tmp_path / "run", net, torch.optim.SGD(net.parameters()), names={"x": "y"})
    with pytest.raises(TypeError, match=r"must be a torch.optim.Optimizer"):
        Recorder(tmp_path / "run", net, net)  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_names_are_the_modules_own_within_wrappers() -> None:
    net = network()
    compiled = torch.compile(net, backend="eager")
    found = parameters(named(compiled), torch.optim.SGD(compiled.parameters()), None, None)
    assert [p.own for p in found] == [name for name, _ in net.named_parameters()]


def test_large_tensors_are_sampled(tmp_path: Path) -> None:
    p = nn.Parameter(torch.arange(100.0).reshape(10, 10))
    optimizer = torch.optim.SGD([p], lr=1.0)
    with Recorder(tmp_path / "run", {"w": p}, optimizer, axes={"w": (1, 0)}, entries=10):
        p.grad = torch.ones_like(p)
        optimizer.step()
    full = Trace.load(tmp_path / "run").steps[0].full
    assert full["value"]["w"].tolist() == list(range(10))  # every tenth of the transposed
    assert full["update"]["w"].tolist() == [-1.0] * 10


def test_clipping_of_its_own_is_recorded_as_clipping_before_the_step(tmp_path: Path) -> None:
    """The gradient is what the rule gets, so that a port from `clip_grad_norm_` to `max_norm` differs by rounding."""
    traces = []
    for own in (False, True):
        net, path = network(), tmp_path / f"{own}.trace"
        optimizer = Ada2MS(net.parameters(), lr=1e-2, max_norm=0.5 if own else None)
        with Recorder(path, net, optimizer):
            for x, y in batches():
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(x), y).backward()
                norm = float("inf") if own else 0.5
                assert nn.utils.clip_grad_norm_(net.parameters(), norm) > 0.5, "there is something to clip"
                optimizer.step()
        traces.append(Trace.load(path))
    for one, other in zip(*(trace.steps for trace in traces), strict=True):
        for i in range(len(one.missing)):
            assert close(other.sketches["gradient"][i], one.sketches["gradient"][i]), i
        for name, gradient in one.full.get("gradient", {}).items():
            np.testing.assert_allclose(other.full["gradient"][name], gradient, rtol=1e-5, atol=1e-7)
    assert one.number == STEPS
    assert traces[0].steps[0].full


def test_what_moves_in_a_module_is_recorded_by_neutral_names(tmp_path: Path) -> None:
    """Running statistics before the first forward pass and after each, and a buffer of one's own that is saved; neither
    counts, nor what is not saved, nor parameters.
    """

    class Net(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3))
            self.register_buffer("average", torch.zeros(2, 3))
            self.register_buffer("table", torch.zeros(5), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            self.average = self.average + 1  # another tensor each time
            return super().forward(x)

    torch.manual_seed(0)
    net = Net()
    net[1].running_mean.fill_(0.5)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    names = {"1.running_mean": "1.norm.mean", "1.running_var": "1.norm.var", "average": "average"}
    mappings = plain_layers(net)
    seen: list[dict[str, Any]] = []

    def look() -> None:
        seen.append({names[own]: x.numpy().copy() for own, x in net.named_buffers() if own in names})

    look()
    with Recorder(tmp_path / "run", net, optimizer, full=2, flush=2, **mappings) as recorder:
        for x, y in batches(4):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x), y)
            recorder.loss(loss)
            loss.backward()
            look()
            optimizer.step()
    trace = Trace.load(tmp_path / "run")
    assert trace.statistics is not None
    assert trace.start is not None
    assert {p.own: p.name for p in trace.statistics} == names
    assert {p.name: p.shape for p in trace.statistics} == {"1.norm.mean": (4,), "1.norm.var": (4,), "average": (2, 3)}
    for step, expected in zip([trace.start, *trace.steps], seen, strict=True):
        for i, p in enumerate(trace.statistics):
            assert close(step.sketches["statistics"][i], sketch(expected[p.name])), (step.number, p.name)
            if step.number <= 2:
                assert np.array_equal(step.full["statistics"][p.name], expected[p.name])
        assert ("statistics" in step.full) == (step.number <= 2)
    assert Trace.load(tmp_path / "run").parameters == trace.parameters
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    Recorder(tmp_path / "by name", dict(net.named_parameters()), optimizer).close()
    assert Trace.load(tmp_path / "by name").statistics is None
