"""The path of a step, downwards: prepare -> reduce -> gate -> coefficients -> kernel.

The rule's equations are in `ada2ms.core.spec`, its symbols' names in the table there.
"""

import math
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]

from ada2ms.core.coefficients import PowerKind, bias_correction, coefficients, denom_can_be_zero, power_kind
from ada2ms.core.hyperparameters import Nonfinite, Scope, as_float, value_at
from ada2ms.jax.dtypes import as_array, cast, compute_dtype, real_dtype, update_dtype, zeros_like
from ada2ms.jax.kernels.leaf import Numbers, leaf_index, select, update_leaf
from ada2ms.jax.kernels.power import scale_power, sqrt
from ada2ms.jax.masks import decaying_leaves
from ada2ms.jax.reduce import mean, sums_of_squares
from ada2ms.jax.specialize import specialized

_SMALLEST: Final = float(jnp.finfo(jnp.float32).tiny)  # type: ignore[no-untyped-call]


class ScaleByAda2MSState(NamedTuple):
    """State of `scale_by_ada2ms` and of `ada2ms`.

    Its fields are in alphabetical order, as those of Optax' Adam: tools that keep a state as a dictionary give them
    back in that order.

    Attributes:
        count: completed updates, k in the rule; int32 scalar.
        mu: first moments, m; a tree like the parameters.
        nu: elementwise second moments, v; a tree like the parameters. In a complex leaf the real part is the second
            moment of the gradient's real part, and the imaginary part that of its imaginary part.
        s: global second moment; a scalar in scope "model", one entry for each leaf in scope "tensor".
        skipped: steps that `nonfinite="skip"` has skipped; int32 scalar.
        steps: completed updates of each leaf, t in the rule; int32, one entry for each leaf.
    """

    count: jax.Array  # type: ignore[assignment]  # a tuple has a method of this name
    mu: optax.Params
    nu: optax.Params
    s: jax.Array
    skipped: jax.Array
    steps: jax.Array


class Options(NamedTuple):
    """The arguments of `ada2ms` and `scale_by_ada2ms`.

    A tree, so that JAX and Equinox find arrays among them. `learning_rate` is None for `scale_by_ada2ms`.
    """

    b1: Any
    b2: Any
    eps: Any
    adaptivity: Any
    mu_dtype: Any
    nu_dtype: Any
    scope: Scope
    nonfinite: Nonfinite
    axis_name: Any
    learning_rate: Any = None
    weight_decay: Any = 0.0
    mask: Any = None


def init(options: Options, params: optax.Params) -> ScaleByAda2MSState:
    """Zeros, of the parameters' shapes, types and shardings; reads no values."""
    leaves = jax.tree.leaves(params)
    for path, p in jax.tree.leaves_with_path(params):
        if hasattr(p, "dtype") and jnp.issubdtype(p.dtype, jax.dtypes.prng_key):
            raise TypeError(f"Invalid params: {jax.tree_util.keystr(path)} is a PRNG key (must be None in init)")
    return ScaleByAda2MSState(
        count=jnp.zeros([], jnp.int32),
        mu=jax.tree.map(lambda p: zeros_like(p, options.mu_dtype), params),
        nu=jax.tree.map(lambda p: zeros_like(p, options.nu_dtype), params),
        s=jnp.zeros([] if options.scope == "model" else [len(leaves)], real_dtype(*leaves)),
        skipped=jnp.zeros([], jnp.int32),
        steps=jnp.zeros([len(leaves)], jnp.int32),
    )


def update(
    options: Options, updates: optax.Updates, state: ScaleByAda2MSState, params: optax.Params | None
) -> tuple[optax.Updates, ScaleByAda2MSState]:
    """One step: updates in the gradients' types (that of parameters and gradients together), and the state after it."""
    leaves = _prepare(options, updates, state, params)
    if all(g is None for g in leaves.gradients):
        return updates, state
    s = as_array(state.s, real_dtype(*(x for x in (*leaves.gradients, *leaves.mu) if hasattr(x, "dtype"))))
    count, skipped, steps = (as_array(x, jnp.int32) for x in (state.count, state.skipped, state.steps))
    options = _options_at(options, count, s.dtype)

    sums, numel = sums_of_squares(leaves.gradients, s.dtype, options.axis_name)
    total, step_is_live = _gate(sums=sums, dtype=s.dtype, nonfinite=options.nonfinite)
    count, s, skipped, steps = _advance(
        total=total,
        sums=sums if options.scope == "tensor" else None,
        numel=tuple(numel) if all(isinstance(n, float) for n in numel) else numel,
        has_gradient=tuple(g is not None for g in leaves.gradients),
        numbers=[options.b2, 1 - options.b2],
        state=[count, s, skipped, steps],
        step_is_live=step_is_live,
    )
    a = options.adaptivity
    known = isinstance(a, float) and power_kind(a / 2) is not PowerKind.POWER
    step_size, denom_scale = _coefficients(
        logs=[_log(options.b1), _log(options.b2)],
        a=a if known else [a, (1 - a) / 2 if isinstance(a, float) else None],
        count=count,
        s=s,
        steps=steps,
    )

    new_updates, mu, nu = _update_leaves(options, leaves, step_size, denom_scale, step_is_live)
    return leaves.whole(new_updates), ScaleByAda2MSState(
        count=count, mu=leaves.whole(mu), nu=leaves.whole(nu), s=s, skipped=skipped, steps=steps
    )


