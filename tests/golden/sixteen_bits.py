"""Golden cases of `compensated`: parameters of float16 and bfloat16 that keep what rounding loses."""

import math

from ada2ms.core.schedules import Linear

from .build import Data, both, case, group

DTYPES = ("float16", "bfloat16")


def cases() -> list[Data]:
    """Those of the theme "compensated"."""
    return [x for dtype in DTYPES for x in _alone(dtype)] + _together()


def _alone(dtype: str) -> list[Data]:
    """Parameters near 1 that move by less than they can hold: 2^-9 of them in bfloat16, 2^-12 in float16."""
    small = 2.0**-11 if dtype == "bfloat16" else 2.0**-14
    one = {"dtypes": (dtype, dtype), "size": 1.0}
    options = {"flags": "compensated", "compensated": True, "steps": 20, "record": (1, 20)}
    slow = group((3,), (2,), lr=small, weight_decay=0.25, **one)
    decaying = group((3,), (), lr=small, weight_decay=0.5, **one)
    strong = group((2, 2), (2,), lr=0.5, weight_decay=0.8, **one)
    alike = group((3,), (2,), lr=0.05, weight_decay=0.1, **one)
    return [
        *both(f"small-{dtype}", "updates that the parameters do not hold", slow, **options),
        case(
            f"decay-{dtype}",
            "decay alone, of less than the parameters hold",
            decaying,
            gradient=lambda *_: 0.0,
            **{**options, "flags": "compensated decay zero scalar"},
        ),
        case(
            f"decay-large-{dtype}",
            "lr*wd = 0.4",
            strong,
            **{**options, "flags": "compensated decay", "steps": 10, "record": (1, 10)},
        ),
        case(
            f"large-{dtype}",
            "updates of a part of the parameters",
            alike,
            **{**options, "steps": 10, "record": (1, 10)},
        ),
    ]


def _together() -> list[Data]:
    mixed = {"dtypes": ("bfloat16", None, "float16"), "size": 1.0, "lr": 2.0**-12}
    three = group((2,), (2,), (3,), weight_decay=0.5, **mixed)
    groups = (
        group((2,), lr=2.0**-11, weight_decay=0.5, dtypes=("bfloat16",), size=1.0, b2=0.9),
        group(
            (2,), (), lr=2.0**-12, weight_decay=0, dtypes=("bfloat16", "float16"), size=1.0, adaptivity=Linear(1, 0, 9)
        ),
    )
    below = group((3,), lr=2.0**-16, weight_decay=0.5, dtypes=("float16",), size=2.0**-12)
    last = group((3,), lr=10000, weight_decay=0, dtypes=("float16",), size=65000.0)
    options = {"compensated": True, "steps": 12, "record": (2, 12)}

    def nan(step: int, tensor: int, x: float) -> float:
        return math.nan if step == 3 and tensor == 1 else x

    def missing(step: int, tensor: int) -> bool:
        return (step + tensor) % 3 == 0

    return [
        *both("mixed", "float32 beside 16 bits", three, flags="compensated", **options),
        *both("groups", "groups, with and without decay", *groups, flags="compensated groups schedule", **options),
        case("clip", "with a norm that is reached", three, max_norm=0.5, flags="compensated clip", **options),
        case("missing", "missing gradients", three, missing=missing, flags="compensated missing", **options),
        case("skip", "skipped steps", three, gradient=nan, nonfinite="skip", flags="compensated nonfinite", **options),
        case(
            "propagate",
            "a NaN",
            three,
            gradient=nan,
            flags="compensated propagate",
            **{**options, "steps": 4, "record": (2, 4)},
        ),
        case("subnormal", "remainders below the smallest float16", below, flags="compensated", **options),
        case(
            "overflow",
            "beyond the largest float16: infinity, and no remainder",
            last,
            gradient=lambda step, _, x: -abs(x),
            flags="compensated",
            **options,
        ),
    ]
