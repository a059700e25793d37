"""Hyperparameters, and counts of steps, that states of Optax hold themselves."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax  # type: ignore[import-untyped]


def injected(state: Any, names: Sequence[str]) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """The hyperparameters that states of `optax.inject_hyperparams` hold, and of which leaves they are.

    Args:
        state: of an optimizer; within one that divides leaves, such as that of `optax.multi_transform`, a state is of
            those that its moments have.
        names: of all leaves.

    Returns:
        The label of each leaf that has one, and the hyperparameters of each label; "" for those of all leaves. What
        several states of the same leaves hold under one name is left out, as is what is of no leaf that is known.
    """
    nodes = [x for x in jax.tree.leaves(state, is_leaf=_has_hyper) if _has_hyper(x)]
    outer = jax.tree.leaves(state, is_leaf=lambda x: _has_hyper(x) or isinstance(x, optax.MaskedState))
    labels: dict[str, str] = {}
    found: dict[str, dict[str, Any]] = {}
    for i, node in enumerate(nodes):
        everywhere = any(node is x for x in outer)
        own = names if everywhere else _leaves_of(node, names)
        label = "" if everywhere else str(i)
        held = {name: x for name, x in node.hyperparams.items() if jnp.ndim(x) == 0}
        if label and (not own or any(name in labels for name in own)):
            continue
        labels |= dict.fromkeys(own, label) if label else {}
        before = found.setdefault(label, {})
        found[label] = {name: x for name, x in (before | held).items() if not (name in before and name in held)}
    return labels, found


def counts(state: Any) -> list[Any]:
    """How many updates were completed before, as an optimizer's states have it; each the same, or none."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return [x for path, x in leaves if path and getattr(path[-1], "name", "") == "count" and is_whole_number(x)]


def is_whole_number(x: Any) -> bool:
    """Whether it is one integer, as a count is."""
    return jnp.ndim(x) == 0 and bool(jnp.issubdtype(jnp.asarray(x).dtype, jnp.integer))


def _has_hyper(node: Any) -> bool:
    return hasattr(node, "hyperparams")


def _leaves_of(node: Any, names: Sequence[str]) -> list[str]:
    """The leaves of which a state has moments, by the ends of the moments' paths."""
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(node)]
    longest = sorted(names, key=len, reverse=True)
    ends = {next((name for name in longest if path.endswith(f"/{name}")), None) for path in paths}
    return [name for name in names if name in ends]
