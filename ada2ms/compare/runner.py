"""Does the runs of a comparison in parallel, and records each as soon as it has finished.

A folder holds `plan.json`, what is compared, and `runs.jsonl`, a line for each finished run. A comparison that was
killed goes on where it was when it is started again in its folder.
"""

import json
import multiprocessing
import os
import platform
import signal
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from ada2ms.compare.data import LOADERS, Data, load_cifar
from ada2ms.compare.protocol import EVERY_TASK, Protocol, Record, Run
from ada2ms.core.atomic import write_whole
from ada2ms.torch.drive import lacks


class CompareError(Exception):
    """A comparison that cannot be done, in a sentence for its user."""


def compare(
    protocol: Protocol,
    folder: Path,
    *,
    workers: int | None = None,
    device: str = "cpu",
    cifar: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Record]:
    """Does what is left to do of a comparison.

    Args:
        protocol: what to compare.
        folder: where plan and records are, or will be.
        workers: number of processes; by default, of cores. Each uses one core.
        device: of torch, on which all workers train.
        cifar: the folder of CIFAR, for the tasks that need it.
        progress: is called with the number of finished runs and of all.

    Returns:
        The records by the key of their runs.

    Raises:
        CompareError: the folder holds another comparison or is in use, or CIFAR or the device is not to be had.
    """
    if reason := lacks(device, "float32"):
        raise CompareError(f"Invalid device: {device!r} ({reason})")
    if cifar is None and any(EVERY_TASK[task].data == "CIFAR" for task in protocol.tasks):
        raise CompareError("The tasks with CIFAR need its folder (--cifar FOLDER)")
    if cifar is not None:
        try:
            load_cifar(cifar)
        except (OSError, ValueError) as error:
            raise CompareError(str(error)) from None
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock", timeout=0):
            _settle(protocol, folder)
            records = load(folder)
            _finish(protocol, folder, records, workers or os.cpu_count() or 1, device, cifar, progress)
    except Timeout:
        raise CompareError(f"Another comparison is running in {str(folder)!r}") from None
    return records


def load(folder: Path) -> dict[str, Record]:
    """The finished runs, by key. A last line that was cut short is taken off the file: its run is done again."""
    file = folder / "runs.jsonl"
    if not file.exists():
        return {}
    whole, newline, cut = file.read_bytes().rpartition(b"\n")
    if cut:
        os.truncate(file, len(whole) + len(newline))
    records = [json.loads(line) for line in whole.splitlines()]
    return {Run(**record["run"]).key: record for record in records}


def _settle(protocol: Protocol, folder: Path) -> None:
    """Writes the plan, or sees that it is the one that the folder has."""
    file, wanted = folder / "plan.json", protocol.as_data()
    if not file.exists():
        versions = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}
        plan = json.dumps({"protocol": wanted, "started with": versions}, indent=1) + "\n"
        write_whole(file, lambda stream: stream.write(plan.encode()))
        return
    found = json.loads(file.read_text())["protocol"]
    if found != wanted:
        parts = [key for key in wanted if found.get(key) != wanted[key]]
        raise CompareError(
            f"{str(folder)!r} holds another comparison: its {', '.join(parts)} differ (give another folder, or the "
            "options that it was started with)"
        )


def _finish(
    protocol: Protocol,
    folder: Path,
    records: dict[str, Record],
    workers: int,
    device: str,
    cifar: Path | None,
    progress: Callable[[int, int], None],
) -> None:
    total = protocol.total()
    progress(len(records), total)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start)
    running: dict[Future[Record], Run] = {}
    with (folder / "runs.jsonl").open("a") as file:
        try:
            while True:
                ready = [run for run in protocol.pending(records) if run not in running.values()]
                for run in ready[: workers - len(running)]:
                    running[pool.submit(_work, run, protocol, device, cifar)] = run
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    run = running.pop(future)
                    record = {"run": asdict(run), **future.result()}
                    file.write(json.dumps(record) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                    records[run.key] = record
                    progress(len(records), total)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start() -> None:
    # Ctrl-C ends the workers at once; the parent reports it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)


def _end_with_parent() -> None:
    """Ends a worker with its parent: workers of a pool would outlive a killed one, and wait forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(run: Run, protocol: Protocol, device: str, cifar: Path | None) -> Record:
    from ada2ms.compare.train import train

    return train(run, protocol, _data(EVERY_TASK[run.task].data, protocol.share, cifar), device)


@cache
def _data(name: str, share: float, cifar: Path | None) -> Data:
    if name == "CIFAR":
        assert cifar is not None
        return load_cifar(cifar, share)
    return LOADERS[name](share)
