"""The catalogue of dialects: in what optimizers of one family differ, and what each would have done.

A dialect says how updates follow from gradients, hyperparameters and values. `replay` computes them from a record, so
that a recorded run shows which dialect it speaks: the moments from the gradients as they were, each update from the
value that it began with, so that nothing accumulates but what the dialect itself accumulates.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ada2ms.core.coefficients import bias_correction

Array = NDArray[Any]
Hyper = dict[str, float]


@dataclass(frozen=True)
class Dialect:
    """How updates are computed.

    Attributes:
        family: "adam", "sgd" or "ada2ms".
        eps: where epsilon stands: "outside" the root, after bias correction; "before" bias correction, outside the
            root; "inside" the root.
        decay: "decoupled": of the value before the update, times lr; "after": of the value after the update, times lr;
            "coupled": in the gradient; "unscaled": decoupled, without lr.
        bias: which moments are corrected for their start from 0: "both", "none", "first" or "second".
        nesterov: whether the update looks ahead.
        late: by how many steps the count of bias correction begins too late (or, if negative, too early).
        lr_in_momentum: SGD: whether the learning rate enters the momentum, and not the update.
        sign: 1, or -1 for an optimizer that goes uphill.
        state: in which precision moments are kept: "float32" or "bfloat16".
        scope: Ada2MS: over what its mean is taken.
        changed: hyperparameters that are not the recorded ones.
    """

    family: str = "adam"
    eps: str = "outside"
    decay: str = "decoupled"
    bias: str = "both"
    nesterov: bool = False
    late: int = 0
    lr_in_momentum: bool = False
    sign: int = 1
    state: str = "float32"
    scope: str = "model"
    changed: tuple[tuple[str, float], ...] = ()

    def differences(self, other: "Dialect", told: Hyper | None = None, there_told: Hyper | None = None) -> list[str]:
        """In what another differs, each as "what: here against there".

        Args:
            other: another dialect.
            told: hyperparameters that were recorded with this one.
            there_told: those with the other.
        """
        found = []
        for name, here in vars(self).items():
            there = getattr(other, name)
            if here == there:
                continue
            if name == "changed":
                mine, theirs = dict(here), dict(there)
                for key in sorted({*mine, *theirs}):
                    values = [
                        now.get(key, (record or {}).get(key, DEFAULTS[key]))
                        for now, record in ((mine, told), (theirs, there_told))
                    ]
                    if values[0] != values[1]:
                        found.append(f"{key}: {values[0]:g} against {values[1]:g}")
            else:
                found.append(f"{WORDS[name]}: {_said(name, here)} against {_said(name, there)}")
        return found


WORDS: Final = {
    "family": "the family",
    "eps": "epsilon's place",
    "decay": "weight decay",
    "bias": "bias correction",
    "nesterov": "Nesterov's momentum",
    "late": "the count of the first step",
    "lr_in_momentum": "the learning rate's place",
    "sign": "the direction",
    "state": "the precision of the state",
    "scope": "the mean of squares",
}
_SAID: Final[dict[str, dict[Any, str]]] = {
    "eps": {
        "outside": "outside the root, after bias correction",
        "before": "outside the root, before bias correction",
        "inside": "inside the root",
    },
    "decay": {
        "decoupled": "decoupled, before the update",
        "after": "decoupled, after the update",
        "coupled": "coupled (in the gradient)",
        "unscaled": "decoupled, not times the learning rate",
    },
    "bias": {
        "both": "of both moments",
        "none": "none",
        "first": "of the first moment",
        "second": "of the second moment",
    },
    "nesterov": {True: "yes", False: "no"},
    "lr_in_momentum": {True: "in the momentum", False: "in the update"},
    "sign": {1: "downhill", -1: "uphill"},
    "family": {"adam": "Adam's", "sgd": "momentum SGD's", "ada2ms": "Ada2MS'"},
}


def _said(name: str, value: Any) -> str:
    if name == "late":
        return f"{1 - value}"
    return _SAID.get(name, {}).get(value, str(value))


# By the beginning of what an optimizer is called.
KNOWN: Final[dict[str, Dialect]] = {
    "torch.optim.AdamW": Dialect(),
    "torch.optim.Adam": Dialect(decay="coupled"),
    "torch.optim.SGD": Dialect(family="sgd", decay="coupled"),
    "keras.optimizers.AdamW": Dialect(eps="before"),
    "keras.optimizers.Adam": Dialect(eps="before"),
    "keras.optimizers.SGD": Dialect(family="sgd", lr_in_momentum=True),
    "ada2ms": Dialect(family="ada2ms"),
    "optax.adamw": Dialect(),
    "optax.adam": Dialect(),
    "optax.sgd": Dialect(family="sgd"),
}
DEFAULTS: Final[Hyper] = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "momentum": 0.0, "adaptivity": 0.5}
FEATURES: Final[dict[str, tuple[Any, ...]]] = {
    "eps": ("outside", "before", "inside"),
    "decay": ("decoupled", "after", "coupled", "unscaled"),
    "bias": ("both", "none", "first", "second"),
    "nesterov": (False, True),
    "late": (0, 1, -1),
    "lr_in_momentum": (False, True),
    "sign": (1, -1),
    "state": ("float32", "bfloat16"),
    "scope": ("model", "tensor"),
}
OTHERS: Final[dict[str, tuple[float, ...]]] = {  # values that hyperparameters have where they were not meant to
    "b1": (0.9, 0.8, 0.95, 0.99, 0.0),
    "b2": (0.999, 0.99, 0.95, 0.98, 0.9, 0.9999),
    "eps": (1e-8, 1e-7, 1e-6, 1e-5, 1e-3, 0.0),
    "weight_decay": (0.0, 1e-4, 4e-3, 1e-2, 5e-2, 0.1),
    "momentum": (0.0, 0.9, 0.99),
    "adaptivity": (0.0, 0.5, 1.0),
}
OWN: Final = {  # which features and hyperparameters a family has
    "adam": ("eps", "decay", "bias", "nesterov", "late", "sign", "state"),
    "sgd": ("decay", "nesterov", "lr_in_momentum", "sign"),
    "ada2ms": ("decay", "bias", "late", "sign", "state", "scope"),
}
OWN_HYPER: Final = {
    "adam": ("b1", "b2", "eps", "weight_decay"),
    "sgd": ("momentum", "weight_decay"),
    "ada2ms": ("b1", "b2", "eps", "weight_decay", "adaptivity"),
}


def base(optimizer: str, hyper: Hyper) -> Dialect:
    """The dialect of an optimizer by its name; by its hyperparameters if the name is not known."""
    for name, dialect in KNOWN.items():
        if optimizer == name or (name == "ada2ms" and optimizer.lower().endswith("ada2ms")):
            return replace(dialect, nesterov=bool(hyper.get("nesterov", False)))
    if "adaptivity" in hyper:
        return KNOWN["ada2ms"]
    return KNOWN["optax.sgd" if "momentum" in hyper and "b2" not in hyper else "optax.adamw"]


def variants(dialect: Dialect, hyper: Hyper) -> list[Dialect]:
    """Those that differ from a dialect in one feature, or in one hyperparameter."""
    found = []
    for name in OWN[dialect.family]:
        for value in FEATURES[name]:
            if value != getattr(dialect, name):
                found.append(replace(dialect, **{name: value}))
    for name in OWN_HYPER[dialect.family]:
        now = dict(dialect.changed).get(name, hyper.get(name, DEFAULTS[name]))
        for number in OTHERS[name]:
            if not np.isclose(number, now, rtol=1e-6, atol=0):
                rest = tuple(pair for pair in dialect.changed if pair[0] != name)
                found.append(replace(dialect, changed=(*rest, (name, number))))
    return found


def replay(
    dialect: Dialect,
    values: Sequence[Array],
    gradients: Sequence[Array | None],
    hyper: Sequence[Hyper],
    means: Sequence[float],
) -> list[tuple[Array, Array]]:
    """The updates of a tensor as a dialect makes them: for each step what scales with the learning rate, at 1, and
    what does not.

    Args:
        dialect: which.
        values: before each step.
        gradients: of each step; None where there was none.
        hyper: of each step, with `lr` if the record has it.
        means: the mean square of the gradient of each step, over the model or the tensor; only Ada2MS has a use for it.
    """
    s, t = 0.0, 0
    found = []
    zero = np.zeros_like(values[0])
    m = v = zero
    for x, gradient, given, mean in zip(values, gradients, hyper, means, strict=True):
        h = {**DEFAULTS, **given, **dict(dialect.changed)}
        if gradient is None:
            found.append((zero, zero))
            continue
        wd, lr = h["weight_decay"], h.get("lr", 1.0)
        g = dialect.sign * gradient + (wd * x if dialect.decay == "coupled" else 0.0)
        t += 1
        if dialect.family == "sgd":
            fresh = lr * g if dialect.lr_in_momentum else g
            m = h["momentum"] * m + (1 - (h.get("dampening", 0.0) if t > 1 else 0.0)) * fresh
            step = fresh + h["momentum"] * m if dialect.nesterov else m
            direction = -step / (lr or 1.0) if dialect.lr_in_momentum else -step
        else:
            m = _kept(h["b1"] * m + (1 - h["b1"]) * g, dialect)
            v = _kept(h["b2"] * v + (1 - h["b2"]) * g * g, dialect)
            s = h["b2"] * s + (1 - h["b2"]) * mean
            direction = -_adaptive(dialect, h, m, v, s, g, t)
        found.append(_with_decay(dialect, direction, x, wd, lr, zero))
    return found


def _adaptive(dialect: Dialect, h: Hyper, m: Any, v: Any, s: float, g: Array, t: int) -> Array:
    count = max(t + dialect.late, 1)
    first = bias_correction(h["b1"], count) if dialect.bias in ("both", "first") else 1.0
    second = bias_correction(h["b2"], count) if dialect.bias in ("both", "second") else 1.0
    if dialect.nesterov:
        m = h["b1"] * m + (1 - h["b1"]) * g
    with np.errstate(divide="ignore", invalid="ignore"):
        if dialect.family == "ada2ms":
            a = h["adaptivity"]
            d = (v / second) ** (a / 2) * (s / second) ** ((1 - a) / 2) + h["eps"]
        elif dialect.eps == "inside":
            d = np.sqrt(v / second + h["eps"])
        elif dialect.eps == "before":
            d = (np.sqrt(v) + h["eps"]) / np.sqrt(second)
        else:
            d = np.sqrt(v / second) + h["eps"]
        return np.where(d == 0, 0.0, m / first / np.where(d == 0, 1.0, d))


def _with_decay(dialect: Dialect, direction: Array, x: Array, wd: float, lr: float, zero: Array) -> tuple[Array, Array]:
    if dialect.decay == "decoupled":
        return direction - wd * x, zero
    if dialect.decay == "after":
        return direction - wd * (x + lr * direction), zero
    if dialect.decay == "unscaled":
        return direction, -wd * x
    return direction, zero


def _kept(x: Array, dialect: Dialect) -> Array:
    """A moment as the state keeps it."""
    if dialect.state != "bfloat16":
        return x
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
    return rounded.astype(np.uint32).view(np.float32).astype(np.float64)
