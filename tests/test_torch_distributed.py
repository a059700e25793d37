"""On several processes (gloo, CPU): every way to divide a model gives the trajectory of one process.

The bound, 1e-12 of the largest entry: float64, and sums in another order. All scenarios of a world run in one set of
processes; what they raise is the tests' to report.
"""

import functools
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed_checkpoints import resharded
from distributed_scenarios import CASES, FSDP2, RESHARDED, SCENARIOS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed"),
]


def runs(name: str) -> bool:
    """Whether this torch can: in 2.6, `fully_shard` does not run on CPUs."""
    return name not in FSDP2 or hasattr(torch.cpu.Stream, "record_event")


def work(rank: int, world: int, folder: str, shared: Path) -> None:
    """One process: every scenario of this world, and what each raised, if anything."""
    from datetime import timedelta

    torch.set_num_threads(1)
    outcome = {}
    dist.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    scenarios = {**SCENARIOS, RESHARDED: functools.partial(resharded, folder=shared)}
    for name in (name for size, name in CASES if size == world and runs(name)):
        try:
            scenarios[name](rank, world)
            outcome[name] = ""
        except Exception:
            outcome[name] = traceback.format_exc()
    torch.save(outcome, f"{folder}/{rank}.pt")
    dist.barrier()  # gloo may abort a process whose peer has gone
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, str]]]:
    shared = tmp_path_factory.mktemp("shared")

    @functools.cache
    def run(world: int) -> list[dict[str, str]]:
        if world != 2:
            run({4: 2, 1: 4}[world])  # whose checkpoint it loads
        folder: Path = tmp_path_factory.mktemp(f"world{world}")
        try:
            torch.multiprocessing.spawn(work, (world, str(folder), shared), nprocs=world)
        except Exception:  # for all tests of this world, each of which would start it again
            # Unless all was done, and gloo failed at leaving.
            if not all((folder / f"{rank}.pt").exists() for rank in range(world)):
                return [dict.fromkeys((*SCENARIOS, RESHARDED), traceback.format_exc())]
        return [torch.load(folder / f"{rank}.pt") for rank in range(world)]

    return run


@pytest.mark.parametrize(("world", "name"), CASES, ids=str)
def test_divided(world: int, name: str, outcomes: Callable[[int], list[dict[str, str]]]) -> None:
    if not runs(name):
        pytest.skip("the fully_shard of this torch does not run on CPUs")
    for rank, outcome in enumerate(outcomes(world)):
        assert not outcome[name], f"rank {rank}:\n{outcome[name]}"