# prepare


class _Leaves(NamedTuple):
    """What a step is given, leaf by leaf, without those leaves of the parameters that have no moments."""

    tree: Any  # the structure of the parameters, None counted as a leaf
    positions: list[int]  # of those with moments
    gradients: list[Any]  # None where there is none
    mu: list[Any]
    nu: list[Any]
    params: list[Any]  # None where there is none, or none is given
    decays: list[bool]

    def whole(self, leaves: list[Any]) -> Any:
        """A tree of leaves that is like the parameters; None elsewhere."""
        every = [None] * self.tree.num_leaves
        for i, leaf in zip(self.positions, leaves, strict=True):
            every[i] = leaf
        return self.tree.unflatten(every)


def _prepare(
    options: Options, updates: optax.Updates, state: ScaleByAda2MSState, params: optax.Params | None
) -> _Leaves:
    """Leaves that have no moments are left alone, whatever they are: models of Equinox have functions among them."""
    tree: Any = jax.tree.structure(state.mu, is_leaf=lambda x: x is None)
    every = tree.flatten_up_to(state.mu)
    positions = [i for i, m in enumerate(every) if m is not None]

    def of(x: Any) -> list[Any]:
        leaves = tree.flatten_up_to(x)
        return [leaves[i] for i in positions]

    gradients = tree.flatten_up_to(updates)
    if any(g is not None and m is None for g, m in zip(gradients, every, strict=True)):
        raise ValueError("Invalid updates: a gradient for a leaf that was None in init (must be None for it)")
    leaves = _Leaves(
        tree=tree,
        positions=positions,
        gradients=[None if gradients[i] is None else as_array(gradients[i], None) for i in positions],
        mu=of(state.mu),
        nu=of(state.nu),
        params=[None] * len(positions) if params is None else of(params),
        decays=[False] * len(positions),
    )
    _check_shapes(options.scope, state, leaves)
    if not isinstance(options.weight_decay, float) or options.weight_decay:
        if params is None:
            raise ValueError("Invalid params: None (update must be given the parameters, which weight decay is of)")
        decaying = decaying_leaves(options.mask, leaves.whole(leaves.params))
        leaves = leaves._replace(decays=[decaying[i] for i in positions])
    for i, g in enumerate(leaves.gradients):
        if g is not None:  # scalars of a state that was saved as text are Python numbers
            leaves.mu[i] = as_array(leaves.mu[i], compute_dtype(g) if options.mu_dtype is None else options.mu_dtype)
            leaves.nu[i] = as_array(leaves.nu[i], compute_dtype(g) if options.nu_dtype is None else options.nu_dtype)
            leaves.params[i] = None if leaves.params[i] is None else as_array(leaves.params[i], None)
    return leaves


def _check_shapes(scope: Scope, state: ScaleByAda2MSState, leaves: _Leaves) -> None:
    """Raises if an array of the state has another shape than `init` gives it: it would be broadcast silently."""
    leaf_count = (len(leaves.mu),)
    s = leaf_count if scope == "tensor" else ()
    if np.shape(state.s) != s:
        found = np.shape(state.s)
        raise ValueError(f"Invalid state: s of shape {found}, not {s} (must be made with scope={scope!r})")
    for field, shape in (("count", ()), ("skipped", ()), ("steps", leaf_count)):
        if (found := np.shape(getattr(state, field))) != shape:
            raise ValueError(f"Invalid state: {field} of shape {found} (must be {shape}, as init makes it)")
    paths, _ = jax.tree_util.tree_flatten_with_path(state.mu)
    for (path, _), g, mu, nu in zip(paths, leaves.gradients, leaves.mu, leaves.nu, strict=True):
        if g is None:
            continue
        allowed = (g.shape, (2, *g.shape)) if jnp.iscomplexobj(g) else (g.shape,)
        for field, moment in (("mu", mu), ("nu", nu)):
            if np.shape(moment) not in allowed:
                name, shape = f"{field}{jax.tree_util.keystr(path)}", np.shape(moment)
                raise ValueError(f"Invalid state: {name} of shape {shape} (must be {g.shape}, its gradient's)")


def _options_at(options: Options, count: jax.Array, dtype: Any) -> Options:
    """The options of this step: schedules take the count of completed updates."""
    # From a 32-bit count, a schedule computes in float32.
    completed = count.astype(jnp.int64) if dtype == jnp.float64 else count

    def at(scheduled: Any) -> Any:
        value = _as_number(value_at(scheduled, completed))
        if callable(scheduled) and isinstance(value, float) and not isinstance(count, jax.core.Tracer):
            return jnp.asarray(value, dtype)  # a Python number would be a constant, and each step compiled anew
        return value

    lr = options.learning_rate
    return options._replace(
        b1=cast(options.b1, dtype),
        b2=cast(options.b2, dtype),
        adaptivity=at(options.adaptivity),
        learning_rate=None if lr is None else at(lr),
        weight_decay=at(options.weight_decay),
    )


