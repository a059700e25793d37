"""The rule over trees of JAX arrays. Its equations are in `ada2ms.core.spec`, its symbols' names in the table there."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]

from ada2ms.core.hyperparameters import Nonfinite, Scope, check, value_at
from ada2ms.jax._power import power, power_of_few, root

_SMALLEST: Final = float(jnp.finfo(jnp.float32).tiny)  # type: ignore[no-untyped-call]


class ScaleByAda2MSState(NamedTuple):
    """State of `scale_by_ada2ms` and of `ada2ms`.

    Attributes:
        count: completed updates, k in the rule; int32 scalar.
        mu: first moments, m; a tree like the parameters.
        nu: elementwise second moments, v; a tree like the parameters. In a complex leaf the real part is the second
            moment of the gradient's real part, and the imaginary part that of its imaginary part.
        s: global second moment; a scalar in scope "model", one entry for each leaf in scope "tensor".
        steps: completed updates of each leaf, t in the rule; int32, one entry for each leaf.
        skipped: steps that `nonfinite="skip"` has skipped; int32 scalar.
    """

    count: jax.Array  # type: ignore[assignment]  # a tuple has a method of this name
    mu: optax.Params
    nu: optax.Params
    s: jax.Array
    steps: jax.Array
    skipped: jax.Array


# Makes updates of (m_hat / d, completed updates, parameters), in trees.
Finish = Callable[[optax.Updates, jax.Array, optax.Params | None], optax.Updates]
# Chooses between (new value, old value).
Keep = Callable[[jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The arguments that `ada2ms` and `scale_by_ada2ms` share, and what they do with them."""

    b1: Any
    b2: Any
    eps: Any
    adaptivity: Any
    mu_dtype: Any
    nu_dtype: Any
    scope: Scope
    nonfinite: Nonfinite
    axis_name: str | Sequence[str] | None

    def __post_init__(self) -> None:
        for field in ("b1", "b2", "eps", "adaptivity"):
            check_number(field, getattr(self, field))
        check("scope", self.scope)
        check("nonfinite", self.nonfinite)
        for field in ("mu_dtype", "nu_dtype"):
            dtype = getattr(self, field)
            try:
                allowed = dtype is None or jnp.issubdtype(dtype, jnp.inexact)
            except TypeError:
                allowed = False
            if not allowed:
                raise ValueError(f"Invalid {field}: {dtype!r} ({field} must be None, or a floating or complex dtype)")
        axes = _axes(self.axis_name)
        if not all(isinstance(axis, str) for axis in axes):
            raise TypeError(
                f"Invalid axis_name: {self.axis_name!r} (axis_name must be None, a name or a tuple of names)"
            )

    def init(self, params: optax.Params) -> ScaleByAda2MSState:
        """Zeros, of the parameters' shapes, types and shardings; reads no values."""
        leaves = jax.tree.leaves(params)
        return ScaleByAda2MSState(
            count=jnp.zeros([], jnp.int32),
            mu=jax.tree.map(lambda p: _zeros(p, self.mu_dtype), params),
            nu=jax.tree.map(lambda p: _zeros(p, self.nu_dtype), params),
            s=jnp.zeros([] if self.scope == "model" else [len(leaves)], _real(*leaves)),
            steps=jnp.zeros([len(leaves)], jnp.int32),
            skipped=jnp.zeros([], jnp.int32),
        )

    def update(
        self, finish: Finish, updates: optax.Updates, state: ScaleByAda2MSState, params: optax.Params | None
    ) -> tuple[optax.Updates, ScaleByAda2MSState]:
        """One step: `finish(m_hat / d, ...)` in the gradients' types, and the state after it."""
        tree: Any = jax.tree.structure(state.mu)
        gradients = tree.flatten_up_to(updates)
        mu, nu = tree.flatten_up_to(state.mu), tree.flatten_up_to(state.nu)
        present = [i for i, g in enumerate(gradients) if g is not None]
        if not present:
            return updates, state
        if state.s.ndim != (self.scope == "tensor"):  # what would be broadcast otherwise
            raise ValueError(f"Invalid state: s of shape {state.s.shape} (must be made with scope={self.scope!r})")

        dtype = state.s.dtype
        b2 = cast(number(self.b2), dtype)
        # A schedule of a 32-bit count would compute in float32.
        completed = state.count.astype(jnp.int64) if dtype == jnp.float64 else state.count
        a = number(value_at(self.adaptivity, completed))
        count = optax.safe_increment(state.count)
        has_gradient = np.array([g is not None for g in gradients])
        steps = jnp.where(has_gradient, optax.safe_increment(state.steps), state.steps)

        squares, entries = _sums_of_squares(gradients, dtype, self.axis_name)
        total = sum(squares, start=jnp.zeros([], dtype))
        t = jnp.maximum(steps, 1)  # where there has been no gradient yet, nothing is divided by
        if self.scope == "model":
            s = b2 * state.s + (1 - b2) * _mean(total, sum(entries))
            s_hat = s / _correction(b2, count, dtype)
        else:
            means = jnp.stack([_mean(x, n) for x, n in zip(squares, entries, strict=True)])
            s = jnp.where(has_gradient, b2 * state.s + (1 - b2) * means, state.s)
            s_hat = s / _correction(b2, t, dtype)
        # Of all leaves at once, what is the same for all entries of each: m_hat = m * of_m, d = v^(a/2) * of_d + eps.
        of_m = 1 / _correction(cast(number(self.b1), dtype), t, dtype)
        of_d = _power(1 / _correction(b2, t, dtype), a, power_of_few) * _power(s_hat, 1 - a, power_of_few)
        of_d = jnp.broadcast_to(of_d, t.shape)

        # Finite where the sum is; but where all leaves ask, XLA would make the sum once more for each, and no root.
        finite = jnp.isfinite(root(total))

        def keep(new: jax.Array, old: jax.Array) -> jax.Array:
            """The new value, or, in a step that is skipped, the old one."""
            return new if self.nonfinite == "propagate" else jnp.where(finite, new, old)

        directions: list[Any] = [None] * len(gradients)
        for i, j in zip(present, _opaque(present), strict=True):
            g = jnp.asarray(gradients[i])
            directions[i], mu[i], nu[i] = self._leaf(g, mu[i], nu[i], of_m[j], of_d[j], a, keep)
        new_updates = finish(tree.unflatten(directions), completed, params)
        like = (updates,) if params is None else (updates, params)
        return (
            map_updates(lambda u, *like: keep(u, jnp.zeros_like(u)).astype(_inexact(*like)), new_updates, *like),
            ScaleByAda2MSState(
                count=keep(count, state.count),
                mu=tree.unflatten(mu),
                nu=tree.unflatten(nu),
                s=keep(s, state.s),
                steps=keep(steps, state.steps),
                skipped=keep(state.skipped, optax.safe_increment(state.skipped)),
            ),
        )

    def _leaf(
        self, gradient: jax.Array, mu: jax.Array, nu: jax.Array, of_m: jax.Array, of_d: jax.Array, a: Any, keep: Keep
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(m_hat / d, m, v) of one leaf; in at least float32, a complex leaf as pairs of reals."""
        pairs = jnp.iscomplexobj(gradient)
        dtype = _real(gradient, mu, nu)
        g, m, v = (_to_reals(x, pairs).astype(dtype) for x in (gradient, mu, nu))
        b1, b2, eps = (cast(number(x), dtype) for x in (self.b1, self.b2, self.eps))

        m = keep(b1 * m + (1 - b1) * g, m)
        v = keep(b2 * v + (1 - b2) * (g * g), v)
        d = _power(v, a, power) * of_d.astype(dtype) + eps
        if not (isinstance(eps, float) and eps >= _SMALLEST):  # only without eps: where nothing has moved yet,
            d = jnp.where(d == 0, jnp.inf, d)  # the update is 0
        direction = _from_reals(m * of_m.astype(dtype) / d, pairs)
        return direction, _from_reals(m, pairs, mu.dtype), _from_reals(v, pairs, nu.dtype)


def check_number(field: str, value: Any, argument: str | None = None, *, schedule: bool | None = None) -> None:
    """As `ada2ms.core.hyperparameters.check`; but what JAX traces, and does not know yet, is taken as it is."""
    if not isinstance(value, jax.core.Tracer):
        check(field, jax.device_get(value) if isinstance(value, jax.Array) else value, argument, schedule=schedule)


def number(value: Any) -> Any:
    """A hyperparameter as a Python float, in double precision, unless JAX computes it."""
    return value if isinstance(value, jax.Array) else float(value)


def cast(value: Any, dtype: Any) -> Any:
    """A hyperparameter that does not widen arrays of `dtype`."""
    return value.astype(dtype) if isinstance(value, jax.Array) else value


def map_updates(f: Callable[..., Any], updates: optax.Updates, *rest: Any) -> optax.Updates:
    """`jax.tree.map` that leaves the updates alone that are None."""
    return jax.tree.map(lambda u, *x: None if u is None else f(u, *x), updates, *rest, is_leaf=lambda u: u is None)


def _power(x: jax.Array, a: Any, otherwise: Callable[[jax.Array, jax.Array], jax.Array]) -> Any:
    """x^(a/2), where 0^0 = 1."""
    if isinstance(a, float) and a in (0, 0.5, 1):  # the same, faster
        return root(x) if a == 1 else root(root(x)) if a else 1.0
    return otherwise(x, jnp.asarray(a, x.dtype) / 2)


def _correction(beta: Any, count: jax.Array, dtype: Any) -> jax.Array:
    """1 - beta^count, without the cancellation that costs 1 - beta**count its digits."""
    if isinstance(beta, float) and beta == 0:
        return jnp.ones_like(count, dtype)
    log = math.log(beta) if isinstance(beta, float) else jnp.log1p(beta - 1)  # the difference is exact
    return -jnp.expm1(count.astype(dtype) * log)


def _mean(total: jax.Array, entries: float) -> jax.Array:
    return total / entries if entries else total


def _opaque(indices: list[int]) -> list[jax.Array]:
    """The same numbers, but read from memory: XLA then compiles one loop for all leaves of a shape.

    A number alone would be made part of a leaf's loop; so each has another behind it.
    """
    pairs = jax.lax.optimization_barrier([np.array([i, i + 1], np.uint32) for i in indices])  # type: ignore[no-untyped-call]
    return [pair[0] for pair in pairs]


def _sums_of_squares(gradients: list[Any], dtype: Any, axis_name: Any) -> tuple[list[jax.Array], list[float]]:
    """For each gradient the sum of its squares, and the number of reals in it, over all devices; zeros for None."""
    axes = _axes(axis_name)
    for axis in axes:
        if not _accounted(axis):
            raise ValueError(
                f"Invalid axis_name: {axis_name!r} (must be axes of a jax.shard_map with check_vma=True: elsewhere a "
                "leaf does not tell whether it is sharded; under jax.jit alone, no axis_name is needed)"
            )
    sums, entries = [], []
    for g in gradients:
        if g is None:
            sums.append(jnp.zeros([], dtype))
            entries.append(0.0)
            continue
        # The barrier keeps XLA from sharing g*g with the update of v, for which it would store all of g*g.
        g = jax.lax.optimization_barrier(jnp.asarray(g))  # type: ignore[no-untyped-call]
        pairs = jnp.iscomplexobj(g)
        g = _to_reals(g, pairs)
        sums.append(jnp.sum(jnp.square(g.astype(at_least_float32(g)))).astype(dtype))
        entries.append(float(g.size))
        if axes:
            shards = _size(tuple(axis for axis in axes if axis in _varying(g)))
            sums[-1] /= _size(axes) / shards  # the copies that the sum over all axes has of each shard
            entries[-1] *= shards
    if axes:  # one sum over devices, for all leaves
        sums = list(jax.lax.psum(jnp.stack(sums), axes))  # type: ignore[no-untyped-call]
    return sums, entries


def _axes(axis_name: Any) -> tuple[Any, ...]:
    return () if axis_name is None else tuple(axis_name) if isinstance(axis_name, (tuple, list)) else (axis_name,)


def _size(axes: tuple[str, ...]) -> int:
    """The number of devices along axes of `jax.shard_map`."""
    size: int = jax.lax.psum(1, axes)  # type: ignore[no-untyped-call]
    return size


def _accounted(axis: str) -> bool:
    """Whether JAX keeps account here of what varies over an axis."""
    try:
        return axis in _varying(jax.lax.axis_index(axis))  # type: ignore[no-untyped-call]
    except NameError:  # no such axis here
        return False


def _varying(x: jax.Array) -> frozenset[str]:
    """The axes of `jax.shard_map` over which its shards differ; none where JAX keeps no account of that."""
    aval: Any = jax.typeof(x)
    axes: frozenset[str] = aval.vma if hasattr(aval, "vma") else aval.manual_axis_type.varying  # older and newer JAX
    return axes


def _zeros(p: Any, dtype: Any) -> jax.Array:
    """Zeros like a parameter, in `dtype`; a complex one in a real `dtype` becomes pairs along a new leading axis."""
    dtype = at_least_float32(p) if dtype is None else jax.dtypes.canonicalize_dtype(dtype)
    zeros = jnp.zeros_like(p, dtype=dtype)
    if jnp.issubdtype(jnp.result_type(p), jnp.complexfloating) and not jnp.iscomplexobj(zeros):
        return jnp.stack([zeros, zeros])
    return zeros


def _to_reals(x: jax.Array, pairs: bool) -> jax.Array:
    """A complex leaf, or its state, as pairs of reals along a new leading axis."""
    return jnp.stack([x.real, x.imag]) if pairs and jnp.iscomplexobj(x) else x.real


def _from_reals(x: jax.Array, pairs: bool, dtype: Any = None) -> jax.Array:
    """The reverse of `_to_reals`, stored in `dtype`."""
    if pairs and (dtype is None or jnp.issubdtype(dtype, jnp.complexfloating)):
        x = jax.lax.complex(x[0], x[1])
    return x if dtype is None else x.astype(dtype)


def at_least_float32(*arrays: Any) -> Any:
    """The type of arrays together, of which a narrower one would be widened."""
    return _common(jnp.float32, *arrays)


def _inexact(*arrays: Any) -> Any:
    """The type of arrays together; float32 for integers, of which an update is a fraction."""
    dtype = _common(*arrays)
    return dtype if jnp.issubdtype(dtype, jnp.inexact) else at_least_float32(dtype)


def _real(*arrays: Any) -> Any:
    """As `at_least_float32`, of the real and imaginary parts of complex arrays."""
    return jnp.finfo(at_least_float32(*arrays)).dtype  # type: ignore[no-untyped-call]


def _common(*arrays: Any) -> Any:
    # Widening is meant, where the user has forbidden it to happen by chance.
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*arrays)
