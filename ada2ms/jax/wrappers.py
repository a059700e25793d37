"""The states of other Optax transformations around ours: which of their counts a hand-off sets, and what it leaves."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import optax  # type: ignore[import-untyped]

from ada2ms.core.state import StateError
from ada2ms.jax.state import CompensatedAda2MSState, ScaleByAda2MSState

_NODES = (CompensatedAda2MSState, ScaleByAda2MSState, optax.ScaleByAdamState)
# Each call of these updates what is inside, as in a chain. Others may not, such as `MultiSteps`: a count inside of them
# does not tell one outside. (`apply_if_finite` does not when it rejects a step; that schedules go on from the updates
# that were made is nearer to the truth than that they start anew.)
_EVERY_CALL = (
    optax.ApplyIfFiniteState,
    optax.InjectHyperparamsState,
    optax.InjectStatefulHyperparamsState,
    optax.LookaheadState,
    optax.MaskedState,
    optax.PartitionState,
)
# Beside a count of calls, in `inject_hyperparams` and `add_noise`. (The count of an average stays with the average.)
_BESIDE = {"hyperparams", "hyperparams_states", "inner_state", "rng_key"}


def the_node(opt_state: optax.OptState) -> Any:
    """The one state of Ada2MS or Adam.

    Raises:
        StateError: there is none, or there are several.
    """
    nodes = [x for x in jax.tree.leaves(opt_state, is_leaf=_is_node) if _is_node(x)]
    if len(nodes) != 1:
        reason = f"it has {len(nodes)} states of Ada2MS or Adam in it (must be 1)"
        raise StateError("The optimizer state does not fit", [reason])
    return nodes[0]


def rewritten(
    opt_state: optax.OptState, new_node: Callable[[Any], Any], new_count: Callable[[Any], Any]
) -> tuple[optax.OptState, list[str]]:
    """The states with that of Ada2MS or Adam replaced, and with the counts of updates around it set.

    Args:
        opt_state: with one state of Ada2MS or Adam in it.
        new_node: makes it of the old one.
        new_count: makes of a count, whose type it has, the number of calls of `update`.

    Returns:
        The states; and the paths of what was left as it was, each with the type of its state.
    """
    around = [x for x in _ancestors(opt_state) if not _updates_in_every_call(x)]
    rewriting = _Rewriting(new_node, new_count, around[-1] if around else None)
    return rewriting.state(opt_state, (), not around), rewriting.kept


def left_behind(opt_state: optax.OptState) -> list[str]:
    """What an exported state does not hold: averages, accumulated gradients, counts that are not those of updates."""
    return rewritten(opt_state, lambda node: node, lambda count: count)[1]


@dataclass
class _Rewriting:
    new_node: Callable[[Any], Any]
    new_count: Callable[[Any], Any]
    innermost: Any  # of the states around that of Ada2MS, the innermost that may not update it in every call
    kept: list[str] = field(default_factory=list)

    def state(self, x: Any, path: tuple[Any, ...], in_step: bool) -> Any:
        """The state at a path, rewritten; `in_step` says whether it is updated as often as that of Ada2MS."""
        if _is_node(x):
            return self.new_node(x)
        if not _has_fields(x):
            return self._children(x, path, in_step)
        counts = self._counts(x, in_step)
        in_step = x is self.innermost or (in_step and _updates_in_every_call(x))
        fields = {}
        for name in x._fields:
            value, inner = getattr(x, name), (*path, jax.tree_util.GetAttrKey(name))
            if name in counts:
                fields[name] = self.new_count(value)
            elif name == "hyperparams" or not jax.tree.leaves(value):
                fields[name] = value
            elif any(map(_has_fields, jax.tree.leaves(value, is_leaf=_has_fields))):
                fields[name] = self.state(value, inner, in_step)
            else:
                self.kept.append(f"{jax.tree_util.keystr(inner)} of {type(x).__name__}")
                fields[name] = value
        return x._replace(**fields)

    def _counts(self, x: Any, in_step: bool) -> set[str]:
        """The fields that count calls of `update`; only in Optax' own states, since what others count is unknown."""
        if x is self.innermost and isinstance(x, optax.MultiStepsState):
            return {"gradient_step"}
        if not in_step or type(x).__module__.partition(".")[0] != "optax":
            return set()
        return {"count"} if "count" in x._fields and {*x._fields} <= {"count", *_BESIDE} else set()

    def _children(self, x: Any, path: tuple[Any, ...], in_step: bool) -> Any:
        in_step = in_step and _updates_in_every_call(x)
        children, structure = _one_level(x)
        if any(child is x for _, child in children):  # a leaf
            self.kept.append(jax.tree_util.keystr(path))
            return x
        return structure.unflatten([self.state(child, (*path, *key), in_step) for key, child in children])


def _is_node(x: Any) -> bool:
    return isinstance(x, _NODES)


def _updates_in_every_call(x: Any) -> bool:
    return isinstance(x, (*_EVERY_CALL, list, Mapping)) or type(x) is tuple


def _has_fields(x: Any) -> bool:
    return isinstance(x, tuple) and hasattr(x, "_fields")


def _one_level(x: Any) -> tuple[list[tuple[Any, Any]], Any]:
    """The children of a node with their keys, and its structure; a leaf's are itself."""
    return jax.tree_util.tree_flatten_with_path(x, is_leaf=lambda child: child is not x)


def _ancestors(x: Any) -> list[Any]:
    """From a state down to that of Ada2MS or Adam, without the latter."""
    for _, child in _one_level(x)[0]:
        if child is not x and any(map(_is_node, jax.tree.leaves(child, is_leaf=_is_node))):
            return [x, *([] if _is_node(child) else _ancestors(child))]
    return [x]
