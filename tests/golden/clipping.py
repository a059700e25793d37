"""Golden cases of `max_norm`: gradients that are clipped by their norm over the whole model."""

import math
from typing import Any

from ada2ms.core.schedules import Linear

from .build import SCOPES, Data, Shape, case, group


def two(**hyper: Any) -> Data:
    """Two small tensors: these cases are many. The norms of the gradients that are drawn are from 0.2 to 1."""
    return group((2,), (1,), **hyper)


def one(name: str, comment: str, *groups: Data, flags: str = "", **options: Any) -> Data:
    """A case; with `two` tensors, if no group is given."""
    return case(name, comment, *(groups or (two(),)), flags=f"clip {flags}", **{"record": (3, 10), **options})


def in_both(name: str, comment: str, *groups: Data, **options: Any) -> list[Data]:
    return [one(name, comment, *groups, scope=scope, **options) for scope in SCOPES]


def cases() -> list[Data]:
    """Those of the theme "clip"."""
    return [*_how_often(), *_magnitudes(), *_whose_norm(), *_nonfinite()]


def _how_often() -> list[Data]:
    def growing(step: int, tensor: int, x: float) -> float:
        return 1.5 ** (step - 5) * x

    def calming(step: int, tensor: int, x: float) -> float:
        return x if step < 3 else 0.1 * x

    found = [
        one("never", "the norm is never reached", max_norm=50),
        one("infinite", "an infinite norm clips nothing", max_norm=math.inf),
        *in_both("always", "every step is clipped", max_norm=0.01),
        *in_both("sometimes", "some steps are clipped", gradient=growing, max_norm=0.5),
        one("first", "the first two steps are clipped", gradient=calming, max_norm=0.25),
    ]
    for a in (0, 0.25, 1):
        other = two(adaptivity=a)
        found += [one(f"adaptivity-{a}", f"adaptivity {a}", other, gradient=growing, max_norm=0.5)]
    fading = two(adaptivity=Linear(1, 0, 6), lr=[0.002 * i for i in range(1, 11)])
    forgetful = two(b1=0, b2=0, eps=1e-2)
    return [
        *found,
        one("schedule", "both schedules", fading, gradient=growing, max_norm=0.5, flags="schedule lr"),
        one("forgetful", "no averages", forgetful, gradient=growing, max_norm=0.5, flags="beta eps"),
    ]


def _magnitudes() -> list[Data]:
    def sparse(step: int, tensor: int, x: float) -> float:
        return 0.0 if step in (1, 4, 5) or (tensor == 0 and step == 7) else x

    def huge(step: int, tensor: int, x: float) -> float:
        return 1e15 * x if step in (2, 3, 7) else x

    near = two(eps=1e-13, lr=1, weight_decay=0.01)
    return [
        *in_both("zeros", "steps of zeros: nothing to clip", gradient=sparse, max_norm=0.1, flags="zero"),
        one("zeros-only", "nothing but zeros", gradient=lambda *_: 0.0, max_norm=0.1, flags="zero"),
        *in_both("huge", "three steps of 1e15 among others", gradient=huge, max_norm=0.5, flags="huge"),
        *in_both(
            "tiny",
            "norms near 1e-6, and nothing is added to them",
            near,
            gradient=lambda step, _, x: 1e-6 * step * x,
            max_norm=2e-6,
            flags="tiny",
        ),
    ]


def _whose_norm() -> list[Data]:
    mixed: tuple[Shape, ...] = ((), (0,), (2, 2), (2, 0, 3), (3,))
    groups = (
        group((2,), weight_decay=2, b2=0.9, adaptivity=0.25),
        group((3,), (), lr=0.04, weight_decay=0, b1=0.5, adaptivity=Linear(1, 0, 6)),
    )
    three = group((2,), (3,), ())

    def alternating(step: int, tensor: int) -> bool:
        return (step + tensor) % 3 == 0 or step == 5

    return [
        *in_both(
            "one-tensor-larger",
            "one tensor alone is above the norm",
            gradient=lambda step, tensor, x: 30.0**tensor * x if step % 2 else x,
            max_norm=1,
        ),
        *in_both("mixed", "tensors of all shapes", group(*mixed), max_norm=0.5, flags="scalar empty"),
        *in_both("groups", "one norm over all groups", *groups, max_norm=0.4, flags="groups schedule"),
        *in_both(
            "missing",
            "the norm is of the gradients that there are",
            three,
            missing=alternating,
            max_norm=0.3,
            flags="missing missing-all",
        ),
    ]


def _nonfinite() -> list[Data]:
    def nan(step: int, tensor: int, x: float) -> float:
        return math.nan if step == 3 and tensor == 1 else x

    def infinite(step: int, tensor: int, x: float) -> float:
        return math.copysign(math.inf, x) if step == 3 and tensor == 1 else x

    skipping = {"nonfinite": "skip", "record": (2, 4, 10)}
    kept = {"record": (2, 4), "steps": 4}
    return [
        *in_both("skip-nan", "a NaN is skipped", gradient=nan, max_norm=0.3, flags="nonfinite", **skipping),
        *in_both("skip-infinite", "as is infinity", gradient=infinite, max_norm=0.3, flags="nonfinite", **skipping),
        *in_both("propagate-nan", "c is NaN", gradient=nan, max_norm=0.3, flags="propagate", **kept),
        *in_both("propagate-infinite", "c is 0", gradient=infinite, max_norm=0.3, flags="propagate", **kept),
    ]
