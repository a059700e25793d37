"""How small a fault may be and still be found: the table of margins in docs/trace.md.

    PYTHONPATH=. python tests/trace_margins.py            prints the table
    PYTHONPATH=. python tests/trace_margins.py --write    writes it

The small network of `trace_training.py` in torch, in 8 steps; B sums the samples of its batches in another order
and has the fault. Hyperparameters are taken out of both traces, so that only updates tell of them.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import trace_faults
from trace_faults import adamw

from ada2ms.core.trace import Trace, Verdict, diff

DOCS = Path(__file__).parents[1] / "docs" / "trace.md"
SIZES = [10.0**-k for k in range(1, 9)]
WITHIN = {"data": {"within": True}}


def penalized(size: float) -> Any:
    def loss(net: Any, logits: Any, ys: Any) -> Any:
        from torch.nn import functional

        squares = sum(p.square().sum() for p in net.parameters())
        return functional.cross_entropy(logits, ys) + 0.5 * size * squares

    return loss


def scaled(size: float) -> Any:
    def before(net: Any, i: int) -> None:
        for p in net.parameters():
            p.grad *= 1 + size

    return before


FAULTS: dict[str, tuple[str, Callable[[float], dict[str, Any]], str]] = {
    "lr times 1 + x": (
        "update",
        lambda x: {"wrong_from": (0, 1 + x)},
        "",
    ),
    "weight decay of 0.01 + x": ("update", lambda x: {"optimizer": adamw(weight_decay=0.01 + x)}, ""),
    "eps of x": ("update", lambda x: {"optimizer": adamw(eps=x)}, " (A: 1e-8)"),
    "beta_2 of 0.999 - x": ("update", lambda x: {"optimizer": adamw(betas=(0.9, 0.999 - x))}, ""),
    "loss and gradients times 1 + x": (
        "forward",
        lambda x: {"scale": 1 + x, "report": lambda loss: loss * (1 + x)},
        "",
    ),
    "gradients times 1 + x": ("gradient", lambda x: {"before": scaled(x)}, ""),
    "a penalty of x/2 times squares": ("forward", lambda x: {"loss": penalized(x)}, ""),
    "LayerNorm's epsilon of 1e-5 + x": ("forward", lambda x: {"norm_eps": 1e-5 + x}, ""),
}


def untold(trace: Trace) -> Trace:
    return replace(trace, steps=[replace(step, hyper=[]) for step in trace.steps])


def verdict(name: str, size: float) -> Verdict:
    """Of a fault of a size."""
    a = trace_faults.trace("torch", {})
    b = trace_faults.trace("torch", {**WITHIN, **FAULTS[name][1](size)})
    return diff(untold(a), untold(b))


def smallest(name: str) -> tuple[float, Verdict]:
    """The smallest size that is found in the right stage, as are all larger ones; and what is said of it."""
    found = None
    for size in SIZES:
        said = verdict(name, size)
        if (said.outcome, said.stage) != ("parted", FAULTS[name][0]):
            break
        found = size, said
    assert found is not None, name
    return found


def table() -> str:
    """As Markdown."""
    lines = ["| fault in B | smallest x that is found | stage | what is said of it |", "| --- | --- | --- | --- |"]
    for name, (_, _, note) in FAULTS.items():
        size, said = smallest(name)
        lines.append(f"| {name}{note} | {size:.0e} | {said.stage} | {said.cause} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    made = table()
    if "--write" in sys.argv:
        text = DOCS.read_text()
        DOCS.write_text(re.sub(r"\| fault in B \|.*\n(\|.*\n)*", lambda _: made, text))
    else:
        print(made)
