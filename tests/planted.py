"""Optimizers in NumPy, each with its own equations, for `identify` to recognise; none knows the catalogue.

A rule gets what it keeps of one tensor, the value, the gradient and the count of this step from 1, and returns the new
value.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Array = Any
Rule = Callable[[dict[str, Any], Array, Array, int], Array]
LR, B1, B2, EPS, WD = 2e-3, 0.9, 0.999, 1e-8, 0.1


class Planted:
    """Steps each tensor by a rule; `before` may change all gradients together."""

    def __init__(
        self,
        params: Sequence[Array],
        rule: Rule,
        before: Callable[[list[Array]], list[Array]] | None = None,
        missing: str = "skipped",
    ) -> None:
        self.params = [np.array(p) for p in params]
        self._rule, self._before, self._missing = rule, before, missing
        self._kept: list[dict[str, Any]] = [{} for _ in params]
        self._counts = [0] * len(self.params)

    def step(self, gradients: Sequence[Array]) -> None:
        given = [np.zeros_like(p) if g is None else g for p, g in zip(self.params, gradients, strict=True)]
        for i, g in enumerate(self._before(given) if self._before else given):
            if gradients[i] is None and self._missing != "zeros":
                self._counts[i] += self._missing == "counted"
                continue
            self._counts[i] += 1
            self.params[i] = self._rule(self._kept[i], self.params[i], g, self._counts[i])


def ema(kept: dict[str, Any], name: str, beta: float, x: Array) -> Array:
    """A moving average that starts at 0."""
    kept[name] = kept.get(name, 0.0 * x) + (1 - beta) * (x - kept.get(name, 0.0 * x))
    return kept[name]


def safe(numerator: Array, d: Array) -> Array:
    return np.divide(numerator, d, out=np.zeros_like(numerator), where=d != 0)


def adam(
    *,
    first: bool = True,
    second: bool = True,
    denominator: Callable[[Array, float], Array] | None = None,
    decay: str = "decoupled",
    wd: float = WD,
    b2: float = B2,
    shift: int = 0,
    look: Callable[[Array, Array, int], Array] | None = None,
    grown: str = "",
    sign: float = 1.0,
) -> Rule:
    """Adam, with what it is to do otherwise."""

    def rule(kept: dict[str, Any], x: Array, g: Array, t: int) -> Array:
        g = sign * g + (wd * x if decay == "coupled" else 0.0)
        m, v = ema(kept, "m", B1, g), ema(kept, "v", b2, g**2)
        c1, c2 = (1 - b ** (t + shift) if on else 1.0 for b, on in ((B1, first), (b2, second)))
        if grown == "raw":
            v = kept["top"] = np.maximum(kept.get("top", v), v)
        if grown == "corrected":
            kept["top"] = np.maximum(kept.get("top", v / c2), v / c2)
            v = kept["top"] * c2
        d = denominator(v, c2) if denominator else (v / c2) ** 0.5 + EPS
        numerator = m / c1 if look is None else look(m, g, t)
        if decay == "decoupled":
            x = x - LR * wd * x
        if decay == "unscaled":
            x = x - 1e-3 * x
        x = x - LR * safe(numerator, d)
        return x - LR * wd * x if decay == "after" else x

    return rule


def nadam(kept: dict[str, Any], x: Array, g: Array, t: int) -> Array:
    mu = [B1 * (1 - 0.96 ** (0.004 * (t + i)) / 2) for i in (0, 1)]
    kept["p"] = kept.get("p", 1.0) * mu[0]
    m, v = ema(kept, "m", B1, g), ema(kept, "v", B2, g**2)
    ahead = mu[1] * m / (1 - kept["p"] * mu[1]) + (1 - mu[0]) * g / (1 - kept["p"])
    return x - LR * ahead / ((v / (1 - B2**t)) ** 0.5 + EPS)


def radam(kept: dict[str, Any], x: Array, g: Array, t: int) -> Array:
    m, v = ema(kept, "m", B1, g), ema(kept, "v", B2, g**2)
    top = 2 / (1 - B2) - 1
    rho = top - 2 * t * B2**t / (1 - B2**t)
    m_hat = m / (1 - B1**t)
    if rho <= 5:
        return x - LR * m_hat
    r = math.sqrt((rho - 4) * (rho - 2) * top / ((top - 4) * (top - 2) * rho))
    return x - LR * r * m_hat / ((v / (1 - B2**t)) ** 0.5 + EPS)


def belief(kept: dict[str, Any], x: Array, g: Array, t: int) -> Array:
    m = ema(kept, "m", B1, g)
    v = kept["v"] = B2 * kept.get("v", 0.0) + (1 - B2) * (g - m) ** 2 + 1e-16
    return x - LR * (m / (1 - B1**t)) / ((v / (1 - B2**t)) ** 0.5 + EPS)


def yogi(kept: dict[str, Any], x: Array, g: Array, t: int) -> Array:
    m = kept["m"] = B1 * kept.get("m", 1e-6) + (1 - B1) * g
    v = kept.get("v", 1e-6 + 0 * g)
    v = kept["v"] = v - (1 - B2) * np.sign(v - g**2) * g**2
    return x - LR * (m / (1 - B1**t)) / ((v / (1 - B2**t)) ** 0.5 + EPS)


def rmsprop(*, centered: bool = False, momentum: float = 0.0, inside: bool = False) -> Rule:
    def rule(kept: dict[str, Any], x: Array, g: Array, t: int) -> Array:
        v = ema(kept, "v", 0.99, g**2)
        if centered:
            v = v - ema(kept, "a", 0.99, g) ** 2
        u = g / ((v + EPS) ** 0.5 if inside else np.maximum(v, 0) ** 0.5 + EPS)
        kept["b"] = momentum * kept.get("b", 0.0) + u
        return x - LR * kept["b"]

    return rule


def adagrad(kept: dict[str, Any], x: Array, g: Array, t: int) -> Array:
    kept["v"] = kept.get("v", 0.1) + g**2
    return x - LR * g / (kept["v"] + 1e-7) ** 0.5


def adadelta(kept: dict[str, Any], x: Array, g: Array, t: int) -> Array:
    v = ema(kept, "v", 0.95, g**2)
    u = g * (kept.get("u", 0.0 * g) + 1e-6) ** 0.5 / (v + 1e-6) ** 0.5
    ema(kept, "u", 0.95, u**2)
    return x - 0.5 * u


def adamax(kept: dict[str, Any], x: Array, g: Array, t: int) -> Array:
    kept["u"] = np.maximum(B2 * kept.get("u", 0.0), abs(g))
    return x - LR / (1 - B1**t) * ema(kept, "m", B1, g) / (kept["u"] + EPS)


def lion(kept: dict[str, Any], x: Array, g: Array, t: int) -> Array:
    c = 0.9 * kept.get("m", 0.0) + 0.1 * g
    ema(kept, "m", 0.99, g)
    return x * (1 - LR * WD) - LR * np.sign(c)


def lamb(kept: dict[str, Any], x: Array, g: Array, t: int) -> Array:
    m, v = ema(kept, "m", B1, g), ema(kept, "v", B2, g**2)
    u = (m / (1 - B1**t)) / ((v / (1 - B2**t)) ** 0.5 + EPS) + WD * x
    norms = np.linalg.norm(x), np.linalg.norm(u)
    return x - LR * (norms[0] / norms[1] if min(norms) > 0 else 1.0) * u


def sgd(*, momentum: float = 0.9, nesterov: bool = False, dampening: float = 0.0, mean: bool = False) -> Rule:
    def rule(kept: dict[str, Any], x: Array, g: Array, t: int) -> Array:
        weight = 1 - momentum if mean else 1 - dampening
        start = 0.0 if mean else None
        b = kept.get("b", start)
        kept["b"] = g if b is None else momentum * b + weight * g
        return x - LR * (g + momentum * kept["b"] if nesterov else kept["b"])

    return rule


class Ada(Planted):
    """Ada2MS, with means over tensors."""

    def __init__(self, params: Sequence[Array], a: float) -> None:
        def rule(kept: dict[str, Any], x: Array, g: Array, t: int) -> Array:
            m, v = ema(kept, "m", B1, g), ema(kept, "v", B2, g**2)
            s = ema(kept, "s", B2, np.mean(g**2))
            c = 1 - B2**t
            d = (v / c) ** (a / 2) * (s / c) ** (0.5 - a / 2) + EPS
            return x * (1 - LR * WD) - LR * (m / (1 - B1**t)) / d

        super().__init__(params, rule)


def clipped(norm: float, extra: float = 0.0) -> Callable[[list[Array]], list[Array]]:
    """By the norm of everything."""

    def clip(gradients: list[Array]) -> list[Array]:
        size = math.sqrt(sum(float((g**2).sum()) for g in gradients)) + extra
        return [g * min(1.0, norm / size) for g in gradients]

    return clip


def each_clipped(norm: float) -> Callable[[list[Array]], list[Array]]:
    return lambda gradients: [g * min(1.0, norm / max(float(np.linalg.norm(g)), 1e-300)) for g in gradients]
