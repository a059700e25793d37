"""What `compensated` costs in torch: a step of bfloat16 parameters with it, without it, and of float32, interleaved.

    python benchmarks/torch_compensated.py [--device cuda] [--rounds 15] [--adaptivity 0.5] [--only fused] [--smoke]

For each implementation: bytes that the operations of a step read and write, per parameter, as torch's dispatcher sees
them; the median over rounds of milliseconds a step, and of the ratio to the plain bfloat16 step in the same round.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch_step import MODELS, SMOKE, Bytes

from ada2ms.torch import Ada2MS

PLAIN = "bfloat16"
KINDS: dict[str, tuple[torch.dtype, bool]] = {
    PLAIN: (torch.bfloat16, False),
    "bfloat16, compensated": (torch.bfloat16, True),
    "float32": (torch.float32, False),
}
IMPLEMENTATIONS: dict[str, dict[str, Any]] = {
    "fused": {"fused": True},
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
}


def stepper(shapes: list[tuple[int, ...]], kind: str, device: str, **options: Any) -> Callable[[], Any]:
    """A step of an optimizer over parameters of its own, all with gradients."""
    dtype, compensated = KINDS[kind]
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return Ada2MS(params, compensated=compensated, **options).step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--adaptivity", type=float, default=0.5)
    parser.add_argument("--only", default="", help="implementations whose names contain this")
    parser.add_argument("--smoke", action="store_true", help="tiny models, once: whether it runs")
    options = parser.parse_args()
    wait = torch.cuda.synchronize if options.device.startswith("cuda") else lambda: None
    rounds, warmup = (1, 1) if options.smoke else (options.rounds, 2)
    shapes = (SMOKE if options.smoke else MODELS)["transformer of 76 tensors"]
    entries = sum(torch.Size(shape).numel() for shape in shapes)
    print(f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads, {entries / 1e6:.1f} M")
    print(f"{'':34}{'bytes':>7}{'ms':>9}{'/ bfloat16':>12}")
    for implementation, given in IMPLEMENTATIONS.items():
        if options.only not in implementation:
            continue
        steps = {kind: stepper(shapes, kind, options.device, adaptivity=options.adaptivity, **given) for kind in KINDS}
        moved = {}
        for kind, step in steps.items():
            step()  # makes the state, and compiles
            with Bytes() as counter:
                step()
            moved[kind] = counter.moved / entries
        times: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for r in range(warmup + rounds):
            for kind, step in steps.items():
                wait()
                start = time.perf_counter()
                step()
                wait()
                if r >= warmup:
                    times[kind].append(time.perf_counter() - start)
        for kind, found in times.items():
            ratio = statistics.median(t / base for t, base in zip(found, times[PLAIN], strict=True))
            median = statistics.median(found) * 1e3
            print(f"{f'{implementation}, {kind}':34}{moved[kind]:7.0f}{median:9.2f}{ratio:11.2f}x", flush=True)


if __name__ == "__main__":
    main()
