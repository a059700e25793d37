"""What the last update was, for loggers; `ada2ms.core.measurements` says what the numbers are."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]

from ada2ms.core import measurements as names
from ada2ms.core.coefficients import PowerKind, bias_correction
from ada2ms.jax.dtypes import as_array, cast, is_complex, real_dtype, to_reals
from ada2ms.jax.kernels.leaf import Numbers, leaf_index
from ada2ms.jax.kernels.power import denom_power, sqrt
from ada2ms.jax.masks import decaying_leaves
from ada2ms.jax.names import by_path, names_of_leaves, without_boxes
from ada2ms.jax.options import Hyper, Options, group_of_each, hyper_at
from ada2ms.jax.reduce import sums_of_squares
from ada2ms.jax.sharding import axes_of, axis_size, check_axes, varying
from ada2ms.jax.specialize import specialized
from ada2ms.jax.state import AnyState, CompensatedAda2MSState, ScaleByAda2MSState, check_state
from ada2ms.jax.step import log_beta, of_group

_OURS = (CompensatedAda2MSState, ScaleByAda2MSState)


@overload
def measure(
    optimizer: optax.GradientTransformation,
    opt_state: optax.OptState,
    params: optax.Params | None = None,
    *,
    updates: optax.Updates | None = None,
    gradients: optax.Updates | None = None,
    match: str = "",
    prefix: str = names.PREFIX,
    wait: Literal[True],
) -> dict[str, float]: ...


@overload
def measure(
    optimizer: optax.GradientTransformation,
    opt_state: optax.OptState,
    params: optax.Params | None = None,
    *,
    updates: optax.Updates | None = None,
    gradients: optax.Updates | None = None,
    match: str = "",
    prefix: str = names.PREFIX,
    wait: Literal[False] = False,
) -> dict[str, jax.Array]: ...


def measure(
    optimizer: optax.GradientTransformation,
    opt_state: optax.OptState,
    params: optax.Params | None = None,
    *,
    updates: optax.Updates | None = None,
    gradients: optax.Updates | None = None,
    match: str = "",
    prefix: str = names.PREFIX,
    wait: bool = False,
) -> Any:
    """The last update in numbers, for any logger: `ada2ms.core.measurements` has the list.

    A pure function of its arguments, to be called within the compiled training step, so that nothing waits, or outside
    of it. Without parameters it computes a few numbers from the state. With them it makes a pass over each parameter
    and its moments: every 50th step, say, by `jax.lax.cond` or in a function of its own.

    Args:
        optimizer: the transformation whose state this is: `ada2ms`, `scale_by_ada2ms`, or what was made of it by
            `optax.chain`, `optax.MultiSteps`, `optax.masked` and the like. Of `optax.inject_hyperparams(ada2ms)(...)`
            give `ada2ms(...)` with the same arguments, of which those that are injected are read from the state.
        opt_state: after the update, with one state of Ada2MS in it; where there are several (`optax.partition`), one
            of them, with its transformation.
        params: after the update (`nnx.state(model, nnx.Param)` in flax), or a tree that has these leaves.
        updates: what was added to the parameters. By default they are computed from the state, for a `learning_rate`
            and a decay that the transformation has itself: `scale_by_ada2ms` has not, and has no `update_ratios` then,
            and steps per unit of learning rate.
        gradients: those of the step, whose norm is `gradient_norm`, which the state does not know.
        match: a regular expression that is searched in the paths of the parameters (`re.search`).
        prefix: what every key begins with.
        wait: whether to wait for the device and return Python numbers; not within `jax.jit`.

    Returns:
        Scalars, by names.

    Raises:
        TypeError, ValueError: naming the argument: no transformation or state of Ada2MS, or several, or other
            parameters than those of the state.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from ada2ms.jax import ada2ms, measure
        >>> optimizer = optax.chain(optax.clip(1.0), ada2ms(0.5))
        >>> params = {"bias": jnp.ones(3)}
        >>> updates, state = optimizer.update(params, optimizer.init(params), params)
        >>> measured = measure(optimizer, state, optax.apply_updates(params, updates), wait=True)
        >>> measured["ada2ms/lr"], [name for name in measured if name.endswith("bias")]
        (0.5, ['ada2ms/effective_steps/bias', 'ada2ms/update_ratios/bias'])
    """
    node, injected = _node(opt_state)
    options = _options(optimizer)
    options = options._replace(**{name: x for name, x in injected.items() if getattr(options, name) is not None})
    check_state(options, node, np.shape(node.steps)[0])
    found = _of_model(options, node, gradients)
    if params is not None:
        found |= _of_parameters(options, node, params, updates, match)
    found = {prefix + name: x for name, x in found.items()}
    return {name: float(x) for name, x in jax.device_get(found).items()} if wait else found


def _node(opt_state: Any) -> tuple[AnyState, dict[str, Any]]:
    """The one state of Ada2MS, and the hyperparameters that `optax.inject_hyperparams` keeps around it."""
    found = list(_nodes(opt_state, {}))
    if len(found) != 1:
        what = "the state of one transformation: opt_state.inner_states[label] of optax.partition" if found else "one"
        raise ValueError(f"Invalid opt_state: it has {len(found)} states of Ada2MS in it (must be {what})")
    node, injected = found[0]
    return without_boxes(node), {
        name: jnp.real(jax.tree.leaves(x)[0]).reshape(())
        for name, x in injected.items()
        if name in Options._fields and jax.tree.leaves(x)
    }


def _nodes(x: Any, injected: dict[str, Any]) -> Iterator[tuple[AnyState, dict[str, Any]]]:
    if isinstance(x, _OURS):
        yield x, injected
        return
    injected = {**injected, **getattr(x, "hyperparams", {})}
    for child in jax.tree.leaves(x, is_leaf=lambda child: child is not x):
        if child is not x:
            yield from _nodes(child, injected)


def _options(optimizer: Any) -> Options:
    """The arguments that a transformation was made with, which it closes over, as do those around it over it."""
    found = {id(x): x for x in _enclosed(optimizer, {})}
    if len(found) != 1:
        given = "it is not made of ada2ms or scale_by_ada2ms" if not found else f"it is made of {len(found)} of these"
        raise ValueError(
            f"Invalid optimizer: {given} (must be one, or a transformation around one, whose state it is; and for "
            "optax.inject_hyperparams, which makes them anew in every step, ada2ms(...) with the same arguments)"
        )
    return next(iter(found.values()))


def _enclosed(x: Any, seen: dict[int, Any]) -> Iterator[Options]:
    if id(x) in seen:
        return
    seen[id(x)] = x  # kept, since an id is used again
    if isinstance(x, Options):
        yield x
        return
    inner: Iterable[Any] = ()
    if isinstance(x, (tuple, list)):
        inner = x
    elif isinstance(x, Mapping):
        inner = x.values()
    elif inspect.isfunction(x):
        inner = inspect.getclosurevars(x).nonlocals.values()
    elif inspect.ismethod(x):
        inner = [x.__self__]
    elif type(x).__module__.partition(".")[0] == "optax":  # MultiSteps is a class
        inner = vars(x).values()
    for child in inner:
        yield from _enclosed(child, seen)


def _of_model(options: Options, node: AnyState, gradients: Any) -> dict[str, Any]:
    """Those numbers that need no pass over a parameter, but for the gradients' if they are given."""
    s, count, hypers = _numbers(options, node)
    own = hypers[-1]
    s_hat = _mean_s_hat(options, node, [hyper.b2 for hyper in hypers])
    # d = v_hat^(a/2) * s_hat^((1-a)/2) + eps, of an entry whose v_hat is s_hat
    d = jnp.sqrt(s_hat) + cast(own.eps, s.dtype)
    lr = own.learning_rate
    measured = count, node.skipped, lr, own.adaptivity, s_hat, (1.0 if lr is None else cast(lr, s.dtype)) / d, None
    found = {name: jnp.asarray(x, s.dtype) for name, x in zip(names.OF_MODEL, measured, strict=True) if x is not None}
    if gradients is not None:
        leaves = jax.tree.leaves(gradients)
        sums, _ = sums_of_squares(leaves, real_dtype(s, *leaves), options.axis_name)
        found[names.OF_MODEL[-1]] = sqrt(sum(sums, start=jnp.zeros([])))
    return found


