"""Traces of two processes (gloo, CPU): of the whole model, and as one process would have written them."""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed_support import STEPS, batch, model
from torch import nn

from ada2ms.core.trace import Trace
from ada2ms.core.trace.model import TENSORS
from ada2ms.torch import Recorder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed"),
]


def ddp(net: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(net)


def fsdp2(net: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    fully_shard(net[0])
    fully_shard(net)
    return net


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {"ddp": ddp, "fsdp2": fsdp2}


def train(net: nn.Module, path: Path, part: int | None, flush: int = 3) -> None:
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    with Recorder(path, net, optimizer, full=1, flush=flush, outputs=True) as recorder:
        for i in range(STEPS):
            x = batch(i, part)
            recorder.batch(x)
            loss = net(x).square().mean()
            recorder.loss(loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    for name, wrap in WAYS.items():
        try:
            train(wrap(model()), Path(folder, name), rank)
        except Exception:
            Path(folder, f"{name}.{rank}.error").write_text(traceback.format_exc())
    dist.barrier()  # gloo may abort a process whose peer has gone
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("traces")
    torch.multiprocessing.spawn(work, (str(place),), nprocs=2)
    train(model(), place / "alone", None)
    return place


@pytest.mark.parametrize("name", WAYS)
def test_the_trace_is_that_of_one_process(name: str, folder: Path) -> None:
    """In float64, to 1e-11 of each norm: sums in another order. Batches are another matter: halves in some order."""
    if name == "fsdp2" and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("the fully_shard of this torch does not run on CPUs")
    assert not [path.read_text() for path in folder.glob(f"{name}.*.error")]
    alone, divided = Trace.load(folder / "alone"), Trace.load(folder / name)
    assert [(p.name, p.shape, p.dtype) for p in divided.parameters] == [
        (p.name, p.shape, p.dtype) for p in alone.parameters
    ]
    assert divided.about["processes"] == 2
    assert len(divided.steps) == STEPS
    for a, b in zip(alone.steps, divided.steps, strict=True):
        assert a.loss is not None
        assert b.loss == pytest.approx(a.loss, rel=1e-12)
        assert same(b.batches[0][0][:4], a.batches[0][0][:4])
        for what in TENSORS:
            scale = np.maximum(a.sketches[what][:, :1], a.sketches["value"][:, :1])
            assert np.all(np.abs(a.sketches[what][:, 1:] - b.sketches[what][:, 1:]) <= 1e-11 * scale), what
    for what in TENSORS:
        for key, array in alone.steps[0].full[what].items():
            assert same(divided.steps[0].full[what][key], array), (what, key)


@pytest.mark.parametrize("name", WAYS)
def test_outputs_are_those_of_all_samples(name: str, folder: Path) -> None:
    """Their halves add up: sizes, totals, and sums over samples."""
    if name == "fsdp2" and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("the fully_shard of this torch does not run on CPUs")
    alone, divided = (Trace.load(folder / each).steps[0].outputs for each in ("alone", name))
    assert [each.name for each in divided] == [each.name for each in alone]
    assert len(alone) > 2
    for a, b in zip(alone, divided, strict=True):
        for x, y in zip([*a.arrays, *a.inputs], [*b.arrays, *b.inputs], strict=True):
            assert x.shape == y.shape
            assert same(x.total, y.total)
            assert same(x.pooled, y.pooled)


def same(a: Any, b: Any) -> bool:
    return bool(np.allclose(a, b, rtol=1e-10, atol=1e-12))
