r"""The rule, in NumPy: the specification that every backend follows. Read this first.

    g      gradient of the step (negated when maximizing)
    G2     = sum(g*g)                           over every entry that has a gradient in this step
    c      = min(1, max_norm/sqrt(G2))          1 without max_norm, where it is infinite, and where G2 is 0
    g     <- c*g
    m     <- b1*m + (1-b1)*g
    v     <- b2*v + (1-b2)*g*g
    s     <- b2*s + (1-b2)*mean(g*g)            mean over the same entries as G2
    m_hat  = m/(1-b1^t)     v_hat = v/(1-b2^t)     s_hat = s/(1-b2^k)
    d      = v_hat^(a/2) * s_hat^((1-a)/2) + eps
    theta <- theta*(1 - lr*wd) - lr*m_hat/d

What the paper's abstract says: a smooth transition between AdamW-like and momentum-SGD-like behaviour "through
continuous exponential interpolation between elementwise second-moment estimates and global second-moment estimates"
(Zhu, Xiao, Min 2026, arXiv 2605.20533). The formulas above are this project's reading of that sentence.

    symbol        here, and torch                 Keras                     Optax
    hyperparameters, per parameter group
    lr            lr                              learning_rate             learning_rate
    b1, b2        b1, b2 (torch: betas)           beta_1, beta_2            b1, b2
    eps           eps                             epsilon                   eps
    wd            weight_decay                    weight_decay              weight_decay
    a             adaptivity                      adaptivity                adaptivity
    choices, per optimizer
                  scope, nonfinite                scope, nonfinite          scope, nonfinite
                  max_norm                        global_clipnorm           max_norm
                  compensated                     compensated               compensated
    state, per tensor
    m             exp_avg                         momentum                  mu
    v             exp_avg_sq                      velocity                  nu
    t             step                            steps                     steps
                  compensation                    compensation              compensation
    state, per parameter group (torch: in the state of each of its parameters; Keras, Optax: per optimizer)
    s             global_exp_avg_sq               global_velocity           s
    k             global_step                     global_step               count
                  skipped                         skipped                   skipped

Schedules of lr and a are given the count of completed updates, k: lr(0) and a(0) are used for the first update.
With scope "tensor" the mean is each tensor's own, and s is per tensor and corrected by t in place of k.
With nonfinite "skip" a step whose G2 is not finite changes nothing but a counter; else c is 0 or NaN in such a step.

With `compensated` a parameter of 16 bits has what its rounding lost beside it, as a number of the same 16 bits:

    new           = the rule's new value, in float32, from float32(theta) + float32(compensation)
    theta        <- round(new)                            to nearest, ties to even
    compensation <- round(new - float32(theta))           0 where theta is not finite
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ada2ms.core.hyperparameters import (
    DEFAULT_COMPENSATED,
    DEFAULT_MAX_NORM,
    DEFAULT_NONFINITE,
    DEFAULT_SCOPE,
    Hyperparameters,
    Nonfinite,
    Scope,
    as_float,
    check,
    value_at,
)

VERSION: Final = 2  # of the rule: raised when its results change

Array = NDArray[Any]
Gradients = Sequence[Array | None]
BFLOAT16: Final = np.dtype(np.uint16)  # the bits of a bfloat16, which are the upper half of a float32


@dataclass
class ParameterGroup:
    """Parameters that share hyperparameters, with their state: zeros of the parameters' shapes, in at least float32."""

    params: list[Array]
    hyper: Hyperparameters
    scope: Scope = DEFAULT_SCOPE
    compensated: bool = DEFAULT_COMPENSATED
    exp_avg: list[Array] = field(init=False)
    exp_avg_sq: list[Array] = field(init=False)
    step: list[int] = field(init=False)
    global_exp_avg_sq: list[float] = field(init=False)  # scope "model": one number; scope "tensor": one per tensor
    global_step: int = 0
    compensation: list[Array | None] = field(init=False)  # of the parameter's own dtype; None for a wider parameter

    def __post_init__(self) -> None:
        self.exp_avg = [np.zeros(p.shape, np.promote_types(p.dtype, np.float32)) for p in self.params]
        self.exp_avg_sq = [np.zeros_like(m) for m in self.exp_avg]
        self.step = [0] * len(self.params)
        self.global_exp_avg_sq = [0.0] * (1 if self.scope == "model" else len(self.params))
        self.compensation = [np.zeros_like(p) if self.compensated and p.itemsize == 2 else None for p in self.params]


