"""Which leaves decay."""

from typing import Any, Final

import jax
import numpy as np
import optax  # type: ignore[import-untyped]

_DECAYS: Final = object()


def decaying_leaves(mask: Any, params: optax.Params) -> list[bool]:
    """Whether each leaf of the parameters decays, None among them counted as leaves.

    Args:
        mask: of `ada2ms`; a function is given these very parameters, with their types, and None where they have None.
        params: None where there is nothing that could decay.
    """
    tree: Any = jax.tree.structure(params, is_leaf=lambda x: x is None)
    if mask is None:
        return [True] * tree.num_leaves
    if _is_function(mask):
        mask = mask(params)
    marking = optax.stateless(lambda updates, _: jax.tree.map(lambda _: _DECAYS, updates))
    masked = optax.masked(marking, mask)  # for Optax' own reading of masks
    marked, _ = masked.update(params, optax.MaskedState(inner_state=optax.EmptyState()))
    return [leaf is _DECAYS for leaf in tree.flatten_up_to(marked)]


def _is_function(mask: Any) -> bool:
    """A tree of booleans may be callable, too: a model of Equinox."""
    return callable(mask) and not any(isinstance(x, (bool, np.bool_, jax.Array)) for x in jax.tree.leaves(mask))
