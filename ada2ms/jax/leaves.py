"""What a step is given, leaf by leaf."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]

from ada2ms.jax.dtypes import as_array, compute_dtype
from ada2ms.jax.masks import decaying_leaves
from ada2ms.jax.names import names_of_leaves
from ada2ms.jax.options import Options, group_of_each
from ada2ms.jax.state import AnyState, CompensatedAda2MSState, ScaleByAda2MSState, check_state


class Leaves(NamedTuple):
    """The leaves of a step, without those leaves of the parameters that have no moments."""

    tree: Any  # the structure of the parameters, None counted as a leaf
    positions: list[int]  # of those with moments
    gradients: list[Any]  # None where there is none
    mu: list[Any]
    nu: list[Any]
    params: list[Any]  # None where there is none, or none is given
    compensation: list[Any]  # None where there is none
    decays: list[bool]  # as the mask has it
    groups: tuple[int, ...]  # the positions of their groups in `hyper_at`
    is_compensated: bool  # whether the state has a compensation

    def whole(self, leaves: list[Any]) -> Any:
        """A tree of leaves that is like the parameters; None elsewhere."""
        every = [None] * self.tree.num_leaves
        for i, leaf in zip(self.positions, leaves, strict=True):
            every[i] = leaf
        return self.tree.unflatten(every)


def prepare(options: Options, updates: optax.Updates, state: AnyState, params: optax.Params | None) -> Leaves:
    """Leaves that have no moments are left alone, whatever they are: models of Equinox have functions among them."""
    if not hasattr(state, "mu"):
        raise TypeError(
            f"Invalid state: {type(state).__name__} (must be the {ScaleByAda2MSState.__name__} of this "
            "transformation's init; what wraps it, such as optax.chain, has one of its own)"
        )
    tree: Any = jax.tree.structure(state.mu, is_leaf=lambda x: x is None)
    every = tree.flatten_up_to(state.mu)
    positions = [i for i, m in enumerate(every) if m is not None]

    def of(x: Any) -> list[Any]:
        if x is None:
            return [None] * len(positions)
        leaves = tree.flatten_up_to(x)
        return [leaves[i] for i in positions]

    gradients = tree.flatten_up_to(updates)
    if any(g is not None and m is None for g, m in zip(gradients, every, strict=True)):
        raise ValueError("Invalid updates: a gradient for a leaf that was None in init (must be None for it)")
    leaves = Leaves(
        tree=tree,
        positions=positions,
        gradients=[None if gradients[i] is None else as_array(gradients[i], None) for i in positions],
        mu=of(state.mu),
        nu=of(state.nu),
        params=of(params),
        compensation=of(state.compensation),
        decays=[False] * len(positions),
        groups=(0,) * len(positions),
        is_compensated=isinstance(state, CompensatedAda2MSState),  # also of one leaf that has none
    )
    check_state(options, state, len(positions))
    _check_moments(state, leaves)
    if options.groups:
        leaves = leaves._replace(groups=_groups(options, state, leaves))
    if options.need_params:
        if params is None:
            what = "which weight decay is of" if not options.compensated else "which it rounds"
            raise ValueError(f"Invalid params: None (update must be given the parameters, {what})")
        decaying = decaying_leaves(options.mask, leaves.whole(leaves.params))
        leaves = leaves._replace(decays=[decaying[i] for i in positions])
    for i, g in enumerate(leaves.gradients):
        if g is not None:  # scalars of a state that was saved as text are Python numbers
            p = leaves.params[i] = None if leaves.params[i] is None else as_array(leaves.params[i], None)
            leaves.mu[i] = as_array(leaves.mu[i], compute_dtype(g) if options.mu_dtype is None else options.mu_dtype)
            leaves.nu[i] = as_array(leaves.nu[i], compute_dtype(g) if options.nu_dtype is None else options.nu_dtype)
            if p is not None and leaves.compensation[i] is not None:
                leaves.compensation[i] = as_array(leaves.compensation[i], p.dtype)
    return leaves


def _groups(options: Options, state: AnyState, leaves: Leaves) -> tuple[int, ...]:
    """The group of each leaf, by its name and its number of dimensions."""
    shaped = [
        next(x for x in given if x is not None)
        for given in zip(leaves.params, leaves.gradients, leaves.mu, strict=True)
    ]
    return group_of_each(options.groups, names_of_leaves(state.mu), [np.ndim(x) for x in shaped])


def _check_moments(state: AnyState, leaves: Leaves) -> None:
    """Raises if a moment has not the shape of its gradient."""
    paths, _ = jax.tree_util.tree_flatten_with_path(state.mu)
    for i, ((path, _), g) in enumerate(zip(paths, leaves.gradients, strict=True)):
        if g is None:
            continue
        allowed = (g.shape, (2, *g.shape)) if jnp.iscomplexobj(g) else (g.shape,)
        for field, moment in (("mu", leaves.mu[i]), ("nu", leaves.nu[i])):
            if np.shape(moment) not in allowed:
                name, shape = f"{field}{jax.tree_util.keystr(path)}", np.shape(moment)
                raise ValueError(f"Invalid state: {name} of shape {shape} (must be {g.shape}, its gradient's)")
