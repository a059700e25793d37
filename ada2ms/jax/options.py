"""The arguments of the transformations, and what they come to in one step for the leaves of each group."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ada2ms.core.groups import Group, assign
from ada2ms.core.hyperparameters import Nonfinite, Scope, as_float, value_at
from ada2ms.jax.dtypes import cast


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
    max_norm: Any
    axis_name: Any
    groups: tuple[Group, ...]
    compensated: bool = False
    learning_rate: Any = None
    weight_decay: Any = 0.0
    mask: Any = None

    @property
    def need_params(self) -> bool:
        """Whether the parameters must be known: to decay them, or for what their rounding loses."""
        decays = (self.weight_decay, *(group.weight_decay for group in self.groups))
        return self.compensated or any(not isinstance(x, float) or x != 0 for x in decays if x is not None)


class Hyper(NamedTuple):
    """The hyperparameters of a group in one step: Python floats, or scalars of JAX."""

    b1: Any
    b2: Any
    eps: Any
    adaptivity: Any
    learning_rate: Any  # None for a direction, m_hat / d
    weight_decay: Any


def hyper_at(options: Options, count: jax.Array, dtype: Any) -> list[Hyper]:
    """The hyperparameters of each group in this step, the optimizer's own last, for leaves that are in none.

    Schedules take the count of completed updates.
    """
    # From a 32-bit count, a schedule computes in float32.
    completed = count.astype(jnp.int64) if dtype == jnp.float64 else count

    def at(scheduled: Any) -> Any:
        value = _as_number(value_at(scheduled, completed))
        if callable(scheduled) and isinstance(value, float) and not isinstance(count, jax.core.Tracer):
            return jnp.asarray(value, dtype)  # a Python number would be a constant, and each step compiled anew
        return value

    lr = options.learning_rate
    own = Hyper(
        b1=cast(options.b1, dtype),
        b2=cast(options.b2, dtype),
        eps=options.eps,
        adaptivity=at(options.adaptivity),
        learning_rate=None if lr is None else at(lr),
        weight_decay=at(options.weight_decay),
    )
    return [*(_of_group(group, own, at) for group in options.groups), own]


def _of_group(group: Group, own: Hyper, at: Any) -> Hyper:
    hyper = own._replace(**{name: at(value) for name, value in group.hyper().items()})
    if group.lr_scale == 1:
        return hyper
    return hyper._replace(learning_rate=own.learning_rate * group.lr_scale)


def _as_number(value: Any) -> Any:
    """A hyperparameter as a Python float, in double precision, unless JAX computes it."""
    return value if isinstance(value, jax.Array) else as_float(value)


def group_of_each(groups: Sequence[Group], names: Sequence[str], ndims: Sequence[int]) -> tuple[int, ...]:
    """The position in `hyper_at` of each leaf's group."""
    return tuple(len(groups) if i is None else i for i in assign(groups, names, ndims))


def has_one_b2(options: Options) -> bool:
    """Whether all groups have the optimizer's b2. Its value must be known for that: a traced one is like no number."""
    return all(group.b2 is None or _same(group.b2, options.b2) for group in options.groups)


def _same(x: Any, y: Any) -> bool:
    return isinstance(x, float) and isinstance(y, float) and x == y