class Ada2MS:
    """Ada2MS over NumPy arrays, which `step` updates in place.

    Arithmetic is in each parameter's own precision, in float32 for 16-bit parameters; s is in float64 throughout.

    Args:
        params: real floating-point arrays of any shapes; or mappings {"params": arrays, hyperparameter: value, ...},
            one per group, as in torch. NumPy has no bfloat16: an array of dtype uint16 is the bits of one. (View
            complex arrays as pairs of reals.)
        scope: "model": one global second moment for the whole model; "tensor": one per tensor.
        nonfinite: "propagate", or "skip" steps with a gradient that is not finite.
        max_norm: the norm, over the whole model, that longer gradients are scaled down to; None: they are not.
        compensated: whether parameters of 16 bits keep what their rounding loses.
        **hyper: fields of `Hyperparameters`, for every group that does not name its own.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is allowed.
    """

    def __init__(
        self,
        params: Sequence[Array] | Sequence[Mapping[str, Any]],
        *,
        scope: Scope = DEFAULT_SCOPE,
        nonfinite: Nonfinite = DEFAULT_NONFINITE,
        max_norm: float | None = DEFAULT_MAX_NORM,
        compensated: bool = DEFAULT_COMPENSATED,
        **hyper: Any,
    ) -> None:
        choices = {"scope": scope, "nonfinite": nonfinite, "max_norm": max_norm, "compensated": compensated}
        for name, choice in choices.items():
            check(name, choice)
        self.scope, self.nonfinite, self.skipped = scope, nonfinite, 0
        self.max_norm = None if max_norm is None else as_float(max_norm)
        self.groups: list[ParameterGroup] = []
        given: list[Any] = list(params)
        grouped = bool(given) and all(isinstance(x, Mapping) for x in given)
        for group in given if grouped else [{"params": given}]:
            options = {**hyper, **group}
            arrays = list(options.pop("params"))
            for p in arrays:
                real = isinstance(p, np.ndarray) and (np.issubdtype(p.dtype, np.floating) or p.dtype == BFLOAT16)
                if not (real and p.flags.writeable):
                    raise TypeError(
                        f"Invalid params: {p!r:.80} (must be writeable arrays of a real floating-point dtype)"
                    )
            self.groups.append(ParameterGroup(arrays, Hyperparameters(**options), scope, compensated))

    def step(self, gradients: Gradients) -> None:
        """Updates the parameters, in the order given (group after group), by one gradient each.

        Args:
            gradients: real arrays of the parameters' shapes; None leaves that tensor and its state alone.

        Raises:
            TypeError: a gradient is not real; nothing has changed.
            ValueError: number or shapes of the gradients are not those of the parameters; nothing has changed.
        """
        params = [p for group in self.groups for p in group.params]
        gradients = [None if g is None else np.asarray(g) for g in gradients]
        shapes = [None if g is None else g.shape for g in gradients]
        if len(params) != len(shapes) or any(s not in (None, p.shape) for p, s in zip(params, shapes, strict=True)):
            raise ValueError(f"Invalid gradients of shapes {shapes} (must be None or of {[p.shape for p in params]})")
        for g in gradients:
            if g is not None and not np.can_cast(g.dtype, np.float64, "same_kind"):
                raise TypeError(f"Invalid gradients: one is of dtype {g.dtype} (must be real)")

        squares = [None if g is None else float(np.sum(np.square(g, dtype=np.float64))) for g in gradients]
        total = sum(x for x in squares if x is not None)
        numel = sum(p.size for p, x in zip(params, squares, strict=True) if x is not None)
        if all(x is None for x in squares):
            return
        if self.nonfinite == "skip" and not math.isfinite(total):
            self.skipped += 1
            return

        c = clip_factor(total, self.max_norm)
        clipped = [None if x is None else c * x * c for x in squares]
        remaining = iter(zip(gradients, clipped, strict=True))
        for group in self.groups:
            update(group, [next(remaining) for _ in group.params], c, mean(c * total * c, numel))


