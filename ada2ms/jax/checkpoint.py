"""Checkpoints of JAX that need no program to be read, and the state of `ada2ms.core.state`."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]

from ada2ms._extras import require
from ada2ms.core.state import State, StateError
from ada2ms.jax.names import by_path
from ada2ms.jax.state import CompensatedAda2MSState, ScaleByAda2MSState
from ada2ms.jax.transfer import export_state

Tree: TypeAlias = Any  # dicts and lists, of arrays
Place: TypeAlias = tuple[str, ...]  # the keys that lead to a part of a tree
_NOTE: Final = (
    "Hyperparameters, groups, nonfinite and max_norm are not in the checkpoint: give the optimizer those of the run"
)
_ADAM: Final = {"count", "mu", "nu"}  # fields by which a state of Adam or Ada2MS is found


def read(path: Path) -> State:
    """The state in a file of `flax.serialization.to_bytes`, or in a folder of Orbax.

    Either holds a tree: somewhere in it one state of `ada2ms`, `optax.adamw` or `optax.adam`, and elsewhere, for the
    values, a tree of the same names and shapes; if there are several, as with averages, the one that is called
    "params". What this has beside, such as running statistics, is in the state's extras. A folder of Orbax is a tree,
    or a step of a manager, whose items are parts of one tree.

    Parameters have the names and layouts that `export_state` gives them without a mapping: paths in the tree, whose
    nodes are dicts and lists. Hyperparameters are not in the state, as no state of Optax has them.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ImportError: flax or Orbax is not installed.
        StateError: it cannot be loaded, has no such state or several, or does not tell which values are the
            parameters' or, where leaves differ in it, which of them has which count or s. JAX has these in the order of
            the leaves, which Orbax keeps of lists alone, and which is not relied on in a file of flax where it is that
            of neither a dict nor a list.
    """
    if not path.exists():
        raise FileNotFoundError(f"There is no file or folder {str(path)!r}")
    tree = _from_orbax(path) if path.is_dir() else _from_msgpack(path)
    try:
        return _state(tree, ordered=not path.is_dir())
    except StateError as error:
        raise StateError(f"Cannot read {str(path)!r}", error.problems) from None


@dataclass(frozen=True)
class _Found:
    """A state of Adam or Ada2MS in a tree."""

    place: Place
    node: Any


def _state(tree: Tree, ordered: bool) -> State:
    found = _node(tree)
    if _is_boxed(found.node.mu):
        tree = _without_boxes(tree)
        found = _node(tree)
    node, mu = found.node, by_path(found.node.mu)
    _require_numbers(node, mu)
    _require_order(node, ordered)
    values = _values(tree, found.place, mu)
    if values is None:
        state = export_state(node.mu, node, values=False)
        state.notes.append("The checkpoint has no values of the parameters")
    else:
        beside = {name: name for name, x in by_path(values[1]).items() if name not in mu and _is_numeric(x)}
        state = export_state(values[1], node, extras=beside)
    state.notes.append(_NOTE)
    used = [found.place, *([] if values is None else [values[0]])]
    state.notes += [f"Not read: {'/'.join(place)!r} of the checkpoint" for place in _others(tree, used)]
    return state


def _from_msgpack(path: Path) -> Tree:
    require("flax", "jax")
    from flax import serialization

    try:
        return _plain(serialization.msgpack_restore(path.read_bytes()))
    except OSError:
        raise
    except Exception as error:  # of many kinds: msgpack's own, NumPy's
        raise StateError(
            f"Cannot read {str(path)!r}", [f"flax.serialization.msgpack_restore: {type(error).__name__}: {error}"]
        ) from None


def _from_orbax(path: Path) -> Tree:
    """The tree of a folder; or, of a step of a manager, a dict of its items that are trees."""
    try:
        ocp = import_module("orbax.checkpoint")
    except ImportError as error:
        problem = f"Reading the folder {str(path)!r} needs orbax.checkpoint: pip install orbax-checkpoint ({error})"
        raise ImportError(problem, name="orbax.checkpoint") from None
    folders = sorted(x for x in path.iterdir() if x.is_dir())
    try:
        tree = _orbax_tree(ocp, path)
        items = {} if tree is not None else {x.name: _orbax_tree(ocp, x) for x in folders}
    except Exception as error:  # of many kinds: JSON's, tensorstore's
        first = str(error).partition("\n")[0]
        raise StateError(f"Cannot read {str(path)!r}", [f"orbax.checkpoint: {first}"]) from None
    items = {name: item for name, item in items.items() if item is not None}
    if tree is None and not items:
        problem = (
            f"no tree of Orbax is in it, or in its folders {[x.name for x in folders]} (of a manager, give one step's)"
        )
        raise StateError(f"Cannot read {str(path)!r}", [problem])
    if tree is None:
        tree = items if len(items) > 1 else next(iter(items.values()))
    return _plain(tree)


def _orbax_tree(ocp: Any, folder: Path) -> Tree:
    """What is in a folder, as NumPy arrays; None if it is no tree's."""
    handler = ocp.PyTreeCheckpointHandler()
    try:
        try:
            metadata = handler.metadata(folder.absolute())
        except FileNotFoundError:
            return None
        arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata.tree)
        return handler.restore(folder.absolute(), args=ocp.args.PyTreeRestore(restore_args=arrays))
    finally:
        handler.close()


