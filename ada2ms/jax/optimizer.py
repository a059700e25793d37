"""Ada2MS as Optax transformations."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]

from ada2ms.core.groups import Group, check_groups
from ada2ms.core.hyperparameters import (
    DEFAULT_COMPENSATED,
    DEFAULT_MAX_NORM,
    DEFAULT_NONFINITE,
    DEFAULT_SCOPE,
    DEFAULTS,
    Nonfinite,
    Scope,
    as_float,
    check,
)
from ada2ms.jax import state as states
from ada2ms.jax import step
from ada2ms.jax.options import Options
from ada2ms.jax.sharding import axes_of
from ada2ms.jax.state import AnyState

AxisName = str | Sequence[str] | None


def ada2ms(
    learning_rate: optax.ScalarOrSchedule = DEFAULTS.lr,
    b1: jax.typing.ArrayLike = DEFAULTS.b1,
    b2: jax.typing.ArrayLike = DEFAULTS.b2,
    eps: jax.typing.ArrayLike = DEFAULTS.eps,
    *,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = DEFAULTS.weight_decay,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    adaptivity: optax.ScalarOrSchedule = DEFAULTS.adaptivity,
    scope: Scope = DEFAULT_SCOPE,
    nonfinite: Nonfinite = DEFAULT_NONFINITE,
    max_norm: jax.typing.ArrayLike | None = DEFAULT_MAX_NORM,
    compensated: bool = DEFAULT_COMPENSATED,
    groups: Sequence[Group] | None = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Ada2MS: between AdamW and momentum SGD, by interpolating elementwise and global second moments geometrically.

    .. math::

        m_t &= \beta_1 m_{t-1} + (1-\beta_1) g_t \\
        v_t &= \beta_2 v_{t-1} + (1-\beta_2) g_t^2 \\
        s_t &= \beta_2 s_{t-1} + (1-\beta_2) \operatorname{mean}(g_t^2) \\
        u_t &= -\alpha_t \left(\frac{\hat m_t}{\hat v_t^{a/2} \hat s_t^{(1-a)/2} + \varepsilon}
               + \lambda \theta_{t-1}\right)

    Adaptivity a = 1 is AdamW; a = 0 is momentum SGD, normalised by one number for the whole model. This is this
    project's reading of the abstract of Zhu, Xiao, Min 2026 (arXiv 2605.20533), which gives no formula:
    `ada2ms.core.spec` tells the two apart. The mean is over the leaves that the transformation is given: inside
    `optax.masked` or `optax.partition`, those of the group. (docs/global.md lists what that means where.)

    Arithmetic is in at least float32, whatever the gradients' type. Updates have the gradients' type (that of
    parameters and gradients together, if they differ). A leaf whose gradient is None keeps its parameter and its state
    and has None for an update. `optax.apply_updates` raises on that; give it zeros there::

        updates = jax.tree.map(lambda p, u: jnp.zeros_like(p) if u is None else u, params, updates)

    As everywhere in Optax, complex gradients are to be conjugated first. There is no `nesterov`: the AdamW of torch and
    Keras has none, and the rule is one for all. There is no `eps_root` either: derivatives through an update are
    finite without it, also where a gradient is 0.

    `optax.inject_hyperparams` keeps hyperparameters in the parameters' type. In 16 bits b2 = 0.999 is 1, which is an
    error: give it `hyperparam_dtype=jnp.float32` then.

    Args:
        learning_rate: a number, at least 0; or a schedule, given the count of completed updates.
        b1: decay rate of the first moment, in [0, 1).
        b2: decay rate of both second moments, in [0, 1).
        eps: added to the denominator, after bias correction and outside the root; at least 0.
        mu_dtype: type of the first moments; by default the parameters', but float32 for 16-bit ones. (A real type for
            complex leaves keeps pairs of reals along a new leading axis.)
        nu_dtype: type of the second moments, likewise. 16 bits are too few for b2 = 0.999: the average stands still.
        weight_decay: decoupled weight decay, scaled by the learning rate; at least 0; a number or a schedule.
        mask: where to decay: a tree of booleans like the parameters, a prefix of it, or a function from the one to the
            other. By default everywhere. A function is given the parameters, with None for leaves that were None in
            `init`; `optax.adamw` gives its own the gradients in `update`, whose types may be others.
        adaptivity: a number in [0, 1]; or a schedule, of Optax or of `ada2ms.core`.
        scope: "model": one global second moment for all leaves; "tensor": one for each leaf.
        nonfinite: "propagate", or "skip" steps whose sum of squared gradients is not finite: nothing changes then,
            weight decay and schedules included, but `skipped` in the state.
        max_norm: the norm, over all leaves, to which longer gradients are scaled down, as `optax.clip_by_global_norm`
            does before an optimizer: a number above 0, or None. It is taken from the sum that the global second moment
            needs, and costs no pass over the gradients.
        compensated: whether parameters in float16 or bfloat16 keep what rounding loses of them, so that they add up
            updates that are smaller than their last digit. Their updates are in float32 then, and must go to
            `optax.apply_updates` as they are: nothing may stand behind this transformation that changes them,
            `equinox.apply_updates` would make float32 of the parameters, and `optax.apply_if_finite` around it takes
            gradients in float32 alone (`nonfinite="skip"` takes any). The state is a `CompensatedAda2MSState`.
        groups: leaves with hyperparameters of their own, `ada2ms.core.Group`; the first that matches a leaf's name has
            it. A name is the path of a leaf in the tree, `"dense/kernel"`, as in `export_state`. All groups share the
            mean of the global second moment. A leaf decays where `mask` has it, by the decay of its group. What
            `optax.inject_hyperparams` changes is the optimizer's own, of which `lr_scale` is a factor.
        axis_name: axes of `jax.shard_map` over which parameters are sharded, if any are; leaves that are replicated
            may stand among them. Needs `check_vma=True`, the default, and one all-reduce a step. Not for gradients
            that are averaged over data-parallel devices, and not under `jax.jit` alone, which needs nothing.

    Returns:
        A transformation whose state is a `ScaleByAda2MSState`. Its `update` needs the parameters, unless
        `weight_decay` is the number 0, in all groups, and `compensated` is False.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is allowed. (What JAX traces has no value yet,
            and is taken as it is.) `init` raises for a group that has no leaf, unless it matches every name.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from ada2ms.jax import ada2ms
        >>> params = jnp.array([1.0, 2.0, 3.0])
        >>> optimizer = ada2ms(learning_rate=0.5, adaptivity=optax.linear_schedule(1.0, 0.0, 100))
        >>> state = optimizer.init(params)
        >>> for _ in range(5):
        ...     gradients = jax.grad(lambda x: jnp.sum(x**2))(params)
        ...     updates, state = optimizer.update(gradients, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> bool(jnp.sum(params**2) < 1)
        True
    """
    return _transformation(
        learning_rate=_checked("lr", learning_rate, "learning_rate"),
        weight_decay=_checked("weight_decay", weight_decay, schedule=True),
        mask=mask,
        b1=b1,
        b2=b2,
        eps=eps,
        adaptivity=adaptivity,
        mu_dtype=mu_dtype,
        nu_dtype=nu_dtype,
        scope=scope,
        nonfinite=nonfinite,
        max_norm=max_norm,
        compensated=compensated,
        groups=check_groups(groups),
        axis_name=axis_name,
    )