def _numbers(options: Options, node: AnyState) -> tuple[jax.Array, jax.Array, list[Hyper]]:
    """(s, count, the hyperparameters of each group in the last update)."""
    s, count = as_array(node.s, jnp.float32), as_array(node.count, jnp.int32)
    return s, count, hyper_at(options, jnp.maximum(count - 1, 0), s.dtype)


def _mean_s_hat(options: Options, node: AnyState, b2s: list[Any]) -> jax.Array:
    """The mean of the global second moments that have been updated; NaN if none has."""
    s, count = as_array(node.s, jnp.float32), as_array(node.count, jnp.int32)
    if s.ndim == 0:
        return _mean(s=s[None], counts=count[None], logs=[log_beta(b2s[-1])])
    each = [b2s[i] for i in _groups(options, node.mu)]
    if s.ndim == 1:
        return _mean(s=s, counts=as_array(node.steps, jnp.int32), logs=[log_beta(b2) for b2 in each])
    of_b2 = {b2 if isinstance(b2, float) else None: i for i, b2 in enumerate(each)}  # a leaf of each
    first = np.array([*of_b2.values()])
    return _mean(
        s=s[first, 0], counts=jnp.broadcast_to(count, first.shape), logs=[log_beta(each[i]) for i in of_b2.values()]
    )


@specialized
def _mean(*, s: jax.Array, counts: jax.Array, logs: list[Any]) -> jax.Array:
    """Of s_hat, given the logarithm of the b2 of each."""
    log_b2 = jnp.stack([jnp.asarray(x, s.dtype) for x in logs])
    s_hat = s / bias_correction(log_b2, jnp.maximum(counts, 1).astype(s.dtype), jnp.expm1, lambda x: x)
    return jnp.sum(jnp.where(counts > 0, s_hat, 0)) / jnp.sum(counts > 0).astype(s.dtype)


