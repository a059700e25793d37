"""The optimizer's state to and from other frameworks; `ada2ms.core.state` says what it consists of."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]

from ada2ms.core.hyperparameters import from_arguments
from ada2ms.core.state import (
    SLOTS,
    Axes,
    Entry,
    Group,
    Names,
    Report,
    State,
    StateError,
    Target,
    from_portable,
    in_state,
    only_count,
    plain_hyperparameters,
    to_portable,
    without_moments,
)
from ada2ms.core.state import arguments as portable_arguments
from ada2ms.jax.names import by_path, flatten
from ada2ms.jax.state import ScaleByAda2MSState
from ada2ms.jax.wrappers import left_behind, rewritten, the_node


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
        A state with copies of everything that the optimizer has moments of. Its `notes` name what is not in it.

    Raises:
        StateError: listing everything that cannot be exported.
    """
    node = the_node(opt_state)
    leaves, mu, nu = by_path(params), by_path(node.mu), by_path(node.nu)
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
    entries, renamed = to_portable(entries, names, axes, leaves)
    options = from_arguments(options or {}, "optax")
    group = Group(in_state(renamed, renamed), plain_hyperparameters(options))
    source = f"jax {jax.__version__}, optax {optax.__version__}: {type(node).__name__}"
    notes = [f"Not exported: {kept}" for kept in left_behind(opt_state)]
    notes += without_moments(_arrays_beside(leaves, mu) if values else [], imported=False)
    if s is None:
        return State(entries, [group], source=source, notes=notes)
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
        notes=notes,
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

    Counts of Optax' own states around it are set to the number of calls of `update`, too, where they follow from it:
    those of schedules, of `inject_hyperparams` and of `MultiSteps`. What does not, such as averages and gradients that
    are accumulated, stays as it is in `opt_state` and is in the report's notes.

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
    node = the_node(opt_state)
    leaves, mu, nu = by_path(params), by_path(node.mu), by_path(node.nu)
    _require_leaves(leaves, mu)
    ours = isinstance(node, ScaleByAda2MSState)
    fitted = from_portable(
        state,
        {path: Target(tuple(np.shape(mu[path])), _dtypes(leaves[path], mu[path], nu[path])) for path in mu},
        names=names,
        axes=axes,
        scope=("tensor" if np.ndim(_scalar(node.s)) else "model") if ours else None,
        values=values,
        cast=cast,
        others=leaves,
    )
    s, k = fitted.groups[0]
    steps = [fitted.entries[path].step for path in mu]
    if not ours:
        k = only_count(fitted.entries.values(), "Adam")

    def replaced(tree: Any, slot: str) -> Any:
        paths, structure = flatten(tree)
        new = []
        for path, leaf in paths:
            entry = fitted.entries.get(path)  # a parameter that is not in the optimizer stays
            value = None if entry is None else getattr(entry, slot)
            new.append(leaf if value is None else _filled(leaf, value))
        return structure.unflatten(new)

    def moved(node: Any) -> Any:
        node = node._replace(
            count=_filled(node.count, k), mu=replaced(node.mu, "exp_avg"), nu=replaced(node.nu, "exp_avg_sq")
        )
        if not ours:
            return node
        each = [fitted.entries[path].global_exp_avg_sq for path in mu]
        return node._replace(
            s=_filled(node.s, each if np.ndim(_scalar(node.s)) else s or 0.0),
            steps=_filled(node.steps, steps),
            skipped=_filled(node.skipped, fitted.skipped),
        )

    # The transformations around ours were called in skipped steps, too.
    opt_state, kept = rewritten(opt_state, moved, lambda count: _filled(count, k + fitted.skipped))
    fitted.report.notes += [f"Not imported, and as it was in opt_state: {name}" for name in kept]
    fitted.report.notes += without_moments(_arrays_beside(leaves, mu) if values else [], imported=True)
    return replaced(params, "param"), opt_state, fitted.report


def arguments(state: State) -> dict[str, Any]:
    """The arguments for `ada2ms` that continue a state: those of its hyperparameters that it knows.

    Raises:
        StateError: the state has groups that differ.
    """
    return portable_arguments(state, "optax")


def _arrays_beside(params: dict[str, Any], mu: dict[str, Any]) -> list[str]:
    """Names of the arrays that the optimizer has no moments of: those of another part of `optax.partition`, say."""
    return [path for path, leaf in params.items() if path not in mu and isinstance(leaf, (jax.Array, np.ndarray))]


def _require_leaves(params: dict[str, Any], mu: dict[str, Any]) -> None:
    problems = [f"{path!r} is in the optimizer state alone" for path in mu if path not in params]
    problems += [
        f"{path!r} has moments of another shape, {np.shape(mu[path])} (complex in real moments: leave mu_dtype out)"
        for path in mu
        if path in params and np.shape(mu[path]) != np.shape(params[path])
    ]
    if problems:
        raise StateError("Parameters and optimizer state do not belong together", problems)


def _scalar(x: Any) -> Any:
    """The array of a field, which flax.nnx wraps."""
    return jax.tree.leaves(x)[0]


def _filled(field: Any, value: Any) -> Any:
    return jax.tree.map(lambda old: _like(old, np.asarray(value)), field)


def _like(old: Any, value: Any) -> Any:
    """A value in place of an old one: a JAX array of its type and sharding, a NumPy array, or a Python number."""
    if isinstance(old, (bool, int, float, complex)):
        return type(old)(value)
    if isinstance(old, (np.ndarray, np.generic)):
        return np.array(value, old.dtype)[()] if isinstance(old, np.generic) else np.array(value, old.dtype)
    return jax.device_put(jnp.asarray(value, old.dtype), old.sharding)


def _dtypes(*slots: Any) -> dict[str, str]:
    """The names of the types of a parameter and its moments."""
    return {
        slot: (x if hasattr(x, "dtype") else np.asarray(x)).dtype.name for slot, x in zip(SLOTS, slots, strict=True)
    }


def _numpy(x: Any) -> Any:
    array = np.array(x)
    return array if array.dtype.itemsize >= 4 else array.astype(np.float32)
