"""The time of a step of the torch optimizer against torch.optim.AdamW, interleaved in one run.

    python benchmarks/torch_step.py [--device cuda] [--isa avx2] [--rounds 15] [--only transformer]
        [--implementation fused] [--smoke]

For three shapes of model, and for a copy of as many bytes: the median over rounds of milliseconds a step; the median
over rounds of the ratio to AdamW's time in the same round, of the same implementation (with and without clipping of the
gradients' norm, which reads them once more as Ada2MS does); bytes that the operations of a step read and write, per
parameter, as torch's dispatcher sees them; and these bytes by the time. "max_norm" clips by the step's own sum, "after
clip" by `clip_grad_norm_`, to whose time the last ratio is.

`--isa` has all that is measured, torch's own kernels included, keep to these instructions, on a machine that has more.
"""

import argparse
import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ada2ms.torch import Ada2MS

IMPLEMENTATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
ADAPTIVITIES = (0.0, 0.5, 1.0, 0.3)


def transformer(width: int = 512, vocabulary: int = 16384, layers: int = 6) -> list[tuple[int, ...]]:
    """Embeddings of tokens and places, per layer two norms, attention and a multilayer perceptron, and a last norm."""
    linear: Callable[[int, int], list[tuple[int, ...]]] = lambda i, o: [(o, i), (o,)]  # noqa: E731
    norm: list[tuple[int, ...]] = [(width,), (width,)]
    attention = linear(width, 3 * width) + linear(width, width)
    perceptron = linear(width, 4 * width) + linear(4 * width, width)
    return [(vocabulary, width), (1024, width), *layers * (norm + attention + norm + perceptron), *norm]


MODELS: dict[str, list[tuple[int, ...]]] = {
    "4 large tensors": [(2560, 2560)] * 4,
    "transformer of 76 tensors": transformer(),
    "1000 small tensors": [(32, 32)] * 1000,
}
SMOKE: dict[str, list[tuple[int, ...]]] = {name: [(8, 8)] * 2 for name in MODELS}


class Bytes(TorchDispatchMode):
    """Counts what operations read and write, taken from their arguments; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.is_view:
            return result
        given: set[int] = set()
        for argument, value in zip(func._schema.arguments, args, strict=False):
            tensors = [x for x in tree_leaves(value) if isinstance(x, Tensor)]
            given.update(map(id, tensors))
            use = (func._schema.name, argument.name)
            reads = use != ("aten::copy_", "self")
            writes = argument.is_write and use != ("aten::_fused_adamw_", "grads")  # only with grad_scale
            self.moved += (reads + writes) * sum(x.nbytes for x in tensors)
        self.moved += sum(x.nbytes for x in tree_leaves(result) if isinstance(x, Tensor) and id(x) not in given)
        return result


def steppers(params: list[nn.Parameter]) -> dict[tuple[str, str], Callable[[], Any]]:
    """A step of each optimizer, by optimizer and implementation. They share parameters and gradients, not state."""
    found: dict[tuple[str, str], Callable[[], Any]] = {}
    for implementation, options in IMPLEMENTATIONS.items():
        adamw = torch.optim.AdamW(params, **options)
        found["AdamW", implementation] = adamw.step
        found["clip + AdamW", implementation] = partial(clipped, params, adamw)
        for a in ADAPTIVITIES:
            if a in (0.3, 0.5) or implementation != "for-loop":
                plain, clipping, after = (
                    Ada2MS(params, adaptivity=a, max_norm=max_norm, **options) for max_norm in (None, 1.0, None)
                )
                found[f"Ada2MS {a:g}", implementation] = plain.step
                found[f"Ada2MS {a:g} max_norm", implementation] = clipping.step
                found[f"Ada2MS {a:g} after clip", implementation] = partial(clipped, params, after)
    return found


def clipped(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """A step after torch's clip, which multiplies the gradients by its factor, here 1, whatever that is."""
    nn.utils.clip_grad_norm_(params, 1e9)
    optimizer.step()


def keep_to(isa: str) -> None:
    """Has torch use the kernels for these instructions, and the fused step be compiled for them; before either is used.

    Raises:
        SystemExit: this machine has no such instructions, or torch has chosen already.
    """
    os.environ["ATEN_CPU_CAPABILITY"] = isa
    if (found := torch.backends.cpu.get_cpu_capability()) != isa.upper():
        raise SystemExit(f"--isa {isa}: torch takes its kernels for {found} on this machine")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--isa", choices=["avx2", "avx512", "default"], help="default: without AVX (x86-64: SSE2)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="models whose names contain this")
    parser.add_argument("--implementation", default="", help="implementations whose names contain this")
    parser.add_argument("--smoke", action="store_true", help="tiny models, once: whether it runs")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    if options.isa:
        keep_to(options.isa)
    wait = torch.cuda.synchronize if options.device.startswith("cuda") else lambda: None
    rounds, warmup = (1, 1) if options.smoke else (options.rounds, 2)
    print(
        f"{datetime.date.today()}, torch {torch.__version__}, {options.device}, {platform.machine()} with "
        f"{torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads, median of {rounds} rounds"
    )
    for title, shapes in (SMOKE if options.smoke else MODELS).items():
        if options.only not in title:
            continue
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(shape, device=options.device)) for shape in shapes]
        for p in params:
            p.grad = torch.randn_like(p)
        entries = sum(p.numel() for p in params)
        steps = {key: step for key, step in steppers(params).items() if options.implementation in key[1]}
        source = torch.zeros(entries, device=options.device)
        steps["copy", ""] = partial(torch.empty_like(source).copy_, source)

        moved = {}
        for key, step in steps.items():
            step()  # makes the state, and compiles
            with Bytes() as counter:
                step()
            moved[key] = counter.moved / entries
        repeat = 1 if options.smoke else max(1, 2_000_000 // entries)
        times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
        for r in range(warmup + rounds):
            for key, step in steps.items():
                wait()
                start = time.perf_counter()
                for _ in range(repeat):
                    step()
                wait()
                if r >= warmup:
                    times[key].append((time.perf_counter() - start) / repeat)

        print(f"\n{title}, {entries / 1e6:.1f} M parameters")
        print(f"{'':32}{'ms':>9}{'/ AdamW':>9}{'/ clip + AdamW':>16}{'/ after clip':>14}{'bytes':>8}{'GB/s':>8}")
        for (name, implementation), found in times.items():
            ratios = ""
            if name.startswith("Ada2MS"):
                after = name.replace("max_norm", "after clip") if "max_norm" in name else ""
                for other, width in (("AdamW", 9), ("clip + AdamW", 16), (after, 14)):
                    base = times.get((other, implementation))
                    if base is None:
                        continue
                    ratios += f"{statistics.median(t / b for t, b in zip(found, base, strict=True)):{width - 1}.2f}x"
            median, per_entry = statistics.median(found), moved[name, implementation]
            print(
                f"{f'{name}, {implementation}'.strip(', '):32}{median * 1e3:9.2f}{ratios:39}{per_entry:8.0f}"
                f"{per_entry * entries / median / 1e9:8.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
