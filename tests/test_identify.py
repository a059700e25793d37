"""What optimizers compute, found out from their updates: planted dialects, unknown deviations, and real optimizers."""

from collections.abc import Callable
from typing import Any

import numpy as np
import planted
import pytest
from planted import B1, B2, EPS, LR, WD, Ada, Planted, adam, clipped, each_clipped, rmsprop, sgd

import support
from ada2ms.conformance import identify
from ada2ms.conformance.identification.report import Identification

Says = dict[str, str]


def told(rule: Any, hyper: dict[str, float], **how: Any) -> Callable[..., Identification]:
    """Identifies a planted optimizer that tells these hyperparameters."""

    def make(params: Any, **_: float) -> Planted:
        return Planted(params, rule, **how)

    return lambda: identify(make, name="planted", **hyper)


def known(rule: Any, **how: Any) -> Callable[..., Identification]:
    """Identifies a planted optimizer that tells what AdamW would be told to be."""
    return told(rule, {"lr": LR, "b1": B1, "b2": B2, "eps": EPS}, **how)


def hidden(rule: Any, **how: Any) -> Callable[..., Identification]:
    """Identifies a planted optimizer that tells nothing."""
    return lambda: identify(lambda params: Planted(params, rule, **how), name="planted")


def outside(v: Any, c: float) -> Any:
    return (v / c) ** 0.5 + EPS


PLANTED: dict[str, tuple[Callable[[], Identification], Says]] = {
    "AdamW": (known(adam()), {"rule": "Adam", "epsilon": "1e-08, outside the root, after bias correction"}),
    "epsilon before": (
        known(adam(denominator=lambda v, c: (v**0.5 + EPS) / c**0.5)),
        {"epsilon": "outside the root, before"},
    ),
    "epsilon inside": (known(adam(denominator=lambda v, c: (v / c + EPS) ** 0.5)), {"epsilon": "inside the root"}),
    "epsilon within": (
        known(adam(denominator=lambda v, c: ((v + EPS) / c) ** 0.5)),
        {"epsilon": "inside the root, before bias correction"},
    ),
    "floor": (known(adam(denominator=lambda v, c: np.maximum((v / c) ** 0.5, EPS))), {"epsilon": "the least"}),
    "eps_root": (known(adam(denominator=lambda v, c: (v / c + 1e-12) ** 0.5 + EPS)), {"eps_root": "1e-12"}),
    "coupled": (known(adam(decay="coupled")), {"weight decay": "0.1, coupled"}),
    "after": (known(adam(decay="after")), {"weight decay": "0.1, decoupled, after the update"}),
    "no correction": (known(adam(first=False, second=False)), {"bias correction": "none"}),
    "first alone": (known(adam(second=False)), {"bias correction": "of the first moment"}),
    "second alone": (known(adam(first=False)), {"bias correction": "of the second moment"}),
    "Nesterov": (
        known(adam(look=lambda m, g, t: (B1 * m + (1 - B1) * g) / (1 - B1**t))),
        {"Nesterov": "yes"},
    ),
    "Nesterov by the next": (
        known(adam(look=lambda m, g, t: B1 * m / (1 - B1 ** (t + 1)) + (1 - B1) * g / (1 - B1**t))),
        {"Nesterov": "yes, by the next step's bias correction"},
    ),
    "NAdam": (known(planted.nadam), {"Nesterov": "by NAdam's schedule", "momentum_decay": "0.004"}),
    "AMSGrad": (known(adam(grown="raw")), {"second moment": "the greatest mean of squares so far (AMSGrad)"}),
    "AMSGrad corrected": (known(adam(grown="corrected")), {"second moment": "after bias correction (AMSGrad)"}),
    "RAdam": (known(planted.radam), {"second moment": "(RAdam)"}),
    "AdaBelief": (known(planted.belief), {"second moment": "(AdaBelief)"}),
    "Yogi": (known(planted.yogi), {"second moment": "(Yogi)"}),
    "late": (known(adam(shift=1)), {"count of the first step": "2"}),
    "early": (known(adam(b2=0.95)), {"b2": "0.95"}),
    "RMSprop": (
        told(rmsprop(momentum=0.9, inside=True), {"lr": LR, "b2": 0.99, "eps": EPS}),
        {"rule": "RMSprop", "momentum": "0.9", "epsilon": "inside"},
    ),
    "centered": (
        told(rmsprop(centered=True), {"lr": LR, "b2": 0.99, "eps": EPS}),
        {"rule": "RMSprop", "centre of squares": "the mean gradient"},
    ),
    "Adagrad": (told(planted.adagrad, {"lr": LR, "eps": 1e-7}), {"rule": "Adagrad", "initial": "0.1"}),
    "Adadelta": (hidden(planted.adadelta), {"rule": "Adadelta", "b2": "0.95", "learning rate": "0.5"}),
    "Adamax": (known(planted.adamax), {"rule": "Adamax", "epsilon": "outside"}),
    "Lion": (hidden(planted.lion), {"rule": "Lion", "b2": "0.99"}),
    "LAMB": (told(planted.lamb, {"lr": LR, "weight_decay": WD}), {"size of the update": "times the norm of the value"}),
    "momentum": (hidden(sgd()), {"rule": "SGD", "momentum": "0.9", "Nesterov": "no"}),
    "Nesterov's SGD": (hidden(sgd(nesterov=True, dampening=0.0)), {"Nesterov": "yes"}),
    "dampened": (hidden(sgd(dampening=0.3)), {"dampening": "0.3"}),
    "a mean": (told(sgd(mean=True), {"lr": LR, "momentum": 0.9}), {"momentum is": "a mean of gradients"}),
    "uphill": (known(adam(sign=-1.0)), {"direction": "uphill"}),
    "clipped": (known(adam(), before=clipped(0.7)), {"clipping": "to 0.7, by the norm of the whole model"}),
    "clipped by torch": (
        known(adam(), before=clipped(0.5, 1e-6)),
        {"clipping": "to 0.5, by the norm of the whole model plus 1e-6"},
    ),
    "tensors clipped": (known(adam(), before=each_clipped(2.0)), {"clipping": "to 2, by the norm of each tensor"}),
    "entries clipped": (
        known(adam(), before=lambda gradients: [np.clip(g, -0.3, 0.3) for g in gradients]),
        {"clipping": "to 0.3, of each entry"},
    ),
    "counted": (known(adam(), missing="counted"), {"missing gradient": "counts, and does nothing else"}),
    "zeros": (known(adam(), missing="zeros"), {"missing gradient": "is a gradient of zeros"}),
    "Ada2MS": (
        lambda: identify(lambda params: Ada(params, 0.37), name="planted"),
        {"rule": "Ada2MS", "adaptivity": "0.37", "mean of squares": "over each tensor"},
    ),
    "two: Keras' epsilon, coupled": (
        known(adam(denominator=lambda v, c: (v**0.5 + EPS) / c**0.5, decay="coupled")),
        {"epsilon": "before bias correction", "weight decay": "coupled"},
    ),
    "two: AMSGrad, uncorrected": (
        known(adam(first=False, second=False, grown="raw")),
        {"bias correction": "none", "second moment": "(AMSGrad)"},
    ),
    "two: inside, another b2": (
        known(adam(denominator=lambda v, c: (v / c + EPS) ** 0.5, b2=0.97)),
        {"epsilon": "inside the root", "b2": "0.97"},
    ),
    "two: clipped, late": (
        known(adam(shift=1), before=clipped(3.0)),
        {"clipping": "to 3", "count of the first step": "2"},
    ),
    "two: after, epsilon within": (
        known(adam(denominator=lambda v, c: ((v + EPS) / c) ** 0.5, decay="after")),
        {"epsilon": "inside the root, before", "weight decay": "decoupled, after the update"},
    ),
}


