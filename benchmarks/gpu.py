"""Tests and benchmarks on a GPU, in one report: `python dev.py gpu [--out FOLDER] [--only PART] [--smoke]`.

It runs in the Python that starts it and installs nothing, so it serves a machine that reaches no package index:
whatever it finds of torch, JAX and Keras is tested and measured, and the report says what was not run. It takes some
five minutes. Without a GPU the benchmarks run on the CPU, on one small model, which shows that they work and measures
nothing.

The report (`gpu.md` and `gpu.json`) has the date, versions and device; what `ada2ms check` says of them; a step's time
beside the framework's own AdamW, in interleaved rounds, with and without clipping; the share of the device's copy
bandwidth that it reaches; the kernels and copies it launches, the calls in it that wait for the device, and the memory
it takes; and the tests marked `gpu`.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_checks import Limits, Section, run_check, run_tests

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("ada2ms", "torch", "triton", "jax", "optax", "flax", "keras", "numpy")
Step = Callable[[], Any]
Shapes = list[tuple[int, ...]]


def transformer(width: int, layers: int, vocabulary: int) -> Shapes:
    """An embedding, and in each layer two norms, attention and a perceptron; a last norm."""
    layer: Shapes = [(width,)] * 4 + [(3 * width, width), (3 * width,), (width, width), (width,)]
    layer += [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [(vocabulary, width), *layer * layers, (width,), (width,)]


MODELS: dict[str, Shapes] = {
    "1 GB: 268 M parameters in 16 tensors": [(4096, 4096)] * 16,
    "a transformer: 27 M parameters in 75 tensors": transformer(512, 6, 16384),
    "1000 tensors of 32x32": [(32, 32)] * 1000,
}
SMALL: dict[str, Shapes] = {"a small model": [(64, 64)] * 2 + [(3,)]}


@dataclass
class Options(Limits):
    """What the command line asks for, and whether the framework at hand sees a GPU."""

    on_gpu: bool = False

    @property
    def models(self) -> dict[str, Shapes]:
        return MODELS if self.on_gpu and not self.smoke else SMALL

    @property
    def rounds(self) -> int:
        return 1 if self.smoke else 15


def interleaved(
    steps: dict[str, Step], wait: Callable[[], Any], rounds: int, repeat: int = 10
) -> dict[str, list[float]]:
    """Milliseconds a step, by round; in each, every optimizer has a turn of `repeat` steps. The first is a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for r in range(rounds + 1):
        for name, step in steps.items():
            wait()
            start = time.perf_counter()
            for _ in range(repeat):
                step()
            wait()
            if r:
                times[name].append((time.perf_counter() - start) / repeat * 1e3)
    return times


def compared(times: dict[str, list[float]], baseline: Callable[[str], str]) -> dict[str, dict[str, Any]]:
    """The medians over rounds of the time, and of its ratio to that of the row's baseline in the same round."""
    return {
        name: {
            "ms": round(statistics.median(found), 4),
            "baseline": baseline(name),
            "ratio": round(statistics.median(t / b for t, b in zip(found, times[baseline(name)], strict=True)), 3),
        }
        for name, found in times.items()
    }