def _groups(options: Options, tree: Any) -> tuple[int, ...]:
    """The position in `hyper_at` of the group of each leaf of a tree like the parameters."""
    return group_of_each(options.groups, names_of_leaves(tree), [np.ndim(x) for x in jax.tree.leaves(tree)])


def _of_parameters(options: Options, node: AnyState, params: Any, updates: Any, match: str) -> dict[str, Any]:
    """Those of every parameter, from sums of squares that are taken over the whole of it."""
    called = names_of_leaves(node.mu)
    like_moments, changes = (_like(node.mu, x, what) for x, what in ((params, "params"), (updates, "updates")))
    leaves, chosen = jax.tree.leaves(like_moments), set(names.matching(called, match))
    rest = by_path(node.compensation) if node.compensation is not None else {}
    every = jax.tree.leaves(like_moments, is_leaf=lambda x: x is None)
    decays = [x for x, p in zip(decaying_leaves(options.mask, like_moments), every, strict=True) if p is not None]
    s, count, hypers = _numbers(options, node)
    steps, groups = as_array(node.steps, jnp.int32), _groups(options, like_moments)
    of = {i: of_group(hypers[i], count, s, steps) for i in sorted(set(groups))}
    slots = [jax.tree.leaves(x) for x in (node.mu, node.nu)]
    picked = [i for i, name in enumerate(called) if name in chosen]
    if not picked:  # a tree without leaves
        return {}
    rows = [
        _sums(
            index=leaf_index(i),
            param=leaves[i],
            compensation=rest.get(called[i]),
            update=None if changes is None else jax.tree.leaves(changes)[i],
            mu=slots[0][i],
            nu=slots[1][i],
            decays=decays[i],
            **of[groups[i]]._asdict(),
        )
        for i in picked
    ]
    sums = _over_axes(jnp.stack(rows), [leaves[i] for i in picked], options.axis_name)
    step, update, theta, moment = jnp.sqrt(sums).T
    ratios = update / theta if updates is not None else jnp.where(steps[np.array(picked)] > 0, update / theta, jnp.nan)
    found = names.of_parameters([called[i] for i in picked], list(step / moment), list(ratios))
    known = updates is not None or options.learning_rate is not None
    return {name: x for name, x in found.items() if known or not name.startswith(names.RATIOS)}


def _like(moments: Any, tree: Any, what: str) -> Any:
    """Those leaves of a tree that have moments, in the structure of these; None if there is no tree."""
    if tree is None:
        return None
    called, known = names_of_leaves(moments), by_path(tree)
    if missing := [name for name in called if name not in known]:
        raise ValueError(f"Invalid {what}: without {missing[:8]} (must have every leaf that the state has moments of)")
    structure: Any = jax.tree.structure(moments)
    return structure.unflatten([known[name] for name in called])


@specialized
def _sums(
    *,
    index: Any,
    param: jax.Array,
    compensation: Any,
    update: Any,
    mu: jax.Array,
    nu: jax.Array,
    step_size: jax.Array,
    denom_scale: jax.Array,
    numbers: Numbers,
    decays: bool,
    kind: PowerKind,
    denom_can_be_zero: bool,
) -> jax.Array:
    """The sums of squares of lr*m_hat/d, the update, theta and m_hat; arguments are those of `update_leaf`."""
    j, pairs = index[0], is_complex(param)
    wide = real_dtype(mu, nu)
    m, v, theta = (to_reals(x, pairs).astype(wide) for x in (mu, nu, param))
    if compensation is not None:
        theta = theta + compensation.astype(wide)
    eps, lr, weight_decay = (cast(x, wide) for x in (numbers.eps, numbers.lr, numbers.weight_decay))
    m_hat = m * step_size[j].astype(wide)
    # d = v_hat^(a/2) * s_hat^((1-a)/2) + eps
    d = denom_power(v, numbers.exponent, kind) * denom_scale[j].astype(wide) + eps
    if denom_can_be_zero:
        d = jnp.where(d == 0, jnp.inf, d)
    step = m_hat / d if lr is None else lr * m_hat / d
    if update is not None:
        change = to_reals(update, pairs)
    elif decays and lr is not None:
        change = (step + lr * weight_decay * theta) / (1 - lr * weight_decay)
    else:
        change = step
    return jnp.stack([jnp.sum(jnp.square(x.astype(wide))) for x in (step, change, theta, m_hat)])


def _over_axes(sums: jax.Array, params: list[Any], axis_name: Any) -> jax.Array:
    """The sums over all devices where `jax.shard_map` divides the parameters: one sum over devices, for all."""
    axes = axes_of(axis_name)
    if not axes:
        return sums
    check_axes(axis_name)
    size = axis_size(axes)
    copies = [size / axis_size(tuple(axis for axis in axes if axis in varying(p))) for p in params]
    total: jax.Array = jax.lax.psum(sums / jnp.stack([jnp.asarray(x, sums.dtype) for x in copies])[:, None], axes)  # type: ignore[no-untyped-call]
    return total
