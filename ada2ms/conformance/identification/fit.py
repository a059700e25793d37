"""How well a dialect explains a run.

An update is linear in the learning rate, and in decoupled decay: u = c * p + d * x with p as the dialect's replay makes
it. Both are measured, by a regression that outliers do not move, so that a part of the entries that a dialect does not
explain does not spoil the rest. All other hyperparameters are told, or found by Gauss-Newton steps (`refine`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from ada2ms.conformance.identification.run import Run
from ada2ms.core.dialects import DEFAULTS, OWN_HYPER, Array, Dialect, Hyper, replay

# What may differ from step to step: "fixed": nothing, c is 1 and decay as in the hyperparameters; "constant": nothing,
# but c and d are measured; "free": c and d are measured in each step.
Mode = Literal["fixed", "constant", "free"]
MOST: Final = 12.0  # digits
NEARLY: Final = 1e-6
_ROUNDS: Final = 14


@dataclass
class Fit:
    """How well a dialect explains a run.

    Attributes:
        dialect: which.
        hyper: the hyperparameters used.
        c: of each step, what the replayed direction is multiplied by: 1 if the learning rate is the told one, or else
            the learning rate.
        d: of each step, what the value is multiplied by, at the same learning rate.
        digits: how many decimal digits above rounding are left, on average over entries and steps.
        rough: what is left, relative to an entry's update, on average over entries and steps; at most 1 each.
        share: of entries and steps that are explained.
        off: of each step, what is left, relative to each entry's update: the root mean square over entries.
    """

    dialect: Dialect
    hyper: Hyper
    c: Array
    d: Array
    digits: float
    rough: float
    share: float
    off: Array

    @property
    def fits(self) -> bool:
        """Whether rounding explains what is left."""
        return self.digits == 0.0

    @property
    def nearly(self) -> bool:
        """Whether what is left is as little as arithmetic in float32 would leave."""
        return float(self.off.max()) < NEARLY


def is_linear(dialect: Dialect) -> bool:
    """Whether decay, if there is any, is a multiple of the value that is added to the update."""
    return dialect.decay != "coupled" and dialect.update != "trust"


def fit(dialect: Dialect, hyper: Hyper, run: Run, mode: Mode = "constant", tensors: Sequence[int] = ()) -> Fit:
    """How well a dialect explains a run.

    Args:
        dialect: which.
        hyper: hyperparameters, but for the learning rate of each step, which is the run's.
        run: of an experiment.
        mode: what is measured.
        tensors: which are looked at; by default all.
    """
    made = _made(dialect, hyper, run, mode, tensors)
    left = np.abs(made.u - made.predicted)
    left = np.where(np.isfinite(left), left, np.inf)
    digits = np.clip(np.log10(np.maximum(left / made.tolerance, 1.0)), 0.0, MOST)
    off = np.sqrt(np.mean(np.minimum(np.where(digits > 0, left / made.scale, 0.0), 1e3) ** 2, axis=1))
    with np.errstate(invalid="ignore", over="ignore"):
        rough = np.nan_to_num(left / (made.scale + np.abs(made.predicted)), nan=1.0, posinf=1.0)
    share = float((digits == 0).mean())
    return Fit(dialect, hyper, made.c, made.d, float(digits.mean()), float(rough.mean()), share, off)


@dataclass
class _Made:
    """Updates and what a dialect makes of them, of shape (steps, entries)."""

    u: Array
    predicted: Array
    scale: Array
    tolerance: Array
    c: Array
    d: Array


def _made(
    dialect: Dialect, hyper: Hyper, run: Run, mode: Mode, tensors: Sequence[int], weights: Array | None = None
) -> _Made:
    chosen = list(tensors) or list(range(len(run.updates)))
    moved = [_moved(dialect, hyper, run, k, mode) for k in chosen]
    p, rest = (np.concatenate(parts, axis=1) for parts in zip(*moved, strict=True))
    flat = [run.flat(k) for k in chosen]
    u, x, scale, tolerance = (np.concatenate(parts, axis=1) for parts in zip(*flat, strict=True))
    c, d = np.ones(run.steps), np.zeros(run.steps)
    if mode != "fixed":
        rates = np.array([given.get("lr", 1.0) for given in run.hyper])[:, None]
        values = x * rates * _decayed(dialect, run, chosen) if is_linear(dialect) else np.zeros_like(x)
        told = "lr" in run.hyper[0]
        c, d = _regressed(u - rest, p, values, scale, tolerance, None if mode == "constant" else 1, told, weights)
        rest = rest + d[:, None] * values
    with np.errstate(invalid="ignore", over="ignore"):
        return _Made(u, c[:, None] * p + rest, scale, tolerance, c, d)


def _decayed(dialect: Dialect, run: Run, tensors: Sequence[int]) -> Array | float:
    """1 where a step takes of an entry's value: where it has a gradient, if a step without one does nothing."""
    missing = [[g is None for g in run.gradients[k]] for k in tensors]
    if dialect.missing == "zeros" or not any(map(any, missing)):
        return 1.0
    sizes = [run.values[k][0].size for k in tensors]
    return np.repeat(~np.array(missing), sizes, axis=0).T.astype(np.float64)


