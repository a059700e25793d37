"""Which variables weight decay leaves out, in a form that is saved with a model and finds them again.

A path is not the same before and after: `"sequential/dense/bias"` is `"dense/bias"` once its model has been saved and
loaded, and layers that Keras named, such as `"dense_4"`, are numbered anew in each process. If that is all that
differs, the variables are those of before, in the same order. If not, as when other layers are frozen, regular
expressions apply to the paths of now, and a variable is found by its path, or by the end of it where nothing else could
be meant. What remains in doubt is for the optimizer to warn of.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
from keras.src.backend.common.global_state import get_global_attribute

_AUTOMATIC = re.compile(r"(?:forward_|backward_)?(.+?)((?:_\d+)?)")  # of a layer: the class, and a number


@dataclass(frozen=True)
class Exclusions:
    """What `exclude_from_weight_decay` was given, and what it means for the variables of an optimizer that is built.

    Attributes:
        var_names: regular expressions, for paths and names.
        var_list: paths.
        variables: paths of all variables that the optimizer updates, if it is built.
        excluded: positions in `variables` of those that are excluded.
    """

    var_names: tuple[str, ...] = ()
    var_list: tuple[str, ...] = ()
    variables: tuple[str, ...] = ()
    excluded: tuple[int, ...] = ()

    @classmethod
    def of(cls, var_list: Sequence[Any] | None, var_names: Sequence[str] | None) -> "Exclusions":
        """Those of an optimizer that is not built.

        Raises:
            TypeError: naming the argument.
            ValueError: a regular expression is not valid.
        """
        for name, given in (("var_list", var_list), ("var_names", var_names)):
            if isinstance(given, str):
                raise TypeError(f"Invalid {name}: {given!r} (must be a list)")
        for pattern in var_names or ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"Invalid var_names: {pattern!r} (must be a regular expression: {error})") from None
        return cls(tuple(var_names or ()), tuple(path_of(v) for v in var_list or ()))

    def by_name(self, paths: Sequence[str]) -> set[int]:
        """Positions of the paths that a regular expression matches, or whose last part it does."""
        return {
            i
            for i, path in enumerate(paths)
            if any(re.search(name, x) for name in self.var_names for x in (path, path.rpartition("/")[2]))
        }

    def found(self, paths: Sequence[str]) -> set[int]:
        """Positions of the variables, among these of a model of now, that were excluded when this was saved."""
        if self._same_paths(paths):
            return {paths.index(self.variables[i]) for i in self.excluded}
        if self._same_order(paths):
            return set(self.excluded)
        return self.by_name(paths) | self._by_path(paths)

    def in_doubt(self, paths: Sequence[str]) -> list[str]:
        """Paths of excluded variables that are nowhere among those of now, or could be several of them."""
        if self._same_paths(paths) or tuple(paths) == self.variables:
            return []
        if self._same_order(paths):  # numbered anew; or the next layers of a model, whose names Keras has numbered too
            before = {self.variables[i] for i in self.excluded}
            elsewhere = {i for i, path in enumerate(paths) if path in before} != set(self.excluded)
            return sorted(before) if before <= set(paths) and elsewhere else []
        wanted = self._wanted(paths)
        if set(paths) <= set(self.variables):  # what is not there is frozen
            return [path for path, n in wanted.items() if paths.count(path) > n]
        return [path for path, n in wanted.items() if not 1 <= len(self._places(path, paths, wanted)) <= n]

    def numbered(self) -> list[str]:
        """Paths in `var_list` with layers that Keras has named, and so may number anew."""
        classes = _names_of_classes()
        return [x for x in self.var_list if any(_same_class(name, name, classes) for name in x.split("/")[:-1])]

    def built(self, paths: Sequence[str], excluded: Collection[int]) -> "Exclusions":
        """With what it means for these variables; what was saved of the same variables stays as it is."""
        if not self or self._same_paths(paths) or self._same_order(paths):
            return self
        return replace(self, variables=tuple(paths), excluded=tuple(sorted(excluded)))

    def __bool__(self) -> bool:
        return bool(self.var_names or self.var_list or self.excluded)

    def _wanted(self, paths: Sequence[str]) -> dict[str, int]:
        """Paths to be found, without those of regular expressions that still apply; how many variables had each."""
        live = [name for name in self.var_names if Exclusions((name,)).by_name(paths)]
        of_names = Exclusions(tuple(live)).by_name(self.variables)
        listed = [self.variables[i] for i in self.excluded if i not in of_names]
        return {path: max(self.var_list.count(path), listed.count(path)) for path in [*self.var_list, *listed]}

    def _by_path(self, paths: Sequence[str]) -> set[int]:
        wanted = self._wanted(paths)
        return {i for path in wanted for i in self._places(path, paths, wanted)}

    def _places(self, path: str, paths: Sequence[str], wanted: Collection[str]) -> list[int]:
        """Where a path is; or, if it is nowhere, where it is with another beginning, if that is one place only."""
        exact = [i for i, x in enumerate(paths) if x == path]
        if exact or any(x.startswith(path.partition("/")[0] + "/") for x in paths):
            return exact
        alike = [i for i, x in enumerate(paths) if _ends_alike(x, path) and x not in self.variables]
        others = [x for x in self.variables if alike and _ends_alike(x, paths[alike[0]]) and x not in wanted]
        return alike if len(alike) == 1 and not others else []

    def _same_paths(self, paths: Sequence[str]) -> bool:
        return len(set(paths)) == len(paths) == len(self.variables) and set(paths) == set(self.variables)

    def _same_order(self, paths: Sequence[str]) -> bool:
        """Whether these differ from those of before in no more than their beginnings, and in numbers of Keras."""
        if len(paths) != len(self.variables):
            return False
        classes = _names_of_classes()
        pairs = zip(paths, self.variables, strict=True)
        return all(_same_but_for_numbers(path, other, classes) for path, other in pairs)

    def to_config(self) -> dict[str, Any]:
        """Plain data, for `from_config`."""
        return {name: list(value) for name, value in vars(self).items() if value}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Exclusions":
        """What `to_config` described."""
        return cls(**{name: tuple(value) for name, value in config.items()})


def path_of(variable: Any) -> str:
    """A variable's path; a `tf.Variable` has a name only."""
    return str(getattr(variable, "path", variable.name))


