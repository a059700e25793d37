r"""The updates that dialects make: each family's equations, and under them what computes them.

Of a tensor, with gradient g of step t, value x and hyperparameters b1, b2, eps and so on; `|` parts what dialects do.

    clip       g <- g * min(1, max_norm / norm(g))         | norm + 1e-6 | of each tensor | of each entry
    coupled    g <- g + weight_decay * x
    update     u <- u / max(1, rms(u))                     | u * norm(x) / norm(u)
    decoupled  x <- x - lr * (u + weight_decay * x)        | of x after the update | without lr

The moments follow from the gradients as they were, and each update from the value that it began with, so that nothing
accumulates but what the dialect itself accumulates.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ada2ms.core.coefficients import bias_correction
from ada2ms.core.dialects.dialect import DEFAULTS, Dialect, Hyper

Array = NDArray[Any]


@dataclass
class _State:
    """Of one tensor: two moments, a third if the family has one, and numbers."""

    m: Any
    v: Any
    w: Any
    s: float = 0.0
    k: int = 0  # of s: with one mean for the model, a step counts though this tensor has no gradient
    t: int = 0
    product: float = 1.0


def replay(
    dialect: Dialect,
    values: Sequence[Array],
    gradients: Sequence[Array | None],
    hyper: Sequence[Hyper],
    means: Sequence[float],
    norms: Sequence[float] | None = None,
) -> list[tuple[Array, Array]]:
    """The updates of a tensor as a dialect makes them: for each step what scales with the learning rate, at 1, and
    what does not.

    Args:
        dialect: which.
        values: before each step.
        gradients: of each step; None where there was none.
        hyper: of each step, with `lr` if the record has it.
        means: the mean square of the gradient of each step, over the model or the tensor; only Ada2MS has a use for it.
        norms: the norm of the gradient of each step, over the model; without it, nothing clips by the model's norm.
    """
    zero = np.zeros_like(values[0])
    initial = {**DEFAULTS, **hyper[0], **dict(dialect.changed)}["initial"]
    state = _State(zero + initial * (dialect.second == "yogi"), zero + initial, zero)
    found = []
    for i, (x, gradient, given, mean) in enumerate(zip(values, gradients, hyper, means, strict=True)):
        h = {**DEFAULTS, **given, **dict(dialect.changed)}
        if gradient is None and dialect.missing != "zeros":
            if dialect.missing == "counted":
                state.t += 1
                _momenta(dialect, h, state, state.t + dialect.late)
            if dialect.scope == "model" and mean > 0:
                _, c = _clipped(dialect, h, zero, None if norms is None else norms[i])
                _global(h, state, mean * c * c)
            found.append((zero, zero))
            continue
        raw = zero if gradient is None else gradient
        g, c = _clipped(dialect, h, raw, None if norms is None else norms[i])
        wd, lr = h["weight_decay"], h.get("lr", 1.0)
        g = dialect.sign * g + (wd * x if dialect.decay == "coupled" else 0.0)
        state.t += 1
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            step = _FAMILIES[dialect.family](dialect, h, state, g, mean * c * c)
            found.append(_sized(dialect, x, *_with_decay(dialect, -step, x, wd, lr, zero)))
    return found


def _sgd(dialect: Dialect, h: Hyper, state: _State, g: Array, _: float) -> Array:
    """SGD: m = momentum*m + g    u = m | g + momentum*m (Nesterov)    lr is in u, or in m with each g

    With dampening (1 - dampening)*g from the second step on; where the momentum is a mean, (1 - momentum)*g from the
    first step on.
    """
    lr, momentum = h.get("lr", 1.0), h["momentum"]
    fresh = lr * g if dialect.lr_in_momentum else g
    weight = 1 - (momentum if dialect.average else h["dampening"] if state.t > 1 else 0.0)
    state.m = _kept(momentum * state.m + weight * fresh, dialect)
    corrected = dialect.average == "corrected" and momentum
    state_hat = state.m / (bias_correction(momentum, max(state.t + dialect.late, 1)) if corrected else 1.0)
    step = (weight if dialect.average else 1.0) * fresh + momentum * state_hat if dialect.nesterov else state_hat
    return np.asarray(step / (lr or 1.0) if dialect.lr_in_momentum else step)


def _adam(dialect: Dialect, h: Hyper, state: _State, g: Array, mean: float) -> Array:
    """Adam: m = b1*m + (1-b1)*g    v = b2*v + (1-b2)*g^2    u = m_hat / (sqrt(v_hat) + eps)

    m_hat = m/(1-b1^t), v_hat = v/(1-b2^t). Ada2MS: d = v_hat^(a/2) * s_hat^((1-a)/2) + eps.
    """
    state.m = _kept(h["b1"] * state.m + (1 - h["b1"]) * g, dialect)
    state.v = _kept(_second(dialect, h, state, g), dialect)
    _global(h, state, mean)
    count = max(state.t + dialect.late, 1)
    first = bias_correction(h["b1"], count) if dialect.bias in ("both", "first") else 1.0
    second = bias_correction(h["b2"], count) if dialect.bias in ("both", "second") else 1.0
    v, m_hat = state.v, _looking_ahead(dialect, h, state, g, count, first)
    if dialect.second == "greatest":
        state.w = v = np.maximum(state.w, v)
    elif dialect.second == "greatest corrected":
        state.w = np.maximum(state.w, v / second)
        v = state.w * second
    if dialect.family == "ada2ms":
        a = h["adaptivity"]
        corrected = dialect.bias in ("both", "second")
        of_s = bias_correction(h["b2"], max(state.k + dialect.late, 1)) if corrected else 1.0
        d = (v / second) ** (a / 2) * (state.s / of_s) ** ((1 - a) / 2) + h["eps"]
    else:
        d = _denominator(dialect, h, v, second)
    if dialect.second == "rectified":
        return _rectified(h, count, m_hat, d)
    return _over(m_hat, d)


def _global(h: Hyper, state: _State, mean: float) -> None:
    """Ada2MS: s = b2*s + (1-b2)*mean(g^2)"""
    state.s = h["b2"] * state.s + (1 - h["b2"]) * mean
    state.k += 1


def _second(dialect: Dialect, h: Hyper, state: _State, g: Array) -> Array:
    """One of v = b2*v + (1-b2)*g^2 | b2*v + (1-b2)*(g-m)^2 + eps_root | v - (1-b2)*sign(v-g^2)*g^2"""
    if dialect.second == "belief":
        return np.asarray(h["b2"] * state.v + (1 - h["b2"]) * (g - state.m) ** 2 + h["eps_root"])
    if dialect.second == "yogi":
        return np.asarray(state.v - (1 - h["b2"]) * np.sign(state.v - g * g) * g * g)
    return np.asarray(h["b2"] * state.v + (1 - h["b2"]) * g * g)


def _looking_ahead(dialect: Dialect, h: Hyper, state: _State, g: Array, count: int, first: float) -> Array:
    """m_hat | b1*m_hat + (1-b1)*g/(1-b1^t) | b1*m/(1-b1^(t+1)) + (1-b1)*g/(1-b1^t), or NAdam's

    mu_t = b1*(1 - 0.96^(t*momentum_decay)/2)    m_hat = mu_(t+1)*m/(1-mu_1...mu_(t+1)) + (1-mu_t)*g/(1-mu_1...mu_t)
    """
    b1 = h["b1"]
    if not dialect.nesterov:
        return np.asarray(state.m / first)
    if dialect.nesterov in ("schedule", "schedule32"):
        mu, following = _momenta(dialect, h, state, count)
        return np.asarray(following * state.m / (1 - state.product * following) + (1 - mu) * g / (1 - state.product))
    if dialect.nesterov == "next":
        ahead = bias_correction(b1, count + 1) if dialect.bias in ("both", "first") else 1.0
        return np.asarray(b1 * state.m / ahead + (1 - b1) * g / first)
    return np.asarray((b1 * state.m + (1 - b1) * g) / first)


def _momenta(dialect: Dialect, h: Hyper, state: _State, count: int) -> tuple[float, float]:
    """NAdam: mu of a step and of the next; their product goes on."""
    mu, following = (h["b1"] * (1 - 0.5 * 0.96 ** ((count + i) * h["momentum_decay"])) for i in (0, 1))
    short = dialect.nesterov == "schedule32"
    state.product = float(np.float32(state.product) * np.float32(mu)) if short else state.product * mu
    return mu, following


def _rectified(h: Hyper, count: int, m_hat: Array, d: Array) -> Array:
    """RAdam: r * m_hat/d, or m_hat while rho, the degrees of freedom of v, is at most 5"""
    limit = 2 / (1 - h["b2"]) - 1
    rho = limit - 2 * count * h["b2"] ** count / bias_correction(h["b2"], count)
    if rho <= 5:
        return m_hat
    r = ((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho)) ** 0.5
    return np.asarray(r * _over(m_hat, d))


def _rmsprop(dialect: Dialect, h: Hyper, state: _State, g: Array, _: float) -> Array:
    """RMSprop: v = b2*v + (1-b2)*g^2    u = g / (sqrt(v) + eps)    centered: v - mean^2    w = momentum*w + u"""
    state.v = _kept(h["b2"] * state.v + (1 - h["b2"]) * g * g, dialect)
    v = state.v
    if dialect.centered:
        state.m = _kept(h["b2"] * state.m + (1 - h["b2"]) * g, dialect)
        v = v - state.m * state.m
    second = bias_correction(h["b2"], max(state.t + dialect.late, 1)) if dialect.bias in ("both", "second") else 1.0
    step = _over(g, _denominator(dialect, h, np.maximum(v, 0.0), second))
    if h["momentum"]:
        lr = h.get("lr", 1.0) or 1.0
        fresh = lr * step if dialect.lr_in_momentum else step
        state.w = h["momentum"] * state.w + fresh
        step = fresh + h["momentum"] * state.w if dialect.nesterov else state.w
        step = step / lr if dialect.lr_in_momentum else step
    return step


def _adagrad(dialect: Dialect, h: Hyper, state: _State, g: Array, _: float) -> Array:
    """Adagrad: v = v + g^2, from `initial` on    u = g / (sqrt(v) + eps)    lr / (1 + (t-1)*lr_decay)"""
    state.v = _kept(state.v + g * g, dialect)
    step = _over(g, _denominator(dialect, h, state.v, 1.0))
    return step / (1 + (state.t - 1) * h["lr_decay"])


def _adadelta(dialect: Dialect, h: Hyper, state: _State, g: Array, _: float) -> Array:
    """Adadelta: v = b2*v + (1-b2)*g^2    u = g * sqrt(w + eps) / sqrt(v + eps)    w = b2*w + (1-b2)*u^2"""
    state.v = _kept(h["b2"] * state.v + (1 - h["b2"]) * g * g, dialect)
    step = _over(g * np.sqrt(state.w + h["eps"]), np.sqrt(state.v + h["eps"]))
    state.w = _kept(h["b2"] * state.w + (1 - h["b2"]) * step * step, dialect)
    return step


def _adamax(dialect: Dialect, h: Hyper, state: _State, g: Array, _: float) -> Array:
    """Adamax: m = b1*m + (1-b1)*g    v = max(b2*v, |g|)    u = m_hat / (v + eps) | v = max(b2*v, |g| + eps) (inside)"""
    state.m = _kept(h["b1"] * state.m + (1 - h["b1"]) * g, dialect)
    inside = dialect.eps == "inside"
    state.v = _kept(np.maximum(h["b2"] * state.v, np.abs(g) + (h["eps"] if inside else 0.0)), dialect)
    count = max(state.t + dialect.late, 1)
    first = bias_correction(h["b1"], count) if dialect.bias in ("both", "first") else 1.0
    return _over(state.m / first, state.v + (0.0 if inside else h["eps"]))


def _lion(dialect: Dialect, h: Hyper, state: _State, g: Array, _: float) -> Array:
    """Lion: u = sign(b1*m + (1-b1)*g)    m = b2*m + (1-b2)*g"""
    step = np.sign(h["b1"] * state.m + (1 - h["b1"]) * g)
    state.m = _kept(h["b2"] * state.m + (1 - h["b2"]) * g, dialect)
    return np.asarray(step)


_FAMILIES: Final[dict[str, Callable[[Dialect, Hyper, _State, Array, float], Array]]] = {
    "sgd": _sgd,
    "adam": _adam,
    "ada2ms": _adam,
    "rmsprop": _rmsprop,
    "adagrad": _adagrad,
    "adadelta": _adadelta,
    "adamax": _adamax,
    "lion": _lion,
}


def _denominator(dialect: Dialect, h: Hyper, v: Array, second: float) -> Array:
    """sqrt(v/second + eps_root) + eps, second being 1-b2^t, with eps where the dialect has it."""
    eps = h["eps"]
    root = 0.0 if dialect.second == "belief" else h["eps_root"]
    if dialect.eps == "inside":
        return np.asarray(np.sqrt(v / second + eps + root))
    if dialect.eps == "within":
        return np.asarray(np.sqrt((v + eps) / second + root))
    if dialect.eps == "before":
        return np.asarray((np.sqrt(v + root * second) + eps) / np.sqrt(second))
    if dialect.eps == "floor":
        return np.maximum(np.sqrt(v / second + root), eps)
    return np.asarray(np.sqrt(v / second + root) + eps)


def _over(numerator: Array, d: Array) -> Array:
    """0 where the denominator is 0."""
    return np.where(d == 0, 0.0, numerator / np.where(d == 0, 1.0, d))


def _clipped(dialect: Dialect, h: Hyper, g: Array, norm: float | None) -> tuple[Array, float]:
    """A gradient after clipping, and by what it was multiplied."""
    if dialect.clip == "none":
        return g, 1.0
    if dialect.clip == "value":
        return np.clip(g, -h["max_norm"], h["max_norm"]), 1.0
    if dialect.clip == "tensor":
        norm = float(np.linalg.norm(g))
    size = (norm or 0.0) + (1e-6 if dialect.clip == "torch" else 0.0)
    c = min(1.0, h["max_norm"] / size) if size > 0 else 1.0
    return c * g, c


def _with_decay(dialect: Dialect, direction: Array, x: Array, wd: float, lr: float, zero: Array) -> tuple[Array, Array]:
    if dialect.update == "clipped":
        direction = direction / max(1.0, float(np.sqrt(np.mean(direction * direction))))
    if dialect.decay == "decoupled":
        return direction - wd * x, zero
    if dialect.decay == "after":
        return direction - wd * (x + lr * direction), zero
    if dialect.decay == "unscaled":
        return direction, -wd * x
    return direction, zero


def _sized(dialect: Dialect, x: Array, direction: Array, rest: Array) -> tuple[Array, Array]:
    """With LAMB's trust ratio: times norm(x) / norm(u), decay included; 1 where either norm is 0."""
    if dialect.update == "trust":
        norm, size = float(np.linalg.norm(x)), float(np.linalg.norm(direction))
        direction = direction * (norm / size if norm > 0 and size > 0 else 1.0)
    return direction, rest


def _kept(x: Array, dialect: Dialect) -> Array:
    """A moment as the state keeps it."""
    return x if dialect.state == "float32" else rounded(x, dialect.state)


def rounded(x: Array, dtype: str) -> Array:
    """The nearest values of a dtype of 16 bits, ties to even, as float64; the values themselves for a wider one."""
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return np.asarray(x).astype(np.float16).astype(np.float64)
    if dtype != "bfloat16":
        return x
    bits = np.asarray(x, np.float32).view(np.uint32)
    shortened = (bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
    return shortened.astype(np.uint32).view(np.float32).astype(np.float64)
