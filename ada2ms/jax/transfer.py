"""The optimizer's state to and from other frameworks; `ada2ms.core.state` says what it consists of."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]

from ada2ms.core.groups import Group as NamedGroup
from ada2ms.core.groups import assign, check_groups
from ada2ms.core.hyperparameters import DEFAULTS, from_arguments
from ada2ms.core.state import (
    Axes,
    Entry,
    Extra,
    Extras,
    Fitted,
    Group,
    Names,
    Receipt,
    Report,
    State,
    StateError,
    Target,
    Transfer,
    check_verify,
    from_portable,
    in_state,
    only_count,
    plain_hyperparameters,
    portable_extras,
    to_portable,
    without_moments,
)
from ada2ms.core.state import arguments as portable_arguments
from ada2ms.jax.dtypes import numpy
from ada2ms.jax.names import by_path, flatten
from ada2ms.jax.receipt import Gradients, verification
from ada2ms.jax.state import CompensatedAda2MSState, ScaleByAda2MSState
from ada2ms.jax.wrappers import left_behind, rewritten, the_node


def export_state(
    params: optax.Params,
    opt_state: optax.OptState,
    *,
    names: Names = None,
    axes: Axes = None,
    extras: Extras = None,
    options: Mapping[str, Any] | None = None,
    values: bool = True,
    receipt: Receipt | None = None,
) -> State:
    """The state of an optimizer, to go on from in any framework.

    Args:
        params: the parameters, a tree. A leaf's name here is its path in it, `"dense/kernel"`.
        opt_state: a state of Optax with one state of `ada2ms`, `optax.adamw` or `optax.adam` in it.
        names: what the state is to call a parameter, for each path here, as a mapping or a function; those left out
            keep their paths. One that is cut, as a packed projection, has several names.
        axes: for a path here, how an array of the state is to be transposed to have this layout, or a function that
            cuts an array here; as in `import_state`.
        extras: what the state is to call a leaf that the optimizer has no moments of, for each path here: running
            statistics, which `plain_layers` gives (for flax, `params` is then `nnx.state(model, (nnx.Param,
            nnx.BatchStat))`), or values of frozen parameters. They are in `State.extras`, where you may put others.
        options: arguments that the optimizer was made with, `groups` among them, to be recorded as hyperparameters:
            nothing else in Optax knows them. What is left out is not recorded, unless a group has it of its own.
        values: whether the parameters' values are to travel too, and extras.
        receipt: the steps since an earlier state, for `verify` of `import_state`.

    Returns:
        A state with copies of everything that the optimizer has moments of. Its `notes` name what is not in it.

    Raises:
        StateError: listing everything that cannot be exported.
    """
    node = the_node(opt_state)
    leaves, mu, nu = by_path(params), by_path(node.mu), by_path(node.nu)
    _require_leaves(leaves, mu)
    ours = isinstance(node, (CompensatedAda2MSState, ScaleByAda2MSState))
    count = int(_scalar(node.count))
    steps = [int(t) for t in np.asarray(_scalar(node.steps))] if ours else [count] * len(mu)
    s = np.asarray(_scalar(node.s), np.float64) if ours else None
    rest = by_path(node.compensation) if ours else {}
    entries = {
        path: Entry(
            exp_avg=numpy(mu[path]),
            exp_avg_sq=numpy(nu[path]),
            step=steps[i],
            global_exp_avg_sq=float(s[i]) if s is not None and s.ndim == 1 else None,
            param=numpy(leaves[path]) if values else None,
            compensation=numpy(rest[path]) if path in rest else None,
        )
        for i, path in enumerate(mu)
    }
    groups = _groups_of(options or {}, {path: np.ndim(leaves[path]) for path in mu}, s, count if ours else 0)
    entries, renamed = to_portable(entries, names, axes, leaves)
    for group in groups:
        group.params = in_state(renamed, group.params)
    options = from_arguments(options or {}, "optax")
    notes = [f"Not exported: {kept}" for kept in left_behind(opt_state)]
    found, left = _extras_of(leaves, mu, extras, axes) if values else ({}, [])
    notes += left
    source = f"jax {jax.__version__}, optax {optax.__version__}: {type(node).__name__}"
    own = None if receipt is None else receipt.copy()
    if s is None:
        return State(entries, groups, source=source, notes=notes, extras=found, receipt=own)
    max_norm = options.get("max_norm")
    return State(
        entries,
        groups,
        scope="tensor" if s.ndim == 1 else "model",
        nonfinite=options.get("nonfinite", "propagate"),
        skipped=int(_scalar(node.skipped)),
        source=source,
        notes=notes,
        max_norm=None if max_norm is None else float(max_norm),
        compensated=isinstance(node, CompensatedAda2MSState),
        extras=found,
        receipt=own,
    )


def import_state(
    params: optax.Params,
    opt_state: optax.OptState,
    state: State,
    *,
    names: Names = None,
    axes: Axes = None,
    extras: Extras = None,
    values: bool = True,
    cast: bool = False,
    verify: int = 0,
    optimizer: optax.GradientTransformation | None = None,
    gradients: Gradients = None,
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
            outputs) that is a weight of (outputs, inputs) in the state. Or a function
            that cuts an array here into those of the state that `names` has for it, by indexing, transposing and
            reshaping alone: `lambda w: [x.T for x in np.split(w, 3)]`. The way back follows from it.
        extras: what the state calls a leaf that the optimizer has no moments of, for each path here.
        values: whether the parameters' values come from the state too, and extras.
        cast: whether values may be rounded to the types here.
        verify: how many recorded steps there must be in the state's receipt. All that are there are made once more, and
            `Report.verification` says whether the result is the state: whatever it says, the state is what comes back.
            A recorded learning rate goes where `optax.inject_hyperparams` has it. 0: nothing is verified.
        optimizer: with `verify`, what `opt_state` is of, and will be updated by.
        gradients: with `verify`, `gradients(params, step)` gives the gradients of a recorded step, as a tree: if they
            are those recorded, all arrays are where the model reads them. `step.batch` tells which batch that was.

    Returns:
        New parameters and optimizer state, of the types and shardings of those given; and what went where, to be
        printed.

    Raises:
        StateError: listing everything that is missing, superfluous, or of a wrong shape or type.
    """
    check_verify(verify)
    node = the_node(opt_state)
    leaves, mu = by_path(params), by_path(node.mu)
    _require_leaves(leaves, mu)
    ours = isinstance(node, (CompensatedAda2MSState, ScaleByAda2MSState))
    rows = np.ndim(_scalar(node.s)) if ours else 0  # 1: one s for each leaf; 2: one for each b2, in the rows of leaves
    beside = _arrays_beside(leaves, mu)
    targets = _targets(leaves, node, groups=rows == 2)
    fitted = from_portable(
        state,
        targets,
        names=names,
        axes=axes,
        scope=("tensor" if rows == 1 else "model") if ours else None,
        values=values,
        cast=cast,
        groups=len(mu) if rows == 2 else 1,
        others=leaves,
        extras=extras,
        beside={path: Extra(tuple(np.shape(x)), x.dtype.name) for path, x in beside.items()},
    )
    k = _count(fitted, ours)
    transfer = Transfer(import_state, export_state, names, axes, cast)
    fitted.report.verification = verification(params, opt_state, state, verify, targets, transfer, optimizer, gradients)

    def moved(node: Any) -> Any:
        slots = {"mu": "exp_avg", "nu": "exp_avg_sq"}
        if isinstance(node, CompensatedAda2MSState):
            slots["compensation"] = "compensation"
        node = node._replace(
            count=_filled(node.count, k),
            **{field: _replaced(getattr(node, field), slot, fitted) for field, slot in slots.items()},
        )
        return _with_numbers(node, fitted, list(mu), own_s=rows == 1) if ours else node

    # The transformations around ours were called in skipped steps, too.
    opt_state, kept = rewritten(opt_state, moved, lambda count: _filled(count, k + fitted.skipped))
    fitted.report.notes += [f"Not imported, and as it was in opt_state: {name}" for name in kept]
    left = [path for path in beside if values and path not in fitted.extras]
    fitted.report.notes += without_moments(left, imported=True)
    return _replaced(params, "param", fitted), opt_state, fitted.report


