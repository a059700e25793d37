"""What a dialect says of each of its features, and by how much every other answer is off."""

from dataclasses import replace
from typing import Final

import numpy as np

from ada2ms.conformance.identification.fit import Fit, Mode, fit, free_hyper
from ada2ms.conformance.identification.measure import Measured
from ada2ms.conformance.identification.report import Finding
from ada2ms.conformance.identification.run import Run
from ada2ms.core.dialects import DEFAULTS, FAMILIES, OWN, Dialect, Hyper, said, values_of

NAMES: Final = {
    "eps": "epsilon",
    "decay": "weight decay",
    "bias": "bias correction",
    "nesterov": "Nesterov",
    "late": "count of the first step",
    "sign": "direction",
    "scope": "mean of squares",
    "second": "second moment",
    "centered": "centre of squares",
    "average": "momentum is",
    "clip": "clipping",
    "update": "size of the update",
    "missing": "missing gradient",
    "lr_in_momentum": "learning rate is in",
}
_ELSEWHERE: Final = ("decay", "state", "rounding")
_SILENT: Final = {"sign": 1, "late": 0, "centered": False, "update": "plain", "average": False}  # said if it is other


def describe(found: Measured, run: Run, mode: Mode, told: Hyper) -> list[Finding]:
    """A dialect in words, feature by feature, each with what speaks for it."""
    dialect = found.dialect
    result = [Finding("rule", FAMILIES[dialect.family])]
    for name in OWN[dialect.family]:
        if name in _ELSEWHERE or (name == "lr_in_momentum" and not found.hyper.get("momentum")):
            continue
        if name == "nesterov" and dialect.family in ("sgd", "rmsprop") and not found.hyper.get("momentum"):
            continue
        if name == "missing" and not any(g is None for tensor in run.gradients for g in tensor):
            continue
        finding = _feature(name, found, run, mode)
        if getattr(dialect, name) != _SILENT.get(name):
            result.append(finding)
    result += _decay(found)
    result.append(_rate(found, told))
    result += _numbers(found, run, mode, told)
    return result


def _feature(name: str, found: Measured, run: Run, mode: Mode) -> Finding:
    dialect = found.dialect
    value = getattr(dialect, name)
    words = said(name, value)
    if name == "eps":
        words = words if dialect.bias in ("both", "second") and dialect.family == "adam" else words.partition(",")[0]
        words = f"{found.hyper.get('eps', DEFAULTS['eps']):g}, {words}"
    if name == "clip" and value != "none":
        words = f"to {found.hyper['max_norm']:g}, {words}"
    others = {
        other: _other(replace(dialect, **{name: other}), found.hyper, run, mode)
        for other in values_of(dialect.family, name)
        if other != value
    }
    if name == "lr_in_momentum":
        return Finding(NAMES[name], "the momentum" if value else "the update")
    same = [said(name, other) for other, fitted in others.items() if fitted.digits <= found.fit.digits]
    if name == "clip" and value == "none":
        return Finding(NAMES[name], f"none, up to a norm of {max(run.norms):.0e}")
    if same:
        return Finding(NAMES[name], words, f"cannot be told from: {'; '.join(same)}")
    near = min(others, key=lambda other: others[other].rough, default=None)
    if near is None:
        return Finding(NAMES[name], words)
    return Finding(NAMES[name], words, nearest(name, near, others[near]))


def _other(dialect: Dialect, hyper: Hyper, run: Run, mode: Mode) -> Fit:
    needed = {"max_norm": 1.0} if dialect.clip != "none" and "max_norm" not in hyper else {}
    given = {name: value for name, value in hyper.items() if name != "lr"}
    return fit(dialect, {**given, **needed}, run, mode)


def nearest(name: str, other: object, fitted: Fit) -> str:
    """How much of an update the nearest other value of a feature leaves unexplained."""
    percent = 100 * min(float(fitted.off.max()), 1.0)
    shown = f"{percent:.0f}" if percent >= 1 else f"{percent:.1g}"
    return f"the nearest other, {said(name, other)}, is off by {shown} %"


def _decay(found: Measured) -> list[Finding]:
    decay = found.hyper.get("weight_decay", 0.0)
    if not decay:
        return []
    words = f"{decay:.6g}, {said('decay', found.dialect.decay)}"
    if found.open:
        return [
            Finding("weight decay", words, f"cannot be told from: {'; '.join(said('decay', k) for k in found.open)}")
        ]
    return [Finding("weight decay", words)]


def _rate(found: Measured, told: Hyper) -> Finding:
    if found.scheduled:
        shown = ", ".join(f"{rate:.4g}" for rate in found.rates[:6])
        return Finding("learning rate", f"moves: {shown}, ...")
    lr = found.hyper["lr"]
    return Finding("learning rate", f"{lr:.7g}", _told("lr", lr, told))


def _told(name: str, value: float, told: Hyper) -> str:
    if name not in told:
        return "measured"
    same = bool(np.isclose(value, told[name], rtol=1e-5, atol=1e-12))
    return "measured, as told" if same else f"measured; told was {told[name]:g}"


def _numbers(found: Measured, run: Run, mode: Mode, told: Hyper) -> list[Finding]:
    """The other hyperparameters, each measured, with whether another value would be noticed."""
    result = []
    names = dict.fromkeys([*free_hyper(found.dialect, found.hyper), *_zeros(found)])
    for name in names:
        if name in ("weight_decay", "max_norm"):
            continue
        value = found.hyper.get(name, DEFAULTS[name])
        given = {key: x for key, x in found.hyper.items() if key != "lr"}
        changed = 1 - (1 - value) * 1.1 if name in ("b1", "b2") else value * 1.1 if value else 0.01
        moved = fit(found.dialect, {**given, name: changed}, run, mode)
        evidence = _told(name, value, told) if moved.digits > found.fit.digits else "has no effect here"
        if name == "eps":
            continue
        result.append(Finding(name, f"{value:.7g}", evidence))
    return result


def _zeros(found: Measured) -> list[str]:
    """Hyperparameters whose 0 is worth saying."""
    return [name for name in ("momentum",) if found.dialect.family in ("sgd", "rmsprop")]