def scale_by_ada2ms(
    b1: jax.typing.ArrayLike = DEFAULTS.b1,
    b2: jax.typing.ArrayLike = DEFAULTS.b2,
    eps: jax.typing.ArrayLike = DEFAULTS.eps,
    *,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
    adaptivity: optax.ScalarOrSchedule = DEFAULTS.adaptivity,
    scope: Scope = DEFAULT_SCOPE,
    nonfinite: Nonfinite = DEFAULT_NONFINITE,
    max_norm: jax.typing.ArrayLike | None = DEFAULT_MAX_NORM,
    groups: Sequence[Group] | None = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Rescales gradients as `ada2ms` does, without learning rate and weight decay: m_hat / d.

    For chains of one's own, such as a learning rate for each group of leaves, chosen after the global second moment was
    taken over all of them::

        rates = {"slow": optax.scale(-1e-4), "fast": optax.scale(-1e-3)}
        optimizer = optax.chain(scale_by_ada2ms(), optax.partition(rates, labels))

    A step that `nonfinite="skip"` skips has zeros for updates; what follows in a chain does not know of it.

    Args:
        b1: as for `ada2ms`; and so are all others.
        b2: decay rate of both second moments.
        eps: added to the denominator.
        mu_dtype: type of the first moments.
        nu_dtype: type of the second moments.
        adaptivity: a number in [0, 1], or a schedule.
        scope: "model" or "tensor".
        nonfinite: "propagate" or "skip".
        max_norm: the norm to which longer gradients are scaled down; or None.
        groups: with adaptivity, b1, b2 and eps of their own. A factor of the learning rate, and a weight decay, are for
            `ada2ms`, or for transformations behind this one.
        axis_name: axes of `jax.shard_map` over which the parameters are sharded, if they are.

    Returns:
        A transformation whose state is a `ScaleByAda2MSState`. Its `update` does not need the parameters.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is allowed.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from ada2ms.jax import scale_by_ada2ms
        >>> optimizer = optax.chain(scale_by_ada2ms(adaptivity=0.0), optax.scale_by_learning_rate(1.0))
        >>> gradients = jnp.array([3.0, -4.0])
        >>> updates, state = optimizer.update(gradients, optimizer.init(gradients))
        >>> bool(jnp.allclose(updates, -gradients / jnp.sqrt(jnp.mean(gradients**2))))
        True
    """
    groups = check_groups(groups)
    for i, group in enumerate(groups):
        for name, default in (("lr_scale", 1.0), ("weight_decay", None)):
            if getattr(group, name) != default:
                raise ValueError(
                    f"Invalid groups[{i}]: {group} ({name} must be left out: scale_by_ada2ms has neither learning rate "
                    "nor weight decay)"
                )
    return _transformation(
        b1=b1,
        b2=b2,
        eps=eps,
        adaptivity=adaptivity,
        mu_dtype=mu_dtype,
        nu_dtype=nu_dtype,
        scope=scope,
        nonfinite=nonfinite,
        max_norm=max_norm,
        groups=groups,
        axis_name=axis_name,
    )


def _transformation(**arguments: Any) -> optax.GradientTransformationExtraArgs:
    """Functions that close over their options, as those of Optax do: some tools look for arrays there."""
    for field in ("b1", "b2", "eps", "adaptivity", "max_norm"):
        arguments[field] = _checked(field, arguments[field])
    options = Options(**arguments)
    for field in ("scope", "nonfinite", "compensated"):
        check(field, getattr(options, field))
    for field in ("mu_dtype", "nu_dtype"):
        _check_dtype(field, getattr(options, field))
    if not all(isinstance(axis, str) for axis in axes_of(options.axis_name)):
        name = options.axis_name
        raise TypeError(f"Invalid axis_name: {name!r} (axis_name must be None, a name or a tuple of names)")

    def init_fn(params: optax.Params) -> AnyState:
        return states.init(options, params)

    def update_fn(
        updates: optax.Updates, state: AnyState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, AnyState]:
        del extra_args
        return step.update(options, updates, state, params)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _checked(field: str, value: Any, argument: str | None = None, *, schedule: bool | None = None) -> Any:
    """A hyperparameter: a schedule, an array of JAX, or else a Python float. What JAX traces has no value to check yet.

    `optax.inject_hyperparams` makes complex numbers of them where a parameter is complex.
    """
    if hasattr(value, "dtype") and jnp.iscomplexobj(value):
        real = isinstance(value, jax.core.Tracer) or np.all(np.imag(value) == 0)
        value = value.real if real else value
    if isinstance(value, jax.Array) and value.ndim and value.size == 1:
        value = value.reshape(())
    if not isinstance(value, jax.core.Tracer):
        check(field, jax.device_get(value) if isinstance(value, jax.Array) else value, argument, schedule=schedule)
    return value if value is None or callable(value) or isinstance(value, jax.Array) else as_float(value)


def _check_dtype(field: str, dtype: Any) -> None:
    try:
        allowed = dtype is None or jnp.issubdtype(dtype, jnp.inexact)
    except TypeError:
        allowed = False
    if not allowed:
        raise ValueError(f"Invalid {field}: {dtype!r} ({field} must be None, or a floating or complex dtype)")
