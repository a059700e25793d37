"""Parameters of 16 bits: in which precision moments are kept, and how new values are rounded."""

from dataclasses import replace
from typing import Final

import numpy as np

from ada2ms.conformance.identification.experiments import Experiment
from ada2ms.conformance.identification.measure import Measured
from ada2ms.conformance.identification.report import Finding
from ada2ms.conformance.identification.run import GRAIN, Run, observe
from ada2ms.conformance.identification.subject import Subject
from ada2ms.core.dialects import OWN, Array, Dialect, Hyper, replay, rounded, said

_LONG: Final = 400
_SHORT: Final = 12
_DECAY: Final = 0.6


def describe_precision(subject: Subject, found: Measured, dtype: str) -> list[Finding]:
    """What is seen of moments and of rounding where parameters are of this dtype.

    Raises:
        CannotRunError: it does not run with such parameters.
    """
    hyper = {name: value for name, value in found.hyper.items() if name != "lr"}
    run = _long_run(subject, dtype)
    if not any(np.any(u) for u in run.updates[0]):
        return [Finding(dtype, "nothing moves", "every update is 0")]
    return [
        Finding(f"{dtype} moments", *_moments(run, found.dialect, hyper, dtype)),
        Finding(f"{dtype} values", *_values(subject, found, dtype)),
    ]


def _long_run(subject: Subject, dtype: str) -> Run:
    """Two large gradients, then small ones: a mean of squares that is kept in few bits stays where it was.

    Signs change, so that values stay near 0, where updates are not lost in them.
    """
    rng = np.random.default_rng(0)
    signs = np.where(np.arange(_LONG) % 20 < 10, 1.0, -1.0)[:, None] * rng.choice([-1.0, 1.0], 16)
    gradients = signs * rng.uniform(0.5, 1.0, (_LONG, 16))
    gradients[0] *= 64
    gradients[1] = -gradients[0]
    experiment = Experiment([np.zeros(16)], [[g] for g in gradients])
    return observe(subject, experiment, dtype, 0.0)


def _moments(run: Run, dialect: Dialect, hyper: Hyper, dtype: str) -> tuple[str, str]:
    if "state" not in OWN[dialect.family]:
        return "not looked at", ""
    off = {kind: _off(replace(dialect, state=kind), hyper, run) for kind in ("float32", dtype)}
    best, other = sorted(off, key=lambda kind: off[kind])
    if off[best] > 0.02:
        return "cannot be told", f"after {_LONG} steps updates are off by {100 * off[best]:.0f} % for either precision"
    if off[other] < 0.04:
        return "cannot be told", f"after {_LONG} steps they make a difference of {100 * off[other]:.0f} %"
    words = f"kept in {dtype}" if best == dtype else "kept in float32 or wider"
    return words, f"kept in {other}, updates would be off by {100 * off[other]:.0f} % after {_LONG} steps"


def _off(dialect: Dialect, hyper: Hyper, run: Run) -> float:
    """By how much later updates are off, where the learning rate is that of the earlier ones."""
    p, u = np.stack(_directions(dialect, hyper, run)), np.stack(run.updates[0])
    there = np.isfinite(p) & (np.abs(p) > np.median(np.abs(p)))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(there, u / p, np.nan)
    early, late = ratio[40:100][there[40:100]], ratio[-60:][there[-60:]]
    if early.size < 16 or late.size < 16 or np.median(early) == 0:
        return 1.0
    return float(abs(np.median(late) / np.median(early) - 1))


def _directions(dialect: Dialect, hyper: Hyper, run: Run) -> list[Array]:
    given = [
        {**hyper, "weight_decay": 0.0 if dialect.decay != "coupled" else hyper.get("weight_decay", 0.0)}
    ] * run.steps
    return [scaled for scaled, _ in replay(dialect, run.values[0], run.gradients[0], given, run.means, run.norms)]


def _values(subject: Subject, found: Measured, dtype: str) -> tuple[str, str]:
    """Updates of a third of a unit in the last place, and a decay that makes them more than a half for some values."""
    unit = GRAIN[dtype] / 2  # of values between a half and one
    settable = subject.settable >= {"lr", "weight_decay"} and found.dialect.decay != "coupled"
    probe = {"lr": 0.35 * unit, "weight_decay": _DECAY} if settable else {}
    lr = probe.get("lr", found.hyper.get("lr", 0.0))
    size = unit if settable else 1.0
    start = rounded(np.linspace(0.5, 0.99, 64), dtype) if settable else rounded(np.linspace(0.01, 0.99, 64), dtype)
    experiment = Experiment([start], [[np.ones(64)] for _ in range(_SHORT)])
    run = observe(subject, experiment, dtype, 0.0, **probe)
    again = observe(subject, experiment, dtype, 0.0, **probe)
    if not np.array_equal(run.last[0], again.last[0]):
        return "rounded at random", "two runs by the same gradients differ"
    hyper: Hyper = {**found.hyper, **probe}
    given = [{**hyper, "lr": lr}] * run.steps
    kinds = ("float32", dtype) if "state" in OWN[found.dialect.family] else ("float32",)
    exact = np.zeros_like(start)
    matches = {"once": 0.0, "apart": 0.0}
    for state in kinds:
        dialect = replace(found.dialect, state=state)
        made = replay(dialect, run.values[0], run.gradients[0], given, run.means, run.norms)
        exact = exact if state == dtype else sum((lr * scaled + rest for scaled, rest in made), np.zeros_like(start))
        after = np.stack([*run.values[0][1:], run.last[0]])
        for kind in matches:
            new = [_rounded(dialect, kind, x, *y, lr, hyper, dtype) for x, y in zip(run.values[0], made, strict=True)]
            matches[kind] = max(matches[kind], float(np.mean(np.stack(new) == after)))
    ulp = np.where(settable, size, GRAIN[dtype] * 2.0 ** np.floor(np.log2(np.abs(start))))
    there = np.abs(exact) > 3 * ulp
    total = run.last[0] - start
    if settable and np.all(np.abs(total - exact)[there] <= ulp[there]) and there.any():
        return "rounded, and what that loses is kept", f"{_SHORT} updates of less than half a unit add up"
    return _said(matches, settable)


def _said(matches: dict[str, float], settable: bool) -> tuple[str, str]:
    best = max(matches, key=lambda kind: matches[kind])
    other = min(matches.values())
    if matches[best] < 0.9:
        return "cannot be told", f"{100 * (1 - matches[best]):.0f} % of new values are those of no rounding looked for"
    if not settable or matches[best] - other < 0.02:
        return "rounded to nearest", f"{100 * matches[best]:.0f} % of new values are as expected"
    return (
        f"rounded {said('rounding', best)}",
        f"{100 * matches[best]:.0f} % of new values are as expected, else {100 * other:.0f} %",
    )


def _rounded(
    dialect: Dialect, kind: str, x: Array, scaled: Array, rest: Array, lr: float, hyper: Hyper, dtype: str
) -> Array:
    """New values: rounded once, or after decay and after the update."""
    if kind == "once":
        return rounded(x + lr * scaled + rest, dtype)
    taken = hyper.get("weight_decay", 0.0) * (1.0 if dialect.decay == "unscaled" else lr)
    pure = lr * scaled + rest + taken * x
    if dialect.decay == "after":
        moved = rounded(x + pure, dtype)
        return rounded(moved - taken * moved, dtype)
    return rounded(rounded(x * (1 - taken), dtype) + pure, dtype)
