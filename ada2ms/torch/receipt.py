"""Recorded steps: their gradients to other frameworks, and steps of other frameworks made by this one's optimizer."""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

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
from ada2ms.torch.groups import named_parameters
from ada2ms.torch.numbers import numpy, tensor
from ada2ms.torch.optimizer import Ada2MS

Model = nn.Module | Mapping[str, Tensor]
Gradients = Callable[[Any, Step], Any] | None


def export_gradients(
    model: Model, optimizer: torch.optim.Optimizer, *, names: Names = None, axes: Axes = None, extras: Extras = None
) -> dict[str, Any]:
    """The gradients that the optimizer's next step takes, for `Receipt.add`.

    To be called right before `optimizer.step()`, when they are unscaled and clipped, if they are. Of a group that
    maximizes they are negated.

    Args:
        model: the module, or its parameters by name.
        optimizer: over parameters of the model.
        names: as for `export_state`.
        axes: as there.
        extras: is not used; for `**plain_layers(model)`.

    Returns:
        Arrays by the state's names and in its layout; what has no gradient is not there.

    Raises:
        StateError: names or axes do not fit.
    """
    del extras
    called = {p: name for name, p in named_parameters(model).items()}
    found = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None and p in called:
                array = numpy(p.grad)
                found[called[p]] = -array if group.get("maximize") else array
    return portable_gradients(found, names, axes, list(called.values()))


def verification(
    model: Model,
    optimizer: torch.optim.Optimizer,
    state: State,
    verify: int,
    targets: Mapping[str, Target],
    transfer: Transfer,
    gradients: Gradients,
) -> Verification | None:
    """What the steps of a state's receipt show of an optimizer; None if that is not wanted."""
    replay: Replay | str = partial(_replay, model, optimizer, transfer=transfer, gradients=gradients)
    if not isinstance(optimizer, Ada2MS):
        replay = f"{type(optimizer).__name__} makes other steps than Ada2MS"
    others = list(named_parameters(model))
    return verified(state, verify, replay, targets, transfer, others=others, with_gradients=gradients is not None)


def _replay(
    model: Model,
    optimizer: torch.optim.Optimizer,
    start: State,
    steps: Sequence[RecordedStep],
    *,
    transfer: Transfer,
    gradients: Gradients,
) -> State:
    """What comes out of recorded steps, made by copies of the model and the optimizer.

    Args:
        model: stays as it is.
        optimizer: stays as it is.
        start: the earlier state.
        steps: in their order.
        transfer: into the copies, and out of them.
        gradients: computes those of the model here, to be compared with the recorded ones.

    Raises:
        StateError: the steps cannot be made.
        StepLostError: of `gradients`.
    """
    try:
        model, optimizer = copy.deepcopy((model, optimizer))
    except (RuntimeError, TypeError) as error:
        raise StateError("The steps cannot be made", [f"the model cannot be copied ({error})"]) from None
    transfer.into(model, optimizer, start)
    named = named_parameters(model)
    # A scheduler keeps what a group's rate began from, which is what tells the groups' rates apart.
    rates = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    for recorded in steps:
        _set_rate(optimizer, rates, recorded.step)
        if gradients is not None:
            _set_gradients(optimizer, {})
            gradients(model, recorded.step)
            grads = {name: named[name].grad for name in recorded.gradients}
            recorded.compare({name: None if g is None else numpy(g) for name, g in grads.items()})
        _set_gradients(optimizer, {named[name]: g for name, g in recorded.gradients.items()})
        optimizer.step()
    return transfer.out_of(model, optimizer)


def _set_gradients(optimizer: torch.optim.Optimizer, gradients: Mapping[Tensor, Any]) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = None
            if p in gradients:
                g = -gradients[p] if group.get("maximize") else gradients[p]
                p.grad = tensor(g).to(p.device, p.dtype)


def _set_rate(optimizer: torch.optim.Optimizer, rates: Sequence[float], step: Step) -> None:
    if step.lr is None:
        return
    whole = float(optimizer.defaults["lr"])
    if not whole and any(rates):
        raise StateError(
            "The steps cannot be made", ["the recorded learning rates are of an optimizer whose lr is 0 here"]
        )
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        lr = step.lr * (rate / whole if rate != whole else 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
