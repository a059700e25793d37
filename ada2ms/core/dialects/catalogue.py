"""What is known: the features that each family has, with their values, and the dialects of optimizers by name."""

from dataclasses import replace
from typing import Any, Final

import numpy as np

from ada2ms.core.dialects.dialect import DEFAULTS, Dialect, Hyper

# By the beginning of what an optimizer is called.
KNOWN: Final[dict[str, Dialect]] = {
    "torch.optim.AdamW": Dialect(),
    "torch.optim.Adam": Dialect(decay="coupled"),
    "torch.optim.SGD": Dialect(family="sgd", decay="coupled"),
    "torch.optim.NAdam": Dialect(decay="coupled", nesterov="schedule32"),
    "torch.optim.RAdam": Dialect(decay="coupled", second="rectified", eps="before"),
    "torch.optim.RMSprop": Dialect(family="rmsprop", decay="coupled", bias="none"),
    "torch.optim.Adagrad": Dialect(family="adagrad", decay="coupled"),
    "torch.optim.Adadelta": Dialect(family="adadelta", decay="coupled", eps="inside"),
    "torch.optim.Adamax": Dialect(family="adamax", decay="coupled", eps="inside"),
    "keras.optimizers.AdamW": Dialect(eps="before"),
    "keras.optimizers.Adam": Dialect(eps="before"),
    "keras.optimizers.SGD": Dialect(family="sgd", lr_in_momentum=True),
    "keras.optimizers.Nadam": Dialect(nesterov="schedule"),
    "keras.optimizers.RMSprop": Dialect(family="rmsprop", eps="inside", bias="none", lr_in_momentum=True),
    "keras.optimizers.Adagrad": Dialect(family="adagrad", eps="inside"),
    "keras.optimizers.Adadelta": Dialect(family="adadelta", eps="inside"),
    "keras.optimizers.Adamax": Dialect(family="adamax"),
    "keras.optimizers.Lion": Dialect(family="lion"),
    "ada2ms": Dialect(family="ada2ms"),
    "optax.adamw": Dialect(),
    "optax.adam": Dialect(),
    "optax.sgd": Dialect(family="sgd"),
    "optax.amsgrad": Dialect(second="greatest corrected"),
    "optax.radam": Dialect(second="rectified"),
    "optax.rmsprop": Dialect(family="rmsprop", eps="inside", bias="none", lr_in_momentum=True),
    "optax.adagrad": Dialect(family="adagrad", eps="inside"),
    "optax.adadelta": Dialect(family="adadelta", eps="inside"),
    "optax.adamax": Dialect(family="adamax", eps="inside"),
    "optax.lion": Dialect(family="lion"),
    "optax.adabelief": Dialect(second="belief"),
    "optax.yogi": Dialect(second="yogi"),
    "optax.lamb": Dialect(update="trust"),
}
FEATURES: Final[dict[str, tuple[Any, ...]]] = {
    "eps": ("outside", "before", "inside", "within", "floor"),
    "decay": ("decoupled", "after", "coupled", "unscaled"),
    "bias": ("both", "none", "first", "second"),
    "nesterov": (False, True, "next", "schedule", "schedule32"),
    "late": (0, 1, -1),
    "lr_in_momentum": (False, True),
    "sign": (1, -1),
    "state": ("float32", "bfloat16", "float16"),
    "scope": ("model", "tensor"),
    "second": ("mean", "greatest", "greatest corrected", "belief", "yogi", "rectified"),
    "centered": (False, True),
    "average": (False, True, "corrected"),
    "clip": ("none", "model", "torch", "tensor", "value"),
    "update": ("plain", "clipped", "trust"),
    "missing": ("skipped", "counted", "zeros"),
    "rounding": ("once", "update", "apart"),
}
OTHERS: Final[dict[str, tuple[float, ...]]] = {  # values that hyperparameters have where they were not meant to
    "b1": (0.9, 0.8, 0.95, 0.99, 0.0),
    "b2": (0.999, 0.99, 0.95, 0.98, 0.9, 0.9999),
    "eps": (1e-8, 1e-7, 1e-6, 1e-5, 1e-3, 0.0),
    "eps_root": (0.0, 1e-16, 1e-8),
    "weight_decay": (0.0, 1e-4, 4e-3, 1e-2, 5e-2, 0.1),
    "momentum": (0.0, 0.9, 0.99, 0.5),
    "dampening": (0.0, 0.1, 0.9),
    "adaptivity": (0.0, 0.5, 1.0),
    "initial": (0.0, 0.1, 1e-6, 1.0),
    "max_norm": (1.0, 0.01, 0.1, 0.5, 5.0, 10.0, 100.0),
    "lr_decay": (0.0, 1e-2),
    "momentum_decay": (4e-3, 1.0),
}
_COMMON: Final = ("decay", "sign", "clip", "update", "missing")
OWN: Final[dict[str, tuple[str, ...]]] = {  # which features and hyperparameters a family has
    "adam": ("eps", "decay", "bias", "nesterov", "late", "sign", "state", "second", *_COMMON[2:]),
    "sgd": ("decay", "nesterov", "lr_in_momentum", "sign", "average", *_COMMON[2:]),
    "ada2ms": ("decay", "bias", "late", "sign", "state", "scope", *_COMMON[2:]),
    "rmsprop": ("eps", "bias", "centered", "nesterov", "lr_in_momentum", "state", *_COMMON),
    "adagrad": ("eps", *_COMMON),
    "adadelta": _COMMON,
    "adamax": ("eps", "bias", "late", *_COMMON),
    "lion": _COMMON,
}
OWN_HYPER: Final[dict[str, tuple[str, ...]]] = {
    "adam": ("b1", "b2", "eps", "weight_decay", "eps_root"),
    "sgd": ("momentum", "weight_decay", "dampening"),
    "ada2ms": ("b1", "b2", "eps", "weight_decay", "adaptivity"),
    "rmsprop": ("b2", "eps", "momentum", "weight_decay", "initial"),
    "adagrad": ("eps", "initial", "weight_decay", "lr_decay"),
    "adadelta": ("b2", "eps", "weight_decay"),
    "adamax": ("b1", "b2", "eps", "weight_decay"),
    "lion": ("b1", "b2", "weight_decay"),
}
_TELLING: Final = {"adaptivity", "momentum", "b1", "b2"}  # hyperparameters, of an optimizer of unknown name
# Where a family has only some of a feature's values.
_LIMITED: Final[dict[str, dict[str, tuple[Any, ...]]]] = {
    "adamax": {"eps": ("outside", "inside"), "bias": ("both", "none")},
    "adagrad": {"eps": ("outside", "inside", "floor")},
    "rmsprop": {"eps": ("outside", "inside", "floor"), "bias": ("none", "both"), "nesterov": (False, True)},
    "sgd": {"nesterov": (False, True)},
}