def arguments(state: State, names: Names = None) -> dict[str, Any]:
    """The arguments for `ada2ms` that continue a state: those of its hyperparameters that it knows, and its groups.

    Args:
        state: of `export_state`, in this framework or another, or of a file.
        names: what the state calls a parameter, for each path here, as a mapping, as for `import_state`. It matters
            where the state has groups that differ: they are made for paths here.

    Raises:
        StateError: the state has groups that differ, and `names` is a function.
    """
    return portable_arguments(state, "optax", names)


def _replaced(tree: Any, slot: str, fitted: Fitted) -> Any:
    """A tree with a slot of the entries; what is in no optimizer stays, unless it is an extra."""
    paths, structure = flatten(tree)
    new = []
    for path, leaf in paths:
        entry = fitted.entries.get(path)
        value = None if entry is None else getattr(entry, slot)
        if slot == "param" and path in fitted.extras:
            value = fitted.extras[path]
        new.append(leaf if value is None else _filled(leaf, value))
    return structure.unflatten(new)


def _with_numbers(node: Any, fitted: Fitted, paths: list[str], *, own_s: bool) -> Any:
    """Our state with the global second moments and the counts of leaves; with `own_s` each leaf has an s."""
    each = [fitted.entries[path].global_exp_avg_sq for path in paths] if own_s else [s for s, _ in fitted.groups]
    return node._replace(
        s=_filled(node.s, np.array([s or 0.0 for s in each]).reshape(np.shape(_scalar(node.s)))),
        steps=_filled(node.steps, [fitted.entries[path].step for path in paths]),
        skipped=_filled(node.skipped, fitted.skipped),
    )


