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
from ada2ms.core.hyperparameters import Nonfinite
from ada2ms.jax.dtypes import as_array, cast, real_dtype, update_dtype
from ada2ms.jax.kernels.leaf import Numbers, leaf_index, select, update_leaf
from ada2ms.jax.kernels.power import scale_power, sqrt
from ada2ms.jax.leaves import Leaves, prepare
from ada2ms.jax.options import Hyper, Options, has_one_b2, hyper_at
from ada2ms.jax.reduce import mean, sums_of_squares
from ada2ms.jax.specialize import specialized
from ada2ms.jax.state import AnyState

_SMALLEST: Final = float(jnp.finfo(jnp.float32).tiny)  # type: ignore[no-untyped-call]


def update(
    options: Options, updates: optax.Updates, state: AnyState, params: optax.Params | None
) -> tuple[optax.Updates, AnyState]:
    """One step: updates in the gradients' types (that of parameters and gradients together), and the state after it."""
    leaves = prepare(options, updates, state, params)
    if all(g is None for g in leaves.gradients):
        return updates, state
    s = as_array(state.s, real_dtype(*(x for x in (*leaves.gradients, *leaves.mu) if hasattr(x, "dtype"))))
    count, skipped, steps = (as_array(x, jnp.int32) for x in (state.count, state.skipped, state.steps))
    hypers = hyper_at(options, count, s.dtype)

    sums, numel = sums_of_squares(leaves.gradients, s.dtype, options.axis_name)
    total, step_is_live = _gate(sums=sums, dtype=s.dtype, nonfinite=options.nonfinite)
    clip = None if options.max_norm is None else _clip(total=total, max_norm=[options.max_norm])
    b2 = hypers[-1].b2 if has_one_b2(options) else [hypers[i].b2 for i in leaves.groups]
    count, s, skipped, steps = _advance(
        total=total,
        sums=sums if options.scope == "tensor" else None,
        numel=tuple(numel) if all(isinstance(n, float) for n in numel) else numel,
        clip=clip,
        has_gradient=tuple(g is not None for g in leaves.gradients),
        numbers=[b2, [1 - x for x in b2] if isinstance(b2, list) else 1 - b2],
        state=[count, s, skipped, steps],
        step_is_live=step_is_live,
    )
    groups = {i: of_group(hypers[i], count, s, steps) for i in sorted(set(leaves.groups))}
    new_updates, slots = _update_leaves(leaves, groups, clip, step_is_live)
    state = state._replace(count=count, s=s, skipped=skipped, steps=steps, **slots)
    return new_updates, state


# gate


@specialized
def _gate(*, sums: list[jax.Array], dtype: Any, nonfinite: Nonfinite) -> tuple[jax.Array, jax.Array | None]:
    """The sum of all squared gradients, and whether the step counts: None if every step does."""
    total = sum(sums, start=jnp.zeros([], dtype))
    # The square root is finite where the sum is, and keeps XLA from recomputing the sum for every leaf.
    return total, None if nonfinite == "propagate" else jnp.isfinite(sqrt(total))


@specialized
def _clip(*, total: jax.Array, max_norm: list[Any]) -> jax.Array:
    """The factor of gradients whose sum of squares this is: 1 up to `max_norm`, of 0, and if there is no bound."""
    limit, norm = cast(max_norm[0], total.dtype), sqrt(total)
    is_long = ~(norm < limit) & (limit < jnp.inf)  # a NaN, too, which then is the factor
    return jnp.where(is_long, limit / jnp.where(is_long, norm, 1), 1).astype(total.dtype)


@specialized
def _advance(
    *,
    total: jax.Array,
    sums: list[jax.Array] | None,
    numel: Any,
    clip: jax.Array | None,
    has_gradient: tuple[bool, ...],
    numbers: list[Any],
    state: list[Any],
    step_is_live: Any,
) -> tuple[jax.Array, ...]:
    """(count, s, skipped, steps) after the step.

    Args:
        total: the sum of all squared gradients.
        sums: of each leaf, for scope "tensor"; None in scope "model".
        numel: the number of reals in each leaf.
        clip: the factor of the gradients that moments are of; None for 1.
        has_gradient: whether each leaf has one.
        numbers: b2 and 1 - b2; or a list of each, with one for each leaf.
        state: (count, s, skipped, steps) before.
        step_is_live: whether the step counts; None if every step does.
    """
    count, s, skipped, steps = state
    b2, one_minus_b2 = (
        jnp.stack([jnp.asarray(y, s.dtype) for y in x]).reshape(s.shape) if isinstance(x, list) else cast(x, s.dtype)
        for x in numbers
    )

    def clipped(x: jax.Array) -> jax.Array:
        return x if clip is None else clip * x * clip

    if sums is None:
        new_s = b2 * s + one_minus_b2 * mean(clipped(total), sum(numel))
    else:
        means = jnp.stack([mean(clipped(x), n) for x, n in zip(sums, numel, strict=True)])
        new_s = jnp.where(np.array(has_gradient), b2 * s + one_minus_b2 * means, s)
    new_steps = jnp.where(np.array(has_gradient), optax.safe_increment(steps), steps)
    return (
        select(step_is_live, optax.safe_increment(count), count),
        select(step_is_live, new_s, s),
        skipped if step_is_live is None else jnp.where(step_is_live, skipped, optax.safe_increment(skipped)),
        select(step_is_live, new_steps, steps),
    )


