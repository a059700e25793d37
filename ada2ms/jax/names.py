"""The names of leaves in a portable state: their paths as text."""

import sys
from typing import Any

import jax

from ada2ms.core.state import StateError


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their names, such as "dense/kernel".

    Raises:
        StateError: naming leaves that have one name: keys may hold a "/", and 1 and "1" are the same as text.
    """
    leaves: dict[str, Any] = {}
    called: dict[str, list[str]] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_box)[0]:
        if arrays := jax.tree.leaves(leaf):
            called.setdefault(_name(path), []).append(jax.tree_util.keystr(path))
            leaves[_name(path)] = arrays[0]
    problems = [f"{' and '.join(paths)} are all called {name!r}" for name, paths in called.items() if len(paths) > 1]
    if problems:
        raise StateError("Several leaves have one name; rename a key", problems)
    return leaves


def flatten(tree: Any) -> tuple[list[tuple[str, Any]], Any]:
    """The leaves of a tree with their names, boxes of flax counted as leaves; and its structure."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_box)
    return [(_name(path), leaf) for path, leaf in leaves], structure


def without_boxes(tree: Any) -> Any:
    """The tree with arrays where boxes of flax are, each in its box's place."""
    leaves, structure = flatten(tree)
    return structure.unflatten([jax.tree.leaves(box)[0] if jax.tree.leaves(box) else None for _, box in leaves])


def names_of_leaves(tree: Any) -> list[str]:
    """The name of each leaf, in their order; those in which `by_path` has it.

    An array in a box of flax has the name of the box, as there.
    """
    return [name for name, box in flatten(tree)[0] for _ in jax.tree.leaves(box)]


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_box(x: Any) -> bool:
    """Whether x is one of the boxes in which flax keeps a single array; the box's own `.value` is no part of a name."""
    kinds = (("flax.nnx", "Variable"), ("flax.nnx", "VariableState"), ("flax.core.meta", "AxisMetadata"))
    # `vars` looks past the warning of newer flax, in which VariableState is a deprecated alias.
    loaded = [vars(sys.modules[module]).get(name) for module, name in kinds if module in sys.modules]
    return isinstance(x, tuple(kind for kind in loaded if kind is not None))
