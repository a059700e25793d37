"""The optimizer's state to and from other frameworks; `ada2ms.core.state` says what it consists of."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]

from ada2ms.core.state import (
    Axes,
    Entry,
    Group,
    Names,
    Report,
    State,
    StateError,
    Target,
    inward,
    outward,
    plain_hyperparameters,
)
from ada2ms.jax._rule import ScaleByAda2MSState

_NODES = (ScaleByAda2MSState, optax.ScaleByAdamState)


def export_state(
    params: optax.Params,
    opt_state: optax.OptState,
    *,
    names: Names = None,
    axes: Axes = None,
    options: Mapping[str, Any] | None = None,
    values: bool = True,
) -> State:
    """The state of an optimizer, to go on from in any framework.

    Args:
        params: the parameters, a tree. A leaf's name here is its path in it, `"dense/kernel"`.
        opt_state: a state of Optax with one state of `ada2ms`, `optax.adamw` or `optax.adam` in it.
        names: what the state is to call a parameter, for each path here, as a mapping or a function; those left out
            keep their paths.
        axes: for a path here, how an array of the state is to be transposed to have this layout; as in `import_state`.
        options: arguments that the optimizer was made with, to be recorded as hyperparameters: nothing else in Optax
            knows them. What is left out is not recorded.
        values: whether the parameters' values are to travel too.

    Returns:
        A state with copies of everything.

    Raises:
        StateError: listing everything that cannot be exported.
    """
    node = _node(opt_state)
    leaves, mu, nu = _by_path(params), _by_path(node.mu), _by_path(node.nu)
    _require_leaves(leaves, mu)
    ours = isinstance(node, ScaleByAda2MSState)
    count = int(_scalar(node.count))
    steps = [int(t) for t in np.asarray(_scalar(node.steps))] if ours else [count] * len(mu)
    s = np.asarray(_scalar(node.s), np.float64) if ours else None
    each = s is not None and s.ndim == 1
    entries = {
        path: Entry(
            exp_avg=_numpy(mu[path]),
            exp_avg_sq=_numpy(nu[path]),
            step=steps[i],
            global_exp_avg_sq=float(s[i]) if s is not None and each else None,
            param=_numpy(leaves[path]) if values else None,
        )
        for i, path in enumerate(mu)
    }
    entries, renamed = outward(entries, names, axes, leaves)
    options = dict(options or {})
    options["lr"] = options.pop("learning_rate", None)
    group = Group(list(renamed.values()), plain_hyperparameters(options))
    source = f"jax {jax.__version__}, optax {optax.__version__}: {type(node).__name__}"
    if s is None:
        return State(entries, [group], source=source)
    group.global_step = count
    if not each:
        group.global_exp_avg_sq = float(s)
    return State(
        entries,
        [group],
        scope="tensor" if each else "model",
        nonfinite=options.get("nonfinite", "propagate"),
        skipped=int(_scalar(node.skipped)),
        source=source,
    )


def import_state(
    params: optax.Params,
    opt_state: optax.OptState,
    state: State,
    *,
    names: Names = None,
    axes: Axes = None,
    values: bool = True,
    cast: bool = False,
) -> tuple[optax.Params, optax.OptState, Report]:
    """Parameters and optimizer state that continue a state of any framework.

    Counts of `optax.scale_by_schedule` in `opt_state` are set to the number of updates, too.

    Args:
        params: the parameters, a tree. A leaf's name here is its path in it, `"dense/kernel"`.
        opt_state: what `init` of the optimizer made of them; it has one state of `ada2ms`, `optax.adamw` or
            `optax.adam` in it.
        state: of `export_state`, in this framework or another, or of a file.
        names: what the state calls a parameter, for each path here, as a mapping or a function; those left out have the
            same name.
        axes: for a path here, how the state's array is transposed to have this layout: (1, 0) for a kernel of (inputs,
            outputs) that is a weight of (outputs, inputs) in the state.
        values: whether the parameters' values come from the state too.
        cast: whether values may be rounded to the types here.

    Returns:
        New parameters and optimizer state, of the types and shardings of those given; and what went where, to be
        printed.

    Raises:
        StateError: listing everything that is missing, superfluous, or of a wrong shape or type.
    """
    node = _node(opt_state)
    leaves, mu, nu = _by_path(params), _by_path(node.mu), _by_path(node.nu)
    _require_leaves(leaves, mu)
    ours = isinstance(node, ScaleByAda2MSState)
    targets = {
        path: Target(
            tuple(mu[path].shape),
            {"param": leaves[path].dtype.name, "exp_avg": mu[path].dtype.name, "exp_avg_sq": nu[path].dtype.name},
        )
        for path in mu
    }
    fitted = inward(
        state,
        targets,
        names=names,
        axes=axes,
        scope=("tensor" if _scalar(node.s).ndim else "model") if ours else None,
        values=values,
        cast=cast,
        others=leaves,
    )
    s, k = fitted.groups[0]
    steps = [fitted.entries[path].step for path in mu]
    if not ours:
        if len(set(steps)) > 1:
            reason = f"Adam has one count of updates; the state's parameters have {sorted(set(steps))}"
            raise StateError("The state does not fit", [reason])
        k = max(steps, default=0)

    def replaced(tree: Any, slot: str) -> Any:
        structure: Any
        paths, structure = jax.tree_util.tree_flatten_with_path(tree)
        new = []
        for path, leaf in paths:
            entry = fitted.entries.get(_name(path))  # a parameter that is not in the optimizer stays
            value = None if entry is None else getattr(entry, slot)
            new.append(leaf if value is None else _like(leaf, value))
        return structure.unflatten(new)

    def moved(x: Any) -> Any:
        if isinstance(x, optax.ScaleByScheduleState):
            return x._replace(count=_filled(x.count, k))
        if not isinstance(x, _NODES):
            return x
        x = x._replace(count=_filled(x.count, k), mu=replaced(x.mu, "exp_avg"), nu=replaced(x.nu, "exp_avg_sq"))
        if not ours:
            return x
        each = [entry.global_exp_avg_sq for path in mu for entry in [fitted.entries[path]]]
        return x._replace(
            s=_filled(x.s, each if _scalar(x.s).ndim else s or 0.0),
            steps=_filled(x.steps, steps),
            skipped=_filled(x.skipped, fitted.skipped),
        )

    opt_state = jax.tree.map(moved, opt_state, is_leaf=_is_node)
    return replaced(params, "param"), opt_state, fitted.report


def arguments(state: State) -> dict[str, Any]:
    """The arguments for `ada2ms` that continue a state: those of its hyperparameters that it knows.

    Raises:
        StateError: the state has groups that differ.
    """
    hyper = {("learning_rate" if name == "lr" else name): value for name, value in state.hyper().items()}
    return {**hyper, "scope": state.scope, "nonfinite": state.nonfinite}


def _is_node(x: Any) -> bool:
    return isinstance(x, (*_NODES, optax.ScaleByScheduleState))


def _node(opt_state: optax.OptState) -> Any:
    """The one state of Ada2MS or Adam."""
    nodes = [x for x in jax.tree.leaves(opt_state, is_leaf=_is_node) if isinstance(x, _NODES)]
    if len(nodes) != 1:
        reason = f"it has {len(nodes)} states of Ada2MS or Adam in it (must be 1)"
        raise StateError("The optimizer state does not fit", [reason])
    return nodes[0]


def _by_path(tree: Any) -> dict[str, Any]:
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _name(path: tuple[Any, ...]) -> str:
    """A path as text; without the `.value` in which flax.nnx keeps a parameter's array."""
    if path and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value":
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _require_leaves(params: dict[str, Any], mu: dict[str, Any]) -> None:
    problems = [f"{path!r} is in the optimizer state alone" for path in mu if path not in params]
    problems += [
        f"{path!r} has moments of another shape, {mu[path].shape} (complex in real moments: leave mu_dtype to default)"
        for path in mu
        if path in params and mu[path].shape != params[path].shape
    ]
    if problems:
        raise StateError("Parameters and optimizer state do not belong together", problems)


def _scalar(x: Any) -> Any:
    """The array of a field, which flax.nnx wraps."""
    return jax.tree.leaves(x)[0]


def _filled(field: Any, value: Any) -> Any:
    return jax.tree.map(lambda old: _like(old, np.asarray(value)), field)


def _like(old: Any, value: Any) -> Any:
    """A new array of the old one's type and sharding."""
    return jax.device_put(jnp.asarray(value, old.dtype), old.sharding)


def _numpy(x: Any) -> Any:
    array = np.array(x)
    return array if array.dtype.itemsize >= 4 else array.astype(np.float32)