def _as_number(value: Any) -> Any:
    """A hyperparameter as a Python float, in double precision, unless JAX computes it."""
    return value if isinstance(value, jax.Array) else as_float(value)


# gate, coefficients


@specialized
def _gate(*, sums: list[jax.Array], dtype: Any, nonfinite: Nonfinite) -> tuple[jax.Array, jax.Array | None]:
    """The sum of all squared gradients, and whether the step counts: None if every step does."""
    total = sum(sums, start=jnp.zeros([], dtype))
    # The square root is finite where the sum is, and keeps XLA from recomputing the sum for every leaf.
    return total, None if nonfinite == "propagate" else jnp.isfinite(sqrt(total))


@specialized
def _advance(
    *,
    total: jax.Array,
    sums: list[jax.Array] | None,
    numel: Any,
    has_gradient: tuple[bool, ...],
    numbers: list[Any],
    state: list[Any],
    step_is_live: Any,
) -> tuple[jax.Array, ...]:
    """(count, s, skipped, steps) after the step. `sums` is for scope "tensor", None in scope "model"."""
    count, s, skipped, steps = state
    b2, one_minus_b2 = (cast(x, s.dtype) for x in numbers)
    if sums is None:
        new_s = b2 * s + one_minus_b2 * mean(total, sum(numel))
    else:
        means = jnp.stack([mean(x, n) for x, n in zip(sums, numel, strict=True)])
        new_s = jnp.where(np.array(has_gradient), b2 * s + one_minus_b2 * means, s)
    new_steps = jnp.where(np.array(has_gradient), optax.safe_increment(steps), steps)
    return (
        select(step_is_live, optax.safe_increment(count), count),
        select(step_is_live, new_s, s),
        skipped if step_is_live is None else jnp.where(step_is_live, skipped, optax.safe_increment(skipped)),
        select(step_is_live, new_steps, steps),
    )


@specialized
def _coefficients(
    *, logs: list[Any], a: Any, count: jax.Array, s: jax.Array, steps: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(step_size, denom_scale) of each leaf, per unit of learning rate.

    Args:
        logs: log(b1), log(b2).
        a: an adaptivity for which roots take the place of powers, 0, 1/2 or 1; or [a, (1-a)/2] of any other, the second
            being None if the host does not know it.
        count: completed updates.
        s: global second moment.
        steps: completed updates of each leaf.
    """
    a, global_exponent = (cast(x, s.dtype) for x in a) if isinstance(a, list) else (a, None)
    log_b1, log_b2 = (cast(x, s.dtype) for x in logs)
    # A leaf that has had no gradient yet would divide by a bias correction of 0.
    t, k = (jnp.maximum(x, 1).astype(s.dtype) for x in (steps, steps if s.ndim else count))
    functions: dict[str, Any] = {"expm1": jnp.expm1, "log": lambda log_beta: log_beta}  # taken already
    s_hat = s / bias_correction(log_b2, k, **functions)
    found = coefficients(
        1.0, log_b1, log_b2, None, a, t, s_hat, power=scale_power, global_exponent=global_exponent, **functions
    )
    return found.step_size, jnp.broadcast_to(found.denom_scale, t.shape)


def _log(beta: Any) -> Any:
    """In double precision if the host knows beta, whose own digits float32 does not hold: it is near 1."""
    if isinstance(beta, float):
        return math.log(beta) if beta else -math.inf
    return _log_of_array(beta=beta)


@specialized
def _log_of_array(*, beta: jax.Array) -> jax.Array:
    return jnp.log1p(beta - 1)  # the difference is exact


# kernel


def _update_leaves(
    options: Options, leaves: _Leaves, step_size: jax.Array, denom_scale: jax.Array, step_is_live: jax.Array | None
) -> tuple[list[Any], list[Any], list[Any]]:
    """(updates, m, v) of all leaves; those without a gradient keep their moments and have None for an update."""
    numbers = Numbers(
        b1=options.b1,
        one_minus_b1=1 - options.b1,
        b2=options.b2,
        one_minus_b2=1 - options.b2,
        eps=options.eps,
        exponent=options.adaptivity / 2,
        lr=options.learning_rate,
        weight_decay=options.weight_decay,
    )
    mu, nu, new_updates = leaves.mu.copy(), leaves.nu.copy(), leaves.gradients.copy()
    for i, g in enumerate(leaves.gradients):
        if g is None:
            continue
        new_updates[i], mu[i], nu[i] = update_leaf(
            index=leaf_index(i),
            param=leaves.params[i] if leaves.decays[i] else None,
            gradient=g,
            mu=mu[i],
            nu=nu[i],
            step_size=step_size,
            denom_scale=denom_scale,
            step_is_live=step_is_live,
            numbers=numbers,
            kind=power_kind(numbers.exponent),
            denom_can_be_zero=denom_can_be_zero(options.eps, _SMALLEST),
            dtype=update_dtype(*(x for x in (g, leaves.params[i]) if x is not None)),
        )
    return new_updates, mu, nu