# coefficients


class OfGroup(NamedTuple):
    """What the kernel is given for every leaf of a group."""

    step_size: jax.Array
    denom_scale: jax.Array
    numbers: Numbers
    kind: PowerKind
    denom_can_be_zero: bool


def of_group(hyper: Hyper, count: jax.Array, s: jax.Array, steps: jax.Array) -> OfGroup:
    """What the kernel is given, by the counts and the global second moment after the step."""
    a = hyper.adaptivity
    known = isinstance(a, float) and power_kind(a / 2) is not PowerKind.POWER
    step_size, denom_scale = _coefficients(
        logs=[log_beta(hyper.b1), log_beta(hyper.b2)],
        a=a if known else [a, (1 - a) / 2 if isinstance(a, float) else None],
        count=count,
        s=s,
        steps=steps,
    )
    numbers = Numbers(
        b1=hyper.b1,
        one_minus_b1=1 - hyper.b1,
        b2=hyper.b2,
        one_minus_b2=1 - hyper.b2,
        eps=hyper.eps,
        exponent=a / 2,
        lr=hyper.learning_rate,
        weight_decay=hyper.weight_decay,
    )
    kind, can_be_zero = power_kind(numbers.exponent), denom_can_be_zero(hyper.eps, _SMALLEST)
    return OfGroup(step_size, denom_scale, numbers, kind, can_be_zero)


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
        s: global second moment, as in the state.
        steps: completed updates of each leaf.
    """
    a, global_exponent = (cast(x, s.dtype) for x in a) if isinstance(a, list) else (a, None)
    log_b1, log_b2 = (cast(x, s.dtype) for x in logs)
    # A leaf that has had no gradient yet would divide by a bias correction of 0.
    t, k = (jnp.maximum(x, 1).astype(s.dtype) for x in (steps, steps if s.ndim == 1 else count))
    s = s[:, 0] if s.ndim == 2 else s
    functions: dict[str, Any] = {"expm1": jnp.expm1, "log": lambda log_beta: log_beta}  # taken already
    s_hat = s / bias_correction(log_b2, k, **functions)
    found = coefficients(
        1.0, log_b1, log_b2, None, a, t, s_hat, power=scale_power, global_exponent=global_exponent, **functions
    )
    return found.step_size, jnp.broadcast_to(found.denom_scale, t.shape)


def log_beta(beta: Any) -> Any:
    """Its logarithm; in double precision if the host knows beta, which is near 1, where float32 has too few digits."""
    if isinstance(beta, float):
        return math.log(beta) if beta else -math.inf
    return _log_of_array(beta=beta)


@specialized
def _log_of_array(*, beta: jax.Array) -> jax.Array:
    return jnp.log1p(beta - 1)  # the difference is exact


# kernel


def _update_leaves(
    leaves: Leaves, groups: dict[int, OfGroup], clip: jax.Array | None, step_is_live: jax.Array | None
) -> tuple[optax.Updates, dict[str, optax.Params]]:
    """The updates and the new slots; leaves without a gradient keep their slots, and have None for an update."""
    new_updates = leaves.gradients.copy()
    mu, nu, compensation = leaves.mu.copy(), leaves.nu.copy(), leaves.compensation.copy()
    for i, g in enumerate(leaves.gradients):
        if g is None:
            continue
        group, p = groups[leaves.groups[i]], leaves.params[i]
        decay = group.numbers.weight_decay
        decays = leaves.decays[i] and not (isinstance(decay, float) and decay == 0)
        new_updates[i], mu[i], nu[i], compensation[i] = update_leaf(
            index=leaf_index(i),
            param=p if decays or compensation[i] is not None else None,
            compensation=compensation[i],
            gradient=g,
            mu=mu[i],
            nu=nu[i],
            clip=clip,
            step_is_live=step_is_live,
            decays=decays,
            dtype=update_dtype(*(x for x in (g, p) if x is not None)),
            **group._asdict(),
        )
    slots = {"mu": mu, "nu": nu, "compensation": compensation}
    kept = {name: leaves.whole(slot) for name, slot in slots.items() if name != "compensation" or leaves.is_compensated}
    return leaves.whole(new_updates), kept
