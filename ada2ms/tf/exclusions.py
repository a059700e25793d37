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

from ada2ms.tf.paths import names_of_classes, path_of, same_class, same_order, same_paths


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
        if same_paths(self.variables, paths):
            return {paths.index(self.variables[i]) for i in self.excluded}
        if same_order(self.variables, paths):
            return set(self.excluded)
        return self.by_name(paths) | self._by_path(paths)

    def in_doubt(self, paths: Sequence[str]) -> list[str]:
        """Paths of excluded variables that are nowhere among those of now, or could be several of them."""
        if same_paths(self.variables, paths) or tuple(paths) == self.variables:
            return []
        # Numbered anew; or the next layers of a model, whose names Keras has numbered too.
        if same_order(self.variables, paths):
            before = {self.variables[i] for i in self.excluded}
            elsewhere = {i for i, path in enumerate(paths) if path in before} != set(self.excluded)
            return sorted(before) if before <= set(paths) and elsewhere else []
        wanted = self._wanted(paths)
        if set(paths) <= set(self.variables):  # what is not there is frozen
            return [path for path, n in wanted.items() if paths.count(path) > n]
        return [path for path, n in wanted.items() if not 1 <= len(self._places(path, paths, wanted)) <= n]

    def numbered(self) -> list[str]:
        """Paths in `var_list` with layers that Keras has named, and so may number anew."""
        classes = names_of_classes()
        return [x for x in self.var_list if any(same_class(name, name, classes) for name in x.split("/")[:-1])]

    def built(self, paths: Sequence[str], excluded: Collection[int]) -> "Exclusions":
        """With what it means for these variables; what was saved of the same variables stays as it is."""
        if not self or same_paths(self.variables, paths) or same_order(self.variables, paths):
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

    def to_config(self) -> dict[str, Any]:
        """Plain data, for `from_config`."""
        return {name: list(value) for name, value in vars(self).items() if value}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Exclusions":
        """What `to_config` described."""
        return cls(**{name: tuple(value) for name, value in config.items()})


def _ends_alike(path: str, other: str) -> bool:
    """Whether the shorter one, of a layer and a variable at least, ends the longer one."""
    one, two = path.split("/"), other.split("/")
    n = min(len(one), len(two))
    return n > 1 and one[-n:] == two[-n:]