def _plain(tree: Tree) -> Tree:
    """With text for keys, and dicts whose leaves JAX has in the order of the file, not of the alphabet."""
    if isinstance(tree, Mapping):
        return OrderedDict((str(key), _plain(x)) for key, x in tree.items())
    return [_plain(x) for x in tree] if isinstance(tree, (list, tuple)) else tree


def _children(tree: Tree) -> list[tuple[str, Tree]]:
    if isinstance(tree, dict):
        return list(tree.items())
    return [(str(i), x) for i, x in enumerate(tree)] if isinstance(tree, list) else []


def _containers(tree: Tree, at: Place = ()) -> Iterator[tuple[Place, Tree]]:
    """Every dict and list of a tree, and where it is."""
    if isinstance(tree, (dict, list)):
        yield at, tree
        for key, x in _children(tree):
            yield from _containers(x, (*at, key))


def _node(tree: Tree) -> _Found:
    nodes = [(at, x) for at, x in _containers(tree) if isinstance(x, dict) and set(x) >= _ADAM]
    if len(nodes) != 1:
        keys = [key for key, _ in _children(tree)]
        problem = f"it has {len(nodes)} states of Ada2MS or Adam in it (must be 1); its keys are {keys}"
        raise StateError("Cannot read it", [problem])
    [(place, held)] = nodes
    kind: Any = ScaleByAda2MSState if "s" in held else optax.ScaleByAdamState
    kind = CompensatedAda2MSState if "compensation" in held else kind
    if set(held) != set(kind._fields):
        problem = f"{'/'.join(place)!r} has {sorted(held)} (must be the fields of a state of Ada2MS or Adam)"
        raise StateError("Cannot read it", [problem])
    return _Found(place, kind(**held))


def _is_boxed(mu: Tree) -> bool:
    """Whether each array is in a box of flax.nnx, of which a checkpoint makes {"value": array}."""
    return all(name.rpartition("/")[2] == "value" for name in by_path(mu))


def _without_boxes(tree: Tree) -> Tree:
    if isinstance(tree, dict):
        if set(tree) == {"value"} and not isinstance(tree["value"], (dict, list)):
            return tree["value"]
        return OrderedDict((key, _without_boxes(x)) for key, x in tree.items())
    return [_without_boxes(x) for x in tree] if isinstance(tree, list) else tree


def _is_numeric(x: Any) -> bool:
    return isinstance(x, (int, float, complex, np.ndarray, np.generic)) and np.asarray(x).dtype.kind not in "OSU"


