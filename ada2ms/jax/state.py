"""The state of the transformations."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]

from ada2ms.jax.dtypes import is_compensated, real_dtype, zeros_like
from ada2ms.jax.names import names_of_leaves
from ada2ms.jax.options import Options, group_of_each, has_one_b2


class ScaleByAda2MSState(NamedTuple):
    """State of `scale_by_ada2ms` and of `ada2ms`.

    Its fields are in alphabetical order, as those of Optax' Adam: tools that keep a state as a dictionary give them
    back in that order.

    Attributes:
        count: completed updates, k in the rule; int32 scalar.
        mu: first moments, m; a tree like the parameters.
        nu: elementwise second moments, v; a tree like the parameters. In a complex leaf the real part is the second
            moment of the gradient's real part, and the imaginary part that of its imaginary part.
        s: global second moment; a scalar in scope "model", one entry for each leaf in scope "tensor". Where groups of
            scope "model" have a b2 of their own, it is of shape (leaves, 1): the same in all leaves of one b2.
        skipped: steps that `nonfinite="skip"` has skipped; int32 scalar.
        steps: completed updates of each leaf, t in the rule; int32, one entry for each leaf.
    """

    count: jax.Array  # type: ignore[assignment]  # a tuple has a method of this name
    mu: optax.Params
    nu: optax.Params
    s: jax.Array
    skipped: jax.Array
    steps: jax.Array

    @property
    def compensation(self) -> None:
        """There is none: see `CompensatedAda2MSState`."""
        return None


class CompensatedAda2MSState(NamedTuple):
    """State of `ada2ms(compensated=True)`: that of `ada2ms`, with one slot more.

    It is a type of its own, so that without `compensated` a state has the fields that it had before there was such a
    slot: pickles and checkpoints that name or count them, such as those of flax, go on to load.

    Attributes:
        compensation: what rounding lost of each parameter in float16 or bfloat16, in its type; a tree like the
            parameters, with None for those of other types.
        count, mu, nu, s, skipped, steps: as in `ScaleByAda2MSState`.
    """

    compensation: optax.Params
    count: jax.Array  # type: ignore[assignment]
    mu: optax.Params
    nu: optax.Params
    s: jax.Array
    skipped: jax.Array
    steps: jax.Array


AnyState = ScaleByAda2MSState | CompensatedAda2MSState


def init(options: Options, params: optax.Params) -> AnyState:
    """Zeros, of the parameters' shapes, types and shardings; reads no values."""
    leaves = jax.tree.leaves(params)
    for path, p in jax.tree.leaves_with_path(params):
        if hasattr(p, "dtype") and jnp.issubdtype(p.dtype, jax.dtypes.prng_key):
            raise TypeError(f"Invalid params: {jax.tree_util.keystr(path)} is a PRNG key (must be None in init)")
    if options.groups:
        group_of_each(options.groups, names_of_leaves(params), [np.ndim(p) for p in leaves])
    state = ScaleByAda2MSState(
        count=jnp.zeros([], jnp.int32),
        mu=jax.tree.map(lambda p: zeros_like(p, options.mu_dtype), params),
        nu=jax.tree.map(lambda p: zeros_like(p, options.nu_dtype), params),
        s=jnp.zeros(_shape_of_s(options, len(leaves)), real_dtype(*leaves)),
        skipped=jnp.zeros([], jnp.int32),
        steps=jnp.zeros([len(leaves)], jnp.int32),
    )
    if not options.compensated:
        return state
    zeros = jax.tree.map(lambda p: jnp.zeros_like(p) if is_compensated(p) else None, params)
    return CompensatedAda2MSState(compensation=zeros, **state._asdict())


def check_state(options: Options, state: AnyState, leaf_count: int) -> None:
    """Raises if a state is not one that `init` makes with these options.

    An array of another shape would be broadcast silently.
    """
    if options.compensated is not isinstance(state, CompensatedAda2MSState):
        raise ValueError(
            f"Invalid state: {type(state).__name__} (must be made with compensated={options.compensated}; "
            "import_state makes one of the other)"
        )
    s, found = _shape_of_s(options, leaf_count), np.shape(state.s)
    if found != s:
        groups = " and these groups" if options.groups else ""
        raise ValueError(
            f"Invalid state: s of shape {found}, not {s} (must be made with scope={options.scope!r}{groups})"
        )
    for field, shape in (("count", ()), ("skipped", ()), ("steps", (leaf_count,))):
        if (found := np.shape(getattr(state, field))) != shape:
            raise ValueError(f"Invalid state: {field} of shape {found} (must be {shape}, as init makes it)")


def _shape_of_s(options: Options, leaf_count: int) -> tuple[int, ...]:
    if options.scope == "tensor":
        return (leaf_count,)
    return () if has_one_b2(options) else (leaf_count, 1)
