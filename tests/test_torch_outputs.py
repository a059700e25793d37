"""Outputs of modules in traces of torch: which are recorded, under which names, and of which forward passes."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ada2ms.core.trace import Trace, TraceError
from ada2ms.core.trace.outputs import MODEL, Output, activation
from ada2ms.torch import Recorder, plain_layers
from support import slow

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    def __init__(self, way: str = "") -> None:
        super().__init__()
        self.norm, self.dense, self.act, self.way = nn.LayerNorm(6), nn.Linear(6, 6), nn.GELU(), way

    def inner(self, x: Tensor) -> Tensor:
        return x + self.act(self.dense(self.norm(x)))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.way == "reentrant") if self.way else self.inner(x)


def network(way: str = "") -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), Block(way), Block(), nn.Linear(6, 2))


NAMES = ["0.dense", "1.norm", "2.dense", "1.act", "1", "3.norm", "4.dense", "2.act", "2", "5.dense", MODEL]


def train(path: Path, net: nn.Module, forward: Callable[..., Any] | None = None, **options: Any) -> Trace:
    """Five steps."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    options = {"outputs": True, **(plain_layers(net) if isinstance(net, nn.Sequential) else {}), **options}
    with Recorder(path, net, optimizer, **options) as recorder:
        for _ in range(5):
            optimizer.zero_grad()
            (forward or (lambda net, _: net(X).square().mean()))(net, recorder).backward()
            optimizer.step()
    return Trace.load(path)


def names(trace: Trace, i: int = 0) -> list[str]:
    return [each.name for each in trace.steps[i].outputs]


def same(a: Output, b: Output) -> bool:
    return [x.sketches for x in a.arrays] == [x.sketches for x in b.arrays] and a.name == b.name


def test_what_modules_are_given_and_give_is_recorded_in_the_order_of_the_forward_pass(tmp_path: Path) -> None:
    """As NumPy has it of tensors that a plain forward pass gives; nothing else is changed, and hooks are gone."""
    net, other = network(), network()
    hooks: list[bool] = []

    def forward(net: nn.Module, _: Any) -> Tensor:
        hooks.append(any(module._forward_hooks or module._forward_pre_hooks for module in net.modules()))
        return net(X).square().mean()  # type: ignore[no-any-return]

    trace = train(tmp_path / "a", net, forward)
    assert hooks == [True] * 3 + [False] * 2, "also while it is open"
    plain = train(tmp_path / "b", other, outputs=False)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))
    assert [len(step.outputs) for step in trace.steps] == [11, 11, 11, 0, 0]
    assert not any(step.outputs for step in plain.steps)
    assert names(trace) == NAMES
    assert [each.name for each in trace.steps[0].outputs if each.composed] == ["1", "2", MODEL]
    net = network()
    h = net[0](X)
    by_name = {each.name: each for each in trace.steps[0].outputs}
    expected = {"0.dense": (X, h), "1.norm": (h, net[1].norm(h)), "1": (h, net[1](h)), MODEL: (X, net(X))}
    for name, (before, after) in expected.items():
        found = by_name[name]
        assert found.inputs == [activation(before.detach().numpy())], name
        assert found.arrays == [activation(after.detach().numpy())], name
        assert found.training is True


def reentrant(net: nn.Module, _: Any) -> Tensor:
    return net(X.clone().requires_grad_()).square().mean()


def with_evaluation(net: nn.Module, _: Any) -> Tensor:
    loss = net(X).square().mean()
    with torch.no_grad():
        net(X + 1)
    net.eval()
    net(X + 2)
    with torch.no_grad():
        net(X + 3)
    net.train()
    return loss


def failing(net: nn.Module, _: Any) -> Tensor:
    for handle in (net[1].act.register_forward_pre_hook(lambda *_: 1 / 0),):
        with pytest.raises(ZeroDivisionError), torch.no_grad():
            net(X)
        handle.remove()
    return net(X).square().mean()


