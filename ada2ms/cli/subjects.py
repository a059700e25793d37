"""Optimizers by their address, such as `torch.optim:AdamW`, made ready to be stepped by given gradients."""

import ast
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Final

import numpy as np

from ada2ms._extras import require
from ada2ms.conformance.identification.subject import CannotRunError, Subject
from ada2ms.core.hyperparameters import NAMES, Framework

LR: Final = 1e-3  # for a factory that wants a learning rate
KINDS: Final = ("torch", "keras", "optax", "numpy")
# The rule's names of what optimizers call otherwise; "betas" are two.
_SYNONYMS: Final = {
    "lr": ("lr", "learning_rate"),
    "b1": ("b1", "beta_1", "beta1"),
    "b2": ("b2", "beta_2", "beta2", "rho", "alpha", "decay"),
    "eps": ("eps", "epsilon"),
    "eps_root": ("eps_root",),
    "weight_decay": ("weight_decay",),
    "momentum": ("momentum",),
    "dampening": ("dampening",),
    "nesterov": ("nesterov",),
    "adaptivity": ("adaptivity",),
    "initial": ("initial", "initial_accumulator_value", "initial_scale"),
    "max_norm": ("max_norm", "global_clipnorm", "clipnorm", "clipvalue", "max_grad_norm"),
    "lr_decay": ("lr_decay",),
    "momentum_decay": ("momentum_decay",),
}


def load(address: str, settings: Sequence[str] = (), kind: str | None = None) -> Subject:
    """An optimizer by its address.

    Args:
        address: `module:attribute`, of an optimizer's class, or of a function that returns one.
        settings: arguments for it, each as "name=value", by its own names or by the rule's.
        kind: of `KINDS`; by default what the address leads to says it.

    Raises:
        CannotRunError: there is no such thing, or it is no optimizer; the message says why.
    """
    factory = _attribute(address)
    given = dict(_setting(text) for text in settings)
    name = address.replace(":", ".")  # by which the catalogue may know it
    if _is_a(factory, "optax", "GradientTransformation"):
        return _optax(name, lambda **_: factory, given)
    if inspect.ismodule(factory):
        raise CannotRunError(f"{address} is a module (must be module:name, such as torch.optim:AdamW)")
    if not callable(factory):
        raise CannotRunError(f"{address} is {type(factory).__name__} {factory!r:.60} (must be a class or a function)")
    seen = _kind_of_class(factory)
    if kind and seen and kind != seen:
        raise CannotRunError(f"Invalid framework: {kind!r} ({address} is an optimizer of {seen})")
    kind = kind or seen or _kind(factory, given)
    try:
        return _MAKERS[kind](name, factory, _arguments(factory, given, kind))
    except AttributeError as error:
        raise CannotRunError(f"{address} is no optimizer of {kind}: {error}") from error


