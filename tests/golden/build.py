"""What a golden case is made of: hyperparameters, initial parameters and gradients, as plain data for the oracle.

Numbers are drawn by `random.Random(id).random()`, a sequence that Python guarantees, through sums and products only, so
that every machine makes the same bytes. Initial parameters have about the size of the whole run's update, so that
p_t - p_0 keeps its digits, and the tensors' gradients differ in size, so that it matters whose mean is taken.
"""

import math
import random
import struct
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from ada2ms.core.schedules import AdaptivitySchedule

Data = dict[str, Any]
Shape = tuple[int, ...]
Gradient = Callable[[int, int, float], float]  # step from 1, tensor from 0, the drawn value -> the gradient's entry

NOTES: Final = {
    "beta": "a decay rate of 0 (no memory, correction 1) or close to 1 (corrections that cancel in single precision)",
    "clip": "gradients are scaled down to the norm `max_norm`, over the whole model in either scope, before everything",
    "compensated": "parameters of 16 bits that keep what rounding loses: compare parameter + compensation",
    "decay": "weight decay that matters: decoupled, scaled by lr, applied to the value before the update",
    "empty": "a tensor without entries: it has counts and an s, and takes no part in the mean",
    "eps": "eps as large as the root it is added to: after bias correction, outside the root",
    "eps=0": "without eps the update is 0 wherever the denominator is 0",
    "groups": "groups with hyperparameters of their own; with scope `model` one mean feeds the s of each",
    "huge": "gradients of 1e15: their squares are finite in single precision, products of two squares are not",
    "long": "1000 steps",
    "lr": "a learning rate that changes: the i-th number is for the i-th step",
    "missing": "tensors without a gradient in some steps: they and their state stay, and leave the mean for that step",
    "missing-all": "steps without any gradient change nothing: no count moves",
    "nonfinite": "steps with a gradient that is not finite, which change nothing but `skipped`, in either scope",
    "propagate": "a NaN without the guard: through s it reaches every parameter that is updated",
    "scalar": "a tensor of rank 0",
    "schedule": "the adaptivity is a schedule of completed updates: a(0) is for the first",
    "sign": "gradients that change sign at every step",
    "tiny": "gradients far below eps",
    "zero": "gradients of 0: no NaN",
}
SCOPES: Final = ("model", "tensor")
MATRIX: Final[tuple[Shape, ...]] = ((2, 2), (2,))
HYPER: Final = {"lr": 0.01, "b1": 0.9, "b2": 0.99, "eps": 1e-8, "weight_decay": 0.5, "adaptivity": 0.5}


def group(*shapes: Shape, **hyper: Any) -> Data:
    """A parameter group, with `HYPER` for what is not named.

    Two more names may be given: `dtypes`, "float16", "bfloat16" or None for each tensor, and `size`, that of the
    initial parameters.
    """
    return {"shapes": shapes or MATRIX, **HYPER, **hyper}


def case(
    name: str,
    comment: str,
    *groups: Data,
    scope: str = "model",
    nonfinite: str = "propagate",
    max_norm: float | None = None,
    compensated: bool = False,
    flags: str = "",
    steps: int = 10,
    record: tuple[int, ...] = (1, 2, 3, 5, 10),
    gradient: Gradient = lambda step, tensor, x: x,
    missing: Callable[[int, int], bool] = lambda step, tensor: False,
) -> Data:
    """A case with drawn numbers; `gradient` and `missing` shape the gradients."""
    draw = random.Random(name).random
    groups = groups or (group(),)
    shapes = [shape for g in groups for shape in g["shapes"]]
    dtypes = [dtype for g in groups for dtype in g.get("dtypes", [None] * len(g["shapes"]))]
    return {
        "id": f"{name}-{scope}",
        "comment": comment,
        "flags": flags.split(),
        "scope": scope,
        "nonfinite": nonfinite,
        **({} if max_norm is None else {"max_norm": float(max_norm)}),
        **({"compensated": True} if compensated else {}),
        "groups": [_group(g, steps, draw) for g in groups],
        "gradients": [
            [
                None
                if missing(step, tensor)
                else [
                    exact(gradient(step, tensor, 3.0**-tensor * (0.3 + draw()) * (1.5 * draw() - 0.5)), dtypes[tensor])
                    for _ in range(math.prod(shape))
                ]
                for tensor, shape in enumerate(shapes)
            ]
            for step in range(1, steps + 1)
        ],
        "record": record,
    }


def both(name: str, comment: str, *groups: Data, **options: Any) -> list[Data]:
    """The same case in either scope."""
    return [case(name, comment, *groups, scope=scope, **options) for scope in SCOPES]


def single(x: float) -> float:
    """The nearest number that is exact in float32."""
    return float(np.float32(x))


def exact(x: float, dtype: str | None) -> float:
    """A number near x that is exact in float32 and in the type of 16 bits, if there is one."""
    if dtype is None or not math.isfinite(x):
        return single(x)
    data = bits(x, dtype).to_bytes(2, "little")
    value: float = struct.unpack("<e", data)[0] if dtype == "float16" else struct.unpack("<f", b"\0\0" + data)[0]
    return value


def bits(x: float, dtype: str) -> int:
    """The bits of a number near x: of the nearest float16, or of the bfloat16 towards 0."""
    data = struct.pack("<e", x) if dtype == "float16" else struct.pack("<f", x)[2:]
    return int.from_bytes(data, "little")


def _group(data: Data, steps: int, draw: Callable[[], float]) -> Data:
    lr, a = data["lr"], data["adaptivity"]
    size = data.get("size") or (sum(lr) if isinstance(lr, list) else (lr or HYPER["lr"]) * steps)
    params = []
    for shape, dtype in zip(data["shapes"], data.get("dtypes", [None] * len(data["shapes"])), strict=True):
        drawn = [size * (2 * draw() - 1) for _ in range(math.prod(shape))]
        if dtype is None:
            params.append({"shape": list(shape), "values": [single(x) for x in drawn]})
        else:
            params.append({"shape": list(shape), "dtype": dtype, "values": [bits(x, dtype) for x in drawn]})
    return {
        "lr": [float(x) for x in lr] if isinstance(lr, list) else float(lr),
        **{name: float(data[name]) for name in ("b1", "b2", "eps", "weight_decay")},
        "adaptivity": a.to_dict() if isinstance(a, AdaptivitySchedule) else float(a),
        "params": params,
    }