WAYS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any] | None]] = {
    "checkpoints": (lambda: network("new"), None),
    "reentrant checkpoints": (lambda: network("reentrant"), reentrant),
    "evaluation": (network, with_evaluation),
    "an error in evaluation": (network, failing),
    "compiled": (lambda: torch.compile(network(), backend="eager"), None),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # dynamo's own, at a break in a graph
@pytest.mark.parametrize(
    "way", ["checkpoints", "evaluation", *slow(*[w for w in WAYS if w not in ("checkpoints", "evaluation")])]
)
def test_one_forward_pass_counts_once(way: str, tmp_path: Path) -> None:
    """Whatever computes again, evaluates, fails and compiles."""
    make, forward = WAYS[way]
    expected = train(tmp_path / "a", network())
    net = make()
    inner = getattr(net, "_orig_mod", net)
    found = train(tmp_path / "b", net, forward, **plain_layers(inner))
    for i in range(3):
        assert names(found, i) == NAMES
        assert all(same(a, b) for a, b in zip(found.steps[i].outputs, expected.steps[i].outputs, strict=True)), way


def test_an_error_in_a_forward_pass_leaves_nothing_behind(tmp_path: Path) -> None:
    """It is the user's to catch; the calls that it has ended are no part of the next pass."""
    net = network()

    def forward(net: Any, recorder: Any) -> Tensor:
        broken = net[1].act.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            net(X)
        broken.remove()
        return net(X).square().mean()

    found = names(train(tmp_path / "a", net, forward))
    assert found[:3] == ["0.dense", "1.norm", "2.dense"]
    assert found[3:6] == ["0.dense (2)", "1.norm (2)", "2.dense (2)"]
    assert found[-1] == MODEL


def test_copies_of_a_model_are_not_recorded(tmp_path: Path) -> None:
    """Such as a moving average of it; and a model can be saved as a whole meanwhile."""

    def forward(net: Any, _: Any) -> Tensor:
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert torch.equal(other(X), net(X))
        return net(X).square().mean()  # type: ignore[no-any-return]

    found = train(tmp_path / "a", network(), forward)
    assert names(found)[-1] == f"{MODEL} (3)"


def test_several_passes_in_a_step_are_numbered(tmp_path: Path) -> None:
    def accumulated(net: Any, _: Any) -> Tensor:
        return sum(net(x).square().mean() for x in X.chunk(2)) / 2  # type: ignore[no-any-return]

    found = train(tmp_path / "a", network(), accumulated)
    assert names(found) == NAMES + [f"{name} (2)" for name in NAMES]


def test_a_closure_is_recorded_each_time_it_is_evaluated(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(6, 2))
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = net(X).square().mean()
        loss.backward()
        return loss

    with Recorder(tmp_path / "a", net, optimizer, outputs=True) as recorder:
        optimizer.step(closure)
    assert recorder is not None
    assert names(Trace.load(tmp_path / "a"))[:4] == ["0", MODEL, "0 (2)", f"{MODEL} (2)"]


def test_evaluation_mode_counts_where_there_is_no_training_mode(tmp_path: Path) -> None:
    """As where `train()` was forgotten: then that is what shows."""
    found = train(tmp_path / "a", network().eval())
    assert names(found) == NAMES
    assert {each.training for each in found.steps[0].outputs} == {False}


class Odd(nn.Module):
    """Modules that give tuples, mappings and dataclasses, take keywords, and write to what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.attention = nn.LSTM(6, 6, batch_first=True), nn.MultiheadAttention(6, 2, batch_first=True)
        self.dense, self.relu = nn.Linear(6, 6), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> dict[str, Any]:
        h, _ = self.rnn(x)
        h, _ = self.attention(query=h, key=h, value=h)
        return {"logits": self.relu(self.dense(h)), "nothing": None, "words": "a"}


def test_tuples_mappings_keywords_and_writing_in_place(tmp_path: Path) -> None:
    x = X.reshape(2, 4, 6)
    torch.manual_seed(0)
    net = Odd()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    mappings = plain_layers(net)
    with Recorder(tmp_path / "a", net, optimizer, outputs=True, **mappings):
        net(x)["logits"].square().mean().backward()
        h = net.rnn(x)[0]
        optimizer.step()
    found = {each.name: each for each in Trace.load(tmp_path / "a").steps[0].outputs}
    assert list(found)[:4] == ["0.lstm", "1.attention", "2.dense", "relu"]
    assert [x.shape for x in found["0.lstm"].arrays] == [[2, 4, 6], [1, 2, 6], [1, 2, 6]]
    assert found["1.attention"].inputs == [activation(h.detach().numpy())] * 3
    assert not found["1.attention"].composed, "it calls none of its modules"
    assert found["relu"].inputs == found["2.dense"].arrays, "as it was before"
    assert found["relu"].arrays == found[MODEL].arrays != found["2.dense"].arrays


def test_frozen_modules_have_the_names_of_their_parameters_too(tmp_path: Path) -> None:
    net = network()
    net[0].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    with Recorder(tmp_path / "a", net, optimizer, outputs=True, **plain_layers(net)):
        net(X).square().mean().backward()
        optimizer.step()
    assert names(Trace.load(tmp_path / "a")) == NAMES


def test_autocast_has_its_types(tmp_path: Path) -> None:
    def forward(net: Any, _: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return net(X).float().square().mean()  # type: ignore[no-any-return]

    step = train(tmp_path / "a", network(), forward).steps[0]
    assert {each.name: each.arrays[0].dtype for each in step.outputs}["0.dense"] == "bfloat16"


def test_what_the_user_tells(tmp_path: Path) -> None:
    """In the order of calls; after the first steps nothing is read."""
    read: list[str] = []

    class Told(Tensor):
        def detach(self) -> Tensor:
            read.append("read")
            return super().detach().as_subclass(Tensor)

    def forward(net: Any, recorder: Any) -> Tensor:
        h = net[0](X)
        recorder.output("h", h)
        recorder.output("pair", {"b": (h, h[:2]), "a": h[:1]})
        recorder.output("h", h.detach().as_subclass(Told))
        return h.square().mean()  # type: ignore[no-any-return]

    found = train(tmp_path / "a", network(), forward, outputs=False)
    assert [names(found, i) for i in range(5)] == [["h", "pair", "h (2)"]] * 3 + [[], []]
    assert [x.shape for x in found.steps[0].outputs[1].arrays] == [[1, 6], [8, 6], [2, 6]]
    assert len(read) == 3
    with pytest.raises(TypeError, match="must be a tensor, or a tuple"):
        train(tmp_path / "b", network(), lambda _, recorder: recorder.output("h", "text"), outputs=False)


def test_what_is_refused(tmp_path: Path) -> None:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for model, full in ((dict(net.named_parameters()), 3), (net, 0)):
        with pytest.raises(ValueError, match="Invalid outputs: True"):
            Recorder(tmp_path / "a", model, optimizer, full=full, outputs=True)
    with pytest.raises(TraceError, match="No module was called before this step"):
        train(tmp_path / "b", net, lambda net, _: sum(p.square().sum() for p in net.parameters()))
    with pytest.raises(TraceError, match=r"within torch\.func, on the meta device"):
        train(tmp_path / "c", net, lambda net, _: torch.func.vmap(net)(X).square().mean())
