"""Thresholds: each is ten times what it is, and a tenth, and a verdict is wrong then.

For each there is a case on either side, mostly at a third of it and at three times it: what a tighter one would
convict, or call by another name, and what a looser one would miss.
"""

import copy
import math
import sys
from collections.abc import Callable

import numpy as np
import pytest
from trace_faults import trace

from ada2ms.core.dialects import Dialect, replay
from ada2ms.core.trace import Trace, Verdict, diff
from ada2ms.core.trace.explain import decaying, fit
from ada2ms.core.trace.model import fingerprint
from ada2ms.core.trace.pair import Pair
from ada2ms.core.trace.series import series
from ada2ms.core.trace.sketch import sketch

KERNEL = "3.dense.kernel"


def plain(full: bool = True) -> Trace:
    """A run without batches, of which updates are known by their sketches alone."""
    found = copy.deepcopy(trace("torch", {} if full else {"full": 0}))
    for step in found.steps:
        step.batches = []
        step.full.pop("update", None)
    return found


def noisy(share: float, seed: int, like: np.ndarray) -> np.ndarray:
    """Without direction, of a share of a tensor's norm."""
    noise = np.random.default_rng(seed).normal(size=like.shape)
    return noise * share * float(np.linalg.norm(like)) / float(np.linalg.norm(noise))


def regraded(change: Callable[[int, np.ndarray], np.ndarray], loss: float = 1.0) -> tuple[Trace, Trace]:
    """A run, and one with other gradients of the first step."""
    a, b = plain(), plain()
    step = b.steps[0]
    for k, p in enumerate(b.parameters):
        x = change(k, step.full["gradient"][p.name].astype(np.float64)).astype(np.float32)
        step.full["gradient"][p.name] = x
        step.sketches["gradient"][k] = sketch(x)
    step.loss = None if step.loss is None else step.loss * loss
    return a, b


def drifting(shares: list[float]) -> tuple[Trace, Trace]:
    """Gradients of which only sketches are known, and which are so far apart at each step."""
    a, b = plain(full=False), plain(full=False)
    for i, (step, share) in enumerate(zip(b.steps, shares, strict=True)):
        rows = step.sketches["gradient"]
        noise = np.random.default_rng(i).normal(size=(len(rows), 8))
        noise *= np.sqrt(8) / np.linalg.norm(noise, axis=1, keepdims=True)
        rows[:, 1:] += share * noise * rows[:, :1]
        step.loss = None
    return a, b


def growing(by: float, most: float) -> tuple[Trace, Trace]:
    return drifting([min(1e-6 * by**i, most) for i in range(8)])


def rated(change: Callable[[int], float]) -> tuple[Trace, Trace]:
    a, b = plain(full=False), plain(full=False)
    for i, step in enumerate(b.steps):
        step.hyper = [{**hyper, "lr": hyper["lr"] * (1 + change(i))} for hyper in step.hyper]
    return a, b


def fed(share: float) -> tuple[Trace, Trace]:
    """Runs whose inputs differ by a share of them."""
    a, b = plain(full=False), plain(full=False)
    x = np.random.default_rng(0).normal(size=(8, 12))
    for one, data in ((a, x), (b, x + noisy(share, 1, x))):
        for step in one.steps:
            step.batches = [[fingerprint(data)]]
    return a, b


def clipped(apart: float) -> tuple[Trace, Trace]:
    """Each tensor clipped to one norm, or to norms that are apart."""
    return regraded(lambda k, x: x * (0.01 * (1 + apart * k / 7)) / np.linalg.norm(x))