def _ends_alike(path: str, other: str) -> bool:
    """Whether the shorter one, of a layer and a variable at least, ends the longer one."""
    one, two = path.split("/"), other.split("/")
    n = min(len(one), len(two))
    return n > 1 and one[-n:] == two[-n:]


def _same_but_for_numbers(path: str, other: str, classes: Collection[str]) -> bool:
    one, two = path.split("/"), other.split("/")
    n = min(len(one), len(two))
    return all(x == y or _same_class(x, y, classes) for x, y in zip(one[-n:], two[-n:], strict=True))


def _same_class(name: str, other: str, classes: Collection[str]) -> bool:
    """Whether both may be names that Keras has given to layers of a class: `"dense"`, `"dense_2"`.

    A user's own names are like those too, `"block_2"` of a class Block: Keras counts how many it has given.
    """
    one, two = _AUTOMATIC.fullmatch(name), _AUTOMATIC.fullmatch(other)
    if not one or not two or name.removesuffix(one[2]) != other.removesuffix(two[2]):
        return False
    counts = get_global_attribute("object_name_uids") or {}  # keras.backend.get_uid gives them too, but also counts
    return one[1] in classes or counts.get(one[1], 0) > int(one[2][1:] or 0)


def _names_of_classes() -> set[str]:
    """Keras' names, but for a number, of its own layers, models and variables."""
    found, waiting = set(), [keras.layers.Layer, keras.Variable]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if kind.__module__.startswith("keras."):
            name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", kind.__name__)
            found.add(re.sub("([a-z])([A-Z])", r"\1_\2", name).lower())
    return found
