"""`max_norm` in torch, around the step: what it moves, what is refused, what is saved, and who changes it."""

import copy
import importlib.util
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch_support import assert_same, pair, parameter, random, saved_and_loaded, train

from ada2ms.core import golden
from ada2ms.torch import Ada2MS, export_state
from replays import torch_replay
from support import check, needs_compiler, slow

CLIPPING = [case for case in golden.load() if case.max_norm is not None and not case.compensated]


@pytest.mark.parametrize("options", [{"capturable": True}, *slow({"capturable": True, "foreach": True})], ids=str)
def test_golden_vectors_where_the_host_does_not_know_the_norm(options: dict[str, Any]) -> None:
    """In the for-loop, with foreach and fused, tests/test_trajectories.py replays them."""
    assert len(CLIPPING) > 30
    for case in CLIPPING:
        check(case, torch_replay(**options)(case, "float64", "cpu"), "float64")


def bytes_of(step: Callable[[], Any]) -> int:
    """What the operations of a step read and write, as the benchmark counts it."""
    path = Path(__file__).parents[1] / "benchmarks" / "torch_step.py"
    spec = importlib.util.spec_from_file_location("torch_step", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with module.Bytes() as counter:
        step()
    return int(counter.moved)


class Copies(TorchDispatchMode):
    """The operations that make of these tensors others of their size, or write to them."""

    def __init__(self, tensors: list[Any]) -> None:
        super().__init__()
        self.of = {id(x) for x in tensors}
        self.sizes = {x.numel() for x in tensors}
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {id(x) for x in tree_leaves(args) if isinstance(x, Tensor)}
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.numel() in self.sizes]
        if self.of & given and any(id(x) in self.of or id(x) not in given for x in made):
            self.found.append(func._schema.name)
        return result


# Bytes for each float32 entry, where some gradients are clipped: m is read and written once more by the operations over
# whole tensors. clip_grad_norm_ reads the gradients twice more, and writes them.
@pytest.mark.parametrize(
    ("path", "clipped"),
    [({"foreach": False}, 8), ({"foreach": True}, 8), pytest.param({"fused": True}, 0, marks=needs_compiler)],
    ids=str,
)
@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_no_gradient_is_copied_or_written(path: dict[str, Any], clipped: int, scope: Any) -> None:
    params = [nn.Parameter(random((4, 1000), i, dtype=torch.float32)) for i in range(3)]
    for p in params:
        p.grad = torch.ones_like(p)
    n, moved = sum(p.numel() for p in params), {}
    for max_norm in (None, 1e6, math.inf, 1.0):
        optimizer = Ada2MS(params, scope=scope, max_norm=max_norm, **path)
        optimizer.step()
        moved[max_norm] = bytes_of(optimizer.step)
        with Copies([p.grad for p in params]) as copies:
            optimizer.step()
        assert copies.found == []
    plain, numbers = moved[None], 200  # of the scalars' operations
    assert plain <= moved[1e6] <= plain + numbers
    assert plain <= moved[math.inf] <= plain + numbers
    assert clipped * n <= moved[1.0] - plain <= clipped * n + numbers
    assert bytes_of(lambda: clip_grad_norm_(params, 1.0)) >= 12 * n


def test_the_norm_takes_no_operation_of_a_step_without_max_norm() -> None:
    """What a step leaves is what it has computed anyway."""
    optimizer = Ada2MS([parameter(3)])
    train(optimizer, range(2))
    before = optimizer._last["square_sum"]
    moved = [bytes_of(optimizer.step)]
    optimizer._last = {"square_sum": None}
    moved.append(bytes_of(optimizer.step))
    assert moved[0] == moved[1]
    assert before is not optimizer._last["square_sum"]


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, "1", True, lambda k: 1.0, torch.ones(2), torch.tensor(-1.0)])
@pytest.mark.parametrize("where", ["constructor", "group", "live"])
def test_values_that_are_refused(bad: Any, where: str) -> None:
    """Before anything changes; and a value that is mended is used."""
    p, q, optimizer = pair()
    train(optimizer, range(2))
    before = [x.detach().clone() for x in (p, q)]
    if where == "live":
        for group in optimizer.param_groups:
            group["max_norm"] = bad
    use: dict[str, Callable[[], Any]] = {
        "constructor": lambda: Ada2MS([p], max_norm=bad),
        "group": lambda: Ada2MS([{"params": [p], "max_norm": bad}]),
        "live": optimizer.step,
    }
    allowed = r"max_norm must be a number in \(0, inf\] or None"
    with pytest.raises((TypeError, ValueError), match=f"Invalid max_norm: .*{allowed}"):
        use[where]()
    assert_same([p, q], before, 0)  # type: ignore[list-item]
    for group in optimizer.param_groups:
        group["max_norm"] = 1.0
    optimizer.step()


@pytest.mark.parametrize("value", [2, torch.tensor(2.0), torch.tensor([2.0])], ids=str)
def test_a_number_of_another_kind(value: Any) -> None:
    p = parameter(3)
    optimizer = Ada2MS([p], max_norm=value)
    assert type(optimizer.param_groups[0]["max_norm"]) is float
    optimizer.param_groups[0]["max_norm"] = value  # as a sweep may set it
    train(optimizer, range(2))
    reference = Ada2MS([parameter(3)], max_norm=2.0)
    train(reference, range(2))
    assert_same([p], reference.param_groups[0]["params"], 0)


