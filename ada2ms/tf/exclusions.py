"""Which variables weight decay leaves out, in a form that is saved with a model and finds them again.

A path is not the same before and after: `"sequential/dense/bias"` is `"dense/bias"` once its model has been saved and
loaded, and layers that Keras named, such as `"dense_4"`, are numbered anew in each process. What stays is the order of
the variables, or, where the order has changed, the end of the path.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

_NUMBER = re.compile(r"_\d+$")


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
        wanted = [*self.var_list, *(self.variables[i] for i in self.excluded)]
        return self.by_name(paths) | {i for i, path in enumerate(paths) if _among(path, wanted, paths)}

    def built(self, paths: Sequence[str], excluded: Collection[int]) -> "Exclusions":
        """With what it means for these variables; what was saved of the same variables stays as it is."""
        if not self or self._same_paths(paths) or self._same_order(paths):
            return self
        return replace(self, variables=tuple(paths), excluded=tuple(sorted(excluded)))

    def __bool__(self) -> bool:
        return bool(self.var_names or self.var_list or self.excluded)

    def _same_paths(self, paths: Sequence[str]) -> bool:
        return len(set(paths)) == len(paths) == len(self.variables) and set(paths) == set(self.variables)

    def _same_order(self, paths: Sequence[str]) -> bool:
        return len(paths) == len(self.variables) and all(map(_same_but_for_numbers, paths, self.variables))

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


def _among(path: str, wanted: Sequence[str], paths: Sequence[str]) -> bool:
    """Whether a path is wanted; one that is no longer there may be there with another beginning."""
    return path in wanted or any(_ends_alike(path.split("/"), x.split("/")) for x in wanted if x not in paths)


def _ends_alike(path: list[str], other: list[str]) -> bool:
    """Whether the shorter one, of a layer and a variable at least, ends the longer one."""
    n = min(len(path), len(other))
    return n > 1 and path[-n:] == other[-n:]


def _same_but_for_numbers(path: str, other: str) -> bool:
    one, two = ([_NUMBER.sub("", part) for part in x.split("/")] for x in (path, other))
    n = min(len(one), len(two))
    return one[-n:] == two[-n:]
