"""A trace in the numbers of `ada2ms.core.measurements`, for their picture: of any optimizer."""

import math
from typing import Any

import numpy as np

from ada2ms.core.measurements import PREFIX, RATIOS
from ada2ms.core.trace.model import Trace


def measured(trace: Trace) -> list[dict[str, Any]]:
    """A record for each step, as `ada2ms.inside.draw` takes them.

    The ratio is of the update to the value before it. The norm of an update is an estimate, within a factor of about 2,
    where a recorder has only the sketches of the values before and after it, as in torch.
    """
    records = []
    for step in trace.steps:
        hyper = step.hyper[0] if step.hyper else {}
        update, value, gradient = (step.sketches[what][:, 0] for what in ("update", "value", "gradient"))
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.where(step.missing, np.nan, update / value)
        record: dict[str, Any] = {f"{PREFIX}updates": step.number}
        record |= {PREFIX + name: hyper[name] for name in ("lr", "adaptivity") if name in hyper}
        record[f"{PREFIX}gradient_norm"] = math.sqrt(float(np.nansum(gradient**2)))
        record |= {f"{PREFIX}{RATIOS}/{p.name}": float(x) for p, x in zip(trace.parameters, ratios, strict=True)}
        records.append(record)
    return records
