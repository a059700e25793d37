"""What a trace has of each tensor, entry by entry: what dialects are asked to explain."""

from dataclasses import dataclass, field

import numpy as np

from ada2ms.core.dialects import Hyper
from ada2ms.core.trace.model import Parameter, Trace
from ada2ms.core.trace.sketch import Array

_ENTRIES = 2048  # of each tensor that are looked at


@dataclass
class Series:
    """What is recorded of a tensor, entry by entry, for the first steps."""

    parameter: Parameter
    values: list[Array] = field(default_factory=list)
    gradients: list[Array | None] = field(default_factory=list)
    updates: list[Array] = field(default_factory=list)
    hyper: list[Hyper] = field(default_factory=list)
    narrow: bool = False  # whether the framework computes 1 - beta^t in float32
    means: dict[str, list[float]] = field(default_factory=lambda: {"model": [], "tensor": []})


def series(trace: Trace) -> list[Series]:
    """The first steps, as far as entries of all of them were recorded and gradients are finite; none if the optimizer
    had begun before.
    """
    found = [Series(p, narrow=trace.about.get("framework") in ("jax", "keras")) for p in trace.parameters]
    if trace.about.get("started"):
        return []
    tensors: dict[str, list[int]] = {}  # of which each parameter is, or is a part
    for i, p in enumerate(trace.parameters):
        tensors.setdefault(p.own, []).append(i)
    for step in trace.steps:
        norms = step.sketches["gradient"][:, 0]
        there = ~step.missing
        if not step.full or step.skipped or not np.isfinite(norms[there]).all():
            break
        sizes = np.array([p.size for p in trace.parameters], np.float64)
        total = float(np.sum(np.square(norms[there]))) / max(float(sizes[there].sum()), 1.0)
        for i, each in enumerate(found):
            name = each.parameter.name
            if name not in step.full.get("value", {}) or name not in step.full.get("update", {}):
                return []
            each.values.append(_flat(step.full["value"][name]))
            each.updates.append(_flat(step.full["update"][name]))
            gradient = step.full.get("gradient", {}).get(name)
            each.gradients.append(None if gradient is None or step.missing[i] else _flat(gradient))
            group = min(each.parameter.group, len(step.hyper) - 1)
            each.hyper.append(step.hyper[group] if step.hyper else {})
            each.means["model"].append(total)
            own = tensors[each.parameter.own]
            mean = float(np.sum(np.square(norms[own]))) / max(float(sizes[own].sum()), 1.0)
            each.means["tensor"].append(mean if there[i] else 0.0)
    return [each for each in found if each.values]


def _flat(array: Array) -> Array:
    """As float64, at most so many entries, evenly spread."""
    x = np.asarray(array, np.float64).reshape(-1)
    return x if x.size <= _ENTRIES else x[np.arange(_ENTRIES) * x.size // _ENTRIES]