def update(
    group: ParameterGroup, gradients: list[tuple[Array | None, float | None]], c: float, mean_square: float
) -> None:
    """One step of a group, given each tensor's g before clipping by c, and its sum(g*g) and the mean(g*g) after."""
    b1, b2, eps, wd = group.hyper.b1, group.hyper.b2, group.hyper.eps, group.hyper.weight_decay
    lr = value_at(group.hyper.lr, group.global_step)
    a = value_at(group.hyper.adaptivity, group.global_step)
    group.global_step += 1
    if group.scope == "model":
        s = group.global_exp_avg_sq[0] = b2 * group.global_exp_avg_sq[0] + (1 - b2) * mean_square
        s_hat = s / bias_correction(b2, group.global_step)

    for i, (g, square) in enumerate(gradients):
        if g is None or square is None:
            continue
        theta, compensation, m, v = group.params[i], group.compensation[i], group.exp_avg[i], group.exp_avg_sq[i]
        g = c * g.astype(m.dtype)
        group.step[i] += 1
        t = group.step[i]
        m[...] = b1 * m + (1 - b1) * g
        v[...] = b2 * v + (1 - b2) * g * g
        if group.scope == "tensor":
            s = group.global_exp_avg_sq[i] = b2 * group.global_exp_avg_sq[i] + (1 - b2) * mean(square, theta.size)
            s_hat = s / bias_correction(b2, t)
        m_hat = m / bias_correction(b1, t)
        v_hat = v / bias_correction(b2, t)
        # d = v_hat^(a/2) * s_hat^((1-a)/2) + eps
        d = v_hat ** (a / 2) * s_hat ** ((1 - a) / 2) + eps
        d = np.where(d == 0, np.inf, d)  # 0 only without eps, where nothing has moved yet: no update
        value = widen(theta) if compensation is None else widen(theta) + widen(compensation)
        new = value * (1 - lr * wd) - lr * m_hat / d
        theta[...] = rounded(new, theta.dtype)
        if compensation is not None:
            compensation[...] = rounded(lost(new, widen(theta)), theta.dtype)


def clip_factor(total: float, max_norm: float | None) -> float:
    """min(1, max_norm/sqrt(total)); 1 without max_norm, where it is infinite, and where the total is 0."""
    if max_norm in (None, math.inf) or total == 0:
        return 1.0
    c = max_norm / math.sqrt(total)
    return 1.0 if c > 1 else c  # a NaN stays one


def mean(total: float, numel: int) -> float:
    """`total / numel`; 0 over no entries."""
    return total / numel if numel else 0.0


def bias_correction(beta: float, count: int) -> float:
    """1 - beta**count, without the cancellation that costs 1 - beta**count its digits; 1 for beta = 0."""
    return -math.expm1(count * math.log(beta)) if beta else 1.0


def widen(x: Array) -> Array:
    """A parameter of 16 bits in float32, which holds its values exactly; a wider one as it is."""
    if x.dtype == BFLOAT16:
        return (x.astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.promote_types(x.dtype, np.float32), copy=False)


def rounded(x: Array, dtype: np.dtype[Any]) -> Array:
    """The nearest values of a parameter's dtype, ties to even."""
    if dtype != BFLOAT16:
        with np.errstate(over="ignore"):  # above the largest float16: infinity
            return x.astype(dtype)
    bits = np.where(np.isnan(x), np.nan, x).astype(np.float32).view(np.uint32)
    # Half of the lower bits' range, less 1 if the last upper bit is even, carries into the upper bits.
    return np.array(bits + 0x7FFF + (bits >> 16 & 1) >> 16, BFLOAT16)


def lost(new: Array, theta: Array) -> Array:
    """What rounding has taken from the new values; 0 where a parameter is not finite."""
    finite = np.isfinite(theta)
    return np.where(finite, new, 0) - np.where(finite, theta, 0)