def markdown(data: dict[str, dict[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(key for row in data.values() for key in row))
    lines = [["step", *columns], ["---"] * (len(columns) + 1)]
    lines += [[name, *[str(row.get(key, "")) for key in columns]] for name, row in data.items()]
    return [f"| {' | '.join(line)} |" for line in lines]


# PyTorch


def torch_steps(params: list[Any], on_gpu: bool) -> dict[str, Step]:
    """A step of each optimizer. They share parameters and gradients, but no state."""
    import torch
    from torch_trace import plain_and_recorded

    from ada2ms.torch import Ada2MS

    def clipped(optimizer: torch.optim.Optimizer) -> None:
        torch.nn.utils.clip_grad_norm_(params, 1e9)
        optimizer.step()

    steps: dict[str, Step] = plain_and_recorded(params)
    steps |= {f"Ada2MS {a:g} fused": Ada2MS(params, adaptivity=a, fused=True).step for a in (0.0, 0.3, 0.5, 1.0)}
    steps["clip, AdamW fused"] = partial(clipped, torch.optim.AdamW(params, fused=True))
    steps["clip, Ada2MS 0.5 fused"] = partial(clipped, Ada2MS(params, adaptivity=0.5, fused=True))
    steps["clip by max_norm, Ada2MS 0.5 fused"] = Ada2MS(params, adaptivity=0.5, fused=True, max_norm=1e9).step
    steps["AdamW default"] = torch.optim.AdamW(params).step
    steps["Ada2MS 0.5 default"] = Ada2MS(params, adaptivity=0.5).step
    short = [torch.nn.Parameter(p.detach().bfloat16()) for p in params]
    for p, q in zip(short, params, strict=True):
        p.grad = None if q.grad is None else q.grad.bfloat16()
    steps["bfloat16, AdamW fused"] = torch.optim.AdamW(short, fused=True).step
    steps["bfloat16, Ada2MS 0.5 fused"] = Ada2MS(short, adaptivity=0.5, fused=True).step
    steps["bfloat16, Ada2MS 0.5 fused compensated"] = Ada2MS(short, adaptivity=0.5, fused=True, compensated=True).step
    if on_gpu:
        for name, make in (("AdamW", torch.optim.AdamW), ("Ada2MS 0.5", partial(Ada2MS, adaptivity=0.5))):
            optimizer = make(params, fused=True, capturable=True)
            optimizer.step()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
            # The graph writes to the optimizer's state, which must live as long as it.
            steps[f"{name} fused, CUDA graph"] = partial(replayed, graph, optimizer)
    return steps


def replayed(graph: Any, optimizer: Any) -> None:
    graph.replay()


def torch_baseline(name: str) -> str:
    if name.startswith("clip"):
        return "clip, AdamW fused"
    if name.startswith("bfloat16"):
        return "bfloat16, AdamW fused"
    return "AdamW default" if "default" in name else f"AdamW fused{', CUDA graph' if 'graph' in name else ''}"


def observed(step: Step) -> dict[str, Any]:
    """What torch's profiler and allocator see of one step on CUDA."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as recorded:
        step()
    events = recorded.events() or []
    # The name of a step appears on the device too, as long as all that it launches.
    on_device = [e for e in events if "CUDA" in str(e.device_type) and not e.name.startswith("Optimizer.")]
    copies = [e for e in on_device if e.name.lower().startswith(("memcpy", "memset"))]
    waits = {"cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy"}
    return {
        "kernels": len(on_device) - len(copies),
        "copies": len(copies),
        "waits": sum(e.name in waits for e in events),
        "kernels' ms": round(sum(e.device_time for e in on_device) / 1e3, 3),
        "peak MiB": round(peak / 2**20, 1),
    }


def copy_bandwidth() -> float:
    """Bytes read and written in a second by copying 1 GB on the device, in GB/s; the median of 20."""
    import torch

    source = torch.ones(2**28, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return 2 * source.nbytes / statistics.median(times) / 1e6


def benchmark_torch(options: Options) -> Iterator[Section]:
    import torch

    device, bandwidth = "cuda" if options.on_gpu else "cpu", 0.0
    if options.on_gpu:
        bandwidth = copy_bandwidth()
        yield Section("Copy bandwidth", [f"A copy of 1 GB reads and writes {bandwidth:.0f} GB/s (median of 20)."])
    for title, shapes in options.models.items():
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
        for p in params:
            p.grad = torch.randn_like(p)
        steps = torch_steps(params, options.on_gpu)
        times = interleaved(steps, torch.cuda.synchronize if options.on_gpu else lambda: None, options.rounds)
        data = compared(times, torch_baseline)
        for name, row in data.items():
            if options.on_gpu and not name.startswith(("clip", "bfloat16")):
                # AdamW reads p, g, m, v and writes p, m, v, of four bytes each; Ada2MS reads g once more.
                moved = sum(p.numel() for p in params) * (28 if name.startswith("AdamW") else 32)
                row["of bandwidth"] = f"{moved / row['ms'] / 1e6 / bandwidth:.0%}"
            if options.on_gpu:
                row |= observed(steps[name])
        yield Section(f"PyTorch, {title}", markdown(data), data)


# JAX


def benchmark_jax(options: Options) -> Iterator[Section]:
    import jax
    import optax

    from ada2ms.jax import ada2ms

    clip = optax.clip_by_global_norm
    makers: dict[str, Callable[[], Any]] = {"adamw": lambda: optax.adamw(1e-3, weight_decay=1e-2)}
    makers |= {f"ada2ms {a:g}": partial(ada2ms, 1e-3, adaptivity=a) for a in (0.0, 0.3, 0.5, 1.0)}
    makers["clip, adamw"] = lambda: optax.chain(clip(1e9), optax.adamw(1e-3, weight_decay=1e-2))
    makers["clip, ada2ms 0.5"] = lambda: optax.chain(clip(1e9), ada2ms(1e-3, adaptivity=0.5))
    makers["clip by max_norm, ada2ms 0.5"] = partial(ada2ms, 1e-3, adaptivity=0.5, max_norm=1e9)
    for title, shapes in options.models.items():
        if len(shapes) > 500:  # compiling as many loops for each takes minutes
            continue
        keys = jax.random.split(jax.random.key(0), len(shapes))
        gradients = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
        held: dict[str, Any] = {}
        compiled = {name: compile_step(make(), gradients, held, name) for name, make in makers.items()}

        def step(name: str, compiled: Any = compiled, held: Any = held, gradients: Any = gradients) -> None:
            held[name] = compiled[name][0](*held[name], gradients)

        steps: dict[str, Step] = {name: partial(step, name) for name in makers}
        times = interleaved(steps, partial(jax.block_until_ready, held), options.rounds)
        data = compared(times, lambda name: "clip, adamw" if name.startswith("clip") else "adamw")
        for name, row in data.items():
            row |= compiled[name][1]
        yield Section(f"JAX, {title}", markdown(data), data)


def compile_step(optimizer: Any, gradients: Any, held: dict[str, Any], name: str) -> tuple[Any, dict[str, Any]]:
    """The jitted step of donated parameters and state, whose first ones go to `held`; and what compiling it told."""
    import jax
    import jax.numpy as jnp
    import optax

    def step(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = [jnp.ones_like(g) for g in gradients]
    held[name] = params, optimizer.init(params)
    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*held[name], gradients).compile()
    told: dict[str, Any] = {"compile s": round(time.perf_counter() - start, 1)}
    if (memory := compiled.memory_analysis()) is not None:
        told["temporaries MiB"] = round(memory.temp_size_in_bytes / 2**20, 1)
    return compiled, told


# The report


def sees_gpu(framework: str) -> bool:
    if framework == "torch":
        import torch

        return torch.cuda.is_available()
    import jax

    return jax.default_backend() == "gpu"


def device_name() -> str:
    if find_spec("torch") and sees_gpu("torch"):
        import torch

        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    if find_spec("jax") and sees_gpu("jax"):
        import jax

        return str(jax.devices()[0].device_kind)
    return f"no GPU, {platform.machine()} CPU"


def facts() -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {"date": str(datetime.date.today()), "device": device_name(), "versions": versions}


PARTS: dict[str, Callable[[Options], Iterator[Section]]] = {
    "check": run_check,
    "torch": benchmark_torch,
    "jax": benchmark_jax,
    "tests": run_tests,
}


def sections(only: str, options: Options) -> Iterator[Section]:
    for name, run in PARTS.items():
        if only not in (name, "all"):
            continue
        framework = name if name in ("torch", "jax") else ""
        if framework and find_spec(framework) is None:
            yield Section(framework, [f"Not run: {framework} is not installed."])
            continue
        options.on_gpu = bool(framework) and sees_gpu(framework)
        if framework and not options.on_gpu:
            yield Section(f"{framework} on the CPU", [f"{framework} sees no GPU; the figures below mean nothing."])
        try:
            yield from run(options)
        except Exception as error:  # the other parts are worth having
            traceback.print_exc()
            yield Section(name, [f"{type(error).__name__}: {error}"], ok=False)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("ada2ms-gpu"), help="folder of the report")
    parser.add_argument("--only", choices=("all", *PARTS), default="all", help="one part of it")
    parser.add_argument("--smoke", action="store_true", help="one small model, one round, no tests: whether it runs")
    parser.add_argument("--test-seconds", type=float, default=240, help="after which a run of tests is given up")
    given = parser.parse_args(arguments)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take the memory that torch needs
    sys.path.insert(0, str(ROOT))
    report: dict[str, Any] = facts()
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines = [f"# {report['device']}, {report['date']}", "", versions, ""]
    found = []
    for section in sections(given.only, Options(given.smoke, given.test_seconds)):
        found.append(section)
        lines += [f"## {section.title}{'' if section.ok else ': FAILED'}", "", *section.lines, ""]
        print("\n".join(lines[-len(section.lines) - 3 :]), flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "gpu.md").write_text("\n".join(lines))
    (given.out / "gpu.json").write_text(json.dumps({**report, "sections": [asdict(x) for x in found]}, indent=1))
    return 0 if all(section.ok for section in found) else 1


if __name__ == "__main__":
    sys.exit(main())
