"""The update of one leaf."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ada2ms.core.coefficients import PowerKind
from ada2ms.jax.dtypes import cast, compute_dtype, from_reals, real_dtype, to_reals
from ada2ms.jax.kernels.compensation import compensated
from ada2ms.jax.kernels.power import denom_power
from ada2ms.jax.specialize import specialized


class Numbers(NamedTuple):
    """What the kernel needs of the hyperparameters of a step: Python floats, or scalars of JAX."""

    b1: Any
    one_minus_b1: Any
    b2: Any
    one_minus_b2: Any
    eps: Any
    exponent: Any  # a/2, of v
    lr: Any  # None for a direction, m_hat / d, without sign and decay
    weight_decay: Any


@specialized
def update_leaf(
    *,
    index: Any,
    param: Any,
    compensation: Any,
    gradient: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    clip: Any,
    step_size: jax.Array,
    denom_scale: jax.Array,
    step_is_live: Any,
    numbers: Numbers,
    decays: bool,
    kind: PowerKind,
    denom_can_be_zero: bool,
    dtype: Any,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """(update, m, v, compensation) of one leaf; in at least float32, a complex leaf as pairs of reals.

    Args:
        index: the leaf's position in `step_size` and `denom_scale`, as `leaf_index` gives it.
        param: the parameter if it decays or is compensated, else None.
        compensation: what rounding lost of the parameter, in its type; None if that is not kept.
        gradient: of the parameter's shape.
        mu: first moment, of the same shape; that of a complex leaf may be pairs of reals along a new leading axis.
        nu: elementwise second moment, likewise.
        clip: factor of the gradient; None for 1.
        step_size: of each leaf, m_hat = m * step_size.
        denom_scale: of each leaf, d = v^(a/2) * denom_scale + eps.
        step_is_live: whether the step counts; None if every step does.
        numbers: of the hyperparameters.
        decays: whether the parameter does.
        kind: how v^(a/2) is computed.
        denom_can_be_zero: whether d may be 0: if eps is, or is not known.
        dtype: of the update; that of a compensated parameter is float32.
    """
    # XLA compiles one loop for all leaves of a shape if their code is the same, so the index must not be a constant in
    # it: the barrier hides its value. XLA would still fuse a scalar into the loop, hence an array of two.
    j = jax.lax.optimization_barrier(jnp.asarray(index))[0]  # type: ignore[no-untyped-call]
    pairs = jnp.iscomplexobj(gradient)
    wide = real_dtype(gradient, mu, nu)
    g, m, v = (to_reals(x, pairs).astype(wide) for x in (gradient, mu, nu))
    b1, one_minus_b1, b2, one_minus_b2, eps, *_ = (cast(x, wide) for x in numbers)
    g = g if clip is None else g * clip.astype(wide)

    m = select(step_is_live, b1 * m + one_minus_b1 * g, m)
    v = select(step_is_live, b2 * v + one_minus_b2 * (g * g), v)
    # d = v_hat^(a/2) * s_hat^((1-a)/2) + eps
    d = denom_power(v, numbers.exponent, kind) * denom_scale[j].astype(wide) + eps
    if denom_can_be_zero:
        d = jnp.where(d == 0, jnp.inf, d)  # the update is then 0, not NaN
    update = from_reals(m * step_size[j].astype(wide) / d, pairs)
    value = param if compensation is None else param.astype(jnp.float32) + compensation.astype(jnp.float32)
    if decays:
        wide = compute_dtype(update, value)
        update = update.astype(wide) + cast(numbers.weight_decay, wide) * value.astype(wide)
    if numbers.lr is not None:
        update = -cast(numbers.lr, update.dtype) * update
    if compensation is not None:
        dtype = jnp.float32
        update, lost = compensated(param, value + update.astype(dtype))
        compensation = select(step_is_live, lost, compensation)
    update = select(step_is_live, update, jnp.zeros_like(update))
    return update.astype(dtype), from_reals(m, pairs, mu.dtype), from_reals(v, pairs, nu.dtype), compensation


def select(step_is_live: Any, new: jax.Array, old: jax.Array) -> jax.Array:
    """The new value where the step counts, and else the old one."""
    return new if step_is_live is None else jnp.where(step_is_live, new, old)


def leaf_index(i: int) -> np.ndarray[Any, Any]:
    """The `index` of the leaf at position i."""
    return np.array([i, i + 1], np.uint32)