def _require_numbers(node: Any, mu: Mapping[str, Any]) -> None:
    """That a state is as `init` makes it: of floating-point moments, and of one count or s, or one for each leaf."""
    problems = [] if mu else ["its moments, mu, are of no parameter"]
    shapes = {name: np.shape(m) for name, m in mu.items()}
    for slot in ("mu", "nu"):
        held = by_path(getattr(node, slot))
        wrong = [
            n for n, x in held.items() if not (_is_numeric(x) and jnp.issubdtype(np.asarray(x).dtype, jnp.inexact))
        ]
        problems += [f"{slot} of {name!r} is not of floating-point numbers" for name in wrong]
        if not wrong and {name: np.shape(x) for name, x in held.items()} != shapes:
            problems.append(f"{slot} has other names or shapes than mu")
    rest = by_path(getattr(node, "compensation", {}))
    if not all(_is_numeric(x) and np.shape(x) == shapes.get(name) for name, x in rest.items()):
        problems.append("compensation has other names or shapes than mu")
    every = (len(mu),)
    allowed: dict[str, list[tuple[int, ...]]] = {
        "count": [()],
        "skipped": [()],
        "steps": [every],
        "s": [(), every, (*every, 1)],
    }
    for field in allowed.keys() & set(node._fields):
        x = getattr(node, field)
        if not (_is_numeric(x) and np.shape(x) in allowed[field]):
            problems.append(
                f"{field} is {x!r:.60} (must be numbers of the shape {' or '.join(map(str, allowed[field]))})"
            )
    if problems:
        raise StateError("Cannot read it", sorted(problems))


def _require_order(node: Any, ordered: bool) -> None:
    """That it is known which leaf has which count or s, where they differ.

    Args:
        node: the state.
        ordered: whether the order of dicts is that in which leaves were written.
    """
    each = [np.asarray(getattr(node, field, 0)).ravel().tolist() for field in ("steps", "s")]
    if all(len({*numbers}) < 2 for numbers in each):
        return
    dicts = [(at, list(x)) for at, x in _containers(node.mu) if isinstance(x, dict) and len(by_path(x)) > 1]
    unknown = ["/".join(at) or "." for at, keys in dicts if len(keys) > 1 and not (ordered and _is_sorted(keys))]
    if unknown:
        problem = f"leaves have counts or s that differ, in an order that it does not keep: of those in {unknown}"
        raise StateError("Cannot read it", [f"{problem} (restore it into the run's own state, and call export_state)"])


def _is_sorted(keys: list[str]) -> bool:
    """Whether keys are in the order of a dict of text, or of numbers; flax writes lists as the latter."""
    return keys == sorted(keys) or (all(key.isdecimal() for key in keys) and keys == sorted(keys, key=int))


def _values(tree: Tree, place: Place, mu: Mapping[str, Any]) -> tuple[Place, Tree] | None:
    """Where the parameters are, and they; None if they are nowhere."""

    def fits(x: Tree) -> bool:
        leaves = by_path(x)
        return all(name in leaves and np.shape(leaves[name]) == np.shape(m) for name, m in mu.items())

    apart = [(at, x) for at, x in _containers(tree) if at[: len(place)] != place and at != place[: len(at)]]
    found = [(at, x) for at, x in apart if fits(x)]
    named = [(at, x) for at, x in found if at[-1] == "params"]
    chosen = named if len(named) == 1 else found
    if len(chosen) > 1:
        places = ["/".join(at) for at, _ in chosen]
        raise StateError("Cannot read it", [f"the parameters may be those of any of {places} (one must be 'params')"])
    return chosen[0] if chosen else None


def _others(tree: Tree, used: list[Place]) -> list[Place]:
    """The outermost places with arrays, beside those that are used. Single numbers are counts, most of them."""
    found: list[Place] = []

    def walk(x: Tree, at: Place) -> None:
        if at in used or not any(np.ndim(leaf) for leaf in jax.tree.leaves(x)):
            return
        if not any(at == place[: len(at)] for place in used):
            found.append(at)
            return
        for key, inner in _children(x):
            walk(inner, (*at, key))

    walk(tree, ())
    return found