def short(x: np.ndarray) -> np.ndarray:
    """As bfloat16 has it, by leaving bits out."""
    return (x.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def grained(share: float) -> str:
    """The arithmetic that is seen, if 16-bit numbers are in one gradient alone, and that is a share of the largest."""

    def change(k: int, x: np.ndarray) -> np.ndarray:
        return short(x * share * largest / np.linalg.norm(x)) if names[k] == KERNEL else x

    names = [p.name for p in plain().parameters]
    largest = max(float(np.linalg.norm(x)) for x in plain().steps[0].full["gradient"].values())
    _, b = regraded(change)
    return Pair(b, b).yardstick.name


def untold(pair: tuple[Trace, Trace]) -> tuple[Trace, Trace]:
    a, b = (copy.deepcopy(x) for x in pair)
    for step in (*a.steps, *b.steps):
        step.hyper = []
    return a, b


def faster(by: float) -> tuple[Trace, Trace]:
    """Learning rates that differ by a share, and that nobody told."""
    return untold((trace("torch", {}), trace("torch", {"wrong_from": (0, 1 + by)})))


def decayed(share: float) -> str:
    """What is seen of Adam if an update is off by 1e-6 of its norm, and a share of that, in squares, is decay."""
    rule, run = Dialect(), [s for s in series(untold((trace("torch", {}),) * 2)[0]) if s.parameter.name == KERNEL]
    for s in run:
        for i, (x, _) in enumerate(replay(rule, s.values, s.gradients, s.hyper, s.means[rule.scope])):
            decay = -math.sqrt(share) * s.values[i] / np.linalg.norm(s.values[i])
            s.updates[i] = x + 1e-6 * (noisy(math.sqrt(1 - share), i, x) + decay * np.linalg.norm(x))
    return "decays" if decaying(fit(rule, run), run).dialect.changed else "does not decay"


def said(pair: tuple[Trace, Trace], repeat: Trace | None = None) -> str:
    found: Verdict = diff(*pair, repeat)
    return f"{found.outcome}; {found.kind}; {found.cause}; {'; '.join(found.notes)}"


def repeated(share: float) -> str:
    """Runs that are a share apart, where a repeat is 1e-4 apart."""
    return said(drifting([share] * 8), drifting([1e-4] * 8)[1])


# Name, the case below it and what is said of it, the case above it and what is said of that.
CASES: dict[str, tuple[Callable[[], str], str, Callable[[], str], str]] = {
    "ROUNDINGS": (
        lambda: said(regraded(lambda k, x: x + noisy(6e-7, k, x))),
        "only rounding",
        lambda: said(regraded(lambda k, x: x + noisy(6e-6, k, x))),
        "parted",
    ),
    "GROWTH": (
        lambda: said(growing(6, 0.1)),
        "only rounding",
        lambda: said(drifting([1e-6] * 4 + [6e-5] * 4)),
        "parted",
    ),
    "REPEAT": (lambda: repeated(3e-4), "only rounding", lambda: repeated(3e-3), "parted"),
    "RESIDUE": (lambda: grained(3e-5), "float32", lambda: grained(3e-4), "bfloat16"),
    "_CHAOS": (lambda: said(growing(8, 0.1)), "only rounding", lambda: said(growing(8, 0.9)), "cannot tell"),
    "_COHERENT": (
        lambda: said(regraded(lambda k, x: x + noisy(3e-4, k, x))),
        "precision",
        lambda: said(regraded(lambda k, x: x * (1 + 3e-4 * (-1) ** k))),
        "everything",
    ),
    "_NOISY": (
        lambda: said(regraded(lambda k, x: short(x + noisy(0.1, k, x)))),
        "B computes in bfloat16",
        lambda: said(regraded(lambda k, x: short(x + noisy(1.0, k, x)))),
        "everything",
    ),
    "_EXACT": (lambda: said(clipped(3e-5)), "clipping of each", lambda: said(clipped(3e-4)), "everything"),
    "_CLOSE": (
        lambda: "rounded" if "batches are rounded" in said(fed(3e-5)) else "equal",
        "equal",
        lambda: "rounded" if "batches are rounded" in said(fed(3e-4)) else "equal",
        "rounded",
    ),
    "_NARROW": (lambda: said(fed(1.3e-3)), "only rounding", lambda: said(fed(1.3e-2)), "other data"),
    "RATE": (lambda: said(faster(3e-6)), "only rounding", lambda: said(faster(3e-5)), "parted; lr"),
    "_SHARE": (lambda: decayed(0.15), "does not decay", lambda: decayed(0.4), "decays"),
    "SAME": (
        lambda: said(rated(lambda i: 3e-7 * (i % 2))),
        "only rounding",
        lambda: said(rated(lambda i: 3e-6 * (i % 2))),
        "parted; lr",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_threshold_is_where_it_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    below, expected_below, above, expected_above = CASES[name]
    assert expected_below in below()
    assert expected_above in above()
    homes = [m for key, m in sys.modules.items() if key.startswith("ada2ms.core.trace") and hasattr(m, name)]
    assert homes, name
    value = getattr(homes[0], name)
    for factor, case, expected in ((0.1, below, expected_below), (10.0, above, expected_above)):
        for home in homes:
            monkeypatch.setattr(home, name, factor * value)
        assert expected not in case(), f"{factor:g} times {name} changes nothing"