def _groups_of(options: Mapping[str, Any], ndims: Mapping[str, int], s: Any, count: int) -> list[Group]:
    """The groups of a state: those that the options have, each with its own s and with its leaves.

    Args:
        options: of `ada2ms`.
        ndims: the number of dimensions of each leaf, by its path.
        s: of the optimizer's state; None for another optimizer's, which has none.
        count: completed updates; 0 for another optimizer's.
    """
    given = check_groups(options.get("groups"))
    # What a group has of its own, the optimizer has too: its default, if the options leave it out.
    defaults = {name: getattr(DEFAULTS, name) for group in given for name in group.hyper()}
    own = plain_hyperparameters({**defaults, **from_arguments(options, "optax")})
    rows = np.zeros(len(ndims)) if s is None else np.broadcast_to(s.ravel(), len(ndims))
    keys: list[Any] = list(assign(given, list(ndims), list(ndims.values())))
    if s is not None and s.ndim == 2 and not given:  # leaves of one b2 have the same s
        keys = list(rows)
    groups: dict[Any, Group] = {}
    for path, key, row in zip(ndims, keys, rows, strict=True):
        group = groups.get(key)
        if group is None:
            group = groups[key] = Group([], _hyper_of(given[key], own) if given and key is not None else dict(own))
            group.global_exp_avg_sq = None if s is None or s.ndim == 1 else float(row)
            group.global_step = count
        group.params.append(path)
    return list(groups.values())


def _hyper_of(group: NamedGroup, own: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters of a group, without an adaptivity that is no plain data."""
    hyper = {name: value for name, value in own.items() if name not in group.hyper()}
    hyper |= plain_hyperparameters(group.hyper())
    if group.lr_scale == 1:
        return hyper
    rate = {"lr": own["lr"] * group.lr_scale} if "lr" in own else {}
    return {**hyper, **rate, "lr_scale": group.lr_scale}


def _targets(leaves: Mapping[str, Any], node: Any, groups: bool) -> dict[str, Target]:
    """What a state's entries are to fit, by their paths; with `groups` each leaf has an s of its own."""
    mu, nu, rest = by_path(node.mu), by_path(node.nu), by_path(getattr(node, "compensation", None))
    return {
        path: Target(
            tuple(np.shape(mu[path])),
            _dtypes(param=leaves[path], exp_avg=mu[path], exp_avg_sq=nu[path], compensation=rest.get(path)),
            group=i if groups else 0,
        )
        for i, path in enumerate(mu)
    }


def _count(fitted: Fitted, ours: bool) -> int:
    """The count of completed updates, of which there is one here.

    Raises:
        StateError: groups of the state have counts that differ.
    """
    if not ours:
        return only_count(fitted.entries.values(), "Adam")
    counts = {k for _, k in fitted.groups} or {0}
    if len(counts) > 1:
        reason = f"the optimizer has one count of updates here; the state's groups have {sorted(counts)}"
        raise StateError("The state does not fit", [reason])
    return counts.pop()


def _extras_of(
    leaves: dict[str, Any], mu: dict[str, Any], extras: Extras, axes: Axes
) -> tuple[dict[str, Any], list[str]]:
    """The extras of a state, and notes of what is none."""
    wanted, beside = extras or {}, _arrays_beside(leaves, mu)
    notes = without_moments([path for path in beside if path not in wanted], imported=False)
    notes += [f"the extra {path!r} is not in this state: no leaf is called so" for path in wanted if path not in leaves]
    return portable_extras({path: numpy(x) for path, x in beside.items() if path in wanted}, extras, axes), notes


def _arrays_beside(params: dict[str, Any], mu: dict[str, Any]) -> dict[str, Any]:
    """The arrays that the optimizer has no moments of: those of another part of `optax.partition`, say, by name."""
    arrays = {path: x for path, x in params.items() if isinstance(x, (jax.Array, np.ndarray))}
    return {path: x for path, x in arrays.items() if path not in mu}


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
    new = jnp.asarray(value, old.dtype)
    # An array that is bound to no device stays so: bound ones compile anew, and may not meet those of another device.
    return jax.device_put(new, old.sharding) if old.committed else new


def _dtypes(**slots: Any) -> dict[str, str]:
    """The names of the types of a parameter and what is kept of it, without what is None."""
    arrays = {slot: x if hasattr(x, "dtype") else np.asarray(x) for slot, x in slots.items() if x is not None}
    return {slot: array.dtype.name for slot, array in arrays.items()}