def _attribute(address: str) -> Any:
    module, _, path = address.partition(":")
    if not path:
        module, _, path = address.rpartition(".")
    if not module or not path:
        raise CannotRunError(f"Invalid optimizer: {address!r} (must be module:name, such as torch.optim:AdamW)")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise CannotRunError(f"{module} cannot be imported: {error}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise CannotRunError(f"{module} has no {part} (it has {_there(found, part)})")
        found = getattr(found, part)
    return found


def _there(found: Any, wanted: str, most: int = 12) -> str:
    """What a module has of nearly this name; else optimizers, or whatever can be called, and how many more."""
    names = [name for name in dir(found) if not name.startswith("_") and callable(getattr(found, name, None))]
    near = [name for name in names if name.lower() == wanted.lower()] or get_close_matches(wanted, names, n=most)
    some = near or [name for name in names if _may_be_optimizer(getattr(found, name))] or names
    rest = f" and {len(some) - most} more" if len(some) > most else ""
    return ", ".join(some[:most]) + rest or "nothing of the kind"


def _may_be_optimizer(thing: Any) -> bool:
    """A class of an optimizer, or a function that has what a factory of one begins with."""
    if isinstance(thing, type):
        return _kind_of_class(thing) is not None and thing.__name__ != "Optimizer"
    return next(iter(_parameters(thing)), "") in (*_SYNONYMS["lr"], "params")


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise CannotRunError(f"Invalid setting: {text!r} (must be name=value, such as lr=1e-3)")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, {"true": True, "false": False, "none": None}.get(value.lower(), value)


def _is_a(thing: Any, module: str, name: str) -> bool:
    """Whether it is an instance of a class, or that class's heir, without importing what is not there."""
    classes = thing.__mro__ if isinstance(thing, type) else type(thing).__mro__
    return any(c.__module__.partition(".")[0] == module and c.__name__ == name for c in classes)


def _kind_of_class(thing: Any) -> str | None:
    """The framework whose optimizer a class is."""
    return next(
        (kind for kind in ("torch", "keras") if isinstance(thing, type) and _is_a(thing, kind, "Optimizer")), None
    )


def _kind(factory: Callable[..., Any], given: Mapping[str, Any]) -> str:
    """What a class of no framework is, or what a function returns when it is called as each framework would."""
    if isinstance(factory, type):
        return "numpy"
    first = next(iter(_parameters(factory)), "")
    if first in ("params", "parameters", "model_params"):
        return "torch" if "torch" in sys.modules and _returns_torch(factory, given) else "numpy"
    try:
        made = factory(**_arguments(factory, given, "optax"))
    except Exception as error:
        raise CannotRunError(f"{_name(factory)}() raised {type(error).__name__}: {error}") from error
    for kind, module, name in (("optax", "optax", "GradientTransformation"), ("keras", "keras", "Optimizer")):
        if _is_a(made, module, name):
            return kind
    raise CannotRunError(
        f"{_name(factory)}() returns {type(made).__name__} (must return an optimizer of Keras or Optax, or take "
        "params as its first argument and return one of torch, or an object with step(gradients) and params)"
    )


def _returns_torch(factory: Callable[..., Any], given: Mapping[str, Any]) -> bool:
    import torch

    try:
        made = factory([torch.nn.Parameter(torch.zeros(2, 2))], **_arguments(factory, given, "torch"))
    except Exception:  # of whatever wants other parameters: it is asked again with arrays
        return False
    return isinstance(made, torch.optim.Optimizer)


def _name(factory: Any) -> str:
    return getattr(factory, "__qualname__", type(factory).__name__)


def _parameters(factory: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(factory).parameters)
    except (TypeError, ValueError):
        return {}


def _arguments(factory: Callable[..., Any], given: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Settings by the factory's own names, and a learning rate where it wants one."""
    parameters = _parameters(factory)
    anything = not parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    arguments: dict[str, Any] = {}
    for name, value in given.items():
        own = _own(name, parameters, kind)
        if own is None and not anything:
            raise CannotRunError(f"{_name(factory)} has no argument {name!r} (it has {', '.join(parameters)})")
        if own == "betas" and name in ("b1", "b2"):
            pair = list(arguments.get(own, parameters[own].default))
            pair[name == "b2"] = value
            arguments[own] = tuple(pair)
        else:
            arguments[own or name] = value
    for name, p in parameters.items():
        if p.default is p.empty and name not in arguments and name in _SYNONYMS["lr"]:
            arguments[name] = LR
    skipped = 1 if kind in ("torch", "numpy") else 0
    missing = [
        name
        for i, (name, p) in enumerate(parameters.items())
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        if name not in arguments and i >= skipped
    ]
    if missing:
        wanted = " ".join(f"--set {name}=..." for name in missing)
        raise CannotRunError(f"{_name(factory)} wants {', '.join(missing)}: give it by {wanted}")
    return arguments


def _own(name: str, parameters: Mapping[str, Any], kind: str) -> str | None:
    """What a factory calls an argument."""
    if name in parameters:
        return name
    if name in ("b1", "b2") and "betas" in parameters:
        return "betas"
    frameworks: dict[str, Framework] = {"torch": "torch", "keras": "keras", "optax": "optax"}
    translated = NAMES.get(name, {}).get(frameworks.get(kind, "torch"), "")
    candidates = (translated, *_SYNONYMS.get(name, ()))
    return next((own for own in candidates if own in parameters), None)


def _told(values: Mapping[str, Any]) -> dict[str, float]:
    """Hyperparameters by the rule's names, of those that are numbers."""
    found = {}
    numbers = dict(values)
    if isinstance(numbers.get("betas"), (tuple, list)) and len(numbers["betas"]) >= 2:
        numbers["beta_1"], numbers["beta_2"] = numbers["betas"][:2]
    for name, own in _SYNONYMS.items():
        for key in own:
            value = numbers.get(key)
            if name == "nesterov" and isinstance(value, bool):
                found[name] = float(value)
            elif value is not None and not isinstance(value, (bool, str)) and _is_number(value):
                found.setdefault(name, float(value))
    return found


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError, RuntimeError):
        return False
    return True


def _settable(factory: Callable[..., Any], lr: bool) -> frozenset[str]:
    return frozenset({"weight_decay"} & set(_parameters(factory)) | ({"lr"} if lr else set()))


def _torch(name: str, factory: Callable[..., Any], given: dict[str, Any]) -> Subject:
    require("torch", "torch")
    import torch

    from ada2ms.torch.drive import Driven

    def make(params: list[Any], dtype: str, **other: float) -> Any:
        return Driven(lambda parameters: factory(parameters, **{**given, **other}), params, dtype=dtype)

    try:
        optimizer = factory([torch.nn.Parameter(torch.zeros(2, 2))], **given)
        told = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
        wide = not _keeps_float32(make([np.ones((2, 2))], "float64"))
    except Exception as error:
        raise CannotRunError(f"{name} raised {type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
    dtypes = Subject.dtypes if wide else Subject.dtypes[1:]
    return Subject(name, make, _told(told), _settable(factory, lr=True), dtypes)


def _keeps_float32(run: Any) -> bool:
    """Whether an optimizer of torch keeps a state of float32 for parameters of float64, and so computes in it."""
    import torch

    try:
        run.step([np.ones((2, 2))])
    except Exception:  # it is told when the experiments meet it
        return False
    states = [x for state in run.optimizer.state.values() for x in state.values()]
    return any(torch.is_tensor(x) and x.dtype == torch.float32 and x.numel() > 1 for x in states)


def _keras(name: str, factory: Callable[..., Any], given: dict[str, Any]) -> Subject:
    require("keras", "tf")
    import keras

    from ada2ms.tf.drive import Driven

    def make(params: list[Any], dtype: str, **other: float) -> Any:
        return Driven(lambda: factory(**{**given, **_arguments(factory, other, "keras")}), params, dtype=dtype)

    try:
        optimizer = factory(**given)
    except Exception as error:
        raise CannotRunError(f"{name} raised {type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
    inner = getattr(optimizer, "_learning_rate", None)
    scheduled = isinstance(inner, keras.optimizers.schedules.LearningRateSchedule)
    told = dict(vars(optimizer))
    if not scheduled:  # which a variable holds in the default precision
        told["learning_rate"] = float(f"{float(keras.ops.convert_to_numpy(optimizer.learning_rate)):.7g}")
    return Subject(name, make, _told(told), _settable(factory, lr=not scheduled), mixed=True)


def _optax(name: str, factory: Callable[..., Any], given: dict[str, Any]) -> Subject:
    require("optax", "jax")
    from ada2ms.jax.drive import Driven

    parameters = _parameters(factory)
    defaults = {key: p.default for key, p in parameters.items() if p.default is not p.empty}
    told = {**defaults, **given}
    own = next((key for key in _SYNONYMS["lr"] if key in parameters), None)
    lr = told.get(own) if own else None
    moves = own is not None and lr is not None and _is_number(lr)
    first = float(lr) if moves and lr is not None else 1.0

    def make(params: list[Any], dtype: str, **other: float) -> Any:
        def made(rate: Any) -> Any:
            return factory(**{**given, **others, **({own: rate} if moves and own else {})})

        others = {key: value for key, value in other.items() if key != "lr"}
        return Driven(made, params, lr=other.get("lr", first), dtype=dtype)

    return Subject(name, make, _told(told), _settable(factory, lr=moves))


def _numpy(name: str, factory: Callable[..., Any], given: dict[str, Any]) -> Subject:
    from ada2ms.conformance.identification.identify import subject_of

    return subject_of(factory, name, **given)


_MAKERS: Final[dict[str, Callable[[str, Callable[..., Any], dict[str, Any]], Subject]]] = {
    "torch": _torch,
    "keras": _keras,
    "optax": _optax,
    "numpy": _numpy,
}