@pytest.mark.parametrize("value", [np.float64(2), np.array([2.0]), torch.tensor(2.0, requires_grad=True)], ids=str)
def test_what_is_kept_is_a_plain_number(value: Any) -> None:
    """Of the optimizer and of a group, in their state dicts, which torch loads with weights alone, and in a state."""
    for groups in ([{"params": [parameter(3)]}], [{"params": [parameter(3)], "max_norm": value, "compensated": 1}]):
        optimizer = Ada2MS(groups, max_norm=value, compensated=True)
        train(optimizer, range(2))
        group = saved_and_loaded(optimizer.state_dict())["param_groups"][0]
        assert (type(group["max_norm"]), group["max_norm"], group["compensated"]) == (float, 2.0, True)
        optimizer.param_groups[0]["max_norm"] = value
        state = export_state({"p": groups[0]["params"][0]}, optimizer)
        assert (type(state.max_norm), state.max_norm, state.compensated) == (float, 2.0, True)


def test_it_may_be_changed_in_mid_run() -> None:
    """In all groups: on, to another value, and off; as with gradients that are clipped before the step."""
    p, q, optimizer = pair(0.9)
    x, y, reference = pair(0.9)
    for step, max_norm in enumerate([None, 0.5, 0.5, 0.01, None]):
        for group in optimizer.param_groups:
            group["max_norm"] = max_norm
        for o in (optimizer, reference):
            o.zero_grad()
        for tensor in (p, q, x, y):
            tensor.grad = random(tuple(tensor.shape), step + tensor.numel(), dtype=torch.float64)
        norm = torch.cat([x.grad, y.grad]).norm()  # type: ignore[list-item]
        for tensor in (x, y):
            tensor.grad *= 1.0 if max_norm is None else min(1.0, max_norm / float(norm))  # type: ignore[operator]
        optimizer.step()
        reference.step()
    assert_same([p, q], [x, y], 1e-13)


def test_groups_say_nothing_of_it_while_it_is_off() -> None:
    """So that they have the keys of the version before, all of which a checkpoint of torch.distributed must have."""
    optimizer = Ada2MS([parameter(3)])
    assert optimizer.defaults["max_norm"] is None
    assert "max_norm" not in optimizer.param_groups[0]
    optimizer.param_groups[0]["max_norm"] = None  # as a user switches it off
    assert "max_norm" not in optimizer.state_dict()["param_groups"][0]
    optimizer.param_groups[0]["max_norm"] = 1.0
    assert optimizer.state_dict()["param_groups"][0]["max_norm"] == 1.0
    optimizer.add_param_group({"params": [parameter(4)]})
    assert optimizer.param_groups[1]["max_norm"] == 1.0
    with pytest.raises(ValueError, match=r"Invalid max_norm: 2.0 \(must be the optimizer's, 1.0\)"):
        optimizer.add_param_group({"params": [parameter(5)], "max_norm": 2.0})
    with pytest.raises(ValueError, match=r"Invalid max_norm: None \(must be the optimizer's, 1.0\)"):
        optimizer.add_param_group({"params": [parameter(5)], "max_norm": None})


@pytest.mark.filterwarnings("ignore:torch.distributed is (disabled, )?unavailable or uninitialized:UserWarning")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
@pytest.mark.parametrize("flatten", [False, True])
def test_a_distributed_checkpoint_of_the_version_before(flatten: bool, tmp_path: Path) -> None:
    """It has no `max_norm`; torch looks for every key of the optimizer in it."""
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    sd = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    options = sd.StateDictOptions(flatten_optimizer_state_dict=flatten)
    nets = [nn.Linear(3, 2) for _ in range(2)]
    first, second = (Ada2MS(net.parameters(), lr=lr) for net, lr in zip(nets, (0.5, 0.1), strict=True))
    train(first, range(2))
    saved = sd.get_optimizer_state_dict(nets[0], first, options=options)
    known = {"lr", "betas", "eps", "weight_decay", "adaptivity", "scope", "nonfinite", "maximize", "foreach"}
    known |= {"capturable", "differentiable", "fused"}
    if flatten:
        assert {key.rpartition(".")[2] for key in saved if key.startswith("param_groups.")} == known
    else:
        assert saved["param_groups"][0].keys() == known | {"params"}
    dcp.save(saved, checkpoint_id=tmp_path)
    given = sd.get_optimizer_state_dict(nets[1], second, options=options)
    dcp.load(given, checkpoint_id=tmp_path)
    sd.set_optimizer_state_dict(nets[1], second, optim_state_dict=given, options=options)
    assert second.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("saved", [None, 2.0])
@pytest.mark.parametrize("own", [None, 1.0])
def test_what_a_state_dict_has_is_loaded_and_what_it_has_not_is_kept(own: float | None, saved: float | None) -> None:
    """Of AdamW, of an earlier version, or of a run without `max_norm`."""
    first, adamw = Ada2MS([parameter(3)], max_norm=saved), torch.optim.AdamW([parameter(3)])
    for o in (first, adamw):
        train(o, range(2))
        other = Ada2MS([parameter(3)], max_norm=own)
        other.load_state_dict(copy.deepcopy(o.state_dict()))
        expected = saved if saved is not None and o is first else own
        assert other.param_groups[0].get("max_norm") == expected
        train(other, range(2, 4))
    again = pickle.loads(pickle.dumps(first))
    assert again.param_groups[0].get("max_norm") == saved
    train(again, range(2, 3))


def test_resuming_goes_on_bit_for_bit() -> None:
    p, q, optimizer = pair(0.9, max_norm=0.5)
    train(optimizer, range(3))
    copies = copy.deepcopy((p, q))
    resumed = Ada2MS([{"params": [copies[0]]}, {"params": [copies[1]]}])
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for o in (optimizer, resumed):
        train(o, range(3, 6))
    assert_same([p, q], list(copies), 0)
