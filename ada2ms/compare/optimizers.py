"""The optimizers that are compared, each with the middle of the grids in which it is tuned."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch.optim import Optimizer

from ada2ms.compare.adamnx import AdamNX
from ada2ms.core import AdaptivitySchedule, Cosine, Exponential, Linear
from ada2ms.core.hyperparameters import Scope
from ada2ms.torch import Ada2MS

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class Candidate:
    """One optimizer.

    Attributes:
        make: from parameter groups (each with its `weight_decay`), peak learning rate and number of steps.
        rate: middle of the grid of learning rates.
        decay: middle of the grid of weight decays.
    """

    make: Callable[[Groups, float, int], Optimizer]
    rate: float
    decay: float


def _ada2ms(groups: Groups, lr: float, steps: int, *, adaptivity: float | str, scope: Scope) -> Optimizer:
    return Ada2MS(groups, lr, adaptivity=at(adaptivity, steps), scope=scope)


def at(adaptivity: float | str, steps: int) -> Any:
    """The adaptivity that a name stands for in a run of `steps` steps: a number, or a transition from 1 to 0."""
    transitions: dict[Any, AdaptivitySchedule] = {
        "linear": Linear(1, 0, steps),
        "cosine": Cosine(1, 0, steps),
        "exponential": Exponential(1, 0, steps / 4),  # 1/16 at the end
    }
    return transitions.get(adaptivity, adaptivity)


def _adabound(groups: Groups, lr: float, steps: int) -> Optimizer:
    from pytorch_optimizer import AdaBound

    # The package's default bounds are a hundred times its default learning rate: one number tunes both.
    return AdaBound(groups, lr=lr, final_lr=100 * lr)


def _padam(groups: Groups, lr: float, steps: int) -> Optimizer:
    from pytorch_optimizer import PAdam

    return PAdam(groups, lr=lr, weight_decouple=True)


# Grids have the same width for all. Decay is decoupled and scaled by the learning rate, so that ten times the rate goes
# with a tenth of the decay; but in SGD it is torch's, added to the gradient, and momentum makes it ten times as strong.
_BASELINES: Final = {
    "AdamW": Candidate(lambda groups, lr, steps: torch.optim.AdamW(groups, lr), 3e-3, 0.1),
    "SGD": Candidate(lambda groups, lr, steps: torch.optim.SGD(groups, lr, momentum=0.9), 3e-2, 1e-3),
    "SGD Nesterov": Candidate(
        lambda groups, lr, steps: torch.optim.SGD(groups, lr, momentum=0.9, nesterov=True), 3e-2, 1e-3
    ),
    "AdamNX": Candidate(lambda groups, lr, steps: AdamNX(groups, lr), 3e-3, 0.1),
    "AdaBound": Candidate(_adabound, 3e-3, 0.1),
    "Padam": Candidate(_padam, 3e-2, 1e-2),
}
ADAPTIVITIES: Final[tuple[float | str, ...]] = (0.25, 0.5, 0.75, "linear", "cosine", "exponential")
SCOPES: Final[tuple[Scope, ...]] = ("model", "tensor")


def named(adaptivity: float | str, scope: Scope) -> str:
    """What an Ada2MS is called here."""
    return f"Ada2MS {adaptivity}" + (" tensor" if scope == "tensor" else "")


CANDIDATES: Final[dict[str, Candidate]] = _BASELINES | {
    named(a, scope): Candidate(partial(_ada2ms, adaptivity=a, scope=scope), 3e-3, 0.1)
    for scope in SCOPES
    for a in ADAPTIVITIES
}
# Beyond those of the comparison, for the study of the default.
OPTIMIZERS: Final[dict[str, Candidate]] = CANDIDATES | {
    named(0.9, "model"): Candidate(partial(_ada2ms, adaptivity=0.9, scope="model"), 3e-3, 0.1)
}