def _moved(dialect: Dialect, hyper: Hyper, run: Run, k: int, mode: Mode) -> tuple[Array, Array]:
    """What a tensor's updates would be, and what of them does not scale; each of shape (steps, entries)."""
    measured = mode != "fixed" and is_linear(dialect)
    used = {**hyper, "weight_decay": 0.0} if measured else hyper
    given = [{**used, **rates} for rates in run.hyper]
    means = run.means
    if dialect.scope == "tensor":
        means = [0.0 if g is None else float(np.mean(g * g)) for g in run.gradients[k]]
    found = replay(dialect, run.values[k], run.gradients[k], given, means, run.norms)
    p = np.stack([h.get("lr", 1.0) * scaled.reshape(-1) for h, (scaled, _) in zip(given, found, strict=True)])
    return p, np.stack([unscaled.reshape(-1) for _, unscaled in found])


def _regressed(
    u: Array,
    p: Array,
    x: Array,
    scale: Array,
    tolerance: Array,
    axis: int | None,
    told: bool,
    weights: Array | None,
) -> tuple[Array, Array]:
    """C and d of u = c*p + d*x for each step: least absolute deviations first, then the most entries exactly.

    Args:
        u: updates, of shape (steps, entries).
        p: as replayed.
        x: values.
        scale: of the updates.
        tolerance: what rounding explains.
        axis: 1 if every step has its own, None if all have the same.
        told: whether c is expected to be 1.
        weights: of least squares, in place of all that.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratio = np.where((p != 0) & (np.abs(u) > 10 * tolerance) & np.isfinite(p), u / p, np.nan)
        c = _median(ratio, axis)
        d = np.zeros_like(c)
        p = np.where(np.isfinite(p), p, 0.0)
        least = 1e-12 * max(float(np.max(np.abs(u))), 1e-60)  # entries that do not move have no infinite weight
        scale, tolerance = np.maximum(scale, least), np.maximum(tolerance, 1e-6 * least)
        decays = bool(np.any(x))
        best = (c, d, _lost(u, p, x, c, d, tolerance, axis))
        if told:
            best = _better(best, (np.ones_like(c), d, _lost(u, p, x, np.ones_like(c), d, tolerance, axis)))
        for i in range(8):
            if weights is None and not best[2].any():
                break
            r = np.abs(u - c * p - d * x)
            w = 1 / (scale * np.maximum(r, tolerance)) if i < 4 else 1 / (tolerance**2 + r * r)
            c, d = _least_squares(u, p, x if decays else None, w if weights is None else weights, c, d, axis)
            if weights is not None:
                return _of_steps(c, u), _of_steps(d, u)
            best = _better(best, (c, d, _lost(u, p, x, c, d, tolerance, axis)))
    return _of_steps(best[0], u), _of_steps(best[1], u)


def _of_steps(y: Array, u: Array) -> Array:
    return np.broadcast_to(y, (u.shape[0], 1))[:, 0]


def _least_squares(
    u: Array, p: Array, x: Array | None, w: Array, c: Array, d: Array, axis: int | None
) -> tuple[Array, Array]:
    """C and d by weighted least squares; those given where nothing shows them."""
    pp, pu = (np.sum(w * p * y, axis=axis, keepdims=True) for y in (p, u))
    if x is None:
        return np.where(pp > 0, pu / pp, c), d
    px, xx, xu = (np.sum(w * y, axis=axis, keepdims=True) for y in (p * x, x * x, x * u))
    determinant = pp * xx - px * px
    good = determinant > 1e-13 * pp * xx
    return np.where(good, (xx * pu - px * xu) / determinant, c), np.where(good, (pp * xu - px * pu) / determinant, d)


def _median(ratio: Array, axis: int | None) -> Array:
    """Over the entries that are numbers; 1 where none is."""
    there = np.isfinite(ratio)
    filled = np.where(there, ratio, np.inf)
    if axis is None:
        found = np.sort(filled[there])
        return np.array([[found[found.size // 2] if found.size else 1.0]])
    ordered, count = np.sort(filled, axis=1), there.sum(axis=1, keepdims=True)
    return np.where(count > 0, np.take_along_axis(ordered, count // 2 - (count == 0) * 0, axis=1), 1.0)


def _lost(u: Array, p: Array, x: Array, c: Array, d: Array, tolerance: Array, axis: int | None) -> Array:
    left = np.abs(u - c * p - d * x) / tolerance
    return np.sum(np.log10(np.maximum(np.where(np.isfinite(left), left, 1e15), 1.0)), axis=axis, keepdims=True)


def _better(a: tuple[Array, Array, Array], b: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    """Of each step, the one that loses less; the first if they are alike."""
    second = b[2] < a[2]
    return tuple(np.where(second, y, x) for x, y in zip(a, b, strict=True))  # type: ignore[return-value]


def free_hyper(dialect: Dialect, hyper: Hyper) -> list[str]:
    """The hyperparameters that may be refined: numbers that mean something to a dialect and are not 0."""
    names = [name for name in OWN_HYPER[dialect.family] if name != "weight_decay" or not is_linear(dialect)]
    names += ["max_norm"] * (dialect.clip != "none") + ["momentum_decay"] * (
        dialect.nesterov in ("schedule", "schedule32")
    )
    names += ["initial"] * (dialect.second == "yogi")
    return [name for name in dict.fromkeys(names) if hyper.get(name, DEFAULTS[name]) or name == "adaptivity"]


_RATES: Final = ("b1", "b2", "momentum", "dampening")


def _outward(name: str, value: float) -> float:
    """On a scale on which steps are alike: log(1 - b) of a decay rate, log of others."""
    if name == "adaptivity":
        return value
    return float(np.log(1 - value if name in _RATES else value))


def _inward(name: str, value: float) -> float:
    if name == "adaptivity":
        return float(np.clip(value, -1.0, 2.0))
    value = float(np.exp(np.clip(value, -80.0, 40.0)))
    return 1 - min(value, 1.0) if name in _RATES else value


def refine(start: Fit, run: Run, mode: Mode, tensors: Sequence[int] = (), fixed: Sequence[str] = ()) -> Fit:
    """With the hyperparameters that explain most: Gauss-Newton steps, by whose weights outliers count little."""
    names = [name for name in free_hyper(start.dialect, start.hyper) if name not in fixed]
    if not names or start.fits:
        return start
    best, damping = start, 1e-3
    at = np.array([_outward(name, start.hyper.get(name, DEFAULTS[name])) for name in names])
    small = 0
    for _ in range(_ROUNDS):
        weights, residuals = _weighted(start.dialect, best.hyper, run, mode, tensors)
        columns = []
        for i, name in enumerate(names):
            nudged = {**best.hyper, name: _inward(name, at[i] + 1e-6)}
            columns.append((_weighted(start.dialect, nudged, run, mode, tensors, weights)[1] - residuals) / 1e-6)
        j = np.nan_to_num(np.stack(columns, axis=1), posinf=0.0, neginf=0.0)
        a, b, cost = j.T @ j, j.T @ residuals, float(residuals @ residuals)
        for _ in range(5):
            step = np.linalg.lstsq(a + damping * np.diag(np.diag(a) + 1e-12), -b, rcond=None)[0]
            there = at + np.clip(step, -2.0, 2.0)
            hyper = {**best.hyper, **{name: _inward(name, y) for name, y in zip(names, there, strict=True)}}
            tried = _weighted(start.dialect, hyper, run, mode, tensors, weights)[1]
            if float(tried @ tried) < cost:
                break
            damping = damping * 10 + 1e-8
        else:
            break
        at, damping = there, damping * 0.1
        best = fit(start.dialect, hyper, run, mode, tensors)
        small = small + 1 if float(tried @ tried) > 0.98 * cost else 0
        if best.fits or small == 2:
            break
    return best if best.digits < start.digits or best.rough < start.rough else start


def _weighted(
    dialect: Dialect, hyper: Hyper, run: Run, mode: Mode, tensors: Sequence[int], weights: Array | None = None
) -> tuple[Array, Array]:
    """Weights of least squares by which outliers count little, if none are given, and what is left under them."""
    made = _made(dialect, hyper, run, mode, tensors, weights)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        left = np.nan_to_num(made.u - made.predicted, nan=0.0, posinf=0.0, neginf=0.0)
        if weights is None:
            relative = np.abs(left) / (made.scale + np.abs(made.predicted))
            weights = 1 / (made.scale**2 * (relative + relative.mean() + 1e-15))
            weights = np.where(made.scale > 1e-40, weights, 0.0)
            return _weighted(dialect, hyper, run, mode, tensors, weights)
    return weights, (left * np.sqrt(weights)).reshape(-1)
