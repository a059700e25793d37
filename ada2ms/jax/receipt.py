"""Recorded steps: their gradients to other frameworks, and steps of other frameworks made by this one's optimizer."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax  # type: ignore[import-untyped]

from ada2ms.core.state import (
    Axes,
    Extras,
    Names,
    RecordedStep,
    Replay,
    State,
    StateError,
    Step,
    Target,
    Transfer,
    Verification,
    portable_gradients,
    verified,
)
from ada2ms.jax.dtypes import numpy
from ada2ms.jax.names import by_path, flatten
from ada2ms.jax.state import CompensatedAda2MSState, ScaleByAda2MSState
from ada2ms.jax.wrappers import the_node

Gradients = Callable[[Any, Step], Any] | None


def export_gradients(
    gradients: Any, *, names: Names = None, axes: Axes = None, extras: Extras = None
) -> dict[str, Any]:
    """Gradients that an update takes, for `Receipt.add`.

    Args:
        gradients: a tree like the parameters, as `update` is given it.
        names: as for `export_state`.
        axes: as there.
        extras: is not used; for `**plain_layers(model)`.

    Returns:
        Arrays by the state's names and in its layout; what has no gradient is not there.

    Raises:
        StateError: names or axes do not fit.
    """
    del extras
    found = {path: numpy(g) for path, g in by_path(gradients).items()}
    others = [] if callable(names) else [*(names or {}), *(axes or {})]  # of parameters without a gradient
    return portable_gradients(found, names, axes, others)


def verification(
    params: optax.Params,
    opt_state: optax.OptState,
    state: State,
    verify: int,
    targets: Mapping[str, Target],
    transfer: Transfer,
    optimizer: optax.GradientTransformation | None,
    gradients: Gradients,
) -> Verification | None:
    """What the steps of a state's receipt show of an optimizer; None if that is not wanted."""
    replay: Replay | str
    node = the_node(opt_state)
    if not isinstance(node, (CompensatedAda2MSState, ScaleByAda2MSState)):
        replay = f"{type(node).__name__} is of an optimizer that makes other steps than Ada2MS"
    elif optimizer is None:
        replay = "the steps need the optimizer that opt_state is of: optimizer=ada2ms(...)"
    else:
        replay = partial(_replay, params, opt_state, transfer=transfer, optimizer=optimizer, gradients=gradients)
    others = list(by_path(params))
    return verified(state, verify, replay, targets, transfer, others=others, with_gradients=gradients is not None)


def _replay(
    params: optax.Params,
    opt_state: optax.OptState,
    start: State,
    steps: Sequence[RecordedStep],
    *,
    transfer: Transfer,
    optimizer: optax.GradientTransformation,
    gradients: Gradients,
) -> State:
    """What comes out of recorded steps.

    Args:
        params: a tree.
        opt_state: of the optimizer.
        start: the earlier state.
        steps: in their order.
        transfer: into parameters and optimizer state, and out of them.
        optimizer: makes the steps.
        gradients: computes those of the model here, to be compared with the recorded ones.

    Raises:
        StateError: the steps cannot be made.
        StepLostError: of `gradients`.
    """
    boxes, structure = flatten(params)
    params = _plain(params)
    opt_state = _plain(opt_state)
    made: Any = jax.tree.structure(jax.eval_shape(optimizer.init, params))
    if made != jax.tree.structure(opt_state):
        raise StateError("The steps cannot be made", ["optimizer= is another one than opt_state is of"])
    params, opt_state, _ = transfer.into(params, opt_state, start)
    known = by_path(the_node(opt_state).mu).keys()
    update = jax.jit(optimizer.update)
    for recorded in steps:
        if recorded.step.lr is not None:
            opt_state = _with_rate(opt_state, recorded.step.lr)
        if gradients is not None:
            leaves = iter(jax.tree.leaves(params))
            boxed = structure.unflatten([jax.tree.map(lambda _: next(leaves), box) for _, box in boxes])  # noqa: B023
            here = by_path(gradients(boxed, recorded.step))
            recorded.compare({path: numpy(g) for path, g in here.items()})
        updates, opt_state = update(_tree(params, recorded, known), opt_state, params)
        params = jax.tree.map(_updated, params, updates, is_leaf=lambda x: x is None)
    return transfer.out_of(params, opt_state)


def _plain(tree: Any) -> Any:
    """A tree without flax' boxes, as flax gives it to Optax."""
    boxes, structure = flatten(tree)
    return structure.unflatten([next(iter(jax.tree.leaves(box)), None) for _, box in boxes])


def _tree(params: Any, recorded: RecordedStep, known: Collection[str]) -> Any:
    """Gradients as a tree like the parameters: None for what had none, zeros for what the optimizer does not have."""
    leaves, structure = flatten(params)
    found: list[Any] = []
    for path, p in leaves:
        g = recorded.gradients.get(path)
        if g is None:
            found.append(None if path in known else jnp.zeros_like(p))
        else:
            found.append(jnp.asarray(g, jnp.asarray(p).dtype))
    return structure.unflatten(found)


def _updated(p: Any, update: Any) -> Any:
    """As `optax.apply_updates` does, where there is an update."""
    return p if p is None or update is None else jnp.asarray(p + update, jnp.asarray(p).dtype)


def _with_rate(opt_state: Any, lr: float) -> Any:
    """With this learning rate in the states of `inject_hyperparams`.

    Raises:
        StateError: there is none that has one.
    """
    injected = 0

    def replaced(node: Any) -> Any:
        nonlocal injected
        if not _is_injected(node):
            return node
        injected += 1
        rate = jnp.asarray(lr, jnp.asarray(node.hyperparams["learning_rate"]).dtype)
        return node._replace(hyperparams={**node.hyperparams, "learning_rate": rate})

    opt_state = jax.tree.map(replaced, opt_state, is_leaf=_is_injected)
    if not injected:
        reason = (
            "learning rates are recorded, which Optax takes only by optax.inject_hyperparams (those of a schedule need "
            "not be recorded)"
        )
        raise StateError("The steps cannot be made", [reason])
    return opt_state


def _is_injected(node: Any) -> bool:
    return "learning_rate" in getattr(node, "hyperparams", {})