DEAR = ("eps_root", "AdaBelief", "LAMB", "two: clipped, late", "two: AMSGrad, uncorrected", "tensors clipped")


@pytest.mark.parametrize("case", [*(case for case in PLANTED if case not in DEAR), *support.slow(*DEAR)])
def test_planted_dialects_are_named(case: str) -> None:
    found, says = PLANTED[case][0](), PLANTED[case][1]
    assert found.explained, found
    for feature, words in says.items():
        assert words in found.says(feature), (feature, words, str(found))


def cautious(kept: dict[str, Any], x: Any, g: Any, t: int) -> Any:
    new = adam()(kept, x, g, t)
    return np.where((new - x) * g < 0, new, x)


def cube_root(kept: dict[str, Any], x: Any, g: Any, t: int) -> Any:
    return adam(denominator=lambda v, c: (v / c) ** (1 / 3) + EPS)(kept, x, g, t)


def changed_later(kept: dict[str, Any], x: Any, g: Any, t: int) -> Any:
    new = adam()(kept, x, g, t)
    return new if t < 30 else x + 1.001 * (new - x)


def slightly_off(kept: dict[str, Any], x: Any, g: Any, t: int) -> Any:
    return adam(denominator=lambda v, c: (v / c) ** 0.5 * (1 + 1e-6 * np.tanh(v)) + EPS)(kept, x, g, t)


def noisy(kept: dict[str, Any], x: Any, g: Any, t: int) -> Any:
    return adam()(kept, x, g, t) + 1e-6 * np.random.default_rng().normal(size=x.shape)


def of_large_values(kept: dict[str, Any], x: Any, g: Any, t: int) -> Any:
    return np.clip(adam()(kept, x, g, t), -1.5, 1.5)


UNKNOWN = {
    "cautious": cautious,
    "a cube root": cube_root,
    "changed later": changed_later,
    "slightly off": slightly_off,
    "noise": noisy,
    "values limited": of_large_values,
    "centralised": lambda kept, x, g, t: adam()(kept, x, g - np.mean(g), t),
}


QUICK = ("changed later", "slightly off")


@pytest.mark.parametrize("case", [*QUICK, *support.slow(*(case for case in UNKNOWN if case not in QUICK))])
def test_what_no_dialect_does_is_not_explained(case: str) -> None:
    found = known(UNKNOWN[case])()
    assert (found.explained, found.status) == (False, 1), found
    assert found.unexplained
    assert "unexplained: " in str(found)
