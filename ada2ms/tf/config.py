"""Arguments of the optimizer as plain data, for `get_config`, and back."""

from dataclasses import replace
from typing import Any

import keras

from ada2ms.core import schedules
from ada2ms.core.groups import Group
from ada2ms.tf.groups import Grouping

CustomObjects = dict[str, Any] | None


def adaptivity_to_config(adaptivity: Any) -> Any:
    """A number as it is; a schedule as a dictionary."""
    if isinstance(adaptivity, schedules.AdaptivitySchedule):
        return adaptivity.to_dict()
    return keras.saving.serialize_keras_object(adaptivity) if callable(adaptivity) else adaptivity


def adaptivity_from_config(data: Any, custom_objects: CustomObjects) -> Any:
    """What `adaptivity_to_config` described."""
    if not isinstance(data, dict):
        return data
    if "schedule" in data:
        return schedules.from_dict(data)
    return keras.saving.deserialize_keras_object(data, custom_objects=custom_objects)


def grouping_to_config(grouping: Grouping) -> dict[str, Any]:
    """The groups, and which variables are in them if that is known; nothing if there are none."""
    if not grouping.groups:
        return {}
    groups = []
    for group in grouping.groups:
        schedule = {"adaptivity": adaptivity_to_config(group.adaptivity)} if callable(group.adaptivity) else {}
        groups.append({**replace(group, adaptivity=None if schedule else group.adaptivity).to_dict(), **schedule})
    known = {name: list(getattr(grouping, name)) for name in ("variables", "members") if grouping.variables}
    return {"groups": groups, **({"grouped": known} if known else {})}


def groups_from_config(data: list[dict[str, Any]] | None, custom_objects: CustomObjects) -> list[Group]:
    """The groups that `grouping_to_config` described."""
    groups = []
    for given in data or ():
        rest = dict(given)
        adaptivity = adaptivity_from_config(rest.pop("adaptivity", None), custom_objects)
        groups.append(replace(Group.from_dict(rest), adaptivity=adaptivity))
    return groups


def grouping_from_config(groups: tuple[Group, ...], known: dict[str, list[Any]] | None) -> Grouping:
    """The groups, with the variables that were in them."""
    known = known or {}
    return Grouping(groups, tuple(known.get("variables", ())), tuple(known.get("members", ())))
