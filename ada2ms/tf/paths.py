"""Paths of variables, and which of them are the same after a model has been saved and loaded."""

import re
from collections.abc import Collection, Sequence
from typing import Any

import keras
from keras.src.backend.common.global_state import get_global_attribute

_AUTOMATIC = re.compile(r"(?:forward_|backward_)?(.+?)((?:_\d+)?)")  # of a layer: the class, and a number


def path_of(variable: Any) -> str:
    """A variable's path; a `tf.Variable` has a name only."""
    return str(getattr(variable, "path", variable.name))


def same_paths(before: Sequence[str], paths: Sequence[str]) -> bool:
    """Whether these are the paths of before, each of one variable, in any order."""
    return len(set(paths)) == len(paths) == len(before) and set(paths) == set(before)


def same_order(before: Sequence[str], paths: Sequence[str]) -> bool:
    """Whether these differ from those of before in no more than their beginnings, and in numbers of Keras."""
    if len(paths) != len(before):
        return False
    classes = names_of_classes()
    return all(_same_but_for_numbers(path, other, classes) for path, other in zip(paths, before, strict=True))


def _same_but_for_numbers(path: str, other: str, classes: Collection[str]) -> bool:
    one, two = path.split("/"), other.split("/")
    n = min(len(one), len(two))
    return all(x == y or same_class(x, y, classes) for x, y in zip(one[-n:], two[-n:], strict=True))


def same_class(name: str, other: str, classes: Collection[str]) -> bool:
    """Whether both may be names that Keras has given to layers of a class: `"dense"`, `"dense_2"`.

    A user's own names are like those too, `"block_2"` of a class Block: Keras counts how many it has given.
    """
    one, two = _AUTOMATIC.fullmatch(name), _AUTOMATIC.fullmatch(other)
    if not one or not two or name.removesuffix(one[2]) != other.removesuffix(two[2]):
        return False
    counts = get_global_attribute("object_name_uids") or {}  # keras.backend.get_uid gives them too, but also counts
    return one[1] in classes or counts.get(one[1], 0) > int(one[2][1:] or 0)


def names_of_classes() -> set[str]:
    """Keras' names, but for a number, of its own layers, models and variables."""
    found, waiting = set(), [keras.layers.Layer, keras.Variable]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if kind.__module__.startswith("keras."):
            name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", kind.__name__)
            found.add(re.sub("([a-z])([A-Z])", r"\1_\2", name).lower())
    return found