def values_of(family: str, feature: str) -> tuple[Any, ...]:
    """Those that a feature has in a family."""
    return _LIMITED.get(family, {}).get(feature, FEATURES[feature])


def base(optimizer: str, hyper: Hyper) -> Dialect:
    """The dialect of an optimizer by its name; by its hyperparameters if the name is not known."""
    for name, dialect in KNOWN.items():
        if optimizer == name or (name == "ada2ms" and optimizer.lower().endswith("ada2ms")):
            return replace(dialect, nesterov=dialect.nesterov or bool(hyper.get("nesterov", False)))
    if "adaptivity" in hyper:
        return KNOWN["ada2ms"]
    return KNOWN["optax.sgd" if "momentum" in hyper and "b2" not in hyper else "optax.adamw"]


def claimed(optimizer: str, hyper: Hyper) -> Dialect:
    """As `base`; of another library's optimizer, that of its last name, such as of `lion_pytorch.Lion`."""
    last = optimizer.rpartition(".")[2].lower()
    known = next((name for name in KNOWN if name.rpartition(".")[2].lower() == last), optimizer)
    return base(optimizer if optimizer in KNOWN or last == "ada2ms" else known, hyper)


def is_claim(optimizer: str, hyper: Hyper) -> bool:
    """Whether a name, or hyperparameters, say what `claimed` gives, which else is a guess."""
    last = optimizer.rpartition(".")[2].lower()
    names = {"ada2ms", *(name.rpartition(".")[2].lower() for name in KNOWN)}
    return last in names or optimizer.lower().endswith("ada2ms") or bool(hyper.keys() & _TELLING)


def variants(dialect: Dialect, hyper: Hyper) -> list[Dialect]:
    """Those that differ from a dialect in one feature, or in one hyperparameter."""
    found = []
    for name in OWN[dialect.family]:
        for value in values_of(dialect.family, name):
            if value != getattr(dialect, name):
                found.append(replace(dialect, **{name: value}))
    for name in OWN_HYPER[dialect.family]:
        now = dict(dialect.changed).get(name, hyper.get(name, DEFAULTS[name]))
        for number in OTHERS[name]:
            if not np.isclose(number, now, rtol=1e-6, atol=0):
                rest = tuple(pair for pair in dialect.changed if pair[0] != name)
                found.append(replace(dialect, changed=(*rest, (name, number))))
    return found
