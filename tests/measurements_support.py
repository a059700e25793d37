"""Runs whose last update is known from the rule in NumPy, to be measured in every framework."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from ada2ms import core
from ada2ms.core.hyperparameters import Hyperparameters, value_at
from ada2ms.core.measurements import OF_MODEL, PREFIX, RATIOS, STEPS
from ada2ms.core.spec import bias_correction
from support import Array, slow

SHAPES = {"bias": (4,), "empty": (0, 2), "kernel": (3, 4), "scale": ()}
STEPS_MADE = 4


@dataclass(frozen=True)
class Run:
    """Options by the rule's names, groups, and which gradients are missing or not finite, as (step, parameter)."""

    options: dict[str, Any] = field(default_factory=dict)
    groups: Sequence[core.Group] = ()
    missing: frozenset[tuple[int, str]] = frozenset()
    infinite: frozenset[tuple[int, str]] = frozenset()

    @property
    def hyper(self) -> dict[str, Any]:
        """A large decay, so that it shows."""
        return {"lr": 0.01, "weight_decay": 0.3, **self.options}

    def params(self) -> dict[str, Array]:
        rng = np.random.default_rng(0)
        return {name: np.asarray(rng.normal(size=shape)) for name, shape in SHAPES.items()}

    def gradients(self) -> Iterator[dict[str, Array | None]]:
        rng = np.random.default_rng(1)
        for step in range(STEPS_MADE):
            arrays = {n: np.asarray(rng.normal(size=shape)) for n, shape in SHAPES.items()}
            arrays["kernel"][0, 0] = 0  # whose v is 0
            found: dict[str, Array | None] = dict(arrays)
            for name, g in found.items():
                if (step, name) in self.missing:
                    found[name] = None
                elif (step, name) in self.infinite and g is not None:
                    g[...] = np.inf
            yield found


RUNS = {
    "plain": Run(),
    "tensor": Run({"scope": "tensor"}),
    "sgd": Run({"adaptivity": 0.0}),
    "adamw": Run({"adaptivity": 1.0}),
    "power": Run({"adaptivity": 0.3, "weight_decay": 0.0}),
    "scheduled": Run({"adaptivity": core.Linear(1.0, 0.0, 6), "lr": core.Linear(0.125, 0.25, 4)}),
    "clipped": Run({"max_norm": 0.5}),
    "no eps": Run({"eps": 0.0}),
    "large eps": Run({"eps": 0.5}),
    "skipped": Run({"nonfinite": "skip"}, infinite=frozenset({(1, "kernel")})),
    "missing": Run(missing=frozenset({(0, "bias"), (2, "kernel")})),
    "missing from tensors": Run({"scope": "tensor"}, missing=frozenset({(0, "bias"), (2, "kernel")})),
    "groups": Run({}, [core.Group("bias", lr_scale=0.5, b2=0.9, adaptivity=0.9, eps=0.25), core.NO_DECAY]),
}
EVERY_RUN = pytest.mark.parametrize("name", RUNS)
FIRST = ("plain", "tensor", "scheduled", "skipped", "groups")
EVERY_RUN_COMPILED = pytest.mark.parametrize("name", [*FIRST, *slow(*(name for name in RUNS if name not in FIRST))])


def rule(run: Run) -> tuple[core.Ada2MS, dict[str, Array], dict[str, Array]]:
    """The rule after the run; the parameters before its last step, and after it."""
    params = run.params()
    options = dict(run.hyper)
    choices = {name: options.pop(name) for name in ("scope", "nonfinite", "max_norm") if name in options}
    own = Hyperparameters(**options)
    ndims = [p.ndim for p in params.values()]
    groups = [
        {"params": [p], **vars(own if i is None else run.groups[i].of(own))}
        for p, i in zip(params.values(), core.groups.assign(run.groups, list(params), ndims), strict=True)
    ]
    optimizer = core.Ada2MS(groups, **choices)
    before = {}
    for gradients in run.gradients():
        before = {name: p.copy() for name, p in params.items()}
        optimizer.step(list(gradients.values()))
    return optimizer, before, params


def expected(run: Run) -> dict[str, float]:
    """What there is to measure, from the rule's state and from what the last step has changed."""
    optimizer, before, after = rule(run)
    own, k = Hyperparameters(**{n: x for n, x in run.hyper.items() if n in vars(core.DEFAULTS)}), STEPS_MADE
    k -= optimizer.skipped
    steps, s_hats = {}, {}
    for name, group in zip(after, optimizer.groups, strict=True):
        hyper, t = group.hyper, group.step[0]
        lr, a = (value_at(x, k - 1) for x in (hyper.lr, hyper.adaptivity))
        s_hat = group.global_exp_avg_sq[0] / bias_correction(hyper.b2, t if group.scope == "tensor" else k)
        s_hats[name if group.scope == "tensor" else hyper.b2] = s_hat
        m_hat = group.exp_avg[0] / bias_correction(hyper.b1, t)
        v_hat = group.exp_avg_sq[0] / bias_correction(hyper.b2, t)
        with np.errstate(invalid="ignore"):
            d = v_hat ** (a / 2) * s_hat ** ((1 - a) / 2) + hyper.eps
            d = np.where(d == 0, np.inf, d)
            steps[name] = float(np.linalg.norm(lr * m_hat / d) / np.linalg.norm(m_hat))
    with np.errstate(invalid="ignore"):
        ratios = {n: float(np.linalg.norm(p - before[n]) / np.linalg.norm(p)) for n, p in after.items()}
    lr, s_hat = value_at(own.lr, k - 1), float(np.mean([*s_hats.values()]))
    last = [g for g in [*run.gradients()][-1].values() if g is not None]
    norm = float(np.sqrt(sum((g**2).sum() for g in last)))
    model = k, optimizer.skipped, lr, value_at(own.adaptivity, k - 1), s_hat, lr / (s_hat**0.5 + own.eps), norm
    return {
        **{PREFIX + n: float(x) for n, x in zip(OF_MODEL, model, strict=True)},
        **{f"{PREFIX}{STEPS}/{n}": x for n, x in steps.items()},
        **{f"{PREFIX}{RATIOS}/{n}": x for n, x in ratios.items()},
    }


def compare(measured: dict[str, float], run: Run, rel: float, *without: str) -> None:
    """Fails unless these are the numbers of a run, `without` some; NaN where there are no entries."""
    awaited = {name: x for name, x in expected(run).items() if name.removeprefix(PREFIX) not in without}
    assert sorted(measured) == sorted(awaited)
    assert all(type(x) is float for x in measured.values())
    for name, x in awaited.items():
        assert measured[name] == pytest.approx(x, rel=rel, nan_ok=True), name
    assert [n for n, x in measured.items() if np.isnan(x)] == [n for n in measured if n.endswith("/empty")]
