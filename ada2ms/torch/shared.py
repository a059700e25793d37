"""The numbers that parameters share: the global second moment s, its count k, and the number of skipped steps.

They lie in `optimizer.state[p]`, beside each parameter's own state: a parameter's copy is the same tensor as that of
every other one that shares it, so that a step updates it once; `tie` makes it so. s and k are shared by the parameters
of the groups with one b2. With scope "tensor" every parameter has an s, and k is the whole model's, as skipped steps
are in either scope.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _device_dtype_check_for_fused

from ada2ms.core.hyperparameters import (
    DEFAULT_COMPENSATED,
    DEFAULT_MAX_NORM,
    DEFAULT_NONFINITE,
    DEFAULT_SCOPE,
    as_float,
    check,
)
from ada2ms.torch.numbers import compensation_dtype, compute_dtype, count_dtype, counts_on_device, number

S, K, SKIPPED = SHARED = ("global_exp_avg_sq", "global_step", "skipped")
COMPENSATION = "compensation"
# What is the whole optimizer's, in each of its groups, and what a group has that does not say.
CHOICES = {
    "scope": DEFAULT_SCOPE,
    "nonfinite": DEFAULT_NONFINITE,
    "max_norm": DEFAULT_MAX_NORM,
    "compensated": DEFAULT_COMPENSATED,
}
# Of these, what is in groups only while it is not the default: checkpoints of versions without it then have the same
# keys, which torch.distributed.checkpoint insists on.
OPTIONAL = ("max_norm", "compensated")
State = dict[str, Any]
Pair = tuple[Tensor | None, Tensor]
Groups = Sequence[dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Tied:
    """What the parameters of each group share.

    Attributes:
        scope: the optimizer's.
        groups: the groups themselves, which may be moved in the optimizer's list, and given other parameters.
        pairs: the distinct (s, k); s is None with scope "tensor", where every parameter has its own.
        b2s: what groups must have in common to share a pair, for each pair.
        of_group: for each group, the index of its pair.
        skipped: the number of skipped steps.
        held: whether any parameter keeps a pair, so that a user who clears the state takes it away.
        moved: whether a step has made the state that is not there after a load, so that no pair is known here alone.
        signatures: of each group, as `signature` tells it; where one has changed, ties may have, too.
    """

    scope: str
    groups: list[dict[str, Any]]
    pairs: list[Pair]
    b2s: list[Any]
    of_group: list[int]
    skipped: Tensor
    held: bool
    moved: bool
    signatures: list[tuple[Any, ...]]


def signature(group: dict[str, Any]) -> tuple[Any, ...]:
    """What of a group decides with whom it shares its numbers, and where these lie."""
    params, b2 = group["params"], group["betas"][1]
    if isinstance(b2, Tensor):  # which may be written to; read where that waits for no device
        b2 = b2.item() if type(b2) is Tensor and b2.is_cpu else (b2, None if b2.is_inference() else b2._version)
    return (
        b2,
        *map(group.get, CHOICES),
        group["capturable"],
        group["fused"],
        params[0].device if params else None,
    )


def make_moments(p: Tensor, state: State, group: dict[str, Any]) -> None:
    """The state of a parameter that has had no update."""
    if group["fused"] and p.is_meta:
        _device_dtype_check_for_fused(p)  # raises
    device = p.device if counts_on_device(group, p.device) else "cpu"
    shared = {key: state.pop(key) for key in SHARED if key in state}
    if group["scope"] == "tensor":
        shared.setdefault(S, torch.zeros((), device="cpu"))
    state["step"] = torch.zeros((), dtype=count_dtype(group["fused"]), device=device)
    state["exp_avg"] = torch.zeros_like(p, dtype=compute_dtype(p.dtype), memory_format=torch.preserve_format)
    state["exp_avg_sq"] = torch.zeros_like(p, dtype=compute_dtype(p.dtype), memory_format=torch.preserve_format)
    fit_compensation(p, state, group)
    state.update(shared)


def fit_compensation(p: Tensor, state: State, group: dict[str, Any]) -> None:
    """Gives a parameter a compensation, or takes it away, as its dtype and its group say."""
    dtype = compensation_dtype(p.dtype) if group.get("compensated") else None
    if dtype is None:
        state.pop(COMPENSATION, None)  # from now on it would be wrong
    elif COMPENSATION not in state:
        state[COMPENSATION] = torch.zeros_like(p, memory_format=torch.preserve_format)
    elif state[COMPENSATION].dtype is not dtype:
        state[COMPENSATION] = state[COMPENSATION].to(dtype)


def check_alike(groups: Groups) -> None:
    """Raises ValueError unless what is the optimizer's is one for all groups."""
    for name in CHOICES:
        for i, group in enumerate(groups):
            check(name, choice(group, name))
            if choice(group, name) != choice(groups[0], name):
                raise ValueError(
                    f"Invalid {name}: {choice(group, name)!r} of group {i} (must be that of group 0, "
                    f"{choice(groups[0], name)!r}: it is the optimizer's)"
                )


def choice(group: dict[str, Any], name: str) -> Any:
    """What a group has of one of `CHOICES`."""
    return group.get(name, CHOICES[name])


def plain_choices(options: dict[str, Any]) -> dict[str, Any]:
    """Options, of which `max_norm` is a Python number and `compensated` a bool; they may be tensors, or NumPy's."""
    options = dict(options)
    if options.get("max_norm") is not None:
        options["max_norm"] = as_float(number(options["max_norm"]))
    if "compensated" in options:
        options["compensated"] = bool(options["compensated"])
    return options


def leave_out_defaults(group: dict[str, Any]) -> None:
    """Removes from a group what is in it only while it is not the default."""
    for name in OPTIONAL:
        if name in group and group[name] == CHOICES[name]:
            del group[name]


def home(group: dict[str, Any], p: Tensor | None = None, *, of_counts: bool = False) -> torch.device:
    """Where a group's s, or counts, lie: beside its parameters, or on the CPU as long as these are only shapes."""
    if p is None:
        p = group["params"][0] if group["params"] else None
    device = torch.device("cpu") if p is None or p.is_meta else p.device
    return device if not of_counts or counts_on_device(group, device) else torch.device("cpu")
