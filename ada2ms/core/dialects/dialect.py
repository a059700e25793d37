"""What a dialect is: how updates follow from gradients, hyperparameters and values; and how it is said in words."""

from dataclasses import dataclass
from typing import Any, Final

from ada2ms.core.hyperparameters import DEFAULTS as RULE

Hyper = dict[str, float]


@dataclass(frozen=True)
class Dialect:
    """How updates are computed. Which features mean something depends on the family: see `OWN` in the catalogue.

    Attributes:
        family: "adam", "sgd", "ada2ms", "rmsprop", "adagrad", "adadelta", "adamax" or "lion".
        eps: where epsilon stands: "outside" the root, after bias correction; "before" bias correction, outside the
            root; "inside" the root, after bias correction; "within" the root, before bias correction; "floor": the
            least that the root may be. `eps_root` is a hyperparameter of its own, inside the root in addition.
        decay: "decoupled": of the value before the update, times lr; "after": of the value after the update, times lr;
            "coupled": in the gradient; "unscaled": decoupled, without lr.
        bias: which moments are corrected for their start from 0: "both", "none", "first" or "second".
        nesterov: whether the update looks ahead: False; True, by the same step's bias correction; "next", by that of
            the next step for the moment (Optax); "schedule", by Dozat's schedule of the momentum (NAdam);
            "schedule32", by it, with the product of the momenta kept in float32.
        late: by how many steps the count of bias correction is ahead (or, if negative, behind).
        lr_in_momentum: whether the learning rate enters the momentum, and not the update.
        sign: 1, or -1 for an optimizer that goes uphill.
        state: in which precision moments are kept: "float32" (as wide as the arithmetic), "bfloat16" or "float16".
        scope: Ada2MS: over what its mean is taken.
        second: of what Adam's denominator is made: "mean" of squares; "greatest" mean of squares (AMSGrad);
            "greatest corrected" one; "belief": squares of what the first moment leaves; "yogi"; "rectified" (RAdam).
        centered: RMSprop: whether the square of the mean is taken off the mean of squares.
        average: SGD: whether the momentum is a mean of gradients, and not a sum; "corrected": with bias correction.
        clip: what is scaled down to at most `max_norm`: "none"; the gradient of the whole "model", by its norm; that
            of each "tensor"; each entry ("value"); or "torch": of the model, with 1e-6 added to the norm.
        update: what happens to the update before lr: "plain"; "clipped": its root mean square is at most 1; "trust":
            times the norm of the value over its own (LAMB).
        missing: what a tensor without a gradient does: "skipped": nothing; "counted": only the count goes on;
            "zeros": a step with a gradient of 0.
        rounding: of new values of 16 bits: "once"; "update": the update is rounded by itself, too; "apart": what decay
            leaves is rounded by itself, too.
        changed: hyperparameters that are not the recorded ones.
    """

    family: str = "adam"
    eps: str = "outside"
    decay: str = "decoupled"
    bias: str = "both"
    nesterov: bool | str = False
    late: int = 0
    lr_in_momentum: bool = False
    sign: int = 1
    state: str = "float32"
    scope: str = "model"
    changed: tuple[tuple[str, float], ...] = ()
    second: str = "mean"
    centered: bool = False
    average: bool | str = False
    clip: str = "none"
    update: str = "plain"
    missing: str = "skipped"
    rounding: str = "once"

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
                found.append(f"{WORDS[name]}: {said(name, here)} against {said(name, there)}")
        return found


DEFAULTS: Final[Hyper] = {
    "b1": 0.9,
    "b2": 0.999,
    "eps": 1e-8,
    "eps_root": 0.0,
    "weight_decay": 0.0,
    "momentum": 0.0,
    "dampening": 0.0,
    "adaptivity": float(RULE.adaptivity) if not callable(RULE.adaptivity) else 1.0,
    "initial": 0.0,
    "max_norm": 1.0,
    "lr_decay": 0.0,
    "momentum_decay": 4e-3,
}

FAMILIES: Final = {
    "adam": "Adam",
    "sgd": "SGD with momentum",
    "ada2ms": "Ada2MS",
    "rmsprop": "RMSprop",
    "adagrad": "Adagrad",
    "adadelta": "Adadelta",
    "adamax": "Adamax",
    "lion": "Lion",
}
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
    "second": "the second moment",
    "centered": "the centre of squares",
    "average": "the momentum",
    "clip": "clipping",
    "update": "the update's size",
    "missing": "a missing gradient",
    "rounding": "rounding",
}
_SAID: Final[dict[str, dict[Any, str]]] = {
    "eps": {
        "outside": "outside the root, after bias correction",
        "before": "outside the root, before bias correction",
        "inside": "inside the root",
        "within": "inside the root, before bias correction",
        "floor": "as the least that the root may be",
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
    "nesterov": {
        True: "yes",
        False: "no",
        "next": "yes, by the next step's bias correction",
        "schedule": "by NAdam's schedule",
        "schedule32": "by NAdam's schedule, its product kept in float32",
    },
    "lr_in_momentum": {True: "in the momentum", False: "in the update"},
    "sign": {1: "downhill", -1: "uphill"},
    "family": FAMILIES,
    "scope": {"model": "over the model", "tensor": "over each tensor"},
    "second": {
        "mean": "a mean of squares",
        "greatest": "the greatest mean of squares so far (AMSGrad)",
        "greatest corrected": "the greatest mean of squares so far, after bias correction (AMSGrad)",
        "belief": "a mean of squares of what the first moment leaves (AdaBelief)",
        "yogi": "moved by the sign of what is new (Yogi)",
        "rectified": "a mean of squares, used from its fifth degree of freedom on (RAdam)",
    },
    "centered": {True: "the mean gradient", False: "0"},
    "average": {
        True: "a mean of gradients",
        False: "a sum of gradients",
        "corrected": "a mean of gradients, with bias correction",
    },
    "clip": {
        "none": "none",
        "model": "by the norm of the whole model",
        "torch": "by the norm of the whole model plus 1e-6",
        "tensor": "by the norm of each tensor",
        "value": "of each entry",
    },
    "update": {
        "plain": "as it is",
        "clipped": "its root mean square is at most 1",
        "trust": "times the norm of the value over its own",
    },
    "missing": {
        "skipped": "does nothing",
        "counted": "counts, and does nothing else",
        "zeros": "is a gradient of zeros",
    },
    "rounding": {
        "once": "once, of the new value",
        "update": "of the update by itself, too",
        "apart": "of what decay leaves by itself, too",
    },
}


def said(name: str, value: Any) -> str:
    """A feature's value in words."""
    if name == "late":
        return f"{1 + value}"
    return _SAID.get(name, {}).get(value, str(value))
