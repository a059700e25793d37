"""From measured factors to hyperparameters: the learning rate, and which decay it is."""

from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from ada2ms.conformance.identification.fit import Fit, fit, is_linear
from ada2ms.conformance.identification.run import Run
from ada2ms.core.dialects import Dialect, Hyper

KINDS: Final = ("decoupled", "after", "unscaled")


@dataclass
class Measured:
    """A dialect with every number that it takes.

    Attributes:
        dialect: with its kind of decay.
        hyper: hyperparameters, the learning rate among them if it stays.
        rates: the learning rate of each step.
        decays: what is taken of the value in each step, where no kind of decay explains it; else empty.
        open: kinds of decay that explain it as well.
        fit: how well all of it explains the run.
    """

    dialect: Dialect
    hyper: Hyper
    rates: list[float]
    decays: list[float]
    open: tuple[str, ...]
    fit: Fit

    @property
    def scheduled(self) -> bool:
        """Whether the learning rate moves."""
        return len({f"{rate:.7g}" for rate in self.rates}) > 1


def nice(value: float, precision: float = 1e-6) -> float:
    """The number of fewest digits within this precision."""
    for digits in range(1, 12):
        rounded = float(f"{value:.{digits}g}")
        if abs(rounded - value) <= precision * abs(value):
            return rounded
    return value


def measure(found: Fit, run: Run, told: Hyper) -> Measured:
    """What the factors of a fit, of mode "constant" or "free", mean."""
    given = np.array([h.get("lr", 1.0) for h in run.hyper])
    precision = max(1e-7, 10 * run.relative)
    c, d = found.c * given, found.d * given  # updates are c*p + d*x, p at a learning rate of 1
    moving = np.ptp(c) > precision * np.max(np.abs(c))
    tried: list[Measured] = []
    kinds = KINDS if is_linear(found.dialect) else (found.dialect.decay,)
    for kind in kinds:
        lr = c / (1 + d) if kind == "after" else c
        rates = lr if moving else np.full_like(lr, nice(float(np.median(lr)), precision))
        if not moving and "lr" in told and abs(rates[0] / (told["lr"] or 1.0) - 1) < precision:
            rates = np.full_like(lr, told["lr"])
        at = run.at([float(rate) for rate in rates])
        with np.errstate(divide="ignore", invalid="ignore"):
            taken = np.median(np.where(rates != 0, -d / (1.0 if kind == "unscaled" else rates), np.nan))
        for decay in _decays(float(taken), told, kind, precision) if is_linear(found.dialect) else [None]:
            dialect = replace(found.dialect, decay=kind)
            hyper = dict(found.hyper) if decay is None else {**found.hyper, "weight_decay": decay}
            result = fit(dialect, hyper, at, "fixed")
            lr_now = {} if moving else {"lr": float(rates[0])}
            tried.append(Measured(dialect, {**hyper, **lr_now}, [float(r) for r in rates], [], (), result))
    return _chosen(tried, told, moving)


def _decays(taken: float, told: Hyper, kind: str, precision: float) -> list[float]:
    """What the decay may be: 0, the told one, or the measured one."""
    found = [0.0] if abs(taken) < 1e-3 * precision or not np.isfinite(taken) else []
    measured = 0.0 if not np.isfinite(taken) else taken
    if told.get("weight_decay"):
        found.append(told["weight_decay"])
    return list(dict.fromkeys([*found, nice(measured, 1e3 * precision), nice(measured, precision), measured, 0.0]))


def _chosen(tried: list[Measured], told: Hyper, moving: bool) -> Measured:
    """The best; of those that explain as much, the one with the told decay, then the one with the rounder numbers."""
    least = min(m.fit.digits for m in tried)
    alike = [m for m in tried if m.fit.digits <= least + 1e-9]

    def order(m: Measured) -> tuple[int, ...]:
        decay = m.hyper.get("weight_decay", 0.0)
        as_told = [told.get("weight_decay") not in (None, decay), told.get("lr") not in (None, m.hyper.get("lr"))]
        digits = len(f"{decay:.12g}") + (0 if moving else len(f"{m.hyper.get('lr', 1.0):.12g}"))
        return int(as_told[0]), int(as_told[1]), digits, KINDS.index(m.dialect.decay) if m.dialect.decay in KINDS else 0

    best = min(alike, key=order)
    if not best.hyper.get("weight_decay"):
        return best
    certain = all(told.get(name) == best.hyper.get(name) for name in ("weight_decay", "lr"))
    others = dict.fromkeys(m.dialect.decay for m in alike if m.dialect.decay != best.dialect.decay)
    return replace(best, open=() if certain else tuple(others))
