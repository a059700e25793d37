"""Groups of variables with hyperparameters of their own: which variables are in which, and in what parts a step goes.

A group's `match` is searched in a variable's path, `"sequential/dense/kernel"`. Paths change once a model has been
saved and loaded (see `exclusions.py`): if nothing but numbers of Keras and beginnings differs, the variables are those
of before, in the same order, and in the same groups. If not, regular expressions apply to the paths of now.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ada2ms.core.groups import Group, assign
from ada2ms.core.hyperparameters import Scheduled
from ada2ms.tf.paths import path_of, same_order, same_paths

if TYPE_CHECKING:
    from ada2ms.tf.optimizer import Ada2MS

Index = int | None  # of a group; None: no group, which is to say the optimizer's own hyperparameters


class Hyper(NamedTuple):
    """The hyperparameters of a group's variables, by the rule's names; `lr_scale` is a factor of the learning rate."""

    b1: float
    b2: float
    eps: float
    weight_decay: float
    adaptivity: Scheduled
    lr_scale: float = 1.0

    @classmethod
    def of(cls, optimizer: "Ada2MS", index: Index) -> "Hyper":
        """Those of now: attributes of an optimizer may be replaced at any time."""
        # Keras says by None that there is no weight decay.
        decay = optimizer.weight_decay or 0.0
        own = cls(optimizer.beta_1, optimizer.beta_2, optimizer.epsilon, decay, optimizer.adaptivity)
        if index is None:
            return own
        group = optimizer.groups[index]
        return own._replace(lr_scale=group.lr_scale, **group.hyper())


class Part(NamedTuple):
    """The variables of a step that are in the same group.

    Attributes:
        hyper: what they share.
        moment: which of the global second moments is theirs.
        positions: where they are in the step.
    """

    hyper: Hyper
    moment: int
    positions: list[int]


@dataclass(frozen=True)
class Grouping:
    """The group of each variable of an optimizer, once that is built.

    Attributes:
        groups: as given.
        variables: paths of the variables that the optimizer updates; none if it is not built.
        members: their groups.
        moments: the groups whose b2 the global second moments have, one for each b2 that there is.
        group_of, moment_of: group and global second moment of each variable, by its index in the optimizer.
    """

    groups: tuple[Group, ...] = ()
    variables: tuple[str, ...] = ()
    members: tuple[Index, ...] = ()
    moments: tuple[Index, ...] = (None,)
    group_of: dict[int, Index] = field(default_factory=dict)
    moment_of: dict[int, int] = field(default_factory=dict)

    def built(self, indices: Sequence[int], variables: Sequence[Any], b2: float) -> "Grouping":
        """With what it means for the variables of these indices, in an optimizer whose own b2 is this.

        Raises:
            ValueError: a group has no variable. (A warning, if there has been one when this was saved.)
        """
        paths, ndims = [path_of(variables[i]) for i in indices], [len(variables[i].shape) for i in indices]
        members = self._members(paths, ndims)
        b2s = [self._b2(index, b2) for index in members]
        moments: dict[float, Index] = {}
        for index, value in sorted(zip(members, b2s, strict=True), key=lambda pair: -1 if pair[0] is None else pair[0]):
            moments.setdefault(value, index)
        numbers = {value: i for i, value in enumerate(moments)}
        return replace(
            self,
            variables=tuple(paths),
            members=members,
            moments=tuple(moments.values()) or (None,),
            group_of=dict(zip(indices, members, strict=True)),
            moment_of={i: numbers[value] for i, value in zip(indices, b2s, strict=True)},
        )

    def parts(self, optimizer: "Ada2MS", indices: Sequence[int]) -> list[Part]:
        """The variables of a step, given by their indices in the optimizer, group by group."""
        if not self.groups:
            return [Part(Hyper.of(optimizer, None), 0, list(range(len(indices))))]
        positions: dict[Index, list[int]] = {}
        for position, i in enumerate(indices):
            positions.setdefault(self.group_of[i], []).append(position)
        return [
            Part(Hyper.of(optimizer, index), self.moment_of[indices[found[0]]], found)
            for index, found in positions.items()
        ]

    def _b2(self, index: Index, b2: float) -> float:
        own = None if index is None else self.groups[index].b2
        return b2 if own is None else own

    def _members(self, paths: Sequence[str], ndims: Sequence[int]) -> tuple[Index, ...]:
        if not self.groups:
            return (None,) * len(paths)
        if same_paths(self.variables, paths):
            return tuple(self.members[self.variables.index(path)] for path in paths)
        if not self.variables:
            return assign(self.groups, paths, ndims)
        if same_order(self.variables, paths):
            grouped = {path for path, index in zip(self.variables, self.members, strict=True) if index is not None}
            if grouped <= set(paths) and tuple(paths) != self.variables:
                self._warn("may have other variables: their paths are now others' paths", self.members, paths)
            return self.members
        members: tuple[Index, ...] = tuple(
            next((i for i, group in enumerate(self.groups) if group.matches(path, ndim)), None)
            for path, ndim in zip(paths, ndims, strict=True)
        )
        empty = {i for i in self.members if i is not None} - set(members)
        if empty:
            self._warn(f"have no variables any more: {[self.groups[i] for i in sorted(empty)]}", members, paths)
        return members

    def _warn(self, what: str, members: Sequence[Index], paths: Sequence[str]) -> None:
        found = {path: index for path, index in zip(paths, members, strict=True) if index is not None}
        warnings.warn(f"Groups of an optimizer that was saved {what}; the groups are now {found}", stacklevel=2)
