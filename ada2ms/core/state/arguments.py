"""The arguments of a framework's optimizer that continue a state: its hyperparameters, choices and groups."""

from collections.abc import Mapping, Sequence
from typing import Any

from ada2ms.core import groups as by_name
from ada2ms.core.hyperparameters import DEFAULT_COMPENSATED, DEFAULT_MAX_NORM, DEFAULTS, Framework, to_arguments
from ada2ms.core.schedules import AdaptivitySchedule
from ada2ms.core.state.errors import StateError
from ada2ms.core.state.layout import Names, names_here
from ada2ms.core.state.model import Group, State


def arguments(state: State, framework: Framework, names: Names = None) -> dict[str, Any]:
    """The arguments of a framework's Ada2MS that continue a state: those of its hyperparameters that it knows.

    Args:
        state: of any source.
        framework: whose names the arguments have.
        names: the state's name of each of the framework's names, as for `import_state`: needed only where the state's
            groups differ, and then no function.

    Returns:
        By the framework's names, without `max_norm` and `compensated` where they are off. For groups that differ there
        are `groups`, too, of `ada2ms.core.Group`, which name the framework's parameters; the hyperparameters of most
        parameters are the optimizer's own.

    Raises:
        StateError: the state has groups that differ, and not all hyperparameters of each are known, or `names` is a
            function.
    """
    hyper, groups = named_groups(state, names)
    choices: dict[str, Any] = {"scope": state.scope, "nonfinite": state.nonfinite}
    if state.max_norm != DEFAULT_MAX_NORM:
        choices["max_norm"] = state.max_norm
    if state.compensated != DEFAULT_COMPENSATED:
        choices["compensated"] = state.compensated
    found = to_arguments({**hyper, **choices}, framework)
    return {**found, "groups": groups} if groups else found


def named_groups(state: State, names: Names = None) -> tuple[dict[str, Any], list[by_name.Group]]:
    """The hyperparameters of most of a state's parameters, and groups of the others by the framework's names."""
    distinct: list[tuple[dict[str, Any], list[str]]] = []  # groups that do not differ are one
    for group in state.groups:
        same = next((params for hyper, params in distinct if hyper == group.hyper), None)
        if same is None:
            distinct.append((dict(group.hyper), list(group.params)))
        else:
            same += group.params
    if not distinct:
        return {}, []
    most = max(range(len(distinct)), key=lambda i: len(distinct[i][1]))  # the first of several
    base = distinct[most][0]
    if problems := _unnameable(state.groups, names) if len(distinct) > 1 else []:
        raise StateError("The groups have hyperparameters of their own", problems)
    called = {} if names is None or callable(names) else names_here(names)
    groups = []
    for i, (hyper, params) in enumerate(distinct):
        if i != most and params:
            match = by_name.exactly(dict.fromkeys(called.get(name, name) for name in params))
            own = {
                name: value for name, value in hyper.items() if name not in ("lr", "lr_scale") and value != base[name]
            }
            groups.append(by_name.Group(match, lr_scale=_lr_scale(hyper, base), **own))
    return {name: value for name, value in base.items() if name != "lr_scale"}, groups


def _unnameable(groups: Sequence[Group], names: Names) -> list[str]:
    """Why groups that differ cannot be said by a framework's names."""
    problems = []
    known = {name for group in groups for name in group.hyper} - {"lr_scale"}
    for i, group in enumerate(groups):
        if unknown := sorted(known - set(group.hyper)):
            problems.append(f"group {i}: {group.hyper}; of another group {', '.join(unknown)} is known, too")
    if not problems and callable(names):
        problems.append(
            "names is a function, which does not tell what the groups' parameters are called here (must be a mapping)"
        )
    return problems


def _lr_scale(hyper: Mapping[str, Any], base: Mapping[str, Any]) -> float:
    """A group's learning rate as a factor of the optimizer's: as recorded, or of the rates that were last used."""
    if "lr_scale" in hyper or "lr_scale" in base:
        own, whole = hyper.get("lr_scale", 1.0), base.get("lr_scale", 1.0)
    else:
        own, whole = hyper.get("lr", 1.0), base.get("lr", 1.0)
    if own == whole:
        return 1.0
    if not whole:
        reason = f"a learning rate of {own} is no multiple of {whole}, that of most parameters"
        raise StateError("The groups have hyperparameters of their own", [reason])
    return float(own / whole)


def plain_hyperparameters(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the rule's hyperparameters that are plain data: numbers, and schedules of `ada2ms.core`."""
    kept: dict[str, Any] = {}
    for name in vars(DEFAULTS):
        value = values.get(name)
        if isinstance(value, AdaptivitySchedule):
            kept[name] = value
        elif value is not None and not callable(value):
            kept[name] = float(value)
    return kept
