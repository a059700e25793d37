"""What recording costs: a step of torch.optim.AdamW with a Recorder and without, interleaved in one run.

    python benchmarks/torch_trace.py [--device cuda] [--rounds 9] [--smoke]

On the transformer of torch_step.py: the median over rounds of milliseconds a step, by implementation, and the median of
what recording adds, in steps of the same AdamW. Sketches alone, without entries of tensors.
"""

import argparse
import datetime
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch_step import SMOKE, transformer

from ada2ms.torch import Recorder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--smoke", action="store_true", help="tiny model, once: whether it runs")
    options = parser.parse_args()
    shapes = next(iter(SMOKE.values())) if options.smoke else transformer()
    rounds, warmup = (1, 1) if options.smoke else (options.rounds, 2)
    wait = torch.cuda.synchronize if options.device.startswith("cuda") else lambda: None
    params = {f"p{i}": nn.Parameter(torch.randn(shape, device=options.device)) for i, shape in enumerate(shapes)}
    for p in params.values():
        p.grad = torch.randn_like(p)
    print(f"{datetime.date.today()}, torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads")
    for name, way in (("default", {}), ("fused", {"fused": True})):
        plain, traced = (torch.optim.AdamW(params.values(), **way) for _ in range(2))
        times: dict[str, list[float]] = {"plain": [], "traced": []}
        with tempfile.TemporaryDirectory() as folder, Recorder(Path(folder, "run"), params, traced, full=0):
            for r in range(warmup + rounds):
                for key, optimizer in (("plain", plain), ("traced", traced)):
                    wait()
                    start = time.perf_counter()
                    optimizer.step()
                    wait()
                    if r >= warmup:
                        times[key].append(time.perf_counter() - start)
        added = statistics.median(t / p - 1 for t, p in zip(times["traced"], times["plain"], strict=True))
        ms = {key: 1e3 * statistics.median(found) for key, found in times.items()}
        print(
            f"AdamW {name:8} {ms['plain']:8.2f} ms, recorded {ms['traced']:8.2f} ms: {added:.2f} steps more", flush=True
        )


if __name__ == "__main__":
    main()
