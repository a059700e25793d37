"""What recording costs: a step of torch.optim.AdamW with a Recorder and without, interleaved in one run.

    python benchmarks/torch_trace.py [--device cuda] [--rounds 9] [--dtype float32] [--cpu-time] [--smoke]

On the transformer of torch_step.py: the median over rounds of milliseconds a step, by implementation, and the median of
what recording adds, in steps of the same AdamW. Sketches alone, without entries of tensors. A round is a step, on CUDA
20 of them with the flush that belongs to them. To compare with: the time in which torch sums all entries of values,
gradients and values, which are the bytes that sketches must read; and on CUDA the kernels that recording adds.
"""

import datetime
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch_step import SMOKE, transformer
from trace_options import parsed

from ada2ms.torch import Recorder
from ada2ms.torch.trace import DEFAULT_FLUSH


def plain_and_recorded(params: Sequence[nn.Parameter], **options: Any) -> dict[str, Callable[[], Any]]:
    """A step of a fused AdamW over these parameters, and of another one that a Recorder follows as long as it lives."""
    plain, traced = (torch.optim.AdamW(params, **{"fused": True, **options}) for _ in range(2))
    folder = tempfile.TemporaryDirectory()
    recorder = Recorder(Path(folder.name, "run"), {str(i): p for i, p in enumerate(params)}, traced, full=0)

    def recorded(kept: Any = (folder, recorder)) -> None:
        traced.step()

    return {"AdamW fused": plain.step, "AdamW fused, recorded": recorded}


def read(params: Sequence[nn.Parameter]) -> None:
    """All that sketches read, summed by torch."""
    for tensors in (params, [p.grad for p in params], params):
        for x in tensors:
            assert x is not None
            x.detach().sum()


def kernels(step: Callable[[], Any]) -> tuple[int, float]:
    """What CUDA runs in a step, and its milliseconds."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as recorded:
        step()
        torch.cuda.synchronize()
    found = [e for e in recorded.events() or [] if "CUDA" in str(e.device_type) and not e.name.startswith("Optimizer.")]
    return len(found), sum(e.device_time for e in found) / 1e3


def main() -> None:
    options, clock = parsed(__doc__, {"device": "cpu", "dtype": "float32"})
    shapes = next(iter(SMOKE.values())) if options.smoke else transformer()
    on_cuda = options.device.startswith("cuda")
    rounds, warmup, repeat = (1, 1, 1) if options.smoke else (options.rounds, 2, DEFAULT_FLUSH if on_cuda else 1)
    wait = torch.cuda.synchronize if on_cuda else lambda: None
    like: Any = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    params = [nn.Parameter(torch.randn(shape, **like)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    print(f"{datetime.date.today()}, torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads")
    moved = 3 * sum(p.nbytes for p in params)
    for name, way in (("default", {"fused": None}), ("fused", {})):
        steps = plain_and_recorded(params, **way) | {"read": lambda: read(params)}
        times: dict[str, list[float]] = {key: [] for key in steps}
        for r in range(warmup + rounds):
            for key, step in steps.items():
                wait()
                start = clock()
                for _ in range(repeat):
                    step()
                wait()
                if r >= warmup:
                    times[key].append((clock() - start) / repeat)
        plain, traced, reads = times.values()
        added = statistics.median(t / p - 1 for t, p in zip(traced, plain, strict=True))
        ms = [1e3 * statistics.median(found) for found in (plain, traced, reads)]
        print(
            f"AdamW {name:8} {ms[0]:8.2f} ms, recorded {ms[1]:8.2f} ms: {added:.2f} steps more; sums of these "
            f"{moved / 1e6:.0f} MB {ms[2]:8.2f} ms",
            flush=True,
        )
        if on_cuda:
            (few, short), (many, long) = (kernels(step) for step in list(steps.values())[:2])
            print(f"      {few} kernels and copies, {short:.3f} ms; recorded {many}, {long:.3f} ms", flush=True)


if __name__ == "__main__":
    main()
